"""Losses and counts of every category, as partial tables of programs."""

from __future__ import annotations

import triton
import triton.language as tl

from tritonaff.kernels.dilated_affinity.focal import LOG2_E, minus_logs
from tritonaff.kernels.dilated_affinity.signals import (
    bits_of_bytes,
    pairs,
    pairs_after,
    pointers,
    signals,
)
from tritonaff.kernels.shared import first_pixel, is_inside

# The tables hold for every category the losses of different and of same signals, and four counts:
# pixels, same signals, correct different signals, correct same signals. The counts are bytes of one
# number, added up over a program's steps, then pairs of 16 bits, added up over its pixels: see
# tables_steps().
LOSSES, COUNTS = 2, 4
SMALLEST = tl.constexpr(2.0**-149)  # the smallest float32 above 0


@triton.jit
def store_table(ptr, table_k, table_last):
    """Stores a table: [8], and a number for the last category."""
    k = tl.arange(0, 8)
    tl.store(ptr + k, table_k)
    tl.store(ptr + 8, table_last)


@triton.jit
def sum_of_pixels(table):
    """From [8, BLOCK_PAIRS, 2] to [8]."""
    return tl.sum(tl.sum(table, axis=2), axis=1)


@triton.jit
def tables_kernel(
    logits_ptr, target_ptr, losses_ptr, counts_ptr,
    H, W, PAIRS, STEPS, stride_n, stride_c, stride_h, stride_w,
    target_stride_n, target_stride_h, target_stride_w, gamma, ignore_index,
    OFFSETS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    BLOCK_PAIRS: tl.constexpr = BLOCK_P // 2
    n, first = first_pixel(PAIRS, BLOCK_PAIRS * STEPS)
    first_h, first_pair = pairs(first, W, BLOCK_PAIRS)
    logits_ptr += n * stride_n
    target_ptr += n * target_stride_n
    NUM_RATES: tl.constexpr = len(OFFSETS) // 16
    # The tables share one offset: two pointers spill registers on sm_80.
    place = tl.program_id(0).to(tl.int64) * (NUM_RATES * 9)
    # One body for all rates: four take five times as long to compile.
    for rate in range(NUM_RATES):
        # The last category, without different signals, is apart: the others are a power of 2.
        # [8, BLOCK_PAIRS, 2]
        different_k = tl.zeros((8, BLOCK_PAIRS, 2), tl.float32)
        # [8, BLOCK_PAIRS, 2]
        same_k = tl.zeros((8, BLOCK_PAIRS, 2), tl.float32)
        # [8, BLOCK_PAIRS, 2]
        counts_k = tl.zeros((8, BLOCK_PAIRS, 2), tl.int32)
        # [1, BLOCK_PAIRS, 2]
        same_last = tl.zeros((1, BLOCK_PAIRS, 2), tl.float32)
        # [1, BLOCK_PAIRS, 2]
        counts_last = tl.zeros((1, BLOCK_PAIRS, 2), tl.int32)
        h, pair = first_h, first_pair
        for _ in range(STEPS):
            w = 2 * pair + tl.arange(0, 2)[None, None, :]
            # [1, BLOCK_PAIRS, 2] each
            inside = is_inside(h, w, H, W)
            different, same = signals(
                pointers(target_ptr, h, pair, target_stride_h, target_stride_w),
                h, w, H, W, target_stride_h, target_stride_w, ignore_index,
                rate, OFFSETS,
            )  # fmt: skip
            x_ptrs = pointers(logits_ptr, h, pair, stride_h, stride_w)
            # [1, BLOCK_PAIRS, 2]
            loss_different = tl.zeros((1, BLOCK_PAIRS, 2), tl.float32)
            # [1, BLOCK_PAIRS, 2]
            loss_same = tl.zeros((1, BLOCK_PAIRS, 2), tl.float32)
            # [1, BLOCK_PAIRS, 2]
            not_positive = tl.zeros((1, BLOCK_PAIRS, 2), tl.uint32)
            for s in tl.static_range(8):
                is_different = (different & (1 << (7 - s))) != 0
                is_same = (same & (1 << (7 - s))) != 0
                # [1, BLOCK_PAIRS, 2]
                x = tl.load(x_ptrs, mask=inside).to(tl.float32)
                x_ptrs += stride_c
                # e^x is 2 to this power. The power's sign is the prediction: negative where x is
                # 0, too. A NaN may have either sign: it shows in the loss.
                x_2 = x * LOG2_E - SMALLEST
                not_positive = (not_positive << 1) | (x_2.to(tl.uint32, bitcast=True) >> 31)
                u = tl.where(is_different, -x, x)
                minus_log_p, minus_log_q = minus_logs(u, tl.exp2(-tl.abs(x_2)))
                focal = tl.exp2(minus_log_q * (gamma * -LOG2_E)) * minus_log_p
                # A choice of sums is one instruction, a sum of choices is two.
                loss_different = tl.where(is_different, loss_different + focal, loss_different)
                loss_same = tl.where(is_same, loss_same + focal, loss_same)
            signal = different | (same << 8)
            correct = signal & (not_positive.to(tl.int32) * 0x101 ^ 0xFF00)
            counts = bits_of_bytes(signal | (correct << 16))
            num_different = counts & 0xFF
            counts = (counts & ~0xFF) + tl.where(signal != 0, 1, 0)
            is_category = 8 - tl.arange(0, 8)[:, None, None] == num_different
            different_k = tl.where(is_category, different_k + loss_different, different_k)
            same_k = tl.where(is_category, same_k + loss_same, same_k)
            counts_k += tl.where(is_category, counts, 0)
            is_last = num_different == 0
            same_last = tl.where(is_last, same_last + loss_same, same_last)
            counts_last += tl.where(is_last, counts, 0)
            h, pair = pairs_after(h, pair, W, BLOCK_PAIRS)
        logits_ptr += 8 * tl.cast(stride_c, tl.int64)
        store_table(losses_ptr + 2 * place, sum_of_pixels(different_k), 0.0)
        store_table(
            losses_ptr + 2 * place + 9,
            sum_of_pixels(same_k), tl.sum(sum_of_pixels(same_last), axis=0),
        )  # fmt: skip
        for byte in tl.static_range(2):
            # [8]
            table_k = sum_of_pixels((counts_k >> 8 * byte) & 0xFF00FF)
            table_last = tl.sum(sum_of_pixels((counts_last >> 8 * byte) & 0xFF00FF), axis=0)
            for half in tl.static_range(2):
                store_table(
                    counts_ptr + 4 * place + (byte + 2 * half) * 9,
                    (table_k >> 16 * half) & 0xFFFF, (table_last >> 16 * half) & 0xFFFF,
                )  # fmt: skip
        place += 9
