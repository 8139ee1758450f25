from __future__ import annotations

import math

import torch
from torch import Tensor

from tritonaff.kernels.affinity_field.blocks import (
    BLOCK_SCALE,
    BLOCK_SUM,
    PATCHES_IN_A_PROGRAM,
    count_programs,
    passes,
    patch_blocks,
    patches_of,
    pixel_blocks,
    pixel_grid,
    rows,
    strip_blocks,
    strip_grid,
    strip_programs,
    undivided,
)
from tritonaff.kernels.affinity_field.counts import counts_kernel
from tritonaff.kernels.affinity_field.dense import dense_kernel
from tritonaff.kernels.affinity_field.edges import edge_kernel
from tritonaff.kernels.affinity_field.finish import finish_kernel, scale_kernel
from tritonaff.kernels.affinity_field.softmax import statistics_kernel
from tritonaff.kernels.shared import (
    cdiv,
    even_strides,
    evenly_spaced,
    launch,
    next_power_of_2,
    pixel_step,
)
from tritonaff.portable.blocks import grad_dtype, in_layout_of


def statistics(
    logits: Tensor, target: Tensor, kernel_sizes: list[int], ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Totals (2, K) and counts (C, K + 1) as ops/affinity_field.py has them; labels and the softmax
    statistics top and rest (N, 1, H, W).
    """
    n, num_classes, height, width = logits.shape
    # Not planes: a program reads all classes of its pixels, and what it does not need at once waits
    # in a cache.
    logits, target = evenly_spaced(logits), target.contiguous()
    top = logits.new_empty(n, 1, height, width)  # one of them
    rest = torch.empty_like(top, dtype=torch.float32)
    label = torch.empty_like(top, dtype=torch.int16)
    new_table = logits.new_empty if n > 0 else logits.new_zeros
    totals = new_table((2, len(kernel_sizes)), dtype=torch.int64)
    counts = new_table((num_classes, len(kernel_sizes) + 1), dtype=torch.int64)
    if n > 0:
        launch(statistics_kernel, pixel_grid(logits),
            logits, target, top, rest, label, totals, counts, num_classes, height * width,
            *even_strides(logits), target.stride(0), ignore_index,
            totals.numel(), counts.numel(), **pixel_blocks(logits),
        )  # fmt: skip
        patches, patch = patches_of(logits), undivided(patch_blocks(logits))
        for i, sizes in enumerate(passes(kernel_sizes)):
            launch(counts_kernel, (count_programs(patches),),
                label, totals, counts, num_classes, height, width, patches, PIXELS=i == 0,
                BLOCK_CLASSES=next_power_of_2(num_classes), **sizes, **patch,
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
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """If asked for, sums (2, C, K), edges first, log loss (C,) and the number 0; and, given the
    gradients with respect to sums and log loss, that with respect to the logits.
    """
    given, logits = logits, planes(logits)
    n, num_classes, height, width = logits.shape
    k = len(kernel_sizes)
    with_gradient = grad_sums is not None
    sums = log_loss = zero = grad = dense = edges = None
    strips, patches = strip_programs(logits), patches_of(logits)
    edge_programs = cdiv(patches, PATCHES_IN_A_PROGRAM)
    passes_of_sizes = passes(kernel_sizes)
    if with_tables:
        new_table = logits.new_empty if n > 0 else logits.new_zeros
        sums = new_table((2, num_classes, k), dtype=torch.float32)
        log_loss = new_table(num_classes, dtype=torch.float32)
        zero = new_table((), dtype=torch.float32)
        # Programs last: what adds them up reads consecutive numbers.
        dense = logits.new_empty(num_classes, k, strips, dtype=torch.float32)
        edges = logits.new_empty(2 * k + 1, num_classes, edge_programs, dtype=torch.float32)
    if with_gradient:
        # First p d loss / d p, in the dtype and place of the result, unless it is added up. In
        # bfloat16 edge tiles replace what the dense tile wrote: to take some of it out again would
        # leave its rounding.
        dtype = grad_dtype(logits) if len(passes_of_sizes) == 1 else torch.float32
        grad = torch.empty_like(logits, dtype=dtype, memory_format=torch.contiguous_format)
    if n > 0:
        shape = num_classes, height, width, logits.stride(0), logits.stride(1)
        limit = math.log((1 - eps) / eps)
        asked = {"TABLES": with_tables, "GRADIENT": with_gradient}
        for i, sizes in enumerate(passes_of_sizes):
            launch(dense_kernel, strip_grid(logits),
                grad_sums, logits, label, top, rest, dense, grad, n, *shape, limit, eps,
                rows(logits), strips, ADD=i > 0, **asked, **sizes, **strip_blocks(logits),
            )  # fmt: skip
            launch(edge_kernel, (edge_programs,),
                grad_sums, logits, label, top, rest, edges, grad, *shape, margin, limit, eps,
                patches, edge_programs, CROSS_ENTROPY=i == 0,
                REPLACE=grad is not None and grad.dtype != torch.float32,
                BLOCK_CLASSES=next_power_of_2(num_classes), **asked, **sizes,
                **patch_blocks(logits),
            )  # fmt: skip
        sum_programs = num_classes * (k + 1) if with_tables else 0
        pixel_programs = pixel_grid(logits)[0] if with_gradient else 0
        launch(finish_kernel, (sum_programs + pixel_programs,),
            dense, edges, sums, log_loss, zero,
            grad_log_loss, logits, label, top, rest, grad, num_classes, k, height * width,
            logits.stride(0), logits.stride(1), strips, edge_programs, sum_programs,
            CROSS_ENTROPY=grad_log_loss is not None, BLOCK_SUM=BLOCK_SUM, **asked,
            **pixel_blocks(logits),
        )  # fmt: skip
    del logits, dense, edges
    if grad is not None:
        grad = in_layout_of(given, grad, grad_dtype(given))
    return sums, log_loss, zero, grad


def scale_(grad: Tensor, scale: Tensor) -> None:
    """Multiplies a tensor without gaps by a number on its device; by 1, as it mostly is, in no
    time.
    """
    if grad.numel() > 0:
        launch(scale_kernel, (cdiv(grad.numel(), BLOCK_SCALE),),
            grad, scale, grad.numel(), BLOCK=BLOCK_SCALE,
        )  # fmt: skip


def planes(logits: Tensor) -> Tensor:
    """Logits whose pixels follow one another: others are copied. A march through them would move
    a sector of 32 bytes for every number.
    """
    return logits if pixel_step(logits) == 1 else logits.contiguous()
