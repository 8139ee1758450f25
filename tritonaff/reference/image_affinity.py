"""Affinities of pixels by their colours, as docs/image_affinity.md defines them, in eager PyTorch.

This file is the specification: every other implementation is tested against it in float64. The code
is written to be read beside the definitions and never optimised.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tritonaff.reference.affinity_field import DIRECTIONS
from tritonaff.reference.affinity_propagation import replicated


def image_affinity(images: Tensor, dilations: tuple[int, ...], *, mode: str) -> Tensor:
    """Weights (N, 8 D, H, W) of the 8 neighbours at D dilations."""
    x = images.float() if images.dtype in (torch.float16, torch.bfloat16) else images
    # (N, 8 D, 3, H, W)
    x_j = torch.stack(
        [replicated(x, d * dy, d * dx) for d in dilations for dy, dx in DIRECTIONS], dim=1
    )
    distance = (x[:, None] - x_j).abs()
    if mode == "pamr":
        # The windows of all dilations, their common centre included each time.
        windows = torch.cat((x_j, x[:, None].repeat(1, len(dilations), 1, 1, 1)), dim=1)
        deviation = windows.std(dim=1, keepdim=True)
        weights = (-distance / (1e-8 + 0.1 * deviation)).mean(dim=2).softmax(dim=1)
    else:
        deviation = x_j.std(dim=1, keepdim=True)
        of_color = -((distance / (deviation + 1e-8) / 0.3) ** 2).mean(dim=2)
        r = torch.tensor(
            [d * (dy * dy + dx * dx) ** 0.5 for d in dilations for dy, dx in DIRECTIONS],
            dtype=x.dtype,
            device=x.device,
        )
        of_position = -((r / (r.std() + 1e-8) / 0.3) ** 2)
        weights = of_color.softmax(dim=1) + 0.01 * of_position.softmax(dim=0)[:, None, None]
    return weights.to(images.dtype)
