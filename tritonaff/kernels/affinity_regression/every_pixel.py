"""Every pixel, linear in their number: the Gram matrices and the gradient, all classes in one
block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tritonaff.kernels.affinity_regression.roots import (
    Points,
    load_logits,
    load_roots,
    own_and_others,
    roots,
    statistics,
    through_softmax,
)
from tritonaff.kernels.shared import first_pixel, load_label


@triton.jit
def gram_kernel(
    logits_ptr, target_ptr, gram_ptr, count_ptr,
    HW, N, stride_n, stride_c, stride_p, ignore_index,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Y: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    # Partial matrices D [D; Y]^T: [splits, N, C, 2C]. Labels by class: [splits, N, C].
    split, n = tl.program_id(0) // N, (tl.program_id(0) % N).to(tl.int64)
    logits_ptr += n * stride_n
    target_ptr += n * HW
    # [BLOCK_C, 1]
    c = tl.arange(0, BLOCK_C)[:, None]
    # D D^T is as wide as a block: its unused columns take the first rows of Y, dy the rest.
    # [BLOCK_Y, 1]
    rest = BLOCK_C + tl.arange(0, BLOCK_Y)[:, None]
    # In float64: the matrices cancel where the predictions of a label are nearly the same.
    # [BLOCK_C, BLOCK_C]
    dd = tl.zeros((BLOCK_C, BLOCK_C), tl.float64)
    # [BLOCK_C, BLOCK_Y]
    dy = tl.zeros((BLOCK_C, BLOCK_Y), tl.float64)
    # [BLOCK_C, BLOCK_P]
    count = tl.zeros((BLOCK_C, BLOCK_P), tl.int32)
    # Registers are better spent on more programs than on prefetching for the next step.
    for step in tl.range(STEPS, num_stages=1):
        pixel = (split.to(tl.int64) * STEPS + step) * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
        # [1, BLOCK_P]
        label = load_label(target_ptr, 0 * pixel, pixel, 1, HW, C, 0, 1, ignore_index)
        place = pixel * stride_p
        # [BLOCK_C, BLOCK_P]
        x = load_logits(logits_ptr, c, place, label >= 0, C, stride_c)
        top, scale, own_s, own_q = statistics(x, c, label)
        # [BLOCK_C, BLOCK_P] each
        _s, d, _m = roots(x, c, Points(place, label, top, scale, own_s, own_q))
        d_and_y = tl.where(c < C, d, tl.where(c == C + label, 1.0, 0.0))
        # [BLOCK_Y, BLOCK_P]
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
    # [BLOCK_C, 1]
    c = tl.arange(0, BLOCK_C)[:, None]
    # [1, BLOCK_P]
    label = load_label(target_ptr, 0 * pixel, pixel, 1, HW, C, 0, 1, ignore_index)
    # [BLOCK_C, BLOCK_P]
    x = load_logits(logits_ptr, c, place, label >= 0, C, stride_c)
    top, scale, own_s, own_q = statistics(x, c, label)
    points = Points(place, label, top, scale, own_s, own_q)
    # The product with Y is a column of its matrix.
    labelled = (c < C) & (label >= 0)
    # [BLOCK_C, BLOCK_P]
    grad_s = tl.load(factor_ptr + c * 2 * C + C + label, mask=labelled, other=0.0)
    # The product with D goes class by class: a thread has its pixels' classes in registers, and no
    # other needs them.
    for a in range(C):
        # [1, BLOCK_P] each
        _s, d, _m = load_roots(logits_ptr, a + tl.zeros_like(label), points, C, stride_c)
        # [BLOCK_C, 1]
        factor = tl.load(factor_ptr + c * 2 * C + a, mask=c < C, other=0.0)
        # C is a constant: rows beyond it are left out when this is compiled.
        grad_s = tl.where(c < C, grad_s + factor * d, 0.0)
    # [BLOCK_C, BLOCK_P] each
    s, _d, _m = roots(x, c, points)
    product = grad_s * s
    own_product, others = own_and_others(product, c, label)
    grad = through_softmax(product, own_product, others, s, c, points)
    offs = n * grad_stride_n + c.to(tl.int64) * grad_stride_c + pixel * grad_stride_p
    tl.store(grad_ptr + offs, grad.to(grad_ptr.dtype.element_ty), mask=(c < C) & (pixel < HW))
