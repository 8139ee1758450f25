"""The affinity field (variant "paper") in torch operations: any device, no Triton.

The sums are a dense plus a sparse part; docs/affinity_field.md derives both. With l = log(p / q),
the two directed terms of a pair add up to (p_i - p_j)(l_i - l_j), so the sum over *all* pairs of
one size is a linear stencil of p and l: the dense part. Pairs of different labels are edges in two
of the C channels only: the sparse part takes these edges out of the non-edge sum again and adds
their hinges to the edge sum.

The dense part uses u = p - 1 = -q in the channel of a pixel's own label and u = p elsewhere. In a
non-edge entry u_i - u_j equals p_i - p_j; in an edge entry the product to take out is small where
the network is right: nothing cancels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tritonaff.portable.blocks import (
    at_least_float32,
    bands,
    blocks,
    counted_labels,
    grad_dtype,
    in_layout_of,
    label_dtype,
    may_hold,
    overlap,
    sum_dtype,
)
from tritonaff.rates import DIRECTIONS


def statistics(
    logits: Tensor, target: Tensor, kernel_sizes: list[int], ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Totals (2, K) and counts (C, K + 1) as ops/affinity_field.py defines them; labels and the
    softmax statistics top and rest, each (N, 1, H, W).
    """
    num_classes = logits.shape[1]
    label = counted_labels(target, num_classes, ignore_index)
    top, rest = softmax_statistics(at_least_float32(logits))
    counts = label.new_zeros(num_classes, len(kernel_sizes) + 1)
    counts[:, -1] = sum_by_label((label >= 0).long(), label, num_classes)
    pair_count = counts.new_zeros(len(kernel_sizes))
    for k, d in distances(label, kernel_sizes):
        edges_of_pixel = torch.zeros_like(label)
        for a, b in windows(label, d):
            counted = (label[a] >= 0) & (label[b] >= 0)
            edges_of_pixel[a] += counted & (label[a] != label[b])
            pair_count[k] += counted.sum()
        counts[:, k] = 2 * sum_by_label(edges_of_pixel, label, num_classes)
    edge_count = counts[:, :-1].sum(dim=0)
    totals = torch.stack((edge_count, num_classes * pair_count - edge_count))
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
    sizes = distances(label, kernel_sizes)
    grad_p = None if grad_sums is None else torch.zeros_like(logits)

    for k, d in sizes:
        for edges in edge_entries(logits, label, top, rest, d, eps):
            if with_tables:
                add_to_tables(sums[..., k], edges, margin)
            if grad_p is not None and grad_sums is not None:
                add_to_gradient(grad_p, grad_sums[..., k], edges, margin)

    valid = (label >= 0).to(logits.dtype)
    counts = [box_sum(valid, d) for _, d in sizes]  # valid pixels among a pixel and its neighbours
    for images, classes in blocks(logits):
        e = (logits[images, classes] - top[images]).exp()
        p, q = probabilities(e, rest[images], eps)
        own = (
            label[images]
            == torch.arange(classes.start, classes.stop, device=label.device)[
                : p.shape[1], None, None
            ]
        )
        u, l = torch.where(own, -q, p * valid[images]), (p / q).log() * valid[images]
        grad_u, grad_l = torch.zeros_like(u), torch.zeros_like(l)
        for (k, d), count in zip(sizes, counts, strict=True):
            # Sums of u_i - u_j and of l_i - l_j over the neighbours j that count.
            u_steps = count[images] * u - box_sum(u, d)
            sums[1, classes, k] += (u_steps * l).sum(dim=(2, 3)).sum(dim=0, dtype=sums.dtype)
            if grad_sums is not None:
                coefficient = grad_sums[1, classes, k, None, None]
                grad_l.addcmul_(coefficient, u_steps)
                grad_u.addcmul_(coefficient, count[images] * l - box_sum(l, d))
        if grad_p is not None:
            free = valid[images] * (p > eps) * (q > eps)
            grad_p[images, classes] += grad_u.addcdiv_(grad_l, p * q)
            grad_p[images, classes] *= free

    tables = tables_of(sums, logits, label, top, rest) if with_tables else (None, None, None)
    if grad_p is None:
        return *tables, None
    softmax_backward_(grad_p, grad_log_loss, logits, label, top, rest)
    return *tables, in_layout_of(given, grad_p, grad_dtype(given))


def scale_(grad: Tensor, scale: Tensor) -> None:
    """grad *= scale, in place."""
    grad.mul_(scale)


def distances(label: Tensor, kernel_sizes: list[int]) -> list[tuple[int, int]]:
    """Numbers and distances of the sizes that have pairs in the image."""
    numbered = [(k, (size - 1) // 2) for k, size in enumerate(kernel_sizes)]
    return [(k, d) for k, d in numbered if d < max(label.shape[-2:])]


def windows(image: Tensor, d: int) -> Iterator[tuple[Any, Any]]:
    """For each of the 8 directions, the indices of the pixels (..., h, w) with a neighbour at
    distance d, and of these neighbours.
    """

    height, width = image.shape[-2:]
    for dy, dx in DIRECTIONS:
        if abs(dy * d) < height and abs(dx * d) < width:
            (y, y_there), (x, x_there) = overlap(height, dy * d), overlap(width, dx * d)
            yield (..., y, x), (..., y_there, x_there)


def box_sum(x: Tensor, d: int) -> Tensor:
    """The sum over each pixel and its 8 neighbours at distance d, 0 outside the image."""
    height, width = x.shape[-2:]
    x = F.pad(x, [d] * 4)
    rows = x[..., :height, :] + x[..., d : d + height, :] + x[..., 2 * d :, :]
    return rows[..., :width] + rows[..., d : d + width] + rows[..., 2 * d :]


class Edges(NamedTuple):
    """Edge entries: pixels a and neighbours b of another label, in the channel of a's label."""

    weight: Tensor  # 1, or 0 for a pair that is none
    channel: Tensor
    at_a: Tensor  # index of a in the flattened logits
    at_b: Tensor  # index of b in the flattened logits
    p_a: Tensor
    q_a: Tensor
    p_b: Tensor
    q_b: Tensor
    log_p_ratio: Tensor  # log(p_b / p_a)
    log_q_ratio: Tensor  # log(q_b / q_a)

    def kl_ab(self) -> Tensor:
        """KL(p_b || p_a): a is the centre."""
        return self.p_b * self.log_p_ratio + self.q_b * self.log_q_ratio

    def kl_ba(self) -> Tensor:
        """KL(p_a || p_b): b is the centre."""
        return -(self.p_a * self.log_p_ratio + self.q_a * self.log_q_ratio)

    def u_step(self) -> Tensor:
        return -(self.q_a + self.p_b)

    def l_step(self) -> Tensor:
        return self.log_q_ratio - self.log_p_ratio


def edge_entries(
    logits: Tensor, label: Tensor, top: Tensor, rest: Tensor, d: int, eps: float
) -> Iterator[Edges]:
    """The edge entries of one size, direction by direction."""
    _, num_classes, height, width = logits.shape
    pixel = torch.arange(label.numel(), device=label.device).view(label.shape)
    for here, there in windows(label, d):
        differ = (label[here] >= 0) & (label[there] >= 0) & (label[here] != label[there])
        if selects_pairs(label.device):
            a, weight = pixel[here][differ], logits.new_ones(())
        else:
            a, weight = pixel[here].flatten(), differ.flatten().to(logits.dtype)
        rows, columns = (there[axis].start - here[axis].start for axis in (1, 2))
        b = a + (rows * width + columns)
        channel = label.view(-1)[a].clamp(min=0)
        image = torch.div(a, height * width, rounding_mode="floor")
        own = (image * (num_classes - 1) + channel) * (height * width)  # of the channel's plane
        at_a, at_b = own + a, own + b
        p_a, q_a = entries(logits, top, rest, at_a, a, eps)
        p_b, q_b = entries(logits, top, rest, at_b, b, eps)
        ratios = (p_b / p_a).log(), (q_b / q_a).log()
        yield Edges(weight, channel, at_a, at_b, p_a, q_a, p_b, q_b, *ratios)


def selects_pairs(device: torch.device) -> bool:
    """True if only pairs of different labels are taken. The host must know their number then, which
    only a CPU has at hand.
    """
    return device.type == "cpu"


def entries(
    logits: Tensor, top: Tensor, rest: Tensor, at: Tensor, pixel: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """p and q at some places of the flattened logits, which are of these pixels."""
    e = (logits.view(-1)[at] - top.view(-1)[pixel]).exp()
    return probabilities(e, rest.view(-1)[pixel], eps)


def add_to_tables(sums: Tensor, edges: Edges, margin: float) -> None:
    """Adds hinges to the edge sums (2, C) of one size, and takes the edges out of its non-edge
    sums.
    """
    hinge = edges.weight * (F.relu(margin - edges.kl_ab()) + F.relu(margin - edges.kl_ba()))
    product = edges.weight * edges.u_step() * edges.l_step()
    sums[0].index_add_(0, edges.channel, hinge.to(sums.dtype))
    sums[1].index_add_(0, edges.channel, product.to(sums.dtype), alpha=-1)


def add_to_gradient(grad_p: Tensor, grad_sums: Tensor, edges: Edges, margin: float) -> None:
    """Adds the edges' part to the gradient of p, given the gradient (2, C) of one size's sums."""
    edge_grad, non_edge_grad = grad_sums[:, edges.channel] * edges.weight
    ab, ba = edge_grad * (edges.kl_ab() < margin), edge_grad * (edges.kl_ba() < margin)
    p_step, l_step = edges.p_a - edges.p_b, edges.l_step()
    u_step = non_edge_grad * edges.u_step()
    grad_a = (u_step + ab * p_step) / (edges.p_a * edges.q_a) + (ba + non_edge_grad) * l_step
    grad_b = (u_step + ba * p_step) / (edges.p_b * edges.q_b) + (ab + non_edge_grad) * l_step
    grad_p.view(-1).scatter_add_(0, edges.at_a, -grad_a)
    grad_p.view(-1).scatter_add_(0, edges.at_b, grad_b)


def softmax_statistics(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax statistics top, the largest logit, and rest, the sum of exp(logit - top) over the
    OTHER classes; each (N, 1, H, W).

    One log-sum-exp would not do: where the network is confident, 1 - p is about rest, and 1 + rest
    would round it away.
    """
    top = logits.amax(dim=1, keepdim=True)
    rest = torch.empty_like(top)
    for images, rows in bands(logits):
        e = (logits[images, :, rows] - top[images, :, rows]).exp()
        below = e < 1
        ties = logits.shape[1] - 1 - below.sum(dim=1, keepdim=True)
        rest[images, :, rows] = (e * below).sum(dim=1, keepdim=True) + ties
    return top, rest


def numbers_where_ignored(
    logits: Tensor, label: Tensor, top: Tensor, rest: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, top and rest, with numbers at ignored pixels whose rest is NaN: 0 times NaN would be
    NaN.
    """
    wrong = rest.isnan() & (label < 0)
    if not may_hold(wrong):
        return logits, top, rest
    numbers = 0, 0, logits.shape[1] - 1
    logits, top, rest = (
        x.masked_fill(wrong, number) for x, number in zip((logits, top, rest), numbers, strict=True)
    )
    return logits, top, rest


def tables_of(
    sums: Tensor, logits: Tensor, label: Tensor, top: Tensor, rest: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums (2, C, K); log loss (C,), the sum of -log p, unclamped, over the pixels of each label;
    and the number 0.
    """
    log_loss = rest.log1p() - (logits.gather(1, label.clamp(min=0)) - top)
    # Log loss may be infinite, so pixels that do not count are masked, not multiplied by 0.
    log_loss = log_loss.where(label >= 0, 0).to(sums.dtype)
    total = sum_by_label(log_loss, label, logits.shape[1])
    return sums.to(logits.dtype), total.to(logits.dtype), logits.new_zeros(())


def sum_by_label(x: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """Sums (C,) of x (N, 1, H, W), which is 0 where a pixel does not count, over each label."""
    total = x.new_zeros(num_classes)
    return total.index_add_(0, label.clamp(min=0).flatten(), x.flatten())


def softmax_backward_(
    grad_p: Tensor,
    grad_log_loss: Tensor | None,
    logits: Tensor,
    label: Tensor,
    top: Tensor,
    rest: Tensor,
) -> None:
    """Turns the gradient of the softmax into the gradient of the logits, in place, and adds the
    gradient of cross-entropy.

    The result sums to 0 over the classes of a pixel. A sum other than 0 is the rounding error of
    the largest class: where p is near 1, p (g - sum p g) subtracts nearly equal numbers.
    """
    for images, rows in bands(logits):
        e = (logits[images, :, rows] - top[images, :, rows]).exp()
        total = 1 + rest[images, :, rows]
        p, largest = e / total, (e == 1).to(e.dtype)
        grad = grad_p[images, :, rows].mul_(p)
        grad -= p * grad.sum(dim=1, keepdim=True)
        grad -= largest * (grad.sum(dim=1, keepdim=True) / largest.sum(dim=1, keepdim=True))
        if grad_log_loss is not None:
            own = label[images, :, rows].clamp(min=0)
            own_q = (1 - e.gather(1, own) + rest[images, :, rows]) / total
            factor = grad_log_loss[own].where(label[images, :, rows] >= 0, 0)
            grad.addcmul_(p.scatter_(1, own, -own_q), factor)


def probabilities(e: Tensor, rest: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """p = softmax and q = 1 - p, both clamped to [eps, 1 - eps].

    q is not computed from p, so that q keeps its digits where p is near 1.
    """
    total = 1 + rest
    return (e / total).clamp(eps, 1 - eps), ((1 - e + rest) / total).clamp(eps, 1 - eps)
