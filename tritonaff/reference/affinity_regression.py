"""Affinity regression as Cao ("Use Square Root Affinity to Regress Label in Semantic
Segmentation") defines it, in eager PyTorch.

This file is the specification: every other implementation is tested against it in float64. The code
is written to be read beside the paper and never optimised: the matrices are built.
"""

from __future__ import annotations

import torch
from torch import Tensor


def affinity_regression_terms(
    logits: Tensor, target: Tensor, grid_sizes: tuple[int, ...] | None, *, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Squared error (N,) and number of pairs (N,) of each image: the loss is a mean over pairs."""
    label = target.long()
    is_class = (label >= 0) & (label < logits.shape[1])
    label = label.where(is_class, ignore_index)
    logits = logits.where((label != ignore_index)[:, None], 0)  # ignored logits may be NaN

    a = square_root_affinity(logits, grid_sizes)
    m, valid = label_affinity(label, grid_sizes, ignore_index)
    pair = valid[:, :, None] & valid[:, None, :]
    squared_error = (a - m).square() * pair
    return squared_error.sum(dim=(1, 2)), pair.sum(dim=(1, 2))


def square_root_affinity(logits: Tensor, grid_sizes: tuple[int, ...] | None) -> Tensor:
    """A = S^T S (N, L, L) with S = sqrt(softmax(logits)) at the sample points."""
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    # The square root as a factor of the logarithm: its derivative is finite where p underflows.
    s = (sampled(logits, grid_sizes).log_softmax(dim=1) / 2).exp()  # (N, C, L)
    return s.mT @ s


def label_affinity(
    target: Tensor, grid_sizes: tuple[int, ...] | None, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """M (N, L, L), 1 where two points that count have the same label, and a mask (N, L) of the
    points that count.
    """
    label = sampled(target.long(), grid_sizes)
    valid = (label >= 0) & (label != ignore_index)
    same = (label[:, :, None] == label[:, None, :]) & valid[:, :, None] & valid[:, None, :]
    return same.float(), valid


def sampled(x: Tensor, grid_sizes: tuple[int, ...] | None) -> Tensor:
    """Samples (..., H, W) to (..., L): nearest neighbours on a grid of g x g points for every grid
    size, one grid after another; every pixel if ``grid_sizes`` is None.
    """
    if grid_sizes is None:
        return x.flatten(-2)
    height, width = x.shape[-2:]
    grids = []
    for size in grid_sizes:
        steps = torch.arange(size, device=x.device)
        rows, columns = steps * height // size, steps * width // size
        grids.append(x[..., rows[:, None], columns].flatten(-2))
    return torch.cat(grids, dim=-1)
