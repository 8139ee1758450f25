"""Triton tiles of dilated affinity.

A program owns consecutive pixels of one image and goes through the groups of neighbours. Each pass
reads the logits once, and a label once for every neighbour that asks for it, from the cache.

    tables_kernel    logits, target             -> tables of every program, to be added up
    gradient_kernel  d loss / d sums, the same  -> d loss / d logits

A pixel's category is known when the labels of all its neighbours are. The tables go through labels
and logits side by side, for it only says where the sums belong. The gradient needs it first: the
labels become two bit masks of signals, for the logits that follow.

Everything of a pixel stays in the registers of one thread; only the tables are reduced across the
program, once for all its steps, and they are partial sums, not atomics: the same input gives the
same bits. Half precision is read as it is and computed in float32. Image sizes and strides are
runtime arguments: what compiles anew are the offsets, block sizes, and Triton's own distinction of
arguments that are 1 or divisible by 16.

Masked loads leave what is outside undefined, and no signal there is valid.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonaff.kernels.shared import first_pixel, on_device, pixels, steps_in_32_bits

# Four pixels for each thread of 4 warps: the loads of all labels of a group are in flight together.
BLOCK_P = 512
# Half of them for the tables, which are kept for every pixel of a block until its program ends.
TABLES_BLOCK_P = 256
# The interpreter takes its time per program, whatever the size.
INTERPRETED_BLOCK_P = 1 << 12
# A program adds up so many blocks, if there are that many programs then: enough for any GPU.
MAX_STEPS, MIN_PROGRAMS = 16, 1024
# The tables hold of every category the losses of different and of same signals, and four counts:
# correct different signals, correct same ones, valid ones, pixels.
LOSSES, COUNTS = 2, 4
# These four are bytes of one number, added up over a program's steps, then pairs of 16 bits, added
# up over its pixels: see steps().
CORRECT_DIFFERENT = tl.constexpr(1)
CORRECT_SAME = tl.constexpr(1 << 8)
VALID = tl.constexpr(1 << 16)
PIXEL = tl.constexpr(1 << 24)
MINUS_LOG2_E = tl.constexpr(-1.4426950408889634)


@triton.jit
def is_inside(h, w, H, W):
    """Negative rows and columns are large ones without a sign."""
    return (h.to(tl.uint32) < tl.cast(H, tl.uint32)) & (w.to(tl.uint32) < tl.cast(W, tl.uint32))


@triton.jit
def signal(
    ptrs, label, counted, h, w, H, W, stride_h, stride_w, ignore_index,
    DY: tl.constexpr, DX: tl.constexpr,
):  # fmt: skip
    """Which pixels have a valid signal with this neighbour, and for which it is different."""
    step = DY * tl.cast(stride_h, tl.int64) + DX * tl.cast(stride_w, tl.int64)
    there = counted & is_inside(h + DY, w + DX, H, W)
    label_j = tl.load(ptrs + step, mask=there).to(tl.int64)
    is_valid = there & (label_j != ignore_index)
    return is_valid, is_valid & (label_j != label)


@triton.jit
def signals(
    target_ptr, h, w, H, W, stride_h, stride_w, ignore_index,
    OFFSETS: tl.constexpr, GROUP: tl.constexpr, GROUP_SIZE: tl.constexpr,
):  # fmt: skip
    """Bit masks (pixels,) of different and of valid signals, and how many are different."""
    # Loaded again for every group: kept over all of them it takes registers that spill.
    ptrs = target_ptr + h.to(tl.int64) * stride_h + w.to(tl.int64) * stride_w
    inside = is_inside(h, w, H, W)
    label = tl.load(ptrs, mask=inside).to(tl.int64)
    counted = inside & (label != ignore_index)
    different = tl.zeros(label.shape, tl.int32)
    valid = tl.zeros(label.shape, tl.int32)
    num_different = tl.zeros(label.shape, tl.int32)
    for s in tl.static_range(GROUP_SIZE):
        is_valid, is_different = signal(
            ptrs, label, counted, h, w, H, W, stride_h, stride_w, ignore_index,
            OFFSETS[2 * (GROUP * GROUP_SIZE + s)], OFFSETS[2 * (GROUP * GROUP_SIZE + s) + 1],
        )  # fmt: skip
        different |= tl.where(is_different, 1 << s, 0)
        valid |= tl.where(is_valid, 1 << s, 0)
        num_different += is_different.to(tl.int32)
    return different, valid, num_different


@triton.jit
def log1p_of_fraction(e):
    """log(1 + e) for 0 <= e <= 1: e times a polynomial, off by 1.5e-7 of itself at most."""
    p = -0.0032440233044326305
    p = p * e + 0.019851453602313995
    p = p * e - 0.05695951730012894
    p = p * e + 0.10603653639554977
    p = p * e - 0.15305592119693756
    p = p * e + 0.1967593878507614
    p = p * e - 0.24954134225845337
    p = p * e + 0.3332996368408203
    p = p * e - 0.4999990165233612
    return (p * e + 1.0) * e


@triton.jit
def power_of_not_pt(u, log, gamma):
    """(1 - pt)^gamma, pt = sigmoid(u), with log = log(1 + exp(-|u|))."""
    return tl.exp2((tl.maximum(u, 0.0) + log) * (gamma * MINUS_LOG2_E))


@triton.jit
def store_table(ptr, of_k, of_last, GROUP_SIZE: tl.constexpr, BLOCK_K: tl.constexpr):
    k = tl.arange(0, BLOCK_K)
    tl.store(ptr + k, of_k, mask=k < GROUP_SIZE)
    tl.store(ptr + GROUP_SIZE, of_last)


@triton.jit
def tables_kernel(
    logits_ptr, target_ptr, losses_ptr, counts_ptr,
    H, W, HW, STEPS, stride_n, stride_c, stride_h, stride_w,
    target_stride_n, target_stride_h, target_stride_w, gamma, ignore_index,
    OFFSETS: tl.constexpr, GROUP_SIZE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    n, first = first_pixel(HW, BLOCK_P * STEPS)
    first_h, first_w = (first // W).to(tl.int32), (first % W).to(tl.int32)
    logits_ptr += n * stride_n
    target_ptr += n * target_stride_n
    GROUPS: tl.constexpr = len(OFFSETS) // (2 * GROUP_SIZE)
    # One place for both tables: two pointers spill registers on sm_80.
    place = tl.program_id(0).to(tl.int64) * (GROUPS * (GROUP_SIZE + 1))
    for group in tl.static_range(GROUPS):
        # The last category, without different signals, is on its own: the others are a power of 2.
        different_k = tl.zeros((BLOCK_K, BLOCK_P), tl.float32)
        same_k = tl.zeros((BLOCK_K, BLOCK_P), tl.float32)
        counts_k = tl.zeros((BLOCK_K, BLOCK_P), tl.int32)
        same_last = tl.zeros((BLOCK_P,), tl.float32)
        counts_last = tl.zeros((BLOCK_P,), tl.int32)
        for step in range(STEPS):
            w = first_w + step * BLOCK_P + tl.arange(0, BLOCK_P)
            h, w = first_h + w // W, w % W
            row, column = h.to(tl.int64), w.to(tl.int64)
            x_ptrs = logits_ptr + row * stride_h + column * stride_w
            label_ptrs = target_ptr + row * target_stride_h + column * target_stride_w
            inside = is_inside(h, w, H, W)
            label = tl.load(label_ptrs, mask=inside).to(tl.int64)
            counted = inside & (label != ignore_index)
            loss_different = tl.zeros((BLOCK_P,), tl.float32)
            loss_same = tl.zeros((BLOCK_P,), tl.float32)
            counts = tl.zeros((BLOCK_P,), tl.int32)
            for s in tl.static_range(GROUP_SIZE):
                is_valid, is_different = signal(
                    label_ptrs, label, counted, h, w, H, W, target_stride_h, target_stride_w,
                    ignore_index, OFFSETS[2 * (group * GROUP_SIZE + s)],
                    OFFSETS[2 * (group * GROUP_SIZE + s) + 1],
                )  # fmt: skip
                x = tl.load(x_ptrs, mask=inside).to(tl.float32)
                x_ptrs += stride_c
                log = log1p_of_fraction(tl.exp(-tl.abs(x)))
                u = tl.where(is_different, -x, x)
                focal = power_of_not_pt(u, log, gamma) * (tl.maximum(-u, 0.0) + log)
                loss_different += tl.where(is_different, focal, 0.0)
                loss_same += tl.where(is_valid & (is_different == 0), focal, 0.0)
                # Until the neighbours are through, the byte of the pixels counts different ones.
                if_different = tl.where(x <= 0, CORRECT_DIFFERENT, 0) + (VALID + PIXEL)
                if_same = tl.where(x > 0, CORRECT_SAME, 0) + VALID
                counts += tl.where(is_valid, tl.where(is_different, if_different, if_same), 0)
            num_different = counts // PIXEL
            counts = counts % PIXEL + tl.where(counts > 0, PIXEL, 0)
            k = tl.arange(0, BLOCK_K)[:, None]
            is_category = k == (GROUP_SIZE - num_different)[None, :]
            different_k += tl.where(is_category, loss_different[None, :], 0.0)
            same_k += tl.where(is_category, loss_same[None, :], 0.0)
            counts_k += tl.where(is_category, counts[None, :], 0)
            is_last = num_different == 0
            same_last += tl.where(is_last, loss_same, 0.0)
            counts_last += tl.where(is_last, counts, 0)
        logits_ptr += GROUP_SIZE * tl.cast(stride_c, tl.int64)
        store_table(losses_ptr + 2 * place, tl.sum(different_k, 1), 0.0, GROUP_SIZE, BLOCK_K)
        store_table(
            losses_ptr + 2 * place + (GROUP_SIZE + 1), tl.sum(same_k, 1), tl.sum(same_last, 0),
            GROUP_SIZE, BLOCK_K,
        )  # fmt: skip
        for byte in tl.static_range(2):
            of_k = tl.sum((counts_k >> 8 * byte) & 0xFF00FF, axis=1)
            of_last = tl.sum((counts_last >> 8 * byte) & 0xFF00FF, axis=0)
            for half in tl.static_range(2):
                store_table(
                    counts_ptr + 4 * place + (byte + 2 * half) * (GROUP_SIZE + 1),
                    (of_k >> 16 * half) & 0xFFFF, (of_last >> 16 * half) & 0xFFFF,
                    GROUP_SIZE, BLOCK_K,
                )  # fmt: skip
        place += GROUP_SIZE + 1


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
        different, valid, num_different = signals(
            target_ptr, h, w, H, W, target_stride_h, target_stride_w, ignore_index,
            OFFSETS, group, GROUP_SIZE,
        )  # fmt: skip
        of_category = coefficients_ptr + 2 * (GROUP_SIZE - num_different)
        of_different, of_same = tl.load(of_category), tl.load(of_category + 1)
        coefficients_ptr += 2 * (GROUP_SIZE + 1)
        for s in range(GROUP_SIZE):
            is_different = (different & (1 << s)) != 0
            is_valid = (valid & (1 << s)) != 0
            x = tl.load(x_ptrs, mask=in_image).to(tl.float32)
            u = tl.where(is_different, -x, x)
            e = tl.exp(-tl.abs(x))
            log = log1p_of_fraction(e)
            larger = 1 / (1 + e)
            smaller = e * larger
            pt, not_pt = tl.where(u > 0, larger, smaller), tl.where(u > 0, smaller, larger)
            slope = gamma * pt * (tl.maximum(-u, 0.0) + log) + not_pt
            slope *= power_of_not_pt(u, log, gamma)
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
    block = tables_blocks(logits, offsets, group_size)
    num_steps = steps(logits, group_size, block["BLOCK_P"])
    grid = pixel_grid(logits, num_steps * block["BLOCK_P"])
    shape = grid[0], len(offsets) // (2 * group_size)
    losses = logits.new_empty(*shape, LOSSES, group_size + 1, dtype=torch.float32)
    counts = logits.new_empty(*shape, COUNTS, group_size + 1, dtype=torch.int32)
    if n > 0:
        with on_device(logits):
            tables_kernel[grid](
                logits, target, losses, counts,
                height, width, height * width, num_steps, *logits.stride(), *target.stride(),
                gamma, ignore_index, **block,
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
    block = blocks(logits, offsets, group_size)
    if n > 0:
        with on_device(logits):
            gradient_kernel[pixel_grid(logits, block["BLOCK_P"])](
                grad_loss_sum, logits, target, grad,
                height, width, height * width,
                *logits.stride(), *grad.stride(), *target.stride(),
                gamma, ignore_index, **block,
            )  # fmt: skip
    return grad


def blocks(logits: Tensor, offsets: list[int], group_size: int) -> dict[str, Any]:
    return {
        "OFFSETS": steps_in_32_bits(offsets),
        "GROUP_SIZE": group_size,
        "BLOCK_P": INTERPRETED_BLOCK_P if logits.device.type == "cpu" else BLOCK_P,
    }


def tables_blocks(logits: Tensor, offsets: list[int], group_size: int) -> dict[str, Any]:
    return {
        **blocks(logits, offsets, group_size),
        "BLOCK_K": triton.next_power_of_2(group_size),
        "BLOCK_P": INTERPRETED_BLOCK_P if logits.device.type == "cpu" else TABLES_BLOCK_P,
    }


def steps(logits: Tensor, group_size: int, block_p: int) -> int:
    """Blocks of a program that makes tables: what it counts fits 8 bits, and 16 for all pixels."""
    n, _, height, width = logits.shape
    of_image = triton.cdiv(height * width, block_p)
    fit = min(0xFF, 0xFFFF // block_p) // group_size
    return max(1, min(MAX_STEPS, fit, of_image, n * of_image // MIN_PROGRAMS))


def pixel_grid(logits: Tensor, pixels_per_program: int) -> tuple[int]:
    """Images are part of the one axis that is not limited to 65535."""
    n, _, height, width = logits.shape
    return (triton.cdiv(height * width, pixels_per_program) * n,)
