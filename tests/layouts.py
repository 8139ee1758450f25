"""The memory layouts that every operation has to read."""

import torch

LAYOUTS = ["contiguous", "channels_last", "strided"]


def laid_out(tensor, layout):
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        return torch.stack([tensor, -tensor], dim=-1)[..., 0]
    return tensor
