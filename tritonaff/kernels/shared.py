"""What the tiles of several operations share."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Chosen when Triton decorates the tiles. The interpreter takes its time per program and operation,
# whatever the size: its blocks are larger than a GPU's.
INTERPRETED: bool = triton.knobs.runtime.interpret
# A step in pixels that is outside any image, from wherever, and does not overflow 32 bits.
FAR = 1 << 30


def cdiv(a: int, b: int) -> int:
    """Triton's own take ten times as long, and a launch needs several."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def steps_in_32_bits(steps: Sequence[int]) -> tuple[int, ...]:
    return tuple(max(-FAR, min(FAR, step)) for step in steps)


@triton.jit
def is_inside(h, w, H, W):
    """Negative rows and columns are large ones without a sign."""
    return (h.to(tl.uint32) < tl.cast(H, tl.uint32)) & (w.to(tl.uint32) < tl.cast(W, tl.uint32))


@triton.jit
def step_in(direction):
    """Rows and columns to the neighbour in one of 8 directions; the fifth of 3 x 3 is the pixel."""
    place = direction + (direction > 3)
    return place // 3 - 1, place % 3 - 1


@triton.jit
def load_label(target_ptr, h, w, H, W, C, stride_h, stride_w, ignore_index):
    """The labels (1, pixels), -1 at pixels that do not count or are outside."""
    inside = (h >= 0) & (h < H) & (w >= 0) & (w < W)
    offs = h.to(tl.int64) * stride_h + w.to(tl.int64) * stride_w
    label = tl.load(target_ptr + offs, mask=inside, other=0).to(tl.int64)
    known = (label >= 0) & (label < C)
    tl.device_assert(known | (label == ignore_index), "target holds a label that is no class")
    return tl.where(inside & known & (label != ignore_index), label, -1).to(tl.int32)


@triton.jit
def rows_and_columns(first, W, BLOCK_P: tl.constexpr):
    """Rows and columns (BLOCK_P,) of consecutive pixels, the first of them given as int64."""
    # The 64-bit division is that of one number; those of the pixels fit 32 bits.
    w = (first % W).to(tl.int32) + tl.arange(0, BLOCK_P)
    return first // W + w // W, w % W


@triton.jit
def first_pixel(HW, pixels_per_program, others=0):
    """Image, and index of the first of this program's consecutive pixels, as int64. The first
    programs do something else.
    """
    programs = tl.cdiv(HW, pixels_per_program)
    program = tl.program_id(0) - others
    n = (program // programs).to(tl.int64)
    return n, (program % programs).to(tl.int64) * pixels_per_program


@triton.jit
def pixels(HW, W, BLOCK_P: tl.constexpr):
    """Image, and index, row and column (pixels,), of this program's consecutive pixels."""
    n, first = first_pixel(HW, BLOCK_P)
    h, w = rows_and_columns(first, W, BLOCK_P)
    return n, first + tl.arange(0, BLOCK_P), h, w


def pixel_step(logits: Tensor) -> int | None:
    """The distance of consecutive pixels in memory, None where it is not one."""
    _, _, height, width = logits.shape
    if width == 1:
        return 1 if height == 1 else logits.stride(2)
    step = logits.stride(3)
    return step if height == 1 or logits.stride(2) == width * step else None


def evenly_spaced(logits: Tensor) -> Tensor:
    """Logits whose pixels have one distance from each other: others are copied."""
    return logits.contiguous() if pixel_step(logits) is None else logits


def even_strides(logits: Tensor) -> tuple[int, int, int]:
    """Of evenly spaced logits: from image to image, class to class and pixel to pixel."""
    step = pixel_step(logits)
    assert step is not None
    return logits.stride(0), logits.stride(1), step


def launch(kernel: Any, programs: tuple[int, ...], *args: Any, **options: Any) -> None:
    """On the device of the first tensor, not on the current one. Products are fused with sums,
    which Triton leaves out from version 3.10 on unless it is told.
    """
    device = next(arg for arg in args if isinstance(arg, Tensor)).device
    there: AbstractContextManager[object] = nullcontext()
    if device.type != "cpu":
        module = torch.get_device_module(device)
        if module.current_device() != device.index:
            there = module.device(device)
    with there:
        kernel[programs](*args, enable_fp_fusion=True, **options)
