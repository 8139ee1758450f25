"""The gradient, iteration by iteration."""

from __future__ import annotations

import triton
import triton.language as tl

from tritonaff.kernels.affinity_propagation.classes import (
    add_product,
    load_classes,
    neighbor,
    normalize,
    pixels_to_load,
    scalar_product,
    store_classes,
)
from tritonaff.kernels.affinity_propagation.gates import load, offsets, store
from tritonaff.kernels.shared import pixels


@triton.jit
def normalize_backward_kernel(
    grad_ptr, p_ptr, total_ptr, out_ptr,
    C, W, HW, stride_n, stride_c, stride_h, stride_w,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The gradient comes with its strides: it may be one number for all pixels."""
    # [BLOCK_C, 1]
    c = tl.arange(0, BLOCK_C)[:, None]
    n, pixel, h, w = pixels(HW, W, BLOCK_P)
    # [1, BLOCK_P] each
    in_image = (pixel < HW)[None, :]
    pixel, h, w = pixel[None, :], h[None, :], w[None, :]
    mask = (c < C) & in_image
    grad_ptr += n * stride_n
    offs = (n * C + c) * HW + pixel
    # [BLOCK_C, BLOCK_P]
    grad_p = load(grad_ptr + offsets(c, h, w, stride_c, stride_h, stride_w), mask)
    # [1, BLOCK_P]
    mean = tl.sum(grad_p * load(p_ptr + offs, mask), axis=0)[None, :]
    # [1, BLOCK_P]
    total = tl.load(total_ptr + n * HW + pixel, mask=in_image, other=1.0)
    store(out_ptr + offs, (grad_p - mean) / total, mask)


@triton.jit
def through_largest(
    largest, first, grad_largest, p_ptrs, grad_y_ptrs, HW, FIRST, CLASSES: tl.constexpr
):  # fmt: skip
    """The largest p, its class, and the gradient of the factor that it is, [BLOCK_P] each: with the
    classes from FIRST on.
    """
    # CLASSES x [BLOCK_P]
    p = load_classes(p_ptrs, HW, CLASSES)
    # CLASSES x [BLOCK_P]
    grad_y = load_classes(grad_y_ptrs, HW, CLASSES)
    for c in tl.static_range(CLASSES):
        first = tl.where(p[c] > largest, FIRST + c, first)
        largest = tl.maximum(largest, p[c])
    return largest, first, grad_largest + scalar_product(grad_y, p, CLASSES)


@triton.jit
def grad_of_classes(
    grad_y_ptr, p_ptr, gates_ptr, grad_gates_ptrs, own_weight, first, grad_largest,
    place, H, W, HW, neighbors,
    RATES: tl.constexpr, IN_PAIRS: tl.constexpr,
    NEEDS_P: tl.constexpr, NEEDS_GATES: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """The gradient of p of some classes, CLASSES x [BLOCK_P], and its product with p [BLOCK_P].
    Adds to the gradient of the gates.
    """
    # CLASSES x [BLOCK_P]
    grad_y = load_classes(grad_y_ptr + place.pixel, HW, CLASSES)
    if NEEDS_GATES:  # of this pixel, for its neighbours
        for s in range(neighbors):
            there, index = neighbor(s, 1, place, H, W, RATES, IN_PAIRS)
            # [BLOCK_P]
            before = tl.load(grad_gates_ptrs, mask=there)
            grad_gate = scalar_product(grad_y, load_classes(p_ptr + index, HW, CLASSES), CLASSES)
            tl.store(grad_gates_ptrs, before + grad_gate, mask=there)
            grad_gates_ptrs += HW
    grad_p = ()
    for c in tl.static_range(CLASSES):
        # [BLOCK_P]
        grad_p += (own_weight * grad_y[c] + tl.where(first == c, grad_largest, 0.0),)
    if NEEDS_P:  # from the pixels whose neighbour this one is
        for s in range(neighbors):
            there, index = neighbor(s, -1, place, H, W, RATES, IN_PAIRS)
            # [BLOCK_P]
            gate = tl.load(gates_ptr + index, mask=there, other=0.0)
            gates_ptr += HW
            # CLASSES x [BLOCK_P]
            values = load_classes(grad_y_ptr + index, HW, CLASSES)
            grad_p = add_product(grad_p, gate, values, CLASSES)
    # CLASSES x [BLOCK_P]
    p = load_classes(p_ptr + place.pixel, HW, CLASSES)
    return grad_p, scalar_product(grad_p, p, CLASSES)


@triton.jit
def step_backward_kernel(
    grad_y_ptr, p_ptr, gates_ptr, before_ptr, grad_gates_ptr, out_ptr,
    H, W, HW, neighbors, self_weight,
    RATES: tl.constexpr, IN_PAIRS: tl.constexpr,
    IS_FIRST: tl.constexpr, NEEDS_P: tl.constexpr, NEEDS_GATES: tl.constexpr,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    n, place = pixels_to_load(HW, W, BLOCK_P)
    HW = tl.cast(HW, tl.int64)
    BLOCKS: tl.constexpr = (C - 1) // BLOCK_C
    LAST: tl.constexpr = C - BLOCKS * BLOCK_C
    gates_ptr += n * (4 * len(RATES)) * HW
    grad_gates_ptrs = grad_gates_ptr + n * (4 * len(RATES)) * HW + place.pixel
    p_ptr += n * C * HW
    grad_y_ptr += n * C * HW
    out_ptrs = out_ptr + n * C * HW + place.pixel

    # [BLOCK_P]
    largest = tl.full((BLOCK_P,), -float("inf"), tl.float32)
    # [BLOCK_P]
    first = tl.zeros((BLOCK_P,), tl.int32)
    # [BLOCK_P]
    grad_largest = tl.zeros((BLOCK_P,), tl.float32)
    p_ptrs, grad_y_ptrs = p_ptr + place.pixel, grad_y_ptr + place.pixel
    for block in range(BLOCKS):
        largest, first, grad_largest = through_largest(
            largest, first, grad_largest, p_ptrs, grad_y_ptrs, HW, block * BLOCK_C, BLOCK_C
        )  # fmt: skip
        p_ptrs += BLOCK_C * HW
        grad_y_ptrs += BLOCK_C * HW
    largest, first, grad_largest = through_largest(
        largest, first, grad_largest, p_ptrs, grad_y_ptrs, HW, BLOCKS * BLOCK_C, LAST
    )  # fmt: skip
    own_weight = self_weight * largest
    grad_largest *= self_weight

    # [BLOCK_P]
    mean = tl.zeros((BLOCK_P,), tl.float32)
    grad_p_ptrs = out_ptrs
    for _ in range(BLOCKS):
        # BLOCK_C x [BLOCK_P], [BLOCK_P]
        grad_p, block_mean = grad_of_classes(
            grad_y_ptr, p_ptr, gates_ptr, grad_gates_ptrs, own_weight, first, grad_largest,
            place, H, W, HW, neighbors, RATES, IN_PAIRS, NEEDS_P, NEEDS_GATES, BLOCK_C,
        )  # fmt: skip
        if NEEDS_P:
            store_classes(grad_p_ptrs, grad_p, 0.0, 1.0, HW, place.in_image, BLOCK_C)
        mean += block_mean
        first -= BLOCK_C
        grad_y_ptr += BLOCK_C * HW
        p_ptr += BLOCK_C * HW
        grad_p_ptrs += BLOCK_C * HW
        tl.debug_barrier()  # nothing says that a thread loads its own stores
    # LAST x [BLOCK_P], [BLOCK_P]
    grad_p, block_mean = grad_of_classes(
        grad_y_ptr, p_ptr, gates_ptr, grad_gates_ptrs, own_weight, first, grad_largest,
        place, H, W, HW, neighbors, RATES, IN_PAIRS, NEEDS_P, NEEDS_GATES, LAST,
    )  # fmt: skip
    if NEEDS_P:
        if IS_FIRST:
            store_classes(grad_p_ptrs, grad_p, 0.0, 1.0, HW, place.in_image, LAST)
        else:
            # [BLOCK_P]
            total = tl.load(before_ptr + n * HW + place.pixel)
            normalize(
                out_ptrs, grad_p, mean + block_mean, total, HW, place.in_image,
                BLOCKS, BLOCK_C, LAST,
            )  # fmt: skip
