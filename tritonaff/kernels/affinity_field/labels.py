"""Labels of the pixels of a patch (or of a part of it) and of their neighbours.

PIXELS is the number of pixels in the patch or part.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tritonaff.kernels.shared import is_inside, step_in

# Larger than any label.
NO_LABEL = tl.constexpr(1 << 30)


@triton.jit
def patch(index, H, W, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """Image, first row and first column of a patch, numbered over all images."""
    patches_w = tl.cdiv(W, BLOCK_W)
    patches = tl.cdiv(H, BLOCK_H) * patches_w
    n, place = index // patches, index % patches
    return n.to(tl.int64), place // patches_w * BLOCK_H, place % patches_w * BLOCK_W


@triton.jit
def rectangle(h, w, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """Rows [PIXELS] and columns [PIXELS] of the rectangle that begins at row h and column w."""
    offs = tl.arange(0, BLOCK_H * BLOCK_W)
    return h + offs // BLOCK_W, w + offs % BLOCK_W


@triton.jit
def part_of_patch(
    h, w, part, BLOCK_W: tl.constexpr, PART_H: tl.constexpr, PART_W: tl.constexpr
):  # fmt: skip
    """Rows [PIXELS] and columns [PIXELS] of a part of the patch that begins at h and w."""
    across: tl.constexpr = BLOCK_W // PART_W
    return rectangle(h + part // across * PART_H, w + part % across * PART_W, PART_H, PART_W)


@triton.jit
def label_at(label_ptr, h, w, dy, dx, H, W):
    """Loads labels [PIXELS] a step away: -1 where the pixel does not count or is outside."""
    here = label_ptr + (h.to(tl.int64) * W + w)
    step = tl.cast(dy, tl.int64) * W + dx
    inside = is_inside(h + dy, w + dx, H, W)
    return tl.load(here + step, mask=inside, other=-1).to(tl.int32)


@triton.jit
def neighbors(label_ptr, h, w, d, H, W):
    """Loads the labels [8, PIXELS] of the neighbours at distance d."""
    h, w = h[None, :], w[None, :]
    # [8, 1] each
    dy, dx = step_in(tl.arange(0, 8)[:, None])
    dy, dx = dy * d, dx * d
    there = label_ptr + (h.to(tl.int64) * W + w) + (dy.to(tl.int64) * W + dx)
    # Where Triton knows addresses to be aligned, a thread loads the labels of several pixels, and
    # one pixel's neighbours come to lie in several threads: say that nothing is known.
    there = tl.multiple_of(there, (1, 1))
    return tl.load(there, mask=is_inside(h + dy, w + dx, H, W), other=-1).to(tl.int32)


@triton.jit
def as_bits(flags):
    """From [8, PIXELS] to bits of [PIXELS]."""
    return tl.sum(flags.to(tl.int32) << tl.arange(0, 8)[:, None], axis=0)


@triton.jit
def labels_around(label_ptr, h, w, H, W, RADII: tl.constexpr):
    """The labels [PIXELS]. For every distance: the labels of the 8 neighbours [8, PIXELS], replaced
    by the pixel's own where they are no pair; and which neighbours are a pair, bits of [PIXELS].
    """
    # [PIXELS]
    label = label_at(label_ptr, h, w, 0, 0, H, W)
    around, pairs = (), ()
    for k in tl.static_range(len(RADII)):
        # [8, PIXELS]
        label_b = neighbors(label_ptr, h, w, RADII[k], H, W)
        # [8, PIXELS]
        pair = tl.minimum(label_b, label[None, :]) >= 0
        around += (tl.where(pair, label_b, label[None, :]),)
        pairs += (as_bits(pair),)
    return label, around, pairs


@triton.jit
def extremes(labels):
    """The smallest and the largest element of a tuple of blocks, elementwise. The smallest is
    unsigned: -1 is larger than any label.
    """
    smallest, largest = labels[0].to(tl.uint32), labels[0]
    for i in tl.static_range(1, len(labels)):
        smallest = tl.minimum(smallest, labels[i].to(tl.uint32))
        largest = tl.maximum(largest, labels[i])
    return smallest, largest


@triton.jit
def labels_in_reach(label_ptr, h, w, H, W, REACH: tl.constexpr):
    """The labels of a patch and of all pixels within reach, 4 x [PIXELS]: each at least once."""
    # A patch is at least twice as large as the reach: four shifted ones cover all.
    labels = ()
    for corner in tl.static_range(4):
        dy, dx = (corner // 2 * 2 - 1) * REACH, (corner % 2 * 2 - 1) * REACH
        # [PIXELS]
        labels += (label_at(label_ptr, h, w, dy, dx, H, W),)
    return labels


@triton.jit
def may_have_edges(label_ptr, h, w, H, W, REACH: tl.constexpr):
    """True if the pixels of a patch and the pixels within reach have more than one label. Always
    True for sizes that reach too far to look.
    """
    # [PIXELS] each
    smallest, largest = extremes(labels_in_reach(label_ptr, h, w, H, W, REACH))
    return (REACH == 0) | (tl.min(smallest, axis=0).to(tl.int32) < tl.max(largest, axis=0))


@triton.jit
def extremes_with_neighbors(label, around):
    """The smallest [PIXELS] and the largest label [PIXELS] of a pixel and its neighbours."""
    smallest, largest = extremes(around)
    smallest = tl.minimum(tl.min(smallest, axis=0), label.to(tl.uint32))
    return smallest, tl.maximum(tl.max(largest, axis=0), label)


@triton.jit
def next_label(label, around, counted, above):
    """The smallest label beyond ``above`` among pixels that count and their neighbours."""
    # Labels that are not beyond become large unsigned numbers.
    beyond = ()
    for k in tl.static_range(len(around)):
        beyond += (around[k] - above - 1,)
    more, _largest = extremes_with_neighbors(label - above - 1, beyond)
    more = tl.minimum(tl.where(counted, more, NO_LABEL), NO_LABEL)
    return tl.min(more, axis=0).to(tl.int32) + above + 1


@triton.jit
def add_by_label(tables, values, label, BLOCK_CLASSES: tl.constexpr):
    """Adds values [PIXELS] to tables [BLOCK_CLASSES], in the row of the pixel's label."""
    # [BLOCK_CLASSES]
    classes = tl.arange(0, BLOCK_CLASSES)
    c = tl.min(tl.where(label >= 0, label, NO_LABEL), axis=0)
    while c < NO_LABEL:  # every label that occurs
        sums = ()
        for i in tl.static_range(len(tables)):
            value = tl.sum(tl.where(label == c, values[i], 0), axis=0)
            sums += (tables[i] + tl.where(classes == c, value, 0),)
        tables = sums
        c = tl.min(tl.where(label > c, label, NO_LABEL), axis=0)
    return tables


@triton.jit
def choose(k, values):
    """Element k of a tuple. A loop over sizes then has one body: three bodies take three times as
    long to compile.
    """
    value = values[0]
    for i in tl.static_range(1, len(values)):
        value = tl.where(k == i, values[i], value)
    return value


@triton.jit
def step_to(bits, d):
    """Rows and columns to the neighbour of the lowest bit. Bits 0 to 3 are the neighbours before a
    pixel, 4 to 7 the neighbours after it.
    """
    lowest = (bits & -bits).to(tl.float32).to(tl.int32, bitcast=True) // 0x800000 - 127
    dy, dx = step_in(lowest)
    return dy * d, dx * d
