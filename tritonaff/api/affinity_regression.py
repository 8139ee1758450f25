"""Affinity regression: points of one label agree, points of two labels differ, at any distance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from tritonaff import checks
from tritonaff.api.module import Loss
from tritonaff.distributed import all_reduce
from tritonaff.ops import affinity_regression as ops
from tritonaff.ops.backend import current_backend
from tritonaff.options import (
    Activation,
    AffinityRegressionOptions,
    Reduction,
    affinity_regression_options,
)


class AffinityRegressionTerms(NamedTuple):
    """Sums and counts of affinity regression by image, each of shape (N,); with sigmoid by image
    and channel, (N, C).
    """

    squared_error: Tensor
    """Sum of (A - M)^2 over the pairs of points; float32, float64 for float64 logits.
    Differentiable.
    """
    pair_count: Tensor
    """Number of pairs, the square of the number of points that count; int64."""


def affinity_regression_terms(
    logits: Tensor,
    target: Tensor,
    grid_sizes: Sequence[int] | int | None = (12, 6),
    *,
    ignore_index: int | None = 255,
    activation: Activation = "softmax",
) -> AffinityRegressionTerms:
    r"""Squared error between the square-root affinity and the label affinity of each image.

    With S = sqrt(softmax(logits)) at L sample points and their labels y,

    .. math:: E = \sum_{ij} (A_{ij} - M_{ij})^2, \quad A = S^T S, \quad M_{ij} = [y_i = y_j]

    over all pairs of points that are not ignored, i = j included. The points of a grid size g are
    the rows floor(i H / g) and columns floor(j W / g), i, j = 0 ... g - 1, as nearest-neighbour
    interpolation takes them, and L is the sum of g^2 over the sizes. No L x L matrix is built. Time
    is linear in L, except on a GPU for grids of up to 4096 points, where comparing all pairs is as
    quick. Therefore ``grid_sizes=None``, every pixel, is as good as any other choice.

    With ``activation="sigmoid"`` each channel is a problem of two classes, yes and no: S is
    (sqrt(1 - p), sqrt(p)) with p = sigmoid(logits), and the labels of a channel are 0 and 1.

    Args:
        logits: (N, C, H, W) of float16, bfloat16, float32 or float64, any strides. Half precision
            is read as it is and computed in float32.
        target: (N, H, W) or (N, 1, H, W), of an integer dtype, bool, or floating point that holds
            whole numbers (looked at on a CPU, in eager mode). With ``activation="sigmoid"`` labels
            0 and 1, (N, C, H, W); for one channel (N, H, W) too.
        grid_sizes: at least one size, each at least 1; grids finer than the image repeat pixels.
            None: every pixel.
        ignore_index: label of the points to leave out; None if there is no such label.
        activation: ``"softmax"``, one class per pixel; ``"sigmoid"``, one channel or several labels
            per pixel.

    Returns:
        :class:`AffinityRegressionTerms`. Differentiable with respect to the logits: once, in
        reverse mode; finite where a probability underflows.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device or range. A label outside [0, C) other than ignore_index
            raises in eager mode on the CPU; elsewhere such points are ignored. With the backend
            "reference", matrices that do not fit.

    Paper: Cao, "Use Square Root Affinity to Regress Label in Semantic Segmentation", Eq. 3 to 6.
    The paper knows no ignored points, and names grids of 12 and 6.

    Example:
        >>> import torch, tritonaff
        >>> logits = torch.zeros(1, 2, 1, 2)  # two undecided pixels: their affinity is 1
        >>> target = torch.tensor([[[0, 1]]])  # of two classes: it should be 0, twice
        >>> terms = tritonaff.affinity_regression_terms(logits, target, grid_sizes=None)
        >>> terms.squared_error.tolist(), terms.pair_count.tolist()
        ([2.0], [4])
    """
    options = affinity_regression_options(
        grid_sizes, ignore_index=ignore_index, activation=activation
    )
    return _terms(*checks.check_logits_and_target(logits, target, activation), options)


def affinity_regression_loss(
    logits: Tensor,
    target: Tensor,
    grid_sizes: Sequence[int] | int | None = (12, 6),
    *,
    ignore_index: int | None = 255,
    activation: Activation = "softmax",
    reduction: Reduction = "mean",
    normalizer: Tensor | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    r"""The affinity regression loss: points of one label agree, points of two labels differ, at any
    distance.

    The mean over images of squared_error / pair_count of :func:`affinity_regression_terms`: a mean
    square. Images without any point that counts are left out; if no image remains, the loss is 0
    with a zero gradient. With ``activation="sigmoid"`` the mean is over images and channels.

    Args:
        logits: (N, C, H, W) of float16, bfloat16, float32 or float64, any strides. Half precision
            is read as it is and computed in float32.
        target: (N, H, W) or (N, 1, H, W), of an integer dtype, bool, or floating point that holds
            whole numbers (looked at on a CPU, in eager mode). With ``activation="sigmoid"`` labels
            0 and 1, (N, C, H, W); for one channel (N, H, W) too.
        grid_sizes: at least one size, each at least 1; grids finer than the image repeat pixels.
            None: every pixel.
        ignore_index: label of the points to leave out; None if there is no such label.
        activation: ``"softmax"``, one class per pixel; ``"sigmoid"``, one channel or several labels
            per pixel.
        reduction: ``"mean"``; ``"sum"`` over the images; or ``"none"``, the mean square of each
            image, (N,), with sigmoid of each image and channel, (N, C): 0 without any point that
            counts.
        normalizer: int32 or int64 scalar, the number of images to divide by, in place of the
            batch's own (with sigmoid images times channels);
            :meth:`AffinityRegressionLoss.normalizer` counts them.
        process_group: None: the images of this process. A group: the images of all its processes,
            for which every process must call; the gradient is multiplied by the number of
            processes, a factor that averaging of gradients cancels.

    Returns:
        A scalar, in [0, 1] with ``reduction="mean"`` and no normalizer: float32, float64 for
        float64 logits.

    Raises:
        TypeError, ValueError: as :func:`affinity_regression_terms`; a normalizer of a wrong type,
            dtype, shape or device; a wrong process_group; a normalizer with another reduction than
            "mean", a process_group with "none".

    Paper: Cao, Eq. 6. The paper adds the loss to cross-entropy with the weight 0.1 (Eq. 7) when
    training with cross-entropy alone has reached its peak.

    Example:
        >>> import torch, tritonaff
        >>> logits = torch.randn(2, 4, 32, 32, requires_grad=True)
        >>> target = torch.randint(0, 4, (2, 32, 32))
        >>> loss = torch.nn.functional.cross_entropy(logits, target, ignore_index=255)
        >>> loss = loss + 0.1 * tritonaff.affinity_regression_loss(logits, target)
        >>> loss.backward()
    """
    options = affinity_regression_options(
        grid_sizes, ignore_index=ignore_index, activation=activation, reduction=reduction
    )
    return _loss(logits, target, options, normalizer, process_group)


class AffinityRegressionLoss(Loss):
    """:func:`tritonaff.affinity_regression_loss` with fixed options.

    The paper adds the loss to cross-entropy with the weight 0.1, for fine-tuning, when training
    with cross-entropy alone has reached its peak.

    Args:
        grid_sizes: at least one size, each at least 1; grids finer than the image repeat pixels.
            None: every pixel.
        ignore_index: label of the points to leave out; None if there is no such label.
        process_group: None: the images of this process. A group: the images of all its processes,
            for which every process must call; the gradient is multiplied by the number of
            processes, a factor that averaging of gradients cancels.
        activation: ``"softmax"``, one class per pixel; ``"sigmoid"``, one channel or several labels
            per pixel.
        reduction: ``"mean"`` or ``"sum"`` over the images, or ``"none"``, the mean square of each
            image, (N,), with sigmoid of each image and channel, (N, C).

    Shapes:
        ``loss(logits, target)`` with logits (N, C, H, W) and target (N, H, W) gives a scalar, or
        with ``reduction="none"`` a value for each image. The loss has one term, and no
        ``return_terms``.

    Raises:
        TypeError, ValueError: a wrong option when the module is made, wrong tensors when it is
            called.

    Example:
        >>> import torch, tritonaff
        >>> loss_fn = tritonaff.AffinityRegressionLoss(grid_sizes=(12, 6))
        >>> logits = torch.randn(1, 3, 48, 64, requires_grad=True)
        >>> target = torch.randint(0, 3, (1, 48, 64))
        >>> (0.1 * loss_fn(logits, target)).backward()
    """

    def __init__(
        self,
        grid_sizes: Sequence[int] | int | None = (12, 6),
        ignore_index: int | None = 255,
        process_group: dist.ProcessGroup | None = None,
        *,
        activation: Activation = "softmax",
        reduction: Reduction = "mean",
    ) -> None:
        options = affinity_regression_options(
            grid_sizes, ignore_index=ignore_index, activation=activation, reduction=reduction
        )
        super().__init__(options, process_group)

    def forward(self, logits: Tensor, target: Tensor, normalizer: Tensor | None = None) -> Tensor:
        """The loss of a batch.

        Args:
            logits: (N, C, H, W) of float16, bfloat16, float32 or float64.
            target: (N, H, W) or (N, 1, H, W), of an integer dtype, bool, or floating point that
                holds whole numbers (looked at on a CPU, in eager mode). With
                ``activation="sigmoid"`` labels 0 and 1, (N, C, H, W); for one channel (N, H, W)
                too.
            normalizer: int32 or int64 scalar, the number of images to divide by, in place of the
                batch's own; :meth:`normalizer` counts them.

        Returns:
            A scalar, in [0, 1] with ``reduction="mean"`` and no normalizer: float32, float64 for
            float64 logits.
        """
        return _loss(logits, target, self.options, normalizer, self.process_group)

    def normalizer(self, target: Tensor) -> Tensor:
        """Number of images with a point that counts among labels (N, H, W): an int64 scalar. Add up
        the numbers of a batch's parts and give ``forward`` the total with every part. With sigmoid
        the target is (N, C, H, W), and the images of each channel are counted.
        """
        if self.activation == "sigmoid" and isinstance(target, Tensor) and target.dim() == 4:
            target = target.flatten(0, 1)
        target = checks.check_target(target)
        grid_sizes, ignore_index = self.options.grid_sizes, self.options.ignore_index
        void = (target.to(torch.int64) == ignore_index).to(torch.int64)
        n, height, width = void.shape
        blank = torch.zeros((), device=target.device).expand(n, 2, height, width)
        terms = affinity_regression_terms(blank, void, grid_sizes, ignore_index=1)
        return (terms.pair_count > 0).sum()


def square_root_affinity(
    logits: Tensor, grid_sizes: Sequence[int] | int | None = (12, 6)
) -> Tensor:
    r"""Matrices of the affinity that the logits predict for all pairs of sample points.

    .. math:: A_{ij} = \sum_c \sqrt{p_i(c) \, p_j(c)}, \quad p = softmax(logits)

    A is the Bhattacharyya coefficient of two predictions: in [0, 1], and 1 exactly if they are
    equal.

    Args:
        logits: (N, C, H, W) of float16, bfloat16, float32 or float64, any strides.
        grid_sizes: grids of the L points, each at least 1. None: every pixel,
            L = H W.

    Returns:
        (N, L, L): float32, float64 for float64 logits. Differentiable: once, in reverse mode.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape or size; matrices of more than 8 GB.

    Paper: Cao, Eq. 5 and 8. :func:`tritonaff.plotting.plot_affinity` draws the matrices as in the
    paper's Fig. 4.

    Example:
        >>> import torch, tritonaff
        >>> logits = torch.tensor([[[[9.0, 9.0]], [[0.0, 0.0]]]])  # two pixels that agree
        >>> tritonaff.square_root_affinity(logits, grid_sizes=None).round(decimals=3).tolist()
        [[[1.0, 1.0], [1.0, 1.0]]]
    """
    logits = checks.check_logits(logits)
    grid_sizes = checks.check_grid_sizes(grid_sizes)
    checks.check_matrices_fit(logits, grid_sizes)
    return ops.predicted_affinity(logits, grid_sizes)


def label_affinity(
    target: Tensor, grid_sizes: Sequence[int] | int | None = (12, 6), ignore_index: int | None = 255
) -> tuple[Tensor, Tensor]:
    """Matrices of the affinity that the labels ask for between all pairs of sample points.

    Args:
        target: (N, H, W) or (N, 1, H, W), of an integer dtype, bool, or floating point that holds
            whole numbers.
        grid_sizes: grids of the L points, each at least 1. None: every pixel,
            L = H W.
        ignore_index: label of the points that do not count.

    Returns:
        affinity: (N, L, L) float32, 1 where two points that count have the same label, else 0.
        valid: (N, L) bool, True for the points that count.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape or size; matrices of more than 8 GB; labels as
            :func:`dilated_affinity_target`.

    Paper: Cao, Eq. 3.

    Example:
        >>> import torch, tritonaff
        >>> affinity, valid = tritonaff.label_affinity(torch.tensor([[[3, 3, 255]]]), None)
        >>> affinity.tolist(), valid.tolist()
        ([[[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]], [[True, True, False]])
    """
    target = checks.check_target(target)
    grid_sizes = checks.check_grid_sizes(grid_sizes)
    ignore_index = checks.check_ignore_index(ignore_index)
    checks.check_label_values(target, None, ignore_index)
    checks.check_matrices_fit(target, grid_sizes)
    return ops.true_affinity(target, grid_sizes, ignore_index)


def _terms(
    logits: Tensor, target: Tensor, options: AffinityRegressionOptions
) -> AffinityRegressionTerms:
    by_channel = options.activation == "sigmoid"
    shape = logits.shape[:2] if by_channel else logits.shape[:1]
    if by_channel:  # the sigmoid of x is the second class of the softmax of (0, x)
        x, target = logits.flatten(0, 1)[:, None], target.flatten(0, 1)
        logits = torch.cat((torch.zeros_like(x), x), dim=1)
    checks.check_label_values(target, logits.shape[1], options.ignore_index)
    if current_backend() == "reference":
        checks.check_matrices_fit(logits, options.grid_sizes)
    squared_error, pair_count = ops.terms(logits, target, options)
    return AffinityRegressionTerms(squared_error.view(shape), pair_count.view(shape))


def _loss(
    logits: Tensor,
    target: Tensor,
    options: AffinityRegressionOptions,
    normalizer: Tensor | None,
    process_group: dist.ProcessGroup | None,
) -> Tensor:
    logits, target = checks.check_logits_and_target(logits, target, options.activation)
    if normalizer is not None:
        normalizer = checks.check_normalizer(normalizer, (), "logits", logits)
    checks.check_process_group(process_group)
    checks.check_together(options.reduction, normalizer, process_group)
    squared_error, pair_count = _terms(logits, target, options)
    counted = pair_count > 0
    mean_square = squared_error * counted / pair_count.clamp(min=1)
    if options.reduction == "none":
        return mean_square
    images = counted.sum() if normalizer is None else normalizer
    total, images = all_reduce((mean_square.sum(), images), process_group)
    return total if options.reduction == "sum" else total / images.clamp(min=1)
