"""Measures the figures that the project aims at on one device.

    python tools/gpu_suite.py           # on a machine with a GPU; --device cpu --quick tries it
    python tools/gpu_suite.py report    # writes docs/performance.md from docs/results/

Correctness comes first (the tests), then every row of gpu_rows.py with its rivals in the same run,
then profilers and sanitizers. Every finished row is saved, with its commit, to
docs/results/DEVICE.json, and is not measured again: after an interrupt, or after ``--minutes``, the
next run resumes. A failed row is recorded as failed, and is tried again with ``--retry``. The
output of the tests is in DEVICE.log. The exit status is 1 if anything failed, 2 if rows are left,
and 3 if an error has left this process without its device: the next run resumes. In the report, a
figure does not count if its tests failed or ran at another commit.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_rows import Bench, NotHere, jobs
from gpu_tools import run_tool
from performance_page import write_page

from tritonaff.bench.machine import DTYPES, describe, usable_device, versions
from tritonaff.bench.tables import write_json

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
COMMANDS = ("run", "report")
PARTS = ("correctness", "figures", "tools")
# Tests that run tiles, and their numbers of processes; the other tests do not touch a GPU.
TEST_FILES = {
    "test_affinity_field.py": 4,
    "test_affinity_regression.py": 2,
    "test_affinity_propagation.py": 1,
    "test_dilated_affinity.py": 1,
    "test_instance_affinity.py": 1,
    "test_box_pairwise.py": 1,
    "test_cuda_graphs.py": 1,
    "test_compile.py": 1,
    "test_backend.py": 1,
    "nightly/test_offsets.py": 1,
}
# Fills the memory of a GPU.
ALONE = "nightly/test_offsets.py"
MINUTES, MINUTES_OF_TESTS, MINUTES_PER_ROW = 9, 5, 4


class OutOfTime(Exception):
    """A row exceeds its time."""


class Record:
    """The results of one device and one version of Python, torch and Triton, saved after every row;
    each row has its commit.
    """

    def __init__(self, folder: Path, device: torch.device, quick: bool, retry: bool) -> None:
        name = describe(device)
        file = f"{name} quick" if quick else name
        self.path = folder / f"{re.sub(r'[^a-z0-9]+', '-', file.lower()).strip('-')}.json"
        used = versions()
        self.commit = used.pop("commit")
        head = {"suite": True, "device": name, "quick": quick, "versions": used}
        self.content: dict[str, Any] = {**head, "rows": {}}
        if self.path.exists():
            before = json.loads(self.path.read_text())
            if all(before.get(key) == value for key, value in head.items()):
                self.content = before
        for row in self.content["rows"].values():
            if row["status"] == "started":
                row |= {"status": "failed", "error": "the process ended before the row did"}
        if retry:
            rows = self.content["rows"].items()
            self.content["rows"] = {k: row for k, row in rows if row["status"] != "failed"}

    def has(self, key: str) -> bool:
        return key in self.content["rows"]

    def add(self, key: str, row: dict[str, Any]) -> None:
        self.content["rows"][key] = {**row, "commit": self.commit}
        self._save()
        print(f"{row['status']:8} {key}  {_summary(row)}", flush=True)

    def start(self, key: str) -> None:
        """Marks a row as begun: if this process dies, the next process knows the row."""
        self.content["rows"][key] = {"status": "started"}
        self._save()

    def forget(self, key: str) -> None:
        del self.content["rows"][key]
        self._save()

    def _save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.content)

    def failed(self, prefix: str = "") -> list[str]:
        rows = self.content["rows"].items()
        return [key for key, row in rows if key.startswith(prefix) and row["status"] == "failed"]


def _summary(row: dict[str, Any]) -> str:
    if "error" in row:
        return str(row["error"]).splitlines()[0][:100]
    numbers = {k: v for k, v in row.items() if isinstance(v, (int, float)) and k != "took_s"}
    return "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises OutOfTime after ``seconds``; a call into a library ends first."""

    def stop(*_: Any) -> None:
        raise OutOfTime(f"took more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.1))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def attempt(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The row of ``work``, or the row of its failure."""
    start = time.perf_counter()
    try:
        row = {"status": "ok", **work()}
    except NotHere as reason:
        row = {"status": "left out", "error": str(reason)}
    except Exception as error:
        row = {"status": "failed", "error": f"{type(error).__name__}: {error}"}
        row["traceback"] = traceback.format_exc()[-3000:]
    return {"took_s": round(time.perf_counter() - start, 1), **row}


_log_lock = threading.Lock()


def run_tests(file: str, workers: int, seconds: float, log: Path) -> dict[str, Any]:
    """The last line of pytest's output; the whole output is appended to a file."""
    options = ["-o", "addopts=", "-p", "no:cacheprovider", "-v", "--tb=short", "-rs"]
    options += ["--durations=10", "-o", "faulthandler_timeout=60"]
    if workers > 1:
        if importlib.util.find_spec("xdist"):
            options += ["-n", str(workers)]
        else:
            print(f"{file} takes {workers} times as long without pytest-xdist", file=sys.stderr)
    command = [sys.executable, "-m", "pytest", *options, f"tests/{file}"]
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        try:
            status = subprocess.run(
                command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, timeout=seconds,
                env={**os.environ, "COLUMNS": "250"},
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired as late:
            raise OutOfTime(f"took more than {seconds:.0f} s") from late
        finally:
            output.seek(0)
            text = output.read()
            with _log_lock, log.open("a") as lines:
                lines.write(text)
    last = text.strip().splitlines()[-40:] or [""]
    if status != 0:
        raise AssertionError("\n".join([last[-1], *last]))
    return {"summary": last[-1].strip("= "), "took_s": round(time.perf_counter() - start, 1)}


def run(args: argparse.Namespace, device: torch.device) -> int:
    deadline: float = time.monotonic() + 60 * args.minutes
    record = Record(args.results, device, args.quick, args.retry)
    print(f"{record.content['device']}, commit {record.commit}, results in {record.path}")

    def left() -> float:
        return deadline - time.monotonic()

    done = True
    if "correctness" in args.only:
        files = {"test_rates.py": 1} if args.quick else TEST_FILES
        # Side by side: the compiler takes most of their time, and keeps one core busy.
        for alone in (False, True):
            done &= run_test_files(
                record,
                {file: n for file, n in files.items() if (file == ALONE) == alone},
                min(60 * MINUTES_OF_TESTS, left()),
            )

    work: list[tuple[str, Callable[[], dict[str, Any]]]] = []
    if "figures" in args.only:
        bench = Bench(device, args.quick)
        for key, row, shape, dtype in jobs(args.quick):
            work.append((key, partial(row.measure, shape, DTYPES[dtype], bench)))
    if "tools" in args.only and device.type == "cuda":
        for tool in ("memcheck", "racecheck", "ncu"):
            work.append((f"tools {tool}", partial(run_tool, tool, device)))
    for key, measure_it in work:
        if record.has(key):
            continue
        if left() < 5:
            done = False
            break
        limit = min(60 * MINUTES_PER_ROW, left())
        result = run_row(record, key, measure_it, limit)
        if OutOfTime.__name__ in result.get("error", "") and limit < 60 * MINUTES_PER_ROW - 10:
            done = False  # the next run gives the row all its time
            record.forget(key)
        else:
            record.add(key, result)
        if is_lost(device):
            print("the device is lost to this process: run it again", file=sys.stderr)
            return 3
    if not done:
        print("not all is done: run it again", file=sys.stderr)
    if record.failed():
        return 1
    return 0 if done else 2


def run_test_files(record: Record, files: dict[str, int], seconds: float) -> bool:
    """Runs the files side by side; True if all have finished."""
    waiting = {file: n for file, n in files.items() if not record.has(f"correctness {file}")}
    if not waiting:
        return True
    if seconds < 5:
        return False
    done = True
    log = record.path.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(len(waiting)) as pool:
        tests = {pool.submit(run_tests, file, n, seconds, log): file for file, n in waiting.items()}
        for test in as_completed(tests):
            row = attempt(test.result)
            if OutOfTime.__name__ in row.get("error", ""):
                print(f"not done: {tests[test]}, {row['error']}", file=sys.stderr)
                done = False
            else:
                record.add(f"correctness {tests[test]}", row)
    return done


def run_row(
    record: Record, key: str, measure_it: Callable[[], dict[str, Any]], seconds: float
) -> dict[str, Any]:
    def timed() -> dict[str, Any]:
        with at_most(seconds):
            return measure_it()

    record.start(key)
    # No signal ends a kernel that never ends.
    faulthandler.dump_traceback_later(seconds + 20, exit=True, file=2)
    try:
        return attempt(timed)
    finally:
        faulthandler.cancel_dump_traceback_later()


def is_lost(device: torch.device) -> bool:
    """True if an error of a kernel keeps this process from doing anything more."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
        gc.collect()  # tensors that an error holds
        torch.cuda.empty_cache()
    except RuntimeError:
        return True
    return False


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure the figures that the project aims at.")
    parser.add_argument("command", nargs="?", choices=COMMANDS, default="run")
    parser.add_argument("--device", default="cuda", help="cuda unless given")
    parser.add_argument(
        "--only", type=lambda text: text.split(","), default=list(PARTS), metavar="PARTS",
        help=f"of {','.join(PARTS)}",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="tiny shapes: tries the suite itself")
    parser.add_argument("--retry", action="store_true", help="rows that failed, once more")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="stops after them")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "performance.md")
    args = parser.parse_args(argv)
    if unknown := set(args.only) - set(PARTS):
        parser.error(f"unknown {sorted(unknown)}, choose from {','.join(PARTS)}")
    if args.command == "report":
        write_page(args.results, args.page)
        return 0
    try:
        device = usable_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    return run(args, device)


if __name__ == "__main__":
    sys.exit(main())
