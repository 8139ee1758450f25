"""Block sizes of affinity propagation's kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from tritonaff.kernels.shared import cdiv, next_power_of_2, steps_in_32_bits


class Blocks(NamedTuple):
    """Block sizes, for GPUs by default."""

    pixels: int = 256
    """In a step: two for each thread of 4 warps."""
    classes: int = 24
    """The registers hold the sums of so many classes."""
    classes_of_many: int = 12
    """Classes at a time if there are more."""
    elements: int = 1024
    """In normalize_backward_kernel: 8 for each thread."""
    gate_pixels: int = 128
    """With 8 gates each: 8 elements for each thread."""


def step_options(
    probs: Tensor, rates: list[int], blocks: Blocks, border: str = "valid"
) -> dict[str, Any]:
    """Not more pixels than an image has: see pixels_to_load. IN_PAIRS is True if two pixels that
    begin at an even index have neighbours side by side, or none.
    """
    _, classes, height, width = probs.shape
    class_blocks = 1 if classes <= blocks.classes else cdiv(classes, blocks.classes_of_many)
    return {
        "RATES": steps_in_32_bits(rates),
        "IN_PAIRS": border == "valid"
        and width % 2 == 0
        and all(step % 2 == 0 for step in rates[1::2]),
        "C": classes,
        "BLOCK_C": cdiv(classes, class_blocks),
        "BLOCK_P": min(blocks.pixels, 1 << (height * width).bit_length() - 1),
    }


def normalize_options(probs: Tensor, blocks: Blocks) -> dict[str, int]:
    """All classes in one block."""
    classes = next_power_of_2(probs.shape[1])
    return {"BLOCK_C": classes, "BLOCK_P": max(4, blocks.elements // classes)}


def pixel_grid(x: Tensor, block_p: int) -> tuple[int]:
    n, _, height, width = x.shape
    return (cdiv(height * width, block_p) * n,)
