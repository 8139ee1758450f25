"""Square roots S of the probabilities, D = S - Y and M = S + Y, at points or pixels.

P is the number of points that a block holds. A point is known by six numbers, each [1, P], the
NamedTuple Points.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl

from tritonaff.kernels.shared import load_label

# exp(x / 2) = 2^(x HALF_LOG2_E).
HALF_LOG2_E = tl.constexpr(0.5 / math.log(2))


class Points(NamedTuple):
    """Numbers of points, [1, P] each."""

    place: Any
    """Offset of the first class from the image's first element."""
    label: Any
    """-1 where the point does not count."""
    top: Any
    """The largest logit."""
    scale: Any
    """The square root of p is exp((x - top) / 2) times this."""
    own_s: Any
    """The square root of p in the label's channel."""
    own_q: Any
    """1 - p in the label's channel."""


@triton.jit
def place_of(h, w, stride_h, stride_w):
    """Offset of a pixel's first class from the image's first element."""
    return h.to(tl.int64) * stride_h + w.to(tl.int64) * stride_w


@triton.jit
def load_logits(logits_ptr, c, place, mask, C, stride_c):
    """Loads logits [BLOCK_C, P]: -inf where masked and in classes that do not exist."""
    offs = c.to(tl.int64) * stride_c + place
    return tl.load(logits_ptr + offs, mask=mask & (c < C), other=-float("inf")).to(tl.float32)


@triton.jit
def half_exp(x, top):
    """exp((x - top) / 2)."""
    return tl.exp2((x - top) * HALF_LOG2_E)


@triton.jit
def statistics(x, c, label):
    """Top, scale, own_s and own_q of Points, from logits [BLOCK_C, P] of all classes.

    Where a point does not count its logits are -inf; there S comes out as 0.
    """
    counts = label >= 0
    # [1, P]
    top = tl.where(counts, tl.max(x, axis=0)[None, :], 0.0)
    # [BLOCK_C, P]
    half = half_exp(x, top)
    own = c == label
    own_half = tl.sum(tl.where(own, half, 0.0), axis=0)[None, :]
    # 1 - p is the sum of the others: all digits where p is near 1.
    others = tl.sum(tl.where(own, 0.0, half * half), axis=0)[None, :]
    # [1, P]
    total = tl.where(counts, others + own_half * own_half, 1.0)
    scale = 1 / tl.sqrt(total)
    return top, scale, own_half * scale, others / total


@triton.jit
def roots(x, c, points):
    """S, D and M of some classes, [BLOCK_C, P] each."""
    s = half_exp(x, points.top) * points.scale
    own = c == points.label
    # Not s - 1: near 1 that would round away the difference.
    d = tl.where(own, -points.own_q / (1 + points.own_s), s)
    return s, d, tl.where(own, points.own_s + 1, s)


@triton.jit
def load_roots(logits_ptr, c, points, C, stride_c):
    """Loads the logits of some classes; S, D and M, [BLOCK_C, P] each."""
    x = load_logits(logits_ptr, c, points.place, points.label >= 0, C, stride_c)
    return roots(x, c, points)


@triton.jit
def load_points(
    logits_ptr, target_ptr, h, w, H, W, C,
    stride_c, stride_h, stride_w, target_stride_h, target_stride_w, ignore_index,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Loads labels and the logits of all classes; the Points at rows h and columns w."""
    c = tl.arange(0, BLOCK_C)[:, None]
    # [1, P]
    label = load_label(target_ptr, h, w, H, W, C, target_stride_h, target_stride_w, ignore_index)
    place = place_of(h, w, stride_h, stride_w)
    # [BLOCK_C, P]
    x = load_logits(logits_ptr, c, place, label >= 0, C, stride_c)
    top, scale, own_s, own_q = statistics(x, c, label)
    return Points(place, label, top, scale, own_s, own_q)


@triton.jit
def own_and_others(product, c, label):
    """The sums over some classes, [1, P] each: of the label's channel, of the others."""
    own = c == label
    own_product = tl.sum(tl.where(own, product, 0.0), axis=0)[None, :]
    return own_product, tl.sum(tl.where(own, 0.0, product), axis=0)[None, :]


@triton.jit
def through_softmax(product, own_product, others, s, c, points):
    """The gradient of the logits (S G - p <S, G>) / 2 from the product S G and its sums."""
    # Where p is near 1 its channel would subtract nearly equal numbers.
    own_grad = points.own_q * own_product - points.own_s * points.own_s * others
    return tl.where(c == points.label, own_grad, product - s * s * (own_product + others)) * 0.5
