"""Triton kernels of affinity propagation.

A program owns all classes of BLOCK_P consecutive pixels of one image, so that maximum and
normalisation stay inside it. One launch is one iteration, because a pixel's neighbours are
anywhere.

    gates_kernel               affinity        -> sigmoid, 0 where the neighbour is outside
    step_kernel                p               -> the next p, and the divisor of y
    normalize_backward_kernel  d loss / d p    -> d loss / d y, of the last iteration
    step_backward_kernel       d loss / d y    -> d loss / d y of the iteration before (before the
                                                  first iteration: d loss / d p); adds to the
                                                  gradient of the gates
    gates_backward_kernel      gates' gradient -> affinity's gradient

RATES are flat, r1, r2, r1, r2, ...: a pixel has 4 * len(RATES) neighbours and gates.

y is the sum of Eq. 6 before its normalisation. Every gradient gathers the terms of its own pixel:
no atomics, the same input gives the same bits.

A step holds [BLOCK_P] of every class: a tuple, all of it in the thread that the pixel belongs to.
Classes share a neighbour's gate, its index and whether it is inside: each is there once. Neighbours
are loaded without a mask, because a neighbour outside is replaced by the pixel itself, with a gate
of 0. More classes than the registers hold are taken in blocks. Iterates are contiguous: in every
class, a neighbour is the same step away.

Half precision is read as it is and computed in float32. Image sizes are runtime arguments. A kernel
compiles anew for other rates, classes and block sizes, and where Triton itself distinguishes
arguments that are 1 or divisible by 16.
"""

from tritonaff.kernels.affinity_propagation import blocks
from tritonaff.kernels.affinity_propagation.blocks import Blocks
from tritonaff.kernels.affinity_propagation.gates import gates_backward_kernel, gates_kernel
from tritonaff.kernels.affinity_propagation.launchers import backward, forward
from tritonaff.kernels.affinity_propagation.steps import step_kernel
from tritonaff.kernels.affinity_propagation.steps_backward import (
    normalize_backward_kernel,
    step_backward_kernel,
)

__all__ = [
    "Blocks",
    "backward",
    "blocks",
    "forward",
    "gates_backward_kernel",
    "gates_kernel",
    "normalize_backward_kernel",
    "step_backward_kernel",
    "step_kernel",
]
