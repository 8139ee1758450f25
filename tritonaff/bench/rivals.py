"""Ways in which people compute a loss like an operation's today, to be timed beside it."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from tritonaff.rates import DIRECTIONS
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
    if op == "box_pairwise":
        return {"unfold": unfold_form}
    if op == "refinement":
        return {"one-hot convolutions": lambda *inputs: (refined_by_convolutions, inputs)}
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


def unfold_form(
    mask_logits: Tensor, similarity: Tensor, boxes: Tensor, image_index: Tensor
) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """BoxInst's loss as its users have it: neighbours by unfold, similarity by instance."""
    height, width = mask_logits.shape[1:]
    values = torch.stack([(similarity >> k) & 1 for k in range(8)], dim=1).to(mask_logits.dtype)
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    left, top, right, bottom = boxes.cpu()[:, :, None, None].unbind(dim=1)
    in_box = (rows >= top) & (rows <= bottom) & (columns >= left) & (columns <= right)
    masks = in_box.to(mask_logits)[:, None]

    def loss(mask_logits: Tensor) -> Tensor:
        log_p, log_q = F.logsigmoid(mask_logits)[:, None], F.logsigmoid(-mask_logits)[:, None]
        both, neither = log_p + unfolded(log_p), log_q + unfolded(log_q)
        largest = torch.maximum(both, neither)
        log_same = torch.log((both - largest).exp() + (neither - largest).exp()) + largest
        weight = (values[image_index] >= 0.3).to(mask_logits.dtype) * masks
        return -(log_same * weight).sum() / weight.sum().clamp(min=1)

    return loss, (mask_logits,)


def unfolded(x: Tensor) -> Tensor:
    """The 8 neighbours at dilation 2 of (M, 1, H, W), (M, 8, H, W)."""
    columns = F.unfold(x, kernel_size=3, dilation=2, padding=2).view(len(x), 9, *x.shape[2:])
    return torch.cat((columns[:, :4], columns[:, 5:]), dim=1)


def refined_by_convolutions(masks: Tensor, target: Tensor, images: Tensor) -> Tensor:
    """PAR as its users have it: neighbours by convolutions with one-hot kernels."""
    colors, dilations = images.to(masks.dtype), (1, 2, 4, 8, 12, 24)
    there = neighbors_by_convolutions(colors, dilations)  # (N, C, 8 D, H, W)
    deviation = there.std(dim=2, keepdim=True)
    of_color = -(((there - colors[:, :, None]).abs() / (deviation + 1e-8) / 0.3) ** 2)
    distances = [d * math.hypot(dy, dx) for d in dilations for dy, dx in DIRECTIONS]
    r = torch.tensor(distances, dtype=masks.dtype, device=masks.device)
    of_position = -((r / (r.std() + 1e-8) / 0.3) ** 2)
    weights = of_color.mean(dim=1, keepdim=True).softmax(dim=2)
    weights = weights + 0.01 * of_position.softmax(dim=0)[:, None, None]
    for _ in range(10):
        masks = (neighbors_by_convolutions(masks, dilations) * weights).sum(dim=2)
    return F.nll_loss(masks, target, ignore_index=255)


def neighbors_by_convolutions(x: Tensor, dilations: tuple[int, ...]) -> Tensor:
    """(N, C, 8 D, H, W)."""
    n, c, height, width = x.shape
    kernel = torch.eye(9, dtype=x.dtype, device=x.device).view(9, 1, 3, 3)
    kernel = torch.cat((kernel[:4], kernel[5:]))
    windows = [
        F.conv2d(F.pad(x.reshape(-1, 1, height, width), [d] * 4, "replicate"), kernel, dilation=d)
        for d in dilations
    ]
    return torch.cat(windows, dim=1).view(n, c, -1, height, width)
