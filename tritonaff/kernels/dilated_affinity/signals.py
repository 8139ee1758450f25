"""Signals of pixels: neighbours with a different and with the same label.

Pixels go in pairs of a row, BLOCK_PAIRS of them in a block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tritonaff.kernels.shared import is_inside, rows_and_columns


@triton.jit
def pairs(first, W, BLOCK_PAIRS: tl.constexpr):
    """Rows, and numbers in the row, of consecutive pairs of pixels: [1, BLOCK_PAIRS, 1] each."""
    h, pair = rows_and_columns(first, tl.cdiv(W, 2), BLOCK_PAIRS)
    return h.to(tl.int32)[None, :, None], pair[None, :, None]


@triton.jit
def pairs_after(h, pair, W, BLOCK_PAIRS: tl.constexpr):
    """Rows and numbers of the pairs BLOCK_PAIRS further on, [1, BLOCK_PAIRS, 1] each: without a
    division for every pair.
    """
    W_PAIRS = tl.cdiv(W, 2)
    pair += BLOCK_PAIRS % W_PAIRS
    is_next = pair >= W_PAIRS
    h += BLOCK_PAIRS // W_PAIRS + is_next.to(tl.int32)
    return h, tl.where(is_next, pair - W_PAIRS, pair)


@triton.jit
def pointers(ptr, h, pair, stride_h, stride_w):
    """Pointers [1, BLOCK_PAIRS, 2] to pixels: the second is a constant step from the first."""
    ptrs = ptr + (h.to(tl.int64) * stride_h + (2 * pair).to(tl.int64) * stride_w)
    return ptrs + tl.arange(0, 2).to(tl.int64)[None, None, :] * stride_w


@triton.jit
def offset_of(rate, s: tl.constexpr, OFFSETS: tl.constexpr):
    """Rows and columns to neighbour s."""
    dy, dx = OFFSETS[2 * s], OFFSETS[2 * s + 1]
    for r in tl.static_range(1, len(OFFSETS) // 16):
        dy = tl.where(rate == r, OFFSETS[2 * (8 * r + s)], dy)
        dx = tl.where(rate == r, OFFSETS[2 * (8 * r + s) + 1], dx)
    return dy, dx


@triton.jit
def neighbor(ptrs, h, w, H, W, stride_h, stride_w, dy, dx):
    """True where the neighbour is in the image, and its label: [1, BLOCK_PAIRS, 2] each."""
    there = is_inside(h + dy, w + dx, H, W)
    step = dy * tl.cast(stride_h, tl.int64) + dx * tl.cast(stride_w, tl.int64)
    return there, tl.load(ptrs + step, mask=there).to(tl.int64)


@triton.jit
def signals(
    ptrs, h, w, H, W, stride_h, stride_w, ignore_index,
    rate, OFFSETS: tl.constexpr,
):  # fmt: skip
    """Bit masks of different and of same signals, [1, BLOCK_PAIRS, 2] each: 8 bits, the first
    signal's on top.
    """
    inside = is_inside(h, w, H, W)
    # Loaded again for every rate: kept over all of them it takes registers that spill.
    # [1, BLOCK_PAIRS, 2]
    label = tl.load(ptrs, mask=inside).to(tl.int64)
    different = tl.zeros(label.shape, tl.int32)
    valid = tl.zeros(label.shape, tl.int32)
    for s in tl.static_range(8):
        # [1, BLOCK_PAIRS, 2] each
        there, label_j = neighbor(
            ptrs, h, w, H, W, stride_h, stride_w,
            *offset_of(rate, s, OFFSETS),
        )  # fmt: skip
        different |= tl.where(label_j != label, 1 << (7 - s), 0)
        counted = there & (label_j >= 0) & (label_j != ignore_index)
        valid |= tl.where(counted, 1 << (7 - s), 0)
    valid = tl.where(inside & (label >= 0) & (label != ignore_index), valid, 0)
    return different & valid, valid & ~different


@triton.jit
def bits_of_bytes(x):
    """The number of bits set in each of the four bytes. Bits that a shift brings in are masked."""
    x -= (x >> 1) & 0x55555555
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    return (x + (x >> 4)) & 0x0F0F0F0F
