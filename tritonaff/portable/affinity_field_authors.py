"""The affinity field (variant "authors") in torch operations: any device, no Triton.

The published code's rules: p and 1 - p are clamped separately, a table's row is the label of the
pair's centre, and a pair counts only if the pixel opposite to the neighbour counts too. The last
rule is no product of two masks, so the sums do not separate as those of the equations do: this
walks over the pairs, one direction at a time, in place.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from tritonaff.portable.affinity_field import (
    cross_entropy_by_label,
    softmax_backward_,
    softmax_statistics,
)
from tritonaff.portable.blocks import (
    at_least_float32,
    blocks,
    counted_labels,
    in_layout_of,
    label_dtype,
    sum_dtype,
)


def forward(
    logits: Tensor,
    target: Tensor,
    kernel_sizes: list[int],
    margin: float,
    eps: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sums and counts (2, C, K), edges first; log loss and pixels (C,); label, and the softmax
    statistics top and rest (N, 1, H, W).
    """
    logits = at_least_float32(logits).contiguous()
    label = counted_labels(target, logits.shape[1], ignore_index)
    top, rest = softmax_statistics(logits)
    shape = logits.shape[1], len(kernel_sizes)
    edge_sum = logits.new_zeros(shape, dtype=sum_dtype(logits.device))
    non_edge_sum = torch.zeros_like(edge_sum)
    edge_count = torch.zeros_like(edge_sum, dtype=torch.int64)
    pair_count = torch.zeros_like(edge_count)

    for images, classes in blocks(logits):
        a, b, own = fields(logits, label, top, rest, eps, images, classes)
        row = label[images].clamp(min=0)
        for k, here, there, pair in directions(label[images], kernel_sizes):
            edge = (own[here] - own[there]).abs_().mul_(pair)
            kl = a[there] * (a[there] / a[here]).log_()
            kl.addcmul_(b[there], (b[there] / b[here]).log_())
            for table, values in (
                (edge_sum, F.relu(margin - kl).mul_(edge)),
                (non_edge_sum, kl.mul_(pair - edge)),
                (edge_count, edge),
            ):
                per_pixel = values.sum(dim=1).view(-1).to(table.dtype)
                table[:, k].index_add_(0, row[here].flatten(), per_pixel)
            entries = (own.shape[1] * pair).view(-1).to(pair_count.dtype)
            pair_count[:, k].index_add_(0, row[here].flatten(), entries)

    sums = torch.stack((edge_sum, non_edge_sum)).to(logits.dtype)
    counts = torch.stack((edge_count, pair_count - edge_count))
    cross_entropy = cross_entropy_by_label(logits, label, top, rest)
    return sums, counts, *cross_entropy, label.to(label_dtype(logits.shape[1])), top, rest


def backward(
    grad_sums: Tensor,
    grad_log_loss: Tensor | None,
    logits: Tensor,
    label: Tensor,
    top: Tensor,
    rest: Tensor,
    kernel_sizes: list[int],
    margin: float,
    eps: float,
) -> Tensor:
    """The gradient with respect to the logits, given those with respect to sums and log loss."""
    grad_edge_sum, grad_non_edge_sum = grad_sums
    given, logits = logits, at_least_float32(logits).contiguous()
    label = label.to(torch.int64)
    grad_p = torch.zeros_like(logits)
    for images, classes in blocks(logits):
        a, b, own = fields(logits, label, top, rest, eps, images, classes)
        grad_a, grad_b = torch.zeros_like(a), torch.zeros_like(b)
        row = label[images].clamp(min=0)
        for k, here, there, pair in directions(label[images], kernel_sizes):
            edge = (own[here] - own[there]).abs_().mul_(pair)
            ratio_a, ratio_b = a[there] / a[here], b[there] / b[here]
            log_a, log_b = ratio_a.log(), ratio_b.log()
            kl = (a[there] * log_a).addcmul_(b[there], log_b)
            active = torch.lt(kl, margin, out=kl).mul_(edge)
            from_non_edge = grad_non_edge_sum[:, k][row[here]]
            from_edge = grad_edge_sum[:, k][row[here]]
            from_kl = (pair - edge).mul_(from_non_edge).addcmul_(active, from_edge, value=-1)
            grad_a[there].addcmul_(from_kl, log_a.add_(1))
            grad_b[there].addcmul_(from_kl, log_b.add_(1))
            grad_a[here].addcmul_(from_kl, ratio_a, value=-1)
            grad_b[here].addcmul_(from_kl, ratio_b, value=-1)
        grad_a.mul_(a > eps)
        grad_b.mul_(b > eps)
        grad_p[images, classes] = grad_a.sub_(grad_b)
    softmax_backward_(grad_p, grad_log_loss, logits, label, top, rest)
    return in_layout_of(given, grad_p)


def fields(
    logits: Tensor,
    label: Tensor,
    top: Tensor,
    rest: Tensor,
    eps: float,
    images: slice,
    classes: slice,
) -> tuple[Tensor, Tensor, Tensor]:
    """p and 1 - p, each clamped to [eps, 1], and the one-hot labels, of a block (n, c, H, W)."""
    e = (logits[images, classes] - top[images]).exp_()
    total = 1 + rest[images]
    b = (1 - e).add_(rest[images]).div_(total).clamp_(eps, 1)
    a = e.div_(total).clamp_(eps, 1)
    channel = torch.arange(logits.shape[1], dtype=a.dtype, device=a.device)[classes, None, None]
    return a, b, torch.eq(label[images].to(a.dtype), channel, out=torch.empty_like(a))


Slices = tuple[slice, slice, slice, slice]


def directions(
    label: Tensor, kernel_sizes: list[int]
) -> Iterator[tuple[int, Slices, Slices, Tensor]]:
    """Per size and direction: k, where centres and their neighbours are, which pairs count."""
    height, width = label.shape[-2:]
    every = slice(None)
    for k, size in enumerate(kernel_sizes):
        d = (size - 1) // 2
        for dy, dx in [(dy, dx) for dy in (-d, 0, d) for dx in (-d, 0, d) if (dy, dx) != (0, 0)]:
            # A centre has both its neighbour and the opposite pixel in the image: |dy| and |dx|
            # away from the border.
            rows, columns = (abs(dy), height - abs(dy)), (abs(dx), width - abs(dx))
            if rows[0] >= rows[1] or columns[0] >= columns[1]:
                continue
            here = every, every, slice(*rows), slice(*columns)
            there = (
                every,
                every,
                slice(rows[0] + dy, rows[1] + dy),
                slice(columns[0] + dx, columns[1] + dx),
            )
            opposite = (
                every,
                every,
                slice(rows[0] - dy, rows[1] - dy),
                slice(columns[0] - dx, columns[1] - dx),
            )
            counted = (label[here] >= 0) & (label[there] >= 0) & (label[opposite] >= 0)
            yield k, here, there, counted.to(torch.float32)
