"""Triton tiles of dilated affinity.

A program owns consecutive pixels of one image and goes through the rates. Each pass
reads the logits once, and a label once for every neighbour that asks for it, from the cache.

    tables_kernel    logits, target             -> tables of every program, to be added up
    gradient_kernel  d loss / d sums, the same  -> d loss / d logits

The labels of a pixel's neighbours become two bit masks, of its different and of its same signals,
for the logits that follow: predicates of them all are more than a thread can hold.

Pixels go in pairs of a row, of which the last may lack its second pixel: what belongs to the row
is computed once for both, and two logits are one load. Everything of a pixel stays in the registers
of one thread; only the tables are reduced across the program, once for all its steps, and they are
partial sums, not atomics: the same input gives the same bits. Half precision is read as it is and
computed in float32. Image sizes and strides are runtime arguments: what compiles anew are the
offsets, block sizes, and Triton's own distinction of arguments that are 1 or divisible by 16.

Masked loads leave what is outside undefined, and no signal there is valid.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonaff.kernels.shared import (
    INTERPRETED,
    cdiv,
    first_pixel,
    is_inside,
    launch,
    rows_and_columns,
    steps_in_32_bits,
)

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
LOG2_E = tl.constexpr(1.4426950408889634)
SMALLEST = tl.constexpr(2.0**-149)  # float32 above 0


@triton.jit
def pairs(first, W, BLOCK_PAIRS: tl.constexpr):
    """Rows, and numbers in the row, (1, BLOCK_PAIRS, 1) of consecutive pairs of pixels."""
    h, pair = rows_and_columns(first, tl.cdiv(W, 2), BLOCK_PAIRS)
    return h.to(tl.int32)[None, :, None], pair[None, :, None]


@triton.jit
def pairs_after(h, pair, W, BLOCK_PAIRS: tl.constexpr):
    """The pairs that so many others lie between, without another division for each of them."""
    W_PAIRS = tl.cdiv(W, 2)
    pair += BLOCK_PAIRS % W_PAIRS
    is_next = pair >= W_PAIRS
    h += BLOCK_PAIRS // W_PAIRS + is_next.to(tl.int32)
    return h, tl.where(is_next, pair - W_PAIRS, pair)


@triton.jit
def pointers(ptr, h, pair, stride_h, stride_w):
    """Of the pixels (1, pairs, 2): the second one's is a constant step from the first one's."""
    ptrs = ptr + (h.to(tl.int64) * stride_h + (2 * pair).to(tl.int64) * stride_w)
    return ptrs + tl.arange(0, 2).to(tl.int64)[None, None, :] * stride_w


@triton.jit
def signals(
    ptrs, h, w, H, W, stride_h, stride_w, ignore_index,
    rate, OFFSETS: tl.constexpr,
):  # fmt: skip
    """Bit masks of different and of same signals, 8 bits with the first one's on top."""
    inside = is_inside(h, w, H, W)
    # Loaded again for every rate: kept over all of them it takes registers that spill.
    label = tl.load(ptrs, mask=inside).to(tl.int64)
    different = tl.zeros(label.shape, tl.int32)
    valid = tl.zeros(label.shape, tl.int32)
    for s in tl.static_range(8):
        there, label_j = neighbor(
            ptrs, h, w, H, W, stride_h, stride_w,
            *offset_of(rate, s, OFFSETS),
        )  # fmt: skip
        different |= tl.where(label_j != label, 1 << (7 - s), 0)
        valid |= tl.where(there & (label_j != ignore_index), 1 << (7 - s), 0)
    valid = tl.where(inside & (label != ignore_index), valid, 0)
    return different & valid, valid & ~different


@triton.jit
def offset_of(rate, s: tl.constexpr, OFFSETS: tl.constexpr):
    """Rows and columns to a neighbour."""
    dy, dx = OFFSETS[2 * s], OFFSETS[2 * s + 1]
    for r in tl.static_range(1, len(OFFSETS) // 16):
        dy = tl.where(rate == r, OFFSETS[2 * (8 * r + s)], dy)
        dx = tl.where(rate == r, OFFSETS[2 * (8 * r + s) + 1], dx)
    return dy, dx


@triton.jit
def neighbor(ptrs, h, w, H, W, stride_h, stride_w, dy, dx):
    """Which pixels have this neighbour, and its label."""
    there = is_inside(h + dy, w + dx, H, W)
    step = dy * tl.cast(stride_h, tl.int64) + dx * tl.cast(stride_w, tl.int64)
    return there, tl.load(ptrs + step, mask=there).to(tl.int64)


@triton.jit
def bits_of_bytes(x):
    """How many bits are set in each of the four bytes. What a shift brings in is masked."""
    x -= (x >> 1) & 0x55555555
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    return (x + (x >> 4)) & 0x0F0F0F0F


@triton.jit
def log1p_of_fraction(e):
    """log(1 + e) for 0 <= e <= 1: e times a polynomial, off by 1.6e-7 of itself at most."""
    p = 0.005364821292459965
    p = p * e - 0.030065780505537987
    p = p * e + 0.07920452207326889
    p = p * e - 0.13753801584243774
    p = p * e + 0.191536545753479
    p = p * e - 0.24857163429260254
    p = p * e + 0.3332132399082184
    p = p * e - 0.49999648332595825
    return (p * e + 1.0) * e


@triton.jit
def minus_logs(u, e):
    """-log(pt) and -log(1 - pt), pt = sigmoid(u), with e = exp(-|u|)."""
    log = log1p_of_fraction(e)
    return tl.maximum(-u, 0.0) + log, tl.maximum(u, 0.0) + log


@triton.jit
def store_table(ptr, of_k, of_last):
    k = tl.arange(0, 8)
    tl.store(ptr + k, of_k)
    tl.store(ptr + 8, of_last)


@triton.jit
def sum_of_pixels(table):
    return tl.sum(tl.sum(table, axis=2), axis=1)


@triton.jit
def tables_kernel(
    logits_ptr, target_ptr, losses_ptr, counts_ptr,
    H, W, PAIRS, STEPS, stride_n, stride_c, stride_h, stride_w,
    target_stride_n, target_stride_h, target_stride_w, gamma, ignore_index,
    OFFSETS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    BLOCK_PAIRS: tl.constexpr = BLOCK_P // 2
    n, first = first_pixel(PAIRS, BLOCK_PAIRS * STEPS)
    first_h, first_pair = pairs(first, W, BLOCK_PAIRS)
    logits_ptr += n * stride_n
    target_ptr += n * target_stride_n
    NUM_RATES: tl.constexpr = len(OFFSETS) // 16
    # One place for both tables: two pointers spill registers on sm_80.
    place = tl.program_id(0).to(tl.int64) * (NUM_RATES * 9)
    # One body for all rates: four take five times as long to compile.
    for rate in range(NUM_RATES):
        # The last category, without different signals, is on its own: the others are a power of 2.
        different_k = tl.zeros((8, BLOCK_PAIRS, 2), tl.float32)
        same_k = tl.zeros((8, BLOCK_PAIRS, 2), tl.float32)
        counts_k = tl.zeros((8, BLOCK_PAIRS, 2), tl.int32)
        same_last = tl.zeros((1, BLOCK_PAIRS, 2), tl.float32)
        counts_last = tl.zeros((1, BLOCK_PAIRS, 2), tl.int32)
        h, pair = first_h, first_pair
        for _ in range(STEPS):
            w = 2 * pair + tl.arange(0, 2)[None, None, :]
            inside = is_inside(h, w, H, W)
            different, same = signals(
                pointers(target_ptr, h, pair, target_stride_h, target_stride_w),
                h, w, H, W, target_stride_h, target_stride_w, ignore_index,
                rate, OFFSETS,
            )  # fmt: skip
            x_ptrs = pointers(logits_ptr, h, pair, stride_h, stride_w)
            loss_different = tl.zeros((1, BLOCK_PAIRS, 2), tl.float32)
            loss_same = tl.zeros((1, BLOCK_PAIRS, 2), tl.float32)
            not_positive = tl.zeros((1, BLOCK_PAIRS, 2), tl.uint32)
            for s in tl.static_range(8):
                is_different = (different & (1 << (7 - s))) != 0
                is_same = (same & (1 << (7 - s))) != 0
                x = tl.load(x_ptrs, mask=inside).to(tl.float32)
                x_ptrs += stride_c
                # e^x is a power of 2. Its sign is the prediction, negative where x is 0, too; of a
                # NaN it may be any: the loss shows that one.
                x_2 = x * LOG2_E - SMALLEST
                not_positive = (not_positive << 1) | (x_2.to(tl.uint32, bitcast=True) >> 31)
                u = tl.where(is_different, -x, x)
                of_pt, of_not_pt = minus_logs(u, tl.exp2(-tl.abs(x_2)))
                focal = tl.exp2(of_not_pt * (gamma * -LOG2_E)) * of_pt
                # A choice of sums is one instruction, a sum of choices is two.
                loss_different = tl.where(is_different, loss_different + focal, loss_different)
                loss_same = tl.where(is_same, loss_same + focal, loss_same)
            signal = different | (same << 8)
            correct = signal & (not_positive.to(tl.int32) * 0x101 ^ 0xFF00)
            counts = bits_of_bytes(signal | (correct << 16))
            num_different = counts & 0xFF
            counts = (counts & ~0xFF) + tl.where(signal != 0, 1, 0)
            is_category = 8 - tl.arange(0, 8)[:, None, None] == num_different
            different_k = tl.where(is_category, different_k + loss_different, different_k)
            same_k = tl.where(is_category, same_k + loss_same, same_k)
            counts_k += tl.where(is_category, counts, 0)
            is_last = num_different == 0
            same_last = tl.where(is_last, same_last + loss_same, same_last)
            counts_last += tl.where(is_last, counts, 0)
            h, pair = pairs_after(h, pair, W, BLOCK_PAIRS)
        logits_ptr += 8 * tl.cast(stride_c, tl.int64)
        store_table(losses_ptr + 2 * place, sum_of_pixels(different_k), 0.0)
        store_table(
            losses_ptr + 2 * place + 9,
            sum_of_pixels(same_k), tl.sum(sum_of_pixels(same_last), axis=0),
        )  # fmt: skip
        for byte in tl.static_range(2):
            of_k = sum_of_pixels((counts_k >> 8 * byte) & 0xFF00FF)
            of_last = tl.sum(sum_of_pixels((counts_last >> 8 * byte) & 0xFF00FF), axis=0)
            for half in tl.static_range(2):
                store_table(
                    counts_ptr + 4 * place + (byte + 2 * half) * 9,
                    (of_k >> 16 * half) & 0xFFFF, (of_last >> 16 * half) & 0xFFFF,
                )  # fmt: skip
        place += 9


@triton.jit
def gradient_kernel(
    coefficients_ptr, logits_ptr, target_ptr, grad_ptr,
    H, W, PAIRS, stride_n, stride_c, stride_h, stride_w,
    grad_stride_n, grad_stride_c, grad_stride_h, grad_stride_w,
    target_stride_n, target_stride_h, target_stride_w, gamma, ignore_index,
    OFFSETS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    n, first = first_pixel(PAIRS, BLOCK_P // 2)
    h, pair = pairs(first, W, BLOCK_P // 2)
    w = 2 * pair + tl.arange(0, 2)[None, None, :]
    inside = is_inside(h, w, H, W)
    x_ptrs = pointers(logits_ptr + n * stride_n, h, pair, stride_h, stride_w)
    grad_ptrs = pointers(grad_ptr + n * grad_stride_n, h, pair, grad_stride_h, grad_stride_w)
    label_ptrs = pointers(
        target_ptr + n * target_stride_n, h, pair, target_stride_h, target_stride_w
    )
    for rate in tl.static_range(len(OFFSETS) // 16):
        different, same = signals(
            label_ptrs, h, w, H, W, target_stride_h, target_stride_w, ignore_index,
            rate, OFFSETS,
        )  # fmt: skip
        of_category = coefficients_ptr + 2 * (8 - bits_of_bytes(different))
        of_different, of_same = tl.load(of_category), tl.load(of_category + 1)
        coefficients_ptr += 2 * 9
        for s in range(8):
            is_different = (different & (1 << (7 - s))) != 0
            is_same = (same & (1 << (7 - s))) != 0
            x = tl.load(x_ptrs, mask=inside).to(tl.float32)
            u = tl.where(is_different, -x, x)
            of_pt, of_not_pt = minus_logs(u, tl.exp2(-tl.abs(x * LOG2_E)))
            slope = gamma * tl.exp2(of_pt * -LOG2_E) * of_pt + tl.exp2(of_not_pt * -LOG2_E)
            slope *= tl.exp2(of_not_pt * (gamma * -LOG2_E))
            slope *= tl.where(is_different, of_different, -of_same)
            slope = tl.where(is_different | is_same, slope, 0.0)
            tl.store(grad_ptrs, slope.to(grad_ptr.dtype.element_ty), mask=inside)
            x_ptrs += stride_c
            grad_ptrs += grad_stride_c


def forward(
    logits: Tensor,
    target: Tensor,
    offsets: list[int],
    gamma: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss sums, signal counts and correct counts (R, 9, 2), pixel counts (R, 9)."""
    n, _, height, width = logits.shape
    block = tables_blocks(offsets)
    num_steps = steps(logits, block["BLOCK_P"])
    grid = pixel_grid(logits, num_steps * block["BLOCK_P"])
    shape = grid[0], len(offsets) // 16
    losses = logits.new_empty(*shape, LOSSES, 9, dtype=torch.float32)
    counts = logits.new_empty(*shape, COUNTS, 9, dtype=torch.int32)
    if n > 0:
        launch(tables_kernel, grid,
            logits, target, losses, counts,
            height, width, num_pairs(logits), num_steps, *logits.stride(), *target.stride(),
            gamma, ignore_index, **block,
        )  # fmt: skip
    loss_sum = losses.sum(dim=0).mT.contiguous()
    pixel_count, same, correct_different, correct_same = counts.sum(dim=0).unbind(dim=1)
    different = pixel_count * torch.arange(8, -1, -1, device=logits.device)
    signal_count = torch.stack((different, same), dim=-1)
    correct_count = torch.stack((correct_different, correct_same), dim=-1)
    return loss_sum, signal_count, correct_count, pixel_count.clone()


def backward(
    grad_loss_sum: Tensor,
    logits: Tensor,
    target: Tensor,
    offsets: list[int],
    gamma: float,
    ignore_index: int,
) -> Tensor:
    """The gradient with respect to the logits, given that with respect to the loss sums."""
    n, _, height, width = logits.shape
    grad = torch.empty_like(logits)
    block = blocks(offsets)
    if n > 0:
        launch(gradient_kernel, pixel_grid(logits, block["BLOCK_P"]),
            grad_loss_sum, logits, target, grad,
            height, width, num_pairs(logits),
            *logits.stride(), *grad.stride(), *target.stride(),
            gamma, ignore_index, **block,
        )  # fmt: skip
    return grad


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
