"""Instance affinities as docs/instance_affinity.md defines them, in eager PyTorch.

This file is the specification: every other implementation is tested against it in float64. The code
is written to be read beside the definitions and never optimised. Images are volumes of depth 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

NOT_COUNTED = 255


def shifted(values: Tensor, step: Sequence[int], outside: int) -> Tensor:
    """``values`` (N, D, H, W) at x + step in place of x, ``outside`` where x + step is outside."""
    result = torch.full_like(values, outside)
    here: list[slice] = [slice(None)]
    there: list[slice] = [slice(None)]
    for size, distance in zip(values.shape[1:], step, strict=True):
        first, end = max(0, -distance), min(size, size - distance)
        if first >= end:
            return result
        here.append(slice(first, end))
        there.append(slice(first + distance, end + distance))
    result[tuple(here)] = values[tuple(there)]
    return result


def instance_affinity_target(
    ids: Tensor,
    offsets: Sequence[Sequence[int]],
    *,
    background: int | None,
    ignore_index: int | None,
) -> Tensor:
    """(N, K, D, H, W): 1 where x and x + offset have the same id and are no background, else 0; 255
    where x + offset is outside or one of the two voxels is ignored.
    """
    ids = ids.long()
    counted = torch.ones_like(ids) if ignore_index is None else (ids != ignore_index).long()
    targets = []
    for step in offsets:
        ids_there = shifted(ids, step, 0)  # any id would do outside, where nothing counts
        counts = (counted * shifted(counted, step, 0)).bool()
        same = ids == ids_there
        if background is not None:
            same = same & (ids != background) & (ids_there != background)
        targets.append(same.long().where(counts, NOT_COUNTED))
    return torch.stack(targets, dim=1).to(torch.uint8)


def instance_pair_counts(
    ids: Tensor,
    offsets: Sequence[Sequence[int]],
    *,
    background: int | None,
    ignore_index: int | None,
) -> Tensor:
    """Numbers of pairs (N, K, 2), (different, same)."""
    target = instance_affinity_target(
        ids, offsets, background=background, ignore_index=ignore_index
    )
    return torch.stack([(target == t).sum(dim=(2, 3, 4)) for t in (0, 1)], dim=-1)


def instance_affinity_tables(
    logits: Tensor,
    ids: Tensor,
    offsets: Sequence[Sequence[int]],
    *,
    background: int | None,
    ignore_index: int | None,
    invert: bool,
    gamma: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sums of -log pt, 1 - pt, (1 - pt)^2 and (1 - pt)^gamma (-log pt), and counts of pairs, each
    (N, K, 2), (different, same). pt is the probability that the network gives the target.
    """
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    target = instance_affinity_target(
        ids, offsets, background=background, ignore_index=ignore_index
    )
    different, same = target == 0, target == 1
    x = logits.where(different | same, 0)  # logits that do not count may be NaN
    # The logit of pt: x where the channel's own target is 1, -x where it is 0.
    u = x.where(different if invert else same, -x)
    log_pt, log_not_pt, miss = F.logsigmoid(u), F.logsigmoid(-u), torch.sigmoid(-u)
    focal = -(gamma * log_not_pt).exp() * log_pt

    def by_target(values: Tensor) -> Tensor:
        return torch.stack([(values * t).sum(dim=(2, 3, 4)) for t in (different, same)], dim=-1)

    count = by_target(torch.ones_like(target, dtype=torch.int64))
    return by_target(-log_pt), by_target(miss), by_target(miss * miss), by_target(focal), count
