"""Triton kernels of instance affinities, in images and volumes alike.

A program owns consecutive voxels of one image and goes through the channels. Each pass reads the
logits once, and an id once for every pair that asks for it, from the cache.

    tables_kernel    logits, ids                -> tables of every program, to be added up
    gradient_kernel  d loss / d sums, the same  -> d loss / d logits

Voxels go in fours of a row, of which the last may lack voxels: numbers of the row are computed once
for all four, and four logits are one load. Only the tables are reduced across the program, once for
all its steps, and they are partial sums, not atomics: the same input gives the same bits.

Half precision is read as it is and computed in float32. Sizes, strides, background and ignored id
are runtime arguments. A kernel compiles anew for other offsets, tables and block sizes, for ids of
another width, and where Triton itself distinguishes arguments that are 1 or divisible by 16.

Masked loads leave elements outside undefined, and no pair there counts.
"""

from tritonaff.kernels.instance_affinity import blocks
from tritonaff.kernels.instance_affinity.blocks import Blocks
from tritonaff.kernels.instance_affinity.gradient import gradient_kernel
from tritonaff.kernels.instance_affinity.launchers import backward, forward
from tritonaff.kernels.instance_affinity.tables import tables_kernel

__all__ = [
    "Blocks",
    "backward",
    "blocks",
    "forward",
    "gradient_kernel",
    "tables_kernel",
]
