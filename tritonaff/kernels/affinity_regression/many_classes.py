"""Every pixel of more classes than one block holds: the same, block by block."""

from __future__ import annotations

import triton
import triton.language as tl

from tritonaff.kernels.affinity_regression.roots import (
    Points,
    load_logits,
    load_roots,
    own_and_others,
    statistics,
    through_softmax,
)
from tritonaff.kernels.shared import first_pixel, load_label


@triton.jit
def stored_points(label, statistics_ptr, pixel, HW, stride_p):
    """The Points of pixels, from the numbers that statistics_kernel has stored."""
    # [1, BLOCK_P] each
    numbers = ()
    for _k in tl.static_range(4):
        numbers += (tl.load(statistics_ptr + pixel, mask=label >= 0, other=0.0),)
        statistics_ptr += HW
    return Points(pixel * stride_p, label, numbers[0], numbers[1], numbers[2], numbers[3])


@triton.jit
def block_of_matrices(N, C: tl.constexpr, BLOCK_A: tl.constexpr, PIXELS: tl.constexpr):
    """This program's block of the matrices, its first row and first column; its partial matrix;
    its image and first pixel. Programs next to each other have the same pixels.
    """
    blocks = tl.cdiv(C, BLOCK_A)
    block = tl.program_id(0) % (blocks * blocks)
    partial = tl.program_id(0) // (blocks * blocks)
    split, n = (partial // N).to(tl.int64), (partial % N).to(tl.int64)
    start_row, start_column = (block // blocks) * BLOCK_A, (block % blocks) * BLOCK_A
    return start_row, start_column, partial.to(tl.int64), n, split * PIXELS


@triton.jit
def statistics_kernel(
    logits_ptr, target_ptr, statistics_ptr,
    HW, stride_n, stride_c, stride_p, ignore_index,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    # [N, 4, HW]
    n, first = first_pixel(HW, BLOCK_P)
    target_ptr += n * HW
    statistics_ptr += n * 4 * HW
    pixel = first + tl.arange(0, BLOCK_P)[None, :]
    c = tl.arange(0, BLOCK_C)[:, None]
    # [1, BLOCK_P]
    label = load_label(target_ptr, 0 * pixel, pixel, 1, HW, C, 0, 1, ignore_index)
    # [BLOCK_C, BLOCK_P]
    x = load_logits(logits_ptr + n * stride_n, c, pixel * stride_p, label >= 0, C, stride_c)
    # 4 x [1, BLOCK_P]
    numbers = statistics(x, c, label)
    for k in tl.static_range(4):
        tl.store(statistics_ptr + pixel, numbers[k], mask=pixel < HW)
        statistics_ptr += HW


@triton.jit
def block_gram_kernel(
    logits_ptr, target_ptr, statistics_ptr, gram_ptr,
    HW, N, stride_n, stride_c, stride_p, ignore_index,
    C: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_P: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    # A block of D D^T, where gram_kernel writes it, and the transposed one: it is symmetric.
    start_row, start_column, partial, n, first = block_of_matrices(N, C, BLOCK_A, BLOCK_P * STEPS)
    if start_row > start_column:
        return
    logits_ptr += n * stride_n
    target_ptr += n * HW
    statistics_ptr += n * 4 * HW
    # [BLOCK_A, 1] each
    row = start_row + tl.arange(0, BLOCK_A)[:, None]
    column = start_column + tl.arange(0, BLOCK_A)[:, None]
    # [BLOCK_A, BLOCK_A]
    dd = tl.zeros((BLOCK_A, BLOCK_A), tl.float64)
    steps = tl.minimum(tl.cdiv(HW - first, BLOCK_P), STEPS).to(tl.int32)
    for step in tl.range(steps, num_stages=1):
        pixel = first + step * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
        # [1, BLOCK_P]
        label = load_label(target_ptr, 0 * pixel, pixel, 1, HW, C, 0, 1, ignore_index)
        points = stored_points(label, statistics_ptr, pixel, HW, stride_p)
        # [BLOCK_A, BLOCK_P] each
        _s, d, _m = load_roots(logits_ptr, row, points, C, stride_c)
        _s, other_d, _m = load_roots(logits_ptr, column, points, C, stride_c)
        dd += tl.dot(d, tl.trans(other_d), input_precision="ieee").to(tl.float64)
    gram_ptr += partial * 2 * C * C
    column = tl.trans(column)
    inside = (row < C) & (column < C)
    tl.store(gram_ptr + row * 2 * C + column, dd, mask=inside)
    if start_row < start_column:
        tl.store(gram_ptr + column * 2 * C + row, dd, mask=inside)


@triton.jit
def block_labels_kernel(
    logits_ptr, target_ptr, statistics_ptr, gram_ptr, count_ptr,
    HW, N, stride_n, stride_c, stride_p, ignore_index,
    C: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_P: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    # A block of D Y^T, and the labels of its columns.
    start_row, start_column, partial, n, first = block_of_matrices(N, C, BLOCK_A, BLOCK_P * STEPS)
    logits_ptr += n * stride_n
    target_ptr += n * HW
    statistics_ptr += n * 4 * HW
    # [BLOCK_A, 1] each
    row = start_row + tl.arange(0, BLOCK_A)[:, None]
    column = start_column + tl.arange(0, BLOCK_A)[:, None]
    # [BLOCK_A, BLOCK_A]
    dy = tl.zeros((BLOCK_A, BLOCK_A), tl.float64)
    # [BLOCK_A, BLOCK_P]
    count = tl.zeros((BLOCK_A, BLOCK_P), tl.int32)
    steps = tl.minimum(tl.cdiv(HW - first, BLOCK_P), STEPS).to(tl.int32)
    for step in tl.range(steps, num_stages=1):
        pixel = first + step * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
        # [1, BLOCK_P]
        label = load_label(target_ptr, 0 * pixel, pixel, 1, HW, C, 0, 1, ignore_index)
        # Pixels next to each other have few labels: most blocks have none of them.
        here = (label >= start_column) & (label < start_column + BLOCK_A)
        if tl.max(tl.max(here.to(tl.int32), axis=1), axis=0) > 0:
            points = stored_points(label, statistics_ptr, pixel, HW, stride_p)
            # [BLOCK_A, BLOCK_P] each
            _s, d, _m = load_roots(logits_ptr, row, points, C, stride_c)
            own = column == label
            # [BLOCK_P, BLOCK_A]
            y = tl.trans(tl.where(own, 1.0, 0.0))
            dy += tl.dot(d, y, input_precision="ieee").to(tl.float64)
            count += own.to(tl.int32)
    gram_ptr += partial * 2 * C * C
    across = tl.trans(column)
    inside = (row < C) & (across < C)
    tl.store(gram_ptr + row * 2 * C + C + across, dy, mask=inside)
    if start_row == 0:
        labels = partial * C + column
        tl.store(count_ptr + labels, tl.sum(count, axis=1)[:, None], mask=column < C)


@triton.jit
def block_gradient_kernel(
    factor_ptr, logits_ptr, target_ptr, statistics_ptr, grad_ptr,
    HW, stride_n, stride_c, stride_p, grad_stride_n, grad_stride_c, grad_stride_p, ignore_index,
    C: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = (C + BLOCK_A - 1) // BLOCK_A
    n, first = first_pixel(HW, BLOCK_P)
    logits_ptr += n * stride_n
    factor_ptr += n * 2 * C * C
    pixel = first + tl.arange(0, BLOCK_P)[None, :]
    # [1, BLOCK_P]
    label = load_label(target_ptr + n * HW, 0 * pixel, pixel, 1, HW, C, 0, 1, ignore_index)
    points = stored_points(label, statistics_ptr + n * 4 * HW, pixel, HW, stride_p)
    # [BLOCK_A, 1]
    block = tl.arange(0, BLOCK_A)[:, None]
    grads_s = ()
    for k in tl.static_range(BLOCKS):
        # The product with Y is a column of its matrix.
        c = k * BLOCK_A + block
        labelled = (c < C) & (label >= 0)
        # [BLOCK_A, BLOCK_P]
        grads_s += (tl.load(factor_ptr + c * 2 * C + C + label, mask=labelled, other=0.0),)
    for start in range(0, C, BLOCK_D):
        a = start + tl.arange(0, BLOCK_D)[:, None]
        # [BLOCK_D, BLOCK_P] each
        _s, d, _m = load_roots(logits_ptr, a, points, C, stride_c)
        sums = ()
        for k in tl.static_range(BLOCKS):
            c = k * BLOCK_A + block
            inside = (c < C) & (tl.trans(a) < C)
            # [BLOCK_A, BLOCK_D]
            factor = tl.load(factor_ptr + c * 2 * C + tl.trans(a), mask=inside, other=0.0)
            sums += (tl.dot(factor, d, acc=grads_s[k], input_precision="ieee"),)
        grads_s = sums
    # [1, BLOCK_P]
    own_product = tl.zeros((1, BLOCK_P), tl.float32)
    # [1, BLOCK_P]
    others = tl.zeros((1, BLOCK_P), tl.float32)
    for k in tl.static_range(BLOCKS):
        c = k * BLOCK_A + block
        # [BLOCK_A, BLOCK_P] each
        s, _d, _m = load_roots(logits_ptr, c, points, C, stride_c)
        block_own, block_others = own_and_others(grads_s[k] * s, c, label)
        own_product += block_own
        others += block_others
    for k in tl.static_range(BLOCKS):
        c = k * BLOCK_A + block
        # [BLOCK_A, BLOCK_P] each
        s, _d, _m = load_roots(logits_ptr, c, points, C, stride_c)
        product = grads_s[k] * s
        grad = through_softmax(product, own_product, others, s, c, points)
        offs = n * grad_stride_n + c.to(tl.int64) * grad_stride_c + pixel * grad_stride_p
        tl.store(grad_ptr + offs, grad.to(grad_ptr.dtype.element_ty), mask=(c < C) & (pixel < HW))
