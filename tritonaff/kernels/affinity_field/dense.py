"""The march over strips: all pairs of neighbours as if none were an edge."""

from __future__ import annotations

import triton
import triton.language as tl

from tritonaff.kernels.affinity_field.columns import (
    add,
    box_count,
    box_sum,
    byte,
    column_sum,
    four_columns,
    join,
    load_columns,
)
from tritonaff.kernels.affinity_field.mathematics import exp
from tritonaff.kernels.affinity_field.pixels import Pixels, fields
from tritonaff.kernels.shared import step_in

# Columns that a strip reads on either side of its own: the largest distance that it reaches.
HALO = tl.constexpr(4)


@triton.jit
def load_row(
    pixels, channel, image, c, h, w, H, W, limit, eps, ALIGNED: tl.constexpr
):  # fmt: skip
    """Loads row h: u and l (4 x [BLOCK_C, LANES] each), and a row of counts [1, LANES], 1 where a
    pixel counts. Where it does not, u and l are 0.

    Offsets of the logits' channel and of the image are ``channel`` [BLOCK_C, LANES] and ``image``
    [1, LANES].
    """
    inside = (h >= 0) & (h < H)
    column = h.to(tl.int64) * W + w
    pixel = image + column
    # 4 x [1, LANES]
    labels = load_columns(pixels.label, pixel, inside, w, W, -1, ALIGNED)
    # 4 x [1, LANES]
    tops = load_columns(pixels.top, pixel, inside, w, W, 0.0, ALIGNED)
    # 4 x [1, LANES]
    rests = load_columns(pixels.rest, pixel, inside, w, W, 1.0, ALIGNED)
    # 4 x [BLOCK_C, LANES]
    xs = load_columns(pixels.logits, channel + column, inside, w, W, 0.0, ALIGNED)
    us, ls, counts = (), (), tl.zeros(labels[0].shape, tl.uint32)
    for i in tl.static_range(4):
        x = xs[i].to(tl.float32)
        u, log_odds = fields(x, tops[i].to(tl.float32), rests[i], labels[i] == c, limit, eps)
        counted = labels[i] >= 0
        us += (tl.where(counted, u, 0.0),)
        ls += (tl.where(counted, log_odds, 0.0),)
        counts |= counted.to(tl.uint32) << 8 * i
    return us, ls, counts


@triton.jit
def far_box(
    pixels, channel, image, c, h, w, H, W, limit, eps, d: tl.constexpr, ALIGNED: tl.constexpr
):  # fmt: skip
    """Sums of u, of l and of counts, shaped as load_row's, over a pixel and its neighbours at a
    distance that the strip does not hold.
    """
    u_sum, l_sum, count = load_row(
        pixels, channel, image, c, h, w, H, W, limit, eps, ALIGNED
    )  # fmt: skip
    for neighbor in range(8):
        dy, dx = step_in(neighbor)
        u, log_odds, counts = load_row(
            pixels, channel, image, c, h + dy * d, w + dx * d, H, W, limit, eps, ALIGNED
        )  # fmt: skip
        u_sum, l_sum, count = add(u_sum, u), add(l_sum, log_odds), count + counts
    return u_sum, l_sum, count


@triton.jit
def strip(N, C, H, W, ROWS, BLOCK_C: tl.constexpr, LANES: tl.constexpr):
    """This program's strip: the index of its partial table; classes [BLOCK_C]; and for every lane
    its image, its first row, the first of its four columns, and whether the strip owns it, [1,
    LANES] each.

    ROWS rows of an image are a band. All bands of all images lie side by side, HALO columns between
    them, and are cut into strips. A strip owns all lanes but the first and the last.
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
    # Past the last image a lane begins below it, so that nothing is loaded.
    first = tl.where(n < N, band * ROWS, H + HALO)
    owned = (lane > 0) & (lane < LANES - 1)
    return place, c, tl.minimum(n, N - 1).to(tl.int64), first, column % width - HALO, owned


@triton.jit(do_not_specialize=["ROWS"])
def dense_kernel(
    coefficients_ptr, logits_ptr, label_ptr, top_ptr, rest_ptr, sums_ptr, grad_ptr,
    N, C, H, W, stride_n, stride_c, limit, eps, ROWS, PROGRAMS,
    TABLES: tl.constexpr, GRADIENT: tl.constexpr, ADD: tl.constexpr,
    RADII: tl.constexpr, COLUMNS: tl.constexpr, REACH: tl.constexpr,
    BLOCK_C: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    place, c, n, first, w, owned = strip(N, C, H, W, ROWS, BLOCK_C, LANES)
    pixels = Pixels(logits_ptr, top_ptr, rest_ptr, label_ptr)
    some_c = tl.minimum(c, C - 1).to(tl.int64)
    # [1, LANES], [BLOCK_C, LANES]
    image, channel = n * H * W, n * stride_n + some_c[:, None] * stride_c
    # [BLOCK_C, LANES]
    grad_channel = (n * C + some_c[:, None]) * H * W
    # [BLOCK_C, LANES, 1] or, if rows are not aligned, [BLOCK_C, LANES, 4]
    written = (owned & (w >= 0) & (w < W) & (c < C)[:, None])[:, :, None]
    if not ALIGNED:
        written = written & (four_columns(w, False) < W)

    K: tl.constexpr = COLUMNS[len(RADII)]
    # [BLOCK_C, LANES]
    nothing = tl.zeros((BLOCK_C, LANES), tl.float32)
    sums, coefficients = (), ()
    for k in tl.static_range(len(RADII)):
        # [BLOCK_C, LANES]
        sums += (nothing,)
        if GRADIENT:
            # [BLOCK_C, 1]
            coefficients += (tl.load(coefficients_ptr + (C + some_c[:, None]) * K + COLUMNS[k]),)
    # The rows within reach of the middle one. Without a gradient, no rows of l above the middle.
    l_above: tl.constexpr = REACH if GRADIENT else 0
    us, ls, vs = (), (), ()
    for _ in tl.static_range(2 * REACH + 1):
        # 4 x [BLOCK_C, LANES]
        us += (nothing, nothing, nothing, nothing)
        # [1, LANES]
        vs += (tl.zeros((1, LANES), tl.uint32),)
    for _ in tl.static_range(l_above + REACH + 1):
        # 4 x [BLOCK_C, LANES]
        ls += (nothing, nothing, nothing, nothing)
    row = -REACH
    while row < ROWS + REACH:
        for _ in tl.static_range(UNROLL):
            # 4 x [BLOCK_C, LANES], 4 x [BLOCK_C, LANES], [1, LANES]
            u, log_odds, v = load_row(
                pixels, channel, image, c[:, None], first + row, w, H, W, limit, eps, ALIGNED
            )  # fmt: skip
            us, ls, vs = us[4:] + u, ls[4:] + log_odds, vs[1:] + (v,)  # noqa: RUF005
            if (row >= REACH) & (row < ROWS + REACH):
                u_sums, l_sums, counts = (), (), ()
                for k in tl.static_range(len(RADII)):
                    if REACH > 0:
                        # 4 x [BLOCK_C, LANES]
                        u_sum = box_sum(column_sum(us, RADII[k], 4), RADII[k])
                        # [1, LANES]
                        count = box_count(column_sum(vs, RADII[k], 1)[0], RADII[k])
                        # 4 x [BLOCK_C, LANES]
                        if GRADIENT:
                            l_sum = box_sum(column_sum(ls, RADII[k], 4), RADII[k])
                        else:
                            l_sum = u_sum
                    else:
                        # 4 x [BLOCK_C, LANES], 4 x [BLOCK_C, LANES], [1, LANES]
                        u_sum, l_sum, count = far_box(
                            pixels, channel, image, c[:, None], first + row, w, H, W, limit, eps,
                            RADII[k], ALIGNED and RADII[k] % 4 == 0,
                        )  # fmt: skip
                    u_sums, l_sums, counts = u_sums + u_sum, l_sums + l_sum, counts + (count,)  # noqa: RUF005
                grads, new_sums = (), sums
                for i in tl.static_range(4):
                    # [BLOCK_C, LANES] each
                    u_i, l_i = us[4 * REACH + i], ls[4 * l_above + i]
                    d_u, d_l, products = nothing, nothing, ()
                    for k in tl.static_range(len(RADII)):
                        box = byte(counts[k], i)
                        # The differences from all neighbours, added up.
                        u_step = box * u_i - u_sums[4 * k + i]
                        products += (l_i * u_step,)
                        if GRADIENT:
                            d_l += coefficients[k] * u_step
                            d_u += coefficients[k] * (box * l_i - l_sums[4 * k + i])
                    new_sums = add(new_sums, products)
                    if GRADIENT:
                        # p d / d p of the sums; the clamp passes no gradient.
                        odds = exp(l_i)
                        root = tl.rsqrt(1 + odds)
                        p = odds * (root * root)
                        grad = d_l * (1 + odds) + d_u * p
                        free = (tl.abs(l_i) < limit) & (byte(vs[REACH], i) > 0)
                        grads += (tl.where(free, grad, 0.0),)
                sums = new_sums
                if GRADIENT:
                    h = first + row - REACH
                    mask = written & (h < H)[:, :, None]
                    offs = grad_channel + h.to(tl.int64) * W + w
                    grad_row = grad_ptr + four_columns(offs, ALIGNED)
                    # [BLOCK_C, LANES, 4]
                    all_grads = join(grads)
                    if ADD:
                        all_grads += tl.load(grad_row, mask=mask, other=0.0).to(tl.float32)
                    tl.store(grad_row, all_grads.to(grad_ptr.dtype.element_ty), mask=mask)
            row += 1

    if TABLES:
        for k in tl.static_range(len(RADII)):
            # [BLOCK_C]
            total = tl.sum(tl.where(owned, sums[k], 0.0), axis=1)
            offs = (c.to(tl.int64) * K + COLUMNS[k]) * PROGRAMS + place
            tl.store(sums_ptr + offs, total, mask=c < C)
