"""Triton kernels of the affinity field (variant "paper") and of cross-entropy beside it.

Dense plus sparse, as docs/affinity_field.md derives it:

    statistics_kernel  logits, target -> label, largest logit, sum of the other exponentials
    counts_kernel      label -> numbers of pixels, of pairs and of edges
    dense_kernel       all pairs as if none were an edge -> partial tables, p d loss / d p
    edge_kernel        corrections of pairs with different labels; cross-entropy -> partial tables
    finish_kernel      partial tables -> tables; p d loss / d p -> the gradient of the logits, in
                       place, with the gradient of cross-entropy
    scale_kernel       multiplies by the gradient of the loss, which the backward pass knows

No float is added up by atomics: the same input gives the same bits.

A loss knows the gradient of every table entry before its sum, from counts: tables and gradient come
from one march. Without a gradient, or without tables, the same kernels leave the other out.

dense_kernel marches: one warp owns a strip of columns of a class and walks down the rows, with the
rows that its stencils reach in registers. A thread holds four neighbouring columns, so a step to
the side is a shuffle within the warp for some of them and nothing for the others. edge_kernel and
counts_kernel go through patches, rectangles of pixels, and skip most patches that hold one label.

Arguments that several kernels share:

    TABLES, GRADIENT   True for the results that are asked for
    ADD                a second pass over the sizes adds to the gradient of the first
    REPLACE            edge_kernel writes the gradient of a pixel with edges anew: half precision
    RADII, COLUMNS     distances of a pass, and their columns in the tables; then K, their number
    REACH              the largest distance of the first pass, 0 in the second
    limit              log((1 - eps) / eps), the log odds at which p is clamped

Half precision is read as it is and computed in float32. Image sizes are runtime arguments. A kernel
compiles anew for other neighbourhood sizes and block sizes, for rows that are no multiples of four
columns, and where Triton itself distinguishes arguments that are 1 or divisible by 16.
"""

from tritonaff.kernels.affinity_field import blocks
from tritonaff.kernels.affinity_field.blocks import Blocks
from tritonaff.kernels.affinity_field.counts import counts_kernel
from tritonaff.kernels.affinity_field.dense import dense_kernel
from tritonaff.kernels.affinity_field.edges import edge_kernel
from tritonaff.kernels.affinity_field.finish import finish_kernel, scale_kernel
from tritonaff.kernels.affinity_field.launchers import compute, passes, scale_, statistics
from tritonaff.kernels.affinity_field.softmax import statistics_kernel

__all__ = [
    "Blocks",
    "blocks",
    "compute",
    "counts_kernel",
    "dense_kernel",
    "edge_kernel",
    "finish_kernel",
    "passes",
    "scale_",
    "scale_kernel",
    "statistics",
    "statistics_kernel",
]
