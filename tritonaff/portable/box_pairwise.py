"""Box-supervised pairwise loss in torch operations: any device, no Triton.

Masks are handled several at a time: on a CPU, the buffers of a step stay in its cache. The
two pixels of all pairs in one direction are slices; each pair of pixels is visited once and weighs
2 where both are in the box.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import EllipsisType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tritonaff.portable.blocks import at_least_float32, groups, overlap, precision, sum_dtype
from tritonaff.rates import DIRECTIONS

# From linear RGB to X, Y, Z relative to the white of D65.
XYZ_OF_RGB = (
    (0.412453 / 0.95047, 0.357580 / 0.95047, 0.180423 / 0.95047),
    (0.212671, 0.715160, 0.072169),
    (0.019334 / 1.08883, 0.119193 / 1.08883, 0.950227 / 1.08883),
)
Place = tuple[EllipsisType, slice, slice]  # of tensors (..., H, W)


def color_similarity(
    images: Tensor, valid: Tensor | None, dilation: int, color_space: str, threshold: float | None
) -> Tensor:
    """Values (N, 8, H, W), or with a threshold bits (N, H, W)."""
    colors = at_least_float32(images)
    colors = lab_of_rgb(colors) if color_space == "lab" else colors
    n, _, height, width = colors.shape
    shape = (n, 8, height, width) if threshold is None else (n, height, width)
    result = colors.new_zeros(shape, dtype=colors.dtype if threshold is None else torch.uint8)
    for k, (dy, dx) in enumerate(DIRECTIONS):
        here, there = windows(height, width, dilation * dy, dilation * dx)
        values = (colors[here] - colors[there]).square_().sum(dim=1)
        values = values.sqrt_().mul_(-0.5).exp_()
        if valid is not None:
            values.mul_(valid[there])
        if threshold is None:
            result[:, k][here] = values
        else:
            result[here] |= (values >= threshold).to(torch.uint8) << k
    return result


def lab_of_rgb(images: Tensor) -> Tensor:
    """CIE L, a, b (N, 3, H, W) of sRGB images in [0, 1]."""
    linear = torch.where(images > 0.04045, ((images + 0.055) / 1.055).pow_(2.4), images / 12.92)
    r, g, b = linear.unbind(dim=1)
    f_x, f_y, f_z = (
        lab_function(of_r * r + of_g * g + of_b * b) for of_r, of_g, of_b in XYZ_OF_RGB
    )
    return torch.stack((116 * f_y - 16, 500 * (f_x - f_y), 200 * (f_y - f_z)), dim=1)


def lab_function(t: Tensor) -> Tensor:
    return torch.where(t > 0.008856, t.pow(1 / 3), t.mul(7.787).add_(16 / 116))


def bits_of(similarity: Tensor, threshold: float) -> Tensor:
    """Bits (N, H, W) of values (N, 8, H, W)."""
    bits = torch.zeros_like(similarity[:, 0], dtype=torch.uint8)
    for k in range(8):
        bits |= (similarity[:, k] >= threshold).to(torch.uint8) << k
    return bits


def forward(
    mask_logits: Tensor, similarity: Tensor, boxes: Tensor, image_index: Tensor, dilation: int
) -> tuple[Tensor, Tensor]:
    """Sums of -log P and counts of pairs, (M,) each.

    With s(t) = log(1 + exp(-|t|)), -log P is s(x_i) + s(x_j) - s(x_i + x_j), and where the signs
    differ the smaller one of |x_i| and |x_j| more.
    """
    log_loss = mask_logits.new_zeros(len(mask_logits), dtype=sum_dtype(mask_logits.device))
    count = mask_logits.new_zeros(len(mask_logits), dtype=torch.int64)
    for masks, pairs in blocks_of_pairs(mask_logits, similarity, boxes, image_index, dilation):
        logits = at_least_float32(mask_logits[masks])
        minus_s = F.logsigmoid(logits.abs())
        for here, there, weight in pairs:
            x, y = logits[here], logits[there]
            loss = F.logsigmoid((x + y).abs_()).sub_(minus_s[here]).sub_(minus_s[there])
            loss += torch.minimum(torch.maximum(x, y), -torch.minimum(x, y)).relu_()
            log_loss[masks] += torch.where(weight > 0, loss * weight, 0).sum(dim=(1, 2))
            count[masks] += weight.sum(dim=(1, 2))
    return log_loss.to(precision(mask_logits)), count


def backward(
    coefficients: Tensor,
    mask_logits: Tensor,
    similarity: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    dilation: int,
) -> Tensor:
    """The gradient of the logits, given the gradient (M,) of the sums.

    The derivative of -log P with respect to x_i is p(x_i) - p(x_i + x_j), with p the sigmoid.
    """
    grad = torch.empty_like(mask_logits)
    for masks, pairs in blocks_of_pairs(mask_logits, similarity, boxes, image_index, dilation):
        logits = at_least_float32(mask_logits[masks])
        slopes = torch.zeros_like(logits)
        # The smaller one of p and 1 - p at x_i keeps the digits of the difference.
        sign = torch.where(logits < 0, -1, 1).to(logits.dtype)
        miss = torch.sigmoid(-logits.abs())
        for here, there, weight in pairs:
            total = logits[here] + logits[there]
            for place in (here, there):
                slope = torch.sigmoid(-sign[place] * total).sub_(miss[place]).mul_(weight)
                slopes[place] += torch.where(weight > 0, slope, 0)
        slopes.mul_(sign).mul_(coefficients[masks, None, None])
        grad[masks] = slopes.to(grad.dtype)
    return grad


class Pairs(NamedTuple):
    """The pairs in one direction, of a block of m masks."""

    here: Place
    there: Place
    weight: Tensor  # (m, h, w) of uint8: the number of its pixels whose box it counts in


def blocks_of_pairs(
    mask_logits: Tensor, similarity: Tensor, boxes: Tensor, image_index: Tensor, dilation: int
) -> Iterator[tuple[slice, Iterator[Pairs]]]:
    """Blocks of masks, and their pairs in each of four directions."""
    _, height, width = mask_logits.shape
    for masks in groups(mask_logits):
        bits = similarity[image_index[masks]] * inside_boxes(boxes[masks], height, width)
        yield masks, pairs_of_block(bits, dilation)


def pairs_of_block(bits: Tensor, dilation: int) -> Iterator[Pairs]:
    _, height, width = bits.shape
    for k, (dy, dx) in list(enumerate(DIRECTIONS))[4:]:
        here, there = windows(height, width, dilation * dy, dilation * dx)
        # The opposite direction of k is 7 - k.
        weight = ((bits[here] >> k) & 1) + ((bits[there] >> (7 - k)) & 1)
        yield Pairs(here, there, weight)


def inside_boxes(boxes: Tensor, height: int, width: int) -> Tensor:
    """True where a pixel is in the box, (M, H, W)."""
    rows = torch.arange(height, device=boxes.device)[:, None]
    columns = torch.arange(width, device=boxes.device)
    top, left, bottom, right = boxes[:, :, None, None].unbind(dim=1)
    return (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)


def windows(height: int, width: int, dy: int, dx: int) -> tuple[Place, Place]:
    """The rows and columns of pixels whose neighbour at (dy, dx) is inside, and the neighbours'."""
    (y, y_there), (x, x_there) = overlap(height, dy), overlap(width, dx)
    return (..., y, x), (..., y_there, x_there)
