"""Probabilities of pixels, from their logits and softmax statistics.

With the largest logit ``top`` of a pixel and ``rest``, the sum of the other exponentials
exp(x - top), a class has p = exp(x - top) / (1 + rest), q = 1 - p and the log-odds l = log(p / q).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from tritonaff.kernels.affinity_field.mathematics import exp, log, reciprocal


class Pixels(NamedTuple):
    """Pointers to the logits of an image (or a batch, or a channel) and to the softmax statistics
    and labels of its pixels.
    """

    logits: Any
    top: Any
    rest: Any
    label: Any


@triton.jit
def image_of(pixels, logits_offset, offset):
    """The pixels of the image whose logits and whose pixels begin at these offsets."""
    logits, label = pixels.logits + logits_offset, pixels.label + offset
    return Pixels(logits, pixels.top + offset, pixels.rest + offset, label)


@triton.jit
def channel_of(pixels, c, stride_c):
    """The pixels with the logits of class c."""
    logits = pixels.logits + c.to(tl.int64) * stride_c
    return Pixels(logits, pixels.top, pixels.rest, pixels.label)


@triton.jit
def load_statistics(pixels, pixel, mask):
    """The softmax statistics top and rest of pixels, each of the shape of ``pixel``."""
    top = tl.load(pixels.top + pixel, mask=mask, other=0.0).to(tl.float32)
    return top, tl.load(pixels.rest + pixel, mask=mask, other=1.0)


@triton.jit
def load_logit(pixels, pixel, mask):
    """The logits of pixels in a channel, each of the shape of ``pixel``."""
    return tl.load(pixels.logits + pixel, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def fields(x, top, rest, own, limit, eps):
    """u and l, where u is eps - q in the channel of the pixel's label and p - eps in others.

    Where p is clamped u is 0, so that sums of u, nearly all of them, round nothing away.
    """
    x -= top
    e = exp(x)
    # Not 1 - p: this keeps its digits where p is near 1.
    not_e = 1 - e + rest
    log_odds = tl.minimum(tl.maximum(x - log(not_e), -limit), limit)
    u = tl.where(own, not_e, e) * reciprocal(1 + rest) - eps
    # NaN stays NaN: a GPU's maximum would make it 0, and the loss finite.
    nan: tl.constexpr = tl.PropagateNan.ALL
    u = tl.minimum(tl.maximum(u, 0.0, nan), 1 - 2 * eps, nan)
    return tl.where(own, -u, u), log_odds


@triton.jit
def distribution(x, top, rest, limit):
    """p, q, log(p / q) and log(q), clamped."""
    x -= top
    log_odds = tl.minimum(tl.maximum(x - log(1 - exp(x) + rest), -limit), limit)
    odds = exp(log_odds)
    q = reciprocal(1 + odds)
    return odds * q, q, log_odds, -log(1 + odds)
