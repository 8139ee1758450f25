from __future__ import annotations

import math

import triton
import triton.language as tl

from tritonaff.kernels.shared import load_label

# exp(x / 2) = 2^(x HALF_LOG2_E).
HALF_LOG2_E = tl.constexpr(0.5 / math.log(2))


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
