"""The losses and operations as functions: each checks its input once, calls its operation, and,
for a loss, turns tables into it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from tritonaff import checks
from tritonaff.distributed import all_reduce
from tritonaff.ops.affinity_field import affinity_field as affinity_field_op
from tritonaff.ops.affinity_field import (
    affinity_field_coefficients as affinity_field_coefficients_op,
)
from tritonaff.ops.affinity_field import affinity_field_statistics as affinity_field_statistics_op
from tritonaff.ops.affinity_field import (
    affinity_field_with_gradient as affinity_field_with_gradient_op,
)
from tritonaff.ops.affinity_propagation import affinity_propagation as affinity_propagation_op
from tritonaff.ops.affinity_regression import affinity_regression as affinity_regression_op
from tritonaff.ops.affinity_regression import label_affinity as label_affinity_op
from tritonaff.ops.affinity_regression import square_root_affinity as square_root_affinity_op
from tritonaff.ops.backend import current_backend, without_autocast
from tritonaff.ops.dilated_affinity import dilated_affinity as dilated_affinity_op
from tritonaff.ops.dilated_affinity import dilated_affinity_target as dilated_affinity_target_op
from tritonaff.ops.dilated_affinity import neighbor_counts as neighbor_counts_op
from tritonaff.portable.blocks import precision
from tritonaff.rates import rate_offsets

VARIANTS = ("paper", "authors")
WEIGHTINGS = ("sqrt", "neighbor", "signal", "none")


class AffinityFieldTerms(NamedTuple):
    """Sums and counts of the affinity field by class and neighbourhood size, each of shape (C, K).

    Tables add up: those of a batch are the sums of those of its images.
    """

    edge_sum: Tensor
    """Sum of max(0, margin - KL) over edge entries; float32, float64 for float64 logits.
    Differentiable.
    """
    non_edge_sum: Tensor
    """Sum of KL over non-edge entries; the same dtype. Differentiable."""
    edge_count: Tensor
    """Number of edge entries; int64."""
    non_edge_count: Tensor
    """Number of non-edge entries; int64."""


def affinity_field_terms(
    logits: Tensor,
    target: Tensor,
    kernel_sizes: Sequence[int] = (3,),
    *,
    margin: float = 3.0,
    eps: float = 1e-4,
    ignore_index: int = 255,
    variant: str = "paper",
) -> AffinityFieldTerms:
    r"""The sums and counts that affinity field losses are made of, in one pass over the logits.

    With p = softmax(logits) clamped to [eps, 1 - eps], pixel i, its 8 neighbours j at distance d =
    (k - 1) / 2 (rows and columns, so a dilated 3 x 3), and every class c, an entry (i, j, c) has

    .. math:: f = KL(p_j(c) \| p_i(c)) = p_j \log(p_j / p_i) + (1 - p_j) \log((1 - p_j) / (1 - p_i))

    It is an *edge* if exactly one of the two pixels has label c and adds max(0, margin - f) to
    ``edge_sum[c, k]``; else it is a *non-edge* and adds f to ``non_edge_sum[c, k]``. Pairs with a
    pixel outside the image or ignored do not count.

    Args:
        logits: (N, C, H, W) of float16, bfloat16, float32 or float64, any strides. Half precision
            is read as it is and computed in float32.
        target: (N, H, W) of uint8, int32 or int64.
        kernel_sizes: K distinct odd sizes, each at least 3.
        margin: KL divergence, in nats, beyond which an edge is satisfied; at least 0.
        eps: clamp of the probabilities, at least a rounding of 1 (1.2e-7; float64 2.2e-16), < 0.5.
        ignore_index: label of the pixels to leave out, even if it is one of more than 255 classes.
            255, where torch's own losses have -100.
        variant: ``"paper"``, the equations above; ``"authors"``, the published TensorFlow code:
            tables by the label of the centre i for all its channels, pairs only where the pixel
            opposite to j counts as well, p and 1 - p clamped to [eps, 1] separately, and every
            label outside [0, C) ignored.

    Returns:
        :class:`AffinityFieldTerms`. Differentiable with respect to the logits: once, in
        reverse mode.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device or range; fewer than two classes. A label outside [0, C)
            other than ignore_index raises in eager mode on the CPU (variant "paper"); elsewhere
            such pixels are ignored, unless TRITONAFF_CHECK=1 asserts labels on the device.

    Paper: Ke, Hwang, Liu, Yu, "Adaptive Affinity Fields for Semantic Segmentation", ECCV 2018, Eq.
    3. We clamp p so that p and 1 - p stay a distribution, and count exactly the pairs that exist.

    Example:
        >>> import torch, tritonaff
        >>> logits = torch.zeros(1, 2, 1, 2)  # two undecided pixels
        >>> target = torch.tensor([[[0, 1]]])  # of two classes: both pairs, both channels are edges
        >>> terms = tritonaff.affinity_field_terms(logits, target)
        >>> terms.edge_sum.tolist(), terms.edge_count.tolist(), terms.non_edge_count.tolist()
        ([[6.0], [6.0]], [[2], [2]], [[0], [0]])
    """
    totals, counts, sums = affinity_field_counts(
        logits,
        target,
        kernel_sizes,
        margin=margin,
        eps=eps,
        ignore_index=ignore_index,
        variant=variant,
    )
    edge_count, non_edge_count = counts[: logits.shape[1], :-1], counts[logits.shape[1] :, :-1]
    if not len(non_edge_count):
        # Every class has as many entries.
        non_edge_count = totals.sum(dim=0) // len(edge_count) - edge_count
    tables, _, _ = sums()
    edge_sum, non_edge_sum = tables.unbind()
    return AffinityFieldTerms(
        edge_sum, non_edge_sum, edge_count.contiguous(), non_edge_count.contiguous()
    )


def affinity_field_counts(
    logits: Tensor,
    target: Tensor,
    kernel_sizes: Sequence[int],
    *,
    margin: float,
    eps: float,
    ignore_index: int,
    variant: str,
) -> tuple[Tensor, Tensor, Callable[..., tuple[Tensor, Tensor, Tensor | None]]]:
    """Totals (2, K) and counts of entries and pixels as ops/affinity_field.py has them; and a
    function that gives the sums over entries (2, C, K), and of -log p over the pixels of each label
    (C,).

    Without arguments these are differentiable. Given the gradients of a loss with respect to them
    they may be constants, followed by a 0 that carries the gradient of the logits: add it to the
    loss.
    """
    logits, target = checks.check_logits_and_target(logits, target)
    kernel_sizes = checks.check_kernel_sizes(kernel_sizes)
    margin = checks.check_number("margin", margin, at_least=0)
    eps = checks.check_number("eps", eps, at_least=torch.finfo(precision(logits)).eps, below=0.5)
    ignore_index = checks.check_ignore_index(ignore_index)
    checks.check_option("variant", variant, VARIANTS)
    if variant == "paper":
        checks.check_label_values(target, logits.shape[1], ignore_index)

    backend = current_backend()
    if backend == "reference":
        from tritonaff.reference import affinity_field as reference

        edge_sum, non_edge_sum, *entries = reference.affinity_field_terms(
            logits,
            target,
            kernel_sizes,
            margin=margin,
            eps=eps,
            ignore_index=ignore_index,
            variant=variant,
        )
        log_loss, pixel_count = reference.cross_entropy_terms(
            logits, target, ignore_index=ignore_index
        )
        tables = torch.stack((edge_sum, non_edge_sum))
        counts = torch.cat([torch.column_stack((table, pixel_count)) for table in entries])
        totals = torch.stack(entries).sum(dim=1)
        return totals, counts, lambda *_: (tables, log_loss, None)

    totals, counts, *pixels = affinity_field_statistics_op(
        logits.detach(), target, kernel_sizes, ignore_index, variant, backend
    )
    options = kernel_sizes, margin, eps, variant, backend

    def sums(
        grad_sums: Tensor | None = None, grad_log_loss: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        if grad_sums is not None and logits.requires_grad and torch.is_grad_enabled():
            tables, log_loss, zero, _ = affinity_field_with_gradient_op(
                logits, grad_sums, grad_log_loss, *pixels, *options
            )
            return tables, log_loss, zero
        return *affinity_field_op(logits, *pixels, *options), None

    return totals, counts, sums


def affinity_field_loss(
    logits: Tensor,
    target: Tensor,
    kernel_sizes: Sequence[int] = (3,),
    *,
    edge_weight: Tensor | None = None,
    non_edge_weight: Tensor | None = None,
    edge_lambda: float = 1.0,
    non_edge_lambda: float = 1.0,
    margin: float = 3.0,
    eps: float = 1e-4,
    ignore_index: int = 255,
    variant: str = "paper",
    normalizer: Tensor | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    r"""The affinity field loss: neighbours of one label agree, neighbours of two labels differ.

    .. math::

        L = \sum_k \lambda_e \frac{\sum_c w^e_{ck} \, edge\_sum_{ck}}{\sum_c edge\_count_{ck}}
            + \lambda_n \frac{\sum_c w^n_{ck} \, non\_edge\_sum_{ck}}{\sum_c non\_edge\_count_{ck}}

    on the tables of :func:`affinity_field_terms`. A size without edges (or without non-edges)
    contributes 0 with a zero gradient.

    Args:
        logits: (N, C, H, W) floating, see :func:`affinity_field_terms`.
        target: (N, H, W) of uint8, int32 or int64.
        kernel_sizes: K distinct odd sizes, each at least 3.
        edge_weight: (C, K) floating, weight of each class and size in the edge term; rows usually
            sum to 1. Default 1/K. Differentiable.
        non_edge_weight: (C, K), likewise for the non-edge term.
        edge_lambda: factor of the edge term, at least 0.
        non_edge_lambda: factor of the non-edge term, at least 0.
        margin, eps, ignore_index, variant: see :func:`affinity_field_terms`.
        normalizer: (2, K) of int32 or int64, the numbers of edge and of non-edge entries to divide
            by, in place of the batch's own: :meth:`AffinityFieldLoss.normalizer`. The losses of the
            parts of a batch, each divided by the numbers of all of it, add up to its loss.
        process_group: None: the loss of this process's batch. A group: the loss of the batches of
            all its processes as one, which must all call it; see :func:`distributed.all_reduce`.
            The same in each of them, with gradients multiplied by their number, which the averaging
            of DistributedDataParallel and FSDP cancels.

    Returns:
        A scalar: float32, float64 for float64 logits. In nats.

    Raises:
        TypeError, ValueError: as :func:`affinity_field_terms`; weights or a normalizer of a wrong
            type, dtype, shape or device; a wrong process_group.

    Paper: Ke et al., ECCV 2018, Eq. 7 with given weights; lambda is 1 there, added to
    cross-entropy. :class:`AdaptiveAffinityFieldLoss` learns the weights. The authors' code gives
    NaN on a batch without edges.

    Example:
        >>> import torch, tritonaff
        >>> logits = torch.randn(2, 4, 16, 16, requires_grad=True)
        >>> target = torch.randint(0, 4, (2, 16, 16))
        >>> loss = torch.nn.functional.cross_entropy(logits, target, ignore_index=255)
        >>> loss = loss + tritonaff.affinity_field_loss(logits, target, kernel_sizes=(3, 5))
        >>> loss.backward()
    """
    return affinity_field_and_cross_entropy(
        logits,
        target,
        kernel_sizes,
        progress=None,
        cross_entropy=False,
        weight=None,
        edge_weight=edge_weight,
        non_edge_weight=non_edge_weight,
        edge_lambda=edge_lambda,
        non_edge_lambda=non_edge_lambda,
        margin=margin,
        eps=eps,
        ignore_index=ignore_index,
        variant=variant,
        normalizer=normalizer,
        process_group=process_group,
    )


def affinity_field_cross_entropy(
    logits: Tensor,
    target: Tensor,
    kernel_sizes: Sequence[int] = (3,),
    *,
    weight: Tensor | None = None,
    edge_weight: Tensor | None = None,
    non_edge_weight: Tensor | None = None,
    edge_lambda: float = 1.0,
    non_edge_lambda: float = 1.0,
    margin: float = 3.0,
    eps: float = 1e-4,
    ignore_index: int = 255,
    variant: str = "paper",
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    r"""Cross-entropy plus the affinity field loss, in one operation that reads the logits once less
    than the two.

    .. math:: L = \frac{\sum_i w_{y_i} \, (-\log p_i(y_i))}{\sum_i w_{y_i}} + L_{affinity}

    over the pixels i that are not ignored, p = softmax(logits) unclamped, and the second term that
    of :func:`affinity_field_loss`. Without any such pixel it is 0 with a zero gradient, where
    :func:`torch.nn.functional.cross_entropy` gives NaN.

    Args:
        logits, target, kernel_sizes: see :func:`affinity_field_terms`.
        weight: (C,) floating, the weight w of each class in cross-entropy. Default 1.
        edge_weight, non_edge_weight, edge_lambda, non_edge_lambda: see
            :func:`affinity_field_loss`.
        margin, eps, ignore_index, variant: see :func:`affinity_field_terms`.
        process_group: see :func:`affinity_field_loss`; both terms are means over all processes.

    Returns:
        A scalar: float32, float64 for float64 logits. In nats.

    Raises:
        TypeError, ValueError: as :func:`affinity_field_loss`; ``weight`` of a wrong type, dtype,
            shape or device.

    Paper: Ke et al., ECCV 2018, Eq. 7 added to cross-entropy with lambda 1.

    Example:
        >>> import torch, tritonaff
        >>> logits = torch.randn(2, 4, 16, 16, requires_grad=True)
        >>> target = torch.randint(0, 4, (2, 16, 16))
        >>> loss = tritonaff.affinity_field_cross_entropy(logits, target, kernel_sizes=(3, 5))
        >>> loss.backward()
        >>> expected = torch.nn.functional.cross_entropy(logits, target)
        >>> expected += tritonaff.affinity_field_loss(logits, target, kernel_sizes=(3, 5))
        >>> torch.allclose(loss, expected)
        True
    """
    return affinity_field_and_cross_entropy(
        logits,
        target,
        kernel_sizes,
        progress=None,
        cross_entropy=True,
        weight=weight,
        edge_weight=edge_weight,
        non_edge_weight=non_edge_weight,
        edge_lambda=edge_lambda,
        non_edge_lambda=non_edge_lambda,
        margin=margin,
        eps=eps,
        ignore_index=ignore_index,
        variant=variant,
        normalizer=None,
        process_group=process_group,
    )


def affinity_field_and_cross_entropy(
    logits: Tensor,
    target: Tensor,
    kernel_sizes: Sequence[int],
    *,
    progress: float | Tensor | None,
    cross_entropy: bool,
    weight: Tensor | None,
    weight_name: str = "weight",
    edge_weight: Tensor | None,
    non_edge_weight: Tensor | None,
    edge_lambda: float,
    non_edge_lambda: float,
    margin: float,
    eps: float,
    ignore_index: int,
    variant: str,
    normalizer: Tensor | None,
    process_group: dist.ProcessGroup | None,
) -> Tensor:
    """What functions and modules share: the affinity field loss, less of it with progress, and
    cross-entropy where it is asked for.
    """
    # Everything is checked before the first collective: a process that refused after it would leave
    # the others waiting.
    logits, target = checks.check_logits_and_target(logits, target)
    kernel_sizes = checks.check_kernel_sizes(kernel_sizes)
    edge_lambda = checks.check_number("edge_lambda", edge_lambda, at_least=0)
    non_edge_lambda = checks.check_number("non_edge_lambda", non_edge_lambda, at_least=0)
    by_class, by_size = (logits.shape[1],), (logits.shape[1], len(kernel_sizes))
    weight = checks.check_weight(weight_name, weight, by_class, logits)
    weights = (
        checks.check_weight("edge_weight", edge_weight, by_size, logits),
        checks.check_weight("non_edge_weight", non_edge_weight, by_size, logits),
    )
    progress = checks.check_progress(progress)
    if normalizer is not None:
        shape = 2, len(kernel_sizes)
        normalizer = checks.check_normalizer(normalizer, shape, "logits", logits)
    checks.check_process_group(process_group)
    totals, counts, sums = affinity_field_counts(
        logits,
        target,
        kernel_sizes,
        margin=margin,
        eps=eps,
        ignore_index=ignore_index,
        variant=variant,
    )
    pixel_count = counts[: logits.shape[1], -1]
    if normalizer is not None:
        totals = normalizer
    totals, pixel_count = all_reduce((totals, pixel_count), process_group)

    coefficients = _coefficients(weights, (edge_lambda, non_edge_lambda), totals, logits)
    if progress is not None:
        coefficients = coefficients * _decay(progress, coefficients)
    of_log_loss = _coefficients_of_log_loss(weight, pixel_count, logits) if cross_entropy else None
    if current_backend() != "reference":
        coefficients = _differentiable_once(coefficients, logits)
        if of_log_loss is not None:
            of_log_loss = _differentiable_once(of_log_loss, logits)
    tables, log_loss, zero = sums(coefficients, of_log_loss)
    tables, log_loss = all_reduce((tables, log_loss), process_group)
    loss = (coefficients * tables).sum()
    if of_log_loss is not None:
        loss = loss + (of_log_loss * log_loss).sum()
    if zero is not None:
        # Not in the collective, in which all processes must have the same tables.
        loss = loss + (zero if process_group is None else process_group.size() * zero)
    return loss


def _differentiable_once(coefficients: Tensor, logits: Tensor) -> Tensor:
    if coefficients.requires_grad and logits.requires_grad and torch.is_grad_enabled():
        guarded: Tensor = affinity_field_coefficients_op(coefficients, logits)
        return guarded
    return coefficients


def _decay(progress: float | Tensor, coefficients: Tensor) -> float | Tensor:
    """10 ** -progress, a tensor if progress is one."""
    if isinstance(progress, Tensor):
        return torch.pow(10.0, -progress).to(coefficients.dtype)
    return float(10.0**-progress)


def _coefficients_of_log_loss(weight: Tensor | None, pixel_count: Tensor, logits: Tensor) -> Tensor:
    """(C,), which make the weighted mean over pixels; 0 where their weights are."""
    dtype = precision(logits)
    if weight is None:
        total = pixel_count.sum()
        mean = torch.where(total > 0, total.to(dtype).reciprocal(), 0)
        return mean.expand(pixel_count.shape).contiguous()
    weight = weight.to(dtype)
    total = (pixel_count * weight).sum()
    return weight * torch.where(total != 0, total.reciprocal(), 0)


def _coefficients(
    weights: tuple[Tensor | None, Tensor | None],
    lambdas: tuple[float, float],
    totals: Tensor,
    logits: Tensor,
) -> Tensor:
    """(2, C, K), which make the sums over sizes of lambda * weighted sum over classes / total; 0
    where nothing counts.
    """
    dtype, shape = precision(logits), (logits.shape[1], totals.shape[1])
    # The coefficient of an empty size is 0, not 1: beside the others' 1 / millions, 1 would drown
    # them in rounding.
    of_size = torch.where(totals > 0, totals.to(dtype).reciprocal(), 0)[:, None]
    if lambdas[0] == lambdas[1]:
        of_size = lambdas[0] * of_size
    else:  # not a stack of two: that would be a launch for each under torch.compile
        is_edge = torch.arange(2, device=totals.device)[:, None, None] == 0
        of_size = torch.where(is_edge, lambdas[0] * of_size, lambdas[1] * of_size)
    if weights[0] is None and weights[1] is None:
        return (of_size / shape[1]).expand(2, *shape).contiguous()
    tables = [
        of_size.new_full(shape, 1 / shape[1]) if weight is None else weight.to(dtype)
        for weight in weights
    ]
    return torch.stack(tables) * of_size


class AffinityRegressionTerms(NamedTuple):
    """What the affinity regression loss is made of, each of shape (N,)."""

    squared_error: Tensor
    """Sum of (A - M)^2 over the pairs of points; float32, float64 for float64 logits.
    Differentiable.
    """
    pair_count: Tensor
    """Number of pairs, the square of the number of points that count; int64."""


def affinity_regression_terms(
    logits: Tensor,
    target: Tensor,
    grid_sizes: Sequence[int] | None = (12, 6),
    *,
    ignore_index: int = 255,
) -> AffinityRegressionTerms:
    r"""Squared error between the square-root affinity and the label affinity of each image.

    With S = sqrt(softmax(logits)) at L sample points and their labels y,

    .. math:: E = \sum_{ij} (A_{ij} - M_{ij})^2, \quad A = S^T S, \quad M_{ij} = [y_i = y_j]

    over all pairs of points that are not ignored, i = j included. The points of a grid size g are
    the rows floor(i H / g) and columns floor(j W / g), i, j = 0 ... g - 1, as nearest-neighbour
    interpolation takes them, and L is the sum of the g^2. No L x L matrix is built. Time is linear
    in L, except on a GPU for grids of up to 4096 points, where comparing all pairs is as quick: so
    ``grid_sizes=None``, every pixel, is as good as any other choice.

    Args:
        logits: (N, C, H, W) of float16, bfloat16, float32 or float64, any strides. Half precision
            is read as it is and computed in float32.
        target: (N, H, W) of uint8, int32 or int64.
        grid_sizes: at least one size, each at least 1; grids finer than the image repeat pixels.
            None: every pixel.
        ignore_index: label of the points to leave out, see :func:`affinity_field_terms`.

    Returns:
        :class:`AffinityRegressionTerms`. Differentiable with respect to the logits: once, in
        reverse mode; finite where a probability underflows.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device or range. A label outside [0, C) other than ignore_index
            raises in eager mode on the CPU; elsewhere such points are ignored. With the backend
            "reference", matrices that do not fit.

    Paper: Cao, "Use Square Root Affinity to Regress Label in Semantic Segmentation", Eq. 3 to 6.
    It knows no ignored points, and names grids of 12 and 6.

    Example:
        >>> import torch, tritonaff
        >>> logits = torch.zeros(1, 2, 1, 2)  # two undecided pixels: their affinity is 1
        >>> target = torch.tensor([[[0, 1]]])  # of two classes: it should be 0, twice
        >>> terms = tritonaff.affinity_regression_terms(logits, target, grid_sizes=None)
        >>> terms.squared_error.tolist(), terms.pair_count.tolist()
        ([2.0], [4])
    """
    logits, target = checks.check_logits_and_target(logits, target)
    grid_sizes = checks.check_grid_sizes(grid_sizes)
    ignore_index = checks.check_ignore_index(ignore_index)
    checks.check_label_values(target, logits.shape[1], ignore_index)

    backend = current_backend()
    if backend == "reference":
        from tritonaff.reference.affinity_regression import affinity_regression_terms as reference

        checks.check_matrices_fit(logits, grid_sizes)
        with without_autocast(logits):
            terms = reference(logits, target, grid_sizes, ignore_index=ignore_index)
        return AffinityRegressionTerms(*terms)
    squared_error, pair_count, _ = affinity_regression_op(
        logits, target, grid_sizes or (), ignore_index, backend
    )
    return AffinityRegressionTerms(squared_error, pair_count)


def affinity_regression_loss(
    logits: Tensor,
    target: Tensor,
    grid_sizes: Sequence[int] | None = (12, 6),
    *,
    ignore_index: int = 255,
    normalizer: Tensor | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    r"""The affinity regression loss: points of one label agree, points of two labels differ, at any
    distance.

    The mean over images of squared_error / pair_count of :func:`affinity_regression_terms`: a mean
    square. Images without any point that counts are left out; without any such image it is 0 with
    a zero gradient.

    Args:
        logits, target, grid_sizes, ignore_index: see :func:`affinity_regression_terms`.
        normalizer: int32 or int64 scalar, the number of images to divide by, in place of the
            batch's own: :meth:`AffinityRegressionLoss.normalizer`.
        process_group: see :func:`affinity_field_loss`; the mean is over the images of all
            processes.

    Returns:
        A scalar in [0, 1]: float32, float64 for float64 logits.

    Raises:
        TypeError, ValueError: as :func:`affinity_regression_terms`; a normalizer of a wrong type,
            dtype, shape or device; a wrong process_group.

    Paper: Cao, Eq. 6; added to cross-entropy with the weight 0.1 (Eq. 7) when training with
    cross-entropy alone has reached its peak.

    Example:
        >>> import torch, tritonaff
        >>> logits = torch.randn(2, 4, 32, 32, requires_grad=True)
        >>> target = torch.randint(0, 4, (2, 32, 32))
        >>> loss = torch.nn.functional.cross_entropy(logits, target, ignore_index=255)
        >>> loss = loss + 0.1 * tritonaff.affinity_regression_loss(logits, target)
        >>> loss.backward()
    """
    logits, target = checks.check_logits_and_target(logits, target)
    if normalizer is not None:
        normalizer = checks.check_normalizer(normalizer, (), "logits", logits)
    checks.check_process_group(process_group)
    squared_error, pair_count = affinity_regression_terms(
        logits, target, grid_sizes, ignore_index=ignore_index
    )
    counted = pair_count > 0
    mean_square = squared_error * counted / pair_count.clamp(min=1)
    images = counted.sum() if normalizer is None else normalizer
    total, images = all_reduce((mean_square.sum(), images), process_group)
    return total / images.clamp(min=1)


def square_root_affinity(logits: Tensor, grid_sizes: Sequence[int] | None = (12, 6)) -> Tensor:
    r"""The affinity of all pairs of sample points that the logits predict, as matrices.

    .. math:: A_{ij} = \sum_c \sqrt{p_i(c) \, p_j(c)}, \quad p = softmax(logits)

    the Bhattacharyya coefficient of two predictions: in [0, 1], and 1 exactly if they are equal.

    Args:
        logits: (N, C, H, W) of float16, bfloat16, float32 or float64, any strides.
        grid_sizes: where the L points are, see :func:`affinity_regression_terms`. None: every
            pixel, L = H W.

    Returns:
        (N, L, L): float32, float64 for float64 logits. Differentiable: once, in reverse mode.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape or size; matrices of more than 8 GB.

    Paper: Cao, Eq. 5 and 8. :func:`tritonaff.plotting.plot_affinity` draws it as the paper's Fig. 4
    does.

    Example:
        >>> import torch, tritonaff
        >>> logits = torch.tensor([[[[9.0, 9.0]], [[0.0, 0.0]]]])  # two pixels that agree
        >>> tritonaff.square_root_affinity(logits, grid_sizes=None).round(decimals=3).tolist()
        [[[1.0, 1.0], [1.0, 1.0]]]
    """
    logits = checks.check_logits(logits)
    grid_sizes = checks.check_grid_sizes(grid_sizes)
    checks.check_matrices_fit(logits, grid_sizes)
    backend = current_backend()
    if backend == "reference":
        from tritonaff.reference.affinity_regression import square_root_affinity as reference

        with without_autocast(logits):
            return reference(logits, grid_sizes)
    affinity: Tensor = square_root_affinity_op(logits, grid_sizes or (), backend)
    return affinity


def label_affinity(
    target: Tensor, grid_sizes: Sequence[int] | None = (12, 6), ignore_index: int = 255
) -> tuple[Tensor, Tensor]:
    """The affinity of all pairs of sample points that the labels ask for, as matrices.

    Args:
        target: (N, H, W) of uint8, int32 or int64, see :func:`dilated_affinity_target`.
        grid_sizes: where the L points are, see :func:`affinity_regression_terms`. None: every
            pixel, L = H W.
        ignore_index: label of the points that do not count.

    Returns:
        affinity: (N, L, L) float32, 1 where two points that count have the same label, else 0.
        valid: (N, L) bool, which points count.

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
    if current_backend() == "reference":
        from tritonaff.reference.affinity_regression import label_affinity as reference

        return reference(target, grid_sizes, ignore_index)
    return label_affinity_op(target, list(grid_sizes or ()), ignore_index)


def dilated_affinity_target(
    target: Tensor, rates: Sequence[int | tuple[int, int]], *, ignore_index: int = 255
) -> Tensor:
    """What an affinity head should predict: whether a pixel and its neighbours have one label.

    For people and tests; the loss never builds it.

    Args:
        target: (N, H, W) of uint8, int32 or int64. Any label of at least 0 but ignore_index is a
            class: how many there are is not known here.
        rates: R distinct rates; a pair (r1, r2) is r1 rows and r2 columns, an int r is (r, r). What
            is outside the image is no neighbour. The paper's bracket notation:
            :func:`expand_rates`.
        ignore_index: label of the pixels to leave out.

    Returns:
        (N, 8 R, H, W) of uint8: 1 for the same label, 0 for a different one, 255 where one of the
        two pixels is outside or ignored. Channels are rate by rate and, within a rate (r1, r2), the
        neighbours at {-r1, 0, r1} rows x {-r2, 0, r2} columns without the centre, row by row.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape or range. A label below 0 other than ignore_index raises in eager
            mode on the CPU; elsewhere it is a class.

    Paper: "Improving Semantic Segmentation via Dilated Affinity", Eq. 1 to 3.

    Example:
        >>> import torch, tritonaff
        >>> target = torch.tensor([[[7, 7, 4]]])
        >>> left, right = tritonaff.dilated_affinity_target(target, rates=[1])[0, 3:5]
        >>> left.tolist(), right.tolist()
        ([[255, 1, 0]], [[1, 0, 255]])
    """
    target = checks.check_target(target)
    pairs = checks.check_rates(rates)
    ignore_index = checks.check_ignore_index(ignore_index)
    checks.check_label_values(target, None, ignore_index)
    if current_backend() == "reference":
        from tritonaff.reference.dilated_affinity import dilated_affinity_target as reference

        return reference(target, pairs, ignore_index=ignore_index)
    signals: Tensor = dilated_affinity_target_op(target, rate_offsets(pairs), ignore_index)
    return signals


class NeighborCounts(NamedTuple):
    """How many pixels and signals are in each neighbour category, at each of R rates; int64.

    Tables add up: those of a data set are the sums of those of its images.
    """

    pixel_count: Tensor
    """(R, 9): pixels of category n0 ... n8."""
    signal_count: Tensor
    """(R, 9, 2): signals of those pixels by target, (different, same)."""


def neighbor_counts(
    target: Tensor, rates: Sequence[int | tuple[int, int]], *, ignore_index: int = 255
) -> NeighborCounts:
    """Pixels and signals by rate and neighbour category: what a data set's statistics add up.

    Args:
        target, rates, ignore_index: see :func:`dilated_affinity_target`.

    Returns:
        :class:`NeighborCounts` on the target's device; categories as :func:`neighbor_categories`
        defines them.

    Raises:
        TypeError, ValueError: as :func:`dilated_affinity_target`.

    Example:
        >>> import torch
        >>> from tritonaff.functional import neighbor_counts
        >>> counts = neighbor_counts(torch.tensor([[[0, 0, 0, 1]]]), rates=[1])
        >>> counts.pixel_count[0, 7:].tolist(), counts.signal_count[0, 7:].tolist()
        ([2, 2], [[2, 1], [0, 3]])
    """
    target = checks.check_target(target)
    pairs = checks.check_rates(rates)
    ignore_index = checks.check_ignore_index(ignore_index)
    checks.check_label_values(target, None, ignore_index)
    if current_backend() == "reference":
        from tritonaff.reference.dilated_affinity import neighbor_counts as reference

        return NeighborCounts(*reference(target, pairs, ignore_index=ignore_index))
    counts = neighbor_counts_op(target, rate_offsets(pairs), ignore_index)
    return NeighborCounts(*counts)


def neighbor_categories(
    target: Tensor, rates: Sequence[int | tuple[int, int]], *, ignore_index: int = 255
) -> Tensor:
    """How many pixels have how many neighbours of their own label: n0 ... n8.

    The category of a pixel at a rate is 8 minus the number of its valid neighbours with a different
    label; a neighbour is valid if it is in the image and neither pixel is ignored. A pixel counts
    if it has a valid neighbour.

    Args:
        target, rates, ignore_index: see :func:`dilated_affinity_target`.

    Returns:
        (R, 9) int64 on the target's device.

    Raises:
        TypeError, ValueError: as :func:`dilated_affinity_target`.

    Paper: "Improving Semantic Segmentation via Dilated Affinity", Sec. 3.2 and Fig. 3. It speaks of
    full neighbourhoods only; here the border of a uniform region is n8, as its inside is.

    Example:
        >>> import torch, tritonaff
        >>> target = torch.tensor([[[0, 0, 0, 1]]])
        >>> tritonaff.neighbor_categories(target, rates=[1]).tolist()  # two of n7, two of n8
        [[0, 0, 0, 0, 0, 0, 0, 2, 2]]
    """
    return neighbor_counts(target, rates, ignore_index=ignore_index).pixel_count


class DilatedAffinityTerms(NamedTuple):
    """Sums and counts of dilated affinity by rate and neighbour category n0 ... n8.

    The last index of the first three is the target, (different, same). Tables add up: those of a
    batch are the sums of those of its images.
    """

    loss_sum: Tensor
    """(R, 9, 2): sum of the focal loss over signals; float32, float64 for float64 logits.
    Differentiable.
    """
    signal_count: Tensor
    """(R, 9, 2): number of signals; int64."""
    correct_count: Tensor
    """(R, 9, 2): of those, the ones predicted right; int64. ``correct_count / signal_count`` is the
    accuracy.
    """
    pixel_count: Tensor
    """(R, 9): number of pixels; int64."""


def dilated_affinity_terms(
    affinity_logits: Tensor,
    target: Tensor,
    rates: Sequence[int | tuple[int, int]],
    *,
    gamma: float = 2.0,
    ignore_index: int = 255,
) -> DilatedAffinityTerms:
    r"""The sums and counts that dilated affinity losses are made of, in one pass over the logits.

    A signal is a pixel and one of its 8 neighbours at a rate. Its target y is 1 if the two have the
    same label, else 0; with p the sigmoid of its logit x its loss is

    .. math:: FL = -(1 - p_t)^\gamma \log p_t, \quad p_t = p \text{ if } y = 1 \text{ else } 1 - p

    computed as exp(-gamma softplus(u)) softplus(-u), u = x or -x: finite, with finite gradients,
    for every logit. It is predicted right if (x > 0) = (y = 1). Signals with a pixel outside the
    image or ignored do not count.

    Args:
        affinity_logits: (N, 8 R, H, W) of float16, bfloat16, float32 or float64, any strides, all
            finite; the channels are those of :func:`dilated_affinity_target`. Half precision is
            read as it is and computed in float32.
        target: (N, H, W) of uint8, int32 or int64, see :func:`dilated_affinity_target`.
        rates, ignore_index: see :func:`dilated_affinity_target`.
        gamma: the focusing parameter, at least 0; 0 is binary cross-entropy.

    Returns:
        :class:`DilatedAffinityTerms`, by the neighbour categories of :func:`neighbor_categories`.
        Differentiable with respect to the logits: once, in reverse mode.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device or range; labels as :func:`dilated_affinity_target`.

    Paper: "Improving Semantic Segmentation via Dilated Affinity", Eq. 1 to 4.

    Example:
        >>> import torch, tritonaff
        >>> logits = torch.full((1, 8, 1, 2), 3.0)  # all the same, says the network
        >>> target = torch.tensor([[[0, 1]]])  # two pixels of two labels: n7, both of them
        >>> terms = tritonaff.dilated_affinity_terms(logits, target, rates=[1])
        >>> terms.signal_count[0, 7].tolist(), terms.correct_count[0, 7].tolist()
        ([2, 0], [0, 0])
        >>> round(terms.loss_sum[0, 7, 0].item() / 2, 3)
        2.766
    """
    pairs = checks.check_rates(rates)
    affinity_logits, target = checks.check_affinity_logits_and_target(
        affinity_logits, target, len(pairs)
    )
    gamma = checks.check_number("gamma", gamma, at_least=0)
    ignore_index = checks.check_ignore_index(ignore_index)
    checks.check_label_values(target, None, ignore_index)

    backend = current_backend()
    if backend == "reference":
        from tritonaff.reference.dilated_affinity import dilated_affinity_terms as reference

        tables = reference(affinity_logits, target, pairs, gamma=gamma, ignore_index=ignore_index)
        return DilatedAffinityTerms(*tables)
    tables = dilated_affinity_op(
        affinity_logits, target, rate_offsets(pairs), gamma, ignore_index, backend
    )
    return DilatedAffinityTerms(*tables)


def dilated_affinity_loss(
    affinity_logits: Tensor,
    target: Tensor,
    rates: Sequence[int | tuple[int, int]],
    *,
    weighting: str = "sqrt",
    statistics: Any = None,
    gamma: float = 2.0,
    beta: float = 1.0,
    ignore_index: int = 255,
    normalizer: Tensor | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    r"""The dilated affinity loss: predict which neighbours share a pixel's label.

    .. math::

        L = \beta \sum_r \frac{1}{n_r} \sum_{k, t} w_{rkt} \, loss\_sum_{rkt},
        \quad n_r = \sum_k pixel\_count_{rk}

    on the tables of :func:`dilated_affinity_terms` and the weights of :func:`signal_weight`, which
    are constants for the gradient. A rate at which nothing counts contributes 0 with a zero
    gradient.

    Args:
        affinity_logits: (N, 8 R, H, W) floating, see :func:`dilated_affinity_terms`.
        target: (N, H, W) of uint8, int32 or int64, see :func:`dilated_affinity_target`.
        rates: see :func:`dilated_affinity_target`. The paper's sets, in its bracket notation, are
            {8, 16} (its best), {8, 16, 32}, {8, 16, 32, 64}, {8, (12, 24), 16} and
            {8, (12, 24), 16, (32, 64), 48}: small rates serve training, large ones propagation.
        weighting: ``"sqrt"`` (the paper's choice), ``"neighbor"``, ``"signal"`` or ``"none"``.
        statistics: the counts that the weights are computed from: ``NeighborStatistics`` of a data
            set with the same rates and ignore_index, or a pair (pixel_count (R, 9), signal_count
            (R, 9, 2)) of int32 or int64, on the logits' device. None: those of the batch, or of the
            normalizer; with a process_group, of all its processes.
        gamma: the focusing parameter, at least 0.
        beta: factor of the loss, at least 0. The paper's best, by weighting: 1.5 for sqrt, 0.25 for
            neighbor, 1.3 for signal, 1.1 for none (with gamma 0). The best depends on the
            normaliser, which the paper leaves open: with ours, try 0.1 first.
        ignore_index: label of the pixels to leave out.
        normalizer: (R, 9, 3) of int32 or int64, the counts to use in place of the batch's own,
            those of pixels and of signals (different, same):
            :meth:`DilatedAffinityLoss.normalizer`.
        process_group: see :func:`affinity_field_loss`.

    Returns:
        A scalar: float32, float64 for float64 logits. In nats.

    Raises:
        TypeError, ValueError: as :func:`dilated_affinity_terms`; an unknown weighting; statistics
            or a normalizer of a wrong type, dtype, shape (as of other rates) or device; a wrong
            process_group.

    Paper: "Improving Semantic Segmentation via Dilated Affinity", Eq. 5. It leaves the normaliser
    open: ours is the number of the batch's pixels that count at the rate. Its printed formula is
    that of "neighbor", its text and its best results are those of "sqrt".

    Example:
        >>> import torch, tritonaff
        >>> affinity_logits = torch.randn(2, 16, 32, 32, requires_grad=True)
        >>> target = torch.randint(0, 4, (2, 32, 32))
        >>> loss = tritonaff.dilated_affinity_loss(affinity_logits, target, [8, 16], beta=0.1)
        >>> loss.backward()
    """
    checks.check_option("weighting", weighting, WEIGHTINGS)
    beta = checks.check_number("beta", beta, at_least=0)
    pairs = checks.check_rates(rates)
    affinity_logits, target = checks.check_affinity_logits_and_target(
        affinity_logits, target, len(pairs)
    )
    given = checks.check_statistics(statistics, pairs, checks.check_ignore_index(ignore_index))
    for count in given or ():
        checks.check_one_device("statistics", count, "affinity_logits", affinity_logits)
    if normalizer is not None:
        shape = len(pairs), 9, 3
        normalizer = checks.check_normalizer(normalizer, shape, "affinity_logits", affinity_logits)
    checks.check_process_group(process_group)
    loss_sum, signal_count, _, pixel_count = dilated_affinity_terms(
        affinity_logits, target, rates, gamma=gamma, ignore_index=ignore_index
    )
    if normalizer is not None:
        pixel_count, signal_count = normalizer[..., 0], normalizer[..., 1:]
    tables = loss_sum, signal_count, pixel_count
    loss_sum, signal_count, pixel_count = all_reduce(tables, process_group)
    weighed_by = given or (pixel_count, signal_count)
    weight = signal_weight(weighting, *(count.to(loss_sum.dtype) for count in weighed_by))
    total = (loss_sum * weight).sum(dim=(1, 2))
    counted = pixel_count.sum(dim=1)
    # The coefficient of a rate at which nothing counts is 0: see _coefficients.
    return beta * (total * (counted > 0) / counted.clamp(min=1)).sum()


def signal_weight(weighting: str, pixel_count: Tensor, signal_count: Tensor) -> Tensor:
    r"""What each signal weighs in the dilated affinity loss, by rate, neighbour category, target.

    ================  ============================================
    ``"none"``        1
    ``"neighbor"``    n8 / nk
    ``"sqrt"``        sqrt(n8 / nk)
    ``"signal"``      1 for same, same / different for different
    ================  ============================================

    with nk the pixels of category k at the rate, and same and different its signals in all
    categories. Every count n is n + 1 here: nothing divides by zero, and no missing category
    silences the loss. Pixels of category n8 weigh 1, but for "signal".

    Args:
        weighting: one of the four.
        pixel_count: (R, 9) counts, integer or floating.
        signal_count: (R, 9, 2) counts, likewise.

    Returns:
        (R, 9, 2), without a gradient: float32, float64 for float64 counts.

    Raises:
        ValueError: an unknown weighting.

    Paper: "Improving Semantic Segmentation via Dilated Affinity", Sec. 3.2 and Table 1.

    Example:
        >>> import torch
        >>> from tritonaff.functional import signal_weight
        >>> pixel_count = torch.tensor([[0, 0, 0, 0, 0, 0, 0, 3, 15]])
        >>> signal_weight("sqrt", pixel_count, torch.zeros(1, 9, 2))[0, 7:].tolist()
        [[2.0, 2.0], [1.0, 1.0]]
    """
    checks.check_option("weighting", weighting, WEIGHTINGS)
    dtype = precision(pixel_count)
    pixels = pixel_count.detach().to(dtype) + 1
    if weighting == "none":
        weight = torch.ones_like(pixels)
    elif weighting == "signal":
        different, same = (signal_count.detach().to(dtype).sum(dim=1) + 1).unbind(dim=1)
        weight = torch.stack((same / different, torch.ones_like(same)), dim=1)
        return weight[:, None].expand(-1, pixels.shape[1], -1)
    else:
        weight = pixels[:, -1:] / pixels
        if weighting == "sqrt":
            weight = weight.sqrt()
    return weight[:, :, None].expand(-1, -1, 2)


def affinity_propagation(
    probs: Tensor,
    affinity: Tensor,
    rates: Sequence[int | tuple[int, int]],
    *,
    iterations: int = 10,
    self_weight: float = 6.0,
    steepness: float = 7.0,
    from_logits: bool = True,
) -> Tensor:
    r"""Refines a segmentation: every pixel takes over from the neighbours that it is affine to.

    One iteration makes of the class probabilities p of every pixel i

    .. math::

        p'_i = N\Big(\lambda \, p_i \max_c p_i(c) + \sum_s a_{is} \, p_s\Big), \qquad
        a_{is} = \frac{\mu^{x_{is}}}{1 + \mu^{x_{is}}}

    where s runs over the neighbours of all rates that are inside the image, x is the affinity logit
    and N divides by the sum over classes. A sure pixel keeps its class, an unsure one follows its
    neighbours.

    Args:
        probs: (N, C, H, W) of float16, bfloat16, float32 or float64, any strides: probabilities,
            not logits. They need not sum to 1, but should be finite and not negative. Half
            precision is read as it is and iterated in float32.
        affinity: (N, 8 R, H, W) of the same dtypes, not necessarily that of ``probs``. Channels are
            rate by rate and, within a rate (r1, r2), the neighbours at {-r1, 0, r1} rows x {-r2, 0,
            r2} columns without the centre, row by row.
        rates: R distinct rates; a pair (r1, r2) is r1 rows and r2 columns, an int r is (r, r). No
            rate is too large for an image: what is outside is no neighbour. The paper's bracket
            notation: :func:`expand_rates`.
        iterations: how often; 0 gives a copy.
        self_weight: lambda, above 0.
        steepness: mu, above 1; e would be the ordinary sigmoid.
        from_logits: whether ``affinity`` holds logits x. If not, it is a itself, in [0, 1] (not
            checked), and steepness is of no effect.

    Returns:
        (N, C, H, W) in the dtype and memory format of ``probs``; sums to 1 over the classes. A
        pixel where the sum to divide by is 0 (all of its probabilities are, and nothing comes from
        neighbours) is 0, with a zero gradient. Differentiable with respect to ``probs`` and
        ``affinity``: once, in reverse mode. The backward pass computes the iterations again and
        holds them all.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device or range.

    Paper: "Improving Semantic Segmentation via Dilated Affinity", Eq. 6 and 7. Copies of it that
    lost the exponent show Eq. 7 as mu x / (1 + mu x); only the power is the steeper sigmoid that
    the text describes. The paper leaves open what happens at the border and how max is
    differentiated: we sum over the neighbours inside, and max passes its gradient to the first of
    the largest classes, as ``torch.max(dim)`` does.

    Example:
        >>> import torch, tritonaff
        >>> probs = torch.tensor([0.9, 0.6, 0.4]).view(1, 1, 1, 3)  # one row of three pixels
        >>> probs = torch.cat((probs, 1 - probs), dim=1)  # the third one is of the other class
        >>> affinity = torch.full((1, 8, 1, 3), 5.0)  # but affine to its neighbour
        >>> tritonaff.affinity_propagation(probs, affinity, rates=[1]).argmax(dim=1).tolist()
        [[[0, 0, 0]]]
    """
    pairs = checks.check_rates(rates)
    probs, affinity = checks.check_probs_and_affinity(probs, affinity, len(pairs))
    iterations = checks.check_int("iterations", iterations, at_least=0)
    self_weight = checks.check_number("self_weight", self_weight, above=0)
    steepness = checks.check_number("steepness", steepness, above=1)
    from_logits = checks.check_bool("from_logits", from_logits)

    backend = current_backend()
    if backend == "reference":
        from tritonaff.reference.affinity_propagation import affinity_propagation as reference

        return reference(
            probs,
            affinity,
            pairs,
            iterations=iterations,
            self_weight=self_weight,
            steepness=steepness,
            from_logits=from_logits,
        )
    flat_rates = [rate for pair in pairs for rate in pair]
    result: Tensor = affinity_propagation_op(
        probs, affinity, flat_rates, iterations, self_weight, steepness, from_logits, backend
    )
    return result
