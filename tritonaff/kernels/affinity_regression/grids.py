"""Sample points: the pixels of grids of k x k points, spread over the image."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def grid_steps(h, H, size):
    """The first of the steps i = 0, 1, ... of a grid whose rows i H // size are h, and their
    number.
    """
    first = tl.cdiv(h * size, H)
    return first, tl.cdiv((h + 1) * size, H) - first


@triton.jit
def times_sampled(h, w, H, W, GRIDS: tl.constexpr):
    """The number of sample points that are this pixel."""
    times = tl.zeros_like(h)
    for k in tl.static_range(len(GRIDS)):
        _first_i, rows = grid_steps(h, H, GRIDS[k])
        _first_j, columns = grid_steps(w, W, GRIDS[k])
        times += rows * columns
    return times


@triton.jit
def grid_point(index, L, H, W, GRIDS: tl.constexpr):
    """Row, column, the number of sample points that are this pixel, and True for the first of
    them; each of the shape of ``index``.

    Without grids the points are the pixels. From L on the row is -1: outside.
    """
    h = index // W
    w = index % W
    times = tl.full(index.shape, 1, tl.int32)
    first = index < L
    if len(GRIDS) > 0:
        start = 0
        for k in tl.static_range(len(GRIDS)):
            inside = (index >= start) & (index < start + GRIDS[k] * GRIDS[k])
            i = (index - start) // GRIDS[k]
            j = (index - start) % GRIDS[k]
            h = tl.where(inside, i * H // GRIDS[k], h)
            w = tl.where(inside, j * W // GRIDS[k], w)
            start += GRIDS[k] * GRIDS[k]
        times = tl.zeros_like(h)
        start = 0
        for k in tl.static_range(len(GRIDS)):
            inside = (index >= start) & (index < start + GRIDS[k] * GRIDS[k])
            i = (index - start) // GRIDS[k]
            j = (index - start) % GRIDS[k]
            first_i, rows = grid_steps(h, H, GRIDS[k])
            first_j, columns = grid_steps(w, W, GRIDS[k])
            first = first & (~inside | ((times == 0) & (i == first_i) & (j == first_j)))
            times += rows * columns
            start += GRIDS[k] * GRIDS[k]
    return tl.where(index < L, h, -1), w, times, first
