"""Launchers of the kernels of instance affinities."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonaff.kernels.blocks import overridden
from tritonaff.kernels.instance_affinity.blocks import (
    Blocks,
    grid,
    num_fours,
    options,
    tables_steps,
)
from tritonaff.kernels.instance_affinity.gradient import gradient_kernel
from tritonaff.kernels.instance_affinity.tables import tables_kernel
from tritonaff.kernels.shared import launch


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
    blocks: Blocks | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Four sums and counts, [N, K, 2] each, as ops/instance_affinity.py defines them."""
    blocks = blocks or overridden("instance_affinity", Blocks())
    n, num_channels, *size = logits.shape
    steps = tables_steps(logits, blocks)
    programs = grid(logits, steps * blocks.tables_voxels)
    shape = n, programs[0] // max(1, n), num_channels, 2
    sums = logits.new_zeros(*shape, 4, dtype=torch.float32)
    counts = logits.new_empty(shape, dtype=torch.int32)
    if n > 0:
        launch(tables_kernel, programs,
            logits, ids, sums, counts,
            *size, num_fours(logits), steps, *logits.stride(), *ids.stride(),
            background or 0, ignore_index or 0, gamma,
            **options(ids, offsets, background, ignore_index, invert, misses, focal),
            BLOCK_V=blocks.tables_voxels,
        )  # fmt: skip
    log_loss, miss_sum, miss_square_sum, focal_sum = (
        table.clone(memory_format=torch.contiguous_format)
        for table in sums.sum(dim=1).unbind(dim=-1)
    )
    return log_loss, miss_sum, miss_square_sum, focal_sum, counts.sum(dim=1)


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
    blocks: Blocks | None = None,
) -> Tensor:
    """The gradient of the logits, given the gradients [N, K, 2, 4] of the sums."""
    blocks = blocks or overridden("instance_affinity", Blocks())
    n, _, *size = logits.shape
    grad = torch.empty_like(logits)
    if n > 0:
        launch(gradient_kernel, grid(logits, blocks.voxels),
            coefficients, logits, ids, grad,
            *size, num_fours(logits),
            *logits.stride(), *grad.stride(), *ids.stride(),
            background or 0, ignore_index or 0, gamma,
            **options(ids, offsets, background, ignore_index, invert, misses, focal),
            BLOCK_V=blocks.voxels,
        )  # fmt: skip
    return grad
