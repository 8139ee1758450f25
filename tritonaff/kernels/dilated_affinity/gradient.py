"""d loss / d logits from the gradient of the loss sums. BLOCK_PAIRS is BLOCK_P / 2."""

from __future__ import annotations

import triton
import triton.language as tl

from tritonaff.kernels.dilated_affinity.focal import LOG2_E, minus_logs
from tritonaff.kernels.dilated_affinity.signals import bits_of_bytes, pairs, pointers, signals
from tritonaff.kernels.shared import first_pixel, is_inside


@triton.jit
def gradient_kernel(
    coefficients_ptr, logits_ptr, target_ptr, grad_ptr,
    H, W, PAIRS, stride_n, stride_c, stride_h, stride_w,
    grad_stride_n, grad_stride_c, grad_stride_h, grad_stride_w,
    target_stride_n, target_stride_h, target_stride_w, gamma, ignore_index,
    OFFSETS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    n, first = first_pixel(PAIRS, BLOCK_P // 2)
    h, pair = pairs(first, W, BLOCK_P // 2)
    w = 2 * pair + tl.arange(0, 2)[None, None, :]
    # [1, BLOCK_PAIRS, 2]
    inside = is_inside(h, w, H, W)
    x_ptrs = pointers(logits_ptr + n * stride_n, h, pair, stride_h, stride_w)
    grad_ptrs = pointers(grad_ptr + n * grad_stride_n, h, pair, grad_stride_h, grad_stride_w)
    label_ptrs = pointers(
        target_ptr + n * target_stride_n, h, pair, target_stride_h, target_stride_w
    )
    for rate in tl.static_range(len(OFFSETS) // 16):
        # [1, BLOCK_PAIRS, 2] each
        different, same = signals(
            label_ptrs, h, w, H, W, target_stride_h, target_stride_w, ignore_index,
            rate, OFFSETS,
        )  # fmt: skip
        coef_ptrs = coefficients_ptr + 2 * (8 - bits_of_bytes(different))
        # [1, BLOCK_PAIRS, 2] each
        coef_different, coef_same = tl.load(coef_ptrs), tl.load(coef_ptrs + 1)
        coefficients_ptr += 2 * 9
        for s in range(8):
            is_different = (different & (1 << (7 - s))) != 0
            is_same = (same & (1 << (7 - s))) != 0
            # [1, BLOCK_PAIRS, 2]
            x = tl.load(x_ptrs, mask=inside).to(tl.float32)
            u = tl.where(is_different, -x, x)
            minus_log_p, minus_log_q = minus_logs(u, tl.exp2(-tl.abs(x * LOG2_E)))
            p, q = tl.exp2(minus_log_p * -LOG2_E), tl.exp2(minus_log_q * -LOG2_E)
            slope = gamma * p * minus_log_p + q
            slope *= tl.exp2(minus_log_q * (gamma * -LOG2_E))
            slope *= tl.where(is_different, coef_different, -coef_same)
            slope = tl.where(is_different | is_same, slope, 0.0)
            tl.store(grad_ptrs, slope.to(grad_ptr.dtype.element_ty), mask=inside)
            x_ptrs += stride_c
            grad_ptrs += grad_stride_c
