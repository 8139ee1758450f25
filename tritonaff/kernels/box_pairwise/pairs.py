"""Pairs of pixels: boxes, the two logits of a pair, and the pairs that count."""

from __future__ import annotations

import triton
import triton.language as tl

from tritonaff.kernels.shared import is_inside, step_in


@triton.jit
def load_box(boxes_ptr, m):
    """First row, first column, and the row and column after the last ones."""
    ptr = boxes_ptr + 4 * m
    return tl.load(ptr), tl.load(ptr + 1), tl.load(ptr + 2), tl.load(ptr + 3)


@triton.jit
def is_in_box(h, w, top, left, bottom, right):
    return (h >= top) & (h < bottom) & (w >= left) & (w < right)


@triton.jit
def offsets(h, w, stride_h, stride_w):
    return h.to(tl.int64) * stride_h + w.to(tl.int64) * stride_w


@triton.jit
def neighbor(h, w, k, H, W, DILATION):
    """Rows and columns of neighbour k [BLOCK_P], and True where it is in the image."""
    dy, dx = step_in(k)
    there_h, there_w = h + dy * DILATION, w + dx * DILATION
    return there_h, there_w, is_inside(there_h, there_w, H, W)


@triton.jit
def has_bit(bits, k):
    return ((bits.to(tl.int32) >> k) & 1) == 1
