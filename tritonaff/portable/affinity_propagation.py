"""Affinity propagation in torch operations: any device, no Triton.

Pixels are flat, (N, C, H W): the neighbour at (dy, dx) is dy W + dx further on, so each neighbour
takes one addcmul_ of two ranges and nothing is padded or copied. At the image's sides such a range
runs on into the next row; the gates, which are the affinities after the sigmoid, are 0 there.

docs/dilated_affinity.md derives the backward pass. In both passes images are independent: they need
the memory of one image, or of as many small images as make up a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tritonaff.portable.blocks import at_least_float32
from tritonaff.rates import rate_offsets

# Elements in one step. On a CPU the elements that all neighbours of a step read stay in its cache;
# a GPU wants fewer launches.
CPU_BLOCK, DEVICE_BLOCK = 1 << 20, 1 << 24


def forward(
    probs: Tensor,
    affinity: Tensor,
    rates: list[int],
    iterations: int,
    self_weight: float,
    steepness: float,
    from_logits: bool,
) -> Tensor:
    """The refined probs (N, C, H, W), in the dtype and memory format of ``probs``."""
    result = torch.empty_like(probs)
    for images in groups(probs):
        p = flat(probs[images])
        stencil = Stencil.load(affinity[images], p, rates, self_weight, steepness, from_logits)
        buffers = [torch.empty_like(p) for _ in range(min(iterations, 2))]
        total = torch.empty_like(p[:, :1])
        for t in range(iterations):
            p = stencil.step(p, out=buffers[t % 2], total=total)
        result[images].copy_(p.view(result[images].shape))
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
) -> tuple[Tensor, Tensor]:
    """The gradients of probs and affinity; a gradient that is not needed is an empty tensor."""
    grad_probs = torch.empty_like(probs) if needs_probs else probs.new_empty(0)
    grad_affinity = torch.zeros_like(affinity) if needs_affinity else affinity.new_empty(0)
    for images in groups(probs):
        p = flat(probs[images])
        stencil = Stencil.load(affinity[images], p, rates, self_weight, steepness, from_logits)
        iterates, totals = [p], []
        for _ in range(iterations):
            totals.append(torch.empty_like(p[:, :1]))
            iterates.append(stencil.step(iterates[-1], torch.empty_like(p), totals[-1]))

        grad_p, grad_y, other = flat(grad[images]), torch.empty_like(p), torch.empty_like(p)
        grad_gates = torch.zeros_like(stencil.gates) if needs_affinity else None
        while totals:
            stencil.normalize_backward(grad_p, iterates.pop(), totals.pop(), out=grad_y)
            if grad_gates is not None:
                stencil.gates_backward(grad_y, iterates[-1], grad_gates)
            if totals or needs_probs:
                grad_p = stencil.step_backward(grad_y, iterates[-1], out=other)
        if needs_probs:
            grad_probs[images].copy_(grad_p.view(grad_probs[images].shape))
        if grad_gates is not None:
            stencil.affinity_backward(grad_gates, grad_affinity[images])
    return grad_probs, grad_affinity


class Neighbor(NamedTuple):
    """A neighbour that some pixel of the image has."""

    channel: int
    dy: int
    dx: int
    shift: int  # from a pixel to this neighbour, in flattened pixels


class Stencil:
    """The sum over neighbours of Eq. 6 for some images, its normalisation, and their adjoints.

    Tensors over pixels are (n, C, H W), ``gates`` is (n, neighbors, H W).
    """

    def __init__(
        self,
        gates: Tensor,
        neighbors: list[Neighbor],
        size: tuple[int, int],
        self_weight: float,
        slope: float | None,
    ) -> None:
        self.gates, self.neighbors, self.size = gates, neighbors, size
        self.self_weight, self.slope = self_weight, slope

    @classmethod
    def load(
        cls,
        affinity: Tensor,
        p: Tensor,
        rates: list[int],
        self_weight: float,
        steepness: float,
        from_logits: bool,
    ) -> Stencil:
        n, _, height, width = affinity.shape
        slope = math.log(steepness) if from_logits else None
        offsets = rate_offsets(list(zip(rates[::2], rates[1::2], strict=True)))
        neighbors = [
            Neighbor(channel, dy, dx, dy * width + dx)
            for channel, (dy, dx) in enumerate(zip(offsets[::2], offsets[1::2], strict=True))
            if abs(dy) < height and abs(dx) < width
        ]
        gates = p.new_empty(n, len(neighbors), height, width)
        for gate, neighbor in zip(gates.unbind(1), neighbors, strict=True):
            gate.copy_(affinity[:, neighbor.channel])
            if slope is not None:
                gate.mul_(slope).sigmoid_()
            clear_outside(gate, neighbor)
        return cls(gates.flatten(2), neighbors, (height, width), self_weight, slope)

    def step(self, p: Tensor, out: Tensor, total: Tensor) -> Tensor:
        """One iteration from p to ``out``; the divisor of y goes to ``total`` (n, 1, H W)."""
        for pixels in blocks(p):
            p_i, y, class_sum = p[..., pixels], out[..., pixels], total[..., pixels]
            torch.amax(p_i, dim=1, keepdim=True, out=class_sum)
            torch.mul(p_i, class_sum.mul_(self.self_weight), out=y)
            for k, here, there in self.ranges(pixels):
                out[..., here].addcmul_(self.gates[:, k : k + 1, here], p[..., there])
            torch.sum(y, dim=1, keepdim=True, out=class_sum)
            y.div_(class_sum.masked_fill_(class_sum == 0, math.inf))
        return out

    def normalize_backward(self, grad_p: Tensor, p: Tensor, total: Tensor, out: Tensor) -> None:
        """Turns the gradient of p = y / total into the gradient of y, in ``out``."""
        for pixels in blocks(p):
            g, grad_y = grad_p[..., pixels], out[..., pixels]
            common = torch.mul(g, p[..., pixels], out=grad_y).sum(dim=1, keepdim=True)
            torch.sub(g, common, out=grad_y).div_(total[..., pixels])

    def step_backward(self, grad_y: Tensor, p: Tensor, out: Tensor) -> Tensor:
        """Turns the gradient of y into the gradient of the p from which y was computed."""
        # The first of several largest classes has the highest rank.
        rank = torch.arange(p.shape[1], 0, -1, dtype=p.dtype, device=p.device)[:, None]
        for pixels in blocks(p):
            p_i, grad_y_i, grad_p = p[..., pixels], grad_y[..., pixels], out[..., pixels]
            largest = p_i.amax(dim=1, keepdim=True)
            largest_grad = torch.mul(grad_y_i, p_i, out=grad_p).sum(dim=1, keepdim=True)
            first = torch.eq(p_i, largest, out=grad_p).mul_(rank)
            torch.eq(first, first.amax(dim=1, keepdim=True), out=grad_p).mul_(largest_grad)
            grad_p.addcmul_(grad_y_i, largest).mul_(self.self_weight)
            for k, there, here in self.ranges(pixels, backwards=True):
                out[..., here].addcmul_(self.gates[:, k : k + 1, there], grad_y[..., there])
        return out

    def gates_backward(self, grad_y: Tensor, p: Tensor, grad_gates: Tensor) -> None:
        """Adds the gradient of the gates in one iteration."""
        products = grad_y.new_empty(*p.shape[:2], min(p.shape[2], block_pixels(p)))
        for pixels in blocks(p):
            for k, here, there in self.ranges(pixels):
                product = products[..., : here.stop - here.start]
                torch.mul(grad_y[..., here], p[..., there], out=product)
                grad_gates[:, k, here].add_(product.sum(dim=1))

    def affinity_backward(self, grad_gates: Tensor, out: Tensor) -> None:
        """Turns the gradient of the gates, which is overwritten, into the gradient of the affinity,
        in ``out``.
        """
        planes = *grad_gates.shape[:2], *self.size
        grads, gates = grad_gates.view(planes).unbind(1), self.gates.view(planes).unbind(1)
        for grad, gate, neighbor in zip(grads, gates, self.neighbors, strict=True):
            if self.slope is not None:
                grad.mul_(gate).mul_(1 - gate).mul_(self.slope)
            clear_outside(grad, neighbor)
            out[:, neighbor.channel].copy_(grad)

    def ranges(self, pixels: slice, backwards: bool = False) -> Iterator[tuple[int, slice, slice]]:
        """For every neighbour: its number, the range of ``pixels`` whose flat neighbour exists, and
        the range of these neighbours.

        Backwards, ``pixels`` are the neighbours.
        """
        height, width = self.size
        for k, neighbor in enumerate(self.neighbors):
            shift = neighbor.shift
            start, stop = pixels.start, pixels.stop
            if backwards:
                start, stop = start - shift, stop - shift
            start, stop = max(start, 0, -shift), min(stop, height * width, height * width - shift)
            if start < stop:
                yield k, slice(start, stop), slice(start + shift, stop + shift)


def clear_outside(plane: Tensor, neighbor: Neighbor) -> None:
    """Sets (n, H, W) to zero at pixels whose neighbour is outside the image."""
    height, width = plane.shape[-2:]
    plane[:, beyond(neighbor.dy, height)].zero_()
    plane[:, :, beyond(neighbor.dx, width)].zero_()


def beyond(step: int, size: int) -> slice:
    return slice(0, -step) if step < 0 else slice(size - step, size)


def groups(probs: Tensor) -> Iterator[slice]:
    """Cuts a batch into groups of whole images that make up a block, or into single images."""
    n, *image = probs.shape
    images = max(1, block_size(probs) // math.prod(image))
    for i in range(0, n, images):
        yield slice(i, i + images)


def blocks(p: Tensor) -> Iterator[slice]:
    """Cuts flattened pixels into blocks, each with all classes."""
    num_pixels, step = p.shape[2], block_pixels(p)
    for i in range(0, num_pixels, step):
        yield slice(i, min(i + step, num_pixels))


def block_pixels(p: Tensor) -> int:
    return max(1, block_size(p) // (p.shape[0] * p.shape[1]))


def block_size(tensor: Tensor) -> int:
    return CPU_BLOCK if tensor.device.type == "cpu" else DEVICE_BLOCK


def flat(images: Tensor) -> Tensor:
    """Images as (n, C, H W), contiguous and in at least float32; a view if the images are so."""
    return at_least_float32(images).contiguous().flatten(2)
