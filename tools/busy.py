"""Times alone, and beside one busy process on the same cores, of training steps on a CPU.

    python tools/busy.py
    python tools/busy.py --json docs/results/busy.json

Ours, as portable torch operations and natively, and cross-entropy; forward and backward, at the
largest shape of the bench, or at the first one if --small. docs/native.md has the table.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

import torch

from tritonaff.bench.machine import describe, versions
from tritonaff.bench.measure import YARDSTICK, measure
from tritonaff.bench.tables import print_table, progress, run_command, write_json
from tritonaff.testing import CASES

MODE = "fwd_bwd"
IMPLS = ("native", "portable", YARDSTICK)


@dataclass(frozen=True)
class Row:
    op: str
    shape: tuple[int, ...]
    impl: str
    alone_ms: float
    beside_ms: float
    times: float
    """Beside over alone."""


@contextmanager
def busy_process() -> Iterator[None]:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            yield
        finally:
            process.kill()


def times(op: str, small: bool) -> Iterator[Row]:
    case = CASES[op]
    shape = case.shapes[0 if small else -1]
    inputs = case.make_inputs(shape, torch.float32)

    def ms(impl: str) -> float:
        return measure(case, impl, (MODE,), inputs, quick=False).by_mode[MODE].ms

    for impl in IMPLS:
        alone = ms(impl)
        with busy_process():
            beside = ms(impl)
        yield Row(op, shape, impl, round(alone, 2), round(beside, 2), round(beside / alone, 2))


def run(args: argparse.Namespace) -> int:
    rows: list[Row] = []
    with progress(len(args.op)) as step:
        for op in args.op:
            step(op)
            rows += times(op, args.small)
    cells = [
        [row.op, ",".join(map(str, row.shape)), row.impl, *map(str, astuple(row)[3:])]
        for row in rows
    ]
    columns = ["operation", "shape", "impl", "alone ms", "beside ms", "times"]
    print_table(f"forward and backward, {describe(torch.device('cpu'))}", columns, cells)
    if args.json:
        head = {"device": describe(torch.device("cpu")), "versions": versions()}
        write_json(args.json, {**head, "rows": [asdict(row) for row in rows]})
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Times alone and beside a busy process.")
    parser.add_argument("--op", nargs="+", choices=CASES, default=list(CASES), metavar="OP")
    parser.add_argument("--small", action="store_true", help="the first shape of the bench")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here as well")
    return run_command("busy", run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
