"""Instance affinities in torch operations: any device, no Triton.

The work goes by channels and, within a channel, by blocks of the voxels whose other voxel is inside
the volume: both voxels of all pairs are slices of the ids. Buffers of a block stay in a CPU's
cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tritonaff.portable.blocks import block_size, overlap, precision, sum_dtype

NOT_COUNTED = 255


def forward(
    logits: Tensor,
    ids: Tensor,
    offsets: list[int],
    background: int | None,
    ignore_index: int | None,
    invert: bool,
    gamma: float,
    misses: bool,
    focal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Four sums and counts, each (N, K, 2), as ops/instance_affinity.py defines them."""
    shape = *logits.shape[:2], 2
    count = logits.new_zeros(shape, dtype=torch.int64)
    sums = logits.new_zeros(4, *shape, dtype=sum_dtype(logits.device))
    for block in pairs(ids, offsets, background, ignore_index):
        block.add_counts(count)
        u = logit_of_target(logits, block, invert)
        minus_log_pt = F.logsigmoid(u).neg_()
        terms: list[Tensor | None] = [minus_log_pt]
        if misses or focal:
            miss = torch.sigmoid(-u)
            terms += [miss, miss * miss] if misses else [None, None]
        if focal:
            terms.append(miss.pow(gamma).mul_(minus_log_pt))
        for table, term in zip(sums, terms, strict=False):
            if term is not None:
                block.add_sums(table, term)
    log_loss, miss_sum, miss_square_sum, focal_sum = (x.clone() for x in sums.to(precision(logits)))
    return log_loss, miss_sum, miss_square_sum, focal_sum, count


def backward(
    coefficients: Tensor,
    logits: Tensor,
    ids: Tensor,
    offsets: list[int],
    background: int | None,
    ignore_index: int | None,
    invert: bool,
    gamma: float,
    misses: bool,
    focal: bool,
) -> Tensor:
    """The gradient of the logits, given the gradients (N, K, 2, 4) of the sums.

    With u the logit of pt and m = 1 - pt, the derivatives of the four terms with respect to u are
    -m, -pt m, -2 pt m^2 and -m^gamma (gamma pt (-log pt) + m).
    """
    grad = torch.empty_like(logits).zero_()
    for block in pairs(ids, offsets, background, ignore_index):
        u = logit_of_target(logits, block, invert)
        of_log, of_miss, of_square, of_focal = block.choose(coefficients)
        pt, miss = torch.sigmoid(u), torch.sigmoid(-u)
        slope = of_log * miss
        if misses:
            slope.addcmul_(pt * miss, (2 * of_square * miss).add_(of_miss))
        if focal:
            of_focus = (pt * F.logsigmoid(u)).mul_(-gamma).add_(miss)
            slope.addcmul_(of_focal * miss.pow_(gamma), of_focus)
        sign = block.same.to(slope.dtype).mul_(2).sub_(1)
        slope.mul_(sign if invert else sign.neg_())
        grad[block.place] = slope.masked_fill_(~block.counted, 0).to(grad.dtype)
    return grad


def pair_counts(
    ids: Tensor, offsets: list[int], background: int | None, ignore_index: int | None
) -> Tensor:
    """Counts of pairs (N, K, 2), (different, same)."""
    count = ids.new_zeros(len(ids), len(offsets) // 3, 2, dtype=torch.int64)
    for block in pairs(ids, offsets, background, ignore_index):
        block.add_counts(count)
    return count


def affinity_target(
    ids: Tensor, offsets: list[int], background: int | None, ignore_index: int | None
) -> Tensor:
    """(N, K, D, H, W) of uint8: 1 for same, 0 for different, 255 where the pair does not count."""
    n, *size = ids.shape
    shape = n, len(offsets) // 3, *size
    result = torch.full(shape, NOT_COUNTED, dtype=torch.uint8, device=ids.device)
    for block in pairs(ids, offsets, background, ignore_index):
        target = block.same.to(torch.uint8)
        result[block.place] = target.masked_fill_(~block.counted, NOT_COUNTED)
    return result


class Pairs(NamedTuple):
    """Pairs of one channel: of some images, or of some rows of one image."""

    images: slice
    channel: int
    place: tuple[slice | int, ...]  # images, channel, planes, rows and columns in the logits
    same: Tensor  # (n, d, h, w) of bool; may be true where the pair does not count
    counted: Tensor  # (n, d, h, w) of bool

    def add_counts(self, count: Tensor) -> None:
        """Adds the numbers of pairs to a table (N, K, 2)."""
        all_pairs = self.counted.sum(dim=(1, 2, 3))
        same = (self.same & self.counted).sum(dim=(1, 2, 3))
        count[self.images, self.channel] += torch.stack((all_pairs - same, same), dim=-1)

    def add_sums(self, table: Tensor, term: Tensor) -> None:
        """Adds the sums of a term to a table (N, K, 2)."""
        for t, chosen in enumerate((~self.same, self.same)):
            values = torch.where(chosen & self.counted, term, 0)
            table[self.images, self.channel, t] += values.sum(dim=(1, 2, 3)).to(table.dtype)

    def choose(self, coefficients: Tensor) -> list[Tensor]:
        """The coefficients of each of the four sums, for every pair."""
        # (n, 2, 4, 1, 1, 1)
        table = coefficients[self.images, self.channel, :, :, None, None, None]
        return [torch.where(self.same, table[:, 1, i], table[:, 0, i]) for i in range(4)]


def pairs(
    ids: Tensor, offsets: list[int], background: int | None, ignore_index: int | None
) -> Iterator[Pairs]:
    """All pairs of voxels of which both are inside, channel by channel."""
    n, *size = ids.shape
    steps = zip(offsets[::3], offsets[1::3], offsets[2::3], strict=True)
    for channel, step in enumerate(steps):
        box = [overlap(length, distance)[0] for distance, length in zip(step, size, strict=True)]
        if any(part.start == part.stop for part in box):
            continue
        for images, *here in blocks_of_box(n, box, block_size(ids)):
            there = [
                slice(part.start + distance, part.stop + distance)
                for part, distance in zip(here, step, strict=True)
            ]
            place, other_place = (images, *here), (images, *there)
            source, destination = ids[place], ids[other_place]
            same = source == destination
            if background is not None:
                same &= source != background
            if ignore_index is None:
                counted = torch.ones_like(same)
            else:
                counted = (source != ignore_index) & (destination != ignore_index)
            yield Pairs(images, channel, (images, channel, *here), same, counted)


def blocks_of_box(
    n: int, box: list[slice], elements: int
) -> Iterator[tuple[slice, slice, slice, slice]]:
    """Cuts the box of n images into blocks of about this many voxels: whole images, some planes of
    one image, or some rows of one plane.
    """
    (z, z_end), (y, y_end), (x, x_end) = ((part.start, part.stop) for part in box)
    row = x_end - x
    rows = min(y_end - y, max(1, elements // row))
    planes = min(z_end - z, max(1, elements // (row * (y_end - y)))) if rows == y_end - y else 1
    whole = planes == z_end - z
    images = max(1, elements // (row * rows * planes)) if whole else 1
    for i in range(0, n, images):
        for j in range(z, z_end, planes):
            for k in range(y, y_end, rows):
                yield (
                    slice(i, min(n, i + images)),
                    slice(j, min(z_end, j + planes)),
                    slice(k, min(y_end, k + rows)),
                    slice(x, x_end),
                )


def logit_of_target(logits: Tensor, block: Pairs, invert: bool) -> Tensor:
    """The logit of pt: x where the channel's own target is 1, -x where it is 0; 0 where the pair
    does not count.
    """
    x = logits[block.place].to(precision(logits))
    u = torch.where(block.same, -x, x) if invert else torch.where(block.same, x, -x)
    return u.masked_fill_(~block.counted, 0)
