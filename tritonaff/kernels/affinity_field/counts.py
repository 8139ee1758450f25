"""Numbers of pixels, of pairs and of edges: labels are all that they depend on.

PIXELS is the number of pixels in a patch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tritonaff.kernels.affinity_field.columns import add
from tritonaff.kernels.affinity_field.labels import (
    add_by_label,
    choose,
    label_at,
    labels_in_reach,
    patch,
    rectangle,
)
from tritonaff.kernels.shared import step_in


@triton.jit
def pairs_and_edges(
    pairs, edges, label_ptr, label, h, w, H, W, RADII: tl.constexpr, REACH: tl.constexpr
):  # fmt: skip
    """Adds, for every distance, the number of neighbours that a pixel makes a pair with to pairs
    [PIXELS], and the number of neighbours with another label to edges [PIXELS].
    """
    # [PIXELS] each
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
            # [PIXELS] each
            neighbors, others = tl.zeros_like(label), tl.zeros_like(label)
            for i in tl.static_range(8):
                dy, dx = step_in(i)
                # [PIXELS]
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
    COUNT_PIXELS: tl.constexpr, BLOCK_CLASSES: tl.constexpr,
    RADII: tl.constexpr, COLUMNS: tl.constexpr, REACH: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Walks through patches, adds up the totals, the entries and, in the first pass over the sizes,
    the pixels by label.
    """
    # [BLOCK_H * BLOCK_W]
    none = tl.zeros((BLOCK_H * BLOCK_W,), tl.int32)
    # [BLOCK_H * BLOCK_W], [BLOCK_H * BLOCK_W], [BLOCK_CLASSES] for every size; tables begin with
    # the pixels by label.
    all_pairs, all_edges, tables = (), (), (tl.zeros((BLOCK_CLASSES,), tl.int32),)
    for _ in tl.static_range(len(RADII)):
        all_pairs += (none,)
        all_edges += (none,)
        tables += (tables[0],)
    index = tl.program_id(0)
    while index < PATCHES:
        n, first_h, first_w = patch(index, H, W, BLOCK_H, BLOCK_W)
        h, w = rectangle(first_h, first_w, BLOCK_H, BLOCK_W)
        # [BLOCK_H * BLOCK_W]
        label = label_at(label_ptr + n * H * W, h, w, 0, 0, H, W)
        edges = ()
        for _ in tl.static_range(len(RADII)):
            # [BLOCK_H * BLOCK_W]
            edges += (none,)
        all_pairs, edges = pairs_and_edges(
            all_pairs, edges, label_ptr + n * H * W, label, h, w, H, W, RADII, REACH
        )  # fmt: skip
        all_edges = add(all_edges, edges)
        tables = add_by_label(tables, (none + 1,) + edges, label, BLOCK_CLASSES)  # noqa: RUF005
        index += tl.num_programs(0)

    K: tl.constexpr = COLUMNS[len(RADII)]
    for k in tl.static_range(len(RADII)):
        # A pair is an entry of every channel. An edge is an entry of the channel of a pixel's own
        # label, in both directions.
        edge_count = 2 * tl.sum(all_edges[k], axis=0).to(tl.int64)
        other_count = C * tl.sum(all_pairs[k], axis=0).to(tl.int64) - edge_count
        column_ptr = totals_ptr + COLUMNS[k]
        tl.atomic_add(column_ptr, edge_count, mask=edge_count > 0, sem="relaxed")
        tl.atomic_add(column_ptr + K, other_count, mask=other_count > 0, sem="relaxed")
    # [BLOCK_CLASSES]
    classes = tl.arange(0, BLOCK_CLASSES)
    row_ptr = entries_ptr + classes.to(tl.int64) * (K + 1)
    if COUNT_PIXELS:
        count = tables[0].to(tl.int64)
        tl.atomic_add(row_ptr + K, count, mask=count > 0, sem="relaxed")
    for k in tl.static_range(len(RADII)):
        count = 2 * tables[1 + k].to(tl.int64)
        tl.atomic_add(row_ptr + COLUMNS[k], count, mask=count > 0, sem="relaxed")
