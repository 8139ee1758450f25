"""The suite of a GPU, tried on a CPU: it refuses while tests are red, loses no row, goes on where
it was, and judges.
"""

import json
import threading
import time
from pathlib import Path

import pytest
import torch

from tritonaff.bench import gpu_suite, measure, performance_page
from tritonaff.bench.cases import CASES
from tritonaff.bench.gpu_suite import NotHere, OutOfTime, Row, main
from tritonaff.bench.performance_page import CRITERIA, Criterion, write_page

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """Runs it on tiny shapes: exit status and rows."""
    monkeypatch.setattr(measure, "compiler_works", lambda device: False)  # it takes minutes
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(gpu_suite, "run_tests", lambda file, seconds: {"summary": "1 passed"})

    def run(*arguments, quick=True):
        arguments = [*arguments, *(["--quick"] if quick else [])]
        status = main(["--device", "cpu", "--results", str(tmp_path), *arguments])
        paths = list(tmp_path.glob("*.json"))
        return status, json.loads(paths[0].read_text())["rows"] if paths else {}

    return run


def fast_row(name, measure_it):
    return Row(name, measure_it, (gpu_suite.SMALL,), ("float32",))


def test_every_row_of_the_table_runs(suite, capsys):
    status, rows = suite()
    assert status == 0
    assert set(rows) == {"correctness test_rates.py", *(key for key, *_ in gpu_suite.jobs(True))}
    on_gpus = ("field_launches", "grids_launches", "boundary", "field_against_compiled")
    for key, row in rows.items():
        left_out = key.startswith((*on_gpus, "compile_seconds"))
        assert row["status"] == ("left out" if left_out and "error" in row else "ok"), (key, row)
    row = rows["field_alone float32 2,5,16,20"]
    assert row["ratio"] == pytest.approx(row["ms"] / row["rival_ms"])
    assert f"ratio {row['ratio']:.4g}" in capsys.readouterr().out


def test_every_criterion_has_its_row():
    rows = {row.name: row for row in gpu_suite.ROWS}
    for criterion in CRITERIA:
        assert criterion.dtype is None or criterion.dtype in rows[criterion.row].dtypes


def test_it_refuses_figures_while_tests_are_red(suite, monkeypatch, capsys):
    def red(file, seconds):
        raise AssertionError("1 failed")

    assert suite("--only", "figures") == (2, {})
    monkeypatch.setattr(gpu_suite, "run_tests", red)
    status, rows = suite()
    assert status == 1
    assert list(rows) == ["correctness test_rates.py"]
    assert "no figures" in capsys.readouterr().err


def test_the_tests_really_run():
    assert "passed" in gpu_suite.run_tests("test_rates.py", 60)["summary"]
    with pytest.raises(AssertionError, match=r"no tests ran|not found"):
        gpu_suite.run_tests("test_nothing.py", 60)
    with pytest.raises(OutOfTime):
        gpu_suite.run_tests("test_rates.py", 0.1)


def test_the_test_files_run_side_by_side(suite, monkeypatch):
    both_run = threading.Barrier(2, timeout=20)
    monkeypatch.setattr(gpu_suite, "TEST_FILES", ("one", "two"))
    monkeypatch.setattr(gpu_suite, "run_tests", lambda file, seconds: {"first": both_run.wait()})
    monkeypatch.setattr(gpu_suite, "jobs", lambda quick: ())
    _, rows = suite("--only", "correctness", quick=False)
    assert {row["status"] for row in rows.values()} == {"ok"}


def test_a_row_that_fails_is_recorded_and_the_others_run(suite, monkeypatch):
    def fails(*_):
        raise RuntimeError("CUDA error: an illegal memory access")

    def is_not_here(*_):
        raise NotHere("needs wings")

    good = fast_row("good", lambda *_: {"ratio": 2.0})
    rows = (fast_row("bad", fails), fast_row("other", is_not_here), good)
    monkeypatch.setattr(gpu_suite, "ROWS", rows)
    status, rows = suite()
    assert status == 1
    results = {key.split()[0]: row for key, row in rows.items()}
    assert results["bad"]["status"] == "failed"
    assert "illegal memory access" in results["bad"]["error"]
    assert (results["other"]["status"], results["other"]["error"]) == ("left out", "needs wings")
    assert results["good"]["ratio"] == 2
    # Not tried again, unless told to.
    monkeypatch.setattr(gpu_suite, "ROWS", (fast_row("bad", lambda *_: {"ratio": 3.0}), good))
    assert suite()[0] == 1
    assert suite("--retry")[0] == 0


def test_it_goes_on_where_it_was(suite, monkeypatch):
    measured = []

    def slow(shape, dtype, bench):
        measured.append(shape)
        if len(measured) == 2:
            time.sleep(30)
        return {"ratio": 1.0}

    rows = tuple(fast_row(name, slow) for name in ("one", "two", "three"))
    monkeypatch.setattr(gpu_suite, "ROWS", rows)
    start = time.monotonic()
    status, results = suite("--minutes", "0.1")
    assert time.monotonic() - start < 25
    assert status == 2
    assert [key.split()[0] for key in results] == ["correctness", "one"]
    status, results = suite()
    assert status == 0
    assert [key.split()[0] for key in results] == ["correctness", "one", "two", "three"]
    assert len(measured) == 4


def test_another_version_starts_afresh(suite, monkeypatch):
    monkeypatch.setattr(gpu_suite, "ROWS", (fast_row("one", lambda *_: {"ratio": 1.0}),))
    suite()
    monkeypatch.setattr(gpu_suite, "versions", lambda: {"commit": "another"})
    assert suite("--only", "figures")[0] == 2


def test_exercise_runs_every_operation(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    ran = []

    def record(loss, *inputs):
        ran.append(loss)
        return step(loss, *inputs)

    step = gpu_suite.step
    monkeypatch.setattr(gpu_suite, "step", record)
    assert main(["exercise", "--device", "cpu"]) == 0
    assert ran[: len(CASES)] == [case.loss for case in CASES.values()]


def test_ncu_is_read():
    output = """==PROF== Connected
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","7","gram_kernel","gpu__time_duration.sum","ns","12,345"
"0","7","gram_kernel","sm__throughput.avg.pct_of_peak_sustained_elapsed","%","61.5"
"1","7","gates_kernel","gpu__time_duration.sum","ns","80"
"""
    assert gpu_suite.ncu_kernels(output) == [
        {"kernel": "gram_kernel", "ns": 12345.0, "percent_of_instructions": 61.5},
        {"kernel": "gates_kernel", "ns": 80.0},
    ]
    assert gpu_suite.ncu_kernels("==ERROR== ERR_NVGPUCTRPERM") == []


def test_a_tool_that_is_not_installed_is_left_out(monkeypatch):
    monkeypatch.setattr(gpu_suite.shutil, "which", lambda *_, **__: None)
    with pytest.raises(NotHere, match="compute-sanitizer is not installed"):
        gpu_suite.run_tool("memcheck", torch.device("cpu"))


@pytest.mark.parametrize(
    ("least", "aim", "value", "holds"),
    [
        (50, 200, 49, "no"),
        (50, 200, 50, "yes"),
        (50, 200, 200, "aim"),
        (2.5, 1.0, 2.6, "no"),
        (2.5, 1.0, 2.5, "yes"),
        (2.5, 1.0, 1.0, "aim"),
    ],
)
def test_judge(least, aim, value, holds):
    assert Criterion("", "", "", least, aim).holds(value) == holds


def suite_content(**rows):
    rows = {key.replace("__", " "): row for key, row in rows.items()}
    head = {"suite": True, "quick": False, "device": "H200", "versions": {"torch": "2.11"}}
    return {**head, "rows": rows}


def page_of(tmp_path, content):
    (tmp_path / "h200.json").write_text(json.dumps(content))
    write_page(tmp_path, tmp_path / "page.md")
    return (tmp_path / "page.md").read_text()


def test_the_page_judges_by_the_worst_row(tmp_path):
    def fused(ratio):
        return {"status": "ok", "ratio": ratio}

    rows = {
        "field_fused__float32__1": fused(0.9),
        "field_fused__float32__2": fused(2.4),
        "field_fused__bfloat16__1": fused(1.6),
        "dilated__float32__1": {"status": "ok", "fwd_percent": 90.0, "bwd_percent": 70.0},
        "dilated__float32__2": {"status": "ok", "fwd_percent": 86.0, "bwd_percent": 59.0},
        "every_pixel__float32__1": {"status": "failed", "error": "OutOfMemoryError: no\nmore"},
    }
    page = page_of(tmp_path, suite_content(**rows))
    lines = {line.split(" | ")[0][2:]: line.split(" | ")[1:] for line in page.splitlines()}
    title = "cross-entropy + affinity field in one op, times cross-entropy, float32"
    assert lines[title] == ["2.4", "float32 2", "≤ 2.5", "≤ 1", "yes |"]
    assert lines["... bfloat16, against autocast"][-1] == "no |"
    assert lines["dilated affinity, forward, % of copy bandwidth"][0] == "86"
    assert lines["dilated affinity, forward, % of copy bandwidth"][-1] == "aim |"
    assert lines["... backward"][0] == "59"
    assert lines["... backward"][-1] == "no |"
    every_pixel = "affinity regression, every pixel, times cross-entropy"
    assert lines[every_pixel][-1] == "no (float32 1: failed) |"
    assert lines["propagation, times as fast as eager"][-1] == "not measured |"
    assert "No GPU" not in page


def test_a_run_that_only_tried_the_suite_is_no_evidence(tmp_path):
    page = page_of(tmp_path, {**suite_content(), "quick": True})
    assert "H200" not in page
    assert "No GPU has been measured yet" in page


def test_the_page_is_that_of_the_results(tmp_path):
    """docs/performance.md is written by `python -m tritonaff.bench.gpu_suite report`."""
    write_page(DOCS / "results", tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text() == (DOCS / "performance.md").read_text()
    assert performance_page.IMPLIED.keys() <= {
        name for criterion in CRITERIA for name in performance_page.implied_by(criterion)
    }
