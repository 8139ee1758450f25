"""Sums and counts of every channel, as partial tables of programs. BLOCK_FOURS is BLOCK_V / 4."""

from __future__ import annotations

import triton
import triton.language as tl

from tritonaff.kernels.dilated_affinity.focal import LOG2_E, minus_logs
from tritonaff.kernels.instance_affinity.pairs import (
    fours,
    fours_after,
    is_inside,
    load_ids,
    logit_of_target,
    miss_of,
    pairs,
    pointers,
)
from tritonaff.kernels.shared import first_pixel


@triton.jit
def total(values):
    """From [BLOCK_FOURS, 4] to one number."""
    return tl.sum(tl.sum(values, axis=1), axis=0)


@triton.jit
def store_sums(ptr, of_different, of_same, TERM: tl.constexpr):
    """Stores the sums of one term in a table [2, 4], by target and term."""
    tl.store(ptr + TERM, total(of_different))
    tl.store(ptr + 4 + TERM, total(of_same))


@triton.jit
def tables_kernel(
    logits_ptr, ids_ptr, sums_ptr, counts_ptr,
    D, H, W, FOURS, STEPS, stride_n, stride_k, stride_d, stride_h, stride_w,
    ids_stride_n, ids_stride_d, ids_stride_h, ids_stride_w, background, ignored, gamma,
    OFFSETS: tl.constexpr, HAS_BACKGROUND: tl.constexpr, HAS_IGNORED: tl.constexpr,
    INVERT: tl.constexpr, MISSES: tl.constexpr, FOCAL: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    BLOCK_FOURS: tl.constexpr = BLOCK_V // 4
    NUM_CHANNELS: tl.constexpr = len(OFFSETS) // 3
    n, first = first_pixel(FOURS, BLOCK_FOURS * STEPS)
    first_z, first_h, first_four = fours(first, H, W, BLOCK_FOURS)
    logits_ptr += n * stride_n
    ids_ptr += n * ids_stride_n
    sums_ptr += tl.program_id(0).to(tl.int64) * (NUM_CHANNELS * 8)
    counts_ptr += tl.program_id(0).to(tl.int64) * (NUM_CHANNELS * 2)
    for k in range(NUM_CHANNELS):
        # [BLOCK_FOURS, 4]
        zeros = tl.zeros((BLOCK_FOURS, 4), tl.float32)
        log_different, log_same = zeros, zeros
        miss_different, miss_same = zeros, zeros
        square_different, square_same = zeros, zeros
        focal_different, focal_same = zeros, zeros
        # All pairs in the upper 16 bits, those of one id in the lower ones.
        # [BLOCK_FOURS, 4]
        count = tl.zeros((BLOCK_FOURS, 4), tl.int32)
        z, h, four = first_z, first_h, first_four
        for _ in range(STEPS):
            w = 4 * four + tl.arange(0, 4)[None, :]
            inside = is_inside(z, h, w, D, H, W)
            id_ptrs = pointers(ids_ptr, z, h, four, ids_stride_d, ids_stride_h, ids_stride_w)
            same, counts = pairs(
                load_ids(id_ptrs, inside, WIDE), id_ptrs, z, h, w, D, H, W,
                ids_stride_d, ids_stride_h, ids_stride_w, background, ignored, k,
                OFFSETS, HAS_BACKGROUND, HAS_IGNORED, WIDE,
            )  # fmt: skip
            x_ptrs = pointers(logits_ptr, z, h, four, stride_d, stride_h, stride_w)
            # [BLOCK_FOURS, 4]
            x = tl.load(x_ptrs, mask=inside).to(tl.float32)
            u = logit_of_target(x, same, counts, INVERT)
            e = tl.exp2(-tl.abs(u * LOG2_E))
            loss, minus_log_miss = minus_logs(u, e)
            is_same, is_different = same & counts, counts & ~same
            count += tl.where(is_same, 0x10001, 0) + tl.where(is_different, 0x10000, 0)
            # A choice of sums is one instruction, a sum of choices is two.
            log_same = tl.where(is_same, log_same + loss, log_same)
            log_different = tl.where(is_different, log_different + loss, log_different)
            if MISSES:
                miss, _ = miss_of(u, e)
                square = miss * miss
                miss_same = tl.where(is_same, miss_same + miss, miss_same)
                miss_different = tl.where(is_different, miss_different + miss, miss_different)
                square_same = tl.where(is_same, square_same + square, square_same)
                square_different = tl.where(
                    is_different, square_different + square, square_different
                )
            if FOCAL:
                focal = tl.exp2(minus_log_miss * (gamma * -LOG2_E)) * loss
                focal_same = tl.where(is_same, focal_same + focal, focal_same)
                focal_different = tl.where(is_different, focal_different + focal, focal_different)
            z, h, four = fours_after(z, h, four, H, W, BLOCK_FOURS)
        counted = total(count)
        num_same = counted & 0xFFFF
        tl.store(counts_ptr, ((counted >> 16) & 0xFFFF) - num_same)
        tl.store(counts_ptr + 1, num_same)
        store_sums(sums_ptr, log_different, log_same, 0)
        if MISSES:
            store_sums(sums_ptr, miss_different, miss_same, 1)
            store_sums(sums_ptr, square_different, square_same, 2)
        if FOCAL:
            store_sums(sums_ptr, focal_different, focal_same, 3)
        logits_ptr += stride_k
        sums_ptr += 8
        counts_ptr += 2
