"""Triton kernels of affinity regression.

With the square roots of the probabilities S [C, L] and the one-hot labels Y, a point has the
columns d of D = S - Y and m of M = S + Y. The difference of both affinities of a pair is
(d_i . m_j + m_i . d_j) / 2, which keeps its digits where the prediction is right.
docs/affinity_regression.md derives the rest.

At the points of grids, few enough for all pairs:

    pairs_kernel           a block of points against all others -> squared error, one launch
    pairs_gradient_kernel  the same -> d loss / d logits at these points; other programs of the
                           same launch write zeros to the other pixels

Every pixel, linear in their number:

    gram_kernel            pixels of one image, all classes -> partial D D^T, D Y^T
    gradient_kernel        pixels, all classes -> d loss / d logits

and with more than 32 classes, or 64 for the gradient:

    statistics_kernel      pixels, all classes -> four numbers, for square roots of single classes
    block_gram_kernel      pixels of one image, two blocks of classes -> partial D D^T
    block_labels_kernel    the same -> partial D Y^T
    block_gradient_kernel  pixels, all blocks of classes -> d loss / d logits

    matrix_kernel          a block of points against another -> the matrix A itself, for people

Half precision is read as it is. Products are float32 in full precision ("ieee"), and so are sums,
except for the Gram matrices, whose sums are float64. A kernel compiles anew for other grid sizes,
numbers of classes and blocks, not for other image sizes.
"""

from tritonaff.kernels.affinity_regression import blocks
from tritonaff.kernels.affinity_regression.blocks import Blocks
from tritonaff.kernels.affinity_regression.every_pixel import gradient_kernel, gram_kernel
from tritonaff.kernels.affinity_regression.launchers import backward, forward, square_root_affinity
from tritonaff.kernels.affinity_regression.many_classes import (
    block_gradient_kernel,
    block_gram_kernel,
    block_labels_kernel,
    statistics_kernel,
)
from tritonaff.kernels.affinity_regression.matrix import matrix_kernel
from tritonaff.kernels.affinity_regression.pairs import pairs_gradient_kernel, pairs_kernel

__all__ = [
    "Blocks",
    "backward",
    "block_gradient_kernel",
    "block_gram_kernel",
    "block_labels_kernel",
    "blocks",
    "forward",
    "gradient_kernel",
    "gram_kernel",
    "matrix_kernel",
    "pairs_gradient_kernel",
    "pairs_kernel",
    "square_root_affinity",
    "statistics_kernel",
]
