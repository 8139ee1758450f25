"""The last launches: partial tables are added up, p d loss / d p becomes d loss / d logits."""

from __future__ import annotations

import triton
import triton.language as tl

from tritonaff.kernels.affinity_field.pixels import Pixels
from tritonaff.kernels.affinity_field.softmax import softmax_backward


@triton.jit
def sum_row(row_ptr, num, BLOCK: tl.constexpr):
    """The sum of consecutive numbers, maybe millions: in float64."""
    offs = tl.arange(0, BLOCK)
    # [BLOCK]
    total = tl.zeros((BLOCK,), tl.float64)
    left = tl.cast(num, tl.int32)  # an argument of 1 is a constant
    while left > 0:
        # [BLOCK]
        total += tl.load(row_ptr + offs, mask=offs < left, other=0.0).to(tl.float64)
        row_ptr += BLOCK
        left -= BLOCK
    return tl.sum(total)


@triton.jit
def add_up(
    dense_ptr, edges_ptr, sums_ptr, log_loss_ptr, C, K, DENSE_PROGRAMS, EDGE_PROGRAMS,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """From partial tables to one class and size of the tables."""
    c, k = (tl.program_id(0) // (K + 1)).to(tl.int64), tl.program_id(0) % (K + 1)
    edges = edges_ptr + (2 * k * C + c) * EDGE_PROGRAMS
    first = sum_row(edges, EDGE_PROGRAMS, BLOCK)
    if k < K:
        second = sum_row(edges + tl.cast(C, tl.int64) * EDGE_PROGRAMS, EDGE_PROGRAMS, BLOCK)
        dense = sum_row(dense_ptr + (c * K + k) * DENSE_PROGRAMS, DENSE_PROGRAMS, BLOCK)
        tl.store(sums_ptr + c * K + k, first.to(tl.float32))
        tl.store(sums_ptr + (C + c) * K + k, (dense - second).to(tl.float32))
    else:
        tl.store(log_loss_ptr + c, first.to(tl.float32))


@triton.jit
def finish_kernel(
    dense_ptr, edges_ptr, sums_ptr, log_loss_ptr, zero_ptr,
    grad_log_loss_ptr, logits_ptr, label_ptr, top_ptr, rest_ptr, grad_ptr,
    C, K, HW, stride_n, stride_c, DENSE_PROGRAMS, EDGE_PROGRAMS, SUM_PROGRAMS,
    TABLES: tl.constexpr, GRADIENT: tl.constexpr, CROSS_ENTROPY: tl.constexpr,
    BLOCK_SUM: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    # Two jobs in one launch: the first takes only a few programs.
    if tl.program_id(0) < SUM_PROGRAMS:
        if TABLES:
            add_up(
                dense_ptr, edges_ptr, sums_ptr, log_loss_ptr, C, K, DENSE_PROGRAMS, EDGE_PROGRAMS,
                BLOCK_SUM,
            )  # fmt: skip
            tl.store(zero_ptr, 0.0)
    elif GRADIENT:
        softmax_backward(
            grad_log_loss_ptr, Pixels(logits_ptr, top_ptr, rest_ptr, label_ptr), grad_ptr,
            C, HW, stride_n, stride_c, SUM_PROGRAMS, CROSS_ENTROPY, BLOCK_C, BLOCK_P,
        )  # fmt: skip


@triton.jit
def scale_kernel(x_ptr, scale_ptr, SIZE, BLOCK: tl.constexpr):
    scale = tl.load(scale_ptr).to(tl.float32)
    if scale != 1:
        first = tl.program_id(0).to(tl.int64) * BLOCK
        offs = tl.arange(0, BLOCK)
        mask = offs < SIZE - first
        # [BLOCK]
        x = tl.load(x_ptr + first + offs, mask=mask).to(tl.float32) * scale
        tl.store(x_ptr + first + offs, x.to(x_ptr.dtype.element_ty), mask=mask)
