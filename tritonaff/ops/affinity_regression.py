"""Affinity regression as custom ops. An empty list of grid sizes means every pixel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tritonaff.checks import label_to_ignore
from tritonaff.ops.backend import current_backend, implementation, without_autocast
from tritonaff.ops.definition import define, register_gradients
from tritonaff.options import AffinityRegressionOptions
from tritonaff.portable import affinity_regression as portable
from tritonaff.portable.blocks import precision, sum_dtype

NAME = "affinity_regression"
# The tiles hold several copies of a block of points with all their classes.
MAX_TILE_CLASSES = 256
# The tiles for grids compare all pairs: beyond this number the portable, linear form is faster.
MAX_TILE_POINTS = 4096

OPTIONS = "SymInt[] grid_sizes, SymInt ignore_index, str backend"


def terms(
    logits: Tensor, target: Tensor, options: AffinityRegressionOptions
) -> tuple[Tensor, Tensor]:
    """Squared error (N,) and number of pairs (N,)."""
    backend, ignore_index = current_backend(), label_to_ignore(options.ignore_index)
    if backend == "reference":
        from tritonaff.reference import affinity_regression as equations

        with without_autocast(logits):
            tables: tuple[Tensor, Tensor] = equations.affinity_regression_terms(
                logits, target, options.grid_sizes, ignore_index=ignore_index
            )
        return tables
    squared_error, pair_count, _ = affinity_regression(
        logits, target, options.grid_sizes or (), ignore_index, backend
    )
    return squared_error, pair_count


def predicted_affinity(logits: Tensor, grid_sizes: tuple[int, ...] | None) -> Tensor:
    """The affinity matrices (N, L, L) that the logits predict."""
    backend = current_backend()
    if backend == "reference":
        from tritonaff.reference import affinity_regression as equations

        with without_autocast(logits):
            matrices: Tensor = equations.square_root_affinity(logits, grid_sizes)
        return matrices
    matrices = square_root_affinity(logits, grid_sizes or (), backend)
    return matrices


def true_affinity(
    target: Tensor, grid_sizes: tuple[int, ...] | None, ignore_index: int | None
) -> tuple[Tensor, Tensor]:
    """The affinity matrices (N, L, L) of the labels, and a mask (N, L) of the points that count.
    Labels are compared in plain torch on any device: there is no gradient, and nothing to fuse.
    """
    ignored = label_to_ignore(ignore_index)
    if current_backend() == "reference":
        from tritonaff.reference import affinity_regression as equations

        matrices: tuple[Tensor, Tensor] = equations.label_affinity(target, grid_sizes, ignored)
        return matrices
    return portable.label_affinity(target, list(grid_sizes or ()), ignored)


@define(NAME, f"(Tensor logits, Tensor target, {OPTIONS}) -> (Tensor, Tensor, Tensor)")
def affinity_regression(
    logits: Tensor, target: Tensor, grid_sizes: list[int], ignore_index: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Squared error (N,), number of pairs (N,), and Gram matrices for the backward pass:
    (N, 3, C, C) if every pixel is a point, (N, 0, C, C) with grids.
    """
    with without_autocast(logits):
        tables: tuple[Tensor, Tensor, Tensor] = _implementation(
            logits, grid_sizes, backend
        ).forward(logits, target, list(grid_sizes), ignore_index)
    return tables


@affinity_regression.register_fake
def _(
    logits: Tensor, target: Tensor, grid_sizes: list[int], *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    n, c = logits.shape[:2]
    matrices = 0 if grid_sizes else 3
    return (
        logits.new_empty(n, dtype=precision(logits)),
        logits.new_empty(n, dtype=torch.int64),
        logits.new_empty(n, matrices, c, c, dtype=sum_dtype(logits.device)),
    )


@define(
    "affinity_regression_backward",
    f"(Tensor grad_squared_error, Tensor logits, Tensor target, Tensor gram, {OPTIONS}) -> Tensor",
)
def affinity_regression_backward(
    grad_squared_error: Tensor,
    logits: Tensor,
    target: Tensor,
    gram: Tensor,
    grid_sizes: list[int],
    ignore_index: int,
    backend: str,
) -> Tensor:
    """The gradient of the logits, in their dtype and memory format."""
    with without_autocast(logits):
        grad: Tensor = _implementation(logits, grid_sizes, backend).backward(
            grad_squared_error.contiguous(), logits, target, gram, list(grid_sizes), ignore_index
        )
    return grad


@affinity_regression_backward.register_fake
def _(grad_squared_error: Tensor, logits: Tensor, *others: Any) -> Tensor:
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


@define("square_root_affinity", "(Tensor logits, SymInt[] grid_sizes, str backend) -> Tensor")
def square_root_affinity(logits: Tensor, grid_sizes: list[int], backend: str) -> Tensor:
    """The affinity matrices (N, L, L) that the logits predict."""
    with without_autocast(logits):
        matrices: Tensor = _implementation(logits, (), backend).square_root_affinity(
            logits, list(grid_sizes)
        )
    return matrices


@square_root_affinity.register_fake
def _(logits: Tensor, grid_sizes: list[int], backend: str) -> Tensor:
    n, _, height, width = logits.shape
    points = sum(size * size for size in grid_sizes) if grid_sizes else height * width
    return logits.new_empty(n, points, points, dtype=precision(logits))


@define(
    "square_root_affinity_backward",
    "(Tensor grad_affinity, Tensor logits, SymInt[] grid_sizes) -> Tensor",
)
def square_root_affinity_backward(
    grad_affinity: Tensor, logits: Tensor, grid_sizes: list[int]
) -> Tensor:
    """The gradient of the logits: a plain matrix product, which needs no tile."""
    with without_autocast(logits):
        return portable.square_root_affinity_backward(grad_affinity, logits, list(grid_sizes))


@square_root_affinity_backward.register_fake
def _(grad_affinity: Tensor, logits: Tensor, grid_sizes: list[int]) -> Tensor:
    return torch.empty_like(logits)


def _setup_matrix_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, ctx.grid_sizes, _ = inputs
    ctx.save_for_backward(logits)


def _matrix_backward(ctx: Any, grad_affinity: Tensor) -> dict[str, Tensor]:
    grad = square_root_affinity_backward(grad_affinity, *ctx.saved_tensors, ctx.grid_sizes)
    return {"logits": grad}


register_gradients(square_root_affinity, _matrix_backward, setup_context=_setup_matrix_context)


def _implementation(logits: Tensor, grid_sizes: list[int] | tuple[()], backend: str) -> Any:
    points, obstacle = sum(size * size for size in grid_sizes), None
    if points > MAX_TILE_POINTS:
        obstacle = f"the tiles take at most {MAX_TILE_POINTS} points of grids, got {points}"
    return implementation(NAME, backend, logits, max_classes=MAX_TILE_CLASSES, obstacle=obstacle)
