"""Affinity fields as Ke, Hwang, Liu and Yu (ECCV 2018) define them, in eager PyTorch.

This file is the specification: every other implementation is tested against it in float64. The code
is written to be read beside the paper and never optimised.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

DIRECTIONS = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)]


def affinity_field_terms(
    logits: Tensor,
    target: Tensor,
    kernel_sizes: tuple[int, ...],
    *,
    margin: float,
    eps: float,
    ignore_index: int,
    variant: str,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums and counts of Eq. 3 by class and neighbourhood size: four tables, each (C, K).

    ``variant="paper"``: the equations; a table's row is the channel c. ``variant="authors"``: the
    published TensorFlow code; a table's row is the label of the pair's centre.
    ``activation="sigmoid"``: each channel is a question of its own, with a target (N, C, H, W).
    """
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    c = logits.shape[1]
    has_label, counted = labels(target, c, ignore_index, activation)
    logits = logits.where(counted == 1, 0)  # logits that do not count may be NaN

    p = logits.softmax(dim=1) if activation == "softmax" else logits.sigmoid()
    if variant == "paper":
        p = p.clamp(eps, 1 - eps)
        q = 1 - p
    else:
        p, q = p.clamp(eps, 1), (1 - p).clamp(eps, 1)

    edge_sums, non_edge_sums, edge_counts, non_edge_counts = [], [], [], []
    for size in kernel_sizes:
        d = (size - 1) // 2
        edge_sum = non_edge_sum = logits.new_zeros(c)
        edge_count = non_edge_count = logits.new_zeros(c, dtype=torch.int64)
        for dy, dx in DIRECTIONS:
            kl, edge, non_edge = pairs(p, q, has_label, counted, d * dy, d * dx, variant)
            row = None if variant == "paper" else has_label
            edge_sum = edge_sum + sum_by_class(F.relu(margin - kl) * edge, row)
            non_edge_sum = non_edge_sum + sum_by_class(kl * non_edge, row)
            edge_count = edge_count + sum_by_class(edge, row)
            non_edge_count = non_edge_count + sum_by_class(non_edge, row)
        edge_sums.append(edge_sum)
        non_edge_sums.append(non_edge_sum)
        edge_counts.append(edge_count)
        non_edge_counts.append(non_edge_count)
    return (
        torch.stack(edge_sums, dim=1),
        torch.stack(non_edge_sums, dim=1),
        torch.stack(edge_counts, dim=1),
        torch.stack(non_edge_counts, dim=1),
    )


def pairs(
    p: Tensor, q: Tensor, has_label: Tensor, counted: Tensor, dy: int, dx: int, variant: str
) -> tuple[Tensor, Tensor, Tensor]:
    """KL(p_j || p_i), and whether the pair is an edge and a non-edge, each (N, C, H, W): i is the
    pixel itself, j its neighbour at (dy, dx), both on the whole image.
    """
    # Any probability would do outside the image: such pairs are not counted.
    p_j, q_j = (shifted(t, dy, dx, 0.5) for t in (p, q))
    has_label_j, counted_j = (shifted(t, dy, dx, 0) for t in (has_label, counted))
    pair = counted * counted_j
    if variant == "authors":
        pair = pair * shifted(counted, -dy, -dx, 0)
    kl = p_j * (p_j / p).log() + q_j * (q_j / q).log()
    return kl, pair * (has_label != has_label_j), pair * (has_label == has_label_j)


def cross_entropy_terms(
    logits: Tensor, target: Tensor, *, ignore_index: int, activation: str
) -> tuple[Tensor, Tensor]:
    """Sum of -log p over the pixels of each label (C,), and number of these pixels (C,). With
    ``activation="sigmoid"``, both (C, 2), by channel and answer.
    """
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    has_label, counted = labels(target, logits.shape[1], ignore_index, activation)
    has_label, counted = has_label == 1, counted == 1
    logits = logits.where(counted, 0)
    if activation == "softmax":
        log_p = logits.log_softmax(dim=1)
    else:  # the answers no and yes, in a dimension of their own
        log_p = F.logsigmoid(torch.stack((-logits, logits), dim=-1)).movedim(-1, 0)
        has_label = torch.stack((~has_label & counted, has_label))
    log_loss = torch.where(has_label, -log_p, 0)
    tables = log_loss.sum(dim=(-4, -2, -1)), has_label.sum(dim=(-4, -2, -1))
    sums, counts = (table.T if table.dim() == 2 else table for table in tables)
    return sums, counts


def labels(
    target: Tensor, num_channels: int, ignore_index: int, activation: str
) -> tuple[Tensor, Tensor]:
    """y_c of every pixel, (N, C, H, W), and which pixels count: (N, 1, H, W), or with sigmoid by
    channel, (N, C, H, W); each 0 or 1 in uint8. A pixel that does not count has no label.
    """
    target = target.long()
    if activation == "softmax":
        channels = torch.arange(num_channels, device=target.device)
        target, yes = target[:, None], channels[:, None, None]
    else:
        num_channels, yes = 2, torch.ones((), dtype=torch.int64, device=target.device)
    counted = (target >= 0) & (target < num_channels) & (target != ignore_index)
    return ((target == yes) & counted).to(torch.uint8), counted.to(torch.uint8)


def shifted(x: Tensor, dy: int, dx: int, outside: float) -> Tensor:
    """x at (h + dy, w + dx) for every pixel (h, w); ``outside`` if this is not in the image."""
    height, width = x.shape[-2:]
    # A longer shift is outside everywhere, too.
    dy, dx = max(-height, min(dy, height)), max(-width, min(dx, width))
    pad_h, pad_w = abs(dy), abs(dx)
    padded = F.pad(x, (pad_w, pad_w, pad_h, pad_h), value=outside)
    return padded[..., pad_h + dy : pad_h + dy + height, pad_w + dx : pad_w + dx + width]


def sum_by_class(values: Tensor, has_label: Tensor | None) -> Tensor:
    """Sums (N, C, H, W) into (C,): by channel or, given one-hot labels, by the pixel's label."""
    if has_label is not None:
        values = values.sum(dim=1, keepdim=True) * has_label
    return values.sum(dim=(0, 2, 3))
