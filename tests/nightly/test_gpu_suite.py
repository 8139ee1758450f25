"""The GPU suite, on a CPU: no row is lost, a run resumes, the page judges."""

import json
import threading
import time
from pathlib import Path

import gpu_rows
import gpu_suite
import gpu_tools
import performance_page
import pytest
import torch
from gpu_rows import NotHere, Row
from gpu_suite import OutOfTime, main
from performance_page import CRITERIA, Criterion, write_page

from tritonaff.bench import measure
from tritonaff.ops import backend
from tritonaff.testing import CASES

DOCS = Path(__file__).parent.parent.parent / "docs"


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """Runs the suite on tiny shapes: exit status and rows."""
    monkeypatch.setattr(measure, "compiler_works", lambda device: False)  # minutes
    monkeypatch.setattr(backend, "_interprets", lambda: False)  # nor are tiles interpreted
    monkeypatch.setattr(gpu_suite, "run_tests", lambda *_: {"summary": "1 passed"})

    def run(*arguments, quick=True):
        arguments = [*arguments, *(["--quick"] if quick else [])]
        status = main(["--device", "cpu", "--results", str(tmp_path), *arguments])
        paths = list(tmp_path.glob("*.json"))
        return status, json.loads(paths[0].read_text())["rows"] if paths else {}

    return run


def fast_row(name, measure_it):
    return Row(name, measure_it, (gpu_rows.SMALL,), ("float32",))


def test_every_row_of_the_table_runs(suite, capsys):
    status, rows = suite()
    assert status == 0
    assert set(rows) == {"correctness test_rates.py", *(key for key, *_ in gpu_rows.jobs(True))}
    on_gpus = ("field_launches", "grids_launches", "boundary", "field_against_compiled")
    for key, row in rows.items():
        left_out = key.startswith((*on_gpus, "compile_seconds"))
        assert row["status"] == ("left out" if left_out and "error" in row else "ok"), (key, row)
    row = rows["field_alone float32 2,5,16,20"]
    assert row["ratio"] == pytest.approx(row["ms"] / row["rival_ms"])
    assert f"ratio {row['ratio']:.4g}" in capsys.readouterr().out


def test_times_of_the_kernels_alone(suite, monkeypatch):
    """With a profiler that sees the launches."""
    rows = tuple(row for row in gpu_rows.ROWS if row.name in ("grids", "dilated"))
    monkeypatch.setattr(gpu_rows, "ROWS", rows)
    monkeypatch.setattr(gpu_rows.Bench, "launches", lambda *_: (2, 0.5))
    _, rows = suite("--only", "figures")
    row = rows["grids float32 2,5,16,20"]
    assert (row["device_ms"], row["rival_device_ms"], row["device_ratio"]) == (0.5, 0.5, 1)
    row = rows["dilated float32 2,32,16,20"]
    assert row["fwd_device_ms"] == 0.5
    megabytes = 2 * 16 * 20 * (4 * 32 + 8) / 1e6
    expected = 100 * megabytes / 0.5 / row["copy_gb_per_s"]
    assert row["fwd_percent"] == pytest.approx(expected, rel=0.01)


def test_every_criterion_has_its_row():
    rows = {row.name: row for row in gpu_rows.ROWS}
    for criterion in CRITERIA:
        assert criterion.dtype is None or criterion.dtype in rows[criterion.row].dtypes


def test_the_tests_really_run(tmp_path):
    log = tmp_path / "log"
    assert "passed" in gpu_suite.run_tests("test_rates.py", 2, 60, log)["summary"]
    with pytest.raises(AssertionError, match=r"no tests ran|not found"):
        gpu_suite.run_tests("test_nothing.py", 1, 60, log)
    with pytest.raises(OutOfTime):
        gpu_suite.run_tests("test_rates.py", 1, 0.1, log)
    text = log.read_text()
    assert "test_rates.py::test_a_rate_beyond_64_bits" in text
    assert "test_nothing.py" in text


def test_a_test_file_that_hangs_says_where(tmp_path, monkeypatch):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "hangs.py").write_text(
        "import time\ndef test_that_hangs():\n    time.sleep(60)"
    )
    monkeypatch.setattr(gpu_suite, "ROOT", tmp_path)
    with pytest.raises(OutOfTime):
        gpu_suite.run_tests("hangs.py", 1, 5, tmp_path / "log")
    assert "test_that_hangs" in (tmp_path / "log").read_text()


def test_the_test_files_run_side_by_side_and_one_alone(suite, monkeypatch):
    both_run, ended = threading.Barrier(2, timeout=20), []

    def run_tests(file, workers, seconds, log):
        if file == "alone":
            assert sorted(ended) == ["one", "two"]
        else:
            both_run.wait()
        ended.append(file)
        return {}

    monkeypatch.setattr(gpu_suite, "TEST_FILES", {"alone": 1, "one": 4, "two": 1})
    monkeypatch.setattr(gpu_suite, "ALONE", "alone")
    monkeypatch.setattr(gpu_suite, "run_tests", run_tests)
    _, rows = suite("--only", "correctness", quick=False)
    assert {row["status"] for row in rows.values()} == {"ok"}
    assert len(rows) == 3


def test_a_slow_test_file_does_not_lose_the_others(suite, monkeypatch):
    def run_tests(file, workers, seconds, log):
        if file == "slow":
            raise OutOfTime("took more than 300 s")
        if file == "red":
            raise AssertionError("1 failed")
        return {}

    monkeypatch.setattr(gpu_suite, "TEST_FILES", {"slow": 1, "red": 1, "green": 1})
    monkeypatch.setattr(gpu_suite, "run_tests", run_tests)
    monkeypatch.setattr(gpu_rows, "ROWS", (fast_row("one", lambda *_: {"ratio": 1.0}),))
    status, rows = suite(quick=False)
    assert status == 1
    assert {key.split()[1]: row["status"] for key, row in rows.items()} == {
        "red": "failed", "green": "ok", "float32": "ok",
    }  # fmt: skip
    monkeypatch.setattr(gpu_suite, "run_tests", lambda *_: {})
    assert suite("--retry", quick=False)[0] == 0


def test_a_row_that_fails_is_recorded_and_the_others_run(suite, monkeypatch):
    def fails(*_):
        raise RuntimeError("CUDA error: an illegal memory access")

    def is_not_here(*_):
        raise NotHere("needs wings")

    good = fast_row("good", lambda *_: {"ratio": 2.0})
    rows = (fast_row("bad", fails), fast_row("other", is_not_here), good)
    monkeypatch.setattr(gpu_rows, "ROWS", rows)
    status, rows = suite()
    assert status == 1
    results = {key.split()[0]: row for key, row in rows.items()}
    assert results["bad"]["status"] == "failed"
    assert "illegal memory access" in results["bad"]["error"]
    assert "in fails" in results["bad"]["traceback"]
    assert (results["other"]["status"], results["other"]["error"]) == ("left out", "needs wings")
    assert results["good"]["ratio"] == 2
    # Not tried again, unless told to.
    monkeypatch.setattr(gpu_rows, "ROWS", (fast_row("bad", lambda *_: {"ratio": 3.0}), good))
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
    monkeypatch.setattr(gpu_rows, "ROWS", rows)
    start = time.monotonic()
    status, results = suite("--minutes", "0.1")
    assert time.monotonic() - start < 25
    assert status == 2
    assert [key.split()[0] for key in results] == ["correctness", "one"]
    status, results = suite()
    assert status == 0
    assert [key.split()[0] for key in results] == ["correctness", "one", "two", "three"]
    assert len(measured) == 4


def test_a_row_that_ends_the_process_has_failed(suite, monkeypatch, tmp_path):
    def kills(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_rows, "ROWS", (fast_row("one", kills),))
    with pytest.raises(KeyboardInterrupt):
        suite()
    two = fast_row("two", lambda *_: {"ratio": 1.0})
    monkeypatch.setattr(gpu_rows, "ROWS", (fast_row("one", kills), two))
    status, rows = suite()
    assert status == 1
    assert [row["status"] for row in rows.values()] == ["ok", "failed", "ok"]


def test_without_its_device_it_ends(suite, monkeypatch):
    def fails(*_):
        raise RuntimeError("CUDA error: an illegal memory access")

    rows = fast_row("one", fails), fast_row("two", lambda *_: {"ratio": 1.0})
    monkeypatch.setattr(gpu_rows, "ROWS", rows)
    monkeypatch.setattr(gpu_suite, "is_lost", lambda device: True)
    status, results = suite()
    assert status == 3
    assert [key.split()[0] for key in results] == ["correctness", "one"]
    monkeypatch.setattr(gpu_suite, "is_lost", lambda device: False)
    status, results = suite()
    assert status == 1
    assert [row["status"] for row in results.values()] == ["ok", "failed", "ok"]


def test_rows_say_of_which_commit_they_are(suite, monkeypatch):
    def versions(**changes):
        return lambda: {"torch": "2.11", "commit": "a", **changes}

    one, two = (fast_row(name, lambda *_: {"ratio": 1.0}) for name in ("one", "two"))
    monkeypatch.setattr(gpu_rows, "ROWS", (one,))
    monkeypatch.setattr(gpu_suite, "versions", versions())
    suite()
    monkeypatch.setattr(gpu_rows, "ROWS", (one, two))
    monkeypatch.setattr(gpu_suite, "versions", versions(commit="b"))
    assert [row["commit"] for row in suite()[1].values()] == ["a", "a", "b"]
    monkeypatch.setattr(gpu_suite, "versions", versions(torch="2.12"))
    assert [*suite("--only", "figures")[1]] == [key for key, *_ in gpu_rows.jobs(True)]


def test_exercise_runs_every_operation(monkeypatch):
    monkeypatch.setattr(backend, "_interprets", lambda: False)
    ran = []

    def record(loss, *inputs):
        ran.append(loss)
        return step(loss, *inputs)

    step = gpu_rows.step
    monkeypatch.setattr(gpu_rows, "step", record)
    gpu_rows.main(["exercise", "--device", "cpu", "--height", "12"])
    assert ran[: len(CASES)] == [case.loss for case in CASES.values()]


def test_ncu_is_read():
    output = """==PROF== Connected
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","7","gram_kernel","gpu__time_duration.sum","ns","12,345"
"0","7","gram_kernel","sm__throughput.avg.pct_of_peak_sustained_elapsed","%","61.5"
"0","7","gram_kernel","dram__throughput.avg.pct_of_peak_sustained_elapsed","%","n/a"
"1","7","gates_kernel","gpu__time_duration.sum","ns","80"
"""
    assert gpu_tools.ncu_kernels(output) == [
        {"kernel": "gram_kernel", "ns": 12345.0, "percent_of_instructions": 61.5},
        {"kernel": "gates_kernel", "ns": 80.0},
    ]
    assert gpu_tools.ncu_kernels("==ERROR== ERR_NVGPUCTRPERM") == []


def test_ncu_is_told_every_kernel():
    static = pytest.importorskip("static_counts")
    kernels = {name for operation in static.OPERATIONS for name in operation.costs}
    assert kernels <= set(gpu_tools.kernel_names())


def test_what_a_tool_has_started_ends_with_it(tmp_path):
    command = ["sh", "-c", f"(sleep 2; touch {tmp_path}/alive) & wait"]
    with pytest.raises(OutOfTime), gpu_suite.at_most(0.5):
        gpu_tools.run_group(command, {})
    time.sleep(2.5)
    assert not (tmp_path / "alive").exists()


def test_a_tool_that_is_not_installed_is_left_out(monkeypatch):
    monkeypatch.setattr(gpu_tools.shutil, "which", lambda *_, **__: None)
    with pytest.raises(NotHere, match="compute-sanitizer is not installed"):
        gpu_tools.run_tool("memcheck", torch.device("cpu"))


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
    for criterion in CRITERIA:
        rows[f"correctness {criterion.tests}"] = {"status": "ok", "summary": "9 passed"}
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


@pytest.mark.parametrize("status", ["failed", "not run", "of another commit"])
def test_no_figure_counts_before_its_tests(tmp_path, status):
    rows = {"every_pixel__float32__1": {"status": "ok", "ratio": 1.0, "commit": "b"}}
    tests = "correctness__test_affinity_regression.py"
    if status == "failed":
        rows[tests] = {"status": status, "error": "1 failed\n", "commit": "b"}
    elif status == "of another commit":
        rows[tests] = {"status": "ok", "summary": "9 passed", "commit": "a"}
    page = page_of(tmp_path, suite_content(**rows))
    (line,) = (line for line in page.splitlines() if "regression, every pixel, times" in line)
    assert line.endswith(f"| no (test_affinity_regression.py: {status}) |")
    assert ("| failed | 1 failed |" in page) == (status == "failed")


def test_a_run_that_only_tried_the_suite_is_no_evidence(tmp_path):
    page = page_of(tmp_path, {**suite_content(), "quick": True})
    assert "H200" not in page
    assert "No GPU has been measured yet" in page


def test_the_page_is_that_of_the_results(tmp_path):
    """docs/performance.md is written by `python tools/gpu_suite.py report`."""
    write_page(DOCS / "results", tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text() == (DOCS / "performance.md").read_text()
    assert performance_page.IMPLIED.keys() <= {
        name for criterion in CRITERIA for name in performance_page.implied_by(criterion)
    }
