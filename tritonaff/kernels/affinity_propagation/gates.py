"""Gates: the sigmoid of the affinity, 0 where the neighbour is outside; and their gradient."""

from __future__ import annotations

import triton
import triton.language as tl

from tritonaff.kernels.shared import is_inside, pixels, step_in


@triton.jit
def offsets(c, h, w, stride_c, stride_h, stride_w):
    """Offsets of classes or channels of pixels."""
    return c.to(tl.int64) * stride_c + h.to(tl.int64) * stride_h + w.to(tl.int64) * stride_w


@triton.jit
def load(ptrs, mask):
    """Loads as float32, 0 where masked."""
    return tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store(ptrs, value, mask):
    """Stores in the pointers' dtype."""
    tl.store(ptrs, value.to(ptrs.dtype.element_ty), mask=mask)


@triton.jit
def gates_kernel(
    affinity_ptr, gates_ptr,
    H, W, HW, stride_n, stride_c, stride_h, stride_w, slope,
    RATES: tl.constexpr, FROM_LOGITS: tl.constexpr, REPLICATE: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    n, pixel, h, w = pixels(HW, W, BLOCK_P)
    # [1, BLOCK_P] each
    in_image = (pixel < HW)[None, :]
    pixel, h, w = pixel[None, :], h[None, :], w[None, :]
    # [8, 1]
    direction = tl.arange(0, 8)[:, None]
    affinity_ptr += n * stride_n
    gates_ptr += n * (4 * len(RATES)) * HW
    for k in tl.static_range(len(RATES) // 2):
        channel = 8 * k + direction
        # [8, BLOCK_P]
        gate = load(affinity_ptr + offsets(channel, h, w, stride_c, stride_h, stride_w), in_image)
        if FROM_LOGITS:
            gate = 1 / (1 + tl.exp(-slope * gate))
        if not REPLICATE:
            dy, dx = step_in(direction)
            there = is_inside(h + dy * RATES[2 * k], w + dx * RATES[2 * k + 1], H, W)
            gate = tl.where(there, gate, 0.0)
        store(gates_ptr + channel.to(tl.int64) * HW + pixel, gate, in_image)


@triton.jit
def gates_backward_kernel(
    gates_ptr, grad_gates_ptr, grad_ptr,
    W, HW, stride_n, stride_c, stride_h, stride_w, slope,
    NUM_RATES: tl.constexpr, FROM_LOGITS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    n, pixel, h, w = pixels(HW, W, BLOCK_P)
    # [1, BLOCK_P] each
    in_image = (pixel < HW)[None, :]
    pixel, h, w = pixel[None, :], h[None, :], w[None, :]
    for k in range(NUM_RATES):
        # [8, 1]
        channel = 8 * k + tl.arange(0, 8)[:, None]
        offs = n * (8 * NUM_RATES) * HW + channel.to(tl.int64) * HW + pixel
        # [8, BLOCK_P]
        grad = load(grad_gates_ptr + offs, in_image)
        if FROM_LOGITS:
            # [8, BLOCK_P]
            gate = load(gates_ptr + offs, in_image)
            grad = grad * gate * (1 - gate) * slope
        grad_offs = n * stride_n + offsets(channel, h, w, stride_c, stride_h, stride_w)
        store(grad_ptr + grad_offs, grad, in_image)
