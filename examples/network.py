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


class Layers(NamedTuple):
    """Layers for images or for volumes."""

    plain: type[nn.Module]
    transposed: type[nn.Module]
    normalize: type[nn.Module]
    half: int | tuple[int, ...]  # the stride to half the size: planes of a volume all stay

    def convolution(
        self, inputs: int, outputs: int, stride: int | tuple[int, ...] = 1
    ) -> nn.Sequential:
        return nn.Sequential(
            self.plain(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False),
            self.normalize(outputs),
            nn.ReLU(inplace=True),
        )


LAYERS = {
    2: Layers(nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, 2),
    3: Layers(nn.Conv3d, nn.ConvTranspose3d, nn.BatchNorm3d, (1, 2, 2)),
}


class SmallUNet(nn.Module):
    """Encoder and decoder with skip connections, 0.3 M parameters."""

    def __init__(
        self,
        num_classes: int,
        neighbors: NeighborStatistics | None = None,
        widths: tuple[int, ...] = (16, 32, 64, 96),
        dimensions: int = 2,
    ) -> None:
        super().__init__()
        levels = list(pairwise(widths))
        layers = LAYERS[dimensions]
        self.stem = layers.convolution(3, widths[0])
        self.shrink = nn.ModuleList(
            nn.Sequential(
                layers.convolution(fine, coarse, layers.half), layers.convolution(coarse, coarse)
            )
            for fine, coarse in levels
        )
        self.enlarge = nn.ModuleList(
            layers.transposed(coarse, fine, layers.half, layers.half) for fine, coarse in levels
        )
        self.merge = nn.ModuleList(layers.convolution(fine, fine) for fine, _ in levels)
        self.classify = layers.plain(widths[0], num_classes, kernel_size=1)
        # Made last, so that all other weights start the same with a head and without.
        self.affinity = None
        if neighbors is not None:
            self.affinity = DilatedAffinityHead(widths[1], neighbors.rates, neighbors)

    def forward(self, x: Tensor) -> Output:
        """Images (N, 3, H, W), or volumes (N, 3, D, H, W), around 0."""
        x = self.stem(x)
        skips = []
        for shrink in self.shrink:
            skips.append(x)
            x = shrink(x)
        for enlarge, merge in zip(reversed(self.enlarge), reversed(self.merge), strict=True):
            skip, half = skips.pop(), x
            # An odd size was rounded up on the way down: cut off the row or column too many.
            x = merge(skip + enlarge(x)[..., : skip.shape[-2], : skip.shape[-1]])
        return Output(self.classify(x), None if self.affinity is None else self.affinity(half))


def to_input(images: Tensor, device: torch.device) -> Tensor:
    """Bytes (N, ..., 3) to floats (N, 3, ...) around 0, in memory as channels_last."""
    return images.to(device).movedim(-1, 1).float() / 127.5 - 1
