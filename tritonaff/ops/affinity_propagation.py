"""Affinity propagation as custom ops: opaque to the compiler, differentiable, whatever
implementation runs inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tritonaff.ops.backend import tile_runs
from tritonaff.ops.gradients import register_gradients
from tritonaff.portable import affinity_propagation as portable


@torch.library.custom_op("tritonaff::affinity_propagation", mutates_args=())
def affinity_propagation(
    probs: Tensor,
    affinity: Tensor,
    rates: Sequence[int],
    iterations: int,
    self_weight: float,
    steepness: float,
    from_logits: bool,
    backend: str,
) -> Tensor:
    """The refined probs, in their dtype and memory format. Rates are flat: r1, r2, r1, r2, ..."""
    implementation = _implementation(probs, backend)
    result: Tensor = implementation.forward(
        probs, affinity, list(rates), iterations, self_weight, steepness, from_logits
    )
    return result


@affinity_propagation.register_fake
def _(
    probs: Tensor,
    affinity: Tensor,
    rates: Sequence[int],
    iterations: int,
    self_weight: float,
    steepness: float,
    from_logits: bool,
    backend: str,
) -> Tensor:
    return torch.empty_like(probs)


@torch.library.custom_op("tritonaff::affinity_propagation_backward", mutates_args=())
def affinity_propagation_backward(
    grad: Tensor,
    probs: Tensor,
    affinity: Tensor,
    needs_probs: bool,
    needs_affinity: bool,
    rates: Sequence[int],
    iterations: int,
    self_weight: float,
    steepness: float,
    from_logits: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The gradients with respect to probs and affinity, in the dtype and memory format of each.

    One that is not needed is an empty tensor.
    """
    implementation = _implementation(probs, backend)
    grads: tuple[Tensor, Tensor] = implementation.backward(
        grad,
        probs,
        affinity,
        needs_probs,
        needs_affinity,
        list(rates),
        iterations,
        self_weight,
        steepness,
        from_logits,
    )
    return grads


@affinity_propagation_backward.register_fake
def _(
    grad: Tensor,
    probs: Tensor,
    affinity: Tensor,
    needs_probs: bool,
    needs_affinity: bool,
    rates: Sequence[int],
    iterations: int,
    self_weight: float,
    steepness: float,
    from_logits: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(probs) if needs_probs else probs.new_empty(0),
        torch.empty_like(affinity) if needs_affinity else affinity.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    probs, affinity, *ctx.options = inputs
    # The iterates are computed again: they would hold memory from forward to backward.
    ctx.save_for_backward(probs, affinity)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None) -> dict[str, Tensor]:
    if grad is None:
        return {}
    needs_probs, needs_affinity, *_ = ctx.needs_input_grad
    grad_probs, grad_affinity = affinity_propagation_backward(
        grad, *ctx.saved_tensors, needs_probs, needs_affinity, *ctx.options
    )
    grads = {"probs": grad_probs} if needs_probs else {}
    return {**grads, "affinity": grad_affinity} if needs_affinity else grads


register_gradients(affinity_propagation, _backward, setup_context=_setup_context)


def _implementation(probs: Tensor, backend: str) -> Any:
    if tile_runs(backend, probs):
        from tritonaff.kernels import affinity_propagation as kernels

        return kernels
    return portable
