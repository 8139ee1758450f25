"""The matrix of affinities itself, for people to look at."""

from __future__ import annotations

import triton
import triton.language as tl

from tritonaff.kernels.affinity_regression.grids import grid_point
from tritonaff.kernels.affinity_regression.roots import (
    half_exp,
    load_logits,
    place_of,
    statistics,
)


@triton.jit
def matrix_kernel(
    logits_ptr, affinity_ptr,
    H, W, L,
    stride_n, stride_c, stride_h, stride_w,
    GRIDS: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_A: tl.constexpr,
    BLOCK_I: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(L, BLOCK_I)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    logits_ptr += n * stride_n
    c = tl.arange(0, BLOCK_C)[:, None]
    # [BLOCK_I] each
    i = (tl.program_id(0) % blocks) * BLOCK_I + tl.arange(0, BLOCK_I)
    j = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    h_i, w_i, _times_i, _first_i = grid_point(i[None, :], L, H, W, GRIDS)
    h_j, w_j, _times_j, _first_j = grid_point(j[None, :], L, H, W, GRIDS)
    place_i = place_of(h_i, w_i, stride_h, stride_w)
    place_j = place_of(h_j, w_j, stride_h, stride_w)
    # [BLOCK_C, BLOCK_I] each
    x_i = load_logits(logits_ptr, c, place_i, h_i >= 0, C, stride_c)
    x_j = load_logits(logits_ptr, c, place_j, h_j >= 0, C, stride_c)
    # Class 0 plays the label: any will do for the square roots alone.
    # [1, BLOCK_I] each
    top_i, scale_i, _own_s_i, _own_q_i = statistics(x_i, c, tl.where(h_i >= 0, 0, -1))
    top_j, scale_j, _own_s_j, _own_q_j = statistics(x_j, c, tl.where(h_j >= 0, 0, -1))
    # [BLOCK_I, BLOCK_I]
    affinity = tl.zeros((BLOCK_I, BLOCK_I), tl.float32)
    for start in range(0, BLOCK_C, BLOCK_A):
        a = start + tl.arange(0, BLOCK_A)[:, None]
        # [BLOCK_A, BLOCK_I] each
        x_ai = load_logits(logits_ptr, a, place_i, h_i >= 0, C, stride_c)
        x_aj = load_logits(logits_ptr, a, place_j, h_j >= 0, C, stride_c)
        s_i = half_exp(x_ai, top_i) * scale_i
        s_j = half_exp(x_aj, top_j) * scale_j
        affinity += tl.dot(tl.trans(s_i), s_j, input_precision="ieee")
    offs = n * L * L + i.to(tl.int64)[:, None] * L + j[None, :]
    tl.store(affinity_ptr + offs, affinity, mask=(i < L)[:, None] & (j < L)[None, :])
