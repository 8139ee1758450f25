"""Box-supervised pairwise loss on a CPU: launches the loops of box_pairwise.cpp."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from tritonaff.native.library import images, library, pointer

NAME = "box_pairwise"


class Call(ctypes.Structure):
    """Sizes, boxes and images of masks; box_pairwise.cpp holds the same fields."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("m", "height", "width", "dilation")),
        ("boxes", ctypes.c_void_p),
        ("image_index", ctypes.c_void_p),
    )


def forward(
    mask_logits: Tensor, similarity: Tensor, boxes: Tensor, image_index: Tensor, dilation: int
) -> tuple[Tensor, Tensor]:
    """Sums of -log P and counts of pairs, (M,) each, as ops/box_pairwise.py defines them."""
    sums = torch.zeros(len(mask_logits), 2, dtype=torch.float64)
    boxes, image_index = boxes.contiguous(), image_index.contiguous()
    library(NAME).box_pairwise_forward(
        ctypes.byref(_call(mask_logits, boxes, image_index, dilation)),
        ctypes.byref(images(mask_logits)),
        ctypes.byref(images(similarity)),
        pointer(sums),
        ctypes.c_int64(torch.get_num_threads()),
    )
    return sums[:, 0].to(torch.float32), sums[:, 1].to(torch.int64)


def backward(
    coefficients: Tensor,
    mask_logits: Tensor,
    similarity: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    dilation: int,
) -> Tensor:
    """The gradient of the logits, given the gradient (M,) of the sums."""
    grad = torch.empty_like(mask_logits)
    boxes, image_index = boxes.contiguous(), image_index.contiguous()
    library(NAME).box_pairwise_backward(
        ctypes.byref(_call(mask_logits, boxes, image_index, dilation)),
        pointer(coefficients),
        ctypes.byref(images(mask_logits)),
        ctypes.byref(images(similarity)),
        ctypes.byref(images(grad)),
        ctypes.c_int64(torch.get_num_threads()),
    )
    return grad


def _call(mask_logits: Tensor, boxes: Tensor, image_index: Tensor, dilation: int) -> Call:
    m, height, width = mask_logits.shape
    # A longer step leads outside, too.
    dilation = min(dilation, max(height, width))
    return Call(m, height, width, dilation, pointer(boxes), pointer(image_index))
