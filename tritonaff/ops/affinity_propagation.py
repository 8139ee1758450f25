"""Affinity propagation as custom ops. Rates are one flat list: r1, r2, r1, r2, ..."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tritonaff.ops.backend import current_backend, implementation
from tritonaff.ops.definition import define, register_gradients
from tritonaff.options import AffinityPropagationOptions

OPTIONS = (
    "SymInt[] rates, SymInt iterations, float self_weight, float steepness, bool from_logits, "
    "str normalize, str border"
)


def propagate(probs: Tensor, affinity: Tensor, options: AffinityPropagationOptions) -> Tensor:
    """The refined probs (N, C, H, W), in the dtype and memory format of ``probs``."""
    backend = current_backend()
    if backend == "reference":
        from tritonaff.reference import affinity_propagation as equations

        refined: Tensor = equations.affinity_propagation(probs, affinity, **options._asdict())
        return refined
    flat_rates = [rate for pair in options.rates for rate in pair]
    # By name: the compiler of torch 2.6 cannot take a part of a NamedTuple.
    refined = affinity_propagation(
        probs, affinity, flat_rates, options.iterations, options.self_weight, options.steepness,
        options.from_logits, options.normalize, options.border, backend,
    )  # fmt: skip
    return refined


@define(
    "affinity_propagation",
    f"(Tensor probs, Tensor affinity, {OPTIONS}, str backend) -> Tensor",
)
def affinity_propagation(
    probs: Tensor, affinity: Tensor, rates: list[int], *options: Any
) -> Tensor:
    *others, backend = options
    refined: Tensor = implementation("affinity_propagation", backend, probs).forward(
        probs, affinity, list(rates), *others
    )
    return refined


@affinity_propagation.register_fake
def _(probs: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(probs)


@define(
    "affinity_propagation_backward",
    "(Tensor grad, Tensor probs, Tensor affinity, bool needs_probs, bool needs_affinity, "
    f"{OPTIONS}, str backend) -> (Tensor, Tensor)",
)
def affinity_propagation_backward(
    grad: Tensor,
    probs: Tensor,
    affinity: Tensor,
    needs_probs: bool,
    needs_affinity: bool,
    rates: list[int],
    *options: Any,
) -> tuple[Tensor, Tensor]:
    """The gradients of probs and affinity, each in the dtype and memory format of its tensor; an
    empty tensor in place of a gradient that is not needed.
    """
    *others, backend = options
    grads: tuple[Tensor, Tensor] = implementation("affinity_propagation", backend, probs).backward(
        grad, probs, affinity, needs_probs, needs_affinity, list(rates), *others
    )
    return grads


@affinity_propagation_backward.register_fake
def _(
    grad: Tensor,
    probs: Tensor,
    affinity: Tensor,
    needs_probs: bool,
    needs_affinity: bool,
    *others: Any,
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(probs) if needs_probs else probs.new_empty(0),
        torch.empty_like(affinity) if needs_affinity else affinity.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    probs, affinity, *ctx.options = inputs
    # The iterates are not saved, as they would hold memory until the backward pass, which computes
    # them again.
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
