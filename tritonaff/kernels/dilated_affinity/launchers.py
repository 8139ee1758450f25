"""Launchers of dilated affinity's kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonaff.kernels.blocks import overridden
from tritonaff.kernels.dilated_affinity.blocks import (
    Blocks,
    gradient_options,
    num_pairs,
    pixel_grid,
    tables_options,
    tables_steps,
)
from tritonaff.kernels.dilated_affinity.gradient import gradient_kernel
from tritonaff.kernels.dilated_affinity.tables import COUNTS, LOSSES, tables_kernel
from tritonaff.kernels.shared import launch


def forward(
    logits: Tensor,
    target: Tensor,
    offsets: list[int],
    gamma: float,
    ignore_index: int,
    blocks: Blocks | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss sums [R, 9, 2], signal counts [R, 9, 2], correct counts [R, 9, 2] and pixel counts
    [R, 9].
    """
    blocks = blocks or overridden("dilated_affinity", Blocks())
    n, _, height, width = logits.shape
    steps = tables_steps(logits, blocks)
    grid = pixel_grid(logits, steps * blocks.tables_pixels)
    shape = grid[0], len(offsets) // 16
    losses = logits.new_empty(*shape, LOSSES, 9, dtype=torch.float32)
    counts = logits.new_empty(*shape, COUNTS, 9, dtype=torch.int32)
    if n > 0:
        launch(tables_kernel, grid,
            logits, target, losses, counts,
            height, width, num_pairs(logits), steps, *logits.stride(), *target.stride(),
            gamma, ignore_index, **tables_options(offsets, blocks),
        )  # fmt: skip
    loss_sum = losses.sum(dim=0).mT.contiguous()
    pixel_count, same, correct_different, correct_same = counts.sum(dim=0).unbind(dim=1)
    different = pixel_count * torch.arange(8, -1, -1, device=logits.device)
    signal_count = torch.stack((different, same), dim=-1)
    correct_count = torch.stack((correct_different, correct_same), dim=-1)
    return loss_sum, signal_count, correct_count, pixel_count.clone()


def backward(
    grad_loss_sum: Tensor,
    logits: Tensor,
    target: Tensor,
    offsets: list[int],
    gamma: float,
    ignore_index: int,
    blocks: Blocks | None = None,
) -> Tensor:
    """The gradient of the logits, given the gradient of the loss sums."""
    blocks = blocks or overridden("dilated_affinity", Blocks())
    n, _, height, width = logits.shape
    grad = torch.empty_like(logits)
    if n > 0:
        launch(gradient_kernel, pixel_grid(logits, blocks.pixels),
            grad_loss_sum, logits, target, grad,
            height, width, num_pairs(logits),
            *logits.stride(), *grad.stride(), *target.stride(),
            gamma, ignore_index, **gradient_options(offsets, blocks),
        )  # fmt: skip
    return grad
