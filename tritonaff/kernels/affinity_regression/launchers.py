"""Launchers of affinity regression's kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonaff.kernels.affinity_regression.blocks import (
    GRADIENT_CLASSES,
    GRAM_CLASSES,
    Blocks,
    default_blocks,
    gradient_options,
    gram_options,
    matrix_options,
    pairs_gradient_options,
    pairs_options,
    statistics_options,
)
from tritonaff.kernels.affinity_regression.every_pixel import gradient_kernel, gram_kernel
from tritonaff.kernels.affinity_regression.many_classes import (
    block_gradient_kernel,
    block_gram_kernel,
    block_labels_kernel,
    statistics_kernel,
)
from tritonaff.kernels.affinity_regression.matrix import matrix_kernel
from tritonaff.kernels.affinity_regression.pairs import pairs_gradient_kernel, pairs_kernel
from tritonaff.kernels.blocks import overridden
from tritonaff.kernels.shared import cdiv, even_strides, evenly_spaced, launch
from tritonaff.portable.affinity_regression import factors, squared_error_of
from tritonaff.portable.blocks import in_layout_of


def forward(
    logits: Tensor,
    target: Tensor,
    grid_sizes: list[int],
    ignore_index: int,
    blocks: Blocks | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Squared error [N], number of pairs [N] and Gram matrices [N, 3, C, C]; with grids the last
    are [N, 0, C, C].
    """
    blocks = blocks or overridden("affinity_regression", default_blocks(logits))
    n, num_classes, height, width = logits.shape
    if grid_sizes:
        points = sum(size * size for size in grid_sizes)
        options = pairs_options(logits, points, blocks)
        programs = cdiv(points, options["BLOCK"] * options["STEPS"])
        error = logits.new_empty(n, programs, dtype=torch.float32)
        pair_count = logits.new_empty(n, dtype=torch.int64)
        if n > 0:
            launch(pairs_kernel, (n * programs,),
                logits, target, error, pair_count, height, width, points,
                *logits.stride(), *target.stride(), ignore_index,
                GRIDS=tuple(grid_sizes), **options,
            )  # fmt: skip
        squared_error = error.view(n) if programs == 1 else error.sum(dim=1)
        gram = logits.new_empty(n, 0, num_classes, num_classes, dtype=torch.float64)
        return squared_error, pair_count, gram

    logits = evenly_spaced(logits)
    options = gram_options(logits, blocks)
    splits = cdiv(height * width, options["BLOCK_P"] * options["STEPS"])
    partial = logits.new_empty(splits, n, num_classes, 2 * num_classes, dtype=torch.float64)
    count = logits.new_empty(splits, n, num_classes, dtype=torch.int32)
    target = target.contiguous()
    if n > 0:
        pixels = height * width, n, *even_strides(logits), ignore_index
        if num_classes <= GRAM_CLASSES:
            launch(gram_kernel, (splits * n,), logits, target, partial, count, *pixels, **options)
        else:
            programs = splits * n * cdiv(num_classes, options["BLOCK_A"]) ** 2
            inputs = logits, target, root_statistics(logits, target, ignore_index, blocks)
            launch(block_gram_kernel, (programs,), *inputs, partial, *pixels, **options)
            launch(block_labels_kernel, (programs,), *inputs, partial, count, *pixels, **options)
    dd, dy = partial.sum(dim=0).chunk(2, dim=2)
    labels = count.sum(dim=0)
    # M = D + 2 Y, and Y Y^T is diagonal.
    dm = dd + 2 * dy
    mm = dm + dm.mT - dd + torch.diag_embed(4 * labels.double())
    gram = torch.stack((dd, dm, mm), dim=1)
    return squared_error_of(gram).float(), labels.sum(dim=1).square(), gram


def backward(
    grad_squared_error: Tensor,
    logits: Tensor,
    target: Tensor,
    gram: Tensor,
    grid_sizes: list[int],
    ignore_index: int,
    blocks: Blocks | None = None,
) -> Tensor:
    """The gradient of the logits, given the gradient of the squared errors."""
    blocks = blocks or overridden("affinity_regression", default_blocks(logits))
    n, num_classes, height, width = logits.shape
    if grid_sizes:
        grad = torch.empty_like(logits)
        points = sum(size * size for size in grid_sizes)
        options = pairs_gradient_options(logits, points, blocks)
        programs = cdiv(points, options["BLOCK_I"]) + cdiv(height * width, options["BLOCK_P"])
        if n > 0:
            launch(pairs_gradient_kernel, (n * programs,),
                grad_squared_error, logits, target, grad,
                height, width, points, n, height * width,
                *logits.stride(), *target.stride(), *grad.stride(), ignore_index,
                GRIDS=tuple(grid_sizes), **options,
            )  # fmt: skip
        return grad

    # Factors of D and M; M = D + 2 Y.
    factor_d, factor_m = factors(gram, grad_squared_error).chunk(2, dim=2)
    factor = torch.cat((factor_d + factor_m, 2 * factor_m), dim=2).float()
    options = gradient_options(logits, blocks)
    programs = n * cdiv(height * width, options["BLOCK_P"])
    given, logits, target = logits, evenly_spaced(logits), target.contiguous()
    grad = evenly_spaced(torch.empty_like(logits))
    if n > 0:
        pixels = height * width, *even_strides(logits), *even_strides(grad), ignore_index
        if num_classes <= GRADIENT_CLASSES:
            launch(gradient_kernel, (programs,), factor, logits, target, grad, *pixels, **options)
        else:
            inputs = logits, target, root_statistics(logits, target, ignore_index, blocks)
            launch(block_gradient_kernel, (programs,), factor, *inputs, grad, *pixels, **options)
    return in_layout_of(given, grad)


def root_statistics(logits: Tensor, target: Tensor, ignore_index: int, blocks: Blocks) -> Tensor:
    """Four numbers of every pixel, [N, 4, H W], as statistics() in roots.py gives them, for evenly
    spaced logits.
    """
    n, _, height, width = logits.shape
    result = logits.new_empty(n, 4, height * width, dtype=torch.float32)
    options = statistics_options(logits, blocks)
    launch(statistics_kernel, (n * cdiv(height * width, options["BLOCK_P"]),),
        logits, target, result, height * width, *even_strides(logits), ignore_index, **options,
    )  # fmt: skip
    return result


def square_root_affinity(
    logits: Tensor, grid_sizes: list[int], blocks: Blocks | None = None
) -> Tensor:
    """S^T S at the points: [N, L, L]."""
    blocks = blocks or overridden("affinity_regression", default_blocks(logits))
    n, _, height, width = logits.shape
    points = sum(size * size for size in grid_sizes) if grid_sizes else height * width
    affinity = logits.new_empty(n, points, points, dtype=torch.float32)
    options = matrix_options(logits, blocks)
    programs = cdiv(points, options["BLOCK_I"])
    if n > 0:
        launch(matrix_kernel, (n * programs, programs),
            logits, affinity, height, width, points, *logits.stride(),
            GRIDS=tuple(grid_sizes), **options,
        )  # fmt: skip
    return affinity
