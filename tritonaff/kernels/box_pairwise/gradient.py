"""d loss / d mask logits from the gradient of the sums.

With p the sigmoid, the derivative of -log P with respect to x_i is p(x_i) - p(x_i + x_j).
"""

from __future__ import annotations

import triton
import triton.language as tl

from tritonaff.kernels.box_pairwise.pairs import has_bit, is_in_box, load_box, neighbor, offsets
from tritonaff.kernels.dilated_affinity.focal import LOG2_E
from tritonaff.kernels.instance_affinity.pairs import miss_of
from tritonaff.kernels.shared import first_pixel, is_inside, rows_and_columns


@triton.jit
def miss_at(u):
    """1 - sigmoid(u) with all its digits."""
    miss, _ = miss_of(u, tl.exp2(-tl.abs(u) * LOG2_E))
    return miss


@triton.jit
def gradient_kernel(
    coefficients_ptr, logits_ptr, bits_ptr, boxes_ptr, index_ptr, grad_ptr,
    H, W, HW, stride_m, stride_h, stride_w, grad_stride_m, grad_stride_h, grad_stride_w,
    bits_stride_n, bits_stride_h, bits_stride_w, DILATION,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    m, first = first_pixel(HW, BLOCK_P)
    h, w = rows_and_columns(first, W, BLOCK_P)
    top, left, bottom, right = load_box(boxes_ptr, m)
    inside = is_inside(h, w, H, W)
    # [BLOCK_P]
    grad = tl.zeros((BLOCK_P,), tl.float32)
    first_row, last_row = first // W, (first + BLOCK_P - 1) // W
    if (last_row >= top - DILATION) & (first_row < bottom + DILATION):
        logits_ptr += m * stride_m
        bits_ptr += tl.load(index_ptr + m) * bits_stride_n
        own = is_in_box(h, w, top, left, bottom, right) & inside
        near = is_in_box(
            h, w, top - DILATION, left - DILATION, bottom + DILATION, right + DILATION
        ) & inside  # fmt: skip
        # [BLOCK_P]
        x = tl.load(logits_ptr + offsets(h, w, stride_h, stride_w), mask=near, other=0.0)
        x = x.to(tl.float32)
        sign = tl.where(x < 0, -1.0, 1.0)
        miss = miss_at(tl.abs(x))
        bits = tl.load(bits_ptr + offsets(h, w, bits_stride_h, bits_stride_w), mask=own, other=0)
        for k in range(8):
            there_h, there_w, there = neighbor(h, w, k, H, W, DILATION)
            its_own = near & there & is_in_box(there_h, there_w, top, left, bottom, right)
            # [BLOCK_P]
            its_bits = tl.load(
                bits_ptr + offsets(there_h, there_w, bits_stride_h, bits_stride_w),
                mask=its_own, other=0,
            )  # fmt: skip
            # The opposite direction of k is 7 - k.
            weight = (has_bit(bits, k) & there).to(tl.float32) + has_bit(its_bits, 7 - k).to(
                tl.float32
            )
            # [BLOCK_P]
            y = tl.load(
                logits_ptr + offsets(there_h, there_w, stride_h, stride_w),
                mask=weight > 0, other=0.0,
            ).to(tl.float32)  # fmt: skip
            # The smaller one of p and 1 - p at x keeps the digits of the difference.
            slope = weight * (miss_at(sign * (x + y)) - miss)
            grad = tl.where(weight > 0, grad + slope, grad)
        grad *= sign * tl.load(coefficients_ptr + m)
    grad_ptr += m * grad_stride_m
    tl.store(
        grad_ptr + offsets(h, w, grad_stride_h, grad_stride_w),
        grad.to(grad_ptr.dtype.element_ty), mask=inside,
    )  # fmt: skip
