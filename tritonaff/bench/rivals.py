"""Ways in which people compute a loss like an operation's today, to be timed beside it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from tritonaff.testing import INSTANCE_OFFSETS

# From the inputs of an operation, makes a loss and the inputs of this loss, as Case.yardstick does.
Maker = Callable[..., tuple[Callable[..., Tensor], tuple[Tensor, ...]]]


def rivals(op: str) -> dict[str, Maker]:
    """Rivals by name, of those whose package is installed."""
    if op == "instance_affinity" and importlib.util.find_spec("bioimage_cpp"):
        return {
            "bioimage-cpp + BCE": lambda *inputs: (cross_entropy_of_affinities, inputs),
            "bioimage-cpp + Dice": lambda *inputs: (dice_of_affinities, inputs),
        }
    return {}


def cross_entropy_of_affinities(logits: Tensor, ids: Tensor) -> Tensor:
    same, counted = affinities(ids, logits.device)
    total = F.binary_cross_entropy_with_logits(logits, same, weight=counted, reduction="sum")
    return total / counted.sum()


def dice_of_affinities(logits: Tensor, ids: Tensor) -> Tensor:
    """Dice by channel of masked probabilities, as in torch-em."""
    same, counted = affinities(ids, logits.device)
    p, y = (x.transpose(0, 1).flatten(1) for x in (logits.sigmoid() * counted, same * counted))
    scores = 2 * (p * y).sum(-1) / ((p * p).sum(-1) + (y * y).sum(-1)).clamp(min=1e-7)
    return (1 - scores).sum()


def affinities(ids: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Targets and mask (N, K, *S) in float32, computed on the CPU, as data loaders do."""
    from bioimage_cpp.affinities import compute_affinities

    same, counted = zip(
        *(
            compute_affinities(
                image,
                INSTANCE_OFFSETS[ids.dim() - 1],
                ignore_label=255,
                number_of_threads=torch.get_num_threads(),
            )
            for image in ids.cpu().numpy()
        ),
        strict=True,
    )
    targets, mask = (torch.stack([torch.from_numpy(x) for x in part]) for part in (same, counted))
    return targets.to(device), mask.to(device, torch.float32)
