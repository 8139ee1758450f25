from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tritonaff.kernels.affinity_field.dense import HALO
from tritonaff.kernels.shared import INTERPRETED, cdiv, next_power_of_2, steps_in_32_bits

# 32 lanes for each: more in a thread take more registers than they save work.
CLASSES_IN_A_WARP = {"cuda": 1, "hip": 2}
# Programs that march: a few for every processor of a large GPU.
STRIP_PROGRAMS = 4096
# Partial tables of edges wait beside the gradient: one for every patch would be 11 % of bfloat16
# logits.
PATCHES_IN_A_PROGRAM = 2
# Every program of the counts adds to the same few numbers, and those wait for each other. Counts of
# the patches that one program goes through fit 32 bits.
COUNT_PROGRAMS, MAX_PATCHES = 2048, 1 << 16
BLOCK_SUM = 512
BLOCK_SCALE = 4096
# The interpreter takes its time per program and per operation, whatever the size.
INTERPRETED_CLASSES = 64
INTERPRETED_ROWS = 64
INTERPRETED_PATCH = {"BLOCK_H": 32, "BLOCK_W": 64}
INTERPRETED_PIXELS = 2048


def passes(kernel_sizes: list[int]) -> list[dict[str, Any]]:
    """One over the sizes that a march keeps in registers, one over those too large for it. COLUMNS
    are theirs in the tables, and last how many columns these have; REACH is 0 for too large.
    """
    radii = steps_in_32_bits([(size - 1) // 2 for size in kernel_sizes])
    found: list[dict[str, Any]] = []
    for near in (True, False):
        columns = tuple(k for k, d in enumerate(radii) if (d <= HALO.value) == near)
        if columns:
            found.append(
                {
                    "RADII": tuple(radii[k] for k in columns),
                    "COLUMNS": (*columns, len(radii)),
                    "REACH": max(radii[k] for k in columns) if near else 0,
                }
            )
    return found


def strip_blocks(logits: Tensor) -> dict[str, int]:
    classes = next_power_of_2(logits.shape[1])
    steps = logits.shape[3], *logits.stride()[:2]
    # If so, four columns take one load.
    aligned = all(step % 4 == 0 for step in steps) and logits.data_ptr() % 16 == 0
    if INTERPRETED:
        classes = min(INTERPRETED_CLASSES, classes)
        return {"BLOCK_C": classes, "LANES": 32, "UNROLL": 1, "ALIGNED": aligned}
    in_a_warp = CLASSES_IN_A_WARP["hip" if torch.version.hip else "cuda"]
    tile = {"BLOCK_C": min(in_a_warp, classes), "LANES": 32, "UNROLL": 2, "num_warps": 1}
    return {**tile, "ALIGNED": aligned}


def rows(logits: Tensor) -> int:
    """Of a band: many, for few are shared with its neighbours then, but as few as give every
    processor several programs.
    """
    _, num_classes, height, _ = logits.shape
    programs = strips_of(logits, height) * num_classes  # were a band an image
    most = max(8, min(64, cdiv(height * programs, STRIP_PROGRAMS)))
    if INTERPRETED:
        most = INTERPRETED_ROWS
    return cdiv(height, cdiv(height, most))


def strips_of(logits: Tensor, rows: int) -> int:
    n, _, height, width = logits.shape
    columns = n * cdiv(height, rows) * (HALO.value + cdiv(width, 4) * 4)
    return cdiv(columns - HALO.value, 4 * strip_blocks(logits)["LANES"] - 2 * HALO.value)


def class_blocks(logits: Tensor) -> int:
    return cdiv(logits.shape[1], strip_blocks(logits)["BLOCK_C"])


def strip_programs(logits: Tensor) -> int:
    """Without those of other classes."""
    return strips_of(logits, rows(logits))


def strip_grid(logits: Tensor) -> tuple[int]:
    return (strip_programs(logits) * class_blocks(logits),)


def patch_blocks(logits: Tensor) -> dict[str, int]:
    """A patch, and the parts of it that are worked on in turn: a pixel for every thread."""
    if INTERPRETED:
        return {**INTERPRETED_PATCH, "PART_H": 16, "PART_W": 64}
    if logits.shape[1] > 256:  # a lane holds its part of the tables
        return {"BLOCK_H": 8, "BLOCK_W": 16, "PART_H": 8, "PART_W": 16, "num_warps": 4}
    return {"BLOCK_H": 8, "BLOCK_W": 16, "PART_H": 4, "PART_W": 8, "num_warps": 1}


def undivided(patch: dict[str, int]) -> dict[str, int]:
    return {name: size for name, size in patch.items() if not name.startswith("PART")}


def patches_of(logits: Tensor) -> int:
    n, _, height, width = logits.shape
    blocks = patch_blocks(logits)
    return n * cdiv(height, blocks["BLOCK_H"]) * cdiv(width, blocks["BLOCK_W"])


def count_programs(patches: int) -> int:
    return max(min(patches, COUNT_PROGRAMS), cdiv(patches, MAX_PATCHES))


def pixel_blocks(logits: Tensor) -> dict[str, int]:
    classes = next_power_of_2(logits.shape[1])
    if INTERPRETED:
        return {"BLOCK_C": min(INTERPRETED_CLASSES, classes), "BLOCK_P": INTERPRETED_PIXELS}
    return {"BLOCK_C": min(4, classes), "BLOCK_P": 128, "num_warps": 1}


def pixel_grid(logits: Tensor) -> tuple[int]:
    n, _, height, width = logits.shape
    return (n * cdiv(height * width, pixel_blocks(logits)["BLOCK_P"]),)
