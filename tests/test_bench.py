"""The bench refuses wrong implementations; its tables and files can be read."""

import importlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import tritonaff
from tritonaff.bench import __main__, machine, measure
from tritonaff.bench.__main__ import main
from tritonaff.bench.measure import compiler_works
from tritonaff.bench.rivals import rivals
from tritonaff.bench.tables import to_json, write_json
from tritonaff.testing import (
    CASES,
    ParityError,
    check_parity,
    differentiable,
    make_inputs,
)

RESULTS = Path(__file__).parent.parent / "docs/results"
QUICK_ALL = ["run", "--quick", "--device", "cpu", "--impl", "reference,portable"]
QUICK = [*QUICK_ALL, "--op", "affinity_field"]


@pytest.fixture
def no_compiler(monkeypatch):
    """Compiling takes most of a quick run; one test below runs with it."""
    monkeypatch.setattr(measure, "compiler_works", lambda device: False)


def test_rows(capsys, tmp_path, no_compiler):
    path = tmp_path / "rows.json"
    assert main([*QUICK_ALL, "--mode", "fwd,fwd_bwd", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if line in CASES] == list(CASES)
    assert "CPU" in printed
    assert f"torch {torch.__version__}" in printed
    content = json.loads(path.read_text())
    assert set(content) == {"device", "versions", "rows"}
    assert [(row["op"], row["impl"], row["mode"]) for row in content["rows"]] == [
        (op, impl, mode)
        for op in CASES
        for mode in ("fwd", "fwd_bwd")
        for impl in ("reference", "portable", "cross_entropy", *rivals(op))
    ]
    for row in content["rows"]:
        assert list(row) == [
            "op", "impl", "mode", "dtype", "shape", "ms", "speedup_eager", "speedup_compiled",
            "compile_s", "peak_bytes", "gb_per_s",
        ]  # fmt: skip
        assert row["ms"] > 0
        assert row["peak_bytes"] > 0
        assert row["speedup_compiled"] is None
        assert (row["impl"] == "reference") == (row["speedup_eager"] == 1)
        assert f"{row['ms']:.2f}" in printed


def test_what_no_memory_holds_is_named_and_left_out(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("tritonaff.checks.MAX_MATRIX_BYTES", 14_000_000)
    path = tmp_path / "rows.json"
    arguments = ["--op", "affinity_regression_every_pixel", "--json", str(path)]
    arguments += ["--shape", "1,3,5,6", "1,3,20,100"]
    assert main([*QUICK_ALL, "--mode", "fwd", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "not run: affinity_regression_every_pixel 1,3,20,100 reference: affinity matr" in printed
    content = json.loads(path.read_text())
    (left_out,) = content["left_out"]
    assert (left_out["impl"], left_out["shape"]) == (["reference"], [1, 3, 20, 100])
    compiled = [row["compile_s"] for row in content["rows"] if row["impl"] == "portable"]
    assert all(compiled) == compiler_works(torch.device("cpu"))
    implementations = [(row["shape"][2], row["impl"]) for row in content["rows"]]
    assert (5, "reference") in implementations
    assert (20, "portable") in implementations
    assert (20, "reference") not in implementations


def wrong_sign(function, place):
    def wrong(*args, **options):
        results = function(*args, **options)
        if isinstance(results, torch.Tensor):
            return -results
        results = list(results)
        if results[place] is not None:
            results[place] = -results[place]
        return tuple(results)

    return wrong


@pytest.mark.parametrize(
    ("op", "part", "place"),
    [
        ("affinity_field", "statistics", 0),
        ("affinity_field", "compute", 0),
        ("affinity_field", "compute", 3),
        ("affinity_propagation", "forward", 0),
        ("affinity_propagation", "backward", 0),
    ],
)
def test_it_refuses_to_time_a_wrong_implementation(monkeypatch, capsys, tmp_path, op, part, place):
    portable = importlib.import_module(f"tritonaff.portable.{op}")
    monkeypatch.setattr(portable, part, wrong_sign(getattr(portable, part), place))
    path = tmp_path / "rows.json"
    assert main([*QUICK, "--op", op, "--json", str(path)]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"{op} portable" in printed.err
    assert not path.exists()


@pytest.mark.nightly
def test_it_refuses_to_time_what_goes_wrong_only_on_large_images(monkeypatch, capsys, no_compiler):
    """Left-out blocks are found, although the corner for full parity has one block only."""
    from tritonaff.portable import affinity_field as portable

    blocks = portable.blocks
    monkeypatch.setattr(portable, "blocks", lambda logits: list(blocks(logits))[:1])
    assert main([*QUICK, "--shape", "1,5,256,512"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "portable: loss of the inputs to time is off" in printed.err


def test_parity_sees_one_wrong_border_pixel(monkeypatch):
    from tritonaff.portable import affinity_field as portable

    compute = portable.compute

    def wrong(*args, **options):
        *tables, gradient = compute(*args, **options)
        if gradient is not None:
            gradient[..., -1, -1] *= 1.01
        return *tables, gradient

    monkeypatch.setattr(portable, "compute", wrong)
    with pytest.raises(ParityError, match="gradient is off by"):
        check_parity(CASES["affinity_field"], "portable", *make_inputs((1, 5, 24, 24)))


def test_peak_bytes_counts_what_lives_at_one_time():
    def run(_):
        first = torch.empty(1000, dtype=torch.float32)
        del first
        return torch.empty(1500, dtype=torch.float32), torch.empty(500, dtype=torch.float32)

    assert measure.peak_bytes(run, torch.device("cpu")) == pytest.approx(8000, rel=0.1)


def test_portable_memory_is_at_most_eight_times_the_logits(no_compiler):
    """Random labels too, where nearly every pair is an edge."""
    logits, target = make_inputs((1, 19, 256, 512))
    case = CASES["affinity_field"]
    for labels in (target, torch.randint(0, 19, target.shape)):
        result = measure.measure(case, "portable", ("fwd_bwd",), (logits, labels), quick=True)
        assert result.by_mode["fwd_bwd"].peak_bytes <= 8 * logits.nbytes


def test_portable_propagation_holds_its_iterates_and_gates():
    """Iterates and gates of one large image, for any batch."""
    case = CASES["affinity_propagation"]

    def peak(inputs):
        def forward_backward(_):
            with tritonaff.use_backend("portable"):
                torch.autograd.grad(case.loss(*leaves), differentiable(leaves))

        leaves = [x.requires_grad_(x.is_floating_point()) for x in inputs]
        return measure.peak_bytes(forward_backward, torch.device("cpu"))

    logits, _, affinity = one = case.make_inputs((1, 19, 160, 192))
    assert peak(one) <= 16 * logits.nbytes + 3.5 * affinity.nbytes
    # Another image costs no more than its inputs and outputs.
    three = case.make_inputs((3, 19, 160, 192))
    assert peak(three) - peak(one) <= 2 * (5 * logits.nbytes + affinity.nbytes)


def test_interpreted_tiles_are_not_timed(capsys):
    assert main(["run", "--quick", "--device", "cpu", "--impl", "triton"]) == 1
    assert "not timed" in capsys.readouterr().err


def test_list(capsys):
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    assert all(op in printed for op in CASES)


@pytest.mark.parametrize("device", ["nonsense", "meta", "hpu", "vulkan"])
def test_a_device_that_cannot_compute(capsys, device):
    assert main(["run", "--quick", "--device", device]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"tritonaff-bench: device {device} cannot be used: ")


def test_shapes_beyond_memory_are_named_and_left_out(capsys, tmp_path, monkeypatch, no_compiler):
    path = tmp_path / "rows.json"
    huge = "64,1000,100000,10000"  # 512 TB of float64
    arguments = [*QUICK, "--mode", "fwd", "--json", str(path), "--shape"]
    assert main([*arguments, huge]) == 1
    reason = "reference,portable: needs more memory than cpu has"
    expected = f"tritonaff-bench: not run: affinity_field {huge} {reason}\n"
    assert capsys.readouterr() == ("", expected)
    assert not path.exists()

    assert main([*arguments, huge, "1,3,5,6"]) == 0
    assert f"not run: affinity_field {huge} {reason}\n" in capsys.readouterr().out
    content = json.loads(path.read_text())
    (left_out,) = content["left_out"]
    assert left_out["shape"] == [64, 1000, 100000, 10000]
    assert {tuple(row["shape"]) for row in content["rows"]} == {(1, 3, 5, 6)}

    def broken(*args):
        raise RuntimeError("something else")

    monkeypatch.setattr(measure, "measure", broken)
    with pytest.raises(RuntimeError, match="something else"):
        main([*arguments, "1,3,5,6"])


@pytest.mark.parametrize("place", ["", "file/rows.json"])
def test_where_json_cannot_go_is_said_before_anything_is_measured(
    capsys, tmp_path, monkeypatch, place
):
    def measured(args):
        raise AssertionError("it was measured")

    monkeypatch.setattr(__main__, "_run", measured)
    (tmp_path / "file").write_text("")
    assert main(["run", "--json", str(tmp_path / place)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(r"tritonaff-bench: \[Errno \d+\] .*" + re.escape(str(tmp_path)), line)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_interrupt_takes_one_line(capsys, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "measure", interrupted)
    assert main(QUICK) == 130
    assert capsys.readouterr() == ("", "tritonaff-bench: interrupted\n")


def test_compiled_is_not_measured_without_a_compiler(capsys, monkeypatch):
    monkeypatch.setattr(measure, "compiler_works", lambda device: False)
    assert main(["run", "--quick", "--device", "cpu", "--impl", "compiled"]) == 1
    assert "compiled needs a C++ compiler" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--impl", "fast"],
        ["--shape", "1,2,3"],
        ["--shape", "99999999999,9,99999999999,1"],
        ["--mode", "x"],
    ],
)
def test_bad_arguments(arguments):
    with pytest.raises(SystemExit):
        main(["run", *arguments])


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_that_of_what_is_measured(tmp_path, monkeypatch):
    def git(*arguments):
        author = ["-c", "user.name=a", "-c", "user.email=a"]
        subprocess.run(["git", *author, *arguments], cwd=tmp_path, check=True)

    for file in ("package/code.py", "tests/test.py", "docs/results/gpu.json"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_text("1")
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "first")
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "package/code.py"))
    commit = machine.versions()["commit"]
    assert re.fullmatch("[0-9a-f]{7,}", commit)
    (tmp_path / "docs/results/gpu.json").write_text("2")
    assert machine.versions()["commit"] == commit
    (tmp_path / "tests/test.py").write_text("2")
    assert machine.versions()["commit"] == f"{commit}-dirty"


def test_json_has_a_line_for_each_row(tmp_path):
    rows = [{"shape": [1, 2], "ms": 0.5}, {"shape": [], "ms": None}]
    content = {"device": "CPU", "versions": {"torch": "2"}, "rows": rows, "none": [], "by_name": {}}
    content["by_name"] = {"one": {"values": [[1.0], [2.0]]}, "two": [3]}
    path = tmp_path / "rows.json"
    write_json(path, content)
    assert json.loads(path.read_text()) == content
    lines = path.read_text().splitlines()
    assert lines[3:6] == ['"rows": [', f" {json.dumps(rows[0])},", f" {json.dumps(rows[1])}"]
    assert ' "one": {"values": [[1.0], [2.0]]},' in lines
    assert len(lines) == 4 + 2 * (2 + 2) + 1


@pytest.mark.parametrize("path", sorted(RESULTS.rglob("*.json")), ids=lambda path: path.stem)
def test_committed_results_have_a_line_for_each_row(path):
    assert to_json(json.loads(path.read_text())) == path.read_text()
