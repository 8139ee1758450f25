"""Bounded steps, neighbours, dtypes and layouts, which the portable implementations share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

# Elements in one step. On a CPU the buffers of a step stay in its cache; a GPU wants fewer
# launches.
CPU_BLOCK, DEVICE_BLOCK = 1 << 18, 1 << 24


def groups(x: Tensor) -> Iterator[slice]:
    """Cuts a batch into groups of images that make up a step, or into single images."""
    n, *image = x.shape
    images = max(1, block_size(x) // max(1, math.prod(image)))
    for i in range(0, n, images):
        yield slice(i, i + images)


def blocks(logits: Tensor) -> Iterator[tuple[slice, slice]]:
    """Cuts (N, C, H, W) into blocks of several whole images, or of some classes of one image."""
    n, c, height, width = logits.shape
    images = max(1, block_size(logits) // (c * height * width))
    classes = c if images > 1 else max(1, block_size(logits) // (height * width))
    for i in range(0, n, images):
        for j in range(0, c, classes):
            yield slice(i, i + images), slice(j, j + classes)


def bands(logits: Tensor) -> Iterator[tuple[slice, slice]]:
    """Cuts (N, C, H, W) into bands of all classes: whole images, or some rows of one image."""
    n, c, height, width = logits.shape
    images = max(1, block_size(logits) // (c * height * width))
    rows = height if images > 1 else max(1, block_size(logits) // (c * width))
    for i in range(0, n, images):
        for j in range(0, height, rows):
            yield slice(i, i + images), slice(j, j + rows)


def block_size(logits: Tensor) -> int:
    return CPU_BLOCK if logits.device.type == "cpu" else DEVICE_BLOCK


def counted_labels(target: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """The labels (N, 1, H, W) as int64, -1 where a pixel does not count."""
    label = target.to(torch.int64)[:, None]
    counted = (label >= 0) & (label < num_classes) & (label != ignore_index)
    return label.where(counted, -1).contiguous()


def may_hold(mask: Tensor) -> bool:
    """True if any element of the mask is set. On devices other than the CPU, where reading would
    synchronise, always True.
    """
    return mask.device.type != "cpu" or bool(mask.any())


def num_labels(num_channels: int) -> int:
    """The number of labels; those of a single channel are 0 and 1."""
    return 2 if num_channels == 1 else num_channels


def label_dtype(num_classes: int) -> torch.dtype:
    """The dtype of labels that live until the backward pass."""
    return torch.int16 if num_classes <= torch.iinfo(torch.int16).max else torch.int32


def precision(tensor: Tensor) -> torch.dtype:
    """The dtype of computations with a tensor: float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(precision(tensor))


def grad_dtype(logits: Tensor) -> torch.dtype:
    """The dtype of a gradient that waits for its factor: a loss scale for float16 is large."""
    return torch.float32 if logits.dtype == torch.float16 else logits.dtype


def in_layout_of(logits: Tensor, grad: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The gradient in the strides that torch.empty_like gives for the logits, and in ``dtype``, by
    default the dtype of the logits.
    """
    like = torch.empty_like(logits, dtype=dtype, device="meta")
    if (like.dtype, like.stride()) == (grad.dtype, grad.stride()):
        return grad
    return torch.empty_like(logits, dtype=dtype).copy_(grad)


def overlap(size: int, step: int, frame: int = 0) -> tuple[slice, slice]:
    """The pixels of an axis whose neighbour ``step`` further on is inside the axis and its frame,
    and these neighbours' places in the framed axis; two empty slices if there are none.
    """
    first, end = max(0, -step - frame), min(size, size - step + frame)
    if first >= end:
        return slice(0, 0), slice(0, 0)
    return slice(first, end), slice(first + step + frame, end + step + frame)


def replicated(
    steps: Iterable[tuple[int, int]], height: int, width: int
) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """Steps to neighbours where the border pixels go on outside the image, none longer than the
    image, since a pixel further away is the same border pixel; and the frame that holds them: its
    rows above and below, its columns on both sides.
    """
    inside = [
        (max(1 - height, min(height - 1, dy)), max(1 - width, min(width - 1, dx)))
        for dy, dx in steps
    ]
    return inside, (max(dy for dy, _ in inside), max(dx for _, dx in inside))


def fold_frame(grad: Tensor, frame: tuple[int, int]) -> None:
    """Turns the gradient (N, C, H, W) of images in a frame of their border pixels into the gradient
    of the images, in place: the frame's rows and columns go to the border pixels and become 0.
    """
    for dim, width in zip((2, 3), frame, strict=True):
        if width:
            first, inner, last = torch.split(grad, [width, grad.shape[dim] - 2 * width, width], dim)
            inner.select(dim, 0).add_(first.sum(dim=dim))
            inner.select(dim, -1).add_(last.sum(dim=dim))
            first.zero_()
            last.zero_()


def sum_dtype(device: torch.device) -> torch.dtype:
    """The dtype for sums of millions of terms: float64 if the device has float64."""
    return torch.float32 if device.type == "mps" else torch.float64
