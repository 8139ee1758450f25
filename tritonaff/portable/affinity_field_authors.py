"""The affinity field (variant "authors") in torch operations: any device, no Triton.

The published code has rules of its own: p and 1 - p are clamped separately, a table's row is the
label of the pair's centre, and a pair counts only if the pixel opposite to the neighbour counts
too. The last rule is no product of two masks, so the sums do not separate as in the equations: this
file walks over the pairs, one direction at a time, in place.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from tritonaff.portable.affinity_field import (
    count_by_label,
    numbers_where_ignored,
    softmax_backward_,
    softmax_statistics,
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


def statistics(
    logits: Tensor, target: Tensor, kernel_sizes: list[int], ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Totals (2, K) and counts (2 C, K + 1) as ops/affinity_field.py defines them; labels and the
    softmax statistics top and rest, each (N, 1, H, W).
    """
    num_classes = logits.shape[1]
    label = counted_labels(target, num_classes, ignore_index)
    top, rest = softmax_statistics(at_least_float32(logits).contiguous())
    counts = torch.zeros(
        2, num_classes, len(kernel_sizes) + 1, dtype=torch.int64, device=logits.device
    )
    counts[0, :, -1] = count_by_label(label, num_classes)
    row = label.clamp(min=0)
    for k, here, there, pair in directions(label, kernel_sizes):
        pair = pair.view(-1).to(counts.dtype)
        edge = 2 * pair * (label[here] != label[there]).view(-1)
        counts[0, :, k].index_add_(0, row[here].flatten(), edge)
        counts[1, :, k].index_add_(0, row[here].flatten(), num_classes * pair - edge)
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
    grad_p = logits.new_zeros(0 if grad_sums is None else logits.shape)
    for images, classes in blocks(logits):
        a, b, own = fields(logits, label, top, rest, eps, images, classes)
        grad_a, grad_b = torch.zeros_like(a), torch.zeros_like(b)
        rows = label[images].clamp(min=0)
        for k, here, there, pair in directions(label[images], kernel_sizes):
            row = rows[here]
            edge = (own[here] - own[there]).abs_().mul_(pair)
            ratio_a, ratio_b = a[there] / a[here], b[there] / b[here]
            log_a, log_b = ratio_a.log(), ratio_b.log()
            kl = (a[there] * log_a).addcmul_(b[there], log_b)
            if with_tables:
                values = F.relu(margin - kl).mul_(edge), kl * (pair - edge)
                for table, value in zip(sums[..., k], values, strict=True):
                    table.index_add_(0, row.flatten(), value.sum(dim=1).view(-1).to(table.dtype))
            if grad_sums is not None:
                active = torch.lt(kl, margin, out=kl).mul_(edge)
                edge_grad, non_edge_grad = grad_sums[:, row, k]
                kl_grad = (pair - edge).mul_(non_edge_grad).addcmul_(active, edge_grad, value=-1)
                grad_a[there].addcmul_(kl_grad, log_a.add_(1))
                grad_b[there].addcmul_(kl_grad, log_b.add_(1))
                grad_a[here].addcmul_(kl_grad, ratio_a, value=-1)
                grad_b[here].addcmul_(kl_grad, ratio_b, value=-1)
        if grad_sums is not None:
            grad_a.mul_(a > eps)
            grad_b.mul_(b > eps)
            grad_p[images, classes] = grad_a.sub_(grad_b)

    tables = tables_of(sums, logits, label, top, rest) if with_tables else (None, None, None)
    if grad_sums is None:
        return *tables, None
    softmax_backward_(grad_p, grad_log_loss, logits, label, top, rest)
    return *tables, in_layout_of(given, grad_p, grad_dtype(given))


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
    """For each size and direction: k, the slices of centres and of their neighbours, and a mask of
    the pairs that count.
    """
    height, width = label.shape[-2:]
    every = slice(None)
    for k, size in enumerate(kernel_sizes):
        d = (size - 1) // 2
        for dy, dx in [(dy, dx) for dy in (-d, 0, d) for dx in (-d, 0, d) if (dy, dx) != (0, 0)]:
            # A centre has both its neighbour and the opposite pixel in the image, so it is |dy| and
            # |dx| away from the border.
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
