"""Affinity regression as custom ops: opaque to the compiler, differentiable, whatever
implementation runs inside.

An empty list of grid sizes means every pixel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tritonaff.ops.backend import tile_runs, without_autocast
from tritonaff.ops.gradients import register_gradients
from tritonaff.portable import affinity_regression as portable
from tritonaff.portable.blocks import precision, sum_dtype

# The tiles hold a block of points with all their classes several times over.
MAX_TILE_CLASSES = 256
# Those for grids compare all pairs: beyond this the linear form, portable, is faster.
MAX_TILE_POINTS = 4096


@torch.library.custom_op("tritonaff::affinity_regression", mutates_args=())
def affinity_regression(
    logits: Tensor, target: Tensor, grid_sizes: Sequence[int], ignore_index: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Squared error and number of pairs (N,); Gram matrices (N, 3, C, C), none with grid sizes."""
    implementation = _implementation(logits, grid_sizes, backend)
    with without_autocast(logits):
        result: tuple[Tensor, Tensor, Tensor] = implementation.forward(
            logits, target, list(grid_sizes), ignore_index
        )
    return result


@affinity_regression.register_fake
def _(
    logits: Tensor, target: Tensor, grid_sizes: Sequence[int], ignore_index: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    n, c = logits.shape[:2]
    matrices = 0 if grid_sizes else 3
    return (
        logits.new_empty(n, dtype=precision(logits)),
        logits.new_empty(n, dtype=torch.int64),
        logits.new_empty(n, matrices, c, c, dtype=sum_dtype(logits.device)),
    )


@torch.library.custom_op("tritonaff::affinity_regression_backward", mutates_args=())
def affinity_regression_backward(
    grad_squared_error: Tensor,
    logits: Tensor,
    target: Tensor,
    gram: Tensor,
    grid_sizes: Sequence[int],
    ignore_index: int,
    backend: str,
) -> Tensor:
    """The gradient with respect to the logits, in their dtype and memory format."""
    implementation = _implementation(logits, grid_sizes, backend)
    with without_autocast(logits):
        grad: Tensor = implementation.backward(
            grad_squared_error.contiguous(), logits, target, gram, list(grid_sizes), ignore_index
        )
    return grad


@affinity_regression_backward.register_fake
def _(
    grad_squared_error: Tensor,
    logits: Tensor,
    target: Tensor,
    gram: Tensor,
    grid_sizes: Sequence[int],
    ignore_index: int,
    backend: str,
) -> Tensor:
    return torch.empty_like(logits)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, target, *ctx.options = inputs
    _, pair_count, gram = output
    ctx.save_for_backward(logits, target, gram)
    ctx.mark_non_differentiable(pair_count, gram)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_squared_error: Tensor | None, *_: Any) -> dict[str, Tensor]:
    if grad_squared_error is None:
        return {}
    grad = affinity_regression_backward(grad_squared_error, *ctx.saved_tensors, *ctx.options)
    return {"logits": grad}


register_gradients(affinity_regression, _backward, setup_context=_setup_context)


@torch.library.custom_op("tritonaff::square_root_affinity", mutates_args=())
def square_root_affinity(logits: Tensor, grid_sizes: Sequence[int], backend: str) -> Tensor:
    """The matrices (N, L, L)."""
    implementation = _implementation(logits, (), backend)
    with without_autocast(logits):
        affinity: Tensor = implementation.square_root_affinity(logits, list(grid_sizes))
    return affinity


@square_root_affinity.register_fake
def _(logits: Tensor, grid_sizes: Sequence[int], backend: str) -> Tensor:
    n, _, height, width = logits.shape
    points = sum(size * size for size in grid_sizes) if grid_sizes else height * width
    return logits.new_empty(n, points, points, dtype=precision(logits))


@torch.library.custom_op("tritonaff::square_root_affinity_backward", mutates_args=())
def square_root_affinity_backward(
    grad_affinity: Tensor, logits: Tensor, grid_sizes: Sequence[int]
) -> Tensor:
    """The gradient with respect to the logits; a plain matrix product, which needs no tile."""
    with without_autocast(logits):
        return portable.square_root_affinity_backward(grad_affinity, logits, list(grid_sizes))


@square_root_affinity_backward.register_fake
def _(grad_affinity: Tensor, logits: Tensor, grid_sizes: Sequence[int]) -> Tensor:
    return torch.empty_like(logits)


def _setup_affinity_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, ctx.grid_sizes, _ = inputs
    ctx.save_for_backward(logits)


def _affinity_backward(ctx: Any, grad_affinity: Tensor) -> dict[str, Tensor]:
    grad = square_root_affinity_backward(grad_affinity, *ctx.saved_tensors, ctx.grid_sizes)
    return {"logits": grad}


register_gradients(square_root_affinity, _affinity_backward, setup_context=_setup_affinity_context)

# A comparison of labels: any device, no gradient, nothing to fuse.
label_affinity = portable.label_affinity


def _implementation(logits: Tensor, grid_sizes: Sequence[int], backend: str) -> Any:
    points, obstacle = sum(size * size for size in grid_sizes), None
    if points > MAX_TILE_POINTS:
        obstacle = f"the tiles take at most {MAX_TILE_POINTS} points of grids, got {points}"
    if tile_runs(backend, logits, max_classes=MAX_TILE_CLASSES, obstacle=obstacle):
        from tritonaff.kernels import affinity_regression as kernels

        return kernels
    return portable
