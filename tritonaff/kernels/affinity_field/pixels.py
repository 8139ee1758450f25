from __future__ import annotations

import triton
import triton.language as tl

from tritonaff.kernels.affinity_field.mathematics import exp, log, reciprocal


@triton.jit
def fields(x, top, rest, own, limit, eps):
    """u, which is eps - q in the channel of the pixel's label and p - eps in others, and
    l = log(p / q). Where p is clamped u is 0, so that sums of it, nearly all, round nothing away.
    """
    x -= top
    e = exp(x)
    # Not 1 - p: this keeps its digits where p is near 1.
    not_e = 1 - e + rest
    log_odds = tl.minimum(tl.maximum(x - log(not_e), -limit), limit)
    u = tl.where(own, not_e, e) * reciprocal(1 + rest) - eps
    # What is not a number stays so: a GPU's maximum would make it 0, and the loss finite.
    nan: tl.constexpr = tl.PropagateNan.ALL
    u = tl.minimum(tl.maximum(u, 0.0, nan), 1 - 2 * eps, nan)
    return tl.where(own, -u, u), log_odds


@triton.jit
def distribution(x, top, rest, limit):
    """p, q = 1 - p, log(p / q), log(q)."""
    x -= top
    log_odds = tl.minimum(tl.maximum(x - log(1 - exp(x) + rest), -limit), limit)
    odds = exp(log_odds)
    q = reciprocal(1 + odds)
    return odds * q, q, log_odds, -log(1 + odds)


@triton.jit
def logit_at(channel_ptr, top_ptr, rest_ptr, pixel, mask):
    """The logit and the statistics of pixels."""
    x = tl.load(channel_ptr + pixel, mask=mask, other=0.0).to(tl.float32)
    top = tl.load(top_ptr + pixel, mask=mask, other=0.0).to(tl.float32)
    return x, top, tl.load(rest_ptr + pixel, mask=mask, other=1.0)


@triton.jit
def channel_of(logits_ptr, label, stride_c):
    return logits_ptr + tl.maximum(label, 0).to(tl.int64) * stride_c
