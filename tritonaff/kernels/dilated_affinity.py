"""Triton tiles of dilated affinity.

A program owns BLOCK_P consecutive pixels of one image and goes through the groups of neighbours:
first the labels of a group's S neighbours, which give every pixel its category and two bit masks of
its signals, then their S channels of logits. Each pass reads the logits once, and a label once for
every neighbour that asks for it, from the cache.

    tables_kernel    logits, target             -> tables of every program, to be added up
    gradient_kernel  d loss / d sums, the same  -> d loss / d logits

Everything of a pixel stays in the registers of one thread; only the tables are reduced across the
program, and they are partial sums, not atomics: the same input gives the same bits. Half precision
is read as it is and computed in float32. Image sizes and strides are runtime arguments: what
compiles anew are the offsets, block sizes, and Triton's own distinction of arguments that are 1 or
divisible by 16.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonaff.kernels.shared import on_device, pixels, steps_in_32_bits

# Four pixels for each thread of 4 warps: the loads of all labels of a group are in flight together,
# and the tables' reduction is shared by many. Two pixels a thread spill registers on sm_80.
BLOCK_P = 512
# The interpreter takes its time per program, whatever the size.
INTERPRETED_BLOCK_P = 1 << 15
# The tables hold of every category the losses of different and of same signals, and four counts:
# correct different signals, correct same ones, valid ones, pixels.
LOSSES, COUNTS = 2, 4


@triton.jit
def load_counted(target_ptr, h, w, H, W, stride_h, stride_w, ignore_index):
    """Labels (pixels,), and which of them are inside and not ignored."""
    inside = (h >= 0) & (h < H) & (w >= 0) & (w < W)
    offs = h.to(tl.int64) * stride_h + w.to(tl.int64) * stride_w
    label = tl.load(target_ptr + offs, mask=inside, other=0).to(tl.int64)
    return label, inside & (label != ignore_index)


@triton.jit
def signals(
    target_ptr, h, w, H, W, stride_h, stride_w, ignore_index,
    OFFSETS: tl.constexpr, GROUP: tl.constexpr, GROUP_SIZE: tl.constexpr,
):  # fmt: skip
    """Bit masks (pixels,) of different and of valid signals, and how many of each there are."""
    # Loaded again for every group: kept over all of them it takes registers that spill.
    label, counted = load_counted(target_ptr, h, w, H, W, stride_h, stride_w, ignore_index)
    different = tl.zeros(label.shape, tl.int32)
    valid = tl.zeros(label.shape, tl.int32)
    num_different = tl.zeros(label.shape, tl.int32)
    num_valid = tl.zeros(label.shape, tl.int32)
    for s in tl.static_range(GROUP_SIZE):
        h_j = h + OFFSETS[2 * (GROUP * GROUP_SIZE + s)]
        w_j = w + OFFSETS[2 * (GROUP * GROUP_SIZE + s) + 1]
        label_j, counted_j = load_counted(
            target_ptr, h_j, w_j, H, W, stride_h, stride_w, ignore_index
        )
        is_valid = counted & counted_j
        is_different = (is_valid & (label_j != label)).to(tl.int32)
        different |= is_different << s
        valid |= is_valid.to(tl.int32) << s
        num_different += is_different
        num_valid += is_valid.to(tl.int32)
    return different, valid, num_different, num_valid


@triton.jit
def probabilities(u):
    """pt = sigmoid(u), 1 - pt, and minus their logarithms, each with all its digits."""
    e = tl.exp(-tl.abs(u))
    one_plus_e = 1 + e
    larger = 1 / one_plus_e
    smaller = e * larger
    # log(1 + e), with what the rounding of 1 + e took away.
    log = tl.log(one_plus_e) + (e - (one_plus_e - 1)) * larger
    pt, not_pt = tl.where(u > 0, larger, smaller), tl.where(u > 0, smaller, larger)
    return pt, not_pt, tl.maximum(-u, 0.0) + log, tl.maximum(u, 0.0) + log


@triton.jit
def by_category(values, is_category):
    """Sum (pixels,) into (categories,)."""
    return tl.sum(tl.where(is_category, values[None, :], 0), axis=1)


@triton.jit
def tables_kernel(
    logits_ptr, target_ptr, losses_ptr, counts_ptr,
    H, W, HW, stride_n, stride_c, stride_h, stride_w,
    target_stride_n, target_stride_h, target_stride_w, gamma, ignore_index,
    OFFSETS: tl.constexpr, GROUP_SIZE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    n, pixel, h, w = pixels(HW, W, BLOCK_P)
    in_image = pixel < HW
    target_ptr += n * target_stride_n
    x_ptrs = logits_ptr + n * stride_n + h.to(tl.int64) * stride_h + w.to(tl.int64) * stride_w
    k = tl.arange(0, BLOCK_K)
    GROUPS: tl.constexpr = len(OFFSETS) // (2 * GROUP_SIZE)
    losses_ptr += tl.program_id(0).to(tl.int64) * (GROUPS * 2 * (GROUP_SIZE + 1)) + k
    counts_ptr += tl.program_id(0).to(tl.int64) * (GROUPS * 4 * (GROUP_SIZE + 1)) + k
    for group in tl.static_range(GROUPS):
        different, valid, num_different, num_valid = signals(
            target_ptr, h, w, H, W, target_stride_h, target_stride_w, ignore_index,
            OFFSETS, group, GROUP_SIZE,
        )  # fmt: skip
        loss_different = tl.zeros((BLOCK_P,), tl.float32)
        loss_same = tl.zeros((BLOCK_P,), tl.float32)
        correct_different = tl.zeros((BLOCK_P,), tl.int32)
        correct_same = tl.zeros((BLOCK_P,), tl.int32)
        # Not unrolled: loads of all signals at once would take the registers, and long to compile.
        for s in range(GROUP_SIZE):
            is_different = ((different >> s) & 1) == 1
            is_same = (((valid >> s) & 1) == 1) & (is_different == 0)
            x = tl.load(x_ptrs, mask=in_image, other=0.0).to(tl.float32)
            _, _, minus_log_pt, minus_log_not_pt = probabilities(tl.where(is_different, -x, x))
            focal = tl.exp(-gamma * minus_log_not_pt) * minus_log_pt
            loss_different += tl.where(is_different, focal, 0.0)
            loss_same += tl.where(is_same, focal, 0.0)
            correct_different += (is_different & (x <= 0)).to(tl.int32)
            correct_same += (is_same & (x > 0)).to(tl.int32)
            x_ptrs += stride_c
        is_category = k[:, None] == (GROUP_SIZE - num_different)[None, :]
        stored = k < GROUP_SIZE + 1
        tl.store(losses_ptr, by_category(loss_different, is_category), mask=stored)
        losses_ptr += GROUP_SIZE + 1
        tl.store(losses_ptr, by_category(loss_same, is_category), mask=stored)
        losses_ptr += GROUP_SIZE + 1
        tl.store(counts_ptr, by_category(correct_different, is_category), mask=stored)
        counts_ptr += GROUP_SIZE + 1
        tl.store(counts_ptr, by_category(correct_same, is_category), mask=stored)
        counts_ptr += GROUP_SIZE + 1
        tl.store(counts_ptr, by_category(num_valid, is_category), mask=stored)
        counts_ptr += GROUP_SIZE + 1
        has_signal = (num_valid > 0).to(tl.int32)
        tl.store(counts_ptr, by_category(has_signal, is_category), mask=stored)
        counts_ptr += GROUP_SIZE + 1


@triton.jit
def gradient_kernel(
    coefficients_ptr, logits_ptr, target_ptr, grad_ptr,
    H, W, HW, stride_n, stride_c, stride_h, stride_w,
    grad_stride_n, grad_stride_c, grad_stride_h, grad_stride_w,
    target_stride_n, target_stride_h, target_stride_w, gamma, ignore_index,
    OFFSETS: tl.constexpr, GROUP_SIZE: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    n, pixel, h, w = pixels(HW, W, BLOCK_P)
    in_image = pixel < HW
    target_ptr += n * target_stride_n
    row, column = h.to(tl.int64), w.to(tl.int64)
    x_ptrs = logits_ptr + n * stride_n + row * stride_h + column * stride_w
    grad_ptrs = grad_ptr + n * grad_stride_n + row * grad_stride_h + column * grad_stride_w
    for group in tl.static_range(len(OFFSETS) // (2 * GROUP_SIZE)):
        different, valid, num_different, _ = signals(
            target_ptr, h, w, H, W, target_stride_h, target_stride_w, ignore_index,
            OFFSETS, group, GROUP_SIZE,
        )  # fmt: skip
        of_category = coefficients_ptr + 2 * (GROUP_SIZE - num_different)
        of_different, of_same = tl.load(of_category), tl.load(of_category + 1)
        coefficients_ptr += 2 * (GROUP_SIZE + 1)
        for s in range(GROUP_SIZE):
            is_different = ((different >> s) & 1) == 1
            is_valid = ((valid >> s) & 1) == 1
            x = tl.load(x_ptrs, mask=in_image, other=0.0).to(tl.float32)
            u = tl.where(is_different, -x, x)
            pt, not_pt, minus_log_pt, minus_log_not_pt = probabilities(u)
            slope = tl.exp(-gamma * minus_log_not_pt) * (gamma * pt * minus_log_pt + not_pt)
            slope *= tl.where(is_different, of_different, -of_same)
            slope = tl.where(is_valid, slope, 0.0)
            tl.store(grad_ptrs, slope.to(grad_ptr.dtype.element_ty), mask=in_image)
            x_ptrs += stride_c
            grad_ptrs += grad_stride_c


def forward(
    logits: Tensor,
    target: Tensor,
    offsets: list[int],
    group_size: int,
    gamma: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss sums, signal counts and correct counts (G, S + 1, 2), pixel counts (G, S + 1)."""
    n, _, height, width = logits.shape
    grid = pixel_grid(logits)
    shape = grid[0], len(offsets) // (2 * group_size)
    losses = logits.new_empty(*shape, LOSSES, group_size + 1, dtype=torch.float32)
    counts = logits.new_empty(*shape, COUNTS, group_size + 1, dtype=torch.int32)
    if n > 0:
        with on_device(logits):
            tables_kernel[grid](
                logits, target, losses, counts,
                height, width, height * width, *logits.stride(), *target.stride(),
                gamma, ignore_index, **blocks(logits, offsets, group_size),
                BLOCK_K=triton.next_power_of_2(group_size + 1),
            )  # fmt: skip
    loss_sum = losses.sum(dim=0).mT.contiguous()
    correct_different, correct_same, valid, pixel_count = counts.sum(dim=0).unbind(dim=1)
    different = pixel_count * torch.arange(group_size, -1, -1, device=logits.device)
    signal_count = torch.stack((different, valid - different), dim=-1)
    correct_count = torch.stack((correct_different, correct_same), dim=-1)
    return loss_sum, signal_count, correct_count, pixel_count.clone()


def backward(
    grad_loss_sum: Tensor,
    logits: Tensor,
    target: Tensor,
    offsets: list[int],
    group_size: int,
    gamma: float,
    ignore_index: int,
) -> Tensor:
    """The gradient with respect to the logits, given that with respect to the loss sums."""
    n, _, height, width = logits.shape
    grad = torch.empty_like(logits)
    if n > 0:
        with on_device(logits):
            gradient_kernel[pixel_grid(logits)](
                grad_loss_sum, logits, target, grad,
                height, width, height * width,
                *logits.stride(), *grad.stride(), *target.stride(),
                gamma, ignore_index, **blocks(logits, offsets, group_size),
            )  # fmt: skip
    return grad


def blocks(logits: Tensor, offsets: list[int], group_size: int) -> dict[str, Any]:
    return {
        "OFFSETS": steps_in_32_bits(offsets),
        "GROUP_SIZE": group_size,
        "BLOCK_P": block_p(logits),
    }


def block_p(logits: Tensor) -> int:
    return INTERPRETED_BLOCK_P if logits.device.type == "cpu" else BLOCK_P


def pixel_grid(logits: Tensor) -> tuple[int]:
    """Images are part of the one axis that is not limited to 65535."""
    n, _, height, width = logits.shape
    return (triton.cdiv(height * width, block_p(logits)) * n,)
