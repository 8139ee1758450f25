from __future__ import annotations

import torch
from torch import Tensor

from tritonaff.kernels.dilated_affinity.blocks import (
    COUNTS,
    LOSSES,
    blocks,
    num_pairs,
    pixel_grid,
    steps,
    tables_blocks,
)
from tritonaff.kernels.dilated_affinity.gradient import gradient_kernel
from tritonaff.kernels.dilated_affinity.tables import tables_kernel
from tritonaff.kernels.shared import launch


def forward(
    logits: Tensor,
    target: Tensor,
    offsets: list[int],
    gamma: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss sums, signal counts and correct counts (R, 9, 2), pixel counts (R, 9)."""
    n, _, height, width = logits.shape
    block = tables_blocks(offsets)
    num_steps = steps(logits, block["BLOCK_P"])
    grid = pixel_grid(logits, num_steps * block["BLOCK_P"])
    shape = grid[0], len(offsets) // 16
    losses = logits.new_empty(*shape, LOSSES, 9, dtype=torch.float32)
    counts = logits.new_empty(*shape, COUNTS, 9, dtype=torch.int32)
    if n > 0:
        launch(tables_kernel, grid,
            logits, target, losses, counts,
            height, width, num_pairs(logits), num_steps, *logits.stride(), *target.stride(),
            gamma, ignore_index, **block,
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
) -> Tensor:
    """The gradient with respect to the logits, given that with respect to the loss sums."""
    n, _, height, width = logits.shape
    grad = torch.empty_like(logits)
    block = blocks(offsets)
    if n > 0:
        launch(gradient_kernel, pixel_grid(logits, block["BLOCK_P"]),
            grad_loss_sum, logits, target, grad,
            height, width, num_pairs(logits),
            *logits.stride(), *grad.stride(), *target.stride(),
            gamma, ignore_index, **block,
        )  # fmt: skip
    return grad
