"""The affinity field (variant "paper") in torch operations: any device, no Triton.

The sums are a dense plus a sparse part; docs/affinity_field.md derives both. With l = log(p / q),
the two directed terms of a pair add up to (p_i - p_j)(l_i - l_j), so the sum over *all* pairs of
one size is a linear stencil of p and l: the dense part. Pairs of different labels are edges in two
of the C channels only: the sparse part takes these edges out of the non-edge sum again and adds
their hinges to the edge sum.

The dense part uses u = p - 1 = -q in the channel of a pixel's own label and u = p elsewhere. In a
non-edge entry u_i - u_j equals p_i - p_j; in an edge entry the product to take out is small where
the network is right: nothing cancels.

Masks are floating-point tensors: CPUs vectorise comparisons into floating-point tensors, but not
into boolean tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

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
    sum_dtype,
)

# Pairs of pixels in one step of the sparse part.
CPU_PAIRS, DEVICE_PAIRS = 1 << 16, 1 << 22


def statistics(
    logits: Tensor, target: Tensor, kernel_sizes: list[int], ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Totals (2, K) and counts (C, K + 1) as ops/affinity_field.py defines them; labels and the
    softmax statistics top and rest, each (N, 1, H, W).
    """
    num_classes = logits.shape[1]
    label = counted_labels(target, num_classes, ignore_index)
    top, rest = softmax_statistics(at_least_float32(logits).contiguous())
    counts = torch.zeros(
        num_classes, len(kernel_sizes) + 1, dtype=torch.int64, device=logits.device
    )
    counts[:, -1] = count_by_label(label, num_classes)
    pair_count = counts.new_zeros(len(kernel_sizes))
    valid = torch.ge(label, 0, out=torch.empty_like(rest))
    for k, d, boxes in sizes_with_pairs(valid, kernel_sizes):
        # Summed in two steps: float32 counts the pairs of one row exactly, but not the pairs of a
        # large image.
        pair_count[k] = (valid * (boxes - 1)).sum(dim=-1).to(torch.int64).sum()
        for a, _, weight in pairs_of_different_labels(label.squeeze(1), d):
            channel = label.view(-1).index_select(0, a).clamp_(min=0)
            counts[:, k].index_add_(0, channel, weight.to(counts.dtype), alpha=2)
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
    image = Image.load(logits, label, top, rest, kernel_sizes, eps)
    sums = logits.new_zeros(2, logits.shape[1], len(kernel_sizes), dtype=sum_dtype(logits.device))
    grad_p = logits.new_zeros(0 if grad_sums is None else logits.shape)

    for k, d, _ in image.sizes:
        for edge in edges(image, d):
            if with_tables:
                add_to_tables(sums[..., k], edge, margin)
            if grad_sums is not None:
                add_to_gradient(grad_p, grad_sums[..., k], edge, margin)

    for block in dense_blocks(image):
        if grad_sums is not None:
            coefficients = grad_sums[1, block.classes, :, None, None]
            all_boxes, grad_u, grad_l = block.spare, block.grad_u, block.grad_l
            for buffer in (all_boxes, grad_u, grad_l):
                buffer.zero_()
        for k, d, boxes in image.sizes:
            # Sum of u_i - u_j over the valid neighbours j.
            u_step = block.box_sum(block.u_padded, d).neg_()
            u_step.addcmul_(boxes[block.images], block.u)
            if grad_sums is not None:
                grad_l.addcmul_(u_step, coefficients[:, k])
            if with_tables:
                per_plane = u_step.mul_(block.l).sum(dim=(2, 3))
                sums[1, block.classes, k] += per_plane.sum(dim=0, dtype=sums.dtype)
            if grad_sums is not None:
                all_boxes.addcmul_(boxes[block.images], coefficients[:, k])
                l_sum = block.box_sum(block.l_padded, d)
                grad_u.addcmul_(l_sum, coefficients[:, k], value=-1)
        if grad_sums is not None:
            grad_u.addcmul_(all_boxes, block.l)
            free = torch.gt(block.p, eps, out=block.box)
            free.mul_(torch.gt(block.q, eps, out=block.spare)).mul_(image.valid[block.images])
            grad_u.addcdiv_(grad_l, block.p.mul_(block.q))
            grad_p[block.images, block.classes].add_(grad_u).mul_(free)

    tables = tables_of(sums, logits, label, top, rest) if with_tables else (None, None, None)
    if grad_sums is None:
        return *tables, None
    softmax_backward_(grad_p, grad_log_loss, logits, label, top, rest)
    return *tables, in_layout_of(given, grad_p, grad_dtype(given))


def scale_(grad: Tensor, scale: Tensor) -> None:
    """grad *= scale, in place."""
    grad.mul_(scale)


def add_to_tables(sums: Tensor, edge: Edge, margin: float) -> None:
    """Adds hinges to the edge sums of one size, and takes the edges out of its non-edge sums.

    sums: (2, C).
    """
    hinge = F.relu(margin - edge.kl_ab()).add_(F.relu(margin - edge.kl_ba())).mul_(edge.weight)
    product = edge.u_step().mul_(edge.l_step()).mul_(edge.weight)
    sums[0].index_add_(0, edge.channel, hinge.to(sums.dtype))
    sums[1].index_add_(0, edge.channel, product.to(sums.dtype), alpha=-1)


def add_to_gradient(grad_p: Tensor, grad_sums: Tensor, edge: Edge, margin: float) -> None:
    """Adds the edges' part to the gradient of p, given the gradient (2, C) of one size's sums."""
    edge_grad, non_edge_grad = (
        grad.index_select(0, edge.channel).mul_(edge.weight) for grad in grad_sums
    )
    ab = torch.lt(edge.kl_ab(), margin, out=torch.empty_like(edge_grad)).mul_(edge_grad)
    ba = torch.lt(edge.kl_ba(), margin, out=torch.empty_like(edge_grad)).mul_(edge_grad)
    u_step = edge.u_step().mul_(non_edge_grad)
    p_step, l_step = edge.p_a - edge.p_b, edge.l_step()
    grad_a = torch.addcmul(u_step, ab, p_step).div_(edge.p_a * edge.q_a)
    grad_b = torch.addcmul(u_step, ba, p_step).div_(edge.p_b * edge.q_b)
    grad_a.addcmul_(ba.add_(non_edge_grad), l_step)
    grad_b.addcmul_(ab.add_(non_edge_grad), l_step)
    grad_p.view(-1).scatter_add_(0, edge.at_a, grad_a.neg_())
    grad_p.view(-1).scatter_add_(0, edge.at_b, grad_b)


class Size(NamedTuple):
    """A kernel size that has pairs in the image."""

    k: int  # column of the size in the tables
    d: int
    boxes: Tensor  # (N, 1, H, W): number of valid pixels among a pixel and its 8 neighbours


def sizes_with_pairs(valid: Tensor, kernel_sizes: list[int]) -> list[Size]:
    sizes = []
    for k, size in enumerate(kernel_sizes):
        d = (size - 1) // 2
        if d < max(valid.shape[-2:]):
            boxes = box_sum(F.pad(valid, [d] * 4), d, torch.empty_like(valid))
            sizes.append(Size(k, d, boxes))
    return sizes


class Image(NamedTuple):
    """A batch, with the tensors that the dense and the sparse part need."""

    logits: Tensor  # (N, C, H, W)
    top: Tensor  # (N, 1, H, W): the largest logit
    rest: Tensor  # (N, 1, H, W): the sum of exp(logit - top) over the other classes
    label: Tensor  # (N, 1, H, W), -1 at pixels that do not count
    float_label: Tensor  # (N, 1, H, W): the label as a float, for comparisons
    valid: Tensor  # (N, 1, H, W), 1 and 0
    own_p: Tensor  # (N, 1, H, W): p in the channel of the pixel's label
    own_q: Tensor  # (N, 1, H, W): 1 - own_p
    own_channel: Tensor  # (N, 1, H, W): plus a pixel's index, the place in flattened logits
    sizes: list[Size]
    eps: float

    @classmethod
    def load(
        cls,
        logits: Tensor,
        label: Tensor,
        top: Tensor,
        rest: Tensor,
        kernel_sizes: list[int],
        eps: float,
    ) -> Image:
        float_label = label.to(logits.dtype)
        valid = torch.ge(float_label, 0, out=torch.empty_like(rest))
        n, num_classes, height, width = logits.shape
        some_label = label.clamp(min=0)
        own_p, own_q = probabilities((logits.gather(1, some_label) - top).exp_(), rest, eps)
        image = torch.arange(n, device=label.device).view(n, 1, 1, 1)
        own_channel = (image * (num_classes - 1) + some_label) * (height * width)
        return cls(
            logits=logits,
            top=top,
            rest=rest,
            label=label,
            float_label=float_label,
            valid=valid,
            own_p=own_p,
            own_q=own_q,
            own_channel=own_channel,
            sizes=sizes_with_pairs(valid, kernel_sizes),
            eps=eps,
        )

    @property
    def reach(self) -> int:
        return max(size.d for size in self.sizes)


class Dense:
    """A block of whole images, or of some classes of one image: tensors (n, c, H, W) in buffers
    that all blocks share.

    l and u are 0 at pixels that do not count and, in their padded forms, outside the image.
    """

    def __init__(
        self, image: Image, images: slice, classes: slice, padded: Tensor, inner: Tensor
    ) -> None:
        self.image, self.images, self.classes = image, images, classes
        n, c, height, width = image.logits[images, classes].shape
        reach = image.reach
        self.u_padded, self.l_padded, rows = padded[:, :n, :c]
        self.u, self.l = padded[:2, :n, :c, reach : reach + height, reach : reach + width]
        self.rows = rows[..., :height, :]
        self.box, self.p, self.q, self.grad_u, self.grad_l, self.spare = inner[:, :n, :c]

        e = torch.sub(image.logits[images, classes], image.top[images], out=self.p).exp_()
        p, q = probabilities(e, image.rest[images], image.eps, out=self.q)
        valid = image.valid[images]
        torch.mul(torch.div(p, q, out=self.box).log_(), valid, out=self.l)
        channel = torch.arange(classes.start, classes.start + c, dtype=p.dtype, device=p.device)
        own = torch.eq(image.float_label[images], channel[:, None, None], out=self.box)
        torch.mul(torch.sub(valid, own, out=self.grad_u), p, out=self.u).addcmul_(own, q, value=-1)

    def box_sum(self, padded: Tensor, d: int) -> Tensor:
        return box_sum(padded, d, self.box, self.rows, self.image.reach - d)


def dense_blocks(image: Image) -> Iterator[Dense]:
    """The blocks of a batch, one after another in the same buffers."""
    slices = list(blocks(image.logits))
    if not slices or not image.sizes:
        return
    n, c, height, width = image.logits[slices[0]].shape
    reach = image.reach
    padded = image.logits.new_zeros(3, n, c, height + 2 * reach, width + 2 * reach)
    inner = image.logits.new_empty(6, n, c, height, width)
    for images, classes in slices:
        yield Dense(image, images, classes, padded, inner)


def box_sum(
    padded: Tensor, d: int, out: Tensor, rows: Tensor | None = None, margin: int = 0
) -> Tensor:
    """Sum over each pixel and its 8 neighbours at distance d; ``padded`` has d + ``margin`` zeros
    on every side.
    """
    height, width = out.shape[-2:]
    above, here, below = (padded[..., margin + y : margin + y + height, :] for y in (0, d, 2 * d))
    rows = torch.add(above, here, out=rows).add_(below)
    left, here, right = (rows[..., margin + x : margin + x + width] for x in (0, d, 2 * d))
    return torch.add(left, here, out=out).add_(right)


class Edge(NamedTuple):
    """Edge entries: pairs (a, b) of different labels, in the channel of a's label."""

    weight: Tensor
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


def edges(image: Image, d: int) -> Iterator[Edge]:
    """Every edge entry of one size, in steps of bounded memory."""
    logits, top, rest = image.logits.view(-1), image.top.view(-1), image.rest.view(-1)
    label, own_channel = image.label.view(-1), image.own_channel.view(-1)
    own_p, own_q = image.own_p.view(-1), image.own_q.view(-1)
    for a, b, weight in pairs_of_different_labels(image.label.squeeze(1), d):
        shift = own_channel.index_select(0, a)
        at_a, at_b = a + shift, shift.add_(b)
        p_a, q_a = own_p.index_select(0, a), own_q.index_select(0, a)
        e_b = logits.index_select(0, at_b).sub_(top.index_select(0, b)).exp_()
        p_b, q_b = probabilities(e_b, rest.index_select(0, b), image.eps)
        ratios = (p_b / p_a).log_(), (q_b / q_a).log_()
        channel = label.index_select(0, a).clamp_(min=0)
        yield Edge(weight.to(p_a.dtype), channel, at_a, at_b, p_a, q_a, p_b, q_b, *ratios)


def _selects_pairs(device: torch.device) -> bool:
    """True if only pairs of different labels are taken. The host must know their number then, which
    only a CPU has at hand: other devices take all pairs, with weight 0 for equal labels.
    """
    return device.type == "cpu"


def pairs_of_different_labels(label: Tensor, d: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Pixels a and their neighbours b of another label, as indices into flattened labels, and the
    weights of these pairs.
    """
    pixel = torch.arange(label.numel(), device=label.device).view(label.shape)
    pixel = F.pad(pixel, (d, d, 0, d)).view(-1)
    # 0 = does not count. With these margins a shift of the flattened map never reaches another row
    # or image.
    label = F.pad((label + 1).to(torch.float32), (d, d, 0, d))
    row, label = label.shape[-1], label.view(-1)
    step = CPU_PAIRS if label.device.type == "cpu" else DEVICE_PAIRS
    waiting: list[tuple[Tensor, Tensor, Tensor]] = []
    shifts = (d, d * row - d, d * row, d * row + d)
    for shift in shifts:
        here, there = label[:-shift], label[shift:]
        weight = torch.ne(here, there, out=torch.empty_like(here)).mul_(here).mul_(there).sign_()
        if _selects_pairs(label.device):
            first = weight.nonzero().view(-1)
            weight = weight.new_ones(first.shape)
        else:
            first = torch.arange(len(weight), device=label.device)
        waiting.append((pixel.index_select(0, first), pixel.index_select(0, first + shift), weight))
        # A few pairs wait for the pairs of the next shifts: many short steps would take longer.
        if shift != shifts[-1] and sum(len(pairs[2]) for pairs in waiting) < step:
            continue
        i, j, w = (torch.cat(parts) for parts in zip(*waiting, strict=True))
        waiting.clear()
        for k in range(0, len(w), step):
            part = slice(k, k + step)
            a, b = torch.cat((i[part], j[part])), torch.cat((j[part], i[part]))
            yield a, b, torch.cat((w[part], w[part]))


def softmax_statistics(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax statistics top, the largest logit, and rest, the sum of exp(logit - top) over the
    OTHER classes; each (N, 1, H, W).

    One log-sum-exp would not do: where the network is confident, 1 - p is about rest, and 1 + rest
    would round it away.
    """
    top, rest = torch.empty_like(logits[:, :1]), torch.empty_like(logits[:, :1])
    for images, rows in bands(logits):
        x = logits[images, :, rows]
        largest = torch.amax(x, dim=1, keepdim=True)
        e = (x - largest).exp_()
        below = torch.lt(e, 1, out=torch.empty_like(e))
        ties = logits.shape[1] - 1 - below.sum(dim=1, keepdim=True)
        top[images, :, rows] = largest
        rest[images, :, rows] = e.mul_(below).sum(dim=1, keepdim=True).add_(ties)
    return top, rest


def numbers_where_ignored(
    logits: Tensor, label: Tensor, top: Tensor, rest: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, top and rest, with numbers at ignored pixels whose rest is NaN: 0 times NaN would be
    NaN.
    """
    wrong = rest.isnan().logical_and_(label < 0)
    if not may_hold(wrong):
        return logits, top, rest
    others = logits.shape[1] - 1
    return (
        logits.masked_fill(wrong, 0),
        top.masked_fill(wrong, 0),
        rest.masked_fill(wrong, others),
    )


def tables_of(
    sums: Tensor, logits: Tensor, label: Tensor, top: Tensor, rest: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums (2, C, K); log loss (C,), the sum of -log p, unclamped, over the pixels of each label;
    and the number 0.
    """
    own = label.clamp(min=0)
    log_loss = torch.log1p(rest).sub_(logits.gather(1, own).sub_(top))
    # Log loss may be infinite, so pixels that do not count are masked, not multiplied by 0.
    log_loss = log_loss.where(label >= 0, 0)
    total = logits.new_zeros(logits.shape[1], dtype=sum_dtype(logits.device))
    total.index_add_(0, own.view(-1), log_loss.view(-1).to(total.dtype))
    return sums.to(logits.dtype), total.to(logits.dtype), logits.new_zeros(())


def count_by_label(label: Tensor, num_classes: int) -> Tensor:
    """Number of pixels of each label, (C,)."""
    counted = (label >= 0).view(-1).to(torch.int64)
    pixels = counted.new_zeros(num_classes)
    return pixels.index_add_(0, label.clamp(min=0).view(-1), counted)


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
        p = (logits[images, :, rows] - top[images, :, rows]).exp_()
        largest = torch.eq(p, 1, out=torch.empty_like(p))
        total = 1 + rest[images, :, rows]
        p.div_(total)
        grad = grad_p[images, :, rows].mul_(p)
        grad.addcmul_(p, grad.sum(dim=1, keepdim=True), value=-1)
        missing = grad.sum(dim=1, keepdim=True).div_(largest.sum(dim=1, keepdim=True))
        grad.sub_(largest.mul_(missing))
        if grad_log_loss is not None:
            own = label[images, :, rows].clamp(min=0)
            own_e = (logits[images, :, rows].gather(1, own) - top[images, :, rows]).exp_()
            own_q = (1 - own_e).add_(rest[images, :, rows]).div_(total)
            factor = grad_log_loss[own].where(label[images, :, rows] >= 0, 0)
            grad.addcmul_(p.scatter_(1, own, own_q.neg_()), factor)


def probabilities(
    e: Tensor, rest: Tensor, eps: float, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """p = softmax (in place of e) and q = 1 - p, both clamped to [eps, 1 - eps].

    q is not computed from p, so that q keeps its digits where p is near 1.
    """
    total = 1 + rest
    q = torch.sub(e.new_ones(()), e, out=out).add_(rest).div_(total).clamp_(eps, 1 - eps)
    return e.div_(total).clamp_(eps, 1 - eps), q
