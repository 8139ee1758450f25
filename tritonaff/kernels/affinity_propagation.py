"""Triton tiles of affinity propagation.

A program owns all classes of BLOCK_P consecutive pixels of one image: a tile (BLOCK_C, BLOCK_P), so
that maximum and normalisation stay inside it. Neighbours are loaded shifted; one launch is one
iteration, because a pixel's neighbours are anywhere.

    gates_kernel               affinity        -> sigmoid, 0 where the neighbour is outside
    step_kernel                p               -> the next p, and what y was divided by
    normalise_backward_kernel  d loss / d p    -> d loss / d y, of the last iteration
    step_backward_kernel       d loss / d y    -> d loss / d y of the iteration before (that of the
                                                  first iteration: d loss / d p); adds to the
                                                  gradient of the gates
    gates_backward_kernel      gates' gradient -> affinity's gradient

RATES are flat, r1, r2, r1, r2, ...: a pixel has 4 * len(RATES) neighbours and gates.

y is the sum of Eq. 6 before its normalisation. Every gradient gathers what its pixel needs: no
atomics, the same input gives the same bits. Half precision is read as it is and computed in
float32. Image sizes and strides are runtime arguments: what compiles anew are rates, block sizes,
and Triton's own distinction of arguments that are 1 or divisible by 16.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonaff.kernels.shared import on_device, pixels, steps_in_32_bits

# Elements of a tile: 8 for each thread of 4 warps, which leaves registers to hide loads behind.
BLOCK = 1024
# However many the classes, so many pixels, and warps for them.
MIN_BLOCK_P, MAX_WARPS = 4, 16
# The interpreter takes its time per program, whatever the size.
INTERPRETED_BLOCK = 1 << 15


@triton.jit
def step_to(direction, R1: tl.constexpr, R2: tl.constexpr):
    """Rows and columns to the neighbour in one of 8 directions; the fifth of 3 x 3 is the pixel."""
    place = direction + (direction > 3)
    return (place // 3 - 1) * R1, (place % 3 - 1) * R2


@triton.jit
def is_inside(h, w, H, W):
    return (h >= 0) & (h < H) & (w >= 0) & (w < W)


@triton.jit
def offsets(c, h, w, stride_c, stride_h, stride_w):
    return c.to(tl.int64) * stride_c + h.to(tl.int64) * stride_h + w.to(tl.int64) * stride_w


@triton.jit
def load(ptrs, mask):
    return tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store(ptrs, value, mask):
    tl.store(ptrs, value.to(ptrs.dtype.element_ty), mask=mask)


@triton.jit
def gates_kernel(
    affinity_ptr, gates_ptr,
    H, W, HW, stride_n, stride_c, stride_h, stride_w, slope,
    RATES: tl.constexpr, FROM_LOGITS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    n, pixel, h, w = pixels(HW, W, BLOCK_P)
    in_image = (pixel < HW)[None, :]
    pixel, h, w = pixel[None, :], h[None, :], w[None, :]
    direction = tl.arange(0, 8)[:, None]
    affinity_ptr += n * stride_n
    gates_ptr += n * (4 * len(RATES)) * HW
    for k in tl.static_range(len(RATES) // 2):
        channel = 8 * k + direction
        gate = load(affinity_ptr + offsets(channel, h, w, stride_c, stride_h, stride_w), in_image)
        if FROM_LOGITS:
            gate = 1 / (1 + tl.exp(-slope * gate))
        dy, dx = step_to(direction, RATES[2 * k], RATES[2 * k + 1])
        gate = tl.where(is_inside(h + dy, w + dx, H, W), gate, 0.0)
        store(gates_ptr + channel.to(tl.int64) * HW + pixel, gate, in_image)


@triton.jit
def step_kernel(
    p_ptr, gates_ptr, out_ptr, total_ptr,
    C, H, W, HW,
    p_stride_n, p_stride_c, p_stride_h, p_stride_w, stride_n, stride_c, stride_h, stride_w,
    self_weight,
    RATES: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    c = tl.arange(0, BLOCK_C)[:, None]
    n, pixel, h, w = pixels(HW, W, BLOCK_P)
    in_image = (pixel < HW)[None, :]
    pixel, h, w = pixel[None, :], h[None, :], w[None, :]
    mask = (c < C) & in_image
    gates_ptr += n * (4 * len(RATES)) * HW + pixel
    p_ptrs = p_ptr + n * p_stride_n + offsets(c, h, w, p_stride_c, p_stride_h, p_stride_w)

    p = load(p_ptrs, mask)
    largest = tl.max(tl.where(c < C, p, -float("inf")), axis=0)[None, :]
    y = self_weight * largest * p
    for k in tl.static_range(len(RATES) // 2):
        # Not unrolled: all neighbours at once would not fit the registers.
        for direction in range(8):
            dy, dx = step_to(0 * n + direction, RATES[2 * k], RATES[2 * k + 1])
            gate = load(gates_ptr, in_image)
            there = mask & is_inside(h + dy, w + dx, H, W)
            y += gate * load(p_ptrs + (dy * p_stride_h + dx * p_stride_w), there)
            gates_ptr += HW
    total = tl.sum(y, axis=0)[None, :]
    total = tl.where(total == 0, float("inf"), total)
    store(total_ptr + n * HW + pixel, total, in_image)
    out_ptrs = out_ptr + n * stride_n + offsets(c, h, w, stride_c, stride_h, stride_w)
    store(out_ptrs, y / total, mask)


@triton.jit
def through_normalisation(grad_p, p, total_ptrs, in_image):
    """From the gradient of p = y / total to that of y."""
    total = tl.load(total_ptrs, mask=in_image, other=1.0)
    return (grad_p - tl.sum(grad_p * p, axis=0)[None, :]) / total


@triton.jit
def normalise_backward_kernel(
    grad_ptr, p_ptr, total_ptr, out_ptr,
    C, W, HW,
    grad_stride_n, grad_stride_c, grad_stride_h, grad_stride_w,
    stride_n, stride_c, stride_h, stride_w,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    c = tl.arange(0, BLOCK_C)[:, None]
    n, pixel, h, w = pixels(HW, W, BLOCK_P)
    in_image = (pixel < HW)[None, :]
    pixel, h, w = pixel[None, :], h[None, :], w[None, :]
    mask = (c < C) & in_image
    grad_offs = n * grad_stride_n + offsets(c, h, w, grad_stride_c, grad_stride_h, grad_stride_w)
    offs = n * stride_n + offsets(c, h, w, stride_c, stride_h, stride_w)
    grad_p, p = load(grad_ptr + grad_offs, mask), load(p_ptr + offs, mask)
    grad_y = through_normalisation(grad_p, p, total_ptr + n * HW + pixel, in_image)
    store(out_ptr + offs, grad_y, mask)


@triton.jit
def step_backward_kernel(
    grad_y_ptr, p_ptr, gates_ptr, before_ptr, grad_gates_ptr, out_ptr,
    C, H, W, HW,
    p_stride_n, p_stride_c, p_stride_h, p_stride_w, stride_n, stride_c, stride_h, stride_w,
    self_weight,
    RATES: tl.constexpr, IS_FIRST: tl.constexpr, NEEDS_P: tl.constexpr, NEEDS_GATES: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    c = tl.arange(0, BLOCK_C)[:, None]
    n, pixel, h, w = pixels(HW, W, BLOCK_P)
    in_image = (pixel < HW)[None, :]
    pixel, h, w = pixel[None, :], h[None, :], w[None, :]
    mask = (c < C) & in_image
    gates_ptr += n * (4 * len(RATES)) * HW + pixel
    grad_gates_ptr += n * (4 * len(RATES)) * HW + pixel
    p_ptrs = p_ptr + n * p_stride_n + offsets(c, h, w, p_stride_c, p_stride_h, p_stride_w)
    offs = n * stride_n + offsets(c, h, w, stride_c, stride_h, stride_w)

    p, grad_y = load(p_ptrs, mask), load(grad_y_ptr + offs, mask)
    shown = tl.where(c < C, p, -float("inf"))
    largest = tl.max(shown, axis=0)[None, :]
    first = tl.argmax(shown, axis=0, tie_break_left=True)[None, :]
    to_largest = tl.sum(grad_y * p, axis=0)[None, :]
    grad_p = self_weight * (largest * grad_y + tl.where(c == first, to_largest, 0.0))
    for k in tl.static_range(len(RATES) // 2):
        # Not unrolled: all neighbours at once would not fit the registers.
        for direction in range(8):
            dy, dx = step_to(0 * n + direction, RATES[2 * k], RATES[2 * k + 1])
            if NEEDS_GATES:  # of this pixel, for its neighbour s
                there = mask & is_inside(h + dy, w + dx, H, W)
                p_s = load(p_ptrs + (dy * p_stride_h + dx * p_stride_w), there)
                grad_gate = load(grad_gates_ptr, in_image) + tl.sum(grad_y * p_s, axis=0)[None, :]
                store(grad_gates_ptr, grad_gate, in_image)
                grad_gates_ptr += HW
            if NEEDS_P:  # from the pixel whose neighbour s this one is
                inside = in_image & is_inside(h - dy, w - dx, H, W)
                gate = load(gates_ptr - (dy * W + dx), inside)
                back = dy * stride_h + dx * stride_w
                grad_p += gate * load(grad_y_ptr + offs - back, mask & inside)
                gates_ptr += HW
    if NEEDS_P:
        if not IS_FIRST:
            grad_p = through_normalisation(grad_p, p, before_ptr + n * HW + pixel, in_image)
        store(out_ptr + offs, grad_p, mask)


@triton.jit
def gates_backward_kernel(
    gates_ptr, grad_gates_ptr, grad_ptr,
    W, HW, stride_n, stride_c, stride_h, stride_w, slope,
    NUM_RATES: tl.constexpr, FROM_LOGITS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    n, pixel, h, w = pixels(HW, W, BLOCK_P)
    in_image = (pixel < HW)[None, :]
    pixel, h, w = pixel[None, :], h[None, :], w[None, :]
    for k in range(NUM_RATES):
        channel = 8 * k + tl.arange(0, 8)[:, None]
        offs = n * (8 * NUM_RATES) * HW + channel.to(tl.int64) * HW + pixel
        grad = load(grad_gates_ptr + offs, in_image)
        if FROM_LOGITS:
            gate = load(gates_ptr + offs, in_image)
            grad = grad * gate * (1 - gate) * slope
        grad_offs = n * stride_n + offsets(channel, h, w, stride_c, stride_h, stride_w)
        store(grad_ptr + grad_offs, grad, in_image)


def forward(
    probs: Tensor,
    affinity: Tensor,
    rates: list[int],
    iterations: int,
    self_weight: float,
    steepness: float,
    from_logits: bool,
) -> Tensor:
    """The refined probs, in their dtype and memory format."""
    result = torch.empty_like(probs)
    if iterations == 0 or len(probs) == 0:
        return result.copy_(probs)
    buffers = [torch.empty_like(probs, dtype=torch.float32) for _ in range(min(iterations - 1, 2))]
    with on_device(probs):
        gates = launch_gates(affinity, rates, steepness, from_logits)
        total = new_total(probs)
        p = probs
        for t in range(iterations):
            out = result if t == iterations - 1 else buffers[t % 2]
            launch_step(p, gates, out, total, rates, self_weight)
            p = out
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
    """The gradients with respect to probs and affinity; one that is not needed is empty."""
    grad_probs = torch.empty_like(probs) if needs_probs else probs.new_empty(0)
    grad_affinity = torch.empty_like(affinity) if needs_affinity else affinity.new_empty(0)
    if iterations == 0 or len(probs) == 0:
        if needs_probs:
            grad_probs.copy_(grad)
        return grad_probs, grad_affinity.zero_()

    _, num_classes, height, width = probs.shape
    with on_device(probs):
        gates = launch_gates(affinity, rates, steepness, from_logits)
        iterates, totals = [probs], []
        for _ in range(iterations):
            totals.append(new_total(probs))
            iterates.append(torch.empty_like(probs, dtype=torch.float32))
            launch_step(iterates[-2], gates, iterates[-1], totals[-1], rates, self_weight)

        grad_y, other = (torch.empty_like(probs, dtype=torch.float32) for _ in range(2))
        last = iterates.pop()
        normalise_backward_kernel[grid(probs)](
            grad, last, totals.pop(), grad_y, num_classes, width, height * width,
            *grad.stride(), *grad_y.stride(), **tile(probs),
        )  # fmt: skip
        del last
        # What a launch does not use is some tensor: here, and the total before the first iteration.
        grad_gates = torch.zeros_like(gates) if needs_affinity else gates
        for t in reversed(range(iterations)):
            p = iterates.pop()
            out = grad_probs if t == 0 and needs_probs else other
            step_backward_kernel[grid(probs)](
                grad_y, p, gates, totals.pop() if t > 0 else gates, grad_gates, out,
                num_classes, height, width, height * width,
                *p.stride(), *grad_y.stride(), self_weight,
                RATES=steps_in_32_bits(rates), IS_FIRST=t == 0, NEEDS_P=t > 0 or needs_probs,
                NEEDS_GATES=needs_affinity, **tile(probs),
            )  # fmt: skip
            grad_y, other = other, grad_y
        if needs_affinity:
            gates_backward_kernel[gates_grid(affinity)](
                gates, grad_gates, grad_affinity, width, height * width,
                *grad_affinity.stride(), math.log(steepness),
                NUM_RATES=len(rates) // 2, FROM_LOGITS=from_logits, **gates_tile(affinity),
            )  # fmt: skip
    return grad_probs, grad_affinity


def launch_gates(affinity: Tensor, rates: list[int], steepness: float, from_logits: bool) -> Tensor:
    n, channels, height, width = affinity.shape
    gates = affinity.new_empty(n, channels, height, width, dtype=torch.float32)
    gates_kernel[gates_grid(affinity)](
        affinity, gates, height, width, height * width, *affinity.stride(), math.log(steepness),
        RATES=steps_in_32_bits(rates), FROM_LOGITS=from_logits, **gates_tile(affinity),
    )  # fmt: skip
    return gates


def launch_step(
    p: Tensor, gates: Tensor, out: Tensor, total: Tensor, rates: list[int], self_weight: float
) -> None:
    _, num_classes, height, width = p.shape
    step_kernel[grid(p)](
        p, gates, out, total, num_classes, height, width, height * width,
        *p.stride(), *out.stride(), self_weight, RATES=steps_in_32_bits(rates), **tile(p),
    )  # fmt: skip


def new_total(probs: Tensor) -> Tensor:
    n, _, height, width = probs.shape
    return probs.new_empty(n, height, width, dtype=torch.float32)


def tile(probs: Tensor) -> dict[str, int]:
    """All classes of some pixels, and more warps for a tile of many classes."""
    classes = triton.next_power_of_2(probs.shape[1])
    if probs.device.type == "cpu":
        return {"BLOCK_C": classes, "BLOCK_P": max(1, INTERPRETED_BLOCK // classes)}
    block_p = max(MIN_BLOCK_P, min(256, BLOCK // classes))
    num_warps = min(MAX_WARPS, max(4, 4 * classes * block_p // BLOCK))
    return {"BLOCK_C": classes, "BLOCK_P": block_p, "num_warps": num_warps}


def grid(probs: Tensor) -> tuple[int]:
    n, _, height, width = probs.shape
    return (triton.cdiv(height * width, tile(probs)["BLOCK_P"]) * n,)


def gates_tile(affinity: Tensor) -> dict[str, int]:
    return {"BLOCK_P": (INTERPRETED_BLOCK if affinity.device.type == "cpu" else BLOCK) // 8}


def gates_grid(affinity: Tensor) -> tuple[int]:
    n, _, height, width = affinity.shape
    return (triton.cdiv(height * width, gates_tile(affinity)["BLOCK_P"]) * n,)
