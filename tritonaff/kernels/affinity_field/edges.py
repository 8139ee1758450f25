"""Corrections of pairs with different labels, and the log losses of cross-entropy.

PIXELS is the number of pixels in a patch or in a part of it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tritonaff.kernels.affinity_field.labels import (
    NO_LABEL,
    add_by_label,
    as_bits,
    choose,
    extremes_with_neighbors,
    label_at,
    labels_around,
    may_have_edges,
    next_label,
    part_of_patch,
    patch,
    rectangle,
    step_to,
)
from tritonaff.kernels.affinity_field.mathematics import log_1p
from tritonaff.kernels.affinity_field.pixels import (
    Pixels,
    channel_of,
    distribution,
    image_of,
    load_logit,
    load_statistics,
)


@triton.jit
def log_losses(sums, pixels, h, w, H, W, stride_c, BLOCK_CLASSES: tl.constexpr):
    """Adds -log p by label, to sums [BLOCK_CLASSES]."""
    # [PIXELS]
    label = label_at(pixels.label, h, w, 0, 0, H, W)
    channel = channel_of(pixels, tl.maximum(label, 0), stride_c)
    pixel, mask = h.to(tl.int64) * W + w, label >= 0
    # [PIXELS]
    x = load_logit(channel, pixel, mask)
    # [PIXELS] each
    top, rest = load_statistics(channel, pixel, mask)
    return add_by_label(sums, (log_1p(rest) - (x - top),), label, BLOCK_CLASSES)


@triton.jit
def store(tables, table_ptr, first, C, PROGRAMS, BLOCK_CLASSES: tl.constexpr):
    """Stores tables [BLOCK_CLASSES] to this program's column of the partial tables, which are
    [2 K + 1, C, PROGRAMS], from row ``first`` on.
    """
    classes = tl.arange(0, BLOCK_CLASSES)
    for i in tl.static_range(len(tables)):
        row = tl.cast(C, tl.int64) * (first + i) + classes
        tl.store(table_ptr + row * PROGRAMS + tl.program_id(0), tables[i], mask=classes < C)


@triton.jit
def edges_of_patch(
    tables, coefficients_ptr, pixels, grad_ptr,
    first_h, first_w, C, H, W, stride_c, margin, limit, eps,
    TABLES: tl.constexpr, GRADIENT: tl.constexpr, REPLACE: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr, RADII: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, PART_H: tl.constexpr, PART_W: tl.constexpr,
):  # fmt: skip
    """Adds to the tables [BLOCK_CLASSES], two for each size, and to the gradient."""
    K: tl.constexpr = COLUMNS[len(RADII)]
    for part in range((BLOCK_H // PART_H) * (BLOCK_W // PART_W)):
        h, w = part_of_patch(first_h, first_w, part, BLOCK_W, PART_H, PART_W)
        pixel = h.to(tl.int64) * W + w
        # [PIXELS]; for every size [8, PIXELS]; for every size [PIXELS]
        label, around, pairs = labels_around(pixels.label, h, w, H, W, RADII)
        counted = label >= 0
        # [PIXELS] each
        top, rest = load_statistics(pixels, pixel, counted)
        least, most = extremes_with_neighbors(label, around)
        has_edge = least.to(tl.int32) < most
        values = ()
        for _ in tl.static_range(len(tables)):
            # [PIXELS]
            values += (tl.zeros(label.shape, tl.float32),)
        c = next_label(label, around, has_edge, -1)
        while c < NO_LABEL:  # every label that occurs
            channel = channel_of(pixels, c, stride_c)
            # [PIXELS]
            x = load_logit(channel, pixel, counted)
            # [PIXELS] each
            p, q, log_odds, log_q = distribution(x, top, rest, limit)
            own = label == c
            # d loss / d l and d loss / d u, [PIXELS] each; u is p and a constant
            d_l = tl.zeros_like(p)
            d_u = tl.zeros_like(p)
            touched = tl.zeros(label.shape, tl.int1)
            edges = ()
            for k in tl.static_range(len(RADII)):
                # [PIXELS]
                edges += (as_bits(own[None, :] != (around[k] == c)),)
                touched |= edges[k] > 0
            for k in range(len(RADII)):
                d, column = choose(k, RADII), choose(k, COLUMNS)
                # [PIXELS] each, a bit for each neighbour
                size_edges = choose(k, edges)
                todo = size_edges
                if GRADIENT:
                    coef_edge = tl.load(coefficients_ptr + c * K + column)
                    coef_dense = tl.load(coefficients_ptr + (C + c) * K + column)
                    if REPLACE:
                        todo = tl.where(touched, choose(k, pairs), 0)
                else:
                    todo = tl.where(own, todo, 0)
                # [PIXELS]
                hinges = tl.zeros_like(p)
                # [PIXELS]
                product = tl.zeros_like(p)
                # Every lane goes to the next of its own neighbours.
                while tl.max(todo, axis=0) > 0:
                    # [PIXELS] each
                    taken = todo > 0
                    edge = (todo & -todo & size_edges) > 0
                    dy, dx = step_to(todo, d)
                    todo &= todo - 1
                    pixel_b = pixel + dy.to(tl.int64) * W + dx
                    x_b = load_logit(channel, pixel_b, taken)
                    top_b, rest_b = load_statistics(channel, pixel_b, taken)
                    p_b, q_b, l_b, log_q_b = distribution(x_b, top_b, rest_b, limit)
                    l_step = log_odds - l_b
                    # The rest of the margin with this pixel as the centre, and with its neighbour.
                    room = margin + p_b * l_step - (log_q_b - log_q)
                    room_back = margin - p * l_step - (log_q - log_q_b)
                    if TABLES:
                        own_edge = edge & own
                        both = tl.maximum(room, 0.0) + tl.maximum(room_back, 0.0)
                        hinges += tl.where(own_edge, both, 0.0)
                        # The dense tables hold this product of the pair: nothing where p is
                        # clamped.
                        u_a = tl.where(log_odds < limit, q - eps, 0.0)
                        u_b = tl.where(l_b > -limit, p_b - eps, 0.0)
                        product -= tl.where(own_edge, (u_a + u_b) * l_step, 0.0)
                    if GRADIENT:
                        # From the smaller of p and q: little is rounded away.
                        p_step = tl.where(p > 0.5, q_b - q, p - p_b)
                        pair_d_l = tl.where(room > 0, -coef_edge, 0.0) * p_step
                        pair_d_u = tl.where(room_back > 0, -coef_edge, 0.0) * l_step
                        if REPLACE:
                            pair_d_l = tl.where(edge, pair_d_l, coef_dense * p_step)
                            pair_d_u = tl.where(edge, pair_d_u, coef_dense * l_step)
                        else:
                            u_step = tl.where(own, 2 * eps - q - p_b, p + q_b - 2 * eps)
                            pair_d_l -= coef_dense * u_step
                            pair_d_u -= coef_dense * l_step
                        d_l += tl.where(taken, pair_d_l, 0.0)
                        d_u += tl.where(taken, pair_d_u, 0.0)
                new_values = ()
                for i in tl.static_range(len(RADII)):
                    new_values += (
                        values[2 * i] + tl.where(k == i, hinges, 0.0),
                        values[2 * i + 1] + tl.where(k == i, product, 0.0),
                    )
                values = new_values
            if GRADIENT:
                # [PIXELS]
                grad = tl.where(tl.abs(log_odds) < limit, d_l / q + d_u * p, 0.0)
                row = grad_ptr + c.to(tl.int64) * H * W + pixel
                if not REPLACE:
                    grad += tl.load(row, mask=touched, other=0.0).to(tl.float32)
                tl.store(row, grad.to(grad_ptr.dtype.element_ty), mask=touched)
            c = next_label(label, around, has_edge, c)
        if TABLES:
            tables = add_by_label(tables, values, tl.where(has_edge, label, -1), BLOCK_CLASSES)
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
    """Walks through patches: adds up partial tables and, after dense_kernel, corrects or replaces
    its gradient.
    """
    # [BLOCK_CLASSES]
    nothing = tl.zeros((BLOCK_CLASSES,), tl.float32)
    # [BLOCK_CLASSES]; for every size 2 x [BLOCK_CLASSES]
    log_loss, tables = (nothing,), ()
    for _ in tl.static_range(2 * len(RADII)):
        tables += (nothing,)
    index = tl.program_id(0)
    while index < PATCHES:
        n, h, w = patch(index, H, W, BLOCK_H, BLOCK_W)
        batch = Pixels(logits_ptr, top_ptr, rest_ptr, label_ptr)
        pixels = image_of(batch, n * stride_n, n * H * W)
        grad = grad_ptr
        if GRADIENT:
            grad = grad_ptr + n * C * H * W
        every_h, every_w = rectangle(h, w, BLOCK_H, BLOCK_W)
        if TABLES and CROSS_ENTROPY:
            log_loss = log_losses(
                log_loss, pixels, every_h, every_w, H, W, stride_c, BLOCK_CLASSES
            )  # fmt: skip
        if may_have_edges(pixels.label, every_h, every_w, H, W, REACH):
            tables = edges_of_patch(
                tables, coefficients_ptr, pixels, grad,
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
