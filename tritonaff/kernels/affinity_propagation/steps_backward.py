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
    """The gradient comes as it is: it may be one number for all pixels."""
    c = tl.arange(0, BLOCK_C)[:, None]
    n, pixel, h, w = pixels(HW, W, BLOCK_P)
    in_image = (pixel < HW)[None, :]
    pixel, h, w = pixel[None, :], h[None, :], w[None, :]
    mask = (c < C) & in_image
    grad_ptr += n * stride_n
    offs = (n * C + c) * HW + pixel
    grad_p = load(grad_ptr + offsets(c, h, w, stride_c, stride_h, stride_w), mask)
    mean = tl.sum(grad_p * load(p_ptr + offs, mask), axis=0)[None, :]
    total = tl.load(total_ptr + n * HW + pixel, mask=in_image, other=1.0)
    store(out_ptr + offs, (grad_p - mean) / total, mask)


@triton.jit
def through_largest(
    largest, first, to_largest, p_ptrs, grad_y_ptrs, HW, FIRST, CLASSES: tl.constexpr
):  # fmt: skip
    """The largest p, its class, and the gradient that its factor gets: with some more classes."""
    p = load_classes(p_ptrs, HW, CLASSES)
    grad_y = load_classes(grad_y_ptrs, HW, CLASSES)
    for c in tl.static_range(CLASSES):
        first = tl.where(p[c] > largest, FIRST + c, first)
        largest = tl.maximum(largest, p[c])
    return largest, first, to_largest + scalar_product(grad_y, p, CLASSES)


@triton.jit
def grad_of_classes(
    grad_y_ptr, p_ptr, gates_ptr, grad_gates_ptrs, own_weight, first, to_largest,
    place, H, W, HW, neighbors,
    RATES: tl.constexpr, IN_PAIRS: tl.constexpr,
    NEEDS_P: tl.constexpr, NEEDS_GATES: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """The gradient of p of some classes, and its product with p. Adds to that of the gates."""
    grad_y = load_classes(grad_y_ptr + place[0], HW, CLASSES)
    if NEEDS_GATES:  # of this pixel, for its neighbours
        for s in range(neighbors):
            there, index = neighbor(s, 1, *place, H, W, RATES, IN_PAIRS)
            before = tl.load(grad_gates_ptrs, mask=there)
            grad_gate = scalar_product(grad_y, load_classes(p_ptr + index, HW, CLASSES), CLASSES)
            tl.store(grad_gates_ptrs, before + grad_gate, mask=there)
            grad_gates_ptrs += HW
    grad_p = ()
    for c in tl.static_range(CLASSES):
        grad_p += (own_weight * grad_y[c] + tl.where(first == c, to_largest, 0.0),)
    if NEEDS_P:  # from the pixels whose neighbour this one is
        for s in range(neighbors):
            there, index = neighbor(s, -1, *place, H, W, RATES, IN_PAIRS)
            gate = tl.load(gates_ptr + index, mask=there, other=0.0)
            gates_ptr += HW
            values = load_classes(grad_y_ptr + index, HW, CLASSES)
            grad_p = add_product(grad_p, gate, values, CLASSES)
    p = load_classes(p_ptr + place[0], HW, CLASSES)
    return grad_p, scalar_product(grad_p, p, CLASSES)


@triton.jit
def step_backward_kernel(
    grad_y_ptr, p_ptr, gates_ptr, before_ptr, grad_gates_ptr, out_ptr,
    H, W, HW, neighbors, self_weight,
    RATES: tl.constexpr, IN_PAIRS: tl.constexpr,
    IS_FIRST: tl.constexpr, NEEDS_P: tl.constexpr, NEEDS_GATES: tl.constexpr,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    n, pixel, h, w, in_image = pixels_to_load(HW, W, BLOCK_P)
    place = (pixel, h, w, in_image)
    HW = tl.cast(HW, tl.int64)
    BLOCKS: tl.constexpr = (C - 1) // BLOCK_C
    LAST: tl.constexpr = C - BLOCKS * BLOCK_C
    gates_ptr += n * (4 * len(RATES)) * HW
    grad_gates_ptrs = grad_gates_ptr + n * (4 * len(RATES)) * HW + pixel
    p_ptr += n * C * HW
    grad_y_ptr += n * C * HW
    out_ptrs = out_ptr + n * C * HW + pixel

    largest = tl.full((BLOCK_P,), -float("inf"), tl.float32)
    first = tl.zeros((BLOCK_P,), tl.int32)
    to_largest = tl.zeros((BLOCK_P,), tl.float32)
    p_ptrs, grad_y_ptrs = p_ptr + pixel, grad_y_ptr + pixel
    for block in range(BLOCKS):
        largest, first, to_largest = through_largest(
            largest, first, to_largest, p_ptrs, grad_y_ptrs, HW, block * BLOCK_C, BLOCK_C
        )  # fmt: skip
        p_ptrs += BLOCK_C * HW
        grad_y_ptrs += BLOCK_C * HW
    largest, first, to_largest = through_largest(
        largest, first, to_largest, p_ptrs, grad_y_ptrs, HW, BLOCKS * BLOCK_C, LAST
    )  # fmt: skip
    own_weight = self_weight * largest
    to_largest *= self_weight

    mean = tl.zeros((BLOCK_P,), tl.float32)
    grad_p_ptrs = out_ptrs
    for _ in range(BLOCKS):
        grad_p, part = grad_of_classes(
            grad_y_ptr, p_ptr, gates_ptr, grad_gates_ptrs, own_weight, first, to_largest,
            place, H, W, HW, neighbors, RATES, IN_PAIRS, NEEDS_P, NEEDS_GATES, BLOCK_C,
        )  # fmt: skip
        if NEEDS_P:
            store_classes(grad_p_ptrs, grad_p, 0.0, 1.0, HW, in_image, BLOCK_C)
        mean += part
        first -= BLOCK_C
        grad_y_ptr += BLOCK_C * HW
        p_ptr += BLOCK_C * HW
        grad_p_ptrs += BLOCK_C * HW
        tl.debug_barrier()  # nothing says that a thread loads what it stored itself
    grad_p, part = grad_of_classes(
        grad_y_ptr, p_ptr, gates_ptr, grad_gates_ptrs, own_weight, first, to_largest,
        place, H, W, HW, neighbors, RATES, IN_PAIRS, NEEDS_P, NEEDS_GATES, LAST,
    )  # fmt: skip
    if NEEDS_P:
        if IS_FIRST:
            store_classes(grad_p_ptrs, grad_p, 0.0, 1.0, HW, in_image, LAST)
        else:
            total = tl.load(before_ptr + n * HW + pixel)
            normalize(
                out_ptrs, grad_p, mean + part, total, HW, in_image, BLOCKS, BLOCK_C, LAST
            )  # fmt: skip
