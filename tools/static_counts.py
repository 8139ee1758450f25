"""Registers and instructions of every kernel, compiled for three GPUs without a GPU: exact,
repeatable counts, and the time that they imply for two.

    python tools/static_counts.py
    python tools/static_counts.py --json docs/results/static.json

A kernel takes at least as long as its bytes take at the GPU's bandwidth, and as long as its
instructions take to issue. The larger of the two is the time implied: a bound from below that
assumes a GPU full of programs and caches that serve every second read.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from assembly import amd_code, count_instructions, nvidia_code
from launches import TARGETS, Launch, compile_launch, launches_of
from torch import Tensor

from tritonaff.bench.machine import versions
from tritonaff.bench.tables import print_table, progress, run_command, write_json
from tritonaff.kernels import (
    affinity_field,
    affinity_propagation,
    affinity_regression,
    box_pairwise,
    dilated_affinity,
    instance_affinity,
)
from tritonaff.offsets import instance_offsets
from tritonaff.rates import rate_offsets

KINDS = ("memory", "shuffle", "special", "arithmetic", "control")


@dataclass(frozen=True)
class Gpu:
    """Rates of a GPU, from which the time of a kernel follows."""

    name: str
    bytes_per_s: float
    """A copy's, read plus write."""
    multiprocessors: int
    clock: float

    @property
    def instructions_per_s(self) -> float:
        """Instructions of threads: a multiprocessor's 4 schedulers issue to 32 lanes a clock."""
        return self.multiprocessors * 4 * 32 * self.clock


GPUS = {
    "sm_80": Gpu("A100", 2.0e12, multiprocessors=108, clock=1.41e9),
    "sm_90": Gpu("H200", 4.3e12, multiprocessors=132, clock=1.98e9),
}
# Images, rows, columns of the implied times.
IMAGES = (8, 512, 512)
CLASSES, MANY_CLASSES = 19, 150
FIELD_SIZES = [3, 5, 7]
GRID_SIZES = [12, 6]
RATES = [8, 8, 16, 16, 32, 32, 64, 64]
OFFSETS = rate_offsets(((8, 8), (16, 16), (32, 32), (64, 64)))
INSTANCE_OFFSETS = [
    distance for dy, dx in instance_offsets("mutex_watershed_2d") for distance in (0, dy, dx)
]
POINTS = sum(size * size for size in GRID_SIZES)
NEIGHBORS, PAIRS = len(OFFSETS) // 2, len(INSTANCE_OFFSETS) // 3
ITERATIONS = 10
# F.cross_entropy on float32 logits of 19 classes, forward and backward. log_softmax reads and
# writes, its backward reads two tensors and writes one. The zeros that nll_loss's backward writes
# first are left out: the yardstick must not look slower than it is.
CROSS_ENTROPY_BYTES = 5 * 4
# With bfloat16 under autocast also two conversions: to float32, and of the gradient back.
AUTOCAST_CROSS_ENTROPY_BYTES = CROSS_ENTROPY_BYTES + 2 * (2 + 4)


class Cost(NamedTuple):
    """The costs of a launch that its code does not tell."""

    moved: float
    """Bytes per element that the kernel reads and writes, each once."""
    trips: tuple[float, ...] = ()
    """Average trips of its loops, from the outermost to the innermost."""
    per_pixel: float = CLASSES
    """Elements in a pixel of the image: classes, neighbours or pairs."""
    elements: float | None = None
    """Elements that one program works on, if programs do not have equal shares of all."""


class Operation(NamedTuple):
    """Launchers as an operation calls them, and the costs by kernel. Kernels without a cost are
    left out.
    """

    name: str
    call: Callable[[tuple[int, int, int]], object]
    costs: dict[str, Callable[[Launch], Cost]]
    in_implied_times: bool = True
    """Part of a training step with 19 classes."""


class Measured(NamedTuple):
    """A kernel as an operation launches it."""

    operation: Operation
    launch: Launch
    times: int
    """Launches in one forward and backward pass of a loss."""


def measured(target: str, images: tuple[int, int, int] = IMAGES) -> Iterator[Measured]:
    """All kernels with a cost, by operation. The launches of a kernel are alike but for a first or
    last one: the commonest counts.
    """
    for operation in OPERATIONS:
        launches = launches_of(partial(operation.call, images), target)
        for name in dict.fromkeys(launch.name for launch in launches):
            if name in operation.costs:
                same = [launch for launch in launches if launch.name == name]
                kinds = Counter(str(launch.constants()) for launch in same)
                kind, _ = kinds.most_common(1)[0]
                launch = next(each for each in same if str(each.constants()) == kind)
                yield Measured(operation, launch, len(same) * operation.in_implied_times)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def labels(images: tuple[int, int, int]) -> Tensor:
    return meta(*images, dtype=torch.int64)


# Bytes per element (19 elements make up a pixel) of float32 and int64.
LOGIT = GRAD = GATE = 4
FLOAT_OF_PIXEL = 4 / CLASSES
LABEL = 8 / CLASSES
# Bytes of a logit, and its share of its pixel's label and four statistics.
MANY_LOGIT = LOGIT + (8 + 4 * 4) / MANY_CLASSES

# Averages in street scenes of 480 x 360 pixels (CamVid): the share of patches with more than one
# label within reach of three sizes; for a part of such a patch, the number of labels that the edge
# kernel walks through, and of steps to neighbours for a label and a size. Steps go to neighbours of
# another label; for the tables alone, only from pixels of this label; if the kernel replaces a
# gradient, to all neighbours.
EDGE_PATCHES, EDGE_LABELS = 0.32, 1.61
EDGE_STEPS, EDGE_STEPS_OF_TABLES, EDGE_STEPS_TO_REPLACE = 3.33, 2.55, 8
# Trips of the inner loops of counts_kernel in these images: of the loop over sizes 0.96, of the
# loop over labels 1.1. The larger number stands for both.
COUNT_STEPS = 1.1


def affinity_field_pass(
    images: tuple[int, int, int],
    dtype: torch.dtype = torch.float32,
    *,
    statistics: bool = True,
    tables: bool = True,
    gradient: bool = True,
) -> None:
    n, height, width = images
    logits, k = meta(n, CLASSES, height, width, dtype=dtype), len(FIELD_SIZES)
    label, top, rest = (
        meta(n, 1, height, width, dtype=each) for each in (torch.int16, dtype, torch.float32)
    )
    if statistics:
        _, _, label, top, rest = affinity_field.statistics(logits, labels(images), FIELD_SIZES, 255)
    affinity_field.compute(
        logits, label, top, rest, FIELD_SIZES, 3.0, 1e-4, with_tables=tables,
        grad_sums=meta(2, CLASSES, k) if gradient else None,
        grad_log_loss=meta(CLASSES) if gradient else None,
    )  # fmt: skip


def affinity_field_costs(half: bool) -> dict[str, Callable[[Launch], Cost]]:
    logit = grad = 2 if half else 4
    # The largest logit, the sum of the other exponentials, a 16-bit label.
    statistics = (logit + 4 + 2) / CLASSES

    def patches(launch: Launch) -> float:
        return float(launch.arguments["PATCHES"] / launch.programs)

    def partial_tables(pixels_in_a_program: float) -> float:
        return 4 * (2 * len(FIELD_SIZES) + 1) / pixels_in_a_program

    def dense(launch: Launch) -> Cost:
        asked = launch.arguments
        rows = asked["ROWS"] + 2 * asked["REACH"]
        return Cost(logit + statistics + grad * asked["GRADIENT"], (-(-rows // asked["UNROLL"]),))

    def edges(launch: Launch) -> Cost:
        asked = launch.arguments
        block, part = ((asked[f"{x}_H"], asked[f"{x}_W"]) for x in ("BLOCK", "PART"))
        parts = block[0] // part[0] * (block[1] // part[1]) * EDGE_PATCHES
        steps = EDGE_STEPS if asked["GRADIENT"] else EDGE_STEPS_OF_TABLES
        if asked["REPLACE"]:
            steps = EDGE_STEPS_TO_REPLACE
        moved = FLOAT_OF_PIXEL + statistics
        moved += partial_tables(block[0] * block[1] * patches(launch)) * asked["TABLES"]
        moved += EDGE_PATCHES * EDGE_LABELS / CLASSES * (logit + 2 * grad) * asked["GRADIENT"]
        return Cost(moved, (patches(launch), parts, EDGE_LABELS, len(FIELD_SIZES), steps))

    def blocks_of_classes(launch: Launch) -> int:
        return -(-CLASSES // int(launch.arguments["BLOCK_C"]))

    return {
        "statistics_kernel": lambda launch: Cost(
            logit + LABEL + statistics, (blocks_of_classes(launch),)
        ),
        "counts_kernel": lambda launch: Cost(2 / CLASSES, (patches(launch), COUNT_STEPS)),
        "dense_kernel": dense,
        "edge_kernel": edges,
        "finish_kernel": lambda launch: Cost(
            logit + statistics + 2 * grad + partial_tables(2 * launch.arguments["BLOCK_P"]),
            # Counted as if every program added up tables too.
            (blocks_of_classes(launch),),
        ),
    }


def scale(images: tuple[int, int, int]) -> None:
    affinity_field.scale_(meta(images[0], CLASSES, *images[1:]), meta())


def regression(
    images: tuple[int, int, int], classes: int = CLASSES, *, grid_sizes: Sequence[int] = ()
) -> None:
    n, height, width = images
    logits, target, grids = meta(n, classes, height, width), labels(images), list(grid_sizes)
    _, _, gram = affinity_regression.forward(logits, target, grids, 255)
    affinity_regression.backward(meta(n), logits, target, gram, grids, 255)


def pairs_cost(launch: Launch) -> Cost:
    # The blocks on the diagonal of a symmetric matrix, and on one side of the diagonal.
    steps, classes = launch.arguments["STEPS"], launch.arguments["BLOCK_C"]
    trips = steps, (steps + 1) / 2, classes // launch.arguments["BLOCK_A"]
    return Cost(LOGIT + LABEL, trips, CLASSES * POINTS / (IMAGES[1] * IMAGES[2]))


def pairs_gradient_cost(launch: Launch) -> Cost:
    asked = launch.arguments
    per_pixel = CLASSES * POINTS / (IMAGES[1] * IMAGES[2])
    return Cost(
        # The gradient of all pixels. The zeros between the points take instructions too, some 8 per
        # element, which are left out: their bytes take longer.
        LOGIT + LABEL + GRAD * CLASSES / per_pixel,
        (asked["STEPS_J"], asked["BLOCK_C"] // asked["BLOCK_A"]),
        per_pixel,
        CLASSES * asked["BLOCK_I"],
    )


def block_gram_cost(launch: Launch) -> Cost:
    asked = launch.arguments
    blocks = -(-MANY_CLASSES // asked["BLOCK_A"])
    # One program computes two mirrored blocks.
    share = MANY_CLASSES * asked["BLOCK_P"] * asked["STEPS"] / (blocks * (blocks + 1) / 2)
    return Cost(MANY_LOGIT, (asked["STEPS"],), MANY_CLASSES, share)


def block_labels_cost(launch: Launch) -> Cost:
    asked = launch.arguments
    blocks = -(-MANY_CLASSES // asked["BLOCK_A"])
    # Counted as if the pixels of a step had one label: one column of blocks has products.
    share = MANY_CLASSES * asked["BLOCK_P"] * asked["STEPS"] / blocks
    return Cost(MANY_LOGIT, (asked["STEPS"],), MANY_CLASSES, share)


def square_root_affinity(images: tuple[int, int, int]) -> None:
    n, height, width = images
    affinity_regression.square_root_affinity(meta(n, CLASSES, height, width), GRID_SIZES)


def matrix_cost(launch: Launch) -> Cost:
    asked = launch.arguments
    points = 2 * asked["BLOCK_I"]
    moved = LOGIT + 4 * asked["BLOCK_I"] / (CLASSES * 2)
    trips = (asked["BLOCK_C"] // asked["BLOCK_A"],)
    return Cost(moved, trips, elements=CLASSES * points)


def propagation(images: tuple[int, int, int]) -> None:
    n, height, width = images
    probs, affinity = meta(n, CLASSES, height, width), meta(n, NEIGHBORS, height, width)
    options = RATES, ITERATIONS, 6.0, 7.0, True, "sum", "valid"
    affinity_propagation.forward(probs, affinity, *options)
    affinity_propagation.backward(probs, probs, affinity, True, True, *options)


def dilated(images: tuple[int, int, int]) -> None:
    n, height, width = images
    logits, options = meta(n, NEIGHBORS, height, width), (OFFSETS, 2.0, 255)
    dilated_affinity.forward(logits, labels(images), *options)
    dilated_affinity.backward(meta(len(RATES) // 2, 9, 2), logits, labels(images), *options)


def instances(images: tuple[int, int, int]) -> None:
    """Int64 ids with a background; every sum but the focal one."""
    n, height, width = images
    logits, ids = meta(n, PAIRS, 1, height, width), labels(images)[:, None]
    options = INSTANCE_OFFSETS, 0, None, False, 2.0, True, False
    instance_affinity.forward(logits, ids, *options)
    instance_affinity.backward(meta(n, PAIRS, 2, 4), logits, ids, *options)


def boxes(images: tuple[int, int, int]) -> None:
    """A mask for each image, of which the box is everything."""
    n, height, width = images
    logits, bits = meta(n, height, width), meta(n, height, width, dtype=torch.uint8)
    places, index = meta(n, 4, dtype=torch.int64), meta(n, dtype=torch.int64)
    box_pairwise.forward(logits, bits, places, index, 2)
    box_pairwise.backward(meta(n), logits, bits, places, index, 2)


OPERATIONS = (
    Operation("affinity_field_cross_entropy", affinity_field_pass, affinity_field_costs(False)),
    Operation(
        "affinity_field_cross_entropy_bfloat16",
        partial(affinity_field_pass, dtype=torch.bfloat16),
        affinity_field_costs(True),
    ),
    # Tables without a gradient, and a gradient after the tables: not in a training step.
    Operation(
        "affinity_field",
        partial(affinity_field_pass, statistics=False, gradient=False),
        {name: affinity_field_costs(False)[name] for name in ("dense_kernel", "edge_kernel")},
        in_implied_times=False,
    ),
    Operation(
        "affinity_field_backward",
        partial(affinity_field_pass, statistics=False, tables=False),
        {name: affinity_field_costs(False)[name] for name in ("dense_kernel", "edge_kernel")},
        in_implied_times=False,
    ),
    # Rows that are not aligned.
    Operation(
        "affinity_field_unaligned",
        lambda images: affinity_field_pass((*images[:2], images[2] + 1), statistics=False),
        {"dense_kernel": affinity_field_costs(False)["dense_kernel"]},
        in_implied_times=False,
    ),
    # If nothing multiplies the loss, its gradient is 1 and this kernel does nothing.
    Operation("affinity_field_scale", scale, {"scale_kernel": lambda _: Cost(2 * GRAD)}, False),
    Operation(
        "affinity_regression",
        partial(regression, grid_sizes=GRID_SIZES),
        {"pairs_kernel": pairs_cost, "pairs_gradient_kernel": pairs_gradient_cost},
    ),
    Operation(
        "affinity_regression_every_pixel",
        regression,
        {
            "gram_kernel": lambda launch: Cost(LOGIT + LABEL, (launch.arguments["STEPS"],)),
            "gradient_kernel": lambda _: Cost(LOGIT + LABEL + GRAD, (CLASSES,)),
        },
    ),
    # Not part of the implied times, which are for 19 classes.
    Operation(
        "affinity_regression_150_classes",
        partial(regression, classes=MANY_CLASSES),
        {
            "statistics_kernel": lambda _: Cost(MANY_LOGIT, per_pixel=MANY_CLASSES),
            "block_gram_kernel": block_gram_cost,
            "block_labels_kernel": block_labels_cost,
            "block_gradient_kernel": lambda launch: Cost(
                MANY_LOGIT + GRAD, (-(-MANY_CLASSES // launch.arguments["BLOCK_D"]),), MANY_CLASSES
            ),
        },
        in_implied_times=False,
    ),
    Operation(
        "square_root_affinity",
        square_root_affinity,
        {"matrix_kernel": matrix_cost},
        in_implied_times=False,
    ),
    Operation(
        "affinity_propagation",
        propagation,
        {
            "gates_kernel": lambda _: Cost(LOGIT + GATE, per_pixel=NEIGHBORS),
            "step_kernel": lambda _: Cost(
                4 + NEIGHBORS / CLASSES * GATE + FLOAT_OF_PIXEL + 4, (NEIGHBORS,)
            ),
            "normalize_backward_kernel": lambda _: Cost(GRAD + 4 + FLOAT_OF_PIXEL + GRAD),
            # The gates' gradient is read and written.
            "step_backward_kernel": lambda _: Cost(
                GRAD + 4 + NEIGHBORS / CLASSES * 3 * GATE + FLOAT_OF_PIXEL + GRAD, (NEIGHBORS,)
            ),
            "gates_backward_kernel": lambda _: Cost(3 * GATE, (4,), NEIGHBORS),
        },
    ),
    Operation(
        "dilated_affinity",
        dilated,
        {
            "tables_kernel": lambda launch: Cost(
                LOGIT + 8 / NEIGHBORS, (NEIGHBORS // 8, launch.arguments["STEPS"]), NEIGHBORS
            ),
            "gradient_kernel": lambda _: Cost(LOGIT + 8 / NEIGHBORS + GRAD, (8,), NEIGHBORS),
        },
    ),
    # Per pixel of a box, with its 8 pairs.
    Operation(
        "box_pairwise",
        boxes,
        {
            "tables_kernel": lambda _: Cost(LOGIT + 1, (8,), 1),
            "gradient_kernel": lambda _: Cost(LOGIT + 1 + GRAD, (8,), 1),
        },
        in_implied_times=False,
    ),
    Operation(
        "instance_affinity",
        instances,
        {
            "tables_kernel": lambda launch: Cost(
                LOGIT + 8 / PAIRS, (PAIRS, launch.arguments["STEPS"]), PAIRS
            ),
            "gradient_kernel": lambda _: Cost(LOGIT + 8 / PAIRS + GRAD, (PAIRS,), PAIRS),
        },
    ),
)


def analyse(kernel: Measured, target: str) -> dict[str, Any]:
    """One row of the static table."""
    launch = kernel.launch
    cost = kernel.operation.costs[launch.name](launch)
    pixels = IMAGES[0] * IMAGES[1] * IMAGES[2]
    elements = cost.elements or pixels * cost.per_pixel / launch.programs
    compiled = compile_launch(launch, target)
    code = nvidia_code(compiled.asm["cubin"]) if "cubin" in compiled.asm else None
    registers, spills, assembly = code or amd_code(compiled.asm["amdgcn"])
    counts = count_instructions(assembly, *cost.trips)
    threads = compiled.metadata.num_warps * TARGETS[target].warp_size
    per_element = {kind: round(counts[kind] * threads / elements, 1) for kind in KINDS}
    return {
        "kernel": launch.name,
        "op": kernel.operation.name,
        "target": target,
        "registers": registers,
        "spills": spills,
        "shared_bytes": compiled.metadata.shared,
        "instructions_per_element": {**per_element, "all": round(sum(per_element.values()), 1)},
        "instructions_per_thread": round(sum(counts.values())),
        "bytes_per_element": round(cost.moved, 2),
        "elements_per_pixel": round(cost.per_pixel, 4),
        "launches": kernel.times,
    }


def implied_times(kernels: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Times that the static table implies for each GPU, a row for a kernel: picoseconds per
    element, and milliseconds of all its launches in one forward and backward pass.
    """
    return [
        _implied(GPUS[row["target"]], row)
        for row in kernels
        if row["target"] in GPUS and row["launches"]
    ]


def _implied(gpu: Gpu, row: dict[str, Any]) -> dict[str, Any]:
    images, height, width = IMAGES
    elements = images * height * width * row["elements_per_pixel"]
    instructions = elements * row["instructions_per_element"]["all"]
    # A warp issues one instruction a clock at most: a launch takes as long as its longest program.
    seconds = {
        "bytes": elements * row["bytes_per_element"] / gpu.bytes_per_s,
        "instructions": instructions / gpu.instructions_per_s,
        "one program": row["instructions_per_thread"] / gpu.clock,
    }
    bound = max(seconds, key=lambda name: seconds[name])
    return {
        "op": row["op"],
        "kernel": row["kernel"],
        "gpu": gpu.name,
        "launches": row["launches"],
        "bytes_per_element": row["bytes_per_element"],
        "ps_per_element": round(1e12 * seconds[bound] / elements, 2),
        "bound": bound,
        "percent_of_copy": round(100 * seconds["bytes"] / seconds[bound]),
        "ms": round(1e3 * seconds[bound] * row["launches"], 4),
    }


def cross_entropy_ms(gpu: str, *, autocast: bool = False) -> float:
    """Milliseconds that the yardstick's bytes take for the same images, 19 classes."""
    each_bytes = AUTOCAST_CROSS_ENTROPY_BYTES if autocast else CROSS_ENTROPY_BYTES
    images, height, width = IMAGES
    (bytes_per_s,) = (each.bytes_per_s for each in GPUS.values() if each.name == gpu)
    return 1e3 * each_bytes * 19 * images * height * width / bytes_per_s


SHORT_KINDS = ("mem", "shfl", "spec", "arith", "ctrl")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compile all kernels for three GPUs, without one.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table here as well")
    return run_command("static_counts.py", print_counts, parser.parse_args(argv))


def print_counts(args: argparse.Namespace) -> int:
    if triton.knobs.runtime.interpret:
        raise ValueError("the counts need the compiler: unset TRITON_INTERPRET")
    of_targets = zip(*(measured(target) for target in TARGETS), strict=True)
    work = [each for same in of_targets for each in zip(TARGETS, same, strict=True)]
    kernels = []
    with progress(len(work)) as step:
        for target, kernel in work:
            step(f"{kernel.launch.name} {target}")
            kernels.append(analyse(kernel, target))
    print(f"instructions per element (class of a pixel), triton {versions()['triton']}")
    columns = ["kernel", "target", "regs", "spill", "shared", *SHORT_KINDS, "all"]
    for op in dict.fromkeys(row["op"] for row in kernels):
        lines = [
            [
                _short(row["kernel"]),
                row["target"],
                *(str(row[name]) for name in ("registers", "spills", "shared_bytes")),
                *(f"{row['instructions_per_element'][kind]:.0f}" for kind in (*KINDS, "all")),
            ]
            for row in kernels
            if row["op"] == op
        ]
        print_table(op, columns, lines)
    implied = implied_times(kernels)
    print(
        "\nleast time, by bytes / bandwidth or instructions / rate, forward and backward:\n"
        f"{' x '.join(map(str, IMAGES))}, 19 classes, {NEIGHBORS} neighbours, "
        f"{ITERATIONS} iterations, float32"
    )
    columns = ["", "runs", "bytes", "ps", "bound", "%copy", "ms", "x CE"]
    for gpu in GPUS.values():
        print_table(gpu.name, columns, _implied_lines(implied, gpu.name))
    if args.json:
        head = {"device": "none: compiled", "versions": versions()}
        yardsticks = {gpu.name: cross_entropy_ms(gpu.name) for gpu in GPUS.values()}
        content = {
            "kernels": kernels,
            "implied": implied,
            "cross_entropy_ms": yardsticks,
            "autocast_cross_entropy_ms": {
                gpu: cross_entropy_ms(gpu, autocast=True) for gpu in yardsticks
            },
        }
        write_json(args.json, {**head, **content})
    return 0


def _implied_lines(implied: list[dict[str, Any]], gpu: str) -> list[list[str]]:
    """A line for every operation, with its ratio to cross-entropy, and one for each kernel."""
    float32, half = (cross_entropy_ms(gpu, autocast=half) for half in (False, True))
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


def _short(kernel: str) -> str:
    return kernel.removesuffix("_kernel").replace("backward", "bwd")


if __name__ == "__main__":
    sys.exit(main())
