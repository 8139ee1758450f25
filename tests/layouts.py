"""The memory layouts that every operation has to read."""

import torch

LAYOUTS = ["contiguous", "channels_last", "strided", "cropped"]


def laid_out(tensor, layout):
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        return torch.stack([tensor, -tensor], dim=-1)[..., 0]
    if layout == "cropped":
        return torch.nn.functional.pad(tensor, (1, 2, 2, 1))[..., 2:-1, 1:-2]
    return tensor
