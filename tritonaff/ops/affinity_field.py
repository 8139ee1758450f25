"""The affinity field as custom ops: opaque to the compiler, differentiable, whatever implementation
runs inside.

A loss is coefficients times sums. It knows the coefficients before the sums, for they depend on
counts alone:

    affinity_field_statistics      counts, and what a pixel's pairs share
    affinity_field_with_gradient   the sums, and the gradient of the loss with them
    affinity_field                 the sums alone, where no gradient is wanted or the coefficients
                                   are not known: its backward pass computes the rest
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tritonaff.ops.backend import tile_runs
from tritonaff.ops.gradients import register_gradients
from tritonaff.portable import affinity_field as portable
from tritonaff.portable import affinity_field_authors as portable_authors
from tritonaff.portable.blocks import grad_dtype, label_dtype, precision


@torch.library.custom_op("tritonaff::affinity_field_statistics", mutates_args=())
def affinity_field_statistics(
    logits: Tensor,
    target: Tensor,
    kernel_sizes: Sequence[int],
    ignore_index: int,
    variant: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Totals (2, K) of edge and of non-edge entries over the classes. Counts (C, K + 1): the edge
    entries of every class and size, then the pixels of every label; non-edge entries below,
    (2 C, K + 1), where they do not follow from the totals: of variant "authors".

    Labels, -1 where a pixel does not count, and the softmax statistics top and rest (N, 1, H, W).
    """
    implementation = _implementation(logits, variant, backend)
    result: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = implementation.statistics(
        logits, target, list(kernel_sizes), ignore_index
    )
    return result


@affinity_field_statistics.register_fake
def _(
    logits: Tensor,
    target: Tensor,
    kernel_sizes: Sequence[int],
    ignore_index: int,
    variant: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, c, height, width = logits.shape
    k = len(kernel_sizes)
    statistic = n, 1, height, width
    return (
        logits.new_empty(2, k, dtype=torch.int64),
        logits.new_empty(c if variant == "paper" else 2 * c, k + 1, dtype=torch.int64),
        logits.new_empty(statistic, dtype=label_dtype(c)),
        logits.new_empty(statistic),
        logits.new_empty(statistic, dtype=precision(logits)),
    )


@torch.library.custom_op("tritonaff::affinity_field", mutates_args=())
def affinity_field(
    logits: Tensor,
    label: Tensor,
    top: Tensor,
    rest: Tensor,
    kernel_sizes: Sequence[int],
    margin: float,
    eps: float,
    variant: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Sums (2, C, K), edges first; of cross-entropy, by label, the sum of -log p (C,)."""
    options = kernel_sizes, margin, eps, variant, backend
    sums, log_loss, _, _ = _compute(logits, label, top, rest, *options)
    return sums, log_loss


@affinity_field.register_fake
def _(
    logits: Tensor,
    label: Tensor,
    top: Tensor,
    rest: Tensor,
    kernel_sizes: Sequence[int],
    margin: float,
    eps: float,
    variant: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _tables_like(logits, kernel_sizes)


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
    options = kernel_sizes, margin, eps, variant, backend
    grads = grad_sums, grad_log_loss
    *_, grad = _compute(logits, label, top, rest, *options, *grads, with_tables=False)
    result: Tensor = grad.to(logits.dtype)
    return result


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


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, label, top, rest, *options = inputs
    ctx.save_for_backward(logits, label, top, rest)
    ctx.options = options
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad_sums: Tensor | None, grad_log_loss: Tensor | None
) -> dict[str, Tensor]:
    if grad_sums is None and grad_log_loss is None:
        return {}
    if grad_sums is None:
        logits, _, _, rest = ctx.saved_tensors
        grad_sums = rest.new_zeros(2, logits.shape[1], len(ctx.options[0]))
    grad = affinity_field_backward(grad_sums, grad_log_loss, *ctx.saved_tensors, *ctx.options)
    return {"logits": grad}


register_gradients(affinity_field, _backward, setup_context=_setup_context)


@torch.library.custom_op("tritonaff::affinity_field_with_gradient", mutates_args=())
def affinity_field_with_gradient(
    logits: Tensor,
    grad_sums: Tensor,
    grad_log_loss: Tensor | None,
    label: Tensor,
    top: Tensor,
    rest: Tensor,
    kernel_sizes: Sequence[int],
    margin: float,
    eps: float,
    variant: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums and log loss as :func:`affinity_field` has them, but constants; the number 0, to be
    added to a loss that has the given gradients with respect to them, for it carries that of the
    logits; and this gradient.
    """
    options = kernel_sizes, margin, eps, variant, backend
    result: tuple[Tensor, Tensor, Tensor, Tensor] = _compute(
        logits, label, top, rest, *options, grad_sums, grad_log_loss
    )
    return result


@affinity_field_with_gradient.register_fake
def _(
    logits: Tensor,
    grad_sums: Tensor,
    grad_log_loss: Tensor | None,
    label: Tensor,
    top: Tensor,
    rest: Tensor,
    kernel_sizes: Sequence[int],
    margin: float,
    eps: float,
    variant: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sums, log_loss = _tables_like(logits, kernel_sizes)
    grad = torch.empty_like(logits, dtype=grad_dtype(logits))
    return sums, log_loss, sums.new_empty(()), grad


@torch.library.custom_op("tritonaff::affinity_field_scale", mutates_args=("grad",))
def affinity_field_scale(grad: Tensor, scale: Tensor, backend: str) -> None:
    """grad times scale, in place."""
    if tile_runs(backend, grad):
        from tritonaff.kernels.affinity_field import scale_

        scale_(grad, scale)
    else:
        grad.mul_(scale)


def _setup_context_of_gradient(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]
) -> None:
    logits, grad_sums, grad_log_loss, label, top, rest, *options = inputs
    sums, log_loss, _, grad = output
    ctx.save_for_backward(grad_sums, grad_log_loss, logits, label, top, rest)
    ctx.options = options
    ctx.grad, ctx.dtype = grad, logits.dtype
    ctx.mark_non_differentiable(sums, log_loss, grad)
    ctx.set_materialize_grads(False)


def _backward_of_gradient(
    ctx: Any, _sums: None, _log_loss: None, scale: Tensor | None, _grad: None
) -> dict[str, Tensor]:
    if scale is None:
        return {}
    if ctx.grad is None or torch.is_grad_enabled():
        # Another pass through the same graph; or create_graph, which this op refuses when it is
        # differentiated.
        grad_sums, grad_log_loss, *rest = ctx.saved_tensors
        grad_log_loss = None if grad_log_loss is None else scale * grad_log_loss
        grad = affinity_field_backward(scale * grad_sums, grad_log_loss, *rest, *ctx.options)
        return {"logits": grad}
    # Its memory is handed on.
    grad, ctx.grad = ctx.grad, None
    if type(grad) is Tensor:
        affinity_field_scale(grad, scale, ctx.options[-1])
    else:  # traced, to be fused with what follows
        grad = grad * scale
    return {"logits": grad.to(ctx.dtype)}


register_gradients(
    affinity_field_with_gradient,
    _backward_of_gradient,
    setup_context=_setup_context_of_gradient,
)


@torch.library.custom_op("tritonaff::affinity_field_coefficients", mutates_args=())
def affinity_field_coefficients(coefficients: Tensor, logits: Tensor) -> Tensor:
    """The coefficients, for weights that are learned: their gradient cannot be differentiated.

    It is made of the sums, which are constants in the graph. A second derivative with respect to
    the logits would drop them silently.
    """
    return coefficients.clone()


@affinity_field_coefficients.register_fake
def _(coefficients: Tensor, logits: Tensor) -> Tensor:
    return torch.empty_like(coefficients)


@torch.library.custom_op("tritonaff::affinity_field_coefficients_backward", mutates_args=())
def affinity_field_coefficients_backward(grad: Tensor, logits: Tensor) -> Tensor:
    """The gradient as it is. Without an autograd formula, so that differentiating it raises."""
    return grad.clone()


@affinity_field_coefficients_backward.register_fake
def _(grad: Tensor, logits: Tensor) -> Tensor:
    return torch.empty_like(grad)


def _setup_context_of_coefficients(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _backward_of_coefficients(ctx: Any, grad: Tensor) -> dict[str, Tensor]:
    if torch.is_grad_enabled():
        grad = affinity_field_coefficients_backward(grad, *ctx.saved_tensors)
    return {"coefficients": grad}


register_gradients(
    affinity_field_coefficients,
    _backward_of_coefficients,
    setup_context=_setup_context_of_coefficients,
)


def _compute(
    logits: Tensor,
    label: Tensor,
    top: Tensor,
    rest: Tensor,
    kernel_sizes: Sequence[int],
    margin: float,
    eps: float,
    variant: str,
    backend: str,
    grad_sums: Tensor | None = None,
    grad_log_loss: Tensor | None = None,
    *,
    with_tables: bool = True,
) -> Any:
    return _implementation(logits, variant, backend).compute(
        logits,
        label,
        top,
        rest,
        list(kernel_sizes),
        margin,
        eps,
        with_tables=with_tables,
        grad_sums=None if grad_sums is None else grad_sums.contiguous(),
        grad_log_loss=None if grad_log_loss is None else grad_log_loss.contiguous(),
    )


def _tables_like(logits: Tensor, kernel_sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    c, dtype = logits.shape[1], precision(logits)
    sums = logits.new_empty(2, c, len(kernel_sizes), dtype=dtype)
    return sums, logits.new_empty(c, dtype=dtype)


def _implementation(logits: Tensor, variant: str, backend: str) -> Any:
    obstacle = None if variant == "paper" else "this variant has no tile"
    if tile_runs(backend, logits, obstacle=obstacle):
        from tritonaff.kernels import affinity_field as kernels

        return kernels
    return portable if variant == "paper" else portable_authors
