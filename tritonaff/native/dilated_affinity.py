"""Dilated affinity in native kernels, on CPUs.

Same functions as ``portable/dilated_affinity.py``; dilated_affinity.cpp has the kernels.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from tritonaff.native.library import images, integers, library, pointer

NAME = "dilated_affinity"


def forward(
    logits: Tensor,
    target: Tensor,
    offsets: list[int],
    gamma: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss sums, signal counts and correct counts, each (R, 9, 2); pixel counts (R, 9)."""
    num_rates = len(offsets) // 16
    loss_sum = logits.new_empty(num_rates, 9, 2, dtype=torch.float32)
    signal_count = target.new_empty(num_rates, 9, 2, dtype=torch.int64)
    correct_count = torch.empty_like(signal_count)
    pixel_count = target.new_empty(num_rates, 9, dtype=torch.int64)
    library(NAME).dilated_affinity_tables(
        *_arguments(logits, target, offsets, gamma, ignore_index),
        *map(pointer, (loss_sum, signal_count, correct_count, pixel_count)),
    )
    return loss_sum, signal_count, correct_count, pixel_count


def backward(
    grad_loss_sum: Tensor,
    logits: Tensor,
    target: Tensor,
    offsets: list[int],
    gamma: float,
    ignore_index: int,
) -> Tensor:
    """The gradient of the logits, given the gradient (R, 9, 2) of the loss sums."""
    grad = torch.empty_like(logits)
    library(NAME).dilated_affinity_gradient(
        pointer(grad_loss_sum),
        *_arguments(logits, target, offsets, gamma, ignore_index),
        ctypes.byref(images(grad)),
    )
    return grad


def _arguments(
    logits: Tensor, target: Tensor, offsets: list[int], gamma: float, ignore_index: int
) -> tuple[object, ...]:
    n, channels, height, width = logits.shape
    return (
        ctypes.byref(images(logits)),
        ctypes.byref(images(target)),
        integers([n, channels // 8, height, width]),
        integers(offsets),
        ctypes.c_double(gamma),
        ctypes.c_int64(ignore_index),
        ctypes.c_int64(torch.get_num_threads()),
    )
