"""Registers and instructions of every tile, compiled for three GPUs without a GPU: exact,
repeatable counts, and the time that they imply.

    python tools/static_counts.py
    python tools/static_counts.py --json docs/results/static.json

A kernel takes at least as long as its bytes take at the GPU's bandwidth, and as long as its
instructions take to issue. The larger of the two is the time implied: a bound from below that
assumes a GPU full of programs and caches that serve every second read.
"""

from __future__ import annotations

import argparse
import math
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tritonaff.bench.machine import versions
from tritonaff.bench.tables import print_table, progress, run_command, write_json
from tritonaff.kernels import (
    affinity_field,
    affinity_propagation,
    affinity_regression,
    dilated_affinity,
    instance_affinity,
)
from tritonaff.offsets import instance_offsets
from tritonaff.rates import rate_offsets

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
NUM_WARPS = 4
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
# F.cross_entropy on float32 logits of 19 classes, forward and backward. log_softmax reads and
# writes, its backward reads two tensors and writes one. The zeros that nll_loss's backward writes
# first are left out: the yardstick must not look slower than it is.
CROSS_ENTROPY_BYTES = 5 * 4
# With bfloat16 under autocast also two conversions: to float32, and of the gradient back.
AUTOCAST_CROSS_ENTROPY_BYTES = CROSS_ENTROPY_BYTES + 2 * (2 + 4)


@dataclass(frozen=True)
class Tile:
    """A kernel as its launcher calls it: 19 classes, 3 sizes or 4 rates, float32, contiguous."""

    op: str
    kernel: Any
    blocks: dict[str, Any]
    elements: float
    """Elements that one program works on: classes of pixels, or of points of grids."""
    moved: float
    """Bytes per element that the kernel reads and writes, each once."""
    trips: float | tuple[float, ...] = 1
    """Average trips of its loops, from the outermost to the innermost."""
    per_pixel: float = 19
    """Elements in a pixel of the image."""
    launches: int = 1
    """Launches in one forward and backward pass of a loss."""
    targets: tuple[str, ...] = tuple(TARGETS)
    half: bool = False
    """Logits and gradient in bfloat16."""


# Bytes per element (19 elements make up a pixel) of float32 and int64.
LOGIT = GRAD = GATE = 4
FLOAT_OF_PIXEL = 4 / 19
LABEL = 8 / 19
# On the meta device the launchers choose the block sizes of a GPU.
LOGITS = torch.empty(1, 19, 256, 512, device="meta")
BATCH = torch.empty(8, 19, 512, 512, device="meta")
# A strip owns fewer columns and rows than it reads.
FIELD = affinity_field.blocks.default_blocks(BATCH)
STRIP_ROWS = affinity_field.blocks.strip_rows(BATCH, FIELD)
(SIZES,) = affinity_field.passes([3, 5, 7])
STRIP = affinity_field.blocks.strip_options(BATCH, FIELD)
PATCH = affinity_field.blocks.part_options(FIELD)
# Targets, and the number of classes in a warp.
STRIPS = tuple(
    (tuple(name for name, target in TARGETS.items() if target.backend == backend), classes)
    for backend, classes in affinity_field.blocks.CLASSES_IN_A_WARP.items()
)
STRIP_ELEMENTS = BATCH.numel() // affinity_field.blocks.strip_programs(BATCH, FIELD)
STRIP_TRIPS = -(-(STRIP_ROWS + 2 * SIZES["REACH"]) // STRIP["UNROLL"])
PATCH_ELEMENTS = 19 * PATCH["BLOCK_H"] * PATCH["BLOCK_W"]
# Averages in street scenes of 480 x 360 pixels (CamVid): the share of patches with more than one
# label within reach of three sizes; for a part of such a patch, the number of labels that the edge
# kernel walks through, and of steps to neighbours for a label and a size. Steps go to neighbours of
# another label; for the tables alone, only from pixels of this label; if the kernel replaces a
# gradient, to all neighbours.
EDGE_PATCHES, EDGE_LABELS = 0.32, 1.61
EDGE_STEPS, EDGE_STEPS_OF_TABLES, EDGE_STEPS_TO_REPLACE = 3.33, 2.55, 8
PARTS = PATCH["BLOCK_H"] // PATCH["PART_H"] * (PATCH["BLOCK_W"] // PATCH["PART_W"]) * EDGE_PATCHES
PATCHES = affinity_field.blocks.num_patches(BATCH, FIELD)
COUNTED_PATCHES = PATCHES / affinity_field.blocks.count_programs(PATCHES, FIELD)
PARTIAL_TABLES = 4 * (2 * 3 + 1) * 19 / PATCH_ELEMENTS / FIELD.patches_in_a_program
PIXELS = affinity_field.blocks.pixel_options(BATCH, FIELD)
PIXEL_ELEMENTS = 19 * PIXELS["BLOCK_P"]
PIXEL_TRIPS = -(-19 // PIXELS["BLOCK_C"])
GRIDS: dict[str, Any] = {"GRIDS": (12, 6)}
POINTS_PER_PIXEL = 19 * 180 / (IMAGES[1] * IMAGES[2])
FEW_PIXELS = affinity_regression.blocks.default_blocks(LOGITS)
PAIRS = affinity_regression.blocks.pairs_options(LOGITS, 180, FEW_PIXELS)
PAIRS_GRADIENT = affinity_regression.blocks.pairs_gradient_options(LOGITS, 180, FEW_PIXELS)
GRAM = affinity_regression.blocks.gram_options(
    BATCH, affinity_regression.blocks.default_blocks(BATCH)
)
GRADIENT = affinity_regression.blocks.gradient_options(LOGITS, FEW_PIXELS)
MANY = torch.empty(8, 150, 512, 512, device="meta")
MANY_CLASSES = affinity_regression.blocks.default_blocks(MANY)
MANY_STATISTICS = affinity_regression.blocks.statistics_options(MANY, MANY_CLASSES)
MANY_GRAM = affinity_regression.blocks.gram_options(MANY, MANY_CLASSES)
MANY_GRADIENT = affinity_regression.blocks.gradient_options(MANY, MANY_CLASSES)
MANY_BLOCKS = -(-150 // MANY_GRAM["BLOCK_A"])
# Bytes of a logit, and its share of its pixel's label and four statistics.
MANY_LOGIT = LOGIT + (8 + 4 * 4) / 150
MATRIX = affinity_regression.blocks.matrix_options(LOGITS, FEW_PIXELS)
RATES = (8, 8, 16, 16, 32, 32, 64, 64)
PROPAGATION = affinity_propagation.Blocks()
GATES = {"FROM_LOGITS": True, "BLOCK_P": PROPAGATION.gate_pixels}
GATE_ELEMENTS = 4 * len(RATES) * GATES["BLOCK_P"]
ALL_CLASSES = affinity_propagation.blocks.normalize_options(LOGITS, PROPAGATION)
NOT_FIRST = {"IS_FIRST": False, "NEEDS_P": True, "NEEDS_GATES": True}
SUM = affinity_propagation.blocks.step_options(LOGITS, list(RATES), PROPAGATION)
SUM_ELEMENTS = 19 * SUM["BLOCK_P"]
OFFSETS = rate_offsets(((8, 8), (16, 16), (32, 32), (64, 64)))
NUM_OFFSETS = len(OFFSETS) // 2
ITERATIONS = 10
DILATED = dilated_affinity.Blocks()
SIGNALS = dilated_affinity.blocks.gradient_options(OFFSETS, DILATED)
NUM_SIGNALS = NUM_OFFSETS * SIGNALS["BLOCK_P"]
TABLES = dilated_affinity.blocks.tables_options(OFFSETS, DILATED)
TABLES_STEPS = dilated_affinity.blocks.tables_steps(
    torch.empty(IMAGES[0], NUM_OFFSETS, *IMAGES[1:], device="meta"), DILATED
)

INSTANCES = instance_affinity.Blocks()
INSTANCE_OFFSETS = [
    distance for dy, dx in instance_offsets("mutex_watershed_2d") for distance in (0, dy, dx)
]
NUM_PAIRS = len(INSTANCE_OFFSETS) // 3
# Int64 ids with a background; every sum but the focal one.
INSTANCE_PAIRS = instance_affinity.blocks.options(
    torch.empty(0, dtype=torch.int64, device="meta"), INSTANCE_OFFSETS, 0, None,
    invert=False, misses=True, focal=False,
)  # fmt: skip
INSTANCE_STEPS = instance_affinity.blocks.tables_steps(
    torch.empty(IMAGES[0], NUM_PAIRS, 1, *IMAGES[1:], device="meta"), INSTANCES
)


def pixel_statistics(logit: int) -> float:
    """Bytes per element of the largest logit, the sum of other exponentials, a 16-bit label."""
    return (logit + 4 + 2) / 19


def affinity_field_tiles(
    op: str, *, tables: bool = True, gradient: bool = True, half: bool = False, launches: int = 1
) -> tuple[Tile, ...]:
    """Kernels of a pass that computes tables, a gradient or both."""
    logit = grad = 2 if half else 4
    statistics = pixel_statistics(logit)
    asked = {"TABLES": tables, "GRADIENT": gradient}
    edges = {"REPLACE": half, "CROSS_ENTROPY": True, "BLOCK_CLASSES": 32, **SIZES, **PATCH}
    steps = EDGE_STEPS if gradient else EDGE_STEPS_OF_TABLES
    patches = FIELD.patches_in_a_program
    return (
        *(
            Tile(
                op,
                affinity_field.dense_kernel,
                {**asked, "ADD": False, **SIZES, **STRIP, "BLOCK_C": classes},
                STRIP_ELEMENTS // -(-19 // classes),
                moved=logit + statistics + grad * gradient,
                trips=STRIP_TRIPS,
                launches=launches,
                targets=targets,
                half=half,
            )
            for targets, classes in STRIPS
        ),
        Tile(
            op,
            affinity_field.edge_kernel,
            asked | edges,
            patches * PATCH_ELEMENTS,
            moved=FLOAT_OF_PIXEL
            + statistics
            + PARTIAL_TABLES * tables
            + EDGE_PATCHES * EDGE_LABELS / 19 * (logit + 2 * grad) * gradient,
            trips=(patches, PARTS, EDGE_LABELS, 3, EDGE_STEPS_TO_REPLACE if half else steps),
            launches=launches,
            half=half,
        ),
    )


def affinity_field_loss_tiles(op: str, *, half: bool = False) -> tuple[Tile, ...]:
    logit = grad = 2 if half else 4
    statistics = pixel_statistics(logit)
    return (
        Tile(
            op,
            affinity_field.statistics_kernel,
            PIXELS,
            PIXEL_ELEMENTS,
            moved=logit + LABEL + statistics,
            trips=PIXEL_TRIPS,
            half=half,
        ),
        Tile(
            op,
            affinity_field.counts_kernel,
            {
                "PIXELS": True,
                "BLOCK_CLASSES": 32,
                **SIZES,
                **affinity_field.blocks.patch_options(FIELD),
            },
            COUNTED_PATCHES * PATCH_ELEMENTS,
            moved=2 / 19,
            # Sizes where there are edges, 0.96; labels, 1.1 on average.
            trips=(COUNTED_PATCHES, 1.1),
        ),
        *affinity_field_tiles(op, half=half),
        Tile(
            op,
            affinity_field.finish_kernel,
            {"TABLES": True, "GRADIENT": True, "CROSS_ENTROPY": True}
            | {"BLOCK_SUM": FIELD.sums}
            | PIXELS,
            PIXEL_ELEMENTS,
            moved=logit + statistics + 2 * grad + PARTIAL_TABLES,
            # Counted as if every program added up tables too.
            trips=PIXEL_TRIPS,
            half=half,
        ),
        # If nothing multiplies the loss, its gradient is 1 and this kernel does nothing.
        Tile(
            op,
            affinity_field.scale_kernel,
            {"BLOCK": affinity_field.blocks.SCALE_BLOCK},
            affinity_field.blocks.SCALE_BLOCK,
            moved=2 * grad,
            launches=0,
            half=half,
        ),
    )


TILES = (
    *affinity_field_loss_tiles("affinity_field_cross_entropy"),
    *affinity_field_loss_tiles("affinity_field_cross_entropy_bfloat16", half=True),
    # Tables without a gradient, and a gradient after the tables: not in a training step.
    *affinity_field_tiles("affinity_field", gradient=False, launches=0),
    *affinity_field_tiles("affinity_field_backward", tables=False, launches=0),
    # For rows that are not aligned.
    *(
        replace(tile, blocks=tile.blocks | {"ALIGNED": False})
        for tile in affinity_field_tiles("affinity_field_unaligned", launches=0)
        if tile.kernel is affinity_field.dense_kernel
    ),
    Tile(
        "affinity_regression",
        affinity_regression.pairs_kernel,
        GRIDS | PAIRS,
        19 * min(180, PAIRS["BLOCK"] * PAIRS["STEPS"]),
        moved=LOGIT + LABEL,
        # The blocks on the diagonal of a symmetric matrix, and on one side of the diagonal.
        trips=(PAIRS["STEPS"], (PAIRS["STEPS"] + 1) / 2, PAIRS["BLOCK_C"] // PAIRS["BLOCK_A"]),
        per_pixel=POINTS_PER_PIXEL,
    ),
    Tile(
        "affinity_regression",
        affinity_regression.pairs_gradient_kernel,
        GRIDS | PAIRS_GRADIENT,
        19 * PAIRS_GRADIENT["BLOCK_I"],
        # The gradient of all pixels. The zeros between the points take instructions too, some 8 per
        # element, which are left out: their bytes take longer.
        moved=LOGIT + LABEL + GRAD * 19 / POINTS_PER_PIXEL,
        trips=(
            PAIRS_GRADIENT["STEPS_J"],
            PAIRS_GRADIENT["BLOCK_C"] // PAIRS_GRADIENT["BLOCK_A"],
        ),
        per_pixel=POINTS_PER_PIXEL,
    ),
    Tile(
        "affinity_regression_every_pixel",
        affinity_regression.gram_kernel,
        GRAM,
        19 * GRAM["BLOCK_P"] * GRAM["STEPS"],
        moved=LOGIT + LABEL,
        trips=GRAM["STEPS"],
    ),
    Tile(
        "affinity_regression_every_pixel",
        affinity_regression.gradient_kernel,
        GRADIENT,
        19 * GRADIENT["BLOCK_P"],
        moved=LOGIT + LABEL + GRAD,
        trips=GRADIENT["C"],
    ),
    # Not part of the implied times, which are for 19 classes.
    Tile(
        "affinity_regression_150_classes",
        affinity_regression.statistics_kernel,
        MANY_STATISTICS,
        150 * MANY_STATISTICS["BLOCK_P"],
        moved=MANY_LOGIT,
        per_pixel=150,
        launches=0,
    ),
    Tile(
        "affinity_regression_150_classes",
        affinity_regression.block_gram_kernel,
        MANY_GRAM,
        # One program computes two mirrored blocks.
        150 * MANY_GRAM["BLOCK_P"] * MANY_GRAM["STEPS"] / (MANY_BLOCKS * (MANY_BLOCKS + 1) / 2),
        moved=MANY_LOGIT,
        trips=MANY_GRAM["STEPS"],
        per_pixel=150,
        launches=0,
    ),
    Tile(
        "affinity_regression_150_classes",
        affinity_regression.block_labels_kernel,
        MANY_GRAM,
        # Counted as if the pixels of a step had one label: one column of blocks has products.
        150 * MANY_GRAM["BLOCK_P"] * MANY_GRAM["STEPS"] / MANY_BLOCKS,
        moved=MANY_LOGIT,
        trips=MANY_GRAM["STEPS"],
        per_pixel=150,
        launches=0,
    ),
    Tile(
        "affinity_regression_150_classes",
        affinity_regression.block_gradient_kernel,
        MANY_GRADIENT,
        150 * MANY_GRADIENT["BLOCK_P"],
        moved=MANY_LOGIT + GRAD,
        trips=-(-150 // MANY_GRADIENT["BLOCK_D"]),
        per_pixel=150,
        launches=0,
    ),
    Tile(
        "square_root_affinity",
        affinity_regression.matrix_kernel,
        GRIDS | MATRIX,
        19 * 2 * MATRIX["BLOCK_I"],
        moved=LOGIT + 4 * MATRIX["BLOCK_I"] / (19 * 2),
        trips=MATRIX["BLOCK_C"] // MATRIX["BLOCK_A"],
        launches=0,
    ),
    Tile(
        "affinity_propagation",
        affinity_propagation.gates_kernel,
        {"RATES": RATES, "REPLICATE": False, **GATES},
        GATE_ELEMENTS,
        moved=LOGIT + GATE,
        per_pixel=NUM_OFFSETS,
        launches=2,
    ),
    Tile(
        "affinity_propagation",
        affinity_propagation.step_kernel,
        {"NORMALIZE": True, "REPLICATE": False, **SUM},
        SUM_ELEMENTS,
        moved=4 + NUM_OFFSETS / 19 * GATE + FLOAT_OF_PIXEL + 4,
        trips=NUM_OFFSETS,
        launches=2 * ITERATIONS,
    ),
    Tile(
        "affinity_propagation",
        affinity_propagation.normalize_backward_kernel,
        ALL_CLASSES,
        19 * ALL_CLASSES["BLOCK_P"],
        moved=GRAD + 4 + FLOAT_OF_PIXEL + GRAD,
    ),
    Tile(
        "affinity_propagation",
        affinity_propagation.step_backward_kernel,
        {**NOT_FIRST, **SUM},
        SUM_ELEMENTS,
        # The gates' gradient is read and written.
        moved=GRAD + 4 + NUM_OFFSETS / 19 * 3 * GATE + FLOAT_OF_PIXEL + GRAD,
        trips=NUM_OFFSETS,
        launches=ITERATIONS,
    ),
    Tile(
        "affinity_propagation",
        affinity_propagation.gates_backward_kernel,
        {"NUM_RATES": len(RATES) // 2, **GATES},
        GATE_ELEMENTS,
        moved=3 * GATE,
        trips=4,
        per_pixel=NUM_OFFSETS,
    ),
    Tile(
        "dilated_affinity",
        dilated_affinity.tables_kernel,
        TABLES,
        NUM_OFFSETS * TABLES["BLOCK_P"] * TABLES_STEPS,
        moved=LOGIT + 8 / NUM_OFFSETS,
        trips=(NUM_OFFSETS // 8, TABLES_STEPS),
        per_pixel=NUM_OFFSETS,
    ),
    Tile(
        "dilated_affinity",
        dilated_affinity.gradient_kernel,
        SIGNALS,
        NUM_SIGNALS,
        moved=LOGIT + 8 / NUM_OFFSETS + GRAD,
        trips=8,
        per_pixel=NUM_OFFSETS,
    ),
    Tile(
        "instance_affinity",
        instance_affinity.tables_kernel,
        {**INSTANCE_PAIRS, "BLOCK_V": INSTANCES.tables_voxels},
        NUM_PAIRS * INSTANCES.tables_voxels * INSTANCE_STEPS,
        moved=LOGIT + 8 / NUM_PAIRS,
        trips=(NUM_PAIRS, INSTANCE_STEPS),
        per_pixel=NUM_PAIRS,
    ),
    Tile(
        "instance_affinity",
        instance_affinity.gradient_kernel,
        {**INSTANCE_PAIRS, "BLOCK_V": INSTANCES.voxels},
        NUM_PAIRS * INSTANCES.voxels,
        moved=LOGIT + 8 / NUM_PAIRS + GRAD,
        trips=NUM_PAIRS,
        per_pixel=NUM_PAIRS,
    ),
)


@dataclass(frozen=True)
class Device:
    """Stands for a device: answers the launchers' questions."""

    target: GPUTarget

    def get_current_target(self) -> GPUTarget:
        return self.target


def compile_tile(tile: Tile, target: str, *, size_1: bool = False) -> Any:
    """Compiles for contiguous float32 logits; with ``size_1`` for logits whose sizes are all 1,
    which Triton takes for constants.
    """
    options = {"num_warps": tile.blocks.get("num_warps", NUM_WARPS), "enable_fp_fusion": True}
    driver = triton.runtime.driver
    before, driver._active = driver._active, Device(TARGETS[target])
    try:
        return triton.compile(_source(tile, size_1), target=TARGETS[target], options=options)
    finally:
        driver._active = before


def analyse(tile: Tile, target: str) -> dict[str, Any]:
    """One row of the static table."""
    compiled = compile_tile(tile, target)
    num_warps = tile.blocks.get("num_warps", NUM_WARPS)
    if target.startswith("sm_"):
        registers, spills, assembly = _nvidia(compiled.asm["cubin"])
    else:
        registers, spills, assembly = _amd(compiled.asm["amdgcn"])
    threads = num_warps * TARGETS[target].warp_size
    trips = tile.trips if isinstance(tile.trips, tuple) else (tile.trips,)
    counts = count_instructions(assembly, *trips)
    per_element = {kind: round(counts[kind] * threads / tile.elements, 1) for kind in KINDS}
    return {
        "kernel": tile.kernel.__name__,
        "op": tile.op,
        "target": target,
        "registers": registers,
        "spills": spills,
        "shared_bytes": compiled.metadata.shared,
        "instructions_per_element": {**per_element, "all": round(sum(per_element.values()), 1)},
        "instructions_per_thread": round(sum(counts.values())),
        "bytes_per_element": round(tile.moved, 2),
        "elements_per_pixel": round(tile.per_pixel, 4),
        "launches": tile.launches,
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


# Every other number is an int.
FLOATS = ("margin", "eps", "limit", "self_weight", "slope", "gamma")
# Sizes and strides that are multiples of 16, as in most images: loads of four numbers.
MULTIPLES_OF_16 = (
    *("H", "W", "HW", "PAIRS", "FOURS", "stride_n", "stride_c", "stride_h"),
    *("grad_stride_n", "grad_stride_c", "grad_stride_h", "target_stride_n", "target_stride_h"),
    *("stride_k", "stride_d", "grad_stride_k", "grad_stride_d"),
    *("ids_stride_n", "ids_stride_d", "ids_stride_h"),
)
POINTERS = {
    "target_ptr": "*i64",
    "ids_ptr": "*i64",
    "label_ptr": "*i16",
    "totals_ptr": "*i64",
    "entries_ptr": "*i64",
    "counts_ptr": "*i32",
    "count_ptr": "*i32",
    "pair_count_ptr": "*i64",
    "gram_ptr": "*fp64",
}
HALF = ("logits_ptr", "top_ptr", "grad_ptr", "x_ptr")


def _source(tile: Tile, size_1: bool) -> ASTSource:
    """Types and alignments as the launcher finds them."""
    names = tile.kernel.arg_names
    types = POINTERS | dict.fromkeys(HALF if tile.half else (), "*bf16")
    constants = {name: size for name, size in tile.blocks.items() if name != "num_warps"}
    signature, aligned = {}, {}
    for i, name in enumerate(names):
        is_pointer, is_float = name.endswith("_ptr"), name in FLOATS
        if name.endswith(("stride_w", "stride_p")) or (size_1 and not is_pointer and not is_float):
            constants.setdefault(name, 1)
        if name in constants:
            signature[name] = "constexpr"
        elif is_pointer:
            signature[name] = types.get(name, "*fp32")
            aligned[i,] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if is_float else "i32"
            if name in MULTIPLES_OF_16 and tile.blocks.get("ALIGNED", True):
                aligned[i,] = [["tt.divisibility", 16]]
    constexprs = {(names.index(name),): value for name, value in constants.items()}
    return ASTSource(tile.kernel, signature, constexprs, aligned)


def _nvidia(cubin: bytes) -> tuple[int, int, str]:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run(str(tools / "cuobjdump"), "-res-usage", file.name)
        assembly = _run(str(tools / "nvdisasm"), "-c", file.name)
    registers = int(re.findall(r"REG:(\d+)", usage)[0])
    return registers, int(re.findall(r"STACK:(\d+)", usage)[0]) // 4, assembly


def _amd(assembly: str) -> tuple[int, int, str]:
    def field(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s*(\d+)", assembly)[0])

    return field("vgpr_count"), field("vgpr_spill_count"), assembly


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def count_instructions(assembly: str, *trips: float) -> dict[str, float]:
    """Instructions that a thread executes, by kind. ``trips`` are the trips of loops, the
    outermost first.

    Code that the entry does not reach is left out: padding, and subroutines for operands that do
    not occur. The path for a warp with diverged lanes is left out too.
    """
    names: list[str] = []
    labels: dict[str, int] = {}
    jumps: dict[int, tuple[str, bool]] = {}
    for line in assembly.splitlines():
        if label := re.match(r"\s*(\.L\w+):", line):
            labels[label[1]] = len(names)
        instruction = INSTRUCTION.match(line)
        if not instruction or instruction["name"] in ("NOP", "s_nop"):
            continue
        name, rest = instruction["name"], instruction["rest"]
        label = re.search(r"(\.L\w+)", rest)
        if label and JUMPS(name) and not rest.startswith(".DIV"):
            always = name in ("BRA", "s_branch") and not instruction["predicate"]
            jumps[len(names)] = label[1], always
        elif name in ENDS and not instruction["predicate"]:
            jumps[len(names)] = "", True
        names.append(name)

    def after(i: int) -> list[int]:
        label, always = jumps.get(i, ("", False))
        return [*([labels[label]] if label else []), *([] if always else [i + 1])]

    # Straight pieces: from an entry to before the next one.
    entries = sorted({0, *(j for i in jumps for j in (*after(i), i + 1) if j < len(names))})
    pieces = [range(i, j) for i, j in zip(entries, [*entries[1:], len(names)], strict=True)]
    index = {piece.start: i for i, piece in enumerate(pieces)}
    successors = {
        i: {index[j] for j in after(piece[-1]) if j in index} for i, piece in enumerate(pieces)
    }
    times = [n for n in trips if n != 1]
    counts: dict[str, float] = defaultdict(float)
    for i, depth in loop_depths(successors).items():
        if depth > len(times):
            raise ValueError(f"the code has {depth} loops in one another, told are {trips}")
        for name in pieces[i]:
            counts[kind_of(names[name])] += math.prod(times[:depth])
    return counts


# A line of nvdisasm, "/*0010*/ @!P0 IMAD.MOV R1, ...;", or of AMD's assembly, "v_add_f32 v1, ...".
INSTRUCTION = re.compile(
    r"\s+(?:/\*[0-9a-f]{4,}\*/\s+(?P<predicate>@\S+\s+)?)?"
    r"(?P<name>[A-Za-z][A-Za-z0-9_]*)(?P<rest>.*)"
)
# A call of a label within the code is a jump far away.
JUMPS = re.compile(r"BRA|CALL|s_c?branch.*").fullmatch
ENDS = ("EXIT", "RET", "s_endpgm")


def loop_depths(successors: dict[int, set[int]], entry: int = 0) -> dict[int, int]:
    """Number of loops around every node that the entry reaches.

    A jump backwards need not close a loop: compilers put rarely executed code at the end, and this
    code jumps back to its origin. A loop is a set of nodes that reach each other.
    """
    depths = dict.fromkeys(_reached(successors, entry) | {entry}, 0)
    reached = {i: _reached(successors, i) for i in depths}
    done: set[int] = set()
    for i in depths:
        if i in reached[i] and i not in done:
            loop = {j for j in reached[i] if i in reached[j]}
            done |= loop
            heads = {k for j in depths if j not in loop for k in successors[j] & loop} or {entry}
            head = min(heads)
            # Without the way back to its head a loop is open; any loop that remains is inside it.
            inside = {j: (successors[j] & loop) - {head} for j in loop}
            for j, depth in loop_depths(inside, head).items():
                depths[j] = depth + 1
    return depths


def _reached(successors: dict[int, set[int]], start: int) -> set[int]:
    reached: set[int] = set()
    waiting = [start]
    while waiting:
        new = successors[waiting.pop()] - reached
        reached |= new
        waiting += new
    return reached


def kind_of(name: str) -> str:
    if re.match(r"SHFL|ds_bpermute|ds_swizzle|v_permlane|v_readlane", name):
        return "shuffle"
    if re.match(r"(LD|ST)[GSLC]?$|LDGSTS|ATOM|global_|flat_|buffer_|scratch_|ds_|s_load", name):
        return "memory"
    if re.match(r"MUFU|v_(exp|log|rcp|rsq|sqrt)_", name):
        return "special"
    if re.match(
        r"BRA|EXIT|BAR|BSSY|BSYNC|WARPSYNC|RET|CALL|s_cbranch|s_branch|s_barrier|s_waitcnt|s_endpgm",
        name,
    ):
        return "control"
    return "arithmetic"


# ------------------------------------------------------------------------------- command line

SHORT_KINDS = ("mem", "shfl", "spec", "arith", "ctrl")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compile every tile for three GPUs, without one.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table here as well")
    return run_command("static_counts.py", print_counts, parser.parse_args(argv))


def print_counts(args: argparse.Namespace) -> int:
    if triton.knobs.runtime.interpret:
        raise ValueError("the counts need the compiler: unset TRITON_INTERPRET")
    kernels = []
    with progress(sum(len(tile.targets) for tile in TILES)) as step:
        for tile in TILES:
            for target in tile.targets:
                step(f"{tile.kernel.__name__} {target}")
                kernels.append(analyse(tile, target))
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
        f"{' x '.join(map(str, IMAGES))}, 19 classes, {NUM_OFFSETS} neighbours, "
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
