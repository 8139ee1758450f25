"""Instance affinities on a CPU: launches the loops of instance_affinity.cpp."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from tritonaff.native.library import CODES, images, integers, library, pointer

NAME = "instance_affinity"
TERMS = 5
# A step that leads outside any volume, from any voxel, and does not overflow 64 bits.
FAR = 1 << 62


class Volumes(ctypes.Structure):
    """A tensor (N, K, D, H, W); instance_affinity.cpp holds the same fields."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int64),
        *((f"stride_{axis}", ctypes.c_int64) for axis in "nkdhw"),
    )


class Call(ctypes.Structure):
    """Sizes and options; instance_affinity.cpp holds the same fields."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("n", "k", "depth", "height", "width")),
        ("steps", ctypes.POINTER(ctypes.c_int64)),
        *((name, ctypes.c_int64) for name in ("has_background", "background")),
        *((name, ctypes.c_int64) for name in ("has_ignored", "ignored", "invert")),
        ("gamma", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("misses", "focal")),
    )


def forward(
    logits: Tensor,
    ids: Tensor,
    offsets: list[int],
    background: int | None,
    ignore_index: int | None,
    invert: bool,
    gamma: float,
    misses: bool,
    focal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Four sums and counts, each (N, K, 2), as ops/instance_affinity.py defines them."""
    tables = torch.zeros(*logits.shape[:2], TERMS, 2, dtype=torch.float64)
    call = _call(logits, offsets, background, ignore_index, invert, gamma, misses, focal)
    library(NAME).instance_affinity_forward(
        ctypes.byref(call),
        ctypes.byref(_volumes(logits)),
        ctypes.byref(images(ids)),
        pointer(tables),
        ctypes.c_int64(torch.get_num_threads()),
    )
    *sums, count = tables.unbind(dim=2)
    log_loss, miss_sum, miss_square_sum, focal_sum = (x.to(torch.float32) for x in sums)
    return log_loss, miss_sum, miss_square_sum, focal_sum, count.to(torch.int64)


def backward(
    coefficients: Tensor,
    logits: Tensor,
    ids: Tensor,
    offsets: list[int],
    background: int | None,
    ignore_index: int | None,
    invert: bool,
    gamma: float,
    misses: bool,
    focal: bool,
) -> Tensor:
    """The gradient of the logits, given the gradients (N, K, 2, 4) of the sums."""
    grad = torch.empty_like(logits)
    call = _call(logits, offsets, background, ignore_index, invert, gamma, misses, focal)
    library(NAME).instance_affinity_backward(
        ctypes.byref(call),
        pointer(coefficients),
        ctypes.byref(_volumes(logits)),
        ctypes.byref(images(ids)),
        ctypes.byref(_volumes(grad)),
        ctypes.c_int64(torch.get_num_threads()),
    )
    return grad


def _call(
    logits: Tensor,
    offsets: list[int],
    background: int | None,
    ignore_index: int | None,
    invert: bool,
    gamma: float,
    misses: bool,
    focal: bool,
) -> Call:
    steps = integers([max(-FAR, min(FAR, distance)) for distance in offsets])
    numbers = (
        part for number in (background, ignore_index) for part in (number is not None, number or 0)
    )
    return Call(*logits.shape, steps, *numbers, invert, gamma, misses, focal)


def _volumes(tensor: Tensor) -> Volumes:
    return Volumes(tensor.data_ptr(), CODES[tensor.dtype], *tensor.stride())
