"""The affinity field (variant "authors") in torch operations: any device, no Triton.

The published code has rules of its own: p and 1 - p are clamped separately, a table's row is the
label of the pair's centre, and a pair counts only if the pixel opposite to the neighbour counts
too. The last rule is no product of two masks, so the sums do not separate as in the equations: this
file walks over the pairs, one direction at a time, in place.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tritonaff.portable.affinity_field import (
    distances,
    numbers_where_ignored,
    softmax_backward_,
    softmax_statistics,
    sum_by_label,
    tables_of,
)
from tritonaff.portable.blocks import (
    at_least_float32,
    blocks,
    counted_labels,
    grad_dtype,
    in_layout_of,
    label_dtype,
    sum_dtype,
)
from tritonaff.rates import DIRECTIONS


def statistics(
    logits: Tensor, target: Tensor, kernel_sizes: list[int], ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Totals (2, K) and counts (2 C, K + 1) as ops/affinity_field.py defines them; labels and the
    softmax statistics top and rest, each (N, 1, H, W).
    """
    num_classes = logits.shape[1]
    label = counted_labels(target, num_classes, ignore_index)
    top, rest = softmax_statistics(at_least_float32(logits))
    counts = label.new_zeros(2, num_classes, len(kernel_sizes) + 1)
    counts[0, :, -1] = sum_by_label((label >= 0).long(), label, num_classes)
    for k, here, there, pair in directions(label, kernel_sizes):
        edge = 2 * (pair & (label[here] != label[there])).long()
        counts[0, :, k] += sum_by_label(edge, label[here], num_classes)
        counts[1, :, k] += sum_by_label(num_classes * pair - edge, label[here], num_classes)
    totals = counts[:, :, :-1].sum(dim=1)
    counts = counts.flatten(0, 1)
    return totals, counts, label.to(label_dtype(num_classes)), top.to(logits.dtype), rest


def compute(
    logits: Tensor,
    label: Tensor,
    top: Tensor,
    rest: Tensor,
    kernel_sizes: list[int],
    margin: float,
    eps: float,
    *,
    with_tables: bool,
    grad_sums: Tensor | None,
    grad_log_loss: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Sums (2, C, K), edges first, log loss (C,) and the number 0, if asked for; and the gradient
    of the logits, if the gradients of sums and log loss are given. None in place of the others.
    """
    given, logits = logits, at_least_float32(logits).contiguous()
    label, top = label.to(torch.int64), top.to(logits.dtype)
    logits, top, rest = numbers_where_ignored(logits, label, top, rest)
    sums = logits.new_zeros(2, logits.shape[1], len(kernel_sizes), dtype=sum_dtype(logits.device))
    grad = logits.new_zeros(0 if grad_sums is None else logits.shape)
    for images, classes in blocks(logits):
        p, q, own = fields(logits, label, top, rest, eps, images, classes)
        grad_p, grad_q = torch.zeros_like(p), torch.zeros_like(q)
        for k, here, there, pair in directions(label[images], kernel_sizes):
            edge = pair & (own[here] != own[there])
            non_edge = pair ^ edge
            ratio_p, ratio_q = p[there] / p[here], q[there] / q[here]
            log_p, log_q = ratio_p.log(), ratio_q.log()
            kl = p[there] * log_p + q[there] * log_q
            if with_tables:
                terms = F.relu(margin - kl) * edge, kl * non_edge
                for table, value in zip(sums[..., k], terms, strict=True):
                    value = value.sum(dim=1, keepdim=True).to(sums.dtype)
                    table += sum_by_label(value, label[images][here], len(table))
            if grad_sums is not None:
                edge_grad, non_edge_grad = grad_sums[:, label[images][here].clamp(min=0), k]
                kl_grad = non_edge * non_edge_grad - (edge & (kl < margin)) * edge_grad
                grad_p[there] += kl_grad * (log_p + 1)
                grad_q[there] += kl_grad * (log_q + 1)
                grad_p[here] -= kl_grad * ratio_p
                grad_q[here] -= kl_grad * ratio_q
        if grad_sums is not None:
            grad[images, classes] = grad_p * (p > eps) - grad_q * (q > eps)

    tables = tables_of(sums, logits, label, top, rest) if with_tables else (None, None, None)
    if grad_sums is None:
        return *tables, None
    softmax_backward_(grad, grad_log_loss, logits, label, top, rest)
    return *tables, in_layout_of(given, grad, grad_dtype(given))


def fields(
    logits: Tensor,
    label: Tensor,
    top: Tensor,
    rest: Tensor,
    eps: float,
    images: slice,
    classes: slice,
) -> tuple[Tensor, Tensor, Tensor]:
    """p and 1 - p, both clamped to [eps, 1], and the one-hot labels of a block, each
    (n, c, H, W).
    """
    e, total = (logits[images, classes] - top[images]).exp(), 1 + rest[images]
    q = (1 - e + rest[images]) / total
    channel = torch.arange(logits.shape[1], device=label.device)[classes, None, None]
    return (e / total).clamp(eps, 1), q.clamp(eps, 1), label[images] == channel


def directions(label: Tensor, kernel_sizes: list[int]) -> Iterator[tuple[int, Any, Any, Tensor]]:
    """For each size and direction: k, the indices (..., h, w) of centres and of their neighbours,
    and a mask of the pairs that count.
    """
    height, width = label.shape[-2:]
    for k, d in distances(label, kernel_sizes):
        for dy, dx in ((d * y, d * x) for y, x in DIRECTIONS):
            # A centre has both its neighbour and the opposite pixel in the image, so it is |dy| and
            # |dx| away from the border.
            top, left, bottom, right = abs(dy), abs(dx), height - abs(dy), width - abs(dx)
            if top < bottom and left < right:
                here, there, opposite = (
                    (..., slice(top + y, bottom + y), slice(left + x, right + x))
                    for y, x in ((0, 0), (dy, dx), (-dy, -dx))
                )
                pair = (label[here] >= 0) & (label[there] >= 0) & (label[opposite] >= 0)
                yield k, here, there, pair
