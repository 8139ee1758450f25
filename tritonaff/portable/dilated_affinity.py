"""Dilated affinity in torch operations: any device, no Triton.

The work goes by bands of rows, one rate at a time, in buffers that stay in a CPU's cache. Masks of
the same and the different signals are computed from the labels where they are needed. Focal terms
are added up over the neighbours of a pixel first, so that only pixels, not signals, are sorted into
categories.

Masks are floating-point tensors: CPUs vectorise comparisons into floating-point tensors, but not
into boolean tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tritonaff.portable.blocks import bands, may_hold, precision, sum_dtype

NOT_VALID = 255
# Most pixels are of one category. An addition to a number that has just been written has to wait,
# so neighbouring pixels are added up in different lanes.
LANES = 16
# Float32 holds every integer up to this bound.
EXACT_IN_FLOAT32 = 1 << 24


def forward(
    logits: Tensor,
    target: Tensor,
    offsets: list[int],
    gamma: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss sums, signal counts and correct counts, each (R, 9, 2); pixel counts (R, 9)."""
    shape = 2, len(offsets) // 16, 2, 9, LANES
    # Sums of losses and of signals predicted right, by rate, target, category and lane.
    sums = logits.new_zeros(shape, dtype=sum_dtype(logits.device))
    histogram = Histogram(target, offsets)
    buffers: list[Tensor] = []
    for block in signals(target, offsets, ignore_index, precision(logits)):
        histogram.add(block)
        x, pt, not_pt, product = block.spare_tensors(buffers)
        copy_(x, logits, block)
        predicted_same = torch.gt(x, 0, out=pt)
        correct_same = torch.mul(predicted_same, block.same, out=product).sum(dim=1)
        wrong = torch.mul(predicted_same, block.different, out=product).sum(dim=1)
        correct = block.num_different - wrong, correct_same

        focal = probabilities(x, block, pt, not_pt, product).mul_(not_pt.pow_(gamma))
        for t, chosen in enumerate((block.different, block.same)):
            per_pixel = torch.mul(focal, chosen, out=product).sum(dim=1), correct[t]
            for table, values in zip(sums[:, block.rate, t], per_pixel, strict=True):
                table.view(-1).scatter_add_(0, block.bins, values.flatten().to(sums.dtype))
    loss_sum, correct_count = sums.sum(dim=-1).transpose(2, 3)
    pixel_count, signal_count = histogram.counts()
    return (
        loss_sum.to(precision(logits)).contiguous(),
        signal_count,
        correct_count.to(torch.int64).contiguous(),
        pixel_count,
    )


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
    buffers: list[Tensor] = []
    for block in signals(target, offsets, ignore_index, grad_loss_sum.dtype):
        x, pt, not_pt, signed = block.spare_tensors(buffers)
        copy_(x, logits, block)
        minus_log_pt = probabilities(x, block, pt, not_pt, signed)
        slope = torch.addcmul(not_pt, minus_log_pt, pt, value=gamma, out=x)
        slope.mul_(not_pt.pow_(gamma))
        different_grad, same_grad = (
            coefficient.index_select(0, block.category).view_as(block.same[:, :1])
            for coefficient in grad_loss_sum[block.rate].unbind(dim=1)
        )
        torch.mul(block.different, different_grad, out=signed)
        signed.addcmul_(block.same, same_grad, value=-1)
        grad[block.place] = slope.mul_(signed)
    return grad


def neighbor_counts(target: Tensor, offsets: list[int], ignore_index: int) -> tuple[Tensor, Tensor]:
    """Pixel counts (R, 9) and signal counts (R, 9, 2)."""
    histogram = Histogram(target, offsets)
    for block in signals(target, offsets, ignore_index, torch.float32):
        histogram.add(block)
    return histogram.counts()


def affinity_target(target: Tensor, offsets: list[int], ignore_index: int) -> Tensor:
    """(N, 8 R, H, W) of uint8: 1 for same, 0 for different, 255 where a signal is not valid."""
    n, height, width = target.shape
    result = target.new_empty(n, len(offsets) // 2, height, width, dtype=torch.uint8)
    for block in signals(target, offsets, ignore_index, torch.float32):
        valid = block.same + block.different
        result[block.place] = valid.mul_(-NOT_VALID).add_(NOT_VALID).add_(block.same)
    return result


class Signals(NamedTuple):
    """The signals of one rate for some images, or for some rows of one image."""

    rate: int
    place: tuple[slice, slice, slice]  # images, channels and rows of the signals in the logits
    same: Tensor  # (n, 8, h, W), 1 and 0
    different: Tensor  # (n, 8, h, W), 1 and 0
    num_different: Tensor  # (n, h, W)
    category: Tensor  # (n h W,)
    bins: Tensor  # (n h W,), category * LANES + a lane

    def spare_tensors(self, buffers: list[Tensor]) -> list[Tensor]:
        """Four tensors to write into, of the size of ``same``: all blocks share the memory."""
        if not buffers:  # no other block is larger than the first
            buffers += [torch.empty_like(self.same) for _ in range(4)]
        n, _, rows, _ = self.same.shape
        return [buffer[:n, :, :rows] for buffer in buffers]


def signals(
    target: Tensor, offsets: list[int], ignore_index: int, dtype: torch.dtype
) -> Iterator[Signals]:
    """The signals of a batch, block by block, all in the same buffers."""
    _, height, width = target.shape
    steps = list(zip(offsets[::2], offsets[1::2], strict=True))
    in_image = {(dy, dx) for dy, dx in steps if abs(dy) < height and abs(dx) < width}
    pad_h, pad_w = (max(map(abs, step), default=0) for step in zip(*in_image, (0, 0), strict=True))
    padding = pad_w, pad_w, pad_h, pad_h
    counted = (target >= 0) & (target.to(torch.int64) != ignore_index)
    counted = F.pad(counted.to(dtype), padding)
    label = F.pad(comparable(target), padding)

    buffer: Tensor | None = None
    for images, band in bands(target[:, None].expand(-1, 8, -1, -1)):
        n = min(images.stop, len(target)) - images.start
        rows = min(band.stop, height) - band.start
        if buffer is None:  # no other block is larger than the first
            buffer = counted.new_empty(2, n, 8, rows, width)
            lanes = torch.arange(n * rows * width, device=target.device) % LANES
        same, different = buffer[:, :n, :, :rows]
        same_by_step, valid_by_step = same.unbind(dim=1), different.unbind(dim=1)
        label_here, counted_here = (
            x[images, pad_h + band.start :, pad_w : pad_w + width][:, :rows]
            for x in (label, counted)
        )

        for rate in range(len(steps) // 8):
            channels = slice(8 * rate, 8 * rate + 8)
            for s, (dy, dx) in enumerate(steps[channels]):
                if (dy, dx) not in in_image:
                    same_by_step[s].zero_()
                    valid_by_step[s].zero_()
                    continue
                torch.eq(label_here, moved(label_here, dy, dx), out=same_by_step[s])
                torch.mul(counted_here, moved(counted_here, dy, dx), out=valid_by_step[s])
            different.sub_(same.mul_(different))
            num_different = different.sum(dim=1)
            category = 8 - num_different.flatten().to(torch.int64)
            bins = torch.add(lanes[: len(category)], category, alpha=LANES)
            place = images, channels, band
            yield Signals(rate, place, same, different, num_different, category, bins)


def copy_(x: Tensor, logits: Tensor, block: Signals) -> None:
    """Copies the logits of a block to x; if some logit is no number, x is 0 where signals are not
    valid.
    """
    x.copy_(logits[block.place])
    if may_hold(x.sum().isfinite().logical_not_()):
        x.masked_fill_(block.same + block.different == 0, 0)


def moved(window: Tensor, dy: int, dx: int) -> Tensor:
    """The window of a padded image, moved dy rows down and dx columns right. Slicing is slower."""
    step = dy * window.stride(1) + dx * window.stride(2)
    return window.as_strided(window.shape, window.stride(), window.storage_offset() + step)


def comparable(target: Tensor) -> Tensor:
    """The labels in a dtype that tells them apart: int64, or on a CPU float32, which is faster, if
    all labels are exact in float32.
    """
    if target.device.type == "cpu" and target.numel() > 0:
        smallest, largest = target.aminmax()
        if smallest > -EXACT_IN_FLOAT32 and largest < EXACT_IN_FLOAT32:
            return target.to(torch.float32)
    return target.to(torch.int64)


def probabilities(x: Tensor, block: Signals, pt: Tensor, not_pt: Tensor, spare: Tensor) -> Tensor:
    """Writes pt and 1 - pt, each with all its digits; x becomes -log(pt), the return value."""
    sign = torch.sub(block.same, block.different, out=pt)
    u = x.mul_(sign)
    torch.sigmoid(u, out=pt)
    minus_u = u.neg_()
    torch.sigmoid(minus_u, out=not_pt)
    # -log(pt) = softplus(-u) = max(-u, 0) - log(1 - min(pt, 1 - pt)). On CPUs sigmoids are cheaper
    # than exponentials.
    log = torch.minimum(pt, not_pt, out=spare).neg_().log1p_()
    return minus_u.clamp_(min=0).sub_(log)


class Histogram:
    """Numbers of pixels by rate, category and number of valid neighbours, from which every count
    follows.
    """

    def __init__(self, target: Tensor, offsets: list[int]) -> None:
        shape = len(offsets) // 16, 9, 9, LANES
        self.pixels = target.new_zeros(shape, dtype=torch.int64)

    def add(self, block: Signals) -> None:
        # A pixel of category k with v = 8 - k + same valid neighbours has bin 9 k + v, which is
        # LANES numbers wide.
        same = block.same.sum(dim=1).flatten().to(torch.int64)
        more = torch.add(same + 8, block.category, alpha=7)
        place = torch.add(block.bins, more, alpha=LANES)
        self.pixels[block.rate].view(-1).scatter_add_(0, place, torch.ones_like(place))

    def counts(self) -> tuple[Tensor, Tensor]:
        """Pixel counts (R, 9), without pixels that have no valid neighbour, and signal counts
        (R, 9, 2), as ops/dilated_affinity.py defines them.
        """
        pixels = self.pixels.sum(dim=-1)
        number = torch.arange(9, device=pixels.device)
        pixel_count = pixels[:, :, 1:].sum(dim=2)
        different = pixel_count * number.flip(0)
        return pixel_count, torch.stack(
            (different, (pixels * number).sum(dim=2) - different), dim=2
        )
