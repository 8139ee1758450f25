"""Block sizes of the kernels of instance affinities, and the numbers of programs that follow."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from tritonaff.kernels.shared import cdiv, steps_in_32_bits


class Blocks(NamedTuple):
    """Block sizes, for GPUs by default."""

    voxels: int = 512
    """In gradient_kernel, four for each thread of 4 warps."""
    tables_voxels: int = 512
    """In tables_kernel, likewise."""
    max_steps: int = 16
    """A program of tables_kernel goes through so many blocks of voxels ..."""
    min_programs: int = 1024
    """... if there still are so many programs: enough for any GPU."""


def options(
    ids: Tensor,
    offsets: list[int],
    background: int | None,
    ignore_index: int | None,
    invert: bool,
    misses: bool,
    focal: bool,
) -> dict[str, Any]:
    """Constants of both kernels."""
    return {
        "OFFSETS": steps_in_32_bits(offsets),
        "HAS_BACKGROUND": background is not None,
        "HAS_IGNORED": ignore_index is not None,
        "INVERT": invert,
        "MISSES": misses,
        "FOCAL": focal,
        "WIDE": ids.element_size() == 8,
    }


def tables_steps(logits: Tensor, blocks: Blocks) -> int:
    """Blocks of voxels of a tables_kernel program: its counts fit 16 bits."""
    image_blocks = cdiv(num_fours(logits), blocks.tables_voxels // 4)
    fit = 0xFFFF // blocks.tables_voxels
    enough = len(logits) * image_blocks // blocks.min_programs
    return max(1, min(blocks.max_steps, fit, image_blocks, enough))


def num_fours(logits: Tensor) -> int:
    """Fours of voxels in an image."""
    *_, depth, height, width = logits.shape
    return int(depth * height * cdiv(width, 4))


def grid(logits: Tensor, voxels_per_program: int) -> tuple[int]:
    """Images are part of the one axis that is not limited to 65535."""
    return (cdiv(num_fours(logits), voxels_per_program // 4) * len(logits),)
