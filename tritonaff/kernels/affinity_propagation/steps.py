"""One iteration: p -> the next p."""

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
    RATES: tl.constexpr, IN_PAIRS: tl.constexpr, REPLICATE: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """y of some classes, CLASSES x [BLOCK_P], and their sum [BLOCK_P]."""
    # CLASSES x [BLOCK_P]
    p = load_classes(p_ptr + place.pixel, HW, CLASSES)
    y = ()
    for c in tl.static_range(CLASSES):
        # [BLOCK_P]
        y += (own_weight * p[c],)
    # The number of neighbours is no constant: the compiler would unroll the loop, and registers
    # spill.
    for s in range(neighbors):
        _, index = neighbor(s, 1, place, H, W, RATES, IN_PAIRS, REPLICATE)
        # [BLOCK_P]
        gate = tl.load(gates_ptrs)  # 0 where there is no neighbour
        gates_ptrs += HW
        y = add_product(y, gate, load_classes(p_ptr + index, HW, CLASSES), CLASSES)
    # [BLOCK_P]
    total = y[0]
    for c in tl.static_range(1, CLASSES):
        total += y[c]
    return y, total


@triton.jit
def largest_of_classes(largest, ptrs, HW, CLASSES: tl.constexpr):
    """The larger of ``largest`` and some classes, [BLOCK_P]."""
    # CLASSES x [BLOCK_P]
    values = load_classes(ptrs, HW, CLASSES)
    for c in tl.static_range(CLASSES):
        largest = tl.maximum(largest, values[c])
    return largest


@triton.jit
def step_kernel(
    p_ptr, gates_ptr, out_ptr, total_ptr,
    H, W, HW, neighbors, self_weight,
    RATES: tl.constexpr, IN_PAIRS: tl.constexpr, REPLICATE: tl.constexpr, NORMALIZE: tl.constexpr,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    n, place = pixels_to_load(HW, W, BLOCK_P)
    HW = tl.cast(HW, tl.int64)
    # Blocks of classes before the last one wait in `out` until the total is known. The last one
    # stays in registers.
    BLOCKS: tl.constexpr = (C - 1) // BLOCK_C
    LAST: tl.constexpr = C - BLOCKS * BLOCK_C
    gates_ptrs = gates_ptr + n * (4 * len(RATES)) * HW + place.pixel
    p_ptr += n * C * HW
    out_ptrs = out_ptr + n * C * HW + place.pixel

    # [BLOCK_P]
    largest = tl.full((BLOCK_P,), -float("inf"), tl.float32)
    p_ptrs = p_ptr + place.pixel
    for _ in range(BLOCKS):
        largest = largest_of_classes(largest, p_ptrs, HW, BLOCK_C)
        p_ptrs += BLOCK_C * HW
    # [BLOCK_P]
    own_weight = self_weight * largest_of_classes(largest, p_ptrs, HW, LAST)

    # [BLOCK_P]
    total = tl.zeros((BLOCK_P,), tl.float32)
    y_ptrs = out_ptrs
    for _ in range(BLOCKS):
        # BLOCK_C x [BLOCK_P], [BLOCK_P]
        y, block_total = y_of_classes(
            p_ptr, gates_ptrs, own_weight, place, H, W, HW, neighbors,
            RATES, IN_PAIRS, REPLICATE, BLOCK_C,
        )  # fmt: skip
        store_classes(y_ptrs, y, 0.0, 1.0, HW, place.in_image, BLOCK_C)
        total += block_total
        p_ptr += BLOCK_C * HW
        y_ptrs += BLOCK_C * HW
        tl.debug_barrier()  # nothing says that a thread loads its own stores
    # LAST x [BLOCK_P], [BLOCK_P]
    y, block_total = y_of_classes(
        p_ptr, gates_ptrs, own_weight, place, H, W, HW, neighbors,
        RATES, IN_PAIRS, REPLICATE, LAST,
    )  # fmt: skip
    total += block_total
    if NORMALIZE:
        total = tl.where(total == 0, float("inf"), total)
    else:
        total = tl.full((BLOCK_P,), 1.0, tl.float32)
    tl.store(total_ptr + n * HW + place.pixel, total, mask=place.in_image)
    normalize(out_ptrs, y, 0.0, total, HW, place.in_image, BLOCKS, BLOCK_C, LAST)
