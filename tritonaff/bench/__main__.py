"""Command line of the bench: ``tritonaff-bench`` or ``python -m tritonaff.bench``."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tritonaff.bench import measure
from tritonaff.bench.cases import (
    CASES,
    Case,
    ParityError,
    Shape,
    check_agreement,
    check_parity,
    obstacle,
)
from tritonaff.files import check_writable, replacing
from tritonaff.version import __version__

IMPLS = ("reference", "compiled", "portable", "triton")
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; the exit status is 1 where an implementation computes something else."""
    args = _parser().parse_args(argv)
    try:
        if getattr(args, "json", None):
            check_writable(args.json)
        command: Callable[[argparse.Namespace], int] = args.command
        return command(args)
    except (OSError, ParityError, ValueError) as error:
        print(f"tritonaff-bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("tritonaff-bench: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tritonaff-bench", description=__doc__)
    commands = parser.add_subparsers(required=True)

    run = commands.add_parser("run", help="check parity, then measure time and memory")
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

    static = commands.add_parser("static", help="compile every tile for three GPUs, without one")
    static.set_defaults(command=_static)
    static.add_argument("--json", type=Path, metavar="FILE", help="write the table here as well")

    scaling = commands.add_parser("scaling", help="how time and memory grow, on the CPU")
    scaling.set_defaults(command=_scaling)
    scaling.add_argument("--json", type=Path, metavar="FILE", help="write the table here as well")
    scaling.add_argument("--quick", action="store_true", help="small shapes, few repetitions")
    return parser


def _names(known: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"unknown {unknown}, choose from {','.join(known)}")
        return names

    return parse


MOST_ELEMENTS = 2**50  # petabytes; the bytes of what is computed from them still fit 64 bits


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
    with _progress(len(jobs) * (len(impls) + 1)) as step:
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
    print(f"{head['device']}, {_one_line(versions())}")
    for op in args.op:
        _print(op, *_run_table([row for row in rows if row.op == op], copy_gb_per_s))
    for line in not_run:
        print(line)
    if left_out:
        head["left_out"] = left_out
    if args.json:
        write_json(args.json, {**head, "rows": [dataclasses.asdict(row) for row in rows]})
    return 0


def usable_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # a meta tensor has nothing to read back
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"device {name} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def _beyond_memory(error: Exception) -> bool:
    """The allocator of the CPU raises a plain RuntimeError."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "DefaultCPUAllocator" in str(error)


def _impls_here(device: torch.device) -> tuple[str, ...]:
    left_out = set()
    if device.type == "cpu":
        left_out.add("triton")
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

    Parity in full against float64 on a corner of the shape, where that is affordable, and loss and
    gradient of the very inputs that are timed against the first implementation.
    """
    if dtype == "float64":
        impls = tuple(impl for impl in impls if impl != "triton")  # no tile computes in it
    inputs = case.make_inputs(shape, DTYPES[dtype], device)  # first: memory may not hold them
    n, c, height, width = shape
    corner = (min(n, 2), c, min(height, 48), min(width, 64))
    for impl in impls:
        if impl in ("portable", "triton"):
            for confidence in (0.0, 9.0):
                small = case.make_inputs(corner, DTYPES[dtype], device, confidence=confidence)
                check_parity(case, impl, *small)
    measured: dict[str, measure.Measured] = {}
    first: measure.Measured | None = None
    for impl in (*impls, measure.YARDSTICK):
        step(f"{case.name} {dtype} {','.join(map(str, shape))} {impl}")
        measured[impl] = measure.measure(case, impl, args.mode, inputs, args.quick)
        if impl != measure.YARDSTICK:
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


def _static(args: argparse.Namespace) -> int:
    try:
        from tritonaff.bench import static
    except ImportError as error:
        raise ValueError(f"static compiles the tiles and needs triton: {error}") from error
    from triton import knobs

    if knobs.runtime.interpret:
        raise ValueError("static needs the compiler: unset TRITON_INTERPRET")
    kernels = []
    with _progress(sum(len(tile.targets) for tile in static.TILES)) as step:
        for tile in static.TILES:
            for target in tile.targets:
                step(f"{tile.kernel.__name__} {target}")
                kernels.append(static.analyse(tile, target))
    print(f"instructions per element (class of a pixel), triton {versions()['triton']}")
    columns = ["kernel", "target", "regs", "spill", "shared", *SHORT_KINDS, "all"]
    for op in dict.fromkeys(row["op"] for row in kernels):
        lines = [
            [
                _short(row["kernel"]),
                row["target"],
                *(str(row[name]) for name in ("registers", "spills", "shared_bytes")),
                *(
                    f"{row['instructions_per_element'][kind]:.0f}"
                    for kind in (*static.KINDS, "all")
                ),
            ]
            for row in kernels
            if row["op"] == op
        ]
        _print(op, columns, lines)
    implied = static.implied_times(kernels)
    print(
        "\nleast time, by bytes / bandwidth or instructions / rate, forward and backward:\n"
        f"{' x '.join(map(str, static.IMAGES))}, 19 classes, {static.NUM_OFFSETS} neighbours, "
        f"{static.ITERATIONS} iterations, float32"
    )
    columns = ["", "runs", "bytes", "ps", "bound", "%copy", "ms", "x CE"]
    for gpu in static.GPUS.values():
        _print(gpu.name, columns, _implied_lines(implied, gpu.name))
    if args.json:
        head = {"device": "none: compiled", "versions": versions()}
        yardsticks = {gpu.name: static.cross_entropy_ms(gpu.name) for gpu in static.GPUS.values()}
        content = {
            "kernels": kernels,
            "implied": implied,
            "cross_entropy_ms": yardsticks,
            "autocast_cross_entropy_ms": {
                gpu: static.cross_entropy_ms(gpu, autocast=True) for gpu in yardsticks
            },
        }
        write_json(args.json, {**head, **content})
    return 0


def _scaling(args: argparse.Namespace) -> int:
    from tritonaff.bench import scaling

    rows = []
    with _progress(sum(len(x.expected) for x in scaling.OPERATIONS.values())) as step:
        for row in scaling.rows(args.quick):
            step(f"{row.op} {row.grows}")
            rows.append(row)
    all_reduce_ms = scaling.all_reduce_ms()
    device = f"CPU {_cpu_name()}, 1 thread"
    print(f"{device}, {_one_line(versions())}")
    columns = ["", "ms", "x time", "expected", "x memory", "MB"]
    lines = []
    for op in dict.fromkeys(row.op for row in rows):
        lines.append([op.removeprefix("affinity_"), *[""] * 5])
        lines += [
            [
                " ".join((f"  {row.grows}", *map(str, row.values))),
                " ".join(f"{ms:.1f}" for ms in row.ms),
                f"{row.growth:.2f}",
                row.expected,
                f"{row.memory_growth:.2f}",
                f"{row.peak_bytes[-1] / 1e6:.1f}",
            ]
            for row in rows
            if row.op == op
        ]
    _print("by doubling, forward and backward", columns, lines)
    print(f"one all-reduce of a loss's tables, two gloo processes: {all_reduce_ms:.2f} ms")
    if args.json:
        content = {"device": device, "versions": versions(), "all_reduce_ms": all_reduce_ms}
        write_json(args.json, {**content, "rows": [dataclasses.asdict(row) for row in rows]})
    return 0


def _implied_lines(implied: list[dict[str, Any]], gpu: str) -> list[list[str]]:
    """A line for every operation, with its ratio to cross-entropy, and one for each kernel."""
    from tritonaff.bench import static

    float32, half = (static.cross_entropy_ms(gpu, autocast=half) for half in (False, True))
    lines = [["cross_entropy (CE)", "", "", "", "bytes", "", f"{float32:.2f}", "1.0"]]
    lines += [["  of bfloat16, autocast", "", "", "", "bytes", "", f"{half:.2f}", "1.0"]]
    for op in dict.fromkeys(row["op"] for row in implied):
        rows = [row for row in implied if (row["op"], row["gpu"]) == (op, gpu)]
        yardstick = half if op.endswith("bfloat16") else float32
        total = sum(row["ms"] for row in rows)
        name = op.replace("cross_entropy", "CE")
        lines.append([name, *[""] * 5, f"{total:.2f}", f"{total / yardstick:.1f}"])
        for row in rows:
            numbers = [f"{row['bytes_per_element']:.0f}", f"{row['ps_per_element']:.0f}"]
            share = f"{row['percent_of_copy']}"
            bound = row["bound"].removeprefix("one ").replace("instructions", "instr.")
            line = [f"  {_short(row['kernel'])}", str(row["launches"]), *numbers, bound]
            lines.append([*line, share, f"{row['ms']:.2f}", ""])
    return lines


SHORT_KINDS = ("mem", "shfl", "spec", "arith", "ctrl")


def _short(kernel: str) -> str:
    return kernel.removesuffix("_kernel").replace("backward", "bwd")


def describe(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cpu":
        return f"CPU {_cpu_name()}, {torch.get_num_threads()} threads"
    return str(torch.get_device_module(device).get_device_name(device))


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Everything a figure depends on."""
    result = {
        "tritonaff": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    try:
        result["triton"] = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        result["triton"] = "none"
    git = ["git", "-C", str(Path(__file__).parent)]
    # Results, and the page about them, change while it is measured.
    status = ["status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude,top)docs"]
    try:
        commit, changes = (
            subprocess.run([*git, *what], capture_output=True, text=True, check=True).stdout.strip()
            for what in (["describe", "--always"], status)
        )
        result["commit"] = commit + ("-dirty" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        code = (path.read_bytes() for path in sorted(Path(__file__).parent.parent.rglob("*.py")))
        result["commit"] = f"unknown, files {hashlib.sha256(b''.join(code)).hexdigest()[:7]}"
    return result


def _one_line(names: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in names.items())


def write_json(path: Path, content: dict[str, Any]) -> None:
    """The whole of it or, should that fail, what was there before."""
    with replacing(path) as new:
        new.write_text(json.dumps(content, indent=1) + "\n")


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar on a terminal; nothing elsewhere."""
    if not sys.stderr.isatty() or not _has_rich():
        yield lambda what: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=total)
        started = False

        def step(what: str) -> None:
            nonlocal started
            progress.update(task, advance=1 if started else 0, description=what)
            started = True

        yield step


def _print(title: str, columns: list[str], lines: list[list[str]]) -> None:
    """A table: rich on a terminal, plain text elsewhere."""
    if sys.stdout.isatty() and _has_rich():
        from rich.console import Console
        from rich.table import Table

        table = Table(
            title=title, title_justify="left", title_style="dim", box=None, pad_edge=False
        )
        for i, column in enumerate(columns):
            table.add_column(
                column, justify="right" if _numeric(lines, i) else "left", no_wrap=True
            )
        for line in lines:
            table.add_row(*line)
        Console().print(table)
        return
    print(title)
    widths = [max(len(line[i]) for line in (columns, *lines)) for i in range(len(columns))]
    for line in (columns, *lines):
        cells = [
            cell.rjust(width) if _numeric(lines, i) else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def _numeric(lines: list[list[str]], column: int) -> bool:
    cells = (line[column].replace(".", "", 1) for line in lines)
    return all(cell.isdigit() or cell in ("-", "") for cell in cells)


def _has_rich() -> bool:
    return importlib.util.find_spec("rich") is not None


if __name__ == "__main__":
    sys.exit(main())
