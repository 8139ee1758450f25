"""Triton tiles of affinity regression.

With the square roots of the probabilities S (C, L) and the one-hot labels Y, a point has the
columns d of D = S - Y and m of M = S + Y. The difference of both affinities of a pair is
(d_i . m_j + m_i . d_j) / 2, which keeps its digits where the prediction is right.
docs/affinity_regression.md derives the rest.

At the points of grids, few enough for all pairs:

    pairs_kernel           a block of points against all others -> squared error, one launch
    pairs_gradient_kernel  the same -> d loss / d logits at these points; other programs of the
                           same launch write zeros to the other pixels

Every pixel, linear in their number:

    gram_kernel            pixels of one image, all classes -> partial D D^T, D Y^T
    gradient_kernel        pixels, all classes -> d loss / d logits

and of more than 32 classes, or 64 for the gradient:

    statistics_kernel      pixels, all classes -> what square roots of single classes need
    block_gram_kernel      pixels of one image, two blocks of classes -> partial D D^T
    block_labels_kernel    the same -> partial D Y^T
    block_gradient_kernel  pixels, all blocks of classes -> d loss / d logits

    matrix_kernel          a block of points against another -> the matrix A itself, for people

Half precision is read as it is; products are float32 in full precision ("ieee"), and so are sums,
except those of the Gram matrices, which are float64. Grid sizes, numbers of classes and blocks
compile anew, image sizes do not.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonaff.kernels.shared import (
    INTERPRETED,
    cdiv,
    even_strides,
    evenly_spaced,
    first_pixel,
    launch,
    load_label,
    next_power_of_2,
    rows_and_columns,
)
from tritonaff.portable.affinity_regression import factors, squared_error_of
from tritonaff.portable.blocks import in_layout_of

# Pixels per class that one program adds up: so many that the partial matrices stay below an eighth
# of float32 logits. A quarter as many where there would be too few programs for a GPU.
GRAM_PIXELS_PER_CLASS, GRAM_PROGRAMS = 32, 1024
# More classes than these are cut into blocks of 32: by the Gram matrices, by the gradient.
GRAM_CLASSES, GRADIENT_CLASSES = 32, 64
# Points i that one program compares with all others.
POINTS_PER_PROGRAM = 256


# exp(x / 2) = 2^(x HALF_LOG2_E).
HALF_LOG2_E = tl.constexpr(0.5 / math.log(2))


@triton.jit
def steps_of(h, H, size):
    """The first of the steps i = 0, 1, ... of a grid whose rows i H // size are h, and how many."""
    first = tl.cdiv(h * size, H)
    return first, tl.cdiv((h + 1) * size, H) - first


@triton.jit
def times_sampled(h, w, H, W, GRIDS: tl.constexpr):
    """How many sample points this pixel is."""
    times = tl.zeros_like(h)
    for k in tl.static_range(len(GRIDS)):
        _first_i, rows = steps_of(h, H, GRIDS[k])
        _first_j, columns = steps_of(w, W, GRIDS[k])
        times += rows * columns
    return times


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
            first_i, rows = steps_of(h, H, GRIDS[k])
            first_j, columns = steps_of(w, W, GRIDS[k])
            first = first & (~inside | ((times == 0) & (i == first_i) & (j == first_j)))
            times += rows * columns
            start += GRIDS[k] * GRIDS[k]
    return tl.where(index < L, h, -1), w, times, first


@triton.jit
def place_of(h, w, stride_h, stride_w):
    """Where a pixel's first class is, in numbers from the image's first."""
    return h.to(tl.int64) * stride_h + w.to(tl.int64) * stride_w


@triton.jit
def load_logits(logits_ptr, c, place, mask, C, stride_c):
    """(BLOCK_C, points), -inf where masked and in classes that do not exist."""
    offs = c.to(tl.int64) * stride_c + place
    return tl.load(logits_ptr + offs, mask=mask & (c < C), other=-float("inf")).to(tl.float32)


@triton.jit
def half_exp(x, top):
    """exp((x - top) / 2)."""
    return tl.exp2((x - top) * HALF_LOG2_E)


@triton.jit
def statistics(x, c, label):
    """Of points (1, P) with all their classes: the largest logit, what to multiply
    exp((x - largest) / 2) by for the square root of p, that root and 1 - p in the label's channel.

    Where a point does not count its logits are -inf, and such is what this gives that S is 0.
    """
    counts = label >= 0
    top = tl.where(counts, tl.max(x, axis=0)[None, :], 0.0)
    half = half_exp(x, top)
    own = c == label
    own_half = tl.sum(tl.where(own, half, 0.0), axis=0)[None, :]
    # 1 - p is the sum of the others: all digits where p is near 1.
    others = tl.sum(tl.where(own, 0.0, half * half), axis=0)[None, :]
    total = tl.where(counts, others + own_half * own_half, 1.0)
    scale = 1 / tl.sqrt(total)
    return top, scale, own_half * scale, others / total


@triton.jit
def roots(x, c, label, top, scale, own_s, own_q):
    """S, D = S - Y and M = S + Y of some classes of points."""
    s = half_exp(x, top) * scale
    own = c == label
    # Not s - 1: near 1 that would round away what is left.
    d = tl.where(own, -own_q / (1 + own_s), s)
    return s, d, tl.where(own, own_s + 1, s)


@triton.jit
def load_roots(logits_ptr, c, points, C, stride_c):
    """:func:`roots` of some classes of points as :func:`load_statistics` gives them."""
    place, label, top, scale, own_s, own_q = points
    x = load_logits(logits_ptr, c, place, label >= 0, C, stride_c)
    return roots(x, c, label, top, scale, own_s, own_q)


@triton.jit
def load_statistics(
    logits_ptr, target_ptr, h, w, H, W, C,
    stride_c, stride_h, stride_w, target_stride_h, target_stride_w, ignore_index,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The places and labels of points, and what :func:`statistics` gives of them."""
    c = tl.arange(0, BLOCK_C)[:, None]
    label = load_label(target_ptr, h, w, H, W, C, target_stride_h, target_stride_w, ignore_index)
    place = place_of(h, w, stride_h, stride_w)
    x = load_logits(logits_ptr, c, place, label >= 0, C, stride_c)
    top, scale, own_s, own_q = statistics(x, c, label)
    return place, label, top, scale, own_s, own_q


@triton.jit
def twice_difference(
    logits_ptr, C, stride_c, points_i, points_j,
    BLOCK_C: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """2 (A - M) of the points j (rows) and i (columns), some classes at a time: a product of all
    would not fit the registers.
    """
    result = tl.zeros((BLOCK_J, BLOCK_I), tl.float32)
    for start in range(0, BLOCK_C, BLOCK_A):
        a = start + tl.arange(0, BLOCK_A)[:, None]
        _s_i, d_i, m_i = load_roots(logits_ptr, a, points_i, C, stride_c)
        _s_j, d_j, m_j = load_roots(logits_ptr, a, points_j, C, stride_c)
        result += tl.dot(tl.trans(d_j), m_i, input_precision="ieee")
        result += tl.dot(tl.trans(m_j), d_i, input_precision="ieee")
    return result


@triton.jit
def own_and_others(product, c, label):
    """What sums over some classes give: in the label's channel, and in the others."""
    own = c == label
    own_product = tl.sum(tl.where(own, product, 0.0), axis=0)[None, :]
    return own_product, tl.sum(tl.where(own, 0.0, product), axis=0)[None, :]


@triton.jit
def through_softmax(product, own_product, others, s, c, label, own_s, own_q):
    """The gradient of the logits (S G - p <S, G>) / 2 from the product S G and its sums."""
    # Where p is near 1 its channel would subtract nearly equal numbers.
    own_grad = own_q * own_product - own_s * own_s * others
    return tl.where(c == label, own_grad, product - s * s * (own_product + others)) * 0.5


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
    error = tl.zeros((1, BLOCK), tl.float32)
    count = tl.zeros((1,), tl.int64)
    for step in range(STEPS):
        start_i = (program * STEPS + step) * BLOCK
        i = start_i + tl.arange(0, BLOCK)[None, :]
        h_i, w_i, _times_i, _first_i = grid_point(i, L, H, W, GRIDS)
        points_i = load_statistics(
            logits_ptr, target_ptr, h_i, w_i, H, W, C,
            stride_c, stride_h, stride_w, target_stride_h, target_stride_w, ignore_index, BLOCK_C,
        )  # fmt: skip
        # The matrix is symmetric: what lies before this block has met it.
        start_j = start_i
        while start_j < L:
            j = start_j + tl.arange(0, BLOCK)[None, :]
            h_j, w_j, _times_j, _first_j = grid_point(j, L, H, W, GRIDS)
            points_j = load_statistics(
                logits_ptr, target_ptr, h_j, w_j, H, W, C,
                stride_c, stride_h, stride_w, target_stride_h, target_stride_w, ignore_index,
                BLOCK_C,
            )  # fmt: skip
            difference = twice_difference(
                logits_ptr, C, stride_c, points_i, points_j,
                BLOCK_C, BLOCK_A, BLOCK, BLOCK,
            )  # fmt: skip
            times = tl.where(start_j == start_i, 1, 2)
            error += times * tl.sum(difference * difference, axis=0)[None, :]
            # The first block meets all.
            _place_j, label_j, _top_j, _scale_j, _own_s_j, _own_q_j = points_j
            met_by_first = (label_j >= 0) & (start_i == 0)
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
    """To those of this program's pixels that are no sample points."""
    programs = tl.cdiv(HW, BLOCK_P)
    n = (program // programs).to(tl.int64)
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
    # Points first, which take longest; the other programs write what lies between them.
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
    points_i = load_statistics(
        logits_ptr, target_ptr, h_i, w_i, H, W, C,
        stride_c, stride_h, stride_w, target_stride_h, target_stride_w, ignore_index, BLOCK_C,
    )  # fmt: skip
    grad_s = tl.zeros((BLOCK_C, BLOCK_I), tl.float32)
    for step in range(STEPS_J):
        j = step * BLOCK_J + tl.arange(0, BLOCK_J)[None, :]
        h_j, w_j, _times_j, _first_j = grid_point(j, L, H, W, GRIDS)
        points_j = load_statistics(
            logits_ptr, target_ptr, h_j, w_j, H, W, C,
            stride_c, stride_h, stride_w, target_stride_h, target_stride_w, ignore_index, BLOCK_C,
        )  # fmt: skip
        difference = twice_difference(
            logits_ptr, C, stride_c, points_i, points_j,
            BLOCK_C, BLOCK_A, BLOCK_I, BLOCK_J,
        )  # fmt: skip
        s_j, _d_j, _m_j = load_roots(logits_ptr, c, points_j, C, stride_c)
        grad_s += tl.dot(s_j, difference, input_precision="ieee")
    # d error / d S = 4 S (A - M).
    grad_s *= 2 * tl.load(grad_error_ptr + n)
    s_i, _d_i, _m_i = load_roots(logits_ptr, c, points_i, C, stride_c)
    _place_i, label_i, _top_i, _scale_i, own_s_i, own_q_i = points_i
    product = grad_s * s_i
    own_product, others = own_and_others(product, c, label_i)
    grad = through_softmax(product, own_product, others, s_i, c, label_i, own_s_i, own_q_i) * times
    offs = n * grad_stride_n + c.to(tl.int64) * grad_stride_c
    offs = offs + h_i.to(tl.int64) * grad_stride_h + w_i.to(tl.int64) * grad_stride_w
    # Points that are the same pixel have the same gradient: the first one writes it, that of all.
    tl.store(grad_ptr + offs, grad.to(grad_ptr.dtype.element_ty), mask=(c < C) & first)


@triton.jit
def gram_kernel(
    logits_ptr, target_ptr, gram_ptr, count_ptr,
    HW, N, stride_n, stride_c, stride_p, ignore_index,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Y: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    # Partial matrices D [D; Y]^T: (splits, N, C, 2C). Labels by class: (splits, N, C).
    split, n = tl.program_id(0) // N, (tl.program_id(0) % N).to(tl.int64)
    logits_ptr += n * stride_n
    target_ptr += n * HW
    c = tl.arange(0, BLOCK_C)[:, None]
    # D D^T is as wide as a block: what is left of it takes the first rows of Y.
    rest = BLOCK_C + tl.arange(0, BLOCK_Y)[:, None]
    # The matrices cancel where the predictions of a label are nearly the same.
    dd = tl.zeros((BLOCK_C, BLOCK_C), tl.float64)
    dy = tl.zeros((BLOCK_C, BLOCK_Y), tl.float64)
    count = tl.zeros((BLOCK_C, BLOCK_P), tl.int32)
    # Registers are better spent on more programs than on what the next step will need.
    for step in tl.range(STEPS, num_stages=1):
        pixel = (split.to(tl.int64) * STEPS + step) * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
        label = load_label(target_ptr, 0 * pixel, pixel, 1, HW, C, 0, 1, ignore_index)
        x = load_logits(logits_ptr, c, pixel * stride_p, label >= 0, C, stride_c)
        top, scale, own_s, own_q = statistics(x, c, label)
        _s, d, _m = roots(x, c, label, top, scale, own_s, own_q)
        d_and_y = tl.where(c < C, d, tl.where(c == C + label, 1.0, 0.0))
        y = tl.where(rest == C + label, 1.0, 0.0)
        dd += tl.dot(d, tl.trans(d_and_y), input_precision="ieee").to(tl.float64)
        dy += tl.dot(d, tl.trans(y), input_precision="ieee").to(tl.float64)
        count += tl.where((c < C) & (c == label), 1, 0)
    offs = tl.program_id(0).to(tl.int64) * 2 * C * C + c * 2 * C
    column, rest = tl.trans(c), tl.trans(rest)
    tl.store(gram_ptr + offs + column, dd, mask=(c < C) & (column < 2 * C))
    tl.store(gram_ptr + offs + rest, dy, mask=(c < C) & (rest < 2 * C))
    labels = tl.program_id(0).to(tl.int64) * C + c
    tl.store(count_ptr + labels, tl.sum(count, axis=1)[:, None], mask=c < C)


@triton.jit
def gradient_kernel(
    factor_ptr, logits_ptr, target_ptr, grad_ptr,
    HW, stride_n, stride_c, stride_p, grad_stride_n, grad_stride_c, grad_stride_p, ignore_index,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    n, first = first_pixel(HW, BLOCK_P)
    logits_ptr += n * stride_n
    target_ptr += n * HW
    factor_ptr += n * 2 * C * C
    pixel = first + tl.arange(0, BLOCK_P)[None, :]
    place = pixel * stride_p
    c = tl.arange(0, BLOCK_C)[:, None]
    label = load_label(target_ptr, 0 * pixel, pixel, 1, HW, C, 0, 1, ignore_index)
    x = load_logits(logits_ptr, c, place, label >= 0, C, stride_c)
    top, scale, own_s, own_q = statistics(x, c, label)
    points = (place, label, top, scale, own_s, own_q)
    # The product with Y is a column of its matrix.
    labelled = (c < C) & (label >= 0)
    grad_s = tl.load(factor_ptr + c * 2 * C + C + label, mask=labelled, other=0.0)
    # That with D goes class by class: a thread has its pixels' classes in registers, and no other
    # needs them.
    for a in range(C):
        _s, d, _m = load_roots(logits_ptr, a + tl.zeros_like(label), points, C, stride_c)
        factor = tl.load(factor_ptr + c * 2 * C + a, mask=c < C, other=0.0)
        # C is a constant: rows beyond it are left out when this is compiled.
        grad_s = tl.where(c < C, grad_s + factor * d, 0.0)
    s, _d, _m = roots(x, c, label, top, scale, own_s, own_q)
    product = grad_s * s
    own_product, others = own_and_others(product, c, label)
    grad = through_softmax(product, own_product, others, s, c, label, own_s, own_q)
    offs = n * grad_stride_n + c.to(tl.int64) * grad_stride_c + pixel * grad_stride_p
    tl.store(grad_ptr + offs, grad.to(grad_ptr.dtype.element_ty), mask=(c < C) & (pixel < HW))


@triton.jit
def statistics_kernel(
    logits_ptr, target_ptr, statistics_ptr,
    HW, stride_n, stride_c, stride_p, ignore_index,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    # (N, 4, HW)
    n, first = first_pixel(HW, BLOCK_P)
    target_ptr += n * HW
    statistics_ptr += n * 4 * HW
    pixel = first + tl.arange(0, BLOCK_P)[None, :]
    c = tl.arange(0, BLOCK_C)[:, None]
    label = load_label(target_ptr, 0 * pixel, pixel, 1, HW, C, 0, 1, ignore_index)
    x = load_logits(logits_ptr + n * stride_n, c, pixel * stride_p, label >= 0, C, stride_c)
    numbers = statistics(x, c, label)
    for k in tl.static_range(4):
        tl.store(statistics_ptr + pixel, numbers[k], mask=pixel < HW)
        statistics_ptr += HW


@triton.jit
def load_points(label, statistics_ptr, pixel, HW, stride_p):
    """As :func:`load_statistics`, from what :func:`statistics_kernel` has stored."""
    points = (pixel * stride_p, label)
    for _k in tl.static_range(4):
        points += (tl.load(statistics_ptr + pixel, mask=label >= 0, other=0.0),)
        statistics_ptr += HW
    return points


@triton.jit
def block_of_matrices(N, C: tl.constexpr, BLOCK_A: tl.constexpr, PIXELS: tl.constexpr):
    """What this program works on: the first row and the first column of its block; which partial
    matrix; image and first pixel. Programs next to each other have the same pixels.
    """
    blocks = tl.cdiv(C, BLOCK_A)
    block = tl.program_id(0) % (blocks * blocks)
    partial = tl.program_id(0) // (blocks * blocks)
    split, n = (partial // N).to(tl.int64), (partial % N).to(tl.int64)
    start_row, start_column = (block // blocks) * BLOCK_A, (block % blocks) * BLOCK_A
    return start_row, start_column, partial.to(tl.int64), n, split * PIXELS


@triton.jit
def block_gram_kernel(
    logits_ptr, target_ptr, statistics_ptr, gram_ptr,
    HW, N, stride_n, stride_c, stride_p, ignore_index,
    C: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_P: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    # A block of D D^T, where gram_kernel writes it, and the one across, for it is symmetric.
    start_row, start_column, partial, n, first = block_of_matrices(N, C, BLOCK_A, BLOCK_P * STEPS)
    if start_row > start_column:
        return
    logits_ptr += n * stride_n
    target_ptr += n * HW
    statistics_ptr += n * 4 * HW
    row = start_row + tl.arange(0, BLOCK_A)[:, None]
    column = start_column + tl.arange(0, BLOCK_A)[:, None]
    dd = tl.zeros((BLOCK_A, BLOCK_A), tl.float64)
    steps = tl.minimum(tl.cdiv(HW - first, BLOCK_P), STEPS).to(tl.int32)
    for step in tl.range(steps, num_stages=1):
        pixel = first + step * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
        label = load_label(target_ptr, 0 * pixel, pixel, 1, HW, C, 0, 1, ignore_index)
        points = load_points(label, statistics_ptr, pixel, HW, stride_p)
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
    row = start_row + tl.arange(0, BLOCK_A)[:, None]
    column = start_column + tl.arange(0, BLOCK_A)[:, None]
    dy = tl.zeros((BLOCK_A, BLOCK_A), tl.float64)
    count = tl.zeros((BLOCK_A, BLOCK_P), tl.int32)
    steps = tl.minimum(tl.cdiv(HW - first, BLOCK_P), STEPS).to(tl.int32)
    for step in tl.range(steps, num_stages=1):
        pixel = first + step * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
        label = load_label(target_ptr, 0 * pixel, pixel, 1, HW, C, 0, 1, ignore_index)
        # Pixels next to each other have few labels: most blocks none of them.
        here = (label >= start_column) & (label < start_column + BLOCK_A)
        if tl.max(tl.max(here.to(tl.int32), axis=1), axis=0) > 0:
            points = load_points(label, statistics_ptr, pixel, HW, stride_p)
            _s, d, _m = load_roots(logits_ptr, row, points, C, stride_c)
            own = column == label
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
    label = load_label(target_ptr + n * HW, 0 * pixel, pixel, 1, HW, C, 0, 1, ignore_index)
    points = load_points(label, statistics_ptr + n * 4 * HW, pixel, HW, stride_p)
    _place, _label, _top, _scale, own_s, own_q = points
    block = tl.arange(0, BLOCK_A)[:, None]
    grads_s = ()
    for k in tl.static_range(BLOCKS):
        # The product with Y is a column of its matrix.
        c = k * BLOCK_A + block
        labelled = (c < C) & (label >= 0)
        grads_s += (tl.load(factor_ptr + c * 2 * C + C + label, mask=labelled, other=0.0),)
    for start in range(0, C, BLOCK_D):
        a = start + tl.arange(0, BLOCK_D)[:, None]
        _s, d, _m = load_roots(logits_ptr, a, points, C, stride_c)
        sums = ()
        for k in tl.static_range(BLOCKS):
            c = k * BLOCK_A + block
            inside = (c < C) & (tl.trans(a) < C)
            factor = tl.load(factor_ptr + c * 2 * C + tl.trans(a), mask=inside, other=0.0)
            sums += (tl.dot(factor, d, acc=grads_s[k], input_precision="ieee"),)
        grads_s = sums
    own_product = tl.zeros((1, BLOCK_P), tl.float32)
    others = tl.zeros((1, BLOCK_P), tl.float32)
    for k in tl.static_range(BLOCKS):
        c = k * BLOCK_A + block
        s, _d, _m = load_roots(logits_ptr, c, points, C, stride_c)
        own_of_block, others_of_block = own_and_others(grads_s[k] * s, c, label)
        own_product += own_of_block
        others += others_of_block
    for k in tl.static_range(BLOCKS):
        c = k * BLOCK_A + block
        s, _d, _m = load_roots(logits_ptr, c, points, C, stride_c)
        product = grads_s[k] * s
        grad = through_softmax(product, own_product, others, s, c, label, own_s, own_q)
        offs = n * grad_stride_n + c.to(tl.int64) * grad_stride_c + pixel * grad_stride_p
        tl.store(grad_ptr + offs, grad.to(grad_ptr.dtype.element_ty), mask=(c < C) & (pixel < HW))


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
    i = (tl.program_id(0) % blocks) * BLOCK_I + tl.arange(0, BLOCK_I)
    j = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    h_i, w_i, _times_i, _first_i = grid_point(i[None, :], L, H, W, GRIDS)
    h_j, w_j, _times_j, _first_j = grid_point(j[None, :], L, H, W, GRIDS)
    place_i = place_of(h_i, w_i, stride_h, stride_w)
    place_j = place_of(h_j, w_j, stride_h, stride_w)
    x_i = load_logits(logits_ptr, c, place_i, h_i >= 0, C, stride_c)
    x_j = load_logits(logits_ptr, c, place_j, h_j >= 0, C, stride_c)
    # Class 0 plays the label: any will do for the square roots alone.
    top_i, scale_i, _own_s_i, _own_q_i = statistics(x_i, c, tl.where(h_i >= 0, 0, -1))
    top_j, scale_j, _own_s_j, _own_q_j = statistics(x_j, c, tl.where(h_j >= 0, 0, -1))
    affinity = tl.zeros((BLOCK_I, BLOCK_I), tl.float32)
    for start in range(0, BLOCK_C, BLOCK_A):
        a = start + tl.arange(0, BLOCK_A)[:, None]
        x_ai = load_logits(logits_ptr, a, place_i, h_i >= 0, C, stride_c)
        x_aj = load_logits(logits_ptr, a, place_j, h_j >= 0, C, stride_c)
        s_i = half_exp(x_ai, top_i) * scale_i
        s_j = half_exp(x_aj, top_j) * scale_j
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
        programs = cdiv(points, blocks["BLOCK"] * blocks["STEPS"])
        error = logits.new_empty(n, programs, dtype=torch.float32)
        pair_count = logits.new_empty(n, dtype=torch.int64)
        if n > 0:
            launch(pairs_kernel, (n * programs,),
                logits, target, error, pair_count, height, width, points,
                *logits.stride(), *target.stride(), ignore_index,
                GRIDS=tuple(grid_sizes), **blocks,
            )  # fmt: skip
        squared_error = error.view(n) if programs == 1 else error.sum(dim=1)
        gram = logits.new_empty(n, 0, num_classes, num_classes, dtype=torch.float64)
        return squared_error, pair_count, gram

    logits = evenly_spaced(logits)
    blocks = gram_blocks(logits)
    splits = cdiv(height * width, blocks["BLOCK_P"] * blocks["STEPS"])
    partial = logits.new_empty(splits, n, num_classes, 2 * num_classes, dtype=torch.float64)
    count = logits.new_empty(splits, n, num_classes, dtype=torch.int32)
    target = target.contiguous()
    if n > 0:
        pixels = height * width, n, *even_strides(logits), ignore_index
        if num_classes <= GRAM_CLASSES:
            launch(gram_kernel, (splits * n,), logits, target, partial, count, *pixels, **blocks)
        else:
            programs = splits * n * cdiv(num_classes, blocks["BLOCK_A"]) ** 2
            inputs = logits, target, statistics_of(logits, target, ignore_index)
            launch(block_gram_kernel, (programs,), *inputs, partial, *pixels, **blocks)
            launch(block_labels_kernel, (programs,), *inputs, partial, count, *pixels, **blocks)
    dd, dy = partial.sum(dim=0).chunk(2, dim=2)
    labels = count.sum(dim=0)
    # M = D + 2 Y, and Y Y^T is diagonal.
    dm = dd + 2 * dy
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
        grad = torch.empty_like(logits)
        points = sum(size * size for size in grid_sizes)
        blocks = pairs_gradient_blocks(logits, points)
        programs = cdiv(points, blocks["BLOCK_I"]) + cdiv(height * width, blocks["BLOCK_P"])
        if n > 0:
            launch(pairs_gradient_kernel, (n * programs,),
                grad_squared_error, logits, target, grad,
                height, width, points, n, height * width,
                *logits.stride(), *target.stride(), *grad.stride(), ignore_index,
                GRIDS=tuple(grid_sizes), **blocks,
            )  # fmt: skip
        return grad

    # Of D and M; M = D + 2 Y.
    of_d, of_m = factors(gram, grad_squared_error).chunk(2, dim=2)
    factor = torch.cat((of_d + of_m, 2 * of_m), dim=2).float()
    blocks = gradient_blocks(logits)
    programs = n * cdiv(height * width, blocks["BLOCK_P"])
    given, logits, target = logits, evenly_spaced(logits), target.contiguous()
    grad = evenly_spaced(torch.empty_like(logits))
    if n > 0:
        pixels = height * width, *even_strides(logits), *even_strides(grad), ignore_index
        if num_classes <= GRADIENT_CLASSES:
            launch(gradient_kernel, (programs,), factor, logits, target, grad, *pixels, **blocks)
        else:
            inputs = logits, target, statistics_of(logits, target, ignore_index)
            launch(block_gradient_kernel, (programs,), factor, *inputs, grad, *pixels, **blocks)
    return in_layout_of(given, grad)


def statistics_of(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """:func:`statistics` of all pixels of evenly spaced logits: (N, 4, H W)."""
    n, _, height, width = logits.shape
    result = logits.new_empty(n, 4, height * width, dtype=torch.float32)
    blocks = statistics_blocks(logits)
    launch(statistics_kernel, (n * cdiv(height * width, blocks["BLOCK_P"]),),
        logits, target, result, height * width, *even_strides(logits), ignore_index, **blocks,
    )  # fmt: skip
    return result


def square_root_affinity(logits: Tensor, grid_sizes: list[int]) -> Tensor:
    """S^T S at the points: (N, L, L)."""
    n, _, height, width = logits.shape
    points = sum(size * size for size in grid_sizes) if grid_sizes else height * width
    affinity = logits.new_empty(n, points, points, dtype=torch.float32)
    blocks = matrix_blocks(logits)
    tiles = cdiv(points, blocks["BLOCK_I"])
    if n > 0:
        launch(matrix_kernel, (n * tiles, tiles),
            logits, affinity, height, width, points, *logits.stride(),
            GRIDS=tuple(grid_sizes), **blocks,
        )  # fmt: skip
    return affinity


# Blocks are small because products in full precision keep their operands in registers: with 19 and
# with 150 classes they spill none on the GPUs that `tritonaff-bench static` compiles for, from
# Triton 3.7 on.
def all_classes(logits: Tensor) -> dict[str, int]:
    """A matrix product takes 16 of a side at least, and 8 of the second one."""
    block_c = max(16, next_power_of_2(logits.shape[1]))
    return {"C": logits.shape[1], "BLOCK_C": block_c, "num_warps": 8 if block_c > 64 else 4}


def pixels_per_program(logits: Tensor) -> int:
    """With all their classes. A thread has 64 elements at most, and of many classes fewer."""
    if INTERPRETED:
        return 512
    block_c = all_classes(logits)["BLOCK_C"]
    return (8192 if block_c <= 64 else 4096) // block_c


def pairs_blocks(logits: Tensor, points: int) -> dict[str, int]:
    classes = all_classes(logits)
    block = 64 if classes["BLOCK_C"] <= 32 else 32
    if INTERPRETED:  # the interpreter takes its time per step, whatever the size
        block = 128
    return {
        **classes,
        "BLOCK_A": classes["BLOCK_C"] if classes["BLOCK_C"] <= 32 else 16,
        "BLOCK": block,
        "STEPS": cdiv(min(points, POINTS_PER_PROGRAM), block),
    }


def pairs_gradient_blocks(logits: Tensor, points: int) -> dict[str, int]:
    classes = all_classes(logits)
    block = 128 if INTERPRETED else 16
    return {
        **classes,
        "BLOCK_A": min(32, classes["BLOCK_C"]),
        "BLOCK_I": block,
        "BLOCK_J": block,
        "BLOCK_P": pixels_per_program(logits),
        "STEPS_J": cdiv(points, block),
        "CHANNELS_LAST": logits.stride(1) == 1,
    }


def gram_blocks(logits: Tensor) -> dict[str, int]:
    classes = all_classes(logits)
    block_p, pixels = 32, GRAM_PIXELS_PER_CLASS * classes["BLOCK_C"]
    blocks = cdiv(classes["C"], GRAM_CLASSES)
    if logits[:, 0].numel() * blocks * (blocks + 1) // 2 < GRAM_PROGRAMS * pixels:
        pixels //= 4
    if INTERPRETED:  # as many pixels as elsewhere in a float32 sum
        pixels = 1024
    steps = {"BLOCK_P": block_p, "STEPS": pixels // block_p}
    if blocks > 1:
        return {"C": classes["C"], "BLOCK_A": GRAM_CLASSES, **steps}
    block_y = next_power_of_2(max(8, 2 * classes["C"] - classes["BLOCK_C"]))
    if block_y < 32:  # few enough registers for fewer threads, which repeat less
        classes["num_warps"] = 2
    return {**classes, "BLOCK_Y": block_y, **steps}


def statistics_blocks(logits: Tensor) -> dict[str, int]:
    return {**all_classes(logits), "BLOCK_P": 512 if INTERPRETED else 32, "num_warps": 4}


def gradient_blocks(logits: Tensor) -> dict[str, int]:
    classes = all_classes(logits)
    if classes["C"] > GRADIENT_CLASSES:
        block_p = 128 if INTERPRETED else 32
        return {"C": classes["C"], "BLOCK_A": 32, "BLOCK_D": 16, "BLOCK_P": block_p}
    return {**classes, "BLOCK_P": pixels_per_program(logits)}


def matrix_blocks(logits: Tensor) -> dict[str, int]:
    block = 128 if INTERPRETED else 32
    return {**all_classes(logits), "BLOCK_A": 16, "BLOCK_I": block}
