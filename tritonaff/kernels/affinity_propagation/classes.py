"""Some classes of this program's pixels: a tuple of blocks [BLOCK_P], one for each class."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from tritonaff.kernels.shared import is_inside, pixels, step_in


class Place(NamedTuple):
    """A program's pixels, [BLOCK_P] each."""

    pixel: Any
    """Index in the image; outside, the index of some pixel that is in it."""
    h: Any
    w: Any
    in_image: Any


@triton.jit
def pixels_to_load(HW, W, BLOCK_P: tl.constexpr):
    """Image and Place of this program's pixels. Pixels outside have no neighbours."""
    n, pixel, h, w = pixels(HW, W, BLOCK_P)
    in_image = pixel < HW
    return n, Place(tl.where(in_image, pixel, tl.arange(0, BLOCK_P)), h, w, in_image)


@triton.jit
def neighbor(
    s, SIGN: tl.constexpr, place, H, W,
    RATES: tl.constexpr, IN_PAIRS: tl.constexpr, REPLICATE: tl.constexpr = False,
):  # fmt: skip
    """True where pixels have neighbour s (or are that neighbour of another, if the sign is -1), and
    the index of the other pixel; their own index where there is none. [BLOCK_P] each. With
    REPLICATE, the border pixels go on outside.
    """
    r1, r2 = RATES[0], RATES[1]
    for k in tl.static_range(1, len(RATES) // 2):
        r1 = tl.where(s < 8 * k, r1, RATES[2 * k])
        r2 = tl.where(s < 8 * k, r2, RATES[2 * k + 1])
    dy, dx = step_in(s % 8)
    dy, dx = dy * (SIGN * r1), dx * (SIGN * r2)
    if REPLICATE:
        there = place.in_image
        row = tl.minimum(tl.maximum(place.h + dy, 0), H - 1)
        column = tl.minimum(tl.maximum(place.w + dx, 0), W - 1)
        index = tl.where(there, row.to(tl.int64) * W + column, place.pixel)
    else:
        there = place.in_image & is_inside(place.h + dy, place.w + dx, H, W)
        index = tl.where(there, place.pixel + (dy * tl.cast(W, tl.int64) + dx), place.pixel)
    if IN_PAIRS:  # one load for two: newer versions of Triton see it themselves
        index = tl.max_contiguous(index, 2)
    return there, index


@triton.jit
def load_classes(ptrs, HW, CLASSES: tl.constexpr):
    """Loads CLASSES x [BLOCK_P]."""
    values = ()
    for c in tl.static_range(CLASSES):
        # [BLOCK_P]
        values += (tl.load(ptrs + c * HW).to(tl.float32),)
    return values


@triton.jit
def store_classes(ptrs, values, mean, total, HW, mask, CLASSES: tl.constexpr):
    """Stores (value - mean) / total, CLASSES x [BLOCK_P]."""
    for c in tl.static_range(CLASSES):
        tl.store(ptrs + c * HW, (values[c] - mean) / total, mask=mask)


@triton.jit
def add_product(sums, factor, values, CLASSES: tl.constexpr):
    """sums + factor * values, CLASSES x [BLOCK_P]."""
    result = ()
    for c in tl.static_range(CLASSES):
        result += (sums[c] + factor * values[c],)
    return result


@triton.jit
def scalar_product(a, b, CLASSES: tl.constexpr):
    """The sum of a * b over the classes, [BLOCK_P]."""
    result = a[0] * b[0]
    for c in tl.static_range(1, CLASSES):
        result += a[c] * b[c]
    return result


@triton.jit
def normalize(
    ptrs, last, mean, total, HW, mask,
    BLOCKS: tl.constexpr, BLOCK_C: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Stores (value - mean) / total: BLOCKS blocks of classes in place, and the last block, whose
    LAST values are in registers.
    """
    for _ in range(BLOCKS):
        store_classes(ptrs, load_classes(ptrs, HW, BLOCK_C), mean, total, HW, mask, BLOCK_C)
        ptrs += BLOCK_C * HW
    store_classes(ptrs, last, mean, total, HW, mask, LAST)
