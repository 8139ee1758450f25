"""Triton kernels of dilated affinity.

A program owns consecutive pixels of one image and goes through the rates. Each pass reads the
logits once, and a label once for every neighbour that asks for it, from the cache.

    tables_kernel    logits, target             -> tables of every program, to be added up
    gradient_kernel  d loss / d sums, the same  -> d loss / d logits

The labels of a pixel's neighbours become two bit masks, of different and of same signals, for the
logits that follow: predicates of all of them are more than a thread can hold.

Pixels go in pairs of a row, of which the last may lack its second pixel: numbers of the row are
computed once for both, and two logits are one load. All numbers of a pixel stay in the registers of
one thread. Only the tables are reduced across the program, once for all its steps, and they are
partial sums, not atomics: the same input gives the same bits.

Half precision is read as it is and computed in float32. Image sizes and strides are runtime
arguments. A kernel compiles anew for other offsets and block sizes, and where Triton itself
distinguishes arguments that are 1 or divisible by 16.

Masked loads leave elements outside undefined, and no signal there is valid.
"""

from tritonaff.kernels.dilated_affinity import blocks
from tritonaff.kernels.dilated_affinity.blocks import Blocks
from tritonaff.kernels.dilated_affinity.gradient import gradient_kernel
from tritonaff.kernels.dilated_affinity.launchers import backward, forward
from tritonaff.kernels.dilated_affinity.tables import tables_kernel

__all__ = [
    "Blocks",
    "backward",
    "blocks",
    "forward",
    "gradient_kernel",
    "tables_kernel",
]
