"""Pairs of voxels: places of voxels, ids at both ends, and the logit of the target's probability.

Voxels go in fours of a row, BLOCK_FOURS of them in a block.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def fours(first, H, W, BLOCK_FOURS: tl.constexpr):
    """Planes, rows, and numbers in the row, of consecutive fours of voxels: [BLOCK_FOURS, 1]
    each.
    """
    # Only the first one's numbers are divided in 64 bits.
    FOURS = tl.cdiv(W, 4)
    row = first // FOURS
    four = (first % FOURS).to(tl.int32) + tl.arange(0, BLOCK_FOURS)[:, None]
    h = (row % H).to(tl.int32) + four // FOURS
    return (row // H).to(tl.int32) + h // H, h % H, four % FOURS


@triton.jit
def fours_after(z, h, four, H, W, BLOCK_FOURS: tl.constexpr):
    """Planes, rows and numbers of the fours BLOCK_FOURS further on, [BLOCK_FOURS, 1] each: without
    a division for each of them.
    """
    FOURS = tl.cdiv(W, 4)
    four += BLOCK_FOURS % FOURS
    is_next = four >= FOURS
    four = tl.where(is_next, four - FOURS, four)
    rows = BLOCK_FOURS // FOURS
    h += rows % H + is_next.to(tl.int32)
    is_next = h >= H
    z += rows // H + is_next.to(tl.int32)
    return z, tl.where(is_next, h - H, h), four


@triton.jit
def pointers(ptr, z, h, four, stride_d, stride_h, stride_w):
    """Pointers [BLOCK_FOURS, 4] to voxels: each a constant step from the one before."""
    ptrs = ptr + (z.to(tl.int64) * stride_d + h.to(tl.int64) * stride_h)
    ptrs += (4 * four).to(tl.int64) * stride_w
    return ptrs + tl.arange(0, 4).to(tl.int64)[None, :] * stride_w


@triton.jit
def is_inside(z, h, w, D, H, W):
    """True where the voxel is in the volume. Negative numbers are large without a sign."""
    there = (z.to(tl.uint32) < tl.cast(D, tl.uint32)) & (h.to(tl.uint32) < tl.cast(H, tl.uint32))
    return there & (w.to(tl.uint32) < tl.cast(W, tl.uint32))


@triton.jit
def offset_of(k, OFFSETS: tl.constexpr):
    """The step (dz, dy, dx) of channel k."""
    dz, dy, dx = OFFSETS[0], OFFSETS[1], OFFSETS[2]
    for i in tl.static_range(1, len(OFFSETS) // 3):
        dz = tl.where(k == i, OFFSETS[3 * i], dz)
        dy = tl.where(k == i, OFFSETS[3 * i + 1], dy)
        dx = tl.where(k == i, OFFSETS[3 * i + 2], dx)
    return dz, dy, dx


@triton.jit
def load_ids(ptrs, mask, WIDE: tl.constexpr):
    """Loads ids [BLOCK_FOURS, 4] as int64 if WIDE, else as int32."""
    return tl.load(ptrs, mask=mask).to(tl.int64 if WIDE else tl.int32)


@triton.jit
def pairs(
    ids, ptrs, z, h, w, D, H, W, stride_d, stride_h, stride_w, background, ignored, k,
    OFFSETS: tl.constexpr, HAS_BACKGROUND: tl.constexpr, HAS_IGNORED: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """True where the pair of channel k has one id, and where the pair counts, given ids
    [BLOCK_FOURS, 4] and pointers to them: [BLOCK_FOURS, 4] each.
    """
    dz, dy, dx = offset_of(k, OFFSETS)
    there = is_inside(z + dz, h + dy, w + dx, D, H, W)
    step = dz * tl.cast(stride_d, tl.int64) + dy * tl.cast(stride_h, tl.int64)
    step += dx * tl.cast(stride_w, tl.int64)
    # [BLOCK_FOURS, 4]
    other = load_ids(ptrs + step, there, WIDE)
    same = ids == other
    counts = there & is_inside(z, h, w, D, H, W)
    if HAS_BACKGROUND:
        same = same & (ids != background)
    if HAS_IGNORED:
        counts = counts & (ids != ignored) & (other != ignored)
    return same, counts


@triton.jit
def logit_of_target(x, same, counts, INVERT: tl.constexpr):
    """The logit u of the probability of the target; 0 where the pair does not count."""
    u = tl.where(same, -x, x) if INVERT else tl.where(same, x, -x)
    return tl.where(counts, u, 0.0)


@triton.jit
def miss_of(u, e):
    """1 - sigmoid(u) with all its digits, and sigmoid(u), given e = exp(-|u|)."""
    r = 1.0 / (1.0 + e)
    return tl.where(u < 0, r, e * r), tl.where(u < 0, e * r, r)
