"""Dilated affinity and its loss as "Improving Semantic Segmentation via Dilated Affinity" defines
them (sections 3.1 and 3.2), in eager PyTorch.

This file is the specification: every other implementation is tested against it in float64. The code
is written to be read beside the paper and never optimised.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from tritonaff.reference.affinity_field import DIRECTIONS, shifted

NOT_VALID = 255


def dilated_affinity_target(
    target: Tensor, rates: Sequence[tuple[int, int]], *, ignore_index: int
) -> Tensor:
    """Eq. 1 for the pairs of Eq. 3: (N, 8 R, H, W) of 1, 0 and 255, rate by rate."""
    label = target.long()
    counted = ((label >= 0) & (label != ignore_index)).long()
    signals = []
    for r1, r2 in rates:
        for dy, dx in DIRECTIONS:
            # Any label would do outside the image, where nothing counts.
            label_j = shifted(label, r1 * dy, r2 * dx, 0)
            valid = (counted * shifted(counted, r1 * dy, r2 * dx, 0)).bool()
            signals.append((label == label_j).long().where(valid, NOT_VALID))
    return torch.stack(signals, dim=1).to(torch.uint8)


def neighbor_counts(
    target: Tensor, rates: Sequence[tuple[int, int]], *, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Pixels (R, 9) and signals (R, 9, 2) by rate, neighbour category and target."""
    signals = dilated_affinity_target(target, rates, ignore_index=ignore_index)
    pixel_counts, signal_counts = [], []
    for signal in torch.split(signals, 8, dim=1):
        in_category, different, same = categories(signal)
        pixel_counts.append(in_category.sum(dim=(1, 2, 3)))
        signal_counts.append(
            torch.stack([sum_by_category(t.long(), in_category) for t in (different, same)], dim=1)
        )
    return torch.stack(pixel_counts), torch.stack(signal_counts)


def dilated_affinity_terms(
    affinity_logits: Tensor,
    target: Tensor,
    rates: Sequence[tuple[int, int]],
    *,
    gamma: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums of the focal loss, signal counts and correct counts, each (R, 9, 2); pixel counts
    (R, 9).
    """
    if affinity_logits.dtype in (torch.float16, torch.bfloat16):
        affinity_logits = affinity_logits.float()
    pixel_count, signal_count = neighbor_counts(target, rates, ignore_index=ignore_index)
    signals = dilated_affinity_target(target, rates, ignore_index=ignore_index)
    loss_sums, correct_counts = [], []
    rate_pairs = torch.split(signals, 8, dim=1), torch.split(affinity_logits, 8, dim=1)
    for signal, x in zip(*rate_pairs, strict=True):
        in_category, different, same = categories(signal)
        x = x.where(different | same, 0)  # logits that do not count may be NaN
        # Eq. 4. The logit of pt is x where the target is 1 and -x where it is 0.
        u = x.where(same, -x)
        log_pt, log_not_pt = F.logsigmoid(u), F.logsigmoid(-u)
        focal = -(gamma * log_not_pt).exp() * log_pt
        correct = (x > 0) == same
        loss_sums.append(
            torch.stack([sum_by_category(focal * t, in_category) for t in (different, same)], dim=1)
        )
        correct_counts.append(
            torch.stack(
                [sum_by_category((correct & t).long(), in_category) for t in (different, same)],
                dim=1,
            )
        )
    return torch.stack(loss_sums), signal_count, torch.stack(correct_counts), pixel_count


def categories(signal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Masks for one rate's signals (N, 8, H, W): pixels in n0 ... n8, (9, N, H, W); signals that
    are "different", (N, 8, H, W); signals that are "same", (N, 8, H, W).
    """
    different, same = signal == 0, signal == 1
    counts = (different | same).any(dim=1)
    category = 8 - different.sum(dim=1)
    names = torch.arange(9, device=signal.device).view(9, 1, 1, 1)
    return (category == names) & counts, different, same


def sum_by_category(values: Tensor, in_category: Tensor) -> Tensor:
    """Sums (N, 8, H, W) into (9,), by the category of the pixel."""
    per_pixel = values.sum(dim=1)
    return torch.stack([(per_pixel * chosen).sum() for chosen in in_category])
