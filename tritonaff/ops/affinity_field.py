"""The affinity field as custom ops: opaque to the compiler, differentiable, whatever implementation
runs inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tritonaff.ops.backend import tile_runs
from tritonaff.portable import affinity_field as portable
from tritonaff.portable import affinity_field_authors as portable_authors
from tritonaff.portable.blocks import label_dtype

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("tritonaff::affinity_field", mutates_args=())
def affinity_field(
    logits: Tensor,
    target: Tensor,
    kernel_sizes: Sequence[int],
    margin: float,
    eps: float,
    ignore_index: int,
    variant: str,
    backend: str,
) -> Outputs:
    """Sums and counts (2, C, K), edges first; of cross-entropy, by label, the sum of -log p and the
    pixels that count (C,); what the backward pass needs (N, 1, H, W): labels, -1 where a pixel does
    not count, and the softmax statistics top and rest.
    """
    implementation = _implementation(logits, variant, backend)
    result: Outputs = implementation.forward(
        logits, target, list(kernel_sizes), margin, eps, ignore_index
    )
    return result


@affinity_field.register_fake
def _(
    logits: Tensor,
    target: Tensor,
    kernel_sizes: Sequence[int],
    margin: float,
    eps: float,
    ignore_index: int,
    variant: str,
    backend: str,
) -> Outputs:
    n, c, height, width = logits.shape
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    table, statistic = (2, c, len(kernel_sizes)), (n, 1, height, width)
    return (
        logits.new_empty(table, dtype=dtype),
        logits.new_empty(table, dtype=torch.int64),
        logits.new_empty(c, dtype=dtype),
        logits.new_empty(c, dtype=torch.int64),
        logits.new_empty(statistic, dtype=label_dtype(c)),
        logits.new_empty(statistic, dtype=dtype),
        logits.new_empty(statistic, dtype=dtype),
    )


@torch.library.custom_op("tritonaff::affinity_field_backward", mutates_args=())
def affinity_field_backward(
    grad_sums: Tensor,
    grad_log_loss: Tensor | None,
    logits: Tensor,
    label: Tensor,
    top: Tensor,
    rest: Tensor,
    kernel_sizes: Sequence[int],
    margin: float,
    eps: float,
    variant: str,
    backend: str,
) -> Tensor:
    """The gradient with respect to the logits, in their dtype and memory format."""
    implementation = _implementation(logits, variant, backend)
    grad: Tensor = implementation.backward(
        grad_sums.contiguous(),
        None if grad_log_loss is None else grad_log_loss.contiguous(),
        logits,
        label,
        top,
        rest,
        list(kernel_sizes),
        margin,
        eps,
    )
    return grad


@affinity_field_backward.register_fake
def _(
    grad_sums: Tensor,
    grad_log_loss: Tensor | None,
    logits: Tensor,
    label: Tensor,
    top: Tensor,
    rest: Tensor,
    kernel_sizes: Sequence[int],
    margin: float,
    eps: float,
    variant: str,
    backend: str,
) -> Tensor:
    return torch.empty_like(logits)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    logits, _, kernel_sizes, margin, eps, _, variant, backend = inputs
    _, counts, _, pixels, label, top, rest = output
    ctx.save_for_backward(logits, label, top, rest)
    ctx.options = kernel_sizes, margin, eps, variant, backend
    ctx.mark_non_differentiable(counts, pixels, label, top, rest)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad_sums: Tensor | None, _: None, grad_log_loss: Tensor | None, *__: None
) -> tuple[Tensor | None, ...]:
    if grad_sums is None and grad_log_loss is None:
        return (None,) * 8
    if grad_sums is None:
        logits, _, _, rest = ctx.saved_tensors
        grad_sums = rest.new_zeros(2, logits.shape[1], len(ctx.options[0]))
    grad = affinity_field_backward(grad_sums, grad_log_loss, *ctx.saved_tensors, *ctx.options)
    return grad, *(None for _ in range(7))


affinity_field.register_autograd(_backward, setup_context=_setup_context)


def _implementation(logits: Tensor, variant: str, backend: str) -> Any:
    obstacle = None if variant == "paper" else "this variant has no tile"
    if tile_runs(backend, logits, obstacle=obstacle):
        from tritonaff.kernels import affinity_field as kernels

        return kernels
    return portable if variant == "paper" else portable_authors
