"""Helpers that the kernels of several operations share, and how kernels are launched."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# A step in pixels that leads outside any image, from any pixel, and does not overflow 32 bits.
FAR = 1 << 30


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. Triton's own takes ten times as long, and a launch needs several."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least n."""
    return 1 << (n - 1).bit_length()


def steps_in_32_bits(steps: Sequence[int]) -> tuple[int, ...]:
    """Steps in pixels, cut down to FAR."""
    return tuple(max(-FAR, min(FAR, step)) for step in steps)


@triton.jit
def is_inside(h, w, H, W):
    """True where row h and column w are in the image. Negative ones are large without a sign."""
    return (h.to(tl.uint32) < tl.cast(H, tl.uint32)) & (w.to(tl.uint32) < tl.cast(W, tl.uint32))


@triton.jit
def step_in(direction):
    """Rows and columns to the neighbour in one of 8 directions: 3 x 3 without the centre."""
    place = direction + (direction > 3)
    return place // 3 - 1, place % 3 - 1


@triton.jit
def load_label(target_ptr, h, w, H, W, C, stride_h, stride_w, ignore_index):
    """Loads labels [1, BLOCK_P]: -1 where the pixel does not count or is outside."""
    inside = (h >= 0) & (h < H) & (w >= 0) & (w < W)
    offs = h.to(tl.int64) * stride_h + w.to(tl.int64) * stride_w
    label = tl.load(target_ptr + offs, mask=inside, other=0).to(tl.int64)
    known = (label >= 0) & (label < C)
    tl.device_assert(known | (label == ignore_index), "target holds a label that is no class")
    return tl.where(inside & known & (label != ignore_index), label, -1).to(tl.int32)


@triton.jit
def rows_and_columns(first, W, BLOCK_P: tl.constexpr):
    """Rows [BLOCK_P] and columns [BLOCK_P] of consecutive pixels, given the first one's index as
    int64.
    """
    # Only one number is divided in 64 bits; the pixels take 32.
    w = (first % W).to(tl.int32) + tl.arange(0, BLOCK_P)
    return first // W + w // W, w % W


@triton.jit
def first_pixel(HW, pixels_per_program, others=0):
    """Image, and index of the first of this program's consecutive pixels, both int64. The first
    ``others`` programs have other work.
    """
    programs = tl.cdiv(HW, pixels_per_program)
    program = tl.program_id(0) - others
    n = (program // programs).to(tl.int64)
    return n, (program % programs).to(tl.int64) * pixels_per_program


@triton.jit
def pixels(HW, W, BLOCK_P: tl.constexpr):
    """Image, and index [BLOCK_P], row [BLOCK_P] and column [BLOCK_P] of this program's consecutive
    pixels.
    """
    n, first = first_pixel(HW, BLOCK_P)
    h, w = rows_and_columns(first, W, BLOCK_P)
    return n, first + tl.arange(0, BLOCK_P), h, w


def pixel_step(logits: Tensor) -> int | None:
    """The distance of consecutive pixels in memory, None if it differs between them."""
    _, _, height, width = logits.shape
    if width == 1:
        return 1 if height == 1 else logits.stride(2)
    step = logits.stride(3)
    return step if height == 1 or logits.stride(2) == width * step else None


def evenly_spaced(logits: Tensor) -> Tensor:
    """The logits; a copy if their pixels have no common distance from each other."""
    return logits.contiguous() if pixel_step(logits) is None else logits


def even_strides(logits: Tensor) -> tuple[int, int, int]:
    """Strides of evenly spaced logits: of images, of classes, of pixels."""
    step = pixel_step(logits)
    assert step is not None
    return logits.stride(0), logits.stride(1), step


def launch(kernel: Any, programs: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launches a kernel on the device of the first tensor, not on the current one.

    Products are fused with sums: from version 3.10 on Triton has to be told.
    """
    device = next(arg for arg in args if isinstance(arg, Tensor)).device
    there: AbstractContextManager[object] = nullcontext()
    if device.type != "cpu":
        module = torch.get_device_module(device)
        if module.current_device() != device.index:
            there = module.device(device)
    with there:
        kernel[programs](*args, enable_fp_fusion=True, **options)
