"""Triton tiles of dilated affinity.

A program owns consecutive pixels of one image and goes through the rates. Each pass
reads the logits once, and a label once for every neighbour that asks for it, from the cache.

    tables_kernel    logits, target             -> tables of every program, to be added up
    gradient_kernel  d loss / d sums, the same  -> d loss / d logits

The labels of a pixel's neighbours become two bit masks, of its different and of its same signals,
for the logits that follow: predicates of them all are more than a thread can hold.

Pixels go in pairs of a row, of which the last may lack its second pixel: what belongs to the row
is computed once for both, and two logits are one load. Everything of a pixel stays in the registers
of one thread; only the tables are reduced across the program, once for all its steps, and they are
partial sums, not atomics: the same input gives the same bits. Half precision is read as it is and
computed in float32. Image sizes and strides are runtime arguments: what compiles anew are the
offsets, block sizes, and Triton's own distinction of arguments that are 1 or divisible by 16.

Masked loads leave what is outside undefined, and no signal there is valid.
"""

from tritonaff.kernels.dilated_affinity import blocks
from tritonaff.kernels.dilated_affinity.gradient import gradient_kernel
from tritonaff.kernels.dilated_affinity.launchers import backward, forward
from tritonaff.kernels.dilated_affinity.tables import tables_kernel

__all__ = [
    "backward",
    "blocks",
    "forward",
    "gradient_kernel",
    "tables_kernel",
]
