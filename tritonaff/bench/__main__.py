"""Command line of the bench: ``tritonaff-bench`` or ``python -m tritonaff.bench``."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tritonaff.bench import measure
from tritonaff.bench.machine import DTYPES, describe, one_line, usable_device, versions
from tritonaff.bench.tables import print_table, progress, run_command, write_json
from tritonaff.native.library import find_compiler
from tritonaff.options import Backend
from tritonaff.testing import (
    CASES,
    Case,
    Shape,
    check_agreement,
    check_parity,
    obstacle,
)
from tritonaff.version import __version__

IMPLS = ("reference", "compiled", "portable", "native", "triton")


COLUMNS = """\
columns:
  shape        of the logits, N,C,H,W, and the dtype if it is not float32
  mode         fwd: the loss; bwd: its gradient; fwd_bwd: both, as in training
  impl         reference is eager mode, compiled is eager mode under
               torch.compile; portable, native and triton are this library;
               cross_entropy is F.cross_entropy on the same logits
  ms           median of several calls
  x eager, x compiled
               how many times as fast as these
  compile s    seconds of the first call under torch.compile
  peak MB      memory beyond the inputs, at its peak
  GB/s, % copy on a GPU: bytes that must move, over the time; in percent of the
               bandwidth of a copy"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; the exit status is 1 if an implementation fails parity."""
    args = _parser().parse_args(argv)
    return run_command("tritonaff-bench", args.command, args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tritonaff-bench",
        description="Measures time and memory of every operation on this machine, beside eager "
        "mode, torch.compile and cross-entropy. No number is printed before all implementations "
        "agree.",
    )
    parser.add_argument("--version", action="version", version=f"tritonaff {__version__}")
    commands = parser.add_subparsers(required=True)

    run = commands.add_parser(
        "run", help="check parity, then measure time and memory", epilog=COLUMNS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    run.set_defaults(command=_run)
    run.add_argument(
        "--op", type=_names(tuple(CASES)), default=tuple(CASES),
        help="several with commas between; the command list has them (default: all)",
    )  # fmt: skip
    run.add_argument(
        "--impl", type=_names(IMPLS), help=f"of {','.join(IMPLS)} (default: all that run here)"
    )
    for name, known, default in (
        ("--mode", measure.MODES, measure.MODES), ("--dtype", tuple(DTYPES), ("float32",)),
    ):  # fmt: skip
        run.add_argument(
            name, type=_names(known), default=default,
            help=f"of {','.join(known)} (default: {','.join(default)})",
        )  # fmt: skip
    run.add_argument("--shape", type=_shape, nargs="+", metavar="N,C,H,W", help="default: see list")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    run.add_argument("--device", default=device, help="default: %(default)s")
    run.add_argument("--json", type=Path, metavar="FILE", help="write the rows here as well")
    run.add_argument("--quick", action="store_true", help="small shapes, few repetitions")

    listing = commands.add_parser("list", help="operations, implementations and default shapes")
    listing.set_defaults(command=_list)

    return parser


def _names(known: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"unknown {unknown}, choose from {','.join(known)}")
        return names

    return parse


MOST_ELEMENTS = 2**50  # petabytes; bytes of results still fit 64 bits


def _shape(text: str) -> Shape:
    sizes = text.split(",")
    if len(sizes) != 4 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"expected N,C,H,W of positive integers, got {text!r}")
    n, c, height, width = map(int, sizes)
    if n * c * height * width > MOST_ELEMENTS:
        raise argparse.ArgumentTypeError(f"no memory holds a tensor of shape {text}")
    return n, c, height, width


def _list(args: argparse.Namespace) -> int:
    for case in CASES.values():
        shapes = " ".join(",".join(map(str, shape)) for shape in case.shapes)
        print(f"{case.name}: {', '.join(IMPLS)}; shapes {shapes}")
    return 0


def _run(args: argparse.Namespace) -> int:
    device = usable_device(args.device)
    impls = args.impl or _impls_here(device)
    if device.type == "cpu" and "triton" in impls:
        raise ValueError("the tiles run on a GPU; interpreted they are tested, but not timed")
    if "compiled" in impls and not measure.compiler_works(device):
        raise ValueError("compiled needs a C++ compiler, and torch.compile finds none")
    jobs = [
        (CASES[op], dtype, shape)
        for op in args.op
        for dtype in args.dtype
        for shape in args.shape or (CASES[op].quick_shapes if args.quick else CASES[op].shapes)
    ]
    head: dict[str, Any] = {"device": describe(device), "versions": versions()}
    copy_gb_per_s = None
    if device.type != "cpu":
        copy_gb_per_s = head["copy_gb_per_s"] = round(measure.copy_gb_per_s(device), 1)
    rows: list[measure.Row] = []
    left_out: list[dict[str, Any]] = []
    steps = sum(len(impls) + len(measure.yardsticks(case)) for case, *_ in jobs)
    with progress(steps) as step:
        for case, dtype, shape in jobs:
            reason = obstacle(case, shape)
            unable = [impl for impl in impls if reason and impl in ("reference", "compiled")]
            if unable:
                job = {"op": case.name, "shape": shape, "impl": unable, "reason": reason}
                left_out.append(job)
            able = tuple(impl for impl in impls if impl not in unable)
            try:
                rows += _rows(case, dtype, shape, able, args, device, step)
            except (MemoryError, RuntimeError) as error:
                if not _beyond_memory(error):
                    raise
                reason = f"needs more memory than {device} has"
                left_out.append({"op": case.name, "shape": shape, "impl": able, "reason": reason})
    not_run = [
        f"not run: {job['op']} {','.join(map(str, job['shape']))} {','.join(job['impl'])}: "
        f"{job['reason']}"
        for job in left_out
    ]
    if not rows:
        raise ValueError("; ".join(not_run))
    print(f"{head['device']}, {one_line(versions())}")
    for op in args.op:
        print_table(op, *_run_table([row for row in rows if row.op == op], copy_gb_per_s))
    for line in not_run:
        print(line)
    if left_out:
        head["left_out"] = left_out
    if args.json:
        write_json(args.json, {**head, "rows": [dataclasses.asdict(row) for row in rows]})
    return 0


def _beyond_memory(error: Exception) -> bool:
    """True if memory ran out: the allocator of the CPU raises a plain RuntimeError."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "DefaultCPUAllocator" in str(error)


def _impls_here(device: torch.device) -> tuple[str, ...]:
    left_out = set()
    left_out.add("triton" if device.type == "cpu" else "native")
    if device.type == "cpu" and find_compiler() is None:
        left_out.add("native")
    if not measure.compiler_works(device):
        left_out.add("compiled")
    return tuple(impl for impl in IMPLS if impl not in left_out)


def _rows(
    case: Case,
    dtype: str,
    shape: Shape,
    impls: tuple[str, ...],
    args: argparse.Namespace,
    device: torch.device,
    step: Callable[[str], None],
) -> list[measure.Row]:
    """Parity of every implementation, then its rows.

    Full parity against float64 runs on a corner of the shape, where float64 is affordable. For the
    timed inputs, loss and gradient are compared with the first implementation.
    """
    if dtype == "float64":
        # No tile and no native kernel computes in float64.
        impls = tuple(impl for impl in impls if impl not in ("native", "triton"))
    inputs = case.make_inputs(shape, DTYPES[dtype], device)  # first: memory may not hold the inputs
    n, c, *depth, height, width = shape
    corner = (min(n, 2), c, *(min(d, 8) for d in depth), min(height, 48), min(width, 64))
    backends: tuple[Backend, ...] = ("portable", "native", "triton")
    for backend in backends:
        for confidence in (0.0, 9.0) if backend in impls else ():
            small = case.make_inputs(corner, DTYPES[dtype], device, confidence=confidence)
            check_parity(case, backend, *small)
    measured: dict[str, measure.Measured] = {}
    first: measure.Measured | None = None
    yardsticks = measure.yardsticks(case)
    for impl in (*impls, *yardsticks):
        step(f"{case.name} {dtype} {','.join(map(str, shape))} {impl}")
        measured[impl] = measure.measure(case, impl, args.mode, inputs, args.quick)
        if impl not in yardsticks:
            first = first or measured[impl]
            check_agreement(f"{case.name} {impl}", measured[impl].result, first.result)

    def speedup(over: str, impl: str, mode: str) -> float | None:
        if over not in measured:
            return None
        times = [measured[name].by_mode[mode].ms for name in (over, impl)]
        return round(times[0] / times[1], 2)

    rows = []
    for mode in args.mode:
        for impl in measured:
            this = measured[impl].by_mode[mode]
            gb_per_s = measure.traffic_bytes(mode, inputs) / this.ms / 1e6
            rows.append(
                measure.Row(
                    op=case.name,
                    impl=impl,
                    mode=mode,
                    dtype=dtype,
                    shape=shape,
                    ms=round(this.ms, 4),
                    speedup_eager=speedup("reference", impl, mode),
                    speedup_compiled=speedup("compiled", impl, mode),
                    compile_s=None if this.compile_s is None else round(this.compile_s, 1),
                    peak_bytes=this.peak_bytes,
                    gb_per_s=None if device.type == "cpu" else round(gb_per_s, 1),
                )
            )
    return rows


def _run_table(
    rows: list[measure.Row], copy_gb_per_s: float | None
) -> tuple[list[str], list[list[str]]]:
    columns = ["shape", "mode", "impl", "ms", "x eager", "x compiled", "compile s", "peak MB"]
    if copy_gb_per_s:
        columns += ["GB/s", "% copy"]
    lines = []
    for row in rows:
        line = [
            ",".join(map(str, row.shape)) + ("" if row.dtype == "float32" else f" {row.dtype}"),
            row.mode,
            row.impl,
            f"{row.ms:.2f}",
            *("-" if x is None else f"{x:.1f}" for x in (row.speedup_eager, row.speedup_compiled)),
            "-" if row.compile_s is None else f"{row.compile_s:.1f}",
            f"{row.peak_bytes / 1e6:.1f}",
        ]
        if copy_gb_per_s and row.gb_per_s:
            line += [f"{row.gb_per_s:.0f}", f"{100 * row.gb_per_s / copy_gb_per_s:.0f}"]
        lines.append(line)
    return columns, lines


if __name__ == "__main__":
    sys.exit(main())
