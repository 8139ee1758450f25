"""Dilated affinity as custom ops: opaque to the compiler, differentiable, whatever implementation
runs inside.

``offsets`` are dy0, dx0, dy1, dx1, ...: those of the 8 neighbours of each of R rates, see
rates.rate_offsets. The logits have a channel for each, and tables a row for each rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tritonaff.ops.backend import tile_runs
from tritonaff.ops.gradients import register_gradients
from tritonaff.portable import dilated_affinity as portable
from tritonaff.portable.blocks import precision


@torch.library.custom_op("tritonaff::dilated_affinity", mutates_args=())
def dilated_affinity(
    logits: Tensor,
    target: Tensor,
    offsets: Sequence[int],
    gamma: float,
    ignore_index: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Focal loss sums (R, 9, 2), signal and correct counts likewise, pixel counts (R, 9).

    By rate, neighbour category and target, different first.
    """
    implementation = _implementation(logits, backend)
    result: tuple[Tensor, Tensor, Tensor, Tensor] = implementation.forward(
        logits, target, list(offsets), gamma, ignore_index
    )
    return result


@dilated_affinity.register_fake
def _(
    logits: Tensor,
    target: Tensor,
    offsets: Sequence[int],
    gamma: float,
    ignore_index: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_rates = len(offsets) // 16
    return (
        logits.new_empty(num_rates, 9, 2, dtype=precision(logits)),
        logits.new_empty(num_rates, 9, 2, dtype=torch.int64),
        logits.new_empty(num_rates, 9, 2, dtype=torch.int64),
        logits.new_empty(num_rates, 9, dtype=torch.int64),
    )


@torch.library.custom_op("tritonaff::dilated_affinity_backward", mutates_args=())
def dilated_affinity_backward(
    grad_loss_sum: Tensor,
    logits: Tensor,
    target: Tensor,
    offsets: Sequence[int],
    gamma: float,
    ignore_index: int,
    backend: str,
) -> Tensor:
    """The gradient with respect to the logits, in their dtype and memory format."""
    implementation = _implementation(logits, backend)
    grad: Tensor = implementation.backward(
        grad_loss_sum.contiguous(), logits, target, list(offsets), gamma, ignore_index
    )
    return grad


@dilated_affinity_backward.register_fake
def _(
    grad_loss_sum: Tensor,
    logits: Tensor,
    target: Tensor,
    offsets: Sequence[int],
    gamma: float,
    ignore_index: int,
    backend: str,
) -> Tensor:
    return torch.empty_like(logits)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, target, *ctx.options = inputs
    _, *counts = output
    ctx.save_for_backward(logits, target)
    ctx.mark_non_differentiable(*counts)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_loss_sum: Tensor | None, *_: Any) -> dict[str, Tensor]:
    if grad_loss_sum is None:
        return {}
    grad = dilated_affinity_backward(grad_loss_sum, *ctx.saved_tensors, *ctx.options)
    return {"logits": grad}


register_gradients(dilated_affinity, _backward, setup_context=_setup_context)


@torch.library.custom_op("tritonaff::neighbor_counts", mutates_args=())
def neighbor_counts(
    target: Tensor, offsets: Sequence[int], ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Pixel counts (R, 9) and signal counts (R, 9, 2)."""
    return portable.neighbor_counts(target, list(offsets), ignore_index)


@neighbor_counts.register_fake
def _(target: Tensor, offsets: Sequence[int], ignore_index: int) -> tuple[Tensor, Tensor]:
    num_rates = len(offsets) // 16
    return (
        target.new_empty(num_rates, 9, dtype=torch.int64),
        target.new_empty(num_rates, 9, 2, dtype=torch.int64),
    )


@torch.library.custom_op("tritonaff::dilated_affinity_target", mutates_args=())
def dilated_affinity_target(target: Tensor, offsets: Sequence[int], ignore_index: int) -> Tensor:
    """(N, 8 R, H, W) of uint8: 1 for same, 0 for different, 255 where a signal is not valid."""
    return portable.affinity_target(target, list(offsets), ignore_index)


@dilated_affinity_target.register_fake
def _(target: Tensor, offsets: Sequence[int], ignore_index: int) -> Tensor:
    n, height, width = target.shape
    return target.new_empty(n, len(offsets) // 2, height, width, dtype=torch.uint8)


def _implementation(logits: Tensor, backend: str) -> Any:
    if tile_runs(backend, logits, max_classes=None):  # channels are signals, one at a time
        from tritonaff.kernels import dilated_affinity as kernels

        return kernels
    return portable
