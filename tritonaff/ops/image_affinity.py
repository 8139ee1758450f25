"""Affinities of pixels by their colours, as custom ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tritonaff.ops.backend import current_backend
from tritonaff.ops.definition import define, register_gradients
from tritonaff.options import ImageAffinityMode
from tritonaff.portable import image_affinity as portable

OPTIONS = "SymInt[] dilations, str mode"
MODES: tuple[ImageAffinityMode, ...] = ("pamr", "par")


def weights(images: Tensor, dilations: tuple[int, ...], mode: str) -> Tensor:
    """Weights (N, 8 D, H, W) in the dtype of the images."""
    if current_backend() == "reference":
        from tritonaff.reference import image_affinity as equations

        return equations.image_affinity(images, dilations, mode=mode)
    result: Tensor = image_affinity(images, list(dilations), mode)
    return result


@define("image_affinity", f"(Tensor images, {OPTIONS}) -> Tensor")
def image_affinity(images: Tensor, dilations: list[int], mode: str) -> Tensor:
    return portable.forward(images, list(dilations), mode)


@image_affinity.register_fake
def _(images: Tensor, dilations: list[int], mode: str) -> Tensor:
    n, _, height, width = images.shape
    return images.new_empty(n, 8 * len(dilations), height, width)


@define("image_affinity_backward", f"(Tensor grad, Tensor images, {OPTIONS}) -> Tensor")
def image_affinity_backward(
    grad: Tensor, images: Tensor, dilations: list[int], mode: str
) -> Tensor:
    """The gradient of the images, in their dtype and memory format."""
    return portable.backward(grad, images, list(dilations), mode)


@image_affinity_backward.register_fake
def _(grad: Tensor, images: Tensor, *options: Any) -> Tensor:
    return torch.empty_like(images)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, *ctx.options = inputs
    ctx.save_for_backward(images)


def _backward(ctx: Any, grad: Tensor) -> dict[str, Tensor]:
    (images,) = ctx.saved_tensors
    return {"images": image_affinity_backward(grad, images, *ctx.options)}


register_gradients(image_affinity, _backward, setup_context=_setup_context)
