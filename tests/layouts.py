"""The memory layouts that every operation has to read."""

import importlib.metadata

import torch

from tritonaff.native.library import find_compiler

# The implementations that can run here: tiles are interpreted where there is no GPU.
try:
    version = importlib.metadata.version("triton")
except importlib.metadata.PackageNotFoundError:
    version = "0.0"
HAS_TILES = tuple(int(part) for part in version.split(".")[:2]) >= (3, 6)
BACKENDS = ["portable"]
BACKENDS += ["native"] if find_compiler() else []
BACKENDS += ["triton"] if HAS_TILES else []

LAYOUTS = ["contiguous", "channels_last", "strided", "cropped"]


def laid_out(tensor, layout):
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        return torch.stack([tensor, -tensor], dim=-1)[..., 0]
    if layout == "cropped":
        return torch.nn.functional.pad(tensor, (1, 2, 2, 1))[..., 2:-1, 1:-2]
    return tensor
