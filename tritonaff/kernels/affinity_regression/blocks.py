"""Block sizes of affinity regression's kernels.

Blocks are small because products in full precision keep their operands in registers: with 19 and
with 150 classes they spill none on the GPUs that `tools/static_counts.py` compiles for, from Triton
3.7 on.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from tritonaff.kernels.shared import cdiv, next_power_of_2

# More classes than these are cut into blocks of 32: by the Gram matrices, by the gradient.
GRAM_CLASSES, GRADIENT_CLASSES = 32, 64
# Pixels per class that one program adds up: so many that the partial matrices stay below an eighth
# of float32 logits. A quarter as many if a GPU would have too few programs.
GRAM_PIXELS_PER_CLASS, GRAM_PROGRAMS = 32, 1024
# Pixels that a program of the Gram matrices adds up in float32.
GRAM_STEP = 32
# Points i that one program compares with all others.
POINTS_PER_PROGRAM = 256


class Blocks(NamedTuple):
    """Pixels or points that a program takes at a time."""

    points: int
    """In pairs_kernel, both i and j."""
    pixels: int
    """With all their classes: in gradient_kernel, and where pairs_gradient_kernel writes zeros."""
    gram_pixels: int
    """Pixels of one partial Gram matrix, a multiple of 32."""
    gradient_points: int = 16
    """In pairs_gradient_kernel, both i and j."""
    statistics_pixels: int = 32
    many_pixels: int = 32
    """In block_gradient_kernel."""
    matrix_points: int = 32


def default_blocks(logits: Tensor) -> Blocks:
    """Block sizes for GPUs."""
    n, num_classes, height, width = logits.shape
    block_c = class_options(logits)["BLOCK_C"]
    gram_pixels = GRAM_PIXELS_PER_CLASS * block_c
    blocks = cdiv(num_classes, GRAM_CLASSES)
    if n * height * width * blocks * (blocks + 1) // 2 < GRAM_PROGRAMS * gram_pixels:
        gram_pixels //= 4
    return Blocks(
        points=64 if block_c <= 32 else 32,
        # A thread has 64 elements at most, and with many classes fewer.
        pixels=(8192 if block_c <= 64 else 4096) // block_c,
        gram_pixels=gram_pixels,
    )


def class_options(logits: Tensor) -> dict[str, int]:
    """All classes in one block. A matrix product takes at least 16 x 16 and 16 x 8."""
    block_c = max(16, next_power_of_2(logits.shape[1]))
    return {"C": logits.shape[1], "BLOCK_C": block_c, "num_warps": 8 if block_c > 64 else 4}


def pairs_options(logits: Tensor, points: int, blocks: Blocks) -> dict[str, int]:
    classes = class_options(logits)
    return {
        **classes,
        "BLOCK_A": classes["BLOCK_C"] if classes["BLOCK_C"] <= 32 else 16,
        "BLOCK": blocks.points,
        "STEPS": cdiv(min(points, POINTS_PER_PROGRAM), blocks.points),
    }


def pairs_gradient_options(logits: Tensor, points: int, blocks: Blocks) -> dict[str, int]:
    classes = class_options(logits)
    return {
        **classes,
        "BLOCK_A": min(32, classes["BLOCK_C"]),
        "BLOCK_I": blocks.gradient_points,
        "BLOCK_J": blocks.gradient_points,
        "BLOCK_P": blocks.pixels,
        "STEPS_J": cdiv(points, blocks.gradient_points),
        "CHANNELS_LAST": logits.stride(1) == 1,
    }


def gram_options(logits: Tensor, blocks: Blocks) -> dict[str, int]:
    classes = class_options(logits)
    steps = {"BLOCK_P": GRAM_STEP, "STEPS": blocks.gram_pixels // GRAM_STEP}
    if classes["C"] > GRAM_CLASSES:
        return {"C": classes["C"], "BLOCK_A": GRAM_CLASSES, **steps}
    block_y = next_power_of_2(max(8, 2 * classes["C"] - classes["BLOCK_C"]))
    if block_y < 32:  # few enough registers for fewer threads, which repeat less
        classes["num_warps"] = 2
    return {**classes, "BLOCK_Y": block_y, **steps}


def statistics_options(logits: Tensor, blocks: Blocks) -> dict[str, int]:
    return {**class_options(logits), "BLOCK_P": blocks.statistics_pixels, "num_warps": 4}


def gradient_options(logits: Tensor, blocks: Blocks) -> dict[str, int]:
    classes = class_options(logits)
    if classes["C"] > GRADIENT_CLASSES:
        return {"C": classes["C"], "BLOCK_A": 32, "BLOCK_D": 16, "BLOCK_P": blocks.many_pixels}
    return {**classes, "BLOCK_P": blocks.pixels}


def matrix_options(logits: Tensor, blocks: Blocks) -> dict[str, int]:
    return {**class_options(logits), "BLOCK_A": 16, "BLOCK_I": blocks.matrix_points}
