"""Triton tiles of affinity regression.

With the square roots of the probabilities S (C, L) and the one-hot labels Y, a point has the
columns d of D = S - Y and m of M = S + Y. The difference of both affinities of a pair is
(d_i . m_j + m_i . d_j) / 2, which keeps its digits where the prediction is right.
docs/affinity_regression.md derives the rest.

At the points of grids, few enough for all pairs:

    pairs_kernel           a block of points against all others -> squared error, one launch
    pairs_gradient_kernel  the same -> d loss / d logits at these points; the other pixels are
                           zeros of one memset

Every pixel, linear in their number:

    gram_kernel            pixels of one image, 2 blocks of classes -> partial D D^T, D M^T, M M^T
    gradient_kernel        pixels, all classes -> d loss / d logits

    matrix_kernel          a block of points against another -> the matrix A itself, for people

Half precision is read as it is; products are float32 in full precision ("ieee"), and so are sums,
except those of the Gram matrices, which are float64. Grid sizes and blocks compile anew, image
sizes do not.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonaff.kernels.shared import first_pixel, load_label, on_device, rows_and_columns
from tritonaff.portable.affinity_regression import factors, squared_error_of

# Blocks are small because products in full precision keep their operands in registers; those below
# spill none or few on the GPUs that `tritonaff-bench static` compiles for.
# Pixels that one program adds to a tile of the Gram matrices: at least so many, and so many per
# class that the partial matrices stay below a fifth of float32 logits.
GRAM_PIXELS, GRAM_PIXELS_PER_CLASS = 2048, 32
# Points i that one program compares with all others.
POINTS_PER_PROGRAM = 256


@triton.jit
def grid_point(index, L, H, W, GRIDS: tl.constexpr):
    """Row, column, how many sample points are this pixel, and whether this one is the first.

    Without grids the points are the pixels. Beyond L the row is -1: outside.
    """
    h = index // W
    w = index % W
    times = tl.full(index.shape, 1, tl.int32)
    first = index < L
    if len(GRIDS) > 0:
        start = 0
        for k in tl.static_range(len(GRIDS)):
            inside = (index >= start) & (index < start + GRIDS[k] * GRIDS[k])
            i = (index - start) // GRIDS[k]
            j = (index - start) % GRIDS[k]
            h = tl.where(inside, i * H // GRIDS[k], h)
            w = tl.where(inside, j * W // GRIDS[k], w)
            start += GRIDS[k] * GRIDS[k]
        times = tl.zeros_like(h)
        start = 0
        for k in tl.static_range(len(GRIDS)):
            inside = (index >= start) & (index < start + GRIDS[k] * GRIDS[k])
            i = (index - start) // GRIDS[k]
            j = (index - start) % GRIDS[k]
            # Row h is that of the steps i with floor(i H / g) = h.
            first_i = tl.cdiv(h * GRIDS[k], H)
            first_j = tl.cdiv(w * GRIDS[k], W)
            repeats = (tl.cdiv((h + 1) * GRIDS[k], H) - first_i) * (
                tl.cdiv((w + 1) * GRIDS[k], W) - first_j
            )
            first = first & (~inside | ((times == 0) & (i == first_i) & (j == first_j)))
            times += repeats
            start += GRIDS[k] * GRIDS[k]
    return tl.where(index < L, h, -1), w, times, first


@triton.jit
def load_logits(logits_ptr, c, h, w, mask, C, stride_c, stride_h, stride_w):
    """(BLOCK_C, points), -inf in classes that do not exist; 0 where masked."""
    offs = c.to(tl.int64) * stride_c + h.to(tl.int64) * stride_h + w.to(tl.int64) * stride_w
    x = tl.load(logits_ptr + offs, mask=mask & (c < C), other=0.0).to(tl.float32)
    return tl.where(c < C, x, -float("inf"))


@triton.jit
def statistics(x, c, label):
    """Of points (1, P) with all their classes: the largest logit, what to multiply
    exp((x - largest) / 2) by for the square root of p, that root and 1 - p in the label's channel.

    All but the first are 0 where a point does not count.
    """
    top = tl.max(x, axis=0)[None, :]
    half = tl.exp((x - top) * 0.5)
    e = half * half
    own = c == label
    own_half = tl.sum(tl.where(own, half, 0.0), axis=0)[None, :]
    # 1 - p is the sum of the others: all digits where p is near 1.
    others = tl.sum(tl.where(own, 0.0, e), axis=0)[None, :]
    total = others + own_half * own_half
    counts = tl.where(label >= 0, 1.0, 0.0)
    scale = counts / tl.sqrt(total)
    return top, scale, own_half * scale, counts * others / total


@triton.jit
def roots(x, c, label, top, scale, own_s, own_q):
    """S, D = S - Y and M = S + Y of some classes of points."""
    s = tl.exp((x - top) * 0.5) * scale
    own = c == label
    # Not s - 1: near 1 that would round away what is left.
    d = tl.where(own, -own_q / (1 + own_s), s)
    return s, d, s + tl.where(own, 1.0, 0.0)


@triton.jit
def load_roots(
    logits_ptr, c, h, w, C, stride_c, stride_h, stride_w, label, top, scale, own_s, own_q
):  # fmt: skip
    x = load_logits(logits_ptr, c, h, w, label >= 0, C, stride_c, stride_h, stride_w)
    s, d, m = roots(x, c, label, top, scale, own_s, own_q)
    return s, d, m


@triton.jit
def load_statistics(
    logits_ptr, target_ptr, h, w, H, W, C,
    stride_c, stride_h, stride_w, target_stride_h, target_stride_w, ignore_index,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The labels of points, and what :func:`statistics` gives of them."""
    c = tl.arange(0, BLOCK_C)[:, None]
    label = load_label(target_ptr, h, w, H, W, C, target_stride_h, target_stride_w, ignore_index)
    x = load_logits(logits_ptr, c, h, w, label >= 0, C, stride_c, stride_h, stride_w)
    top, scale, own_s, own_q = statistics(x, c, label)
    return label, top, scale, own_s, own_q


@triton.jit
def twice_difference(
    logits_ptr, h_i, w_i, h_j, w_j, C, stride_c, stride_h, stride_w,
    label_i, top_i, scale_i, own_s_i, own_q_i, label_j, top_j, scale_j, own_s_j, own_q_j,
    BLOCK_C: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """2 (A - M) of the points j (rows) and i (columns), some classes at a time: a product of all
    would not fit the registers.
    """
    result = tl.zeros((BLOCK_J, BLOCK_I), tl.float32)
    for start in range(0, BLOCK_C, BLOCK_A):
        a = start + tl.arange(0, BLOCK_A)[:, None]
        _s_i, d_i, m_i = load_roots(
            logits_ptr, a, h_i, w_i, C, stride_c, stride_h, stride_w,
            label_i, top_i, scale_i, own_s_i, own_q_i,
        )  # fmt: skip
        _s_j, d_j, m_j = load_roots(
            logits_ptr, a, h_j, w_j, C, stride_c, stride_h, stride_w,
            label_j, top_j, scale_j, own_s_j, own_q_j,
        )  # fmt: skip
        result += tl.dot(tl.trans(d_j), m_i, input_precision="ieee")
        result += tl.dot(tl.trans(m_j), d_i, input_precision="ieee")
    return result


@triton.jit
def through_softmax(grad_s, s, c, label, own_s, own_q):
    """The gradient of the logits (S G - p <S, G>) / 2 from that of S."""
    product = grad_s * s
    own = c == label
    own_product = tl.sum(tl.where(own, product, 0.0), axis=0)[None, :]
    others = tl.sum(tl.where(own, 0.0, product), axis=0)[None, :]
    # Where p is near 1 its channel would subtract nearly equal numbers.
    own_grad = own_q * own_product - own_s * own_s * others
    return tl.where(own, own_grad, product - s * s * (own_product + others)) * 0.5


@triton.jit
def pairs_kernel(
    logits_ptr, target_ptr, error_ptr, pair_count_ptr,
    C, H, W, L,
    stride_n, stride_c, stride_h, stride_w, target_stride_n, target_stride_h, target_stride_w,
    ignore_index,
    GRIDS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr, STEPS_I: tl.constexpr, STEPS_J: tl.constexpr,
):  # fmt: skip
    programs = tl.cdiv(L, BLOCK_I * STEPS_I)
    n = (tl.program_id(0) // programs).to(tl.int64)
    program = tl.program_id(0) % programs
    logits_ptr += n * stride_n
    target_ptr += n * target_stride_n
    error = tl.zeros((1, BLOCK_I), tl.float32)
    for step_i in range(STEPS_I):
        i = (program * STEPS_I + step_i) * BLOCK_I + tl.arange(0, BLOCK_I)[None, :]
        h_i, w_i, _times_i, _first_i = grid_point(i, L, H, W, GRIDS)
        label_i, top_i, scale_i, own_s_i, own_q_i = load_statistics(
            logits_ptr, target_ptr, h_i, w_i, H, W, C,
            stride_c, stride_h, stride_w, target_stride_h, target_stride_w, ignore_index, BLOCK_C,
        )  # fmt: skip
        for step_j in range(STEPS_J):
            j = step_j * BLOCK_J + tl.arange(0, BLOCK_J)[None, :]
            h_j, w_j, _times_j, _first_j = grid_point(j, L, H, W, GRIDS)
            label_j, top_j, scale_j, own_s_j, own_q_j = load_statistics(
                logits_ptr, target_ptr, h_j, w_j, H, W, C,
                stride_c, stride_h, stride_w, target_stride_h, target_stride_w, ignore_index,
                BLOCK_C,
            )  # fmt: skip
            difference = twice_difference(
                logits_ptr, h_i, w_i, h_j, w_j, C, stride_c, stride_h, stride_w,
                label_i, top_i, scale_i, own_s_i, own_q_i,
                label_j, top_j, scale_j, own_s_j, own_q_j,
                BLOCK_C, BLOCK_A, BLOCK_I, BLOCK_J,
            )  # fmt: skip
            error += tl.sum(difference * difference, axis=0)[None, :]
    tl.store(error_ptr + tl.program_id(0), tl.sum(error) * 0.25)

    if program == 0:
        count = tl.zeros((1,), tl.int64)
        for step in range(STEPS_J):
            k = step * BLOCK_J + tl.arange(0, BLOCK_J)[None, :]
            h, w, _times, _first = grid_point(k, L, H, W, GRIDS)
            label = load_label(
                target_ptr, h, w, H, W, C, target_stride_h, target_stride_w, ignore_index
            )
            count += tl.sum((label >= 0).to(tl.int64), axis=1)
        tl.store(pair_count_ptr + n + tl.arange(0, 1), count * count)


@triton.jit
def pairs_gradient_kernel(
    grad_error_ptr, logits_ptr, target_ptr, grad_ptr,
    C, H, W, L,
    stride_n, stride_c, stride_h, stride_w, target_stride_n, target_stride_h, target_stride_w,
    grad_stride_n, grad_stride_c, grad_stride_h, grad_stride_w,
    ignore_index,
    GRIDS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr, STEPS_J: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(L, BLOCK_I)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    logits_ptr += n * stride_n
    target_ptr += n * target_stride_n
    c = tl.arange(0, BLOCK_C)[:, None]
    i = (tl.program_id(0) % blocks) * BLOCK_I + tl.arange(0, BLOCK_I)[None, :]
    h_i, w_i, times, first = grid_point(i, L, H, W, GRIDS)
    label_i, top_i, scale_i, own_s_i, own_q_i = load_statistics(
        logits_ptr, target_ptr, h_i, w_i, H, W, C,
        stride_c, stride_h, stride_w, target_stride_h, target_stride_w, ignore_index, BLOCK_C,
    )  # fmt: skip
    grad_s = tl.zeros((BLOCK_C, BLOCK_I), tl.float32)
    for step in range(STEPS_J):
        j = step * BLOCK_J + tl.arange(0, BLOCK_J)[None, :]
        h_j, w_j, _times_j, _first_j = grid_point(j, L, H, W, GRIDS)
        label_j, top_j, scale_j, own_s_j, own_q_j = load_statistics(
            logits_ptr, target_ptr, h_j, w_j, H, W, C,
            stride_c, stride_h, stride_w, target_stride_h, target_stride_w, ignore_index, BLOCK_C,
        )  # fmt: skip
        difference = twice_difference(
            logits_ptr, h_i, w_i, h_j, w_j, C, stride_c, stride_h, stride_w,
            label_i, top_i, scale_i, own_s_i, own_q_i,
            label_j, top_j, scale_j, own_s_j, own_q_j,
            BLOCK_C, BLOCK_A, BLOCK_I, BLOCK_J,
        )  # fmt: skip
        s_j, _d_j, _m_j = load_roots(
            logits_ptr, c, h_j, w_j, C, stride_c, stride_h, stride_w,
            label_j, top_j, scale_j, own_s_j, own_q_j,
        )  # fmt: skip
        grad_s += tl.dot(s_j, difference, input_precision="ieee")
    # d error / d S = 4 S (A - M).
    grad_s *= 2 * tl.load(grad_error_ptr + n)
    s_i, _d_i, _m_i = load_roots(
        logits_ptr, c, h_i, w_i, C, stride_c, stride_h, stride_w,
        label_i, top_i, scale_i, own_s_i, own_q_i,
    )  # fmt: skip
    grad = through_softmax(grad_s, s_i, c, label_i, own_s_i, own_q_i) * times
    offs = n * grad_stride_n + c.to(tl.int64) * grad_stride_c
    offs = offs + h_i.to(tl.int64) * grad_stride_h + w_i.to(tl.int64) * grad_stride_w
    # Points that are the same pixel have the same gradient: the first one writes it, that of all.
    tl.store(grad_ptr + offs, grad.to(grad_ptr.dtype.element_ty), mask=(c < C) & first)


@triton.jit
def gram_kernel(
    logits_ptr, target_ptr, gram_ptr, count_ptr,
    C, H, W, N,
    stride_n, stride_c, stride_h, stride_w, target_stride_n, target_stride_h, target_stride_w,
    ignore_index,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_A: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    # Partial matrices: (splits, N, 2, C, C). Labels by class: (splits, N, C).
    split, n = tl.program_id(0) // N, (tl.program_id(0) % N).to(tl.int64)
    tiles = tl.cdiv(C, BLOCK_A)
    logits_ptr += n * stride_n
    target_ptr += n * target_stride_n
    c = tl.arange(0, BLOCK_C)[:, None]
    row = (tl.program_id(1) // tiles) * BLOCK_A + tl.arange(0, BLOCK_A)
    column = (tl.program_id(1) % tiles) * BLOCK_A + tl.arange(0, BLOCK_A)
    # The matrices cancel where the predictions of a label are nearly the same.
    dd = tl.zeros((BLOCK_A, BLOCK_A), tl.float64)
    dm = tl.zeros((BLOCK_A, BLOCK_A), tl.float64)
    count = tl.zeros((BLOCK_A, BLOCK_P), tl.int32)
    for step in range(STEPS):
        first = (split.to(tl.int64) * STEPS + step) * BLOCK_P
        h, w = rows_and_columns(first, W, BLOCK_P)
        h, w = h[None, :], w[None, :]
        label = load_label(
            target_ptr, h, w, H, W, C, target_stride_h, target_stride_w, ignore_index
        )
        x = load_logits(logits_ptr, c, h, w, label >= 0, C, stride_c, stride_h, stride_w)
        top, scale, own_s, own_q = statistics(x, c, label)
        if BLOCK_A == BLOCK_C:
            _s, d_a, m_b = roots(x, c, label, top, scale, own_s, own_q)
            d_b = d_a
        else:
            _s_a, d_a, _m_a = load_roots(
                logits_ptr, row[:, None], h, w, C, stride_c, stride_h, stride_w,
                label, top, scale, own_s, own_q,
            )  # fmt: skip
            _s_b, d_b, m_b = load_roots(
                logits_ptr, column[:, None], h, w, C, stride_c, stride_h, stride_w,
                label, top, scale, own_s, own_q,
            )  # fmt: skip
        dd += tl.dot(d_a, tl.trans(d_b), input_precision="ieee").to(tl.float64)
        dm += tl.dot(d_a, tl.trans(m_b), input_precision="ieee").to(tl.float64)
        count += (label == row[:, None]).to(tl.int32)
    matrix = tl.program_id(0).to(tl.int64) * 2 * C * C
    offs = matrix + row[:, None] * C + column[None, :]
    mask = (row < C)[:, None] & (column < C)[None, :]
    tl.store(gram_ptr + offs, dd, mask=mask)
    tl.store(gram_ptr + C * C + offs, dm, mask=mask)
    if tl.program_id(1) % tiles == 0:
        labels = tl.program_id(0).to(tl.int64) * C + row
        tl.store(count_ptr + labels, tl.sum(count, axis=1), mask=row < C)


@triton.jit
def gradient_kernel(
    factor_ptr, logits_ptr, target_ptr, grad_ptr,
    C, H, W, HW,
    stride_n, stride_c, stride_h, stride_w, target_stride_n, target_stride_h, target_stride_w,
    grad_stride_n, grad_stride_c, grad_stride_h, grad_stride_w,
    ignore_index,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    n, first = first_pixel(HW, BLOCK_P)
    logits_ptr += n * stride_n
    target_ptr += n * target_stride_n
    factor_ptr += n * 2 * C * C
    h, w = rows_and_columns(first, W, BLOCK_P)
    h, w = h[None, :], w[None, :]
    c = tl.arange(0, BLOCK_C)[:, None]
    label = load_label(target_ptr, h, w, H, W, C, target_stride_h, target_stride_w, ignore_index)
    x = load_logits(logits_ptr, c, h, w, label >= 0, C, stride_c, stride_h, stride_w)
    top, scale, own_s, own_q = statistics(x, c, label)
    s, d, _m = roots(x, c, label, top, scale, own_s, own_q)
    # The product with Y is a column of its matrix.
    labelled = (c < C) & (label >= 0)
    grad_s = tl.load(factor_ptr + c * 2 * C + C + label, mask=labelled, other=0.0)
    for start in range(0, BLOCK_C, BLOCK_A):
        a = start + tl.arange(0, BLOCK_A)
        if BLOCK_A == BLOCK_C:
            d_a = d
        else:
            _s_a, d_a, _m_a = load_roots(
                logits_ptr, a[:, None], h, w, C, stride_c, stride_h, stride_w,
                label, top, scale, own_s, own_q,
            )  # fmt: skip
        mask = (c < C) & (a < C)[None, :]
        factor = tl.load(factor_ptr + c * 2 * C + a[None, :], mask=mask, other=0.0)
        grad_s += tl.dot(factor, d_a, input_precision="ieee")
    grad = through_softmax(grad_s, s, c, label, own_s, own_q)
    offs = n * grad_stride_n + c.to(tl.int64) * grad_stride_c
    offs = offs + h.to(tl.int64) * grad_stride_h + w.to(tl.int64) * grad_stride_w
    tl.store(grad_ptr + offs, grad.to(grad_ptr.dtype.element_ty), mask=(c < C) & (h < H))


@triton.jit
def matrix_kernel(
    logits_ptr, affinity_ptr,
    C, H, W, L,
    stride_n, stride_c, stride_h, stride_w,
    GRIDS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(L, BLOCK_I)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    logits_ptr += n * stride_n
    c = tl.arange(0, BLOCK_C)[:, None]
    i = (tl.program_id(0) % blocks) * BLOCK_I + tl.arange(0, BLOCK_I)
    j = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    h_i, w_i, _times_i, _first_i = grid_point(i[None, :], L, H, W, GRIDS)
    h_j, w_j, _times_j, _first_j = grid_point(j[None, :], L, H, W, GRIDS)
    x_i = load_logits(logits_ptr, c, h_i, w_i, h_i >= 0, C, stride_c, stride_h, stride_w)
    x_j = load_logits(logits_ptr, c, h_j, w_j, h_j >= 0, C, stride_c, stride_h, stride_w)
    # Class 0 plays the label: any will do for the square roots alone.
    top_i, scale_i, _own_s_i, _own_q_i = statistics(x_i, c, tl.zeros_like(h_i))
    top_j, scale_j, _own_s_j, _own_q_j = statistics(x_j, c, tl.zeros_like(h_j))
    affinity = tl.zeros((BLOCK_I, BLOCK_I), tl.float32)
    for start in range(0, BLOCK_C, BLOCK_A):
        a = start + tl.arange(0, BLOCK_A)[:, None]
        x_ai = load_logits(logits_ptr, a, h_i, w_i, h_i >= 0, C, stride_c, stride_h, stride_w)
        x_aj = load_logits(logits_ptr, a, h_j, w_j, h_j >= 0, C, stride_c, stride_h, stride_w)
        s_i = tl.exp((x_ai - top_i) * 0.5) * scale_i
        s_j = tl.exp((x_aj - top_j) * 0.5) * scale_j
        affinity += tl.dot(tl.trans(s_i), s_j, input_precision="ieee")
    offs = n * L * L + i.to(tl.int64)[:, None] * L + j[None, :]
    tl.store(affinity_ptr + offs, affinity, mask=(i < L)[:, None] & (j < L)[None, :])


def forward(
    logits: Tensor, target: Tensor, grid_sizes: list[int], ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Squared error and number of pairs (N,); the Gram matrices (N, 3, C, C), none with grids."""
    n, num_classes, height, width = logits.shape
    if grid_sizes:
        points = sum(size * size for size in grid_sizes)
        blocks = pairs_blocks(logits, points)
        programs = triton.cdiv(points, blocks["BLOCK_I"] * blocks["STEPS_I"])
        error = logits.new_empty(n, programs, dtype=torch.float32)
        pair_count = logits.new_empty(n, dtype=torch.int64)
        if n > 0:
            with on_device(logits):
                pairs_kernel[(n * programs,)](
                    logits, target, error, pair_count, num_classes, height, width, points,
                    *logits.stride(), *target.stride(), ignore_index,
                    GRIDS=tuple(grid_sizes), **blocks,
                )  # fmt: skip
        squared_error = error.view(n) if programs == 1 else error.sum(dim=1)
        gram = logits.new_empty(n, 0, num_classes, num_classes, dtype=torch.float64)
        return squared_error, pair_count, gram

    blocks = gram_blocks(logits)
    splits = triton.cdiv(height * width, blocks["BLOCK_P"] * blocks["STEPS"])
    partial = logits.new_empty(splits, n, 2, num_classes, num_classes, dtype=torch.float64)
    count = logits.new_empty(splits, n, num_classes, dtype=torch.int32)
    if n > 0:
        tiles = triton.cdiv(num_classes, blocks["BLOCK_A"])
        with on_device(logits):
            gram_kernel[(splits * n, tiles * tiles)](
                logits, target, partial, count, num_classes, height, width, n,
                *logits.stride(), *target.stride(), ignore_index, **blocks,
            )  # fmt: skip
    dd, dm = partial.sum(dim=0).unbind(1)
    labels = count.sum(dim=0)
    # M = D + 2 Y, and Y Y^T is diagonal.
    mm = dm + dm.mT - dd + torch.diag_embed(4 * labels.double())
    gram = torch.stack((dd, dm, mm), dim=1)
    return squared_error_of(gram).float(), labels.sum(dim=1).square(), gram


def backward(
    grad_squared_error: Tensor,
    logits: Tensor,
    target: Tensor,
    gram: Tensor,
    grid_sizes: list[int],
    ignore_index: int,
) -> Tensor:
    """The gradient with respect to the logits, given that with respect to the squared errors."""
    n, num_classes, height, width = logits.shape
    if grid_sizes:
        grad = torch.zeros_like(logits)
        points = sum(size * size for size in grid_sizes)
        blocks = pairs_gradient_blocks(logits, points)
        if n > 0:
            with on_device(logits):
                pairs_gradient_kernel[(n * triton.cdiv(points, blocks["BLOCK_I"]),)](
                    grad_squared_error, logits, target, grad, num_classes, height, width, points,
                    *logits.stride(), *target.stride(), *grad.stride(), ignore_index,
                    GRIDS=tuple(grid_sizes), **blocks,
                )  # fmt: skip
        return grad

    grad = torch.empty_like(logits)
    # Of D and M; M = D + 2 Y.
    of_d, of_m = factors(gram, grad_squared_error).chunk(2, dim=2)
    factor = torch.cat((of_d + of_m, 2 * of_m), dim=2).float()
    blocks = gradient_blocks(logits)
    if n > 0:
        with on_device(logits):
            gradient_kernel[(n * triton.cdiv(height * width, blocks["BLOCK_P"]),)](
                factor, logits, target, grad, num_classes, height, width, height * width,
                *logits.stride(), *target.stride(), *grad.stride(), ignore_index, **blocks,
            )  # fmt: skip
    return grad


def square_root_affinity(logits: Tensor, grid_sizes: list[int]) -> Tensor:
    """S^T S at the points: (N, L, L)."""
    n, num_classes, height, width = logits.shape
    points = sum(size * size for size in grid_sizes) if grid_sizes else height * width
    affinity = logits.new_empty(n, points, points, dtype=torch.float32)
    blocks = matrix_blocks(logits)
    tiles = triton.cdiv(points, blocks["BLOCK_I"])
    if n > 0:
        with on_device(logits):
            matrix_kernel[(n * tiles, tiles)](
                logits, affinity, num_classes, height, width, points, *logits.stride(),
                GRIDS=tuple(grid_sizes), **blocks,
            )  # fmt: skip
    return affinity


def all_classes(logits: Tensor) -> dict[str, int]:
    """A matrix product takes 16 of everything at least."""
    block_c = max(16, triton.next_power_of_2(logits.shape[1]))
    return {"BLOCK_C": block_c, "num_warps": 8 if block_c > 64 else 4}


def pairs_blocks(logits: Tensor, points: int) -> dict[str, int]:
    block = 32 if logits.shape[1] <= 64 else 16
    if logits.device.type == "cpu":  # the interpreter takes its time per step, whatever the size
        block = 128
    return {
        **all_classes(logits),
        "BLOCK_A": 16,
        "BLOCK_I": block,
        "BLOCK_J": block,
        "STEPS_I": triton.cdiv(min(points, POINTS_PER_PROGRAM), block),
        "STEPS_J": triton.cdiv(points, block),
    }


def pairs_gradient_blocks(logits: Tensor, points: int) -> dict[str, int]:
    classes = all_classes(logits)
    block = 128 if logits.device.type == "cpu" else 16
    return {
        **classes,
        "BLOCK_A": min(32, classes["BLOCK_C"]),
        "BLOCK_I": block,
        "BLOCK_J": block,
        "STEPS_J": triton.cdiv(points, block),
    }


def gram_blocks(logits: Tensor) -> dict[str, int]:
    classes = all_classes(logits)
    block_p = max(16, min(32, 1024 // classes["BLOCK_C"]))
    pixels = max(GRAM_PIXELS, GRAM_PIXELS_PER_CLASS * classes["BLOCK_C"])
    if logits.device.type == "cpu":
        block_p, pixels = 256, 1024
    return {
        **classes,
        "BLOCK_P": block_p,
        "BLOCK_A": min(32, classes["BLOCK_C"]),
        "STEPS": pixels // block_p,
    }


def gradient_blocks(logits: Tensor) -> dict[str, int]:
    classes = all_classes(logits)
    block_p = max(16, min(32, 1024 // classes["BLOCK_C"]))
    return {
        **classes,
        "BLOCK_P": 512 if logits.device.type == "cpu" else block_p,
        "BLOCK_A": 32 if classes["BLOCK_C"] == 32 else 16,
    }


def matrix_blocks(logits: Tensor) -> dict[str, int]:
    block = 128 if logits.device.type == "cpu" else 32
    return {**all_classes(logits), "BLOCK_A": 16, "BLOCK_I": block}
