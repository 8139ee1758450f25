"""Block sizes of the kernels of the box-supervised pairwise loss."""

from __future__ import annotations

from typing import NamedTuple


class Blocks(NamedTuple):
    """Block sizes, for GPUs by default."""

    pixels: int = 512
    """In both kernels, four for each thread of 4 warps."""
