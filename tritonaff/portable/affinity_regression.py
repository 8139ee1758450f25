"""Affinity regression in torch operations: any device, no Triton, linear in the number of points.

docs/affinity_regression.md derives the formulas. With the square roots of the probabilities S
(C, L), the one-hot labels Y (C, L), D = S - Y and M = S + Y, the squared error over all pairs of
points needs only the C x C matrices D D^T, D M^T and M M^T, and its gradient needs one product of
such a matrix with D and M. No L x L matrix exists.

These matrices are added up in float64: their products cancel where the prediction is nearly the
same at all points of a label.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tritonaff.portable.blocks import (
    at_least_float32,
    bands,
    counted_labels,
    in_layout_of,
    may_hold,
    precision,
    sum_dtype,
)


def forward(
    logits: Tensor, target: Tensor, grid_sizes: list[int], ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Squared error (N,), number of pairs (N,), and the Gram matrices (N, 3, C, C).

    An empty list of grid sizes means every pixel. For the few points of grids the backward pass
    computes the Gram matrices again, and the returned tensor is (N, 0, C, C).
    """
    n, c = logits.shape[:2]
    gram = logits.new_zeros(n, 3, c, c, dtype=sum_dtype(logits.device))
    count = logits.new_zeros(n, dtype=torch.int64)
    if grid_sizes:
        points = Points(sampled(logits, grid_sizes), sampled(target, grid_sizes), ignore_index)
        gram, count, kept = points.gram(), points.count(), gram[:, :0].clone()
    else:
        for images, rows in bands(logits):
            points = Points(logits[images, :, rows], target[images, rows], ignore_index)
            gram[images] += points.gram()
            count[images] += points.count()
        kept = gram
    squared_error = squared_error_of(gram).to(precision(logits))
    return squared_error, count * count, kept


def backward(
    grad_squared_error: Tensor,
    logits: Tensor,
    target: Tensor,
    gram: Tensor,
    grid_sizes: list[int],
    ignore_index: int,
) -> Tensor:
    """The gradient of the logits, given the gradient (N,) of the squared errors."""
    if grid_sizes:
        points = Points(sampled(logits, grid_sizes), sampled(target, grid_sizes), ignore_index)
        grad = points.gradient(factors(points.gram(), grad_squared_error))
        return at_points(grad * times_sampled(logits, grid_sizes), logits, grid_sizes)
    factor = factors(gram, grad_squared_error)
    grad = torch.empty_like(logits)
    for images, rows in bands(logits):
        points = Points(logits[images, :, rows], target[images, rows], ignore_index)
        grad[images, :, rows] = points.gradient(factor[images]).view_as(grad[images, :, rows])
    return grad


class Points:
    """Square roots S of the probabilities at some points, and D = S - Y stacked over M = S + Y.

    S, D and M are 0 at points that do not count.
    """

    def __init__(self, logits: Tensor, target: Tensor, ignore_index: int) -> None:
        """Logits (n, C, ...) and target (n, ...) at L points, of any dtype."""
        x = at_least_float32(logits).flatten(2)
        n, num_classes, count = x.shape
        label = counted_labels(target.flatten(1), num_classes, ignore_index)
        self.own = label.clamp(min=0)
        self.valid = valid = label.ge(0).to(x.dtype)
        # Half the exponent gives the square root of exp(x - max): not 0 where p underflows.
        s = (x - x.amax(dim=1, keepdim=True)).div_(2).exp_()
        own_s = s.gather(1, self.own)
        # 1 - p in the label's channel is the sum of the other channels: all digits are right where
        # p is near 1.
        others = s.square().scatter_(1, self.own, 0).sum(dim=1, keepdim=True)
        total = others + own_s.square()
        wrong = total.isnan().logical_and_(label < 0)
        if may_hold(wrong):  # 0 times NaN would be NaN
            for tensor, number in ((s, 0), (own_s, 0), (others, 0), (total, 1)):
                tensor.masked_fill_(wrong, number)
        scale = total.rsqrt().mul_(valid)
        self.s = s.mul_(scale)
        self.own_s = own_s.mul_(scale)
        self.own_q = others.div_(total).mul_(valid)

        wide = x.new_empty(n, 2, num_classes, count, dtype=sum_dtype(x.device))
        wide.copy_(self.s[:, None])
        d, m = wide.unbind(1)
        # sqrt(p) - 1 would lose its digits to rounding where p is near 1.
        d.scatter_(1, self.own, -(self.own_q / (1 + self.own_s)).to(wide.dtype))
        m.scatter_(1, self.own, (self.own_s + valid).to(wide.dtype))
        self.d_over_m = wide.view(n, 2 * num_classes, count)

    def count(self) -> Tensor:
        """Number of points that count, (n,)."""
        return self.valid.sum(dim=(1, 2), dtype=torch.int64)

    def gram(self) -> Tensor:
        """D D^T, D M^T and M M^T: (n, 3, C, C)."""
        c = self.s.shape[1]
        product = torch.bmm(self.d_over_m, self.d_over_m.mT)
        return torch.stack((product[:, :c, :c], product[:, :c, c:], product[:, c:, c:]), dim=1)

    def gradient(self, factor: Tensor) -> Tensor:
        """The gradient of the logits, (S G - p <S, G>) / 2, where G = factor [D; M] is the gradient
        of S.
        """
        product = torch.bmm(factor, self.d_over_m).to(self.s.dtype).mul_(self.s)
        own = product.gather(1, self.own)
        others = product.scatter_(1, self.own, 0).sum(dim=1, keepdim=True)
        # Where p is near 1, the general formula would subtract nearly equal numbers in the label's
        # channel.
        own_grad = self.own_q * own - self.own_s.square() * others
        grad = product.sub_(self.s.square().mul_(others.add_(own)))
        return grad.scatter_(1, self.own, own_grad).div_(2)


def squared_error_of(gram: Tensor) -> Tensor:
    """(<D D^T, M M^T> + <D M^T, M D^T>) / 2 of every image, in the matrices' dtype."""
    dd, dm, mm = gram.unbind(1)
    return ((dd * mm).sum(dim=(1, 2)) + (dm * dm.mT).sum(dim=(1, 2))).div_(2).clamp_(min=0)


def factors(gram: Tensor, grad_squared_error: Tensor) -> Tensor:
    """The matrices (N, C, 2 C) whose product with D over M is the gradient of S."""
    dd, dm, mm = gram.unbind(1)
    return torch.cat((mm + dm, dm.mT + dd), dim=2) * grad_squared_error[:, None, None]


def square_root_affinity(logits: Tensor, grid_sizes: list[int]) -> Tensor:
    """S^T S at the points: (N, L, L)."""
    s = square_roots(sampled(logits, grid_sizes))
    return torch.bmm(s.mT, s)


def square_root_affinity_backward(
    grad_affinity: Tensor, logits: Tensor, grid_sizes: list[int]
) -> Tensor:
    """The gradient of the logits, given the gradient (N, L, L) of the matrices."""
    s = square_roots(sampled(logits, grid_sizes))
    product = torch.bmm(s, grad_affinity + grad_affinity.mT).mul_(s)
    grad = product.sub_(s.square().mul_(product.sum(dim=1, keepdim=True))).div_(2)
    if not grid_sizes:
        return in_layout_of(logits, grad.view(logits.shape))
    h, w = grid_points(logits, grid_sizes)
    same_pixel = (h[:, None] == h) & (w[:, None] == w)
    return at_points(grad @ same_pixel.to(grad.dtype), logits, grid_sizes)


def square_roots(logits: Tensor) -> Tensor:
    """Square roots of the softmax of logits (N, C, L)."""
    return at_least_float32(logits).log_softmax(dim=1).div_(2).exp_()


def label_affinity(
    target: Tensor, grid_sizes: list[int], ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Matrices (N, L, L), 1 where two points that count have the same label, and a mask (N, L) of
    the points that count.
    """
    label = sampled(target.to(torch.int64), grid_sizes)
    valid = (label >= 0) & (label != ignore_index)
    same = torch.eq(label[:, :, None], label[:, None, :])
    return same.logical_and_(valid[:, :, None]).to(torch.float32), valid


def sampled(x: Tensor, grid_sizes: list[int]) -> Tensor:
    """Values (..., L) of an image (..., H, W) at the sample points."""
    if not grid_sizes:
        return x.flatten(-2)
    h, w = grid_points(x, grid_sizes)
    return x[..., h, w]


def grid_points(x: Tensor, grid_sizes: list[int]) -> tuple[Tensor, Tensor]:
    """Rows (L,) and columns (L,) of the sample points."""
    height, width = x.shape[-2:]
    grids = []
    for size in grid_sizes:
        steps = torch.arange(size, device=x.device)
        grids.append(torch.meshgrid(steps * height // size, steps * width // size, indexing="ij"))
    rows, columns = zip(*grids, strict=True)
    return torch.cat([h.flatten() for h in rows]), torch.cat([w.flatten() for w in columns])


def times_sampled(x: Tensor, grid_sizes: list[int]) -> Tensor:
    """Number of sample points on the pixel of each sample point, (L,)."""

    def steps(row: Tensor, height: int, size: int) -> Tensor:
        """Number of steps i with floor(i H / g) = row."""
        return ((row + 1) * size + height - 1) // height - (row * size + height - 1) // height

    (h, w), (height, width) = grid_points(x, grid_sizes), x.shape[-2:]
    return torch.stack([steps(h, height, size) * steps(w, width, size) for size in grid_sizes]).sum(
        dim=0
    )


def at_points(grad: Tensor, logits: Tensor, grid_sizes: list[int]) -> Tensor:
    """Writes the gradient (N, C, L) to the pixels of the sample points; other pixels get 0.

    Points on the same pixel must have the same gradient: each of them writes its own.
    """
    h, w = grid_points(logits, grid_sizes)
    result = torch.zeros_like(logits)
    result[:, :, h, w] = grad.to(logits.dtype)
    return result
