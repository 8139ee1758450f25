"""Triton tiles of the affinity field (variant "paper") and of cross-entropy beside it.

Dense plus sparse, as docs/affinity_field.md derives it:

    statistics_kernel        logits, target -> label, largest logit, sum of the other exponentials
    counts_kernel            label -> numbers of pixels, of pairs and of edges
    dense_kernel             all pairs as if none were an edge -> partial tables, p d loss / d p
    edge_kernel              what pairs of different labels change; cross-entropy -> partial tables
    finish_kernel            partial tables -> tables; no float atomics: the same input gives the
                             same bits. p d loss / d p -> the gradient of the logits, in place, with
                             that of cross-entropy
    scale_kernel             times the gradient of the loss, which is known in the backward pass

A loss knows the gradient of every table entry before its sum, from counts: tables and gradient come
from one march. Without a gradient, or without tables, the same kernels leave the other out.

The dense tiles march: one warp owns a strip of columns of a class and walks down the rows, with the
rows that its stencils reach in registers. A thread holds four neighbouring columns, so a step to
the side is a shuffle within the warp for some of them and nothing for the others.

Half precision is read as it is and computed in float32. Image sizes are runtime arguments: what
compiles anew are neighbourhood sizes, block sizes, whether rows are multiples of four columns, and
Triton's own distinction of arguments that are 1 or divisible by 16.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice
from triton.language.target_info import is_cuda

from tritonaff.kernels.shared import (
    INTERPRETED,
    cdiv,
    even_strides,
    evenly_spaced,
    first_pixel,
    is_inside,
    launch,
    load_label,
    next_power_of_2,
    pixel_step,
    step_in,
    steps_in_32_bits,
)
from tritonaff.portable.blocks import grad_dtype, in_layout_of

# What a strip reads beside the columns that it owns: the largest distance that it reaches.
HALO = tl.constexpr(4)
# 32 lanes for each: more in a thread take more registers than they save work.
CLASSES_IN_A_WARP = {"cuda": 1, "hip": 2}
# Programs that march: a few for every processor of a large GPU.
STRIP_PROGRAMS = 4096
# Partial tables of edges wait beside the gradient: one for every patch would be 11 % of bfloat16
# logits.
PATCHES_IN_A_PROGRAM = 2
# Every program of the counts adds to the same few numbers, and those wait for each other. Counts of
# the patches that one program goes through fit 32 bits.
COUNT_PROGRAMS, MAX_PATCHES = 2048, 1 << 16
BLOCK_SUM = 512
BLOCK_SCALE = 4096
# The interpreter takes its time per program and per operation, whatever the size.
INTERPRETED_CLASSES = 64
INTERPRETED_ROWS = 64
INTERPRETED_PATCH = {"BLOCK_H": 32, "BLOCK_W": 64}
INTERPRETED_PIXELS = 2048


@triton.jit
def exp(x):
    return tl.exp2(x * 1.4426950408889634)


@triton.constexpr_function
def has_fast_log():
    return is_cuda() and not INTERPRETED


@triton.jit
def log(x):
    """For x >= 0. NVIDIA's takes 2 instructions, and is off by 3e-7, or by 3e-7 of itself."""
    return libdevice.fast_logf(x) if has_fast_log() else tl.log(x)


@triton.jit
def reciprocal(x):
    """For x >= 1: a Newton step on the square of a fast root. 1 / x minds any x and costs twice."""
    root = tl.rsqrt(x)
    y = root * root
    return y * (2 - x * y)


@triton.jit
def fields(x, top, rest, own, limit, eps):
    """u, which is eps - q in the channel of the pixel's label and p - eps in others, and
    l = log(p / q). Where p is clamped u is 0, so that sums of it, nearly all, round nothing away.
    """
    x -= top
    e = exp(x)
    # Not 1 - p: this keeps its digits where p is near 1.
    not_e = 1 - e + rest
    log_odds = tl.minimum(tl.maximum(x - log(not_e), -limit), limit)
    u = tl.where(own, not_e, e) * reciprocal(1 + rest) - eps
    # What is not a number stays so: a GPU's maximum would make it 0, and the loss finite.
    nan: tl.constexpr = tl.PropagateNan.ALL
    u = tl.minimum(tl.maximum(u, 0.0, nan), 1 - 2 * eps, nan)
    return tl.where(own, -u, u), log_odds


@triton.jit
def split(x):
    """(classes, lanes, 4) as four of (classes, lanes): a thread's four columns."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1], 2, 2)))
    x_0, x_2 = tl.split(even)
    x_1, x_3 = tl.split(odd)
    return x_0, x_1, x_2, x_3


@triton.jit
def join(columns):
    x = tl.join(tl.join(columns[0], columns[2]), tl.join(columns[1], columns[3]))
    return tl.reshape(x, (x.shape[0], x.shape[1], 4))


@triton.jit
def box_sum(columns, d: tl.constexpr):
    """Four columns plus those d to the left and to the right, lanes in a circle."""
    lanes: tl.constexpr = columns[0].shape[1]
    lane = tl.broadcast_to(tl.arange(0, lanes)[None, :], columns[0].shape)
    sums = ()
    for column in tl.static_range(4):
        left = columns[(column - d) % 4]
        if column < d:
            left = tl.gather(left, (lane + lanes - 1) % lanes, 1)
        right = columns[(column + d) % 4]
        if column + d > 3:
            right = tl.gather(right, (lane + 1) % lanes, 1)
        sums += (columns[column] + left + right,)
    return sums


@triton.jit
def box_count(x, d: tl.constexpr):
    """The same of small numbers, a byte for each of the four columns: x (1, lanes)."""
    lanes: tl.constexpr = x.shape[1]
    lane = tl.arange(0, lanes)[None, :]
    left = tl.gather(x, (lane + lanes - 1) % lanes, 1)
    right = tl.gather(x, (lane + 1) % lanes, 1)
    if d < 4:
        left = (x << 8 * d) | (left >> (32 - 8 * d))
        right = (x >> 8 * d) | (right << (32 - 8 * d))
    return x + left + right


@triton.jit
def byte(x, i: tl.constexpr):
    return (x >> 8 * i & 255).to(tl.int32).to(tl.float32)


@triton.jit
def four_columns(offs, ALIGNED: tl.constexpr):
    """From first columns, or their offsets, (classes, lanes) to all four (classes, lanes, 4)."""
    offs = offs[:, :, None]
    if ALIGNED:
        offs = tl.multiple_of(offs, (1, 1, 4))
    return offs + tl.arange(0, 4)[None, None, :]


@triton.jit
def load_columns(ptr, offs, inside, w, W, other, ALIGNED: tl.constexpr):
    """Four times (classes, lanes): columns w to w + 3, the first of which is at offs."""
    if ALIGNED:  # in one load: all of them are inside or none
        mask = (inside & (w >= 0) & (w < W))[:, :, None]
        columns = split(tl.load(ptr + four_columns(offs, ALIGNED), mask=mask, other=other))
    else:
        columns = ()
        for i in tl.static_range(4):
            mask = inside & (w + i >= 0) & (w + i < W)
            columns += (tl.load(ptr + offs + i, mask=mask, other=other),)
    return columns


@triton.jit
def load_row(
    logits_ptr, top_ptr, rest_ptr, label_ptr, channel, image, c, h, w, H, W, limit, eps,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """u and l of row h, four columns each, and a byte for each of these: 1 where a pixel counts. 0
    at pixels that do not count. The channel of the logits and the image begin at these offsets.
    """
    inside = (h >= 0) & (h < H)
    column = h.to(tl.int64) * W + w
    pixel = image + column
    labels = load_columns(label_ptr, pixel, inside, w, W, -1, ALIGNED)
    tops = load_columns(top_ptr, pixel, inside, w, W, 0.0, ALIGNED)
    rests = load_columns(rest_ptr, pixel, inside, w, W, 1.0, ALIGNED)
    xs = load_columns(logits_ptr, channel + column, inside, w, W, 0.0, ALIGNED)
    us, ls, counts = (), (), tl.zeros(labels[0].shape, tl.uint32)
    for i in tl.static_range(4):
        x = xs[i].to(tl.float32)
        u, log_odds = fields(x, tops[i].to(tl.float32), rests[i], labels[i] == c, limit, eps)
        there = labels[i] >= 0
        us += (tl.where(there, u, 0.0),)
        ls += (tl.where(there, log_odds, 0.0),)
        counts |= there.to(tl.uint32) << 8 * i
    return us, ls, counts


@triton.jit
def far_box(
    logits_ptr, top_ptr, rest_ptr, label_ptr, channel, image, c, h, w, H, W, limit, eps,
    d: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Sums of u, l and counts over a pixel and its neighbours at a distance beyond the strip."""
    u_sum, l_sum, count = load_row(
        logits_ptr, top_ptr, rest_ptr, label_ptr, channel, image, c,
        h, w, H, W, limit, eps, ALIGNED,
    )  # fmt: skip
    for neighbor in range(8):
        dy, dx = step_in(neighbor)
        u, log_odds, counts = load_row(
            logits_ptr, top_ptr, rest_ptr, label_ptr, channel, image, c,
            h + dy * d, w + dx * d, H, W, limit, eps, ALIGNED,
        )  # fmt: skip
        u_sum, l_sum, count = add(u_sum, u), add(l_sum, log_odds), count + counts
    return u_sum, l_sum, count


@triton.jit
def column_sum(rows, d: tl.constexpr, WIDTH: tl.constexpr):
    """The middle row plus those at distance d; a row is WIDTH of the tuple."""
    middle: tl.constexpr = len(rows) // WIDTH // 2
    sums = ()
    for i in tl.static_range(WIDTH):
        above, below = rows[(middle - d) * WIDTH + i], rows[(middle + d) * WIDTH + i]
        sums += (above + rows[middle * WIDTH + i] + below,)
    return sums


@triton.jit
def add(xs, ys):
    sums = ()
    for i in tl.static_range(len(xs)):
        sums += (xs[i] + ys[i],)
    return sums


@triton.jit
def strip(N, C, H, W, ROWS, BLOCK_C: tl.constexpr, LANES: tl.constexpr):
    """This program's place: partial table, classes (classes,); image and first row of every
    lane, the first of its four columns, and whether it is this program's own (1, lanes).

    ROWS rows of an image are a band. All bands of all images lie side by side, HALO columns between
    them, and are cut into strips of which a program owns all but the first and the last lane.
    """
    class_blocks = tl.cdiv(C, BLOCK_C)
    place = tl.program_id(0) // class_blocks
    c = (tl.program_id(0) % class_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    lane = tl.arange(0, LANES)[None, :]
    width, bands = HALO + tl.cdiv(W, 4) * 4, tl.cdiv(H, ROWS)
    start = place.to(tl.int64) * (4 * LANES - 2 * HALO)
    column = (start % width).to(tl.int32) + lane * 4
    band = (start // width).to(tl.int32) + column // width
    n, band = band // bands, band % bands
    first = tl.where(n < N, band * ROWS, H + HALO)  # behind the last image no row is inside
    owned = (lane > 0) & (lane < LANES - 1)
    return place, c, tl.minimum(n, N - 1).to(tl.int64), first, column % width - HALO, owned


@triton.jit
def statistics_kernel(
    logits_ptr, target_ptr, top_ptr, rest_ptr, label_ptr, totals_ptr, entries_ptr,
    C, HW, stride_n, stride_c, stride_p, target_stride_n, ignore_index, TOTALS, ENTRIES,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    n, first = first_pixel(HW, BLOCK_P)
    pixel = tl.arange(0, BLOCK_P)[None, :]  # from there
    mask = pixel < HW - first
    row = tl.arange(0, BLOCK_C)[:, None]
    x_ptr = logits_ptr + n * stride_n + first * stride_p
    x_ptr += row.to(tl.int64) * stride_c + pixel.to(tl.int64) * stride_p

    # Of every BLOCK_C-th class first; together at the end. The largest is left out of the sum, not
    # subtracted from it: 1 - p of a confident pixel is this sum, and it may be far below the
    # rounding of 1.
    top = tl.full((BLOCK_C, BLOCK_P), -1e38, tl.float32)
    rest = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    c = 0
    while c < C:
        channel = x_ptr + tl.cast(c, tl.int64) * stride_c
        x = tl.load(channel, mask=(row < C - c) & mask, other=-float("inf")).to(tl.float32)
        e = exp(-tl.abs(x - top))
        rest = tl.where(x > top, (rest + 1) * e, rest + e)
        top = tl.maximum(top, x)
        c += BLOCK_C
    largest, largest_row = tl.max(top, axis=0, return_indices=True, keep_dims=True)
    others = (rest + 1) * exp(top - largest)
    rest = tl.sum(tl.where(row == largest_row, rest, others), axis=0, keep_dims=True)
    rest = tl.where(tl.abs(largest) < 1e38, rest, float("nan"))  # infinity has no softmax

    label = load_label(
        target_ptr + n * target_stride_n + first, 0 * pixel, pixel, 1, HW - first, C, 0, 1,
        ignore_index,
    )  # fmt: skip
    at = n * HW + first + pixel
    tl.store(top_ptr + at, largest.to(top_ptr.dtype.element_ty), mask=mask)
    tl.store(rest_ptr + at, rest, mask=mask)
    tl.store(label_ptr + at, label.to(label_ptr.dtype.element_ty), mask=mask)

    # What the next kernel adds to.
    store_zeros(totals_ptr, TOTALS, BLOCK_P)
    store_zeros(entries_ptr, ENTRIES, BLOCK_P)


@triton.jit
def store_zeros(table_ptr, SIZE, BLOCK: tl.constexpr):
    entry = tl.program_id(0).to(tl.int64) * BLOCK
    while entry < SIZE:
        offs = tl.arange(0, BLOCK)
        tl.store(table_ptr + entry + offs, 0, mask=offs < SIZE - entry)
        entry += tl.num_programs(0).to(tl.int64) * BLOCK


@triton.jit(do_not_specialize=["ROWS"])
def dense_kernel(
    coefficients_ptr, logits_ptr, label_ptr, top_ptr, rest_ptr, sums_ptr, grad_ptr,
    N, C, H, W, stride_n, stride_c, limit, eps, ROWS, PROGRAMS,
    TABLES: tl.constexpr, GRADIENT: tl.constexpr, ADD: tl.constexpr,
    RADII: tl.constexpr, COLUMNS: tl.constexpr, REACH: tl.constexpr,
    BLOCK_C: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    place, c, n, first, w, owned = strip(N, C, H, W, ROWS, BLOCK_C, LANES)
    some_c = tl.minimum(c, C - 1).to(tl.int64)
    image, channel = n * H * W, n * stride_n + some_c[:, None] * stride_c
    grad_channel = (n * C + some_c[:, None]) * H * W
    written = (owned & (w >= 0) & (w < W) & (c < C)[:, None])[:, :, None]
    if not ALIGNED:
        written = written & (four_columns(w, False) < W)

    K: tl.constexpr = COLUMNS[len(RADII)]
    nothing = tl.zeros((BLOCK_C, LANES), tl.float32)
    sums, coefficients = (), ()
    for k in tl.static_range(len(RADII)):
        sums += (nothing,)
        if GRADIENT:
            coefficients += (tl.load(coefficients_ptr + (C + some_c[:, None]) * K + COLUMNS[k]),)
    # The rows within reach of the middle one; of l, without a gradient, none above it.
    l_above: tl.constexpr = REACH if GRADIENT else 0
    us, ls, vs = (), (), ()
    for _ in tl.static_range(2 * REACH + 1):
        us += (nothing, nothing, nothing, nothing)
        vs += (tl.zeros((1, LANES), tl.uint32),)
    for _ in tl.static_range(l_above + REACH + 1):
        ls += (nothing, nothing, nothing, nothing)
    row = -REACH
    while row < ROWS + REACH:
        for _ in tl.static_range(UNROLL):
            u, log_odds, v = load_row(
                logits_ptr, top_ptr, rest_ptr, label_ptr, channel, image, c[:, None],
                first + row, w, H, W, limit, eps, ALIGNED,
            )  # fmt: skip
            us, ls, vs = us[4:] + u, ls[4:] + log_odds, vs[1:] + (v,)  # noqa: RUF005
            if (row >= REACH) & (row < ROWS + REACH):
                u_sums, l_sums, counts = (), (), ()
                for k in tl.static_range(len(RADII)):
                    if REACH > 0:
                        u_sum = box_sum(column_sum(us, RADII[k], 4), RADII[k])
                        count = box_count(column_sum(vs, RADII[k], 1)[0], RADII[k])
                        if GRADIENT:
                            l_sum = box_sum(column_sum(ls, RADII[k], 4), RADII[k])
                        else:
                            l_sum = u_sum
                    else:
                        u_sum, l_sum, count = far_box(
                            logits_ptr, top_ptr, rest_ptr, label_ptr, channel, image,
                            c[:, None], first + row, w, H, W, limit, eps, RADII[k],
                            ALIGNED and RADII[k] % 4 == 0,
                        )  # fmt: skip
                    u_sums, l_sums, counts = u_sums + u_sum, l_sums + l_sum, counts + (count,)  # noqa: RUF005
                grads, new_sums = (), sums
                for i in tl.static_range(4):
                    u_i, l_i = us[4 * REACH + i], ls[4 * l_above + i]
                    from_u, from_l, products = nothing, nothing, ()
                    for k in tl.static_range(len(RADII)):
                        box = byte(counts[k], i)
                        # How far the pixel is from its neighbours.
                        u_step = box * u_i - u_sums[4 * k + i]
                        products += (l_i * u_step,)
                        if GRADIENT:
                            from_u += coefficients[k] * u_step
                            from_l += coefficients[k] * (box * l_i - l_sums[4 * k + i])
                    new_sums = add(new_sums, products)
                    if GRADIENT:
                        # p d / d p of the sums; the clamp passes no gradient.
                        odds = exp(l_i)
                        root = tl.rsqrt(1 + odds)
                        p = odds * (root * root)
                        grad = from_u * (1 + odds) + from_l * p
                        free = (tl.abs(l_i) < limit) & (byte(vs[REACH], i) > 0)
                        grads += (tl.where(free, grad, 0.0),)
                sums = new_sums
                if GRADIENT:
                    h = first + row - REACH
                    mask = written & (h < H)[:, :, None]
                    offs = grad_channel + h.to(tl.int64) * W + w
                    grad_row = grad_ptr + four_columns(offs, ALIGNED)
                    all_grads = join(grads)
                    if ADD:
                        all_grads += tl.load(grad_row, mask=mask, other=0.0).to(tl.float32)
                    tl.store(grad_row, all_grads.to(grad_ptr.dtype.element_ty), mask=mask)
            row += 1

    if TABLES:
        for k in tl.static_range(len(RADII)):
            total = tl.sum(tl.where(owned, sums[k], 0.0), axis=1)
            offs = (c.to(tl.int64) * K + COLUMNS[k]) * PROGRAMS + place
            tl.store(sums_ptr + offs, total, mask=c < C)


@triton.jit
def patch(index, H, W, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """Image, and first row and column, of one of all images' patches."""
    patches_w = tl.cdiv(W, BLOCK_W)
    patches = tl.cdiv(H, BLOCK_H) * patches_w
    n, place = index // patches, index % patches
    return n.to(tl.int64), place // patches_w * BLOCK_H, place % patches_w * BLOCK_W


@triton.jit
def rectangle(h, w, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """Rows and columns (pixels,) of the rectangle that begins there."""
    offs = tl.arange(0, BLOCK_H * BLOCK_W)
    return h + offs // BLOCK_W, w + offs % BLOCK_W


@triton.jit
def part_of_patch(
    h, w, part, BLOCK_W: tl.constexpr, PART_H: tl.constexpr, PART_W: tl.constexpr
):  # fmt: skip
    across: tl.constexpr = BLOCK_W // PART_W
    return rectangle(h + part // across * PART_H, w + part % across * PART_W, PART_H, PART_W)


@triton.jit
def label_at(label_ptr, h, w, dy, dx, H, W):
    """Labels (pixels,) a step away, -1 at pixels that do not count or are outside."""
    here = label_ptr + (h.to(tl.int64) * W + w)
    step = tl.cast(dy, tl.int64) * W + dx
    inside = is_inside(h + dy, w + dx, H, W)
    return tl.load(here + step, mask=inside, other=-1).to(tl.int32)


@triton.jit
def neighbors(label_ptr, h, w, d, H, W):
    """The labels (8, pixels) of the neighbours at a distance."""
    h, w = h[None, :], w[None, :]
    dy, dx = step_in(tl.arange(0, 8)[:, None])
    dy, dx = dy * d, dx * d
    there = label_ptr + (h.to(tl.int64) * W + w) + (dy.to(tl.int64) * W + dx)
    # Where Triton knows addresses to be aligned, a thread loads those of several pixels, and one
    # pixel's neighbours come to lie in several threads: say that nothing is known.
    there = tl.multiple_of(there, (1, 1))
    return tl.load(there, mask=is_inside(h + dy, w + dx, H, W), other=-1).to(tl.int32)


@triton.jit
def labels_around(label_ptr, h, w, H, W, RADII: tl.constexpr):
    """The labels (pixels,), and for every distance those of the 8 neighbours (8, pixels), a pixel's
    own again where they are no pair; and for every distance the neighbours that are, as bits.
    """
    label = label_at(label_ptr, h, w, 0, 0, H, W)
    around, pairs = (), ()
    for k in tl.static_range(len(RADII)):
        label_b = neighbors(label_ptr, h, w, RADII[k], H, W)
        pair = tl.minimum(label_b, label[None, :]) >= 0
        around += (tl.where(pair, label_b, label[None, :]),)
        pairs += (as_bits(pair),)
    return label, around, pairs


@triton.jit
def as_bits(flags):
    """(8, pixels) as bits of (pixels,)."""
    return tl.sum(flags.to(tl.int32) << tl.arange(0, 8)[:, None], axis=0)


@triton.jit
def extremes(labels):
    """Smallest and largest, -1 if there is none."""
    smallest, largest = labels[0].to(tl.uint32), labels[0]
    for i in tl.static_range(1, len(labels)):
        smallest = tl.minimum(smallest, labels[i].to(tl.uint32))
        largest = tl.maximum(largest, labels[i])
    return smallest, largest


@triton.jit
def labels_in_reach(label_ptr, h, w, H, W, REACH: tl.constexpr):
    """Those of the pixels of a patch and of all within reach, each at least once."""
    # A patch is at least twice as large as the reach: four shifted ones cover all.
    labels = ()
    for corner in tl.static_range(4):
        dy, dx = (corner // 2 * 2 - 1) * REACH, (corner % 2 * 2 - 1) * REACH
        labels += (label_at(label_ptr, h, w, dy, dx, H, W),)
    return labels


@triton.jit
def may_have_edges(label_ptr, h, w, H, W, REACH: tl.constexpr):
    """Whether the pixels of a patch and those within reach have more than one label; true of sizes
    that reach too far to look.
    """
    smallest, largest = extremes(labels_in_reach(label_ptr, h, w, H, W, REACH))
    return (REACH == 0) | (tl.min(smallest, axis=0).to(tl.int32) < tl.max(largest, axis=0))


# A label beyond all.
NO_LABEL = tl.constexpr(1 << 30)


@triton.jit
def extremes_with_neighbors(label, around):
    smallest, largest = extremes(around)
    smallest = tl.minimum(tl.min(smallest, axis=0), label.to(tl.uint32))
    return smallest, tl.maximum(tl.max(largest, axis=0), label)


@triton.jit
def next_label(label, around, counts, above):
    """The smallest label beyond ``above`` of pixels that count and of their neighbours."""
    # What is not beyond is large as an unsigned number.
    beyond = ()
    for k in tl.static_range(len(around)):
        beyond += (around[k] - above - 1,)
    more, _largest = extremes_with_neighbors(label - above - 1, beyond)
    more = tl.minimum(tl.where(counts, more, NO_LABEL), NO_LABEL)
    return tl.min(more, axis=0).to(tl.int32) + above + 1


@triton.jit
def choose(k, values):
    """The one that k says. What loops over sizes has one body: three take three times as long to
    compile.
    """
    value = values[0]
    for i in tl.static_range(1, len(values)):
        value = tl.where(k == i, values[i], value)
    return value


@triton.jit
def step_to(bits, d):
    """Rows and columns to the neighbour of the lowest bit: 0 to 3 are those before a pixel, 4 to 7
    those after it.
    """
    lowest = (bits & -bits).to(tl.float32).to(tl.int32, bitcast=True) // 0x800000 - 127
    dy, dx = step_in(lowest)
    return dy * d, dx * d


@triton.jit
def distribution(x, top, rest, limit):
    """p, q = 1 - p, log(p / q), log(q)."""
    x -= top
    log_odds = tl.minimum(tl.maximum(x - log(1 - exp(x) + rest), -limit), limit)
    odds = exp(log_odds)
    q = reciprocal(1 + odds)
    return odds * q, q, log_odds, -log(1 + odds)


@triton.jit
def pairs_and_edges(
    pairs, edges, label_ptr, label, h, w, H, W, RADII: tl.constexpr, REACH: tl.constexpr
):  # fmt: skip
    """Adds the neighbours that every pixel makes a pair with, and those of another label."""
    smallest, largest = label, label
    around = labels_in_reach(label_ptr, h, w, H, W, REACH)
    for i in tl.static_range(len(around)):
        smallest, largest = tl.minimum(smallest, around[i]), tl.maximum(largest, around[i])
    if (REACH > 0) & (tl.min(smallest, axis=0) == tl.max(largest, axis=0)):
        # Most patches: every pixel has its 8 neighbours, no edge.
        new_pairs = ()
        for i in tl.static_range(len(RADII)):
            new_pairs += (pairs[i] + tl.where(label >= 0, 8, 0),)
        pairs = new_pairs
    else:
        for k in range(len(RADII)):
            d = choose(k, RADII)
            neighbors, others = tl.zeros_like(label), tl.zeros_like(label)
            for i in tl.static_range(8):
                dy, dx = step_in(i)
                label_b = label_at(label_ptr, h, w, dy * d, dx * d, H, W)
                pair = tl.minimum(label, label_b) >= 0
                neighbors += pair.to(tl.int32)
                others += (pair & (label != label_b)).to(tl.int32)
            new_pairs, new_edges = (), ()
            for i in tl.static_range(len(RADII)):
                new_pairs += (pairs[i] + tl.where(k == i, neighbors, 0),)
                new_edges += (edges[i] + tl.where(k == i, others, 0),)
            pairs, edges = new_pairs, new_edges
    return pairs, edges


@triton.jit
def counts_kernel(
    label_ptr, totals_ptr, entries_ptr, C, H, W, PATCHES,
    PIXELS: tl.constexpr, BLOCK_CLASSES: tl.constexpr,
    RADII: tl.constexpr, COLUMNS: tl.constexpr, REACH: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    none = tl.zeros((BLOCK_H * BLOCK_W,), tl.int32)
    all_pairs, all_edges, tables = (), (), (tl.zeros((BLOCK_CLASSES,), tl.int32),)
    for _ in tl.static_range(len(RADII)):
        all_pairs += (none,)
        all_edges += (none,)
        tables += (tables[0],)
    index = tl.program_id(0)
    while index < PATCHES:
        n, first_h, first_w = patch(index, H, W, BLOCK_H, BLOCK_W)
        h, w = rectangle(first_h, first_w, BLOCK_H, BLOCK_W)
        label = label_at(label_ptr + n * H * W, h, w, 0, 0, H, W)
        edges = ()
        for _ in tl.static_range(len(RADII)):
            edges += (none,)
        all_pairs, edges = pairs_and_edges(
            all_pairs, edges, label_ptr + n * H * W, label, h, w, H, W, RADII, REACH
        )  # fmt: skip
        all_edges = add(all_edges, edges)
        tables = by_label(tables, (none + 1,) + edges, label, BLOCK_CLASSES)  # noqa: RUF005
        index += tl.num_programs(0)

    K: tl.constexpr = COLUMNS[len(RADII)]
    for k in tl.static_range(len(RADII)):
        # A pair is an entry of every channel, and an edge in that of a pixel's own label in both
        # directions.
        edge_count = 2 * tl.sum(all_edges[k], axis=0).to(tl.int64)
        other_count = C * tl.sum(all_pairs[k], axis=0).to(tl.int64) - edge_count
        column_ptr = totals_ptr + COLUMNS[k]
        tl.atomic_add(column_ptr, edge_count, mask=edge_count > 0, sem="relaxed")
        tl.atomic_add(column_ptr + K, other_count, mask=other_count > 0, sem="relaxed")
    classes = tl.arange(0, BLOCK_CLASSES)
    row_ptr = entries_ptr + classes.to(tl.int64) * (K + 1)
    if PIXELS:
        count = tables[0].to(tl.int64)
        tl.atomic_add(row_ptr + K, count, mask=count > 0, sem="relaxed")
    for k in tl.static_range(len(RADII)):
        count = 2 * tables[1 + k].to(tl.int64)
        tl.atomic_add(row_ptr + COLUMNS[k], count, mask=count > 0, sem="relaxed")


@triton.jit
def channel_of(logits_ptr, label, stride_c):
    return logits_ptr + tl.maximum(label, 0).to(tl.int64) * stride_c


@triton.jit
def logit_at(channel_ptr, top_ptr, rest_ptr, pixel, mask):
    """The logit and the statistics of pixels."""
    x = tl.load(channel_ptr + pixel, mask=mask, other=0.0).to(tl.float32)
    top = tl.load(top_ptr + pixel, mask=mask, other=0.0).to(tl.float32)
    return x, top, tl.load(rest_ptr + pixel, mask=mask, other=1.0)


@triton.jit
def log_losses(
    sums, logits_ptr, label_ptr, top_ptr, rest_ptr, h, w, H, W, stride_c,
    BLOCK_CLASSES: tl.constexpr,
):  # fmt: skip
    """Adds -log p by label, to (classes,)."""
    label = label_at(label_ptr, h, w, 0, 0, H, W)
    channel = channel_of(logits_ptr, label, stride_c)
    x, top, rest = logit_at(channel, top_ptr, rest_ptr, h.to(tl.int64) * W + w, label >= 0)
    return by_label(sums, (log_1p(rest) - (x - top),), label, BLOCK_CLASSES)


@triton.jit
def log_1p(x):
    """log(1 + x) for x >= 0, whose digits 1 + x would round away."""
    y = 1 + x
    return tl.log(y) + (x - (y - 1)) * reciprocal(y)


@triton.jit
def by_label(tables, values, label, BLOCK_CLASSES: tl.constexpr):
    """Tables (classes,) and, to be added to them by label, values (pixels,)."""
    classes = tl.arange(0, BLOCK_CLASSES)
    c = tl.min(tl.where(label >= 0, label, NO_LABEL), axis=0)
    while c < NO_LABEL:  # the labels that there are
        sums = ()
        for i in tl.static_range(len(tables)):
            value = tl.sum(tl.where(label == c, values[i], 0), axis=0)
            sums += (tables[i] + tl.where(classes == c, value, 0),)
        tables = sums
        c = tl.min(tl.where(label > c, label, NO_LABEL), axis=0)
    return tables


@triton.jit
def store(tables, table_ptr, first, C, PROGRAMS, BLOCK_CLASSES: tl.constexpr):
    """Tables (classes,) to rows of this program's partial tables."""
    classes = tl.arange(0, BLOCK_CLASSES)
    for i in tl.static_range(len(tables)):
        row = tl.cast(C, tl.int64) * (first + i) + classes
        tl.store(table_ptr + row * PROGRAMS + tl.program_id(0), tables[i], mask=classes < C)


@triton.jit
def edges_of_patch(
    tables, coefficients_ptr, logits_ptr, label_ptr, top_ptr, rest_ptr, grad_ptr,
    first_h, first_w, C, H, W, stride_c, margin, limit, eps,
    TABLES: tl.constexpr, GRADIENT: tl.constexpr, REPLACE: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr, RADII: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, PART_H: tl.constexpr, PART_W: tl.constexpr,
):  # fmt: skip
    """Adds to the tables (classes,), two for each size, and to the gradient."""
    K: tl.constexpr = COLUMNS[len(RADII)]
    for part in range((BLOCK_H // PART_H) * (BLOCK_W // PART_W)):
        h, w = part_of_patch(first_h, first_w, part, BLOCK_W, PART_H, PART_W)
        pixel = h.to(tl.int64) * W + w
        label, around, pairs = labels_around(label_ptr, h, w, H, W, RADII)
        counts = label >= 0
        top = tl.load(top_ptr + pixel, mask=counts, other=0.0).to(tl.float32)
        rest = tl.load(rest_ptr + pixel, mask=counts, other=1.0)
        least, most = extremes_with_neighbors(label, around)
        has_edge = least.to(tl.int32) < most
        values = ()
        for _ in tl.static_range(len(tables)):
            values += (tl.zeros(label.shape, tl.float32),)
        c = next_label(label, around, has_edge, -1)
        while c < NO_LABEL:  # the labels that there are
            channel = logits_ptr + c.to(tl.int64) * stride_c
            x = tl.load(channel + pixel, mask=counts, other=0.0).to(tl.float32)
            p, q, log_odds, log_q = distribution(x, top, rest, limit)
            own = label == c
            from_u = tl.zeros_like(p)
            from_l = tl.zeros_like(p)
            touched = tl.zeros(label.shape, tl.int1)
            edges = ()
            for k in tl.static_range(len(RADII)):
                edges += (as_bits(own[None, :] != (around[k] == c)),)
                touched |= edges[k] > 0
            for k in range(len(RADII)):
                d, column = choose(k, RADII), choose(k, COLUMNS)
                edges_of_size = choose(k, edges)
                todo = edges_of_size
                if GRADIENT:
                    for_edge = tl.load(coefficients_ptr + c * K + column)
                    for_dense = tl.load(coefficients_ptr + (C + c) * K + column)
                    if REPLACE:
                        todo = tl.where(touched, choose(k, pairs), 0)
                else:
                    todo = tl.where(own, todo, 0)
                hinges = tl.zeros_like(p)
                product = tl.zeros_like(p)
                # Every lane goes to the next of its own neighbours.
                while tl.max(todo, axis=0) > 0:
                    taken = todo > 0
                    edge = (todo & -todo & edges_of_size) > 0
                    dy, dx = step_to(todo, d)
                    todo &= todo - 1
                    pixel_b = pixel + dy.to(tl.int64) * W + dx
                    x_b, top_b, rest_b = logit_at(channel, top_ptr, rest_ptr, pixel_b, taken)
                    p_b, q_b, l_b, log_q_b = distribution(x_b, top_b, rest_b, limit)
                    l_step = log_odds - l_b
                    # What is left of the margin with either pixel as the centre.
                    centre = margin + p_b * l_step - (log_q_b - log_q)
                    neighbor = margin - p * l_step - (log_q - log_q_b)
                    if TABLES:
                        counted = edge & own
                        both = tl.maximum(centre, 0.0) + tl.maximum(neighbor, 0.0)
                        hinges += tl.where(counted, both, 0.0)
                        # What the dense tables hold of this pair, nothing where p is clamped.
                        u_a = tl.where(log_odds < limit, q - eps, 0.0)
                        u_b = tl.where(l_b > -limit, p_b - eps, 0.0)
                        product -= tl.where(counted, (u_a + u_b) * l_step, 0.0)
                    if GRADIENT:
                        # From the smaller of p and q: little is rounded away.
                        p_step = tl.where(p > 0.5, q_b - q, p - p_b)
                        by_p = tl.where(centre > 0, -for_edge, 0.0) * p_step
                        by_l = tl.where(neighbor > 0, -for_edge, 0.0) * l_step
                        if REPLACE:
                            by_p = tl.where(edge, by_p, for_dense * p_step)
                            by_l = tl.where(edge, by_l, for_dense * l_step)
                        else:
                            u_step = tl.where(own, 2 * eps - q - p_b, p + q_b - 2 * eps)
                            by_p -= for_dense * u_step
                            by_l -= for_dense * l_step
                        from_u += tl.where(taken, by_p, 0.0)
                        from_l += tl.where(taken, by_l, 0.0)
                new_values = ()
                for i in tl.static_range(len(RADII)):
                    new_values += (
                        values[2 * i] + tl.where(k == i, hinges, 0.0),
                        values[2 * i + 1] + tl.where(k == i, product, 0.0),
                    )
                values = new_values
            if GRADIENT:
                grad = tl.where(tl.abs(log_odds) < limit, from_u / q + from_l * p, 0.0)
                row = grad_ptr + c.to(tl.int64) * H * W + pixel
                if not REPLACE:
                    grad += tl.load(row, mask=touched, other=0.0).to(tl.float32)
                tl.store(row, grad.to(grad_ptr.dtype.element_ty), mask=touched)
            c = next_label(label, around, has_edge, c)
        if TABLES:
            tables = by_label(tables, values, tl.where(has_edge, label, -1), BLOCK_CLASSES)
    return tables


@triton.jit
def edge_kernel(
    coefficients_ptr, logits_ptr, label_ptr, top_ptr, rest_ptr, edges_ptr, grad_ptr,
    C, H, W, stride_n, stride_c, margin, limit, eps, PATCHES, PROGRAMS,
    TABLES: tl.constexpr, GRADIENT: tl.constexpr, REPLACE: tl.constexpr,
    CROSS_ENTROPY: tl.constexpr, BLOCK_CLASSES: tl.constexpr,
    RADII: tl.constexpr, COLUMNS: tl.constexpr, REACH: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, PART_H: tl.constexpr, PART_W: tl.constexpr,
):  # fmt: skip
    nothing = tl.zeros((BLOCK_CLASSES,), tl.float32)
    log_loss, tables = (nothing,), ()
    for _ in tl.static_range(2 * len(RADII)):
        tables += (nothing,)
    index = tl.program_id(0)
    while index < PATCHES:
        n, h, w = patch(index, H, W, BLOCK_H, BLOCK_W)
        logits, label = logits_ptr + n * stride_n, label_ptr + n * H * W
        top, rest = top_ptr + n * H * W, rest_ptr + n * H * W
        grad = grad_ptr
        if GRADIENT:
            grad = grad_ptr + n * C * H * W
        every_h, every_w = rectangle(h, w, BLOCK_H, BLOCK_W)
        if TABLES and CROSS_ENTROPY:
            log_loss = log_losses(
                log_loss, logits, label, top, rest, every_h, every_w, H, W, stride_c, BLOCK_CLASSES
            )  # fmt: skip
        if may_have_edges(label, every_h, every_w, H, W, REACH):
            tables = edges_of_patch(
                tables, coefficients_ptr, logits, label, top, rest, grad,
                h, w, C, H, W, stride_c, margin, limit, eps,
                TABLES, GRADIENT, REPLACE, BLOCK_CLASSES, RADII, COLUMNS,
                BLOCK_H, BLOCK_W, PART_H, PART_W,
            )  # fmt: skip
        index += PROGRAMS
    if TABLES:
        K: tl.constexpr = COLUMNS[len(RADII)]
        if CROSS_ENTROPY:
            store(log_loss, edges_ptr, 2 * K, C, PROGRAMS, BLOCK_CLASSES)
        for k in tl.static_range(len(RADII)):
            store(tables[2 * k : 2 * k + 2], edges_ptr, 2 * COLUMNS[k], C, PROGRAMS, BLOCK_CLASSES)


@triton.jit
def scale_kernel(x_ptr, scale_ptr, SIZE, BLOCK: tl.constexpr):
    scale = tl.load(scale_ptr).to(tl.float32)
    if scale != 1:
        first = tl.program_id(0).to(tl.int64) * BLOCK
        offs = tl.arange(0, BLOCK)
        mask = offs < SIZE - first
        x = tl.load(x_ptr + first + offs, mask=mask).to(tl.float32) * scale
        tl.store(x_ptr + first + offs, x.to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def add_up(
    dense_ptr, edges_ptr, sums_ptr, log_loss_ptr, C, K, DENSE_PROGRAMS, EDGE_PROGRAMS,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """From partial tables to one class and size of the tables."""
    c, k = (tl.program_id(0) // (K + 1)).to(tl.int64), tl.program_id(0) % (K + 1)
    edges = edges_ptr + (2 * k * C + c) * EDGE_PROGRAMS
    first = sum_row(edges, EDGE_PROGRAMS, BLOCK)
    if k < K:
        second = sum_row(edges + tl.cast(C, tl.int64) * EDGE_PROGRAMS, EDGE_PROGRAMS, BLOCK)
        dense = sum_row(dense_ptr + (c * K + k) * DENSE_PROGRAMS, DENSE_PROGRAMS, BLOCK)
        tl.store(sums_ptr + c * K + k, first.to(tl.float32))
        tl.store(sums_ptr + (C + c) * K + k, (dense - second).to(tl.float32))
    else:
        tl.store(log_loss_ptr + c, first.to(tl.float32))


@triton.jit
def sum_row(row_ptr, num, BLOCK: tl.constexpr):
    """float64: of millions of terms."""
    offs = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    left = tl.cast(num, tl.int32)  # an argument of 1 is a constant
    while left > 0:
        total += tl.load(row_ptr + offs, mask=offs < left, other=0.0).to(tl.float64)
        row_ptr += BLOCK
        left -= BLOCK
    return tl.sum(total)


@triton.jit
def softmax_backward(
    grad_log_loss_ptr, logits_ptr, label_ptr, top_ptr, rest_ptr, grad_ptr,
    C, HW, stride_n, stride_c, SUMS,
    CROSS_ENTROPY: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """From p d loss / d p to the gradient of the logits, in place."""
    n, first = first_pixel(HW, BLOCK_P, SUMS)
    pixel = tl.arange(0, BLOCK_P)[None, :]  # from there
    in_image = pixel < HW - first
    row = tl.arange(0, BLOCK_C)[:, None]
    top = tl.load(top_ptr + n * HW + first + pixel, mask=in_image, other=0.0).to(tl.float32)
    rest = tl.load(rest_ptr + n * HW + first + pixel, mask=in_image, other=1.0)
    scale = reciprocal(1 + rest)
    label = tl.load(label_ptr + n * HW + first + pixel, mask=in_image, other=-1).to(tl.int32)
    cross = tl.zeros_like(top)
    if CROSS_ENTROPY:
        cross = tl.load(grad_log_loss_ptr + label, mask=label >= 0, other=0.0) * scale

    x_ptr = logits_ptr + n * stride_n + first + row.to(tl.int64) * stride_c + pixel
    grad_ptr += n * C * HW + first + row.to(tl.int64) * HW + pixel
    of_top = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    of_others = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    c = 0
    while c < C:
        mask = (row < C - c) & in_image
        x = tl.load(x_ptr + tl.cast(c, tl.int64) * stride_c, mask=mask, other=0.0).to(tl.float32)
        row_ptr = grad_ptr + tl.cast(c, tl.int64) * HW
        grad = tl.load(row_ptr, mask=mask, other=0.0).to(tl.float32)
        of_top += tl.where(x == top, grad, 0.0)
        of_others += tl.where(x == top, 0.0, grad)
        c += BLOCK_C
    of_others = tl.sum(of_others, axis=0, keep_dims=True)
    total = (of_others + tl.sum(of_top, axis=0, keep_dims=True)) * scale
    # Over the classes the result sums to 0. That of a class with p near 1, where nearly equal
    # numbers would be subtracted, follows from the others, which are small and exact.
    from_others = rest * total - of_others
    c = 0
    while c < C:
        mask = (row < C - c) & in_image
        x = tl.load(x_ptr + tl.cast(c, tl.int64) * stride_c, mask=mask, other=0.0).to(tl.float32)
        row_ptr = grad_ptr + tl.cast(c, tl.int64) * HW
        grad = tl.load(row_ptr, mask=mask, other=0.0).to(tl.float32)
        e = exp(x - top)
        grad = tl.where((x == top) & (rest < 1), from_others, grad - e * total)
        if CROSS_ENTROPY:
            grad += cross * tl.where(row == label - c, e - 1 - rest, e)
        # Where no pixel counts nothing was written but 0, and 0 times what is no number is none.
        grad = tl.where(label >= 0, grad, 0.0)
        tl.store(row_ptr, grad.to(grad_ptr.dtype.element_ty), mask=mask)
        c += BLOCK_C


@triton.jit
def finish_kernel(
    dense_ptr, edges_ptr, sums_ptr, log_loss_ptr, zero_ptr,
    grad_log_loss_ptr, logits_ptr, label_ptr, top_ptr, rest_ptr, grad_ptr,
    C, K, HW, stride_n, stride_c, DENSE_PROGRAMS, EDGE_PROGRAMS, SUMS,
    TABLES: tl.constexpr, GRADIENT: tl.constexpr, CROSS_ENTROPY: tl.constexpr,
    BLOCK_SUM: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    # Two passes in one launch, of which the first takes a few programs.
    if tl.program_id(0) < SUMS:
        if TABLES:
            add_up(
                dense_ptr, edges_ptr, sums_ptr, log_loss_ptr, C, K, DENSE_PROGRAMS, EDGE_PROGRAMS,
                BLOCK_SUM,
            )  # fmt: skip
            tl.store(zero_ptr, 0.0)
    elif GRADIENT:
        softmax_backward(
            grad_log_loss_ptr, logits_ptr, label_ptr, top_ptr, rest_ptr, grad_ptr,
            C, HW, stride_n, stride_c, SUMS, CROSS_ENTROPY, BLOCK_C, BLOCK_P,
        )  # fmt: skip


def statistics(
    logits: Tensor, target: Tensor, kernel_sizes: list[int], ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Totals (2, K) and counts (C, K + 1) as ops/affinity_field.py has them; labels and the softmax
    statistics top and rest (N, 1, H, W).
    """
    n, num_classes, height, width = logits.shape
    # Not planes: a program reads all classes of its pixels, and what it does not need at once waits
    # in a cache.
    logits, target = evenly_spaced(logits), target.contiguous()
    top = logits.new_empty(n, 1, height, width)  # one of them
    rest = torch.empty_like(top, dtype=torch.float32)
    label = torch.empty_like(top, dtype=torch.int16)
    new_table = logits.new_empty if n > 0 else logits.new_zeros
    totals = new_table((2, len(kernel_sizes)), dtype=torch.int64)
    counts = new_table((num_classes, len(kernel_sizes) + 1), dtype=torch.int64)
    if n > 0:
        launch(statistics_kernel, pixel_grid(logits),
            logits, target, top, rest, label, totals, counts, num_classes, height * width,
            *even_strides(logits), target.stride(0), ignore_index,
            totals.numel(), counts.numel(), **pixel_blocks(logits),
        )  # fmt: skip
        patches, patch = patches_of(logits), undivided(patch_blocks(logits))
        for i, sizes in enumerate(passes(kernel_sizes)):
            launch(counts_kernel, (count_programs(patches),),
                label, totals, counts, num_classes, height, width, patches, PIXELS=i == 0,
                BLOCK_CLASSES=next_power_of_2(num_classes), **sizes, **patch,
            )  # fmt: skip
    return totals, counts, label, top, rest


def compute(
    logits: Tensor,
    label: Tensor,
    top: Tensor,
    rest: Tensor,
    kernel_sizes: list[int],
    margin: float,
    eps: float,
    *,
    with_tables: bool,
    grad_sums: Tensor | None,
    grad_log_loss: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """If asked for, sums (2, C, K), edges first, log loss (C,) and the number 0; and, given the
    gradients with respect to sums and log loss, that with respect to the logits.
    """
    given, logits = logits, planes(logits)
    n, num_classes, height, width = logits.shape
    k = len(kernel_sizes)
    with_gradient = grad_sums is not None
    sums = log_loss = zero = grad = dense = edges = None
    strips, patches = strip_programs(logits), patches_of(logits)
    edge_programs = cdiv(patches, PATCHES_IN_A_PROGRAM)
    passes_of_sizes = passes(kernel_sizes)
    if with_tables:
        new_table = logits.new_empty if n > 0 else logits.new_zeros
        sums = new_table((2, num_classes, k), dtype=torch.float32)
        log_loss = new_table(num_classes, dtype=torch.float32)
        zero = new_table((), dtype=torch.float32)
        # Programs last: what adds them up reads consecutive numbers.
        dense = logits.new_empty(num_classes, k, strips, dtype=torch.float32)
        edges = logits.new_empty(2 * k + 1, num_classes, edge_programs, dtype=torch.float32)
    if with_gradient:
        # First p d loss / d p, in the dtype and place of the result, unless it is added up. In
        # bfloat16 edge tiles replace what the dense tile wrote: to take some of it out again would
        # leave its rounding.
        dtype = grad_dtype(logits) if len(passes_of_sizes) == 1 else torch.float32
        grad = torch.empty_like(logits, dtype=dtype, memory_format=torch.contiguous_format)
    if n > 0:
        shape = num_classes, height, width, logits.stride(0), logits.stride(1)
        limit = math.log((1 - eps) / eps)
        asked = {"TABLES": with_tables, "GRADIENT": with_gradient}
        for i, sizes in enumerate(passes_of_sizes):
            launch(dense_kernel, strip_grid(logits),
                grad_sums, logits, label, top, rest, dense, grad, n, *shape, limit, eps,
                rows(logits), strips, ADD=i > 0, **asked, **sizes, **strip_blocks(logits),
            )  # fmt: skip
            launch(edge_kernel, (edge_programs,),
                grad_sums, logits, label, top, rest, edges, grad, *shape, margin, limit, eps,
                patches, edge_programs, CROSS_ENTROPY=i == 0,
                REPLACE=grad is not None and grad.dtype != torch.float32,
                BLOCK_CLASSES=next_power_of_2(num_classes), **asked, **sizes,
                **patch_blocks(logits),
            )  # fmt: skip
        sum_programs = num_classes * (k + 1) if with_tables else 0
        pixel_programs = pixel_grid(logits)[0] if with_gradient else 0
        launch(finish_kernel, (sum_programs + pixel_programs,),
            dense, edges, sums, log_loss, zero,
            grad_log_loss, logits, label, top, rest, grad, num_classes, k, height * width,
            logits.stride(0), logits.stride(1), strips, edge_programs, sum_programs,
            CROSS_ENTROPY=grad_log_loss is not None, BLOCK_SUM=BLOCK_SUM, **asked,
            **pixel_blocks(logits),
        )  # fmt: skip
    del logits, dense, edges
    if grad is not None:
        grad = in_layout_of(given, grad, grad_dtype(given))
    return sums, log_loss, zero, grad


def scale_(grad: Tensor, scale: Tensor) -> None:
    """Multiplies a tensor without gaps by a number on its device; by 1, as it mostly is, in no
    time.
    """
    if grad.numel() > 0:
        launch(scale_kernel, (cdiv(grad.numel(), BLOCK_SCALE),),
            grad, scale, grad.numel(), BLOCK=BLOCK_SCALE,
        )  # fmt: skip


def planes(logits: Tensor) -> Tensor:
    """Logits whose pixels follow one another: others are copied. A march through them would move
    a sector of 32 bytes for every number.
    """
    return logits if pixel_step(logits) == 1 else logits.contiguous()


def passes(kernel_sizes: list[int]) -> list[dict[str, Any]]:
    """One over the sizes that a march keeps in registers, one over those too large for it. COLUMNS
    are theirs in the tables, and last how many columns these have; REACH is 0 for too large.
    """
    radii = steps_in_32_bits([(size - 1) // 2 for size in kernel_sizes])
    found: list[dict[str, Any]] = []
    for near in (True, False):
        columns = tuple(k for k, d in enumerate(radii) if (d <= HALO.value) == near)
        if columns:
            found.append(
                {
                    "RADII": tuple(radii[k] for k in columns),
                    "COLUMNS": (*columns, len(radii)),
                    "REACH": max(radii[k] for k in columns) if near else 0,
                }
            )
    return found


def strip_blocks(logits: Tensor) -> dict[str, int]:
    classes = next_power_of_2(logits.shape[1])
    steps = logits.shape[3], *logits.stride()[:2]
    # If so, four columns take one load.
    aligned = all(step % 4 == 0 for step in steps) and logits.data_ptr() % 16 == 0
    if INTERPRETED:
        classes = min(INTERPRETED_CLASSES, classes)
        return {"BLOCK_C": classes, "LANES": 32, "UNROLL": 1, "ALIGNED": aligned}
    in_a_warp = CLASSES_IN_A_WARP["hip" if torch.version.hip else "cuda"]
    tile = {"BLOCK_C": min(in_a_warp, classes), "LANES": 32, "UNROLL": 2, "num_warps": 1}
    return {**tile, "ALIGNED": aligned}


def rows(logits: Tensor) -> int:
    """Of a band: many, for few are shared with its neighbours then, but as few as give every
    processor several programs.
    """
    _, num_classes, height, _ = logits.shape
    programs = strips_of(logits, height) * num_classes  # were a band an image
    most = max(8, min(64, cdiv(height * programs, STRIP_PROGRAMS)))
    if INTERPRETED:
        most = INTERPRETED_ROWS
    return cdiv(height, cdiv(height, most))


def strips_of(logits: Tensor, rows: int) -> int:
    n, _, height, width = logits.shape
    columns = n * cdiv(height, rows) * (HALO.value + cdiv(width, 4) * 4)
    return cdiv(columns - HALO.value, 4 * strip_blocks(logits)["LANES"] - 2 * HALO.value)


def class_blocks(logits: Tensor) -> int:
    return cdiv(logits.shape[1], strip_blocks(logits)["BLOCK_C"])


def strip_programs(logits: Tensor) -> int:
    """Without those of other classes."""
    return strips_of(logits, rows(logits))


def strip_grid(logits: Tensor) -> tuple[int]:
    return (strip_programs(logits) * class_blocks(logits),)


def patch_blocks(logits: Tensor) -> dict[str, int]:
    """A patch, and the parts of it that are worked on in turn: a pixel for every thread."""
    if INTERPRETED:
        return {**INTERPRETED_PATCH, "PART_H": 16, "PART_W": 64}
    if logits.shape[1] > 256:  # a lane holds its part of the tables
        return {"BLOCK_H": 8, "BLOCK_W": 16, "PART_H": 8, "PART_W": 16, "num_warps": 4}
    return {"BLOCK_H": 8, "BLOCK_W": 16, "PART_H": 4, "PART_W": 8, "num_warps": 1}


def undivided(patch: dict[str, int]) -> dict[str, int]:
    return {name: size for name, size in patch.items() if not name.startswith("PART")}


def patches_of(logits: Tensor) -> int:
    n, _, height, width = logits.shape
    blocks = patch_blocks(logits)
    return n * cdiv(height, blocks["BLOCK_H"]) * cdiv(width, blocks["BLOCK_W"])


def count_programs(patches: int) -> int:
    return max(min(patches, COUNT_PROGRAMS), cdiv(patches, MAX_PATCHES))


def pixel_blocks(logits: Tensor) -> dict[str, int]:
    classes = next_power_of_2(logits.shape[1])
    if INTERPRETED:
        return {"BLOCK_C": min(INTERPRETED_CLASSES, classes), "BLOCK_P": INTERPRETED_PIXELS}
    return {"BLOCK_C": min(4, classes), "BLOCK_P": 128, "num_warps": 1}


def pixel_grid(logits: Tensor) -> tuple[int]:
    n, _, height, width = logits.shape
    return (n * cdiv(height * width, pixel_blocks(logits)["BLOCK_P"]),)
