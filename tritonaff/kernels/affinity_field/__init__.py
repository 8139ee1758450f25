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

from tritonaff.kernels.affinity_field import blocks
from tritonaff.kernels.affinity_field.counts import counts_kernel
from tritonaff.kernels.affinity_field.dense import dense_kernel
from tritonaff.kernels.affinity_field.edges import edge_kernel
from tritonaff.kernels.affinity_field.finish import finish_kernel, scale_kernel
from tritonaff.kernels.affinity_field.launchers import compute, scale_, statistics
from tritonaff.kernels.affinity_field.softmax import statistics_kernel

__all__ = [
    "blocks",
    "compute",
    "counts_kernel",
    "dense_kernel",
    "edge_kernel",
    "finish_kernel",
    "scale_",
    "scale_kernel",
    "statistics",
    "statistics_kernel",
]
