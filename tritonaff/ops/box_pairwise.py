"""Box-supervised pairwise loss, and the colour similarity that it goes by, as custom ops.

Masks are (M, H, W), similarity is (N, H, W) with a bit for each of the 8 neighbours, boxes are
(M, 4): first row, first column, and the row and column after the last ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tritonaff.ops.backend import current_backend, implementation
from tritonaff.ops.definition import define, register_gradients
from tritonaff.options import ColorSpace
from tritonaff.portable import box_pairwise as portable
from tritonaff.portable.blocks import precision

NAME = "box_pairwise"
COLOR_SPACES: tuple[ColorSpace, ...] = ("lab", "rgb")
ARGUMENTS = (
    "Tensor mask_logits, Tensor similarity, Tensor boxes, Tensor image_index, SymInt dilation, "
    "str backend"
)


def similarity(
    images: Tensor,
    valid: Tensor | None,
    dilation: int,
    color_space: str,
    threshold: float | None,
) -> Tensor:
    """Values (N, 8, H, W), or with a threshold bits (N, H, W) of uint8."""
    if current_backend() == "reference":
        from tritonaff.reference import box_pairwise as equations

        values = equations.color_similarity(
            images, valid, dilation=dilation, color_space=color_space
        )
        return values if threshold is None else bits_of(values, threshold)
    result: Tensor = color_similarity(images, valid, dilation, color_space, threshold)
    return result


def tables(
    mask_logits: Tensor,
    similarity: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    labels: Tensor | None,
    dilation: int,
) -> tuple[Tensor, Tensor]:
    """Sums of -log P and counts of pairs, (M,) each. With labels (M, H, W), 0 or 1, pairs of
    different labels have -log(1 - P).
    """
    # A mask of no image has no pairs: its index must not lead out of the similarity.
    known = (image_index >= 0) & (image_index < len(similarity))
    boxes = boxes * known[:, None]
    image_index = torch.where(known, image_index, 0)
    backend = current_backend()
    if backend == "reference":
        from tritonaff.reference import box_pairwise as equations

        return equations.box_pairwise_tables(
            mask_logits, similarity, boxes, image_index, labels, dilation=dilation
        )
    if labels is not None:
        # P stays the same if both logits change their signs, and becomes 1 - P if one does.
        mask_logits = torch.where(labels, mask_logits, -mask_logits)
    result: tuple[Tensor, Tensor] = box_pairwise(
        mask_logits, similarity, boxes, image_index, dilation, backend
    )
    return result


bits_of = portable.bits_of


@define(
    "color_similarity",
    "(Tensor images, Tensor? valid, SymInt dilation, str color_space, float? threshold) -> Tensor",
)
def color_similarity(
    images: Tensor, valid: Tensor | None, dilation: int, color_space: str, threshold: float | None
) -> Tensor:
    return portable.color_similarity(images, valid, dilation, color_space, threshold)


@color_similarity.register_fake
def _(
    images: Tensor, valid: Tensor | None, dilation: int, color_space: str, threshold: float | None
) -> Tensor:
    n, _, height, width = images.shape
    if threshold is None:
        return images.new_empty(n, 8, height, width, dtype=precision(images))
    return images.new_empty(n, height, width, dtype=torch.uint8)


@define(NAME, f"({ARGUMENTS}) -> (Tensor, Tensor)")
def box_pairwise(
    mask_logits: Tensor,
    similarity: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    dilation: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Sums of -log P and counts of pairs, (M,) each."""
    result: tuple[Tensor, Tensor] = _implementation(mask_logits, backend).forward(
        mask_logits, similarity, boxes, image_index, dilation
    )
    return result


@box_pairwise.register_fake
def _(mask_logits: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    m = mask_logits.shape[0]
    log_loss = mask_logits.new_empty(m, dtype=precision(mask_logits))
    return log_loss, mask_logits.new_empty(m, dtype=torch.int64)


@define("box_pairwise_backward", f"(Tensor coefficients, {ARGUMENTS}) -> Tensor")
def box_pairwise_backward(
    coefficients: Tensor,
    mask_logits: Tensor,
    similarity: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    dilation: int,
    backend: str,
) -> Tensor:
    """The gradient of the logits, in their dtype and memory format, given the gradient (M,) of the
    sums.
    """
    grad: Tensor = _implementation(mask_logits, backend).backward(
        coefficients.contiguous(), mask_logits, similarity, boxes, image_index, dilation
    )
    return grad


@box_pairwise_backward.register_fake
def _(coefficients: Tensor, mask_logits: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(mask_logits)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.dilation, ctx.backend = inputs
    _, count = output
    ctx.save_for_backward(*tensors)
    ctx.mark_non_differentiable(count)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> dict[str, Tensor]:
    if grad is None:
        return {}
    return {
        "mask_logits": box_pairwise_backward(grad, *ctx.saved_tensors, ctx.dilation, ctx.backend)
    }


register_gradients(box_pairwise, _backward, setup_context=_setup_context)


def _implementation(mask_logits: Tensor, backend: str) -> Any:
    # A mask is no class: the number of masks has no limit.
    return implementation(NAME, backend, mask_logits, max_classes=None)
