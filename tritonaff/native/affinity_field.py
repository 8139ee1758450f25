"""Launches affinity_field.cpp, with the functions of tritonaff/portable/affinity_field.py."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from tritonaff.native import library
from tritonaff.native.library import images, integers, pointer
from tritonaff.portable.blocks import grad_dtype, label_dtype, num_labels

NAME = "affinity_field"
TAKES_ONE_CHANNEL = True


def statistics(
    logits: Tensor, target: Tensor, kernel_sizes: list[int], ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Totals (2, K) and counts (labels, K + 1) as ops/affinity_field.py defines them; labels, and
    the softmax statistics top and rest, each (N, 1, H, W).
    """
    n, c, height, width = logits.shape
    k, labels, pixels = len(kernel_sizes), num_labels(c), (n, 1, height, width)
    pair_count = torch.empty(k, dtype=torch.int64)
    counts = torch.empty(labels, k + 1, dtype=torch.int64)
    label = torch.empty(pixels, dtype=label_dtype(c))
    top = torch.empty(pixels, dtype=logits.dtype)
    rest = torch.empty(pixels, dtype=torch.float32)
    library.library(NAME).affinity_field_statistics(
        ctypes.byref(images(logits)),
        ctypes.byref(images(target)),
        integers([n, c, height, width]),
        ctypes.c_int64(ignore_index),
        ctypes.c_int64(k),
        _distances(kernel_sizes),
        pointer(pair_count),
        pointer(counts),
        pointer(label),
        ctypes.c_int64(label.element_size()),
        ctypes.byref(images(top)),
        pointer(rest),
        ctypes.c_int64(torch.get_num_threads()),
    )
    edge_count = counts[:, :-1].sum(dim=0)
    totals = torch.stack((edge_count, labels * pair_count - edge_count))
    return totals, counts, label, top, rest


def compute(
    logits: Tensor,
    label: Tensor,
    top: Tensor,
    rest: Tensor,
    kernel_sizes: list[int],
    margin: float,
    eps: float,
    *,
    with_tables: bool,
    grad_sums: Tensor | None,
    grad_log_loss: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Sums (2, C, K), edges first, log loss (labels,) and the number 0, if asked for; and the
    gradient of the logits, if the gradients of sums and log loss are given. None in place of the
    others.
    """
    n, c, height, width = logits.shape
    sums = torch.empty(2, c, len(kernel_sizes))
    log_loss = torch.empty(num_labels(c))
    grad = None
    if grad_sums is not None:
        grad = torch.empty_like(logits, dtype=grad_dtype(logits))
        grad_sums = grad_sums.float()
    if grad_log_loss is not None:
        grad_log_loss = grad_log_loss.float()
    library.library(NAME).affinity_field_compute(
        ctypes.byref(images(logits)),
        ctypes.byref(images(label)),
        ctypes.byref(images(top)),
        ctypes.byref(images(rest)),
        integers([n, c, height, width]),
        ctypes.c_int64(len(kernel_sizes)),
        _distances(kernel_sizes),
        ctypes.c_double(margin),
        ctypes.c_double(eps),
        pointer(grad_sums),
        pointer(grad_log_loss),
        None if grad is None else ctypes.byref(images(grad)),
        pointer(sums),
        pointer(log_loss),
        ctypes.c_int64(torch.get_num_threads()),
    )
    if not with_tables:
        return None, None, None, grad
    return sums, log_loss, torch.zeros(()), grad


def scale_(grad: Tensor, scale: Tensor) -> None:
    """grad *= scale, in place. Nothing multiplies most losses: scale is 1."""
    if scale.item() != 1:
        grad.mul_(scale)


def _distances(kernel_sizes: list[int]) -> ctypes.Array[ctypes.c_int64]:
    return integers([(size - 1) // 2 for size in kernel_sizes])
