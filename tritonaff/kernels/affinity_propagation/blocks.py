from __future__ import annotations

from typing import Any

from torch import Tensor

from tritonaff.kernels.shared import INTERPRETED, cdiv, next_power_of_2, steps_in_32_bits

# Pixels of a step: two for each thread of 4 warps.
BLOCK_P = 256
# Classes whose sums the registers hold; where there are more, so many at a time.
MAX_CLASSES, CLASSES_OF_MANY = 24, 12
# Elements of the other tiles: 8 for each thread.
BLOCK = 1024
# The interpreter takes its time per program, whatever the size.
INTERPRETED_BLOCK = 1 << 15


def steps(rates: list[int], width: int) -> dict[str, Any]:
    """And whether two pixels that begin at an even one have a neighbour both or neither."""
    in_pairs = width % 2 == 0 and all(step % 2 == 0 for step in rates[1::2])
    return {"RATES": steps_in_32_bits(rates), "IN_PAIRS": in_pairs}


def tile(probs: Tensor) -> dict[str, int]:
    """Not more pixels than an image has: see pixels_to_load."""
    _, classes, height, width = probs.shape
    block_p = INTERPRETED_BLOCK // 8 if INTERPRETED else BLOCK_P
    blocks = 1 if classes <= MAX_CLASSES else cdiv(classes, CLASSES_OF_MANY)
    return {
        "C": classes,
        "BLOCK_C": cdiv(classes, blocks),
        "BLOCK_P": min(block_p, 1 << (height * width).bit_length() - 1),
    }


def all_classes(probs: Tensor) -> dict[str, int]:
    """A tile (BLOCK_C, BLOCK_P) of all classes."""
    classes = next_power_of_2(probs.shape[1])
    block = INTERPRETED_BLOCK if INTERPRETED else BLOCK
    return {"BLOCK_C": classes, "BLOCK_P": max(4, block // classes)}


def grid(probs: Tensor, blocks: dict[str, int]) -> tuple[int]:
    n, _, height, width = probs.shape
    return (cdiv(height * width, blocks["BLOCK_P"]) * n,)


def gates_tile() -> dict[str, int]:
    return {"BLOCK_P": (INTERPRETED_BLOCK if INTERPRETED else BLOCK) // 8}


def gates_grid(affinity: Tensor) -> tuple[int]:
    n, _, height, width = affinity.shape
    return (cdiv(height * width, gates_tile()["BLOCK_P"]) * n,)
