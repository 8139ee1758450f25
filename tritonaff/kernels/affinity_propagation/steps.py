from __future__ import annotations

import triton
import triton.language as tl

from tritonaff.kernels.affinity_propagation.classes import (
    add_product,
    load_classes,
    neighbor,
    normalize,
    pixels_to_load,
    store_classes,
)


@triton.jit
def y_of_classes(
    p_ptr, gates_ptrs, own_weight, place, H, W, HW, neighbors,
    RATES: tl.constexpr, IN_PAIRS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """y of some classes, and their sum."""
    p = load_classes(p_ptr + place[0], HW, CLASSES)
    y = ()
    for c in tl.static_range(CLASSES):
        y += (own_weight * p[c],)
    # Their number is no constant: the compiler would unroll the loop, and registers spill.
    for s in range(neighbors):
        _, index = neighbor(s, 1, *place, H, W, RATES, IN_PAIRS)
        gate = tl.load(gates_ptrs)  # 0 where there is no neighbour
        gates_ptrs += HW
        y = add_product(y, gate, load_classes(p_ptr + index, HW, CLASSES), CLASSES)
    total = y[0]
    for c in tl.static_range(1, CLASSES):
        total += y[c]
    return y, total


@triton.jit
def largest_of_classes(largest, ptrs, HW, CLASSES: tl.constexpr):
    values = load_classes(ptrs, HW, CLASSES)
    for c in tl.static_range(CLASSES):
        largest = tl.maximum(largest, values[c])
    return largest


@triton.jit
def step_kernel(
    p_ptr, gates_ptr, out_ptr, total_ptr,
    H, W, HW, neighbors, self_weight,
    RATES: tl.constexpr, IN_PAIRS: tl.constexpr,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    n, pixel, h, w, in_image = pixels_to_load(HW, W, BLOCK_P)
    place = (pixel, h, w, in_image)
    HW = tl.cast(HW, tl.int64)
    # Before the last one, which stays in registers until the total is known. These wait in `out`.
    BLOCKS: tl.constexpr = (C - 1) // BLOCK_C
    LAST: tl.constexpr = C - BLOCKS * BLOCK_C
    gates_ptrs = gates_ptr + n * (4 * len(RATES)) * HW + pixel
    p_ptr += n * C * HW
    out_ptrs = out_ptr + n * C * HW + pixel

    largest = tl.full((BLOCK_P,), -float("inf"), tl.float32)
    p_ptrs = p_ptr + pixel
    for _ in range(BLOCKS):
        largest = largest_of_classes(largest, p_ptrs, HW, BLOCK_C)
        p_ptrs += BLOCK_C * HW
    own_weight = self_weight * largest_of_classes(largest, p_ptrs, HW, LAST)

    total = tl.zeros((BLOCK_P,), tl.float32)
    y_ptrs = out_ptrs
    for _ in range(BLOCKS):
        y, part = y_of_classes(
            p_ptr, gates_ptrs, own_weight, place, H, W, HW, neighbors, RATES, IN_PAIRS, BLOCK_C
        )  # fmt: skip
        store_classes(y_ptrs, y, 0.0, 1.0, HW, in_image, BLOCK_C)
        total += part
        p_ptr += BLOCK_C * HW
        y_ptrs += BLOCK_C * HW
        tl.debug_barrier()  # nothing says that a thread loads what it stored itself
    y, part = y_of_classes(
        p_ptr, gates_ptrs, own_weight, place, H, W, HW, neighbors, RATES, IN_PAIRS, LAST
    )  # fmt: skip
    total += part
    total = tl.where(total == 0, float("inf"), total)
    tl.store(total_ptr + n * HW + pixel, total, mask=in_image)
    normalize(out_ptrs, y, 0.0, total, HW, in_image, BLOCKS, BLOCK_C, LAST)
