"""Launchers of the kernels of the box-supervised pairwise loss."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonaff.kernels.blocks import overridden
from tritonaff.kernels.box_pairwise.blocks import Blocks
from tritonaff.kernels.box_pairwise.gradient import gradient_kernel
from tritonaff.kernels.box_pairwise.tables import tables_kernel
from tritonaff.kernels.shared import FAR, cdiv, launch


def forward(
    mask_logits: Tensor,
    similarity: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    dilation: int,
    blocks: Blocks | None = None,
) -> tuple[Tensor, Tensor]:
    """Sums of -log P and counts of pairs, [M] each, as ops/box_pairwise.py defines them."""
    blocks = blocks or overridden("box_pairwise", Blocks())
    m, height, width = mask_logits.shape
    programs = cdiv(height * width, blocks.pixels)
    sums = mask_logits.new_empty(m, programs, dtype=torch.float32)
    counts = mask_logits.new_empty(m, programs, dtype=torch.int32)
    if m > 0:
        launch(tables_kernel, (m * programs,),
            mask_logits, similarity, boxes.contiguous(), image_index.contiguous(), sums, counts,
            height, width, height * width, *mask_logits.stride(), *similarity.stride(),
            min(dilation, FAR), BLOCK_P=blocks.pixels,
        )  # fmt: skip
    return sums.sum(dim=1), counts.sum(dim=1)


def backward(
    coefficients: Tensor,
    mask_logits: Tensor,
    similarity: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    dilation: int,
    blocks: Blocks | None = None,
) -> Tensor:
    """The gradient of the logits, given the gradient [M] of the sums."""
    blocks = blocks or overridden("box_pairwise", Blocks())
    m, height, width = mask_logits.shape
    grad = torch.empty_like(mask_logits)
    if m > 0:
        launch(gradient_kernel, (m * cdiv(height * width, blocks.pixels),),
            coefficients, mask_logits, similarity, boxes.contiguous(), image_index.contiguous(),
            grad, height, width, height * width, *mask_logits.stride(), *grad.stride(),
            *similarity.stride(), min(dilation, FAR), BLOCK_P=blocks.pixels,
        )  # fmt: skip
    return grad
