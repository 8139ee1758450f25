"""Launchers of the native kernels of affinity regression: the functions of portable."""

from __future__ import annotations

import ctypes
from ctypes import byref

import torch
from torch import Tensor

from tritonaff.native.library import images, integers, library, pointer

NAME = "affinity_regression"


def forward(
    logits: Tensor, target: Tensor, grid_sizes: list[int], ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Squared error (N,), number of pairs (N,), and the Gram matrices (N, 3, C, C).

    An empty list of grid sizes means every pixel. For the few points of grids the backward pass
    computes the Gram matrices again, and the returned tensor is (N, 0, C, C).
    """
    n, c = logits.shape[:2]
    squared_error = torch.empty(n)
    pair_count = torch.empty(n, dtype=torch.int64)
    gram = torch.empty(n, 0 if grid_sizes else 3, c, c, dtype=torch.float64)
    library(NAME).forward(
        byref(images(logits)),
        byref(images(target)),
        shape(logits, grid_sizes, ignore_index),
        pointer(squared_error),
        pointer(pair_count),
        pointer(None if grid_sizes else gram),
    )
    return squared_error, pair_count, gram


def backward(
    grad_squared_error: Tensor,
    logits: Tensor,
    target: Tensor,
    gram: Tensor,
    grid_sizes: list[int],
    ignore_index: int,
) -> Tensor:
    """The gradient of the logits, given the gradient (N,) of the squared errors."""
    grad = torch.zeros_like(logits) if grid_sizes else torch.empty_like(logits)
    library(NAME).backward(
        byref(images(logits)),
        byref(images(target)),
        shape(logits, grid_sizes, ignore_index),
        pointer(grad_squared_error),
        pointer(None if grid_sizes else gram),
        byref(images(grad)),
    )
    return grad


def square_root_affinity(logits: Tensor, grid_sizes: list[int]) -> Tensor:
    """S^T S at the points: (N, L, L)."""
    n, c, height, width = logits.shape
    points = sum(size * size for size in grid_sizes) if grid_sizes else height * width
    s = torch.empty(n, c, points)
    library(NAME).square_roots(byref(images(logits)), shape(logits, grid_sizes), pointer(s))
    return torch.bmm(s.mT, s)


def shape(
    logits: Tensor, grid_sizes: list[int], ignore_index: int = 0
) -> ctypes.Array[ctypes.c_int64]:
    threads = torch.get_num_threads()
    return integers([*logits.shape, ignore_index, threads, len(grid_sizes), *grid_sizes])
