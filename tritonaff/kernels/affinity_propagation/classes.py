from __future__ import annotations

import triton
import triton.language as tl

from tritonaff.kernels.shared import is_inside, pixels, step_in


@triton.jit
def pixels_to_load(HW, W, BLOCK_P: tl.constexpr):
    """Image, and index, row and column (pixels,) of this program's pixels, and which of them are in
    the image. Others have the index of a pixel that is, and no neighbours.
    """
    n, pixel, h, w = pixels(HW, W, BLOCK_P)
    in_image = pixel < HW
    return n, tl.where(in_image, pixel, tl.arange(0, BLOCK_P)), h, w, in_image


@triton.jit
def neighbor(
    s, SIGN: tl.constexpr, pixel, h, w, in_image, H, W, RATES: tl.constexpr, IN_PAIRS: tl.constexpr
):  # fmt: skip
    """Which pixels have neighbour s (or are it, if the sign is -1), and the index of that pixel; or
    their own index, where there is none.
    """
    r1, r2 = RATES[0], RATES[1]
    for k in tl.static_range(1, len(RATES) // 2):
        r1 = tl.where(s < 8 * k, r1, RATES[2 * k])
        r2 = tl.where(s < 8 * k, r2, RATES[2 * k + 1])
    dy, dx = step_in(s % 8)
    dy, dx = dy * (SIGN * r1), dx * (SIGN * r2)
    there = in_image & is_inside(h + dy, w + dx, H, W)
    index = tl.where(there, pixel + (dy * tl.cast(W, tl.int64) + dx), pixel)
    if IN_PAIRS:  # one load for two: newer versions of Triton see it themselves
        index = tl.max_contiguous(index, 2)
    return there, index


@triton.jit
def load_classes(ptrs, HW, CLASSES: tl.constexpr):
    """One (pixels,) of each of some classes."""
    values = ()
    for c in tl.static_range(CLASSES):
        values += (tl.load(ptrs + c * HW).to(tl.float32),)
    return values


@triton.jit
def store_classes(ptrs, values, mean, total, HW, mask, CLASSES: tl.constexpr):
    """(value - mean) / total of each of some classes."""
    for c in tl.static_range(CLASSES):
        tl.store(ptrs + c * HW, (values[c] - mean) / total, mask=mask)


@triton.jit
def add_product(sums, factor, values, CLASSES: tl.constexpr):
    result = ()
    for c in tl.static_range(CLASSES):
        result += (sums[c] + factor * values[c],)
    return result


@triton.jit
def scalar_product(a, b, CLASSES: tl.constexpr):
    result = a[0] * b[0]
    for c in tl.static_range(1, CLASSES):
        result += a[c] * b[c]
    return result


@triton.jit
def normalize(
    ptrs, last, mean, total, HW, mask,
    BLOCKS: tl.constexpr, BLOCK_C: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """(value - mean) / total: of blocks of classes in place, and of the last block."""
    for _ in range(BLOCKS):
        store_classes(ptrs, load_classes(ptrs, HW, BLOCK_C), mean, total, HW, mask, BLOCK_C)
        ptrs += BLOCK_C * HW
    store_classes(ptrs, last, mean, total, HW, mask, LAST)
