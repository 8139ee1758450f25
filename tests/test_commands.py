"""The command lines as a user meets them: versions, help, and what runs on this machine."""

import re
import subprocess
import sys

import pytest

import tritonaff
from tritonaff import __main__ as command
from tritonaff.bench.__main__ import main as bench
from tritonaff.native import library
from tritonaff.ops import backend


def lines(capsys):
    assert command.main([]) == 0
    output = capsys.readouterr().out
    assert all(len(line) <= 80 for line in output.splitlines() if "/" not in line)
    joined = re.sub(r"\n {11}", " ", output)
    return dict(re.findall(r"^(\S+) +(.*)$", joined, re.MULTILINE))


def test_it_says_what_runs_here(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITONAFF_CACHE", str(tmp_path))
    monkeypatch.setattr(library, "find_compiler", lambda: ["/usr/bin/c++"])
    monkeypatch.setattr(command, "triton_obstacle", lambda device: "triton is not installed")
    shown = lines(capsys)
    assert shown["tritonaff"].startswith(tritonaff.__version__)
    assert {"python", "torch", "triton", "cpu"} <= shown.keys()
    assert set(backend.BACKENDS) - {"auto"} <= shown.keys()
    count = f"0 of {len(library.OPERATIONS)} operations compiled"
    assert shown["native"] == f"runs on cpu: {count}, the rest on first use by /usr/bin/c++"
    assert str(tmp_path) in shown["compiled"]
    assert not list(tmp_path.iterdir())  # it only looks


def test_it_says_why_a_backend_cannot_run(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITONAFF_CACHE", str(tmp_path))
    monkeypatch.setattr(command, "triton_obstacle", lambda device: "triton is not installed")
    monkeypatch.setattr(library, "find_compiler", lambda: None)
    shown = lines(capsys)
    assert shown["triton"] == "cannot run: triton is not installed"
    assert shown["native"].startswith("cannot run: no C++ compiler")
    monkeypatch.setenv("TRITONAFF_NATIVE", "0")
    assert lines(capsys)["native"] == "cannot run: TRITONAFF_NATIVE turns native kernels off"


def test_a_process_of_its_own():
    output = subprocess.run(
        [sys.executable, "-m", "tritonaff", "--version"], capture_output=True, text=True, check=True
    )
    assert output.stdout == f"tritonaff {tritonaff.__version__}\n"


def stats(arguments):
    return pytest.importorskip("tritonaff.statistics_cli").main(arguments)


@pytest.mark.parametrize("main", [command.main, bench, stats])
def test_versions_and_help(main, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for option, expected in (("--version", tritonaff.__version__), ("--help", "--version")):
        with pytest.raises(SystemExit) as exit:
            main([option])
        assert exit.value.code == 0
        output = capsys.readouterr().out
        assert expected in output
        assert "``" not in output
        assert ":func:" not in output
        assert all(len(line) <= 80 for line in output.splitlines())


def test_columns_are_explained(capsys):
    with pytest.raises(SystemExit):
        bench(["run", "--help"])
    output = capsys.readouterr().out
    for column in ("mode", "impl", "ms", "x eager", "x compiled", "compile s", "peak MB"):
        assert re.search(rf"^  (.*, )?{column}(,|  |$)", output, re.MULTILINE)
