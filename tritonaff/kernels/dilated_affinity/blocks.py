"""Block sizes of dilated affinity's kernels, and the numbers of programs that follow from them."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from tritonaff.kernels.shared import cdiv, steps_in_32_bits


class Blocks(NamedTuple):
    """Block sizes, for GPUs by default."""

    pixels: int = 512
    """In gradient_kernel, four for each thread of 4 warps: the loads of all labels of a rate are in
    flight together.
    """
    tables_pixels: int = 128
    """In tables_kernel, two for each thread of 2 warps. Every thread keeps tables until its program
    ends: fewer threads have fewer tables to add up.
    """
    max_steps: int = 16
    """A program of tables_kernel goes through so many blocks of pixels ..."""
    min_programs: int = 1024
    """... if there still are so many programs: enough for any GPU."""


def gradient_options(offsets: list[int], blocks: Blocks) -> dict[str, Any]:
    return {"OFFSETS": steps_in_32_bits(offsets), "BLOCK_P": blocks.pixels}


def tables_options(offsets: list[int], blocks: Blocks) -> dict[str, Any]:
    return {
        "OFFSETS": steps_in_32_bits(offsets),
        "BLOCK_P": blocks.tables_pixels,
        "num_warps": 2,
    }


def tables_steps(logits: Tensor, blocks: Blocks) -> int:
    """Blocks of pixels of a tables_kernel program: its counts fit 8 bits, and 16 bits for all
    pixels together.
    """
    n, block_p = len(logits), blocks.tables_pixels
    image_blocks = cdiv(num_pairs(logits), block_p // 2)
    fit = min(0xFF, 0xFFFF // block_p) // 8
    enough = n * image_blocks // blocks.min_programs
    return max(1, min(blocks.max_steps, fit, image_blocks, enough))


def num_pairs(logits: Tensor) -> int:
    """Pairs of pixels in an image."""
    *_, height, width = logits.shape
    return int(height * cdiv(width, 2))


def pixel_grid(logits: Tensor, pixels_per_program: int) -> tuple[int]:
    """Images are part of the one axis that is not limited to 65535."""
    return (cdiv(num_pairs(logits), pixels_per_program // 2) * len(logits),)
