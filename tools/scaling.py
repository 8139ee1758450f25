"""Growth of time and memory on a CPU when one size doubles, and doubles again; docs/scaling.md has
the formulas beside it.

    python tools/scaling.py
    python tools/scaling.py --json docs/results/scaling.json
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, multiprocessing
from torch import distributed as dist

from tritonaff.bench.machine import cpu_name, one_line, versions
from tritonaff.bench.measure import peak_bytes
from tritonaff.bench.tables import print_table, progress, run_command, write_json
from tritonaff.distributed import all_reduce
from tritonaff.functional import (
    affinity_field_loss,
    affinity_propagation,
    affinity_regression_loss,
    box_pairwise_loss,
    dilated_affinity_loss,
    instance_affinity_loss,
)
from tritonaff.ops.backend import use_backend
from tritonaff.testing import make_inputs


@dataclass(frozen=True)
class Size:
    """Sizes of a loss's inputs. ``parts`` are kernel sizes, grid points per side, rates,
    groups of offsets or iterations, depending on the operation.
    """

    images: int = 1
    classes: int = 16
    rows: int = 128
    columns: int = 256
    parts: int = 2


@dataclass(frozen=True)
class Operation:
    loss: Callable[[Tensor, Tensor, int], Tensor]
    """Called with logits, target and parts."""
    expected: dict[str, str]
    """Factor by which the time should grow when the named size doubles."""
    channels: Callable[[Size], int] = lambda size: size.classes
    """Number of channels of the logits."""


def _propagated(affinity: Tensor, target: Tensor, parts: int) -> Tensor:
    n, _, height, width = affinity.shape
    probs = affinity.new_full((n, 16, height, width), 1 / 16)
    return affinity_propagation(probs, affinity, [8], iterations=parts).square().sum()


def _boxes(logits: Tensor, target: Tensor, parts: int) -> Tensor:
    """Every channel is a mask, whose box is the image."""
    n, c, height, width = logits.shape
    boxes = torch.tensor([[0, 0, width, height]]).expand(n * c, 4)
    image_index = torch.arange(n).repeat_interleave(c)
    similarity = target.to(torch.uint8)
    return box_pairwise_loss(logits.flatten(0, 1), similarity, boxes, image_index)


LINEAR = {"images": "2", "rows": "2"}
OPERATIONS = {
    "affinity_field": Operation(
        lambda x, target, parts: affinity_field_loss(x, target, [2 * k + 3 for k in range(parts)]),
        {**LINEAR, "classes": "1 to 2", "parts": "1 to 2"},
    ),
    "affinity_regression": Operation(
        lambda x, target, parts: affinity_regression_loss(x, target, [6 * parts]),
        {"images": "1 to 2", "rows": "1 to 2", "classes": "1 to 4", "parts": "1 to 4"},
    ),
    "affinity_regression_every_pixel": Operation(
        lambda x, target, parts: affinity_regression_loss(x, target, None),
        {**LINEAR, "classes": "2 to 4"},
    ),
    "dilated_affinity": Operation(
        lambda x, target, parts: dilated_affinity_loss(
            x, target, [4 * k + 4 for k in range(parts)]
        ),
        {**LINEAR, "parts": "2"},
        channels=lambda size: 8 * size.parts,
    ),
    "instance_affinity": Operation(
        lambda x, ids, parts: instance_affinity_loss(
            x, ids, [(0, -k) for k in range(1, 1 + x.shape[1])]
        ),
        {**LINEAR, "parts": "2"},
        channels=lambda size: 8 * size.parts,
    ),
    "box_pairwise": Operation(_boxes, {**LINEAR, "classes": "2"}),
    "affinity_propagation": Operation(
        _propagated, {**LINEAR, "parts": "2"}, channels=lambda size: 8
    ),
}


@dataclass(frozen=True)
class Row:
    """One row of the table and of the JSON, with the same names."""

    op: str
    grows: str
    values: tuple[int, ...]
    ms: tuple[float, ...]
    peak_bytes: tuple[int, ...]
    expected: str

    @property
    def growth(self) -> float:
        """Factor of the time, by doubling."""
        return _growth(self.ms)

    @property
    def memory_growth(self) -> float:
        return _growth(self.peak_bytes)


def _growth(values: tuple[float, ...]) -> float:
    return float((values[-1] / values[0]) ** (1 / (len(values) - 1)))


def rows(quick: bool) -> Iterator[Row]:
    """Rows of all operations, forward and backward on one thread of the CPU."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    base = Size(rows=16, columns=16) if quick else Size()
    for name, operation in OPERATIONS.items():
        for grows, expected in operation.expected.items():
            start = getattr(base, grows)
            values = tuple(start * factor for factor in (1, 2, 4))
            measured = [_measure(operation, replace(base, **{grows: v}), quick) for v in values]
            ms, peaks = zip(*measured, strict=True)
            yield Row(name, grows, values, ms, peaks, expected)
    torch.set_num_threads(threads)


def _measure(operation: Operation, size: Size, quick: bool) -> tuple[float, int]:
    shape = size.images, operation.channels(size), size.rows, size.columns
    logits, target = make_inputs(shape)
    logits.requires_grad_()

    def run(_: object = None) -> tuple[Tensor, ...]:
        with use_backend("portable"):  # not interpreted tiles
            return torch.autograd.grad(operation.loss(logits, target, size.parts), logits)

    run()
    # Time of the processor, on one thread, and the least of several: other programs on the machine
    # can hardly add to it.
    seconds: list[float] = []
    while len(seconds) < 5 or sum(seconds) < (0.02 if quick else 0.5):
        start = time.process_time()
        run()
        seconds.append(time.process_time() - start)
    return round(1000 * min(seconds), 3), peak_bytes(run, logits.device)


def all_reduce_ms() -> float:
    """Median time of adding up the affinity field's tables, 19 classes and 3 sizes, over two gloo
    processes of this machine.
    """
    with tempfile.TemporaryDirectory() as folder:
        start: Any = multiprocessing.start_processes  # type: ignore[attr-defined]
        start(_all_reduce, (folder,), nprocs=2, start_method="spawn")
        return float((Path(folder) / "ms").read_text())


def _all_reduce(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    tables = [torch.ones(19, 3) for _ in range(4)]
    seconds = []
    for _ in range(200):
        start = time.perf_counter()
        all_reduce(tables, dist.group.WORLD)
        seconds.append(time.perf_counter() - start)
    if rank == 0:
        (Path(folder) / "ms").write_text(f"{1000 * statistics.median(seconds):.3f}")
    dist.barrier()
    os._exit(0)  # an ordinary exit now and then aborts in gloo's threads


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="How time and memory grow, on the CPU.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table here as well")
    parser.add_argument("--quick", action="store_true", help="small shapes, few repetitions")
    return run_command("scaling.py", print_growth, parser.parse_args(argv))


def print_growth(args: argparse.Namespace) -> int:
    measured = []
    with progress(sum(len(x.expected) for x in OPERATIONS.values())) as step:
        for row in rows(args.quick):
            step(f"{row.op} {row.grows}")
            measured.append(row)
    latency_ms = all_reduce_ms()
    device = f"CPU {cpu_name()}, 1 thread"
    print(f"{device}, {one_line(versions())}")
    columns = ["", "ms", "x time", "expected", "x memory", "MB"]
    lines = []
    for op in dict.fromkeys(row.op for row in measured):
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
            for row in measured
            if row.op == op
        ]
    print_table("by doubling, forward and backward", columns, lines)
    print(f"one all-reduce of a loss's tables, two gloo processes: {latency_ms:.2f} ms")
    if args.json:
        content = {"device": device, "versions": versions(), "all_reduce_ms": latency_ms}
        write_json(args.json, {**content, "rows": [asdict(row) for row in measured]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
