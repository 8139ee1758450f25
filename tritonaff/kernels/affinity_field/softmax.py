from __future__ import annotations

import triton
import triton.language as tl

from tritonaff.kernels.affinity_field.mathematics import exp, reciprocal
from tritonaff.kernels.shared import first_pixel, load_label


@triton.jit
def statistics_kernel(
    logits_ptr, target_ptr, top_ptr, rest_ptr, label_ptr, totals_ptr, entries_ptr,
    C, HW, stride_n, stride_c, stride_p, target_stride_n, ignore_index, TOTALS, ENTRIES,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    n, first = first_pixel(HW, BLOCK_P)
    pixel = tl.arange(0, BLOCK_P)[None, :]  # from there
    mask = pixel < HW - first
    row = tl.arange(0, BLOCK_C)[:, None]
    x_ptr = logits_ptr + n * stride_n + first * stride_p
    x_ptr += row.to(tl.int64) * stride_c + pixel.to(tl.int64) * stride_p

    # Of every BLOCK_C-th class first; together at the end. The largest is left out of the sum, not
    # subtracted from it: 1 - p of a confident pixel is this sum, and it may be far below the
    # rounding of 1.
    top = tl.full((BLOCK_C, BLOCK_P), -1e38, tl.float32)
    rest = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    c = 0
    while c < C:
        channel = x_ptr + tl.cast(c, tl.int64) * stride_c
        x = tl.load(channel, mask=(row < C - c) & mask, other=-float("inf")).to(tl.float32)
        e = exp(-tl.abs(x - top))
        rest = tl.where(x > top, (rest + 1) * e, rest + e)
        top = tl.maximum(top, x)
        c += BLOCK_C
    largest, largest_row = tl.max(top, axis=0, return_indices=True, keep_dims=True)
    others = (rest + 1) * exp(top - largest)
    rest = tl.sum(tl.where(row == largest_row, rest, others), axis=0, keep_dims=True)
    rest = tl.where(tl.abs(largest) < 1e38, rest, float("nan"))  # infinity has no softmax

    label = load_label(
        target_ptr + n * target_stride_n + first, 0 * pixel, pixel, 1, HW - first, C, 0, 1,
        ignore_index,
    )  # fmt: skip
    at = n * HW + first + pixel
    tl.store(top_ptr + at, largest.to(top_ptr.dtype.element_ty), mask=mask)
    tl.store(rest_ptr + at, rest, mask=mask)
    tl.store(label_ptr + at, label.to(label_ptr.dtype.element_ty), mask=mask)

    # What the next kernel adds to.
    store_zeros(totals_ptr, TOTALS, BLOCK_P)
    store_zeros(entries_ptr, ENTRIES, BLOCK_P)


@triton.jit
def store_zeros(table_ptr, SIZE, BLOCK: tl.constexpr):
    entry = tl.program_id(0).to(tl.int64) * BLOCK
    while entry < SIZE:
        offs = tl.arange(0, BLOCK)
        tl.store(table_ptr + entry + offs, 0, mask=offs < SIZE - entry)
        entry += tl.num_programs(0).to(tl.int64) * BLOCK


@triton.jit
def softmax_backward(
    grad_log_loss_ptr, logits_ptr, label_ptr, top_ptr, rest_ptr, grad_ptr,
    C, HW, stride_n, stride_c, SUMS,
    CROSS_ENTROPY: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """From p d loss / d p to the gradient of the logits, in place."""
    n, first = first_pixel(HW, BLOCK_P, SUMS)
    pixel = tl.arange(0, BLOCK_P)[None, :]  # from there
    in_image = pixel < HW - first
    row = tl.arange(0, BLOCK_C)[:, None]
    top = tl.load(top_ptr + n * HW + first + pixel, mask=in_image, other=0.0).to(tl.float32)
    rest = tl.load(rest_ptr + n * HW + first + pixel, mask=in_image, other=1.0)
    scale = reciprocal(1 + rest)
    label = tl.load(label_ptr + n * HW + first + pixel, mask=in_image, other=-1).to(tl.int32)
    cross = tl.zeros_like(top)
    if CROSS_ENTROPY:
        cross = tl.load(grad_log_loss_ptr + label, mask=label >= 0, other=0.0) * scale

    x_ptr = logits_ptr + n * stride_n + first + row.to(tl.int64) * stride_c + pixel
    grad_ptr += n * C * HW + first + row.to(tl.int64) * HW + pixel
    of_top = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    of_others = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    c = 0
    while c < C:
        mask = (row < C - c) & in_image
        x = tl.load(x_ptr + tl.cast(c, tl.int64) * stride_c, mask=mask, other=0.0).to(tl.float32)
        row_ptr = grad_ptr + tl.cast(c, tl.int64) * HW
        grad = tl.load(row_ptr, mask=mask, other=0.0).to(tl.float32)
        of_top += tl.where(x == top, grad, 0.0)
        of_others += tl.where(x == top, 0.0, grad)
        c += BLOCK_C
    of_others = tl.sum(of_others, axis=0, keep_dims=True)
    total = (of_others + tl.sum(of_top, axis=0, keep_dims=True)) * scale
    # Over the classes the result sums to 0. That of a class with p near 1, where nearly equal
    # numbers would be subtracted, follows from the others, which are small and exact.
    from_others = rest * total - of_others
    c = 0
    while c < C:
        mask = (row < C - c) & in_image
        x = tl.load(x_ptr + tl.cast(c, tl.int64) * stride_c, mask=mask, other=0.0).to(tl.float32)
        row_ptr = grad_ptr + tl.cast(c, tl.int64) * HW
        grad = tl.load(row_ptr, mask=mask, other=0.0).to(tl.float32)
        e = exp(x - top)
        grad = tl.where((x == top) & (rest < 1), from_others, grad - e * total)
        if CROSS_ENTROPY:
            grad += cross * tl.where(row == label - c, e - 1 - rest, e)
        # Where no pixel counts nothing was written but 0, and 0 times what is no number is none.
        grad = tl.where(label >= 0, grad, 0.0)
        tl.store(row_ptr, grad.to(grad_ptr.dtype.element_ty), mask=mask)
        c += BLOCK_C
