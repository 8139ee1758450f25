"""Sum of -log P and number of pairs, as partial sums of programs."""

from __future__ import annotations

import triton
import triton.language as tl

from tritonaff.kernels.box_pairwise.pairs import has_bit, is_in_box, load_box, neighbor, offsets
from tritonaff.kernels.dilated_affinity.focal import LOG2_E, log1p_of_fraction
from tritonaff.kernels.shared import first_pixel, is_inside, rows_and_columns


@triton.jit
def log_of(x):
    """log(1 + exp(-|x|))."""
    return log1p_of_fraction(tl.exp2(-tl.abs(x) * LOG2_E))


@triton.jit
def tables_kernel(
    logits_ptr, bits_ptr, boxes_ptr, index_ptr, sums_ptr, counts_ptr,
    H, W, HW, stride_m, stride_h, stride_w, bits_stride_n, bits_stride_h, bits_stride_w, DILATION,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    m, first = first_pixel(HW, BLOCK_P)
    h, w = rows_and_columns(first, W, BLOCK_P)
    top, left, bottom, right = load_box(boxes_ptr, m)
    # [BLOCK_P]
    loss = tl.zeros((BLOCK_P,), tl.float32)
    count = tl.zeros((BLOCK_P,), tl.int32)
    first_row, last_row = first // W, (first + BLOCK_P - 1) // W
    if (last_row >= top) & (first_row < bottom):
        own = is_in_box(h, w, top, left, bottom, right) & is_inside(h, w, H, W)
        logits_ptr += m * stride_m
        bits_ptr += tl.load(index_ptr + m) * bits_stride_n
        # [BLOCK_P]
        x = tl.load(logits_ptr + offsets(h, w, stride_h, stride_w), mask=own, other=0.0)
        x = x.to(tl.float32)
        log_x = log_of(x)
        bits = tl.load(bits_ptr + offsets(h, w, bits_stride_h, bits_stride_w), mask=own, other=0)
        for k in range(8):
            there_h, there_w, there = neighbor(h, w, k, H, W, DILATION)
            counts = there & has_bit(bits, k)  # no bits outside of the box
            # [BLOCK_P]
            y = tl.load(
                logits_ptr + offsets(there_h, there_w, stride_h, stride_w), mask=counts, other=0.0
            ).to(tl.float32)
            # Above 0 where the signs differ.
            apart = tl.minimum(tl.maximum(x, y), -tl.minimum(x, y))
            of_pair = log_x + log_of(y) - log_of(x + y) + tl.maximum(apart, 0.0)
            loss = tl.where(counts, loss + of_pair, loss)
            count += counts.to(tl.int32)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(loss, axis=0))
    tl.store(counts_ptr + tl.program_id(0), tl.sum(count, axis=0))
