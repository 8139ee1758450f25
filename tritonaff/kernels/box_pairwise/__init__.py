"""Triton kernels of the box-supervised pairwise loss.

A program owns consecutive pixels of one mask and goes through their 8 neighbours. Logits of
neighbours come from the cache.

    tables_kernel    mask logits, similarity, boxes  -> sums of every program, to be added up
    gradient_kernel  d loss / d sums, the same       -> d loss / d mask logits

Programs whose rows are away from the box do nothing, or write zeros: most of a mask costs nothing
but its gradient's memory. The sums of programs are partial sums, not atomics: the same input gives
the same bits.

Half precision is read as it is and computed in float32. Sizes, strides and the dilation are runtime
arguments. A kernel compiles anew for other block sizes, and where Triton itself distinguishes
arguments that are 1 or divisible by 16.
"""

from tritonaff.kernels.box_pairwise import blocks
from tritonaff.kernels.box_pairwise.blocks import Blocks
from tritonaff.kernels.box_pairwise.gradient import gradient_kernel
from tritonaff.kernels.box_pairwise.launchers import backward, forward
from tritonaff.kernels.box_pairwise.tables import tables_kernel

__all__ = [
    "Blocks",
    "backward",
    "blocks",
    "forward",
    "gradient_kernel",
    "tables_kernel",
]
