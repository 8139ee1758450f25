"""A small network for segmentation, with or without a head that predicts affinity."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tritonaff import DilatedAffinityHead, NeighborStatistics


class Output(NamedTuple):
    logits: Tensor  # (N, C, H, W)
    affinity: Tensor | None  # (N, 8 R, H / 2, W / 2), rounded up: logits of the affinity head


class SmallUNet(nn.Module):
    """Encoder and decoder with skip connections, 0.3 M parameters."""

    def __init__(
        self,
        num_classes: int,
        neighbors: NeighborStatistics | None = None,
        widths: tuple[int, ...] = (16, 32, 64, 96),
    ) -> None:
        super().__init__()
        levels = list(pairwise(widths))
        self.stem = convolution(3, widths[0])
        self.shrink = nn.ModuleList(
            nn.Sequential(convolution(fine, coarse, stride=2), convolution(coarse, coarse))
            for fine, coarse in levels
        )
        self.enlarge = nn.ModuleList(
            nn.ConvTranspose2d(coarse, fine, kernel_size=2, stride=2) for fine, coarse in levels
        )
        self.merge = nn.ModuleList(convolution(fine, fine) for fine, _ in levels)
        self.classify = nn.Conv2d(widths[0], num_classes, kernel_size=1)
        # Made last, so that all other weights start the same with a head and without.
        self.affinity = None
        if neighbors is not None:
            self.affinity = DilatedAffinityHead(widths[1], neighbors.rates, neighbors)

    def forward(self, x: Tensor) -> Output:
        """Images (N, 3, H, W) around 0."""
        x = self.stem(x)
        skips = []
        for shrink in self.shrink:
            skips.append(x)
            x = shrink(x)
        for enlarge, merge in zip(reversed(self.enlarge), reversed(self.merge), strict=True):
            skip, half = skips.pop(), x
            # An odd size was rounded up on the way down: cut off the row or column too many.
            x = merge(skip + enlarge(x)[..., : skip.shape[2], : skip.shape[3]])
        return Output(self.classify(x), None if self.affinity is None else self.affinity(half))


def convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


def to_input(images: Tensor, device: torch.device) -> Tensor:
    """Bytes (N, H, W, 3) to floats (N, 3, H, W) around 0, in memory as channels_last."""
    return images.to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
