"""All pairs of the points of grids: the squared error and its gradient."""

from __future__ import annotations

import triton
import triton.language as tl

from tritonaff.kernels.affinity_regression.grids import grid_point, times_sampled
from tritonaff.kernels.affinity_regression.roots import (
    load_points,
    load_roots,
    own_and_others,
    through_softmax,
)
from tritonaff.kernels.shared import rows_and_columns


@triton.jit
def twice_difference(
    logits_ptr, C, stride_c, points_i, points_j,
    BLOCK_C: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """2 (A - M) of the points j (rows) and i (columns), [BLOCK_J, BLOCK_I]. BLOCK_A classes at a
    time: a product of all would not fit the registers.
    """
    # [BLOCK_J, BLOCK_I]
    result = tl.zeros((BLOCK_J, BLOCK_I), tl.float32)
    for start in range(0, BLOCK_C, BLOCK_A):
        a = start + tl.arange(0, BLOCK_A)[:, None]
        # [BLOCK_A, BLOCK_I] each
        _s_i, d_i, m_i = load_roots(logits_ptr, a, points_i, C, stride_c)
        # [BLOCK_A, BLOCK_J] each
        _s_j, d_j, m_j = load_roots(logits_ptr, a, points_j, C, stride_c)
        result += tl.dot(tl.trans(d_j), m_i, input_precision="ieee")
        result += tl.dot(tl.trans(m_j), d_i, input_precision="ieee")
    return result


@triton.jit
def pairs_kernel(
    logits_ptr, target_ptr, error_ptr, pair_count_ptr,
    H, W, L,
    stride_n, stride_c, stride_h, stride_w, target_stride_n, target_stride_h, target_stride_w,
    ignore_index,
    GRIDS: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_A: tl.constexpr,
    BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    programs = tl.cdiv(L, BLOCK * STEPS)
    n = (tl.program_id(0) // programs).to(tl.int64)
    program = tl.program_id(0) % programs
    logits_ptr += n * stride_n
    target_ptr += n * target_stride_n
    # [1, BLOCK]
    error = tl.zeros((1, BLOCK), tl.float32)
    # [1]
    count = tl.zeros((1,), tl.int64)
    for step in range(STEPS):
        start_i = (program * STEPS + step) * BLOCK
        i = start_i + tl.arange(0, BLOCK)[None, :]
        h_i, w_i, _times_i, _first_i = grid_point(i, L, H, W, GRIDS)
        # [1, BLOCK] each
        points_i = load_points(
            logits_ptr, target_ptr, h_i, w_i, H, W, C,
            stride_c, stride_h, stride_w, target_stride_h, target_stride_w, ignore_index, BLOCK_C,
        )  # fmt: skip
        # The matrix is symmetric: earlier blocks have met this one.
        start_j = start_i
        while start_j < L:
            j = start_j + tl.arange(0, BLOCK)[None, :]
            h_j, w_j, _times_j, _first_j = grid_point(j, L, H, W, GRIDS)
            # [1, BLOCK] each
            points_j = load_points(
                logits_ptr, target_ptr, h_j, w_j, H, W, C,
                stride_c, stride_h, stride_w, target_stride_h, target_stride_w, ignore_index,
                BLOCK_C,
            )  # fmt: skip
            # [BLOCK, BLOCK]
            difference = twice_difference(
                logits_ptr, C, stride_c, points_i, points_j,
                BLOCK_C, BLOCK_A, BLOCK, BLOCK,
            )  # fmt: skip
            times = tl.where(start_j == start_i, 1, 2)
            error += times * tl.sum(difference * difference, axis=0)[None, :]
            # The first block meets all.
            met_by_first = (points_j.label >= 0) & (start_i == 0)
            count += tl.sum(met_by_first.to(tl.int64), axis=1)
            start_j += BLOCK
    tl.store(error_ptr + tl.program_id(0), tl.sum(error) * 0.25)
    if program == 0:
        tl.store(pair_count_ptr + n + tl.arange(0, 1), count * count)


@triton.jit
def write_zeros(
    program, grad_ptr, H, W, HW,
    grad_stride_n, grad_stride_c, grad_stride_h, grad_stride_w,
    GRIDS: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """Writes zeros to this program's pixels, except sample points."""
    programs = tl.cdiv(HW, BLOCK_P)
    n = (program // programs).to(tl.int64)
    # [BLOCK_P] each
    h, w = rows_and_columns((program % programs).to(tl.int64) * BLOCK_P, W, BLOCK_P)
    elsewhere = (h < H) & (times_sampled(h.to(tl.int32), w, H, W, GRIDS) == 0)
    pixel = grad_ptr + n * grad_stride_n + h * grad_stride_h + w.to(tl.int64) * grad_stride_w
    # Neighbours in memory are written together.
    if CHANNELS_LAST:
        c = tl.arange(0, BLOCK_C)[:, None]
        zeros = tl.zeros((BLOCK_C, BLOCK_P), grad_ptr.dtype.element_ty)
        offs = c.to(tl.int64) * grad_stride_c
        tl.store(pixel[None, :] + offs, zeros, mask=(c < C) & elsewhere[None, :])
    else:
        zero = tl.zeros((BLOCK_P,), grad_ptr.dtype.element_ty)
        for _k in tl.static_range(C):
            tl.store(pixel, zero, mask=elsewhere)
            pixel += grad_stride_c


@triton.jit
def pairs_gradient_kernel(
    grad_error_ptr, logits_ptr, target_ptr, grad_ptr,
    H, W, L, N, HW,
    stride_n, stride_c, stride_h, stride_w, target_stride_n, target_stride_h, target_stride_w,
    grad_stride_n, grad_stride_c, grad_stride_h, grad_stride_w,
    ignore_index,
    GRIDS: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_A: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_P: tl.constexpr, STEPS_J: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(L, BLOCK_I)
    # Points first, which take longest; the other programs write zeros to the pixels between them.
    if tl.program_id(0) >= N * blocks:
        write_zeros(
            tl.program_id(0) - N * blocks, grad_ptr, H, W, HW,
            grad_stride_n, grad_stride_c, grad_stride_h, grad_stride_w,
            GRIDS, C, BLOCK_C, BLOCK_P, CHANNELS_LAST,
        )  # fmt: skip
        return
    n = (tl.program_id(0) // blocks).to(tl.int64)
    logits_ptr += n * stride_n
    target_ptr += n * target_stride_n
    c = tl.arange(0, BLOCK_C)[:, None]
    i = (tl.program_id(0) % blocks) * BLOCK_I + tl.arange(0, BLOCK_I)[None, :]
    h_i, w_i, times, first = grid_point(i, L, H, W, GRIDS)
    # [1, BLOCK_I] each
    points_i = load_points(
        logits_ptr, target_ptr, h_i, w_i, H, W, C,
        stride_c, stride_h, stride_w, target_stride_h, target_stride_w, ignore_index, BLOCK_C,
    )  # fmt: skip
    # [BLOCK_C, BLOCK_I]
    grad_s = tl.zeros((BLOCK_C, BLOCK_I), tl.float32)
    for step in range(STEPS_J):
        j = step * BLOCK_J + tl.arange(0, BLOCK_J)[None, :]
        h_j, w_j, _times_j, _first_j = grid_point(j, L, H, W, GRIDS)
        # [1, BLOCK_J] each
        points_j = load_points(
            logits_ptr, target_ptr, h_j, w_j, H, W, C,
            stride_c, stride_h, stride_w, target_stride_h, target_stride_w, ignore_index, BLOCK_C,
        )  # fmt: skip
        # [BLOCK_J, BLOCK_I]
        difference = twice_difference(
            logits_ptr, C, stride_c, points_i, points_j,
            BLOCK_C, BLOCK_A, BLOCK_I, BLOCK_J,
        )  # fmt: skip
        # [BLOCK_C, BLOCK_J] each
        s_j, _d_j, _m_j = load_roots(logits_ptr, c, points_j, C, stride_c)
        grad_s += tl.dot(s_j, difference, input_precision="ieee")
    # d error / d S = 4 S (A - M).
    grad_s *= 2 * tl.load(grad_error_ptr + n)
    # [BLOCK_C, BLOCK_I] each
    s_i, _d_i, _m_i = load_roots(logits_ptr, c, points_i, C, stride_c)
    product = grad_s * s_i
    own_product, others = own_and_others(product, c, points_i.label)
    grad = through_softmax(product, own_product, others, s_i, c, points_i) * times
    offs = n * grad_stride_n + c.to(tl.int64) * grad_stride_c
    offs = offs + h_i.to(tl.int64) * grad_stride_h + w_i.to(tl.int64) * grad_stride_w
    # Points that are the same pixel have the same gradient: the first one writes it for all.
    tl.store(grad_ptr + offs, grad.to(grad_ptr.dtype.element_ty), mask=(c < C) & first)
