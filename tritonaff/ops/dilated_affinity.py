"""Dilated affinity as custom ops.

``offsets`` are dy0, dx0, dy1, dx1, ...: the 8 neighbours at each of R rates, see
:func:`tritonaff.rates.rate_offsets`. Logits have a channel per neighbour, tables a row per rate.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tritonaff.checks import label_to_ignore
from tritonaff.ops.backend import current_backend, implementation
from tritonaff.ops.definition import define, register_gradients
from tritonaff.options import DilatedAffinityOptions
from tritonaff.portable import dilated_affinity as portable
from tritonaff.portable.blocks import precision
from tritonaff.rates import rate_offsets

NAME = "dilated_affinity"
OPTIONS = "SymInt[] offsets, float gamma, SymInt ignore_index, str backend"

Pairs = tuple[tuple[int, int], ...]


def terms(
    affinity_logits: Tensor, target: Tensor, options: DilatedAffinityOptions
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Focal loss sums, signal counts and correct counts, each (R, 9, 2); pixel counts (R, 9)."""
    backend, rates = current_backend(), options.rates
    gamma, ignore_index = options.gamma, label_to_ignore(options.ignore_index)
    tables: tuple[Tensor, Tensor, Tensor, Tensor]
    if backend == "reference":
        from tritonaff.reference import dilated_affinity as equations

        tables = equations.dilated_affinity_terms(
            affinity_logits, target, rates, gamma=gamma, ignore_index=ignore_index
        )
        return tables
    tables = dilated_affinity(
        affinity_logits, target, rate_offsets(rates), gamma, ignore_index, backend
    )
    return tables


def counts(target: Tensor, rates: Pairs, ignore_index: int | None) -> tuple[Tensor, Tensor]:
    """Pixel counts (R, 9) and signal counts (R, 9, 2) of labels."""
    tables: tuple[Tensor, Tensor]
    ignored = label_to_ignore(ignore_index)
    if current_backend() == "reference":
        from tritonaff.reference import dilated_affinity as equations

        tables = equations.neighbor_counts(target, rates, ignore_index=ignored)
    else:
        tables = neighbor_counts(target, rate_offsets(rates), ignored)
    return tables


def signals(target: Tensor, rates: Pairs, ignore_index: int | None) -> Tensor:
    """(N, 8 R, H, W) of uint8: 1 for same, 0 for different, 255 where a signal is not valid."""
    result: Tensor
    ignored = label_to_ignore(ignore_index)
    if current_backend() == "reference":
        from tritonaff.reference import dilated_affinity as equations

        result = equations.dilated_affinity_target(target, rates, ignore_index=ignored)
    else:
        result = dilated_affinity_target(target, rate_offsets(rates), ignored)
    return result


@define(NAME, f"(Tensor logits, Tensor target, {OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)")
def dilated_affinity(
    logits: Tensor,
    target: Tensor,
    offsets: list[int],
    gamma: float,
    ignore_index: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Focal loss sums, signal counts and correct counts, each (R, 9, 2): by rate, neighbour
    category and target, (different, same). Pixel counts (R, 9).
    """
    tables: tuple[Tensor, Tensor, Tensor, Tensor] = _implementation(logits, backend).forward(
        logits, target, list(offsets), gamma, ignore_index
    )
    return tables


@dilated_affinity.register_fake
def _(
    logits: Tensor, target: Tensor, offsets: list[int], *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_rates = len(offsets) // 16
    return (
        logits.new_empty(num_rates, 9, 2, dtype=precision(logits)),
        logits.new_empty(num_rates, 9, 2, dtype=torch.int64),
        logits.new_empty(num_rates, 9, 2, dtype=torch.int64),
        logits.new_empty(num_rates, 9, dtype=torch.int64),
    )


@define(
    "dilated_affinity_backward",
    f"(Tensor grad_loss_sum, Tensor logits, Tensor target, {OPTIONS}) -> Tensor",
)
def dilated_affinity_backward(
    grad_loss_sum: Tensor,
    logits: Tensor,
    target: Tensor,
    offsets: list[int],
    gamma: float,
    ignore_index: int,
    backend: str,
) -> Tensor:
    """The gradient of the logits, in their dtype and memory format."""
    grad: Tensor = _implementation(logits, backend).backward(
        grad_loss_sum.contiguous(), logits, target, list(offsets), gamma, ignore_index
    )
    return grad


@dilated_affinity_backward.register_fake
def _(grad_loss_sum: Tensor, logits: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(logits)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, target, *ctx.options = inputs
    _, *tables_of_counts = output
    ctx.save_for_backward(logits, target)
    ctx.mark_non_differentiable(*tables_of_counts)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_loss_sum: Tensor | None, *_: Any) -> dict[str, Tensor]:
    if grad_loss_sum is None:
        return {}
    grad = dilated_affinity_backward(grad_loss_sum, *ctx.saved_tensors, *ctx.options)
    return {"logits": grad}


register_gradients(dilated_affinity, _backward, setup_context=_setup_context)

LABELS = "Tensor target, SymInt[] offsets, SymInt ignore_index"


@define("neighbor_counts", f"({LABELS}) -> (Tensor, Tensor)")
def neighbor_counts(target: Tensor, offsets: list[int], ignore_index: int) -> tuple[Tensor, Tensor]:
    """Pixel counts (R, 9) and signal counts (R, 9, 2)."""
    return portable.neighbor_counts(target, list(offsets), ignore_index)


@neighbor_counts.register_fake
def _(target: Tensor, offsets: list[int], ignore_index: int) -> tuple[Tensor, Tensor]:
    num_rates = len(offsets) // 16
    return (
        target.new_empty(num_rates, 9, dtype=torch.int64),
        target.new_empty(num_rates, 9, 2, dtype=torch.int64),
    )


@define("dilated_affinity_target", f"({LABELS}) -> Tensor")
def dilated_affinity_target(target: Tensor, offsets: list[int], ignore_index: int) -> Tensor:
    """(N, 8 R, H, W) of uint8: 1 for same, 0 for different, 255 where a signal is not valid."""
    return portable.affinity_target(target, list(offsets), ignore_index)


@dilated_affinity_target.register_fake
def _(target: Tensor, offsets: list[int], ignore_index: int) -> Tensor:
    n, height, width = target.shape
    return target.new_empty(n, len(offsets) // 2, height, width, dtype=torch.uint8)


def _implementation(logits: Tensor, backend: str) -> Any:
    # A tile reads one channel at a time: the number of channels has no limit.
    return implementation(NAME, backend, logits, max_classes=None)
