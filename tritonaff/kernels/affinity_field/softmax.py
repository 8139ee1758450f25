"""The softmax of every pixel: its statistics, and its gradient."""

from __future__ import annotations

import triton
import triton.language as tl

from tritonaff.kernels.affinity_field.mathematics import exp, reciprocal
from tritonaff.kernels.shared import first_pixel, load_label


@triton.jit
def store_zeros(table_ptr, SIZE, BLOCK: tl.constexpr):
    """All programs together store SIZE zeros."""
    entry = tl.program_id(0).to(tl.int64) * BLOCK
    while entry < SIZE:
        offs = tl.arange(0, BLOCK)
        tl.store(table_ptr + entry + offs, 0, mask=offs < SIZE - entry)
        entry += tl.num_programs(0).to(tl.int64) * BLOCK


@triton.jit
def statistics_kernel(
    logits_ptr, target_ptr, top_ptr, rest_ptr, label_ptr, totals_ptr, entries_ptr,
    C, HW, stride_n, stride_c, stride_p, target_stride_n, ignore_index, TOTALS, ENTRIES,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    n, first = first_pixel(HW, BLOCK_P)
    # [1, BLOCK_P], counted from the first pixel
    pixel = tl.arange(0, BLOCK_P)[None, :]
    mask = pixel < HW - first
    # [BLOCK_C, 1]
    row = tl.arange(0, BLOCK_C)[:, None]
    x_ptr = logits_ptr + n * stride_n + first * stride_p
    x_ptr += row.to(tl.int64) * stride_c + pixel.to(tl.int64) * stride_p

    # First the statistics of every BLOCK_C-th class, together at the end. The sum leaves the
    # largest exponential out; to subtract it would lose digits: 1 - p of a confident pixel is this
    # sum, and may be far below the rounding of 1.
    # [BLOCK_C, BLOCK_P]
    top = tl.full((BLOCK_C, BLOCK_P), -1e38, tl.float32)
    # [BLOCK_C, BLOCK_P]
    rest = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    c = 0
    while c < C:
        channel = x_ptr + tl.cast(c, tl.int64) * stride_c
        # [BLOCK_C, BLOCK_P]
        x = tl.load(channel, mask=(row < C - c) & mask, other=-float("inf")).to(tl.float32)
        e = exp(-tl.abs(x - top))
        rest = tl.where(x > top, (rest + 1) * e, rest + e)
        top = tl.maximum(top, x)
        c += BLOCK_C
    # [1, BLOCK_P] each
    largest, largest_row = tl.max(top, axis=0, return_indices=True, keep_dims=True)
    others = (rest + 1) * exp(top - largest)
    # [1, BLOCK_P]
    rest = tl.sum(tl.where(row == largest_row, rest, others), axis=0, keep_dims=True)
    rest = tl.where(tl.abs(largest) < 1e38, rest, float("nan"))  # infinity has no softmax

    # [1, BLOCK_P]; the rest of the image as one row
    label = load_label(
        target_ptr + n * target_stride_n + first, 0 * pixel, pixel, 1, HW - first, C, 0, 1,
        ignore_index,
    )  # fmt: skip
    at = n * HW + first + pixel
    tl.store(top_ptr + at, largest.to(top_ptr.dtype.element_ty), mask=mask)
    tl.store(rest_ptr + at, rest, mask=mask)
    tl.store(label_ptr + at, label.to(label_ptr.dtype.element_ty), mask=mask)

    # counts_kernel adds to these.
    store_zeros(totals_ptr, TOTALS, BLOCK_P)
    store_zeros(entries_ptr, ENTRIES, BLOCK_P)


@triton.jit
def softmax_backward(
    grad_log_loss_ptr, pixels, grad_ptr, C, HW, stride_n, stride_c, SUM_PROGRAMS,
    CROSS_ENTROPY: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """From p d loss / d p to the gradient of the logits, in place. The first SUM_PROGRAMS
    programs have other work.
    """
    n, first = first_pixel(HW, BLOCK_P, SUM_PROGRAMS)
    # [1, BLOCK_P], counted from the first pixel
    pixel = tl.arange(0, BLOCK_P)[None, :]
    in_image = pixel < HW - first
    # [BLOCK_C, 1]
    row = tl.arange(0, BLOCK_C)[:, None]
    # [1, BLOCK_P]
    top = tl.load(pixels.top + n * HW + first + pixel, mask=in_image, other=0.0).to(tl.float32)
    # [1, BLOCK_P]
    rest = tl.load(pixels.rest + n * HW + first + pixel, mask=in_image, other=1.0)
    scale = reciprocal(1 + rest)
    # [1, BLOCK_P]
    label = tl.load(pixels.label + n * HW + first + pixel, mask=in_image, other=-1).to(tl.int32)
    # [1, BLOCK_P]
    cross = tl.zeros_like(top)
    if CROSS_ENTROPY:
        cross = tl.load(grad_log_loss_ptr + label, mask=label >= 0, other=0.0) * scale

    x_ptr = pixels.logits + n * stride_n + first + row.to(tl.int64) * stride_c + pixel
    grad_ptr += n * C * HW + first + row.to(tl.int64) * HW + pixel
    # Sums of p d loss / d p: over the class of the largest logit, over the others.
    # [BLOCK_C, BLOCK_P]
    top_sum = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    # [BLOCK_C, BLOCK_P]
    other_sum = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    c = 0
    while c < C:
        mask = (row < C - c) & in_image
        # [BLOCK_C, BLOCK_P]
        x = tl.load(x_ptr + tl.cast(c, tl.int64) * stride_c, mask=mask, other=0.0).to(tl.float32)
        row_ptr = grad_ptr + tl.cast(c, tl.int64) * HW
        # [BLOCK_C, BLOCK_P]
        grad = tl.load(row_ptr, mask=mask, other=0.0).to(tl.float32)
        top_sum += tl.where(x == top, grad, 0.0)
        other_sum += tl.where(x == top, 0.0, grad)
        c += BLOCK_C
    # [1, BLOCK_P]
    other_sum = tl.sum(other_sum, axis=0, keep_dims=True)
    # [1, BLOCK_P]
    total = (other_sum + tl.sum(top_sum, axis=0, keep_dims=True)) * scale
    # The gradient sums to 0 over the classes. Where p is near 1, nearly equal numbers would be
    # subtracted: that class follows from the others, which are small and exact.
    # [1, BLOCK_P]
    top_grad = rest * total - other_sum
    c = 0
    while c < C:
        mask = (row < C - c) & in_image
        # [BLOCK_C, BLOCK_P]
        x = tl.load(x_ptr + tl.cast(c, tl.int64) * stride_c, mask=mask, other=0.0).to(tl.float32)
        row_ptr = grad_ptr + tl.cast(c, tl.int64) * HW
        # [BLOCK_C, BLOCK_P]
        grad = tl.load(row_ptr, mask=mask, other=0.0).to(tl.float32)
        e = exp(x - top)
        grad = tl.where((x == top) & (rest < 1), top_grad, grad - e * total)
        if CROSS_ENTROPY:
            grad += cross * tl.where(row == label - c, e - 1 - rest, e)
        # Where no pixel counts only 0 was written, but 0 times NaN is NaN.
        grad = tl.where(label >= 0, grad, 0.0)
        tl.store(row_ptr, grad.to(grad_ptr.dtype.element_ty), mask=mask)
        c += BLOCK_C
