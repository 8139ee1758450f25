"""Rows of an image in the registers of a warp: each of its lanes holds four neighbouring columns.

A row of numbers is a tuple of four blocks [BLOCK_C, LANES], column i of every lane in block i. A
row of counts is one block [1, LANES] of 32 bits, a byte for each of the four columns.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def split(x):
    """From [BLOCK_C, LANES, 4] to 4 x [BLOCK_C, LANES]."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1], 2, 2)))
    x_0, x_2 = tl.split(even)
    x_1, x_3 = tl.split(odd)
    return x_0, x_1, x_2, x_3


@triton.jit
def join(columns):
    """From 4 x [BLOCK_C, LANES] to [BLOCK_C, LANES, 4]."""
    x = tl.join(tl.join(columns[0], columns[2]), tl.join(columns[1], columns[3]))
    return tl.reshape(x, (x.shape[0], x.shape[1], 4))


@triton.jit
def box_sum(columns, d: tl.constexpr):
    """A row plus the columns d to the left and d to the right, 4 x [BLOCK_C, LANES]. The first lane
    is to the right of the last.
    """
    lanes: tl.constexpr = columns[0].shape[1]
    # [BLOCK_C, LANES]
    lane = tl.broadcast_to(tl.arange(0, lanes)[None, :], columns[0].shape)
    sums = ()
    for column in tl.static_range(4):
        left = columns[(column - d) % 4]
        if column < d:
            left = tl.gather(left, (lane + lanes - 1) % lanes, 1)
        right = columns[(column + d) % 4]
        if column + d > 3:
            right = tl.gather(right, (lane + 1) % lanes, 1)
        sums += (columns[column] + left + right,)
    return sums


@triton.jit
def box_count(x, d: tl.constexpr):
    """The same sum of a row of counts, [1, LANES]."""
    lanes: tl.constexpr = x.shape[1]
    # [1, LANES]
    lane = tl.arange(0, lanes)[None, :]
    left = tl.gather(x, (lane + lanes - 1) % lanes, 1)
    right = tl.gather(x, (lane + 1) % lanes, 1)
    if d < 4:
        left = (x << 8 * d) | (left >> (32 - 8 * d))
        right = (x >> 8 * d) | (right << (32 - 8 * d))
    return x + left + right


@triton.jit
def byte(x, i: tl.constexpr):
    """Column i of a row of counts as float32."""
    return (x >> 8 * i & 255).to(tl.int32).to(tl.float32)


@triton.jit
def four_columns(offs, ALIGNED: tl.constexpr):
    """Offsets [BLOCK_C, LANES, 4] of all columns from the first columns' [BLOCK_C, LANES]."""
    offs = offs[:, :, None]
    if ALIGNED:
        offs = tl.multiple_of(offs, (1, 1, 4))
    return offs + tl.arange(0, 4)[None, None, :]


@triton.jit
def load_columns(ptr, offs, inside, w, W, other, ALIGNED: tl.constexpr):
    """Loads a row, 4 x [BLOCK_C, LANES]: columns w to w + 3, the first at ``offs``."""
    if ALIGNED:  # one load: either all four columns are inside or none
        mask = (inside & (w >= 0) & (w < W))[:, :, None]
        # [BLOCK_C, LANES, 4]
        columns = split(tl.load(ptr + four_columns(offs, ALIGNED), mask=mask, other=other))
    else:
        columns = ()
        for i in tl.static_range(4):
            mask = inside & (w + i >= 0) & (w + i < W)
            # [BLOCK_C, LANES]
            columns += (tl.load(ptr + offs + i, mask=mask, other=other),)
    return columns


@triton.jit
def column_sum(rows, d: tl.constexpr, WIDTH: tl.constexpr):
    """The middle row plus the rows at distance d. WIDTH elements of the tuple are a row."""
    middle: tl.constexpr = len(rows) // WIDTH // 2
    sums = ()
    for i in tl.static_range(WIDTH):
        above, below = rows[(middle - d) * WIDTH + i], rows[(middle + d) * WIDTH + i]
        sums += (above + rows[middle * WIDTH + i] + below,)
    return sums


@triton.jit
def add(xs, ys):
    """The sum of two tuples of blocks."""
    sums = ()
    for i in tl.static_range(len(xs)):
        sums += (xs[i] + ys[i],)
    return sums
