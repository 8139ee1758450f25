"""Affinity propagation in torch operations: any device, no Triton.

Pixels are flat, (N, C, H W): the neighbour at (dy, dx) is dy W + dx further on, so each neighbour
takes one addcmul_ of two ranges and nothing is padded or copied. At the image's sides such a range
runs on into the next row; the gates, which are the affinities after the sigmoid, are 0 there. With
the border "replicate" the image lies in a frame of its border pixels, which every step renews.

docs/dilated_affinity.md derives the backward pass. In both passes images are independent: they need
the memory of one image, or of as many small images as make up a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tritonaff.portable.blocks import at_least_float32, fold_frame, precision
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
    normalize: str,
    border: str,
) -> Tensor:
    """The refined probs (N, C, H, W), in the dtype and memory format of ``probs``."""
    result = torch.empty_like(probs)
    options = rates, self_weight, steepness, from_logits, normalize, border
    for images in groups(probs):
        stencil = Stencil.load(affinity[images], precision(probs), *options)
        p = stencil.framed(probs[images], "replicate")
        buffers = [torch.empty_like(p) for _ in range(min(iterations, 2))]
        total = torch.empty_like(p[:, :1])
        for t in range(iterations):
            p = stencil.step(p, out=buffers[t % 2], total=total)
        result[images].copy_(stencil.image(p))
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
        stencil = Stencil.load(affinity[images], precision(probs), *options)
        p = stencil.framed(probs[images], "replicate")
        iterates, totals = [p], []
        for _ in range(iterations):
            totals.append(torch.empty_like(p[:, :1]))
            iterates.append(stencil.step(iterates[-1], torch.empty_like(p), totals[-1]))

        grad_p = stencil.framed(grad[images], "constant")
        grad_y, other = torch.empty_like(p), torch.empty_like(p)
        grad_gates = torch.zeros_like(stencil.gates) if needs_affinity else None
        while totals:
            stencil.normalize_backward(grad_p, iterates.pop(), totals.pop(), out=grad_y)
            if grad_gates is not None:
                stencil.gates_backward(grad_y, iterates[-1], grad_gates)
            if totals or needs_probs:
                grad_p = stencil.step_backward(grad_y, iterates[-1], out=other)
        if needs_probs:
            grad_probs[images].copy_(stencil.image(grad_p))
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

    Tensors over pixels are (n, C, H W), ``gates`` is (n, neighbors, H W), with the frame: ``frame``
    is its number of rows above and below, and of columns on both sides.
    """

    def __init__(
        self,
        gates: Tensor,
        neighbors: list[Neighbor],
        size: tuple[int, int],
        frame: tuple[int, int],
        self_weight: float,
        slope: float | None,
        normalizes: bool,
    ) -> None:
        self.gates, self.neighbors, self.size, self.frame = gates, neighbors, size, frame
        self.self_weight, self.slope, self.normalizes = self_weight, slope, normalizes

    @classmethod
    def load(
        cls,
        affinity: Tensor,
        dtype: torch.dtype,
        rates: list[int],
        self_weight: float,
        steepness: float,
        from_logits: bool,
        normalize: str,
        border: str,
    ) -> Stencil:
        n, _, height, width = affinity.shape
        slope = math.log(steepness) if from_logits else None
        offsets = rate_offsets(list(zip(rates[::2], rates[1::2], strict=True)))
        steps = list(zip(offsets[::2], offsets[1::2], strict=True))
        frame = 0, 0
        if border == "replicate":
            # Beyond the image, a pixel further away is the same border pixel.
            steps = [(within(dy, height - 1), within(dx, width - 1)) for dy, dx in steps]
            frame = max(dy for dy, _ in steps), max(dx for _, dx in steps)
        above, left = frame
        size = height + 2 * above, width + 2 * left
        neighbors = [
            Neighbor(channel, dy, dx, dy * size[1] + dx)
            for channel, (dy, dx) in enumerate(steps)
            if abs(dy) < height and abs(dx) < width
        ]
        gates = affinity.new_zeros(n, len(neighbors), *size, dtype=dtype)
        stencil = cls(
            gates.flatten(2), neighbors, size, frame, self_weight, slope, normalize == "sum"
        )
        for gate, neighbor in zip(stencil.image(gates).unbind(1), neighbors, strict=True):
            gate.copy_(affinity[:, neighbor.channel])
            if slope is not None:
                gate.mul_(slope).sigmoid_()
            stencil.clear_outside(gate, neighbor)
        return stencil

    def framed(self, images: Tensor, mode: str) -> Tensor:
        """Images as (n, C, H W), contiguous and in at least float32, in a frame of their border
        pixels if the mode is "replicate", of zeros if it is "constant".
        """
        (above, left), images = self.frame, at_least_float32(images)
        if above or left:
            images = F.pad(images, (left, left, above, above), mode=mode)
        return images.contiguous().flatten(2)

    def image(self, x: Tensor) -> Tensor:
        """The part of (n, C, H W) inside the frame, as a view."""
        (height, width), (above, left) = self.size, self.frame
        planes = x.view(*x.shape[:2], height, width)
        return planes[..., above : height - above, left : width - left]

    def renew_frame(self, p: Tensor) -> None:
        if any(self.frame):
            p.copy_(self.framed(self.image(p), "replicate"))

    def step(self, p: Tensor, out: Tensor, total: Tensor) -> Tensor:
        """One iteration from p to ``out``; the divisor of y goes to ``total`` (n, 1, H W)."""
        for pixels in blocks(p):
            p_i, y, class_sum = p[..., pixels], out[..., pixels], total[..., pixels]
            torch.amax(p_i, dim=1, keepdim=True, out=class_sum)
            torch.mul(p_i, class_sum.mul_(self.self_weight), out=y)
            for k, here, there in self.ranges(pixels):
                out[..., here].addcmul_(self.gates[:, k : k + 1, here], p[..., there])
            if self.normalizes:
                torch.sum(y, dim=1, keepdim=True, out=class_sum)
                y.div_(class_sum.masked_fill_(class_sum == 0, math.inf))
        self.renew_frame(out)
        return out

    def normalize_backward(self, grad_p: Tensor, p: Tensor, total: Tensor, out: Tensor) -> None:
        """Turns the gradient of p = y / total into the gradient of y, in ``out``."""
        if not self.normalizes:
            out.copy_(grad_p)
            return
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
        fold_frame(out.view(*out.shape[:2], *self.size), self.frame)
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
        grads, gates = self.image(grad_gates).unbind(1), self.image(self.gates).unbind(1)
        for grad, gate, neighbor in zip(grads, gates, self.neighbors, strict=True):
            if self.slope is not None:
                grad.mul_(gate).mul_(1 - gate).mul_(self.slope)
            self.clear_outside(grad, neighbor)
            out[:, neighbor.channel].copy_(grad)

    def clear_outside(self, plane: Tensor, neighbor: Neighbor) -> None:
        """Sets (n, H, W) to zero at pixels whose neighbour is outside image and frame."""
        height, width = plane.shape[-2:]
        above, left = self.frame
        plane[:, beyond(neighbor.dy, height, above)].zero_()
        plane[:, :, beyond(neighbor.dx, width, left)].zero_()

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


def beyond(step: int, size: int, frame: int) -> slice:
    over = max(0, abs(step) - frame)
    return slice(0, over) if step < 0 else slice(size - over, size)


def within(step: int, most: int) -> int:
    return max(-most, min(most, step))


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
