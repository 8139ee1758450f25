"""Affinity propagation of "Improving Semantic Segmentation via Dilated Affinity" (Sec. 3.3), in
eager PyTorch.

This file is the specification: every other implementation is tested against it in float64. The code
is written to be read beside the paper and never optimised.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tritonaff.reference.affinity_field import DIRECTIONS, shifted


def affinity_propagation(
    probs: Tensor,
    affinity: Tensor,
    rates: tuple[tuple[int, int], ...],
    *,
    iterations: int,
    self_weight: float,
    steepness: float,
    from_logits: bool,
    normalize: str,
    border: str,
) -> Tensor:
    """Applies Eq. 6 ``iterations`` times to probs (N, C, H, W), with affinity (N, 8 R, H, W)."""
    p = probs.float() if probs.dtype in (torch.float16, torch.bfloat16) else probs.clone()
    a = affinity.to(p.dtype)
    if from_logits:
        a = steep_sigmoid(a, steepness)
    offsets = [(r1 * dy, r2 * dx) for r1, r2 in rates for dy, dx in DIRECTIONS]
    for _ in range(iterations):
        largest, _ = p.max(dim=1, keepdim=True)
        total = self_weight * p * largest
        for s, (dy, dx) in enumerate(offsets):
            # Outside the image there is no neighbour, p_s is 0; or its border pixels go on.
            p_s = shifted(p, dy, dx, 0.0) if border == "valid" else replicated(p, dy, dx)
            total = total + a[:, s : s + 1] * p_s
        p = normalized(total) if normalize == "sum" else total
    return p.to(probs.dtype)


def steep_sigmoid(x: Tensor, mu: float) -> Tensor:
    """Eq. 7: mu^x / (1 + mu^x) = 1 / (1 + exp(-x log(mu)))."""
    return torch.sigmoid(x * math.log(mu))


def replicated(x: Tensor, dy: int, dx: int) -> Tensor:
    """``x`` (N, C, H, W) at (h + dy, w + dx), or at the pixel of the image nearest to it."""
    rows, columns = (
        (torch.arange(size, device=x.device) + max(-size, min(size, step))).clamp(0, size - 1)
        for size, step in zip(x.shape[2:], (dy, dx), strict=True)
    )
    return x[:, :, rows[:, None], columns]


def normalized(total: Tensor) -> Tensor:
    """N of Eq. 6: divides by the sum over classes; a sum of 0 gives 0."""
    class_sum = total.sum(dim=1, keepdim=True)
    return total / class_sum.masked_fill(class_sum == 0, math.inf)
