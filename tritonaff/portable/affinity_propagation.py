"""Affinity propagation in torch operations: any device, no Triton.

A neighbour is a window of the image; if the border goes on, of the image in a frame of its border
pixels. Gates are the affinities after the sigmoid. docs/dilated_affinity.md derives the backward
pass, which needs all iterates of an image.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tritonaff.portable.blocks import (
    at_least_float32,
    fold_frame,
    groups,
    overlap,
    precision,
    replicated,
)
from tritonaff.rates import rate_offsets


def forward(
    probs: Tensor,
    affinity: Tensor,
    rates: list[int],
    iterations: int,
    self_weight: float,
    steepness: float,
    from_logits: bool,
    normalize: str,
    border: str,
) -> Tensor:
    """The refined probs (N, C, H, W), in the dtype and memory format of ``probs``."""
    result = torch.empty_like(probs)
    options = rates, self_weight, steepness, from_logits, normalize, border
    for images in groups(probs):
        stencil = Stencil(affinity[images], precision(probs), *options)
        p = at_least_float32(probs[images])
        for _ in range(iterations):
            p, _ = stencil.step(p)
        result[images] = p.to(probs.dtype)
    return result


def backward(
    grad: Tensor,
    probs: Tensor,
    affinity: Tensor,
    needs_probs: bool,
    needs_affinity: bool,
    rates: list[int],
    iterations: int,
    self_weight: float,
    steepness: float,
    from_logits: bool,
    normalize: str,
    border: str,
) -> tuple[Tensor, Tensor]:
    """The gradients of probs and affinity; a gradient that is not needed is an empty tensor."""
    grad_probs = torch.empty_like(probs) if needs_probs else probs.new_empty(0)
    grad_affinity = torch.zeros_like(affinity) if needs_affinity else affinity.new_empty(0)
    options = rates, self_weight, steepness, from_logits, normalize, border
    for images in groups(probs):
        stencil = Stencil(affinity[images], precision(probs), *options)
        iterates, totals = [at_least_float32(probs[images])], []
        for _ in range(iterations):
            p, total = stencil.step(iterates[-1])
            iterates.append(p)
            totals.append(total)

        grad_p, grad_gates = at_least_float32(grad[images]), torch.zeros_like(stencil.gates)
        while totals:
            grad_y = stencil.normalize_backward(grad_p, iterates.pop(), totals.pop())
            if needs_affinity:
                stencil.gates_backward(grad_y, iterates[-1], grad_gates)
            if totals or needs_probs:
                grad_p = stencil.step_backward(grad_y, iterates[-1])
        if needs_probs:
            grad_probs[images] = grad_p.to(probs.dtype)
        if needs_affinity:
            grad_affinity[images] = stencil.affinity_backward(grad_gates).to(affinity.dtype)
    return grad_probs, grad_affinity


class Stencil:
    """The sum over neighbours of Eq. 6 for some images, its normalisation, and their adjoints.

    gates: (n, 8 R, H, W), of which some may have no neighbour.
    """

    def __init__(
        self,
        affinity: Tensor,
        dtype: torch.dtype,
        rates: list[int],
        self_weight: float,
        steepness: float,
        from_logits: bool,
        normalize: str,
        border: str,
    ) -> None:
        self.self_weight, self.normalizes = self_weight, normalize == "sum"
        self.slope = math.log(steepness) if from_logits else None
        height, width = self.size = affinity.shape[-2:]
        offsets = rate_offsets(list(zip(rates[::2], rates[1::2], strict=True)))
        self.steps = list(zip(offsets[::2], offsets[1::2], strict=True))
        self.frame = 0, 0
        if border == "replicate":
            self.steps, self.frame = replicated(self.steps, height, width)

        self.gates = affinity.to(dtype)
        if self.slope is not None:
            self.gates = (self.gates * self.slope).sigmoid_()

    def framed(self, x: Tensor) -> Tensor:
        above, left = self.frame
        return F.pad(x, (left, left, above, above), mode="replicate") if above or left else x

    def windows(self) -> Iterator[tuple[int, Any, Any]]:
        """The number of every neighbour, the pixels that have it, and where it is in the framed
        image.
        """
        (height, width), (above, left) = self.size, self.frame
        for k, (dy, dx) in enumerate(self.steps):
            if abs(dy) < height + above and abs(dx) < width + left:
                (y, y_there), (x, x_there) = overlap(height, dy, above), overlap(width, dx, left)
                yield k, (..., y, x), (..., y_there, x_there)

    def step(self, p: Tensor) -> tuple[Tensor, Tensor]:
        """One iteration, and the divisor (n, 1, H, W) of its result."""
        y = self.self_weight * p * p.amax(dim=1, keepdim=True)
        framed = self.framed(p)
        for k, here, there in self.windows():
            y[here].addcmul_(self.gates[:, k : k + 1][here], framed[there])
        total = y.sum(dim=1, keepdim=True)
        total.masked_fill_(total == 0, math.inf)
        return (y.div_(total) if self.normalizes else y), total

    def normalize_backward(self, grad_p: Tensor, p: Tensor, total: Tensor) -> Tensor:
        """The gradient of y, given the gradient of p = y / total."""
        if not self.normalizes:
            return grad_p
        return (grad_p - (grad_p * p).sum(dim=1, keepdim=True)).div_(total)

    def step_backward(self, grad_y: Tensor, p: Tensor) -> Tensor:
        """The gradient of the p from which y was computed, given the gradient of y."""
        largest, first = p.max(dim=1, keepdim=True)
        grad_p = grad_y * largest
        largest_grad = (grad_y * p).sum(dim=1, keepdim=True)
        grad_p = self.self_weight * grad_p.scatter_add_(1, first, largest_grad)
        (height, width), (above, left) = self.size, self.frame
        framed = F.pad(grad_p, (left, left, above, above)) if above or left else grad_p
        for k, here, there in self.windows():
            framed[there].addcmul_(self.gates[:, k : k + 1][here], grad_y[here])
        fold_frame(framed, self.frame)
        return framed[..., above : above + height, left : left + width]

    def gates_backward(self, grad_y: Tensor, p: Tensor, grad_gates: Tensor) -> None:
        """Adds the gradient of the gates in one iteration."""
        framed = self.framed(p)
        for k, here, there in self.windows():
            products = grad_y[here] * framed[there]
            grad_gates[:, k : k + 1][here] += products.sum(dim=1, keepdim=True)

    def affinity_backward(self, grad_gates: Tensor) -> Tensor:
        """The gradient of the affinity, in place of the gradient of the gates."""
        if self.slope is not None:
            grad_gates.mul_(self.gates).mul_(1 - self.gates).mul_(self.slope)
        return grad_gates
