"""A stand-in for the study's backbone."""

import torch
from torch import nn
from torch.nn import functional as F


class Backbone(nn.Module):
    """Means of the pixels, mixed, in the shapes of the real backbone's features."""

    channels = 4, 5, 6, 7

    def __init__(self):
        super().__init__()
        torch.manual_seed(9)
        self.mix = nn.ModuleList(nn.Conv2d(3, c, kernel_size=1) for c in self.channels)

    def forward(self, images):
        x = (images.permute(0, 3, 1, 2).float() - 127) / 128
        return [mix(F.avg_pool2d(x, 4 << k)) for k, mix in enumerate(self.mix)]
