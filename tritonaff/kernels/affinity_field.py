"""Triton tiles of the affinity field (variant "paper").

A program owns BLOCK_C classes of a BLOCK_H x BLOCK_W patch of one image: a tile (BLOCK_C, pixels).
Neighbours are loaded again, shifted: a patch of a few rows keeps those loads in the L1 cache, and
nothing of the size (N, C, H, W, 8) exists. Label masks are computed once for the classes of a tile.

    statistics_kernel        logits            -> largest logit, sum of the other exponentials
    tables_kernel            logits, target    -> partial tables, one per program, summed
                                                  afterwards: the same input gives the same bits
    gradient_kernel          table gradients   -> d loss / d p
    softmax_backward_kernel  d loss / d p      -> d loss / d logits

Half precision is read as it is and computed in float32. Image sizes and strides are runtime
arguments: what compiles anew are neighbourhood sizes, block sizes, and Triton's own distinction of
arguments that are 1 or divisible by 16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonaff.kernels.shared import load_label, on_device, pixels

# Few rows of many columns: coalesced loads, and a halo that neighbouring programs have in cache.
BLOCK_H, BLOCK_W = 4, 32
# Every class of a program adds its own accumulators: four leave a thread enough registers.
MAX_BLOCK_C = 4
# The interpreter takes its time per program, whatever the size.
INTERPRETED_PATCH = {"BLOCK_H": 16, "BLOCK_W": 32}
# Elements of a tile that holds all classes of some pixels.
BLOCK_ALL_CLASSES = 2048


@triton.jit
def patch(H, W, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """Image, and rows and columns (1, pixels), of this program's patch."""
    patches_w = tl.cdiv(W, BLOCK_W)
    patches = tl.cdiv(H, BLOCK_H) * patches_w
    n, place = tl.program_id(0) // patches, tl.program_id(0) % patches
    offs = tl.arange(0, BLOCK_H * BLOCK_W)[None, :]
    h = (place // patches_w) * BLOCK_H + offs // BLOCK_W
    w = (place % patches_w) * BLOCK_W + offs % BLOCK_W
    return n.to(tl.int64), h, w


@triton.jit
def load_probabilities(
    logits_ptr, top_ptr, rest_ptr, c, h, w, mask, C, W, stride_c, stride_h, stride_w, eps
):
    """p, q = 1 - p and their logarithms, clamped to [eps, 1 - eps]: (BLOCK_C, pixels)."""
    pixel = h.to(tl.int64) * W + w
    top = tl.load(top_ptr + pixel, mask=mask, other=0.0)
    rest = tl.load(rest_ptr + pixel, mask=mask, other=1.0)
    offs = c.to(tl.int64) * stride_c + h.to(tl.int64) * stride_h + w.to(tl.int64) * stride_w
    x = tl.load(logits_ptr + offs, mask=mask & (c < C), other=0.0).to(tl.float32) - top
    e = tl.exp(x)
    scale = 1 / (1 + rest)
    p = tl.minimum(tl.maximum(e * scale, eps), 1 - eps)
    # Not 1 - p: this keeps its digits where p is near 1.
    q = tl.minimum(tl.maximum((1 - e + rest) * scale, eps), 1 - eps)
    log_p = tl.minimum(tl.maximum(x - tl.log(1 + rest), tl.log(eps)), tl.log(1 - eps))
    return p, q, log_p, tl.log(q)


@triton.jit
def difference(p_i, q_i, p_j, q_j):
    """p_i - p_j, from the smaller of p and q so that little is rounded away."""
    return tl.where(p_i > 0.5, q_j - q_i, p_i - p_j)


@triton.jit
def kl(p, q, log_p, log_q, log_p_other, log_q_other):
    """KL(p || other)."""
    return p * (log_p - log_p_other) + q * (log_q - log_q_other)


@triton.jit
def statistics_kernel(
    logits_ptr, top_ptr, rest_ptr,
    C, HW, W, stride_n, stride_c, stride_h, stride_w,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    c = tl.arange(0, BLOCK_C)[:, None]
    n, pixel, h, w = pixels(HW, W, BLOCK_P)
    mask = pixel < HW
    offs = (h * stride_h + w.to(tl.int64) * stride_w)[None, :]
    offs = n * stride_n + c.to(tl.int64) * stride_c + offs
    x = tl.load(logits_ptr + offs, mask=(c < C) & mask[None, :], other=0.0).to(tl.float32)
    x = tl.where(c < C, x, -float("inf"))
    top, top_class = tl.max(x, axis=0, return_indices=True)
    # The largest is left out of the sum, not subtracted from it: 1 - p of a confident pixel is
    # this sum, and it may be far below the rounding of 1.
    e = tl.where(c == top_class[None, :], 0.0, tl.exp(x - top[None, :]))
    tl.store(top_ptr + n * HW + pixel, top, mask=mask)
    tl.store(rest_ptr + n * HW + pixel, tl.sum(e, axis=0), mask=mask)


@triton.jit
def tables_kernel(
    logits_ptr, target_ptr, top_ptr, rest_ptr, sums_ptr, counts_ptr,
    C, H, W,
    stride_n, stride_c, stride_h, stride_w, target_stride_n, target_stride_h, target_stride_w,
    margin, eps, ignore_index,
    RADII: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c = row[:, None]
    n, h, w = patch(H, W, BLOCK_H, BLOCK_W)
    logits_ptr += n * stride_n
    target_ptr += n * target_stride_n
    top_ptr += n * H * W
    rest_ptr += n * H * W

    label_i = load_label(target_ptr, h, w, H, W, C, target_stride_h, target_stride_w, ignore_index)
    counted_i = label_i >= 0
    p_i, q_i, log_p_i, log_q_i = load_probabilities(
        logits_ptr, top_ptr, rest_ptr, c, h, w, counted_i, C, W,
        stride_c, stride_h, stride_w, eps,
    )  # fmt: skip
    own_i = label_i == c

    # Tables of this program: (2, C, K), edges first.
    program = tl.program_id(0).to(tl.int64) * 2
    row_offs = row.to(tl.int64) * len(RADII)
    for k in tl.static_range(len(RADII)):
        edge_sum = tl.zeros_like(p_i)
        non_edge_sum = tl.zeros_like(p_i)
        edge_count = tl.zeros_like(p_i).to(tl.int32)
        non_edge_count = tl.zeros_like(p_i).to(tl.int32)
        # Half of the 8 neighbours: each pair once, with both its directed terms.
        for direction in range(5, 9):
            dy = (direction // 3 - 1) * RADII[k]
            dx = (direction % 3 - 1) * RADII[k]
            label_j = load_label(
                target_ptr, h + dy, w + dx, H, W, C, target_stride_h, target_stride_w, ignore_index
            )
            pair = counted_i & (label_j >= 0)
            edge = pair & (own_i != (label_j == c))
            non_edge = pair & (own_i == (label_j == c))
            p_j, q_j, log_p_j, log_q_j = load_probabilities(
                logits_ptr, top_ptr, rest_ptr, c, h + dy, w + dx, pair, C, W,
                stride_c, stride_h, stride_w, eps,
            )  # fmt: skip
            log_odds = (log_p_i - log_q_i) - (log_p_j - log_q_j)
            both_kl = difference(p_i, q_i, p_j, q_j) * log_odds
            kl_i = kl(p_j, q_j, log_p_j, log_q_j, log_p_i, log_q_i)  # i is the centre
            kl_j = kl(p_i, q_i, log_p_i, log_q_i, log_p_j, log_q_j)
            hinges = tl.maximum(margin - kl_i, 0.0) + tl.maximum(margin - kl_j, 0.0)
            edge_sum += tl.where(edge, hinges, 0.0)
            non_edge_sum += tl.where(non_edge, both_kl, 0.0)
            edge_count += edge.to(tl.int32) * 2
            non_edge_count += non_edge.to(tl.int32) * 2
        mask = row < C
        edges = program * C * len(RADII) + row_offs + k
        non_edges = (program + 1) * C * len(RADII) + row_offs + k
        tl.store(sums_ptr + edges, tl.sum(edge_sum, axis=1), mask=mask)
        tl.store(sums_ptr + non_edges, tl.sum(non_edge_sum, axis=1), mask=mask)
        tl.store(counts_ptr + edges, tl.sum(edge_count, axis=1), mask=mask)
        tl.store(counts_ptr + non_edges, tl.sum(non_edge_count, axis=1), mask=mask)


@triton.jit
def gradient_kernel(
    grad_sums_ptr, logits_ptr, target_ptr, top_ptr, rest_ptr, grad_p_ptr,
    C, H, W,
    stride_n, stride_c, stride_h, stride_w, target_stride_n, target_stride_h, target_stride_w,
    grad_stride_n, grad_stride_c, grad_stride_h, grad_stride_w,
    margin, eps, ignore_index,
    RADII: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]
    n, h, w = patch(H, W, BLOCK_H, BLOCK_W)
    logits_ptr += n * stride_n
    target_ptr += n * target_stride_n
    top_ptr += n * H * W
    rest_ptr += n * H * W

    label_i = load_label(target_ptr, h, w, H, W, C, target_stride_h, target_stride_w, ignore_index)
    counted_i = label_i >= 0
    p_i, q_i, log_p_i, log_q_i = load_probabilities(
        logits_ptr, top_ptr, rest_ptr, c, h, w, counted_i, C, W,
        stride_c, stride_h, stride_w, eps,
    )  # fmt: skip
    own_i = label_i == c

    # With f_i = KL(p_j || p_i), i the centre, and f_j = KL(p_i || p_j), i the neighbour:
    # d f_i / d p_i = (p_i - p_j) / (p_i q_i) and d f_j / d p_i = log-odds of i less those of j.
    from_f_i = tl.zeros_like(p_i)
    from_f_j = tl.zeros_like(p_i)
    for k in tl.static_range(len(RADII)):
        edges = c * len(RADII) + k
        non_edges = edges + C * len(RADII)
        grad_edge = tl.load(grad_sums_ptr + edges, mask=c < C, other=0.0)
        grad_non_edge = tl.load(grad_sums_ptr + non_edges, mask=c < C, other=0.0)
        # Not unrolled: all neighbours at once would not fit the registers.
        for neighbour in range(8):
            direction = neighbour + (neighbour > 3)  # 4 is the pixel itself
            dy = (direction // 3 - 1) * RADII[k]
            dx = (direction % 3 - 1) * RADII[k]
            label_j = load_label(
                target_ptr, h + dy, w + dx, H, W, C,
                target_stride_h, target_stride_w, ignore_index,
            )  # fmt: skip
            pair = counted_i & (label_j >= 0)
            edge = pair & (own_i != (label_j == c))
            non_edge = pair & (own_i == (label_j == c))
            p_j, q_j, log_p_j, log_q_j = load_probabilities(
                logits_ptr, top_ptr, rest_ptr, c, h + dy, w + dx, pair, C, W,
                stride_c, stride_h, stride_w, eps,
            )  # fmt: skip
            kl_i = kl(p_j, q_j, log_p_j, log_q_j, log_p_i, log_q_i)
            kl_j = kl(p_i, q_i, log_p_i, log_q_i, log_p_j, log_q_j)
            coefficient_i = tl.where(edge & (kl_i < margin), -grad_edge, 0.0)
            coefficient_j = tl.where(edge & (kl_j < margin), -grad_edge, 0.0)
            coefficient_i = tl.where(non_edge, grad_non_edge, coefficient_i)
            coefficient_j = tl.where(non_edge, grad_non_edge, coefficient_j)
            log_odds = (log_p_i - log_q_i) - (log_p_j - log_q_j)
            from_f_i += coefficient_i * difference(p_i, q_i, p_j, q_j)
            from_f_j += coefficient_j * log_odds
    free = (p_i > eps) & (q_i > eps)  # the clamp passes a gradient
    grad = tl.where(free, from_f_i / (p_i * q_i) + from_f_j, 0.0)
    offs = n * grad_stride_n + c.to(tl.int64) * grad_stride_c
    offs = offs + h.to(tl.int64) * grad_stride_h + w.to(tl.int64) * grad_stride_w
    tl.store(grad_p_ptr + offs, grad, mask=(c < C) & (h < H) & (w < W))


@triton.jit
def softmax_backward_kernel(
    grad_p_ptr, logits_ptr, top_ptr, rest_ptr, grad_ptr,
    C, HW, W,
    stride_n, stride_c, stride_h, stride_w, grad_p_stride_n, grad_p_stride_c, grad_p_stride_h,
    grad_p_stride_w, grad_stride_n, grad_stride_c, grad_stride_h, grad_stride_w,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    c = tl.arange(0, BLOCK_C)[:, None].to(tl.int64)
    n, pixel, h, w = pixels(HW, W, BLOCK_P)
    in_image = pixel < HW
    top = tl.load(top_ptr + n * HW + pixel, mask=in_image, other=0.0)[None, :]
    rest = tl.load(rest_ptr + n * HW + pixel, mask=in_image, other=1.0)[None, :]
    h, w, mask = h[None, :], w.to(tl.int64)[None, :], (c < C) & in_image[None, :]
    offs = n * stride_n + c * stride_c + h * stride_h + w * stride_w
    x = tl.load(logits_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    x = tl.where(c < C, x, -float("inf"))
    p = tl.exp(x - top) / (1 + rest)
    offs = n * grad_p_stride_n + c * grad_p_stride_c + h * grad_p_stride_h + w * grad_p_stride_w
    grad_p = tl.load(grad_p_ptr + offs, mask=mask, other=0.0) * p
    grad = grad_p - p * tl.sum(grad_p, axis=0)[None, :]
    # Over the classes this sums to 0. What is missing to that is the rounding error of the largest
    # class: where p is near 1, nearly equal numbers were subtracted.
    largest = tl.where(x == top, 1.0, 0.0)
    missing = tl.sum(grad, axis=0) / tl.sum(largest, axis=0)
    grad -= largest * missing[None, :]
    offs = n * grad_stride_n + c * grad_stride_c + h * grad_stride_h + w * grad_stride_w
    tl.store(grad_ptr + offs, grad.to(grad_ptr.dtype.element_ty), mask=mask)


def forward(
    logits: Tensor,
    target: Tensor,
    kernel_sizes: list[int],
    margin: float,
    eps: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums and counts (2, C, K), edges first; softmax statistics top and rest (N, 1, H, W)."""
    n, num_classes, height, width = logits.shape
    top = logits.new_empty(n, 1, height, width, dtype=torch.float32)
    rest = torch.empty_like(top)
    grid = patch_grid(logits)
    tables = grid[0], 2, num_classes, len(kernel_sizes)
    sums = logits.new_empty(tables, dtype=torch.float32)
    counts = logits.new_empty(tables, dtype=torch.int32)
    if n > 0:
        with on_device(logits):
            statistics_kernel[pixel_grid(logits)](
                logits, top, rest, num_classes, height * width, width, *logits.stride(),
                **pixel_blocks(logits),
            )  # fmt: skip
            tables_kernel[grid](
                logits, target, top, rest, sums, counts, num_classes, height, width,
                *logits.stride(), *target.stride(), margin, eps, ignore_index,
                RADII=radii(kernel_sizes), **patch_blocks(logits),
            )  # fmt: skip
    return sums.sum(dim=0), counts.sum(dim=0), top, rest


def backward(
    grad_sums: Tensor,
    logits: Tensor,
    target: Tensor,
    top: Tensor,
    rest: Tensor,
    kernel_sizes: list[int],
    margin: float,
    eps: float,
    ignore_index: int,
) -> Tensor:
    """The gradient with respect to the logits, given that with respect to the sums."""
    n, num_classes, height, width = logits.shape
    grad = torch.empty_like(logits)
    # The gradient of p is rounded to nothing less than float32: the softmax subtracts parts of it.
    grad_p = grad if grad.dtype == torch.float32 else torch.empty_like(grad, dtype=torch.float32)
    if n > 0:
        with on_device(logits):
            gradient_kernel[patch_grid(logits)](
                grad_sums, logits, target, top, rest, grad_p,
                num_classes, height, width,
                *logits.stride(), *target.stride(), *grad_p.stride(), margin, eps, ignore_index,
                RADII=radii(kernel_sizes), **patch_blocks(logits),
            )  # fmt: skip
            softmax_backward_kernel[pixel_grid(logits)](
                grad_p, logits, top, rest, grad, num_classes, height * width, width,
                *logits.stride(), *grad_p.stride(), *grad.stride(), **pixel_blocks(logits),
            )  # fmt: skip
    return grad


def radii(kernel_sizes: list[int]) -> tuple[int, ...]:
    return tuple((size - 1) // 2 for size in kernel_sizes)


def patch_blocks(logits: Tensor) -> dict[str, int]:
    classes = triton.next_power_of_2(logits.shape[1])
    if logits.device.type == "cpu":
        return {"BLOCK_C": min(16, classes), **INTERPRETED_PATCH}
    return {"BLOCK_C": min(MAX_BLOCK_C, classes), "BLOCK_H": BLOCK_H, "BLOCK_W": BLOCK_W}


def patch_grid(logits: Tensor) -> tuple[int, int]:
    """Images are part of the first axis: the others end at 65535."""
    n, num_classes, height, width = logits.shape
    blocks = patch_blocks(logits)
    patches = triton.cdiv(height, blocks["BLOCK_H"]) * triton.cdiv(width, blocks["BLOCK_W"])
    return patches * n, triton.cdiv(num_classes, blocks["BLOCK_C"])


def pixel_blocks(logits: Tensor) -> dict[str, int]:
    block_c = triton.next_power_of_2(logits.shape[1])
    return {"BLOCK_C": block_c, "BLOCK_P": max(16, min(256, BLOCK_ALL_CLASSES // block_c))}


def pixel_grid(logits: Tensor) -> tuple[int]:
    n, _, height, width = logits.shape
    return (triton.cdiv(height * width, pixel_blocks(logits)["BLOCK_P"]) * n,)
