from __future__ import annotations

import triton
import triton.language as tl

from tritonaff.kernels.shared import is_inside, step_in

# A label beyond all.
NO_LABEL = tl.constexpr(1 << 30)


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
def step_to(bits, d):
    """Rows and columns to the neighbour of the lowest bit: 0 to 3 are those before a pixel, 4 to 7
    those after it.
    """
    lowest = (bits & -bits).to(tl.float32).to(tl.int32, bitcast=True) // 0x800000 - 127
    dy, dx = step_in(lowest)
    return dy * d, dx * d


@triton.jit
def choose(k, values):
    """The one that k says. What loops over sizes has one body: three take three times as long to
    compile.
    """
    value = values[0]
    for i in tl.static_range(1, len(values)):
        value = tl.where(k == i, values[i], value)
    return value
