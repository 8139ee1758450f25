from __future__ import annotations

from typing import Any

from torch import Tensor

from tritonaff.kernels.shared import INTERPRETED, cdiv, steps_in_32_bits

# Four pixels for each thread of 4 warps: the loads of all labels of a rate are in flight together.
BLOCK_P = 512
# Tables are kept for every pixel of a block until its program ends: two pixels for each thread, and
# 2 warps, for the fewer threads, the fewer such tables to add up.
TABLES_BLOCK_P, TABLES_WARPS = 128, 2
# The interpreter takes its time per program, whatever the size.
INTERPRETED_BLOCK_P = 1 << 12
# A program adds up so many blocks, if there are that many programs then: enough for any GPU.
MAX_STEPS, MIN_PROGRAMS = 16, 1024
# The tables hold of every category the losses of different and of same signals, and four counts:
# pixels, same signals, correct different ones, correct same ones. These four are bytes of one
# number, added up over a program's steps, then pairs of 16 bits, added up over its pixels: see
# steps().
LOSSES, COUNTS = 2, 4


def blocks(offsets: list[int]) -> dict[str, Any]:
    return {
        "OFFSETS": steps_in_32_bits(offsets),
        "BLOCK_P": INTERPRETED_BLOCK_P if INTERPRETED else BLOCK_P,
    }


def tables_blocks(offsets: list[int]) -> dict[str, Any]:
    return {
        **blocks(offsets),
        "BLOCK_P": INTERPRETED_BLOCK_P if INTERPRETED else TABLES_BLOCK_P,
        "num_warps": TABLES_WARPS,
    }


def steps(logits: Tensor, block_p: int) -> int:
    """Blocks of a program that makes tables: what it counts fits 8 bits, and 16 for all pixels."""
    n = len(logits)
    of_image = cdiv(num_pairs(logits), block_p // 2)
    fit = min(0xFF, 0xFFFF // block_p) // 8
    return max(1, min(MAX_STEPS, fit, of_image, n * of_image // MIN_PROGRAMS))


def num_pairs(logits: Tensor) -> int:
    """Pairs of pixels in an image."""
    *_, height, width = logits.shape
    return int(height * cdiv(width, 2))


def pixel_grid(logits: Tensor, pixels_per_program: int) -> tuple[int]:
    """Images are part of the one axis that is not limited to 65535."""
    return (cdiv(num_pairs(logits), pixels_per_program // 2) * len(logits),)
