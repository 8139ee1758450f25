"""Affinities of pixels by their colours, in torch operations, on any device.

A neighbour is a window of the image in its frame of border pixels. The work goes from neighbour to
neighbour; beside the weights it needs the memory of a few images.

Both modes are a softmax over the neighbours of a mean over the channels of -u^m, where u = |x_i -
x_j| / D and D is linear in a standard deviation s.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tritonaff.portable.blocks import at_least_float32, fold_frame, in_layout_of, replicated
from tritonaff.rates import DIRECTIONS

EPS = 1e-8
POSITION_WEIGHT = 0.01


class Mode(NamedTuple):
    power: int  # m
    scale: float  # of the standard deviation in D
    eps: float  # in D
    has_center: bool  # among the values of the standard deviation


MODES = {"pamr": Mode(1, 0.1, EPS, True), "par": Mode(2, 0.3, 0.3 * EPS, False)}


def forward(images: Tensor, dilations: list[int], mode: str) -> Tensor:
    """Weights (N, 8 D, H, W) in the dtype of the images."""
    neighbors = Neighbors(images, dilations)
    weights = color_weights(neighbors, MODES[mode])
    if mode == "par":
        weights += position_weights(dilations, weights)[:, None, None]
    return weights.to(images.dtype)


def backward(grad: Tensor, images: Tensor, dilations: list[int], mode: str) -> Tensor:
    """The gradient of the images, in their dtype and memory format.

    With q = 1 / D, the derivatives of -u^m are -m u^(m-1) q sign(x_i - x_j) with respect to x_i,
    its opposite with respect to x_j, and -m u^(m-1) |x_i - x_j| with respect to q.
    """
    kind, neighbors = MODES[mode], Neighbors(images, dilations)
    x, channels = neighbors.center, images.shape[1]
    weights = color_weights(neighbors, kind)
    grad_logits = at_least_float32(grad) * weights
    grad_logits -= weights * grad_logits.sum(dim=1, keepdim=True)
    grad_logits *= -kind.power / channels

    mean, deviation = neighbors.statistics(kind.has_center)
    q = (deviation * kind.scale + kind.eps).reciprocal_()
    grad_frame = torch.zeros_like(neighbors.framed)
    grad_x, grad_q = torch.zeros_like(x), torch.zeros_like(x)
    for j, (there, window) in enumerate(neighbors):
        difference = x - there
        slope = (difference.abs() * q).pow_(kind.power - 1).mul_(grad_logits[:, j : j + 1])
        grad_q.addcmul_(slope, difference.abs())
        slope.mul_(q).mul_(difference.sign())
        grad_x += slope
        grad_frame[window] -= slope
    # The derivative of s = sqrt(sum (v - mean)^2 / (n - 1)), by way of D.
    slope = grad_q.mul_(q.square_()).mul_(-kind.scale)
    slope /= (deviation * (neighbors.count(kind.has_center) - 1)).masked_fill_(
        deviation == 0, math.inf
    )
    for there, window in neighbors:
        grad_frame[window].addcmul_(slope, there - mean)
    if kind.has_center:
        grad_x.addcmul_(slope, x - mean, value=len(dilations))
    grad_frame[neighbors.window(0, 0)] += grad_x
    fold_frame(grad_frame, neighbors.frame)
    return in_layout_of(images, grad_frame[neighbors.window(0, 0)].to(images.dtype))


class Neighbors:
    """The neighbours of all pixels of some images, (N, 3, H, W) each."""

    def __init__(self, images: Tensor, dilations: list[int]) -> None:
        height, width = images.shape[2:]
        steps = ((d * dy, d * dx) for d in dilations for dy, dx in DIRECTIONS)
        self.steps, self.frame = replicated(steps, height, width)
        self.size, (above, left) = (height, width), self.frame
        images = at_least_float32(images)
        self.framed = F.pad(images, (left, left, above, above), mode="replicate")
        self.center = self.framed[self.window(0, 0)]

    def window(self, dy: int, dx: int) -> tuple[slice, slice, slice, slice]:
        (height, width), (above, left) = self.size, self.frame
        rows = slice(above + dy, above + dy + height)
        return slice(None), slice(None), rows, slice(left + dx, left + dx + width)

    def __iter__(self) -> Iterator[tuple[Tensor, tuple[slice, ...]]]:
        """Every neighbour, and its window in the framed images."""
        for step in self.steps:
            window = self.window(*step)
            yield self.framed[window], window

    def count(self, has_center: bool) -> int:
        """The number of values of a standard deviation: the centre counts once a dilation."""
        return len(self.steps) * (9 if has_center else 8) // 8

    def statistics(self, has_center: bool) -> tuple[Tensor, Tensor]:
        """The mean, and the unbiased standard deviation, of every pixel's neighbours."""
        count, centers = self.count(has_center), self.count(has_center) - len(self.steps)
        mean = centers * self.center
        for there, _ in self:
            mean += there
        mean /= count
        variance = centers * (self.center - mean).square_()
        for there, _ in self:
            variance += (there - mean).square_()
        return mean, variance.div_(count - 1).sqrt_()


def color_weights(neighbors: Neighbors, kind: Mode) -> Tensor:
    """(N, 8 D, H, W): the softmax of the mean over the channels of -u^m."""
    _, deviation = neighbors.statistics(kind.has_center)
    q = deviation.mul_(kind.scale).add_(kind.eps).reciprocal_()
    n, _, height, width = neighbors.center.shape
    weights = q.new_empty(n, len(neighbors.steps), height, width)
    for j, (there, _) in enumerate(neighbors):
        u = (neighbors.center - there).abs_().mul_(q)
        torch.mean(u.pow_(kind.power), dim=1, out=weights[:, j])
    weights.neg_().sub_(weights.amax(dim=1, keepdim=True)).exp_()
    return weights.div_(weights.sum(dim=1, keepdim=True))


def position_weights(dilations: list[int], like: Tensor) -> Tensor:
    """(8 D,): PAR's weights of the distances, the same for all pixels."""
    distances = [d * math.hypot(dy, dx) for d in dilations for dy, dx in DIRECTIONS]
    r = torch.tensor(distances, dtype=torch.float64)
    logits = (r / (0.3 * (r.std() + EPS))).square_().neg_()
    return (POSITION_WEIGHT * logits.softmax(dim=0)).to(like.device, like.dtype)
