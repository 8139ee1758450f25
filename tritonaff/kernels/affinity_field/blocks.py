"""Block sizes of the affinity field's kernels, and the numbers of programs that follow from them.

- dense_kernel: a program owns a strip, BLOCK_C classes of up to ROWS rows; the LANES of its warp
  hold four columns each.
- counts_kernel and edge_kernel: a program goes through patches of BLOCK_H x BLOCK_W pixels, and
  through parts of PART_H x PART_W pixels in a patch that holds edges.
- statistics_kernel and finish_kernel: a program takes BLOCK_P pixels and BLOCK_C classes at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tritonaff.kernels.affinity_field.dense import HALO
from tritonaff.kernels.shared import cdiv, next_power_of_2

# 32 lanes for each: more classes in a thread take more registers than they save work.
CLASSES_IN_A_WARP = {"cuda": 1, "hip": 2}
# Programs that march: a few for every processor of a large GPU.
STRIP_PROGRAMS = 4096
# Counts of the patches that one program goes through fit 32 bits.
MAX_PATCHES = 1 << 16
# Elements that a program of scale_kernel multiplies.
SCALE_BLOCK = 4096


class Blocks(NamedTuple):
    """Block sizes. Blocks of classes are no larger than the logits need."""

    rows: int
    """Rows of a strip, at most."""
    strip_classes: int
    lanes: int = 32
    unroll: int = 2
    patch: tuple[int, int] = (8, 16)
    part: tuple[int, int] = (4, 8)
    """A pixel for every thread of 32."""
    patch_warps: int = 1
    patches_in_a_program: int = 2
    """Partial tables of edges wait beside the gradient: one for every patch would be 11 % of
    bfloat16 logits.
    """
    count_programs: int = 2048
    """All programs of the counts add to the same few numbers, and wait for each other."""
    pixels: int = 128
    pixel_classes: int = 4
    partial_sums: int = 512
    """Partial tables that a program adds up at a time."""


def default_blocks(logits: Tensor) -> Blocks:
    """Block sizes for GPUs.

    Strips have many rows, for neighbouring strips both read the rows between them, but as few as
    give every processor several programs.
    """
    _, num_classes, height, _ = logits.shape
    strip_classes = CLASSES_IN_A_WARP["hip" if torch.version.hip else "cuda"]
    blocks = Blocks(rows=height, strip_classes=strip_classes)
    programs = strip_programs(logits, blocks) * num_classes  # if strips were as high as images
    blocks = blocks._replace(rows=max(8, min(64, cdiv(height * programs, STRIP_PROGRAMS))))
    if num_classes > 256:  # each lane holds its share of the tables
        blocks = blocks._replace(part=blocks.patch, patch_warps=4)
    return blocks


def strip_options(logits: Tensor, blocks: Blocks) -> dict[str, int]:
    steps = logits.shape[3], *logits.stride()[:2]
    return {
        "BLOCK_C": min(blocks.strip_classes, next_power_of_2(logits.shape[1])),
        "LANES": blocks.lanes,
        "UNROLL": blocks.unroll,
        "num_warps": 1,
        # Aligned: four columns take one load.
        "ALIGNED": all(step % 4 == 0 for step in steps) and logits.data_ptr() % 16 == 0,
    }


def strip_rows(logits: Tensor, blocks: Blocks) -> int:
    """ROWS: the strips of an image are about equally high."""
    height = logits.shape[2]
    return cdiv(height, cdiv(height, blocks.rows))


def strip_programs(logits: Tensor, blocks: Blocks) -> int:
    """Programs that march through one block of classes."""
    n, _, height, width = logits.shape
    bands = cdiv(height, strip_rows(logits, blocks))
    columns = n * bands * (HALO.value + cdiv(width, 4) * 4)
    return cdiv(columns - HALO.value, 4 * blocks.lanes - 2 * HALO.value)


def strip_grid(logits: Tensor, blocks: Blocks) -> tuple[int]:
    class_blocks = cdiv(logits.shape[1], strip_options(logits, blocks)["BLOCK_C"])
    return (strip_programs(logits, blocks) * class_blocks,)


def patch_options(blocks: Blocks) -> dict[str, int]:
    block_h, block_w = blocks.patch
    return {"BLOCK_H": block_h, "BLOCK_W": block_w, "num_warps": blocks.patch_warps}


def part_options(blocks: Blocks) -> dict[str, int]:
    part_h, part_w = blocks.part
    return {**patch_options(blocks), "PART_H": part_h, "PART_W": part_w}


def num_patches(logits: Tensor, blocks: Blocks) -> int:
    n, _, height, width = logits.shape
    block_h, block_w = blocks.patch
    return n * cdiv(height, block_h) * cdiv(width, block_w)


def count_programs(patches: int, blocks: Blocks) -> int:
    return max(min(patches, blocks.count_programs), cdiv(patches, MAX_PATCHES))


def pixel_options(logits: Tensor, blocks: Blocks) -> dict[str, int]:
    classes = min(blocks.pixel_classes, next_power_of_2(logits.shape[1]))
    return {"BLOCK_C": classes, "BLOCK_P": blocks.pixels, "num_warps": 1}


def pixel_grid(logits: Tensor, blocks: Blocks) -> tuple[int]:
    n, _, height, width = logits.shape
    return (n * cdiv(height * width, blocks.pixels),)
