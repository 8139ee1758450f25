"""Triton tiles of affinity propagation.

A program owns all classes of BLOCK_P consecutive pixels of one image, so that maximum and
normalisation stay inside it. One launch is one iteration, because a pixel's neighbours are
anywhere.

    gates_kernel               affinity        -> sigmoid, 0 where the neighbour is outside
    step_kernel                p               -> the next p, and what y was divided by
    normalize_backward_kernel  d loss / d p    -> d loss / d y, of the last iteration
    step_backward_kernel       d loss / d y    -> d loss / d y of the iteration before (that of the
                                                  first iteration: d loss / d p); adds to the
                                                  gradient of the gates
    gates_backward_kernel      gates' gradient -> affinity's gradient

RATES are flat, r1, r2, r1, r2, ...: a pixel has 4 * len(RATES) neighbours and gates.

y is the sum of Eq. 6 before its normalisation. Every gradient gathers what its pixel needs: no
atomics, the same input gives the same bits.

A step holds (BLOCK_P,) of every class: a tuple, all of it in the thread that the pixel belongs to.
What classes share is there once: a neighbour's gate, its index, whether it is inside. It is loaded
without a mask, because one outside is replaced by the pixel itself, with a gate of 0. More classes
than the registers hold are taken in blocks. Iterates are contiguous: in every class, a neighbour is
the same step away.

Half precision is read as it is and computed in float32. Image sizes are runtime arguments: what
compiles anew are rates, classes, block sizes, and Triton's own distinction of arguments that are 1
or divisible by 16.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonaff.kernels.shared import (
    INTERPRETED,
    cdiv,
    is_inside,
    launch,
    next_power_of_2,
    pixels,
    step_in,
    steps_in_32_bits,
)
from tritonaff.portable.blocks import in_layout_of

# Pixels of a step: two for each thread of 4 warps.
BLOCK_P = 256
# Classes whose sums the registers hold; where there are more, so many at a time.
MAX_CLASSES, CLASSES_OF_MANY = 24, 12
# Elements of the other tiles: 8 for each thread.
BLOCK = 1024
# The interpreter takes its time per program, whatever the size.
INTERPRETED_BLOCK = 1 << 15


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
def pixels_to_load(HW, W, BLOCK_P: tl.constexpr):
    """Image, and index, row and column (pixels,) of this program's pixels, and which of them are in
    the image. Others have the index of a pixel that is, and no neighbours.
    """
    n, pixel, h, w = pixels(HW, W, BLOCK_P)
    in_image = pixel < HW
    return n, tl.where(in_image, pixel, tl.arange(0, BLOCK_P)), h, w, in_image


@triton.jit
def neighbor(
    s, SIGN: tl.constexpr, pixel, h, w, in_image, H, W, RATES: tl.constexpr, IN_PAIRS: tl.constexpr
):  # fmt: skip
    """Which pixels have neighbour s (or are it, if the sign is -1), and the index of that pixel; or
    their own index, where there is none.
    """
    r1, r2 = RATES[0], RATES[1]
    for k in tl.static_range(1, len(RATES) // 2):
        r1 = tl.where(s < 8 * k, r1, RATES[2 * k])
        r2 = tl.where(s < 8 * k, r2, RATES[2 * k + 1])
    dy, dx = step_in(s % 8)
    dy, dx = dy * (SIGN * r1), dx * (SIGN * r2)
    there = in_image & is_inside(h + dy, w + dx, H, W)
    index = tl.where(there, pixel + (dy * tl.cast(W, tl.int64) + dx), pixel)
    if IN_PAIRS:  # one load for two: newer versions of Triton see it themselves
        index = tl.max_contiguous(index, 2)
    return there, index


@triton.jit
def load_classes(ptrs, HW, CLASSES: tl.constexpr):
    """One (pixels,) of each of some classes."""
    values = ()
    for c in tl.static_range(CLASSES):
        values += (tl.load(ptrs + c * HW).to(tl.float32),)
    return values


@triton.jit
def store_classes(ptrs, values, mean, total, HW, mask, CLASSES: tl.constexpr):
    """(value - mean) / total of each of some classes."""
    for c in tl.static_range(CLASSES):
        tl.store(ptrs + c * HW, (values[c] - mean) / total, mask=mask)


@triton.jit
def add_product(sums, factor, values, CLASSES: tl.constexpr):
    result = ()
    for c in tl.static_range(CLASSES):
        result += (sums[c] + factor * values[c],)
    return result


@triton.jit
def scalar_product(a, b, CLASSES: tl.constexpr):
    result = a[0] * b[0]
    for c in tl.static_range(1, CLASSES):
        result += a[c] * b[c]
    return result


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
        dy, dx = step_in(direction)
        there = is_inside(h + dy * RATES[2 * k], w + dx * RATES[2 * k + 1], H, W)
        gate = tl.where(there, gate, 0.0)
        store(gates_ptr + channel.to(tl.int64) * HW + pixel, gate, in_image)


@triton.jit
def y_of_classes(
    p_ptr, gates_ptrs, own_weight, place, H, W, HW, neighbors,
    RATES: tl.constexpr, IN_PAIRS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """y of some classes, and their sum."""
    p = load_classes(p_ptr + place[0], HW, CLASSES)
    y = ()
    for c in tl.static_range(CLASSES):
        y += (own_weight * p[c],)
    # Their number is no constant: the compiler would unroll the loop, and registers spill.
    for s in range(neighbors):
        _, index = neighbor(s, 1, *place, H, W, RATES, IN_PAIRS)
        gate = tl.load(gates_ptrs)  # 0 where there is no neighbour
        gates_ptrs += HW
        y = add_product(y, gate, load_classes(p_ptr + index, HW, CLASSES), CLASSES)
    total = y[0]
    for c in tl.static_range(1, CLASSES):
        total += y[c]
    return y, total


@triton.jit
def normalize(
    ptrs, last, mean, total, HW, mask,
    BLOCKS: tl.constexpr, BLOCK_C: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """(value - mean) / total: of blocks of classes in place, and of the last block."""
    for _ in range(BLOCKS):
        store_classes(ptrs, load_classes(ptrs, HW, BLOCK_C), mean, total, HW, mask, BLOCK_C)
        ptrs += BLOCK_C * HW
    store_classes(ptrs, last, mean, total, HW, mask, LAST)


@triton.jit
def largest_of_classes(largest, ptrs, HW, CLASSES: tl.constexpr):
    values = load_classes(ptrs, HW, CLASSES)
    for c in tl.static_range(CLASSES):
        largest = tl.maximum(largest, values[c])
    return largest


@triton.jit
def step_kernel(
    p_ptr, gates_ptr, out_ptr, total_ptr,
    H, W, HW, neighbors, self_weight,
    RATES: tl.constexpr, IN_PAIRS: tl.constexpr,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    n, pixel, h, w, in_image = pixels_to_load(HW, W, BLOCK_P)
    place = (pixel, h, w, in_image)
    HW = tl.cast(HW, tl.int64)
    # Before the last one, which stays in registers until the total is known. These wait in `out`.
    BLOCKS: tl.constexpr = (C - 1) // BLOCK_C
    LAST: tl.constexpr = C - BLOCKS * BLOCK_C
    gates_ptrs = gates_ptr + n * (4 * len(RATES)) * HW + pixel
    p_ptr += n * C * HW
    out_ptrs = out_ptr + n * C * HW + pixel

    largest = tl.full((BLOCK_P,), -float("inf"), tl.float32)
    p_ptrs = p_ptr + pixel
    for _ in range(BLOCKS):
        largest = largest_of_classes(largest, p_ptrs, HW, BLOCK_C)
        p_ptrs += BLOCK_C * HW
    own_weight = self_weight * largest_of_classes(largest, p_ptrs, HW, LAST)

    total = tl.zeros((BLOCK_P,), tl.float32)
    y_ptrs = out_ptrs
    for _ in range(BLOCKS):
        y, part = y_of_classes(
            p_ptr, gates_ptrs, own_weight, place, H, W, HW, neighbors, RATES, IN_PAIRS, BLOCK_C
        )  # fmt: skip
        store_classes(y_ptrs, y, 0.0, 1.0, HW, in_image, BLOCK_C)
        total += part
        p_ptr += BLOCK_C * HW
        y_ptrs += BLOCK_C * HW
        tl.debug_barrier()  # nothing says that a thread loads what it stored itself
    y, part = y_of_classes(
        p_ptr, gates_ptrs, own_weight, place, H, W, HW, neighbors, RATES, IN_PAIRS, LAST
    )  # fmt: skip
    total += part
    total = tl.where(total == 0, float("inf"), total)
    tl.store(total_ptr + n * HW + pixel, total, mask=in_image)
    normalize(out_ptrs, y, 0.0, total, HW, in_image, BLOCKS, BLOCK_C, LAST)


@triton.jit
def normalize_backward_kernel(
    grad_ptr, p_ptr, total_ptr, out_ptr,
    C, W, HW, stride_n, stride_c, stride_h, stride_w,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The gradient comes as it is: it may be one number for all pixels."""
    c = tl.arange(0, BLOCK_C)[:, None]
    n, pixel, h, w = pixels(HW, W, BLOCK_P)
    in_image = (pixel < HW)[None, :]
    pixel, h, w = pixel[None, :], h[None, :], w[None, :]
    mask = (c < C) & in_image
    grad_ptr += n * stride_n
    offs = (n * C + c) * HW + pixel
    grad_p = load(grad_ptr + offsets(c, h, w, stride_c, stride_h, stride_w), mask)
    mean = tl.sum(grad_p * load(p_ptr + offs, mask), axis=0)[None, :]
    total = tl.load(total_ptr + n * HW + pixel, mask=in_image, other=1.0)
    store(out_ptr + offs, (grad_p - mean) / total, mask)


@triton.jit
def through_largest(
    largest, first, to_largest, p_ptrs, grad_y_ptrs, HW, FIRST, CLASSES: tl.constexpr
):  # fmt: skip
    """The largest p, its class, and the gradient that its factor gets: with some more classes."""
    p = load_classes(p_ptrs, HW, CLASSES)
    grad_y = load_classes(grad_y_ptrs, HW, CLASSES)
    for c in tl.static_range(CLASSES):
        first = tl.where(p[c] > largest, FIRST + c, first)
        largest = tl.maximum(largest, p[c])
    return largest, first, to_largest + scalar_product(grad_y, p, CLASSES)


@triton.jit
def grad_of_classes(
    grad_y_ptr, p_ptr, gates_ptr, grad_gates_ptrs, own_weight, first, to_largest,
    place, H, W, HW, neighbors,
    RATES: tl.constexpr, IN_PAIRS: tl.constexpr,
    NEEDS_P: tl.constexpr, NEEDS_GATES: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """The gradient of p of some classes, and its product with p. Adds to that of the gates."""
    grad_y = load_classes(grad_y_ptr + place[0], HW, CLASSES)
    if NEEDS_GATES:  # of this pixel, for its neighbours
        for s in range(neighbors):
            there, index = neighbor(s, 1, *place, H, W, RATES, IN_PAIRS)
            before = tl.load(grad_gates_ptrs, mask=there)
            grad_gate = scalar_product(grad_y, load_classes(p_ptr + index, HW, CLASSES), CLASSES)
            tl.store(grad_gates_ptrs, before + grad_gate, mask=there)
            grad_gates_ptrs += HW
    grad_p = ()
    for c in tl.static_range(CLASSES):
        grad_p += (own_weight * grad_y[c] + tl.where(first == c, to_largest, 0.0),)
    if NEEDS_P:  # from the pixels whose neighbour this one is
        for s in range(neighbors):
            there, index = neighbor(s, -1, *place, H, W, RATES, IN_PAIRS)
            gate = tl.load(gates_ptr + index, mask=there, other=0.0)
            gates_ptr += HW
            values = load_classes(grad_y_ptr + index, HW, CLASSES)
            grad_p = add_product(grad_p, gate, values, CLASSES)
    p = load_classes(p_ptr + place[0], HW, CLASSES)
    return grad_p, scalar_product(grad_p, p, CLASSES)


@triton.jit
def step_backward_kernel(
    grad_y_ptr, p_ptr, gates_ptr, before_ptr, grad_gates_ptr, out_ptr,
    H, W, HW, neighbors, self_weight,
    RATES: tl.constexpr, IN_PAIRS: tl.constexpr,
    IS_FIRST: tl.constexpr, NEEDS_P: tl.constexpr, NEEDS_GATES: tl.constexpr,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    n, pixel, h, w, in_image = pixels_to_load(HW, W, BLOCK_P)
    place = (pixel, h, w, in_image)
    HW = tl.cast(HW, tl.int64)
    BLOCKS: tl.constexpr = (C - 1) // BLOCK_C
    LAST: tl.constexpr = C - BLOCKS * BLOCK_C
    gates_ptr += n * (4 * len(RATES)) * HW
    grad_gates_ptrs = grad_gates_ptr + n * (4 * len(RATES)) * HW + pixel
    p_ptr += n * C * HW
    grad_y_ptr += n * C * HW
    out_ptrs = out_ptr + n * C * HW + pixel

    largest = tl.full((BLOCK_P,), -float("inf"), tl.float32)
    first = tl.zeros((BLOCK_P,), tl.int32)
    to_largest = tl.zeros((BLOCK_P,), tl.float32)
    p_ptrs, grad_y_ptrs = p_ptr + pixel, grad_y_ptr + pixel
    for block in range(BLOCKS):
        largest, first, to_largest = through_largest(
            largest, first, to_largest, p_ptrs, grad_y_ptrs, HW, block * BLOCK_C, BLOCK_C
        )  # fmt: skip
        p_ptrs += BLOCK_C * HW
        grad_y_ptrs += BLOCK_C * HW
    largest, first, to_largest = through_largest(
        largest, first, to_largest, p_ptrs, grad_y_ptrs, HW, BLOCKS * BLOCK_C, LAST
    )  # fmt: skip
    own_weight = self_weight * largest
    to_largest *= self_weight

    mean = tl.zeros((BLOCK_P,), tl.float32)
    grad_p_ptrs = out_ptrs
    for _ in range(BLOCKS):
        grad_p, part = grad_of_classes(
            grad_y_ptr, p_ptr, gates_ptr, grad_gates_ptrs, own_weight, first, to_largest,
            place, H, W, HW, neighbors, RATES, IN_PAIRS, NEEDS_P, NEEDS_GATES, BLOCK_C,
        )  # fmt: skip
        if NEEDS_P:
            store_classes(grad_p_ptrs, grad_p, 0.0, 1.0, HW, in_image, BLOCK_C)
        mean += part
        first -= BLOCK_C
        grad_y_ptr += BLOCK_C * HW
        p_ptr += BLOCK_C * HW
        grad_p_ptrs += BLOCK_C * HW
        tl.debug_barrier()  # nothing says that a thread loads what it stored itself
    grad_p, part = grad_of_classes(
        grad_y_ptr, p_ptr, gates_ptr, grad_gates_ptrs, own_weight, first, to_largest,
        place, H, W, HW, neighbors, RATES, IN_PAIRS, NEEDS_P, NEEDS_GATES, LAST,
    )  # fmt: skip
    if NEEDS_P:
        if IS_FIRST:
            store_classes(grad_p_ptrs, grad_p, 0.0, 1.0, HW, in_image, LAST)
        else:
            total = tl.load(before_ptr + n * HW + pixel)
            normalize(
                out_ptrs, grad_p, mean + part, total, HW, in_image, BLOCKS, BLOCK_C, LAST
            )  # fmt: skip


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
    if iterations == 0 or len(probs) == 0:
        return torch.empty_like(probs).copy_(probs)
    buffers = [new_iterate(probs) for _ in range(min(iterations, 2))]
    gates = launch_gates(affinity, rates, steepness, from_logits)
    total = new_total(probs)
    p = probs.contiguous()
    for t in range(iterations):
        launch_step(p, gates, buffers[t % 2], total, rates, self_weight)
        p = buffers[t % 2]
    return in_layout_of(probs, p)


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
    grad_probs = probs.new_empty(0)
    grad_affinity = torch.empty_like(affinity) if needs_affinity else affinity.new_empty(0)
    if iterations == 0 or len(probs) == 0:
        if needs_probs:
            grad_probs = torch.empty_like(probs).copy_(grad)
        return grad_probs, grad_affinity.zero_()

    height, width = probs.shape[2:]
    gates = launch_gates(affinity, rates, steepness, from_logits)
    iterates, totals = [probs.contiguous()], []
    for _ in range(iterations):
        totals.append(new_total(probs))
        iterates.append(new_iterate(probs))
        launch_step(iterates[-2], gates, iterates[-1], totals[-1], rates, self_weight)

    grad_y, other = new_iterate(probs), new_iterate(probs)
    last = iterates.pop()
    launch(normalize_backward_kernel, grid(probs, all_classes(probs)),
        grad, last, totals.pop(), grad_y,
        probs.shape[1], width, height * width, *grad.stride(), **all_classes(probs),
    )  # fmt: skip
    del last
    # What a launch does not use is some tensor: here, and the total before the first iteration.
    grad_gates = torch.zeros_like(gates) if needs_affinity else gates
    for t in reversed(range(iterations)):
        p = iterates.pop()
        launch(step_backward_kernel, grid(probs, tile(probs)),
            grad_y, p, gates, totals.pop() if t > 0 else gates, grad_gates, other,
            height, width, height * width, 4 * len(rates), self_weight,
            IS_FIRST=t == 0, NEEDS_P=t > 0 or needs_probs, NEEDS_GATES=needs_affinity,
            **steps(rates, width), **tile(probs),
        )  # fmt: skip
        grad_y, other = other, grad_y
    if needs_probs:
        grad_probs = in_layout_of(probs, grad_y)
    if needs_affinity:
        launch(gates_backward_kernel, gates_grid(affinity),
            gates, grad_gates, grad_affinity, width, height * width,
            *grad_affinity.stride(), math.log(steepness),
            NUM_RATES=len(rates) // 2, FROM_LOGITS=from_logits, **gates_tile(),
        )  # fmt: skip
    return grad_probs, grad_affinity


def launch_gates(affinity: Tensor, rates: list[int], steepness: float, from_logits: bool) -> Tensor:
    n, channels, height, width = affinity.shape
    gates = affinity.new_empty(n, channels, height, width, dtype=torch.float32)
    launch(gates_kernel, gates_grid(affinity),
        affinity, gates, height, width, height * width, *affinity.stride(), math.log(steepness),
        RATES=steps_in_32_bits(rates), FROM_LOGITS=from_logits, **gates_tile(),
    )  # fmt: skip
    return gates


def launch_step(
    p: Tensor, gates: Tensor, out: Tensor, total: Tensor, rates: list[int], self_weight: float
) -> None:
    height, width = p.shape[2:]
    launch(step_kernel, grid(p, tile(p)),
        p, gates, out, total, height, width, height * width, 4 * len(rates), self_weight,
        **steps(rates, width), **tile(p),
    )  # fmt: skip


def new_iterate(probs: Tensor) -> Tensor:
    return probs.new_empty(probs.shape, dtype=torch.float32)


def new_total(probs: Tensor) -> Tensor:
    n, _, height, width = probs.shape
    return probs.new_empty(n, height, width, dtype=torch.float32)


def steps(rates: list[int], width: int) -> dict[str, Any]:
    """And whether two pixels that begin at an even one have a neighbour both or neither."""
    in_pairs = width % 2 == 0 and all(step % 2 == 0 for step in rates[1::2])
    return {"RATES": steps_in_32_bits(rates), "IN_PAIRS": in_pairs}


def tile(probs: Tensor) -> dict[str, int]:
    """Not more pixels than an image has: see pixels_to_load."""
    _, classes, height, width = probs.shape
    block_p = INTERPRETED_BLOCK // 8 if INTERPRETED else BLOCK_P
    blocks = 1 if classes <= MAX_CLASSES else cdiv(classes, CLASSES_OF_MANY)
    return {
        "C": classes,
        "BLOCK_C": cdiv(classes, blocks),
        "BLOCK_P": min(block_p, 1 << (height * width).bit_length() - 1),
    }


def all_classes(probs: Tensor) -> dict[str, int]:
    """A tile (BLOCK_C, BLOCK_P) of all classes."""
    classes = next_power_of_2(probs.shape[1])
    block = INTERPRETED_BLOCK if INTERPRETED else BLOCK
    return {"BLOCK_C": classes, "BLOCK_P": max(4, block // classes)}


def grid(probs: Tensor, blocks: dict[str, int]) -> tuple[int]:
    n, _, height, width = probs.shape
    return (cdiv(height * width, blocks["BLOCK_P"]) * n,)


def gates_tile() -> dict[str, int]:
    return {"BLOCK_P": (INTERPRETED_BLOCK if INTERPRETED else BLOCK) // 8}


def gates_grid(affinity: Tensor) -> tuple[int]:
    n, _, height, width = affinity.shape
    return (cdiv(height * width, gates_tile()["BLOCK_P"]) * n,)
