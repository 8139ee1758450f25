"""d loss / d logits from the gradient of the sums. BLOCK_FOURS is BLOCK_V / 4.

With u the logit of pt and m = 1 - pt, the derivatives of the four terms with respect to u are -m,
-pt m, -2 pt m^2 and -m^gamma (gamma pt (-log pt) + m).
"""

from __future__ import annotations

import triton
import triton.language as tl

from tritonaff.kernels.dilated_affinity.focal import LOG2_E, minus_logs
from tritonaff.kernels.instance_affinity.pairs import (
    fours,
    is_inside,
    load_ids,
    logit_of_target,
    miss_of,
    pairs,
    pointers,
)
from tritonaff.kernels.shared import first_pixel


@triton.jit
def coefficient(ptr, same, TERM: tl.constexpr):
    """The coefficient of one term for every pair, [BLOCK_FOURS, 4], from a table [2, 4]."""
    return tl.where(same, tl.load(ptr + 4 + TERM), tl.load(ptr + TERM))


@triton.jit
def gradient_kernel(
    coefficients_ptr, logits_ptr, ids_ptr, grad_ptr,
    D, H, W, FOURS, stride_n, stride_k, stride_d, stride_h, stride_w,
    grad_stride_n, grad_stride_k, grad_stride_d, grad_stride_h, grad_stride_w,
    ids_stride_n, ids_stride_d, ids_stride_h, ids_stride_w, background, ignored, gamma,
    OFFSETS: tl.constexpr, HAS_BACKGROUND: tl.constexpr, HAS_IGNORED: tl.constexpr,
    INVERT: tl.constexpr, MISSES: tl.constexpr, FOCAL: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    BLOCK_FOURS: tl.constexpr = BLOCK_V // 4
    NUM_CHANNELS: tl.constexpr = len(OFFSETS) // 3
    n, first = first_pixel(FOURS, BLOCK_FOURS)
    z, h, four = fours(first, H, W, BLOCK_FOURS)
    w = 4 * four + tl.arange(0, 4)[None, :]
    # [BLOCK_FOURS, 4]
    inside = is_inside(z, h, w, D, H, W)
    x_ptrs = pointers(logits_ptr + n * stride_n, z, h, four, stride_d, stride_h, stride_w)
    grad_ptrs = pointers(
        grad_ptr + n * grad_stride_n, z, h, four, grad_stride_d, grad_stride_h, grad_stride_w
    )
    id_ptrs = pointers(
        ids_ptr + n * ids_stride_n, z, h, four, ids_stride_d, ids_stride_h, ids_stride_w
    )
    # [BLOCK_FOURS, 4]
    ids = load_ids(id_ptrs, inside, WIDE)
    coefficients_ptr += n * (NUM_CHANNELS * 8)
    for k in range(NUM_CHANNELS):
        same, counts = pairs(
            ids, id_ptrs, z, h, w, D, H, W,
            ids_stride_d, ids_stride_h, ids_stride_w, background, ignored, k,
            OFFSETS, HAS_BACKGROUND, HAS_IGNORED, WIDE,
        )  # fmt: skip
        # [BLOCK_FOURS, 4]
        x = tl.load(x_ptrs, mask=inside).to(tl.float32)
        u = logit_of_target(x, same, counts, INVERT)
        e = tl.exp2(-tl.abs(u * LOG2_E))
        miss, pt = miss_of(u, e)
        slope = coefficient(coefficients_ptr, same, 0) * miss
        if MISSES:
            of_square = 2.0 * coefficient(coefficients_ptr, same, 2)
            slope += (coefficient(coefficients_ptr, same, 1) + of_square * miss) * pt * miss
        if FOCAL:
            loss, minus_log_miss = minus_logs(u, e)
            power = tl.exp2(minus_log_miss * (gamma * -LOG2_E))
            of_focal = coefficient(coefficients_ptr, same, 3)
            slope += of_focal * power * (gamma * pt * loss + miss)
        slope = tl.where(same, slope, -slope) if INVERT else tl.where(same, -slope, slope)
        slope = tl.where(counts, slope, 0.0)
        tl.store(grad_ptrs, slope.to(grad_ptr.dtype.element_ty), mask=inside)
        x_ptrs += stride_k
        grad_ptrs += grad_stride_k
        coefficients_ptr += 8
