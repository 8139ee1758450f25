"""Dilated affinity in torch operations: any device, no Triton.

The work goes by images and rates. Focal terms are added up over the neighbours of a pixel first, so
that only pixels, not signals, are sorted into categories.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tritonaff.portable.blocks import groups, precision, sum_dtype

NOT_VALID = 255


def forward(
    logits: Tensor,
    target: Tensor,
    offsets: list[int],
    gamma: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss sums, signal counts and correct counts, each (R, 9, 2); pixel counts (R, 9)."""
    shape = len(offsets) // 16, 9, 2
    loss_sum = logits.new_zeros(shape, dtype=sum_dtype(logits.device))
    signal_count, correct_count, pixel_count = (
        logits.new_zeros(size, dtype=torch.int64) for size in (shape, shape, shape[:2])
    )
    for block in signals(target, offsets, ignore_index):
        block.add_counts(pixel_count, signal_count)
        x = valid_logits(logits, block)
        u = x.where(block.same, -x)
        focal = u.neg().sigmoid().pow(gamma) * -F.logsigmoid(u)
        correct = (x > 0) == block.same
        for t, chosen in enumerate((block.different, block.same)):
            block.add_sums(loss_sum[..., t], (focal * chosen).sum(dim=1))
            block.add_sums(correct_count[..., t], (correct & chosen).sum(dim=1))
    return loss_sum.to(precision(logits)), signal_count, correct_count, pixel_count


def backward(
    grad_loss_sum: Tensor,
    logits: Tensor,
    target: Tensor,
    offsets: list[int],
    gamma: float,
    ignore_index: int,
) -> Tensor:
    """The gradient of the logits, given the gradient (R, 9, 2) of the loss sums.

    With u = x for a same and -x for a different signal, and pt = sigmoid(u), the derivative of a
    focal term with respect to u is -(1 - pt)^gamma (gamma pt (-log pt) + 1 - pt).
    """
    grad = torch.empty_like(logits)
    for block in signals(target, offsets, ignore_index):
        x = valid_logits(logits, block)
        u = x.where(block.same, -x)
        pt, miss = u.sigmoid(), u.neg().sigmoid()
        slope = miss.pow(gamma) * (miss - gamma * pt * F.logsigmoid(u))
        coefficients = grad_loss_sum[block.rate, block.category][:, None].to(x.dtype)
        different_grad, same_grad = coefficients.unbind(dim=-1)
        signed = different_grad * block.different - same_grad * block.same
        grad[block.place] = (slope * signed).to(grad.dtype)
    return grad


def neighbor_counts(target: Tensor, offsets: list[int], ignore_index: int) -> tuple[Tensor, Tensor]:
    """Pixel counts (R, 9) and signal counts (R, 9, 2)."""
    signal_count = target.new_zeros(len(offsets) // 16, 9, 2, dtype=torch.int64)
    pixel_count = torch.zeros_like(signal_count[..., 0])
    for block in signals(target, offsets, ignore_index):
        block.add_counts(pixel_count, signal_count)
    return pixel_count, signal_count


def affinity_target(target: Tensor, offsets: list[int], ignore_index: int) -> Tensor:
    """(N, 8 R, H, W) of uint8: 1 for same, 0 for different, 255 where a signal is not valid."""
    n, height, width = target.shape
    result = target.new_empty(n, len(offsets) // 2, height, width, dtype=torch.uint8)
    for block in signals(target, offsets, ignore_index):
        valid = block.same | block.different
        result[block.place] = block.same.to(torch.uint8).masked_fill(~valid, NOT_VALID)
    return result


class Signals(NamedTuple):
    """The signals of one rate for some images."""

    rate: int
    place: tuple[slice, slice]  # images and channels of the signals in the logits
    same: Tensor  # (n, 8, H, W) of bool
    different: Tensor  # (n, 8, H, W) of bool
    category: Tensor  # (n, H, W)

    def add_sums(self, table: Tensor, values: Tensor) -> None:
        """Adds values (n, H, W) to the row of this rate in a table (R, 9), by category."""
        table[self.rate].index_add_(0, self.category.flatten(), values.flatten().to(table.dtype))

    def add_counts(self, pixel_count: Tensor, signal_count: Tensor) -> None:
        """Adds pixels that have a valid neighbour, and valid signals."""
        self.add_sums(pixel_count, (self.same | self.different).any(dim=1))
        for t, chosen in enumerate((self.different, self.same)):
            self.add_sums(signal_count[..., t], chosen.sum(dim=1))


def signals(target: Tensor, offsets: list[int], ignore_index: int) -> Iterator[Signals]:
    """The signals of a batch, some images and one rate at a time."""
    _, height, width = target.shape
    steps = list(zip(offsets[::2], offsets[1::2], strict=True))
    in_image = [(dy, dx) for dy, dx in steps if abs(dy) < height and abs(dx) < width]
    above, left = (max(map(abs, step), default=0) for step in zip(*in_image, (0, 0), strict=True))
    for images in groups(target[:, None].expand(-1, 8, -1, -1)):
        # Labels that do not count become -1, as does the frame around the image.
        label = target[images].to(torch.int64)
        label = label.where((label >= 0) & (label != ignore_index), -1)
        framed = F.pad(label, (left, left, above, above), value=-1)
        for rate in range(len(steps) // 8):
            neighbors = [
                framed[:, above + dy : above + dy + height, left + dx : left + dx + width]
                if (dy, dx) in in_image
                else torch.full_like(label, -1)
                for dy, dx in steps[8 * rate : 8 * rate + 8]
            ]
            neighbor, own = torch.stack(neighbors, dim=1), label[:, None]
            valid, equal = (own >= 0) & (neighbor >= 0), own == neighbor
            different = valid & ~equal
            category = 8 - different.sum(dim=1)
            place = images, slice(8 * rate, 8 * rate + 8)
            yield Signals(rate, place, valid & equal, different, category)


def valid_logits(logits: Tensor, block: Signals) -> Tensor:
    """The logits of a block, 0 where a signal is not valid: they may be no numbers there."""
    return logits[block.place].to(precision(logits)).where(block.same | block.different, 0)
