"""Launchers of the affinity field's kernels."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tritonaff.kernels.affinity_field.blocks import (
    SCALE_BLOCK,
    Blocks,
    count_programs,
    default_blocks,
    num_patches,
    part_options,
    patch_options,
    pixel_grid,
    pixel_options,
    strip_grid,
    strip_options,
    strip_programs,
    strip_rows,
)
from tritonaff.kernels.affinity_field.counts import counts_kernel
from tritonaff.kernels.affinity_field.dense import HALO, dense_kernel
from tritonaff.kernels.affinity_field.edges import edge_kernel
from tritonaff.kernels.affinity_field.finish import finish_kernel, scale_kernel
from tritonaff.kernels.affinity_field.softmax import statistics_kernel
from tritonaff.kernels.blocks import overridden
from tritonaff.kernels.shared import (
    cdiv,
    even_strides,
    evenly_spaced,
    launch,
    next_power_of_2,
    pixel_step,
    steps_in_32_bits,
)
from tritonaff.portable.blocks import grad_dtype, in_layout_of


def statistics(
    logits: Tensor,
    target: Tensor,
    kernel_sizes: list[int],
    ignore_index: int,
    blocks: Blocks | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Totals [2, K] and counts [C, K + 1] as ops/affinity_field.py has them; labels [N, 1, H, W];
    the softmax statistics top [N, 1, H, W] and rest [N, 1, H, W].
    """
    n, num_classes, height, width = logits.shape
    blocks = blocks or overridden("affinity_field", default_blocks(logits))
    # Not planes(): a program reads all classes of its pixels, and numbers that it does not need at
    # once wait in a cache.
    logits, target = evenly_spaced(logits), target.contiguous()
    top = logits.new_empty(n, 1, height, width)  # it is one of the logits
    rest = torch.empty_like(top, dtype=torch.float32)
    label = torch.empty_like(top, dtype=torch.int16)
    new_table = logits.new_empty if n > 0 else logits.new_zeros
    totals = new_table((2, len(kernel_sizes)), dtype=torch.int64)
    counts = new_table((num_classes, len(kernel_sizes) + 1), dtype=torch.int64)
    if n > 0:
        launch(statistics_kernel, pixel_grid(logits, blocks),
            logits, target, top, rest, label, totals, counts, num_classes, height * width,
            *even_strides(logits), target.stride(0), ignore_index,
            totals.numel(), counts.numel(), **pixel_options(logits, blocks),
        )  # fmt: skip
        patches = num_patches(logits, blocks)
        for i, sizes in enumerate(passes(kernel_sizes)):
            launch(counts_kernel, (count_programs(patches, blocks),),
                label, totals, counts, num_classes, height, width, patches, COUNT_PIXELS=i == 0,
                BLOCK_CLASSES=next_power_of_2(num_classes), **sizes, **patch_options(blocks),
            )  # fmt: skip
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
    blocks: Blocks | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """If asked for: sums [2, C, K], edges first; log loss [C]; the number 0. Given the gradients of
    sums and log loss: the gradient of the logits.
    """
    given, logits = logits, planes(logits)
    blocks = blocks or overridden("affinity_field", default_blocks(logits))
    n, num_classes, height, width = logits.shape
    k = len(kernel_sizes)
    with_gradient = grad_sums is not None
    sums = log_loss = zero = grad = dense = edges = None
    strips, patches = strip_programs(logits, blocks), num_patches(logits, blocks)
    edge_programs = cdiv(patches, blocks.patches_in_a_program)
    passes_of_sizes = passes(kernel_sizes)
    if with_tables:
        new_table = logits.new_empty if n > 0 else logits.new_zeros
        sums = new_table((2, num_classes, k), dtype=torch.float32)
        log_loss = new_table(num_classes, dtype=torch.float32)
        zero = new_table((), dtype=torch.float32)
        # Programs last: finish_kernel reads consecutive numbers.
        dense = logits.new_empty(num_classes, k, strips, dtype=torch.float32)
        edges = logits.new_empty(2 * k + 1, num_classes, edge_programs, dtype=torch.float32)
    if with_gradient:
        # First p d loss / d p, in the dtype and place of the result unless several passes add to
        # it. In bfloat16 edge_kernel replaces the dense gradient: to take some of it out again
        # would leave its rounding.
        dtype = grad_dtype(logits) if len(passes_of_sizes) == 1 else torch.float32
        grad = torch.empty_like(logits, dtype=dtype, memory_format=torch.contiguous_format)
    if n > 0:
        shape = num_classes, height, width, logits.stride(0), logits.stride(1)
        limit = math.log((1 - eps) / eps)
        asked = {"TABLES": with_tables, "GRADIENT": with_gradient}
        for i, sizes in enumerate(passes_of_sizes):
            launch(dense_kernel, strip_grid(logits, blocks),
                grad_sums, logits, label, top, rest, dense, grad, n, *shape, limit, eps,
                strip_rows(logits, blocks), strips, ADD=i > 0,
                **asked, **sizes, **strip_options(logits, blocks),
            )  # fmt: skip
            launch(edge_kernel, (edge_programs,),
                grad_sums, logits, label, top, rest, edges, grad, *shape, margin, limit, eps,
                patches, edge_programs, CROSS_ENTROPY=i == 0,
                REPLACE=grad is not None and grad.dtype != torch.float32,
                BLOCK_CLASSES=next_power_of_2(num_classes),
                **asked, **sizes, **part_options(blocks),
            )  # fmt: skip
        sum_programs = num_classes * (k + 1) if with_tables else 0
        pixel_programs = pixel_grid(logits, blocks)[0] if with_gradient else 0
        launch(finish_kernel, (sum_programs + pixel_programs,),
            dense, edges, sums, log_loss, zero,
            grad_log_loss, logits, label, top, rest, grad, num_classes, k, height * width,
            logits.stride(0), logits.stride(1), strips, edge_programs, sum_programs,
            CROSS_ENTROPY=grad_log_loss is not None, BLOCK_SUM=blocks.partial_sums,
            **asked, **pixel_options(logits, blocks),
        )  # fmt: skip
    del logits, dense, edges
    if grad is not None:
        grad = in_layout_of(given, grad, grad_dtype(given))
    return sums, log_loss, zero, grad


def scale_(grad: Tensor, scale: Tensor, block: int = SCALE_BLOCK) -> None:
    """Multiplies a tensor without gaps by a number on its device, in place. Usually the number is
    1, and this takes no time.
    """
    if grad.numel() > 0:
        launch(scale_kernel, (cdiv(grad.numel(), block),), grad, scale, grad.numel(), BLOCK=block)


def planes(logits: Tensor) -> Tensor:
    """The logits; a copy if the pixels of a class do not follow one another in memory. A march
    through other layouts would move a sector of 32 bytes for every number.
    """
    return logits if pixel_step(logits) == 1 else logits.contiguous()


def passes(kernel_sizes: list[int]) -> list[dict[str, Any]]:
    """Sizes go in one pass if a march keeps them in registers, in a second one if they are larger.

    COLUMNS are the columns of a pass in the tables, followed by the number of all columns. REACH is
    the largest distance of the first pass, 0 for the second.
    """
    radii = steps_in_32_bits([(size - 1) // 2 for size in kernel_sizes])
    found: list[dict[str, Any]] = []
    for near in (True, False):
        columns = tuple(k for k, d in enumerate(radii) if (d <= HALO.value) == near)
        if columns:
            found.append(
                {
                    "RADII": tuple(radii[k] for k in columns),
                    "COLUMNS": (*columns, len(radii)),
                    "REACH": max(radii[k] for k in columns) if near else 0,
                }
            )
    return found
