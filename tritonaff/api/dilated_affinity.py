"""Dilated affinity: a head predicts which neighbours share a pixel's label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch import distributed as dist

from tritonaff import checks
from tritonaff.api.module import Loss, LossAndTerms, by_image
from tritonaff.api.neighbors import NeighborStatistics, neighbor_counts, signal_weight
from tritonaff.distributed import all_reduce
from tritonaff.ops import dilated_affinity as ops
from tritonaff.options import (
    DilatedAffinityOptions,
    Rates,
    Reduction,
    Weighting,
    dilated_affinity_options,
)
from tritonaff.rates import DIRECTIONS


class NeighborCountsLike(Protocol):
    """Counts by rate and neighbour category, as :class:`tritonaff.NeighborStatistics` has them."""

    pixel_count: Tensor
    """(R, 9): pixels."""
    signal_count: Tensor
    """(R, 9, 2): signals, (different, same)."""


Statistics = NeighborCountsLike | Sequence[Any]


class DilatedAffinityTerms(NamedTuple):
    """Sums and counts of dilated affinity by rate and neighbour category n0 ... n8.

    The last index of the first three tables is the target, (different, same). The tables of a batch
    are the sums of its images' tables.
    """

    loss_sum: Tensor
    """(R, 9, 2): sum of the focal loss over signals; float32, float64 for float64 logits.
    Differentiable.
    """
    signal_count: Tensor
    """(R, 9, 2): number of signals; int64."""
    correct_count: Tensor
    """(R, 9, 2): number of signals predicted right; int64. ``correct_count / signal_count`` is the
    accuracy.
    """
    pixel_count: Tensor
    """(R, 9): number of pixels; int64."""


def dilated_affinity_terms(
    affinity_logits: Tensor,
    target: Tensor,
    rates: Rates,
    *,
    gamma: float = 2.0,
    ignore_index: int | None = 255,
) -> DilatedAffinityTerms:
    r"""Sums and counts from which dilated affinity losses are computed, in one pass over logits.

    A signal is a pixel and one of its 8 neighbours at a rate. The target y of the signal is 1 if
    the two have the same label, else 0; with p the sigmoid of the logit x, the loss of a signal is

    .. math:: FL = -(1 - p_t)^\gamma \log p_t, \quad p_t = p \text{ if } y = 1 \text{ else } 1 - p

    computed as exp(-gamma softplus(u)) softplus(-u), u = x or -x: finite, with finite gradients,
    for every logit. A signal is predicted right if (x > 0) = (y = 1). Signals with a pixel that is
    ignored or outside the image do not count.

    Args:
        affinity_logits: (N, 8 R, H, W) of float16, bfloat16, float32 or float64, any strides, all
            finite, with the channels of :func:`dilated_affinity_target`. Half precision is read as
            it is and computed in float32.
        target: (N, H, W) or (N, 1, H, W), of an integer dtype, bool, or floating point that holds
            whole numbers (looked at on a CPU, in eager mode).
        rates: R distinct rates, in pixels of the logits; a pair (r1, r2) is r1 rows and r2 columns,
            an int r is (r, r).
        ignore_index: label of the pixels to leave out; None if there is no such label.
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
    options = dilated_affinity_options(rates, gamma=gamma, ignore_index=ignore_index)
    return _terms(*_checked(affinity_logits, target, options), options)


def dilated_affinity_loss(
    affinity_logits: Tensor,
    target: Tensor,
    rates: Rates,
    *,
    weighting: Weighting = "sqrt",
    statistics: Statistics | None = None,
    gamma: float = 2.0,
    beta: float = 1.0,
    ignore_index: int | None = 255,
    reduction: Reduction = "mean",
    normalizer: Tensor | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    r"""The dilated affinity loss: the head predicts which neighbours share a pixel's label.

    .. math::

        L = \beta \sum_r \frac{1}{n_r} \sum_{k, t} w_{rkt} \, loss\_sum_{rkt},
        \quad n_r = \sum_k pixel\_count_{rk}

    with the tables of :func:`dilated_affinity_terms` and the weights of :func:`signal_weight`,
    which are constants for the gradient. A rate at which nothing counts contributes 0 with a zero
    gradient.

    Args:
        affinity_logits: (N, 8 R, H, W) of float16, bfloat16, float32 or float64, any strides, all
            finite. Channels are ordered by rate and, within a rate (r1, r2), by neighbour:
            {-r1, 0, r1} rows x {-r2, 0, r2} columns without the centre, row by row.
        target: (N, H, W) or (N, 1, H, W), of an integer dtype, bool, or floating point that holds
            whole numbers (looked at on a CPU, in eager mode).
        rates: R distinct rates, in pixels of the logits; a pair (r1, r2) is r1 rows and r2 columns,
            an int r is (r, r). The paper's sets, in its bracket notation, are
            {8, 16} (its best), {8, 16, 32}, {8, 16, 32, 64}, {8, (12, 24), 16} and
            {8, (12, 24), 16, (32, 64), 48}: small rates serve training, large ones propagation.
        weighting: ``"sqrt"`` (the paper's choice), ``"neighbor"``, ``"signal"`` or ``"none"``.
        statistics: the counts that the weights are computed from: ``NeighborStatistics`` of a data
            set with the same rates and ignore_index, or a pair (pixel_count (R, 9), signal_count
            (R, 9, 2)) of int32 or int64, on the logits' device. None: the counts of the batch, or
            of the normalizer; with a process_group, the counts of all its processes.
        gamma: the focusing parameter, at least 0.
        beta: factor of the loss, at least 0. The paper's best, by weighting: 1.5 for sqrt, 0.25 for
            neighbor, 1.3 for signal, 1.1 for none (with gamma 0). The best depends on the
            normaliser, which the paper leaves open: with ours, try 0.1 first.
        ignore_index: label of the pixels to leave out; None if there is no such label.
        reduction: ``"mean"``: all images are one batch. ``"none"``: the loss of each image as a
            batch of its own, with as many launches as there are images. No ``"sum"``: each rate is
            a mean over a number of its own.
        normalizer: (R, 9, 3) of int32 or int64, counts (pixels, different signals, same signals) to
            use in place of the batch's own; :meth:`DilatedAffinityLoss.normalizer` counts them.
        process_group: None: the loss of this process's batch. A group: the loss of all its
            processes' batches as one batch, for which every process must call; its gradient is
            multiplied by the number of processes, a factor that averaging of gradients cancels.

    Returns:
        A scalar, or (N,) with ``reduction="none"``: float32, float64 for float64 logits. In nats.

    Raises:
        TypeError, ValueError: as :func:`dilated_affinity_terms`; an unknown weighting; statistics
            or a normalizer of a wrong type, dtype, shape (of other rates, for example) or device; a
            wrong process_group; a normalizer or a process_group with ``reduction="none"``.

    Paper: "Improving Semantic Segmentation via Dilated Affinity", Eq. 5. The paper leaves the
    normaliser open: ours is the number of the batch's pixels that count at the rate. The printed
    formula is "neighbor"; the text and the best results of the paper are "sqrt".

    Example:
        >>> import torch, tritonaff
        >>> affinity_logits = torch.randn(2, 16, 32, 32, requires_grad=True)
        >>> target = torch.randint(0, 4, (2, 32, 32))
        >>> loss = tritonaff.dilated_affinity_loss(affinity_logits, target, [8, 16], beta=0.1)
        >>> loss.backward()
    """
    options = dilated_affinity_options(
        rates, weighting=weighting, gamma=gamma, beta=beta, ignore_index=ignore_index,
        reduction=reduction,
    )  # fmt: skip
    given = checks.check_statistics(statistics, options.rates, options.ignore_index)
    loss, _ = _loss(affinity_logits, target, options, given, normalizer, process_group)
    return loss


class DilatedAffinityLoss(Loss):
    """:func:`tritonaff.dilated_affinity_loss` with fixed options.

    Args:
        rates: R distinct rates, in pixels of the logits; a pair (r1, r2) is r1 rows and r2 columns,
            an int r is (r, r).
        weighting: ``"sqrt"`` (the paper's choice), ``"neighbor"``, ``"signal"`` or ``"none"``.
        statistics: the counts that the weights are computed from: ``NeighborStatistics`` of a data
            set with the same rates and ignore_index, or a pair (pixel_count (R, 9), signal_count
            (R, 9, 2)) of int32 or int64. They are copied into buffers, which move with the module.
            None: the counts of each batch.
        gamma: the focusing parameter, at least 0.
        beta: factor of the loss, at least 0; try 0.1 first.
        ignore_index: label of the pixels to leave out; None if there is no such label.
        reduction: ``"mean"``: all images are one batch. ``"none"``: the loss of each image, (N,).
        process_group: None: the loss of this process's batch. A group: the loss of all its
            processes' batches as one batch, for which every process must call; its gradient is
            multiplied by the number of processes, a factor that averaging of gradients cancels.

    Shapes:
        ``loss(affinity_logits, target)`` with affinity_logits (N, 8 R, H, W) and target (N, H, W)
        gives a scalar, or (N,) with ``reduction="none"``; :meth:`forward` has more arguments.

    Raises:
        TypeError, ValueError: a wrong option when the module is made, wrong tensors when it is
            called.

    Example:
        >>> import torch, tritonaff
        >>> rates = tritonaff.expand_rates([2, (2, 4)])
        >>> loss_fn = tritonaff.DilatedAffinityLoss(rates, beta=0.1)
        >>> affinity_logits = torch.randn(1, 8 * len(rates), 16, 16, requires_grad=True)
        >>> target = torch.randint(0, 3, (1, 16, 16))
        >>> loss_fn(affinity_logits, target).backward()
    """

    pixel_count: Tensor | None
    signal_count: Tensor | None

    def __init__(
        self,
        rates: Rates,
        *,
        weighting: Weighting = "sqrt",
        statistics: Statistics | None = None,
        gamma: float = 2.0,
        beta: float = 1.0,
        ignore_index: int | None = 255,
        reduction: Reduction = "mean",
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        options = dilated_affinity_options(
            rates, weighting=weighting, gamma=gamma, beta=beta, ignore_index=ignore_index,
            reduction=reduction,
        )  # fmt: skip
        super().__init__(options, process_group)
        given = checks.check_statistics(statistics, options.rates, options.ignore_index)
        for name, count in zip(("pixel_count", "signal_count"), given or (None, None), strict=True):
            self.register_buffer(name, None if count is None else count.detach().clone())

    def forward(
        self,
        affinity_logits: Tensor,
        target: Tensor,
        normalizer: Tensor | None = None,
        return_terms: bool = False,
    ) -> Any:
        """The loss of a batch.

        Args:
            affinity_logits: (N, 8 R, H, W) of float16, bfloat16, float32 or float64, by rate and
                neighbour.
            target: (N, H, W) or (N, 1, H, W), of an integer dtype, bool, or floating point that
                holds whole numbers (looked at on a CPU, in eager mode).
            normalizer: (R, 9, 3) of int32 or int64, counts (pixels, different signals, same
                signals) to use in place of the batch's own; :meth:`normalizer` counts them.
            return_terms: also return the terms, for logs: a dict of the detached terms by rate,
                ``"rate 8 x 8"``, which add up to the loss.

        Returns:
            A scalar, or (N,) with ``reduction="none"``: float32, float64 for float64 logits, in
            nats; with ``return_terms=True`` a pair (loss, terms).
        """
        checks.check_bool("return_terms", return_terms)
        given = None
        if self.pixel_count is not None and self.signal_count is not None:
            given = self.pixel_count, self.signal_count
        loss, terms = _loss(
            affinity_logits, target, self.options, given, normalizer, self.process_group
        )
        return (loss, terms) if return_terms else loss

    def normalizer(self, target: Tensor) -> Tensor:
        """Counts (pixels, different signals, same signals) of labels (N, H, W): (R, 9, 3) int64.
        Add up the counts of a batch's parts and give ``forward`` the total with every part.
        """
        options = self.options
        counts = neighbor_counts(target, options.rates, ignore_index=options.ignore_index)
        return torch.cat((counts.pixel_count[..., None], counts.signal_count), dim=-1)

    def extra_repr(self) -> str:
        statistics = "batch" if self.pixel_count is None else "given"
        return f"{super().extra_repr()}, statistics={statistics}"


class DilatedAffinityHead(nn.Conv2d):
    """Predicts dilated affinity from features: a 1 x 1 convolution whose first prediction is the
    frequency of "same label".

    Args:
        in_channels: number of channels of the features, at least 1.
        rates: R distinct rates, the same as for the loss and the propagation.
        positive_frequency: fraction of the signals whose target is "same", in (0, 1): one number
            for all rates, R numbers, or a :class:`tritonaff.NeighborStatistics` of the same rates,
            whose counts n are read as n + 1: frequencies of 0 and 1 give a finite bias too. None:
            0.5.

    Shapes:
        ``forward(features)`` with features (N, in_channels, H, W) gives logits (N, 8 R, H, W),
        with the channels of :func:`tritonaff.dilated_affinity_target`.

    Raises:
        TypeError, ValueError: a wrong option when the module is made.

    Paper: "Improving Semantic Segmentation via Dilated Affinity", Sec. 4.1. The paper prints the
    bias as -log(pi / (1 - pi)), after RetinaNet, whose formula is -log((1 - pi) / pi): only
    RetinaNet's formula predicts pi, the frequency of positive signals. As in RetinaNet, weights
    start with a standard deviation of 0.01: they hardly disturb this prediction.

    Example:
        >>> import torch, tritonaff
        >>> head = tritonaff.DilatedAffinityHead(256, rates=[8, 16], positive_frequency=[0.9, 0.8])
        >>> head(torch.zeros(1, 256, 4, 4)).sigmoid()[0, ::8, 0, 0].tolist()
        [0.8999999761581421, 0.800000011920929]
    """

    def __init__(
        self,
        in_channels: int,
        rates: Rates,
        positive_frequency: float | Sequence[float] | Tensor | NeighborStatistics | None = None,
    ) -> None:
        in_channels = checks.check_int("in_channels", in_channels, at_least=1)
        self.rates = checks.check_rates(rates)
        # Set before Conv2d's __init__, which calls reset_parameters.
        self.positive_frequency = _check_positive_frequency(positive_frequency, self.rates)
        super().__init__(in_channels, len(self.rates) * len(DIRECTIONS), kernel_size=1)

    def reset_parameters(self) -> None:
        assert self.bias is not None
        nn.init.normal_(self.weight, std=0.01)
        # On the host, whatever the default device: some devices have no float64.
        frequency = torch.tensor(self.positive_frequency, dtype=torch.float64, device="cpu")
        bias = frequency.logit().repeat_interleave(len(DIRECTIONS))
        with torch.no_grad():
            self.bias.copy_(_like(bias, self.bias))

    def extra_repr(self) -> str:
        frequency = ", ".join(f"{x:.4g}" for x in self.positive_frequency)
        return f"{self.in_channels}, rates={self.rates}, positive_frequency=({frequency})"


def _like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A tensor that all processes have alike, moved to the parameter's device and dtype, and made a
    DTensor if the parameter is a DTensor (FSDP).
    """
    tensor = tensor.to(parameter.dtype).to(parameter.device)
    if not hasattr(parameter, "device_mesh"):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)


def _check_positive_frequency(value: Any, rates: tuple[tuple[int, int], ...]) -> tuple[float, ...]:
    """One frequency for each rate."""
    if isinstance(value, NeighborStatistics):
        if value.rates != rates:
            raise ValueError(f"positive_frequency must be of the rates {rates}, got {value.rates}")
        different, same = (value.signal_count.cpu().double().sum(dim=1) + 1).unbind(dim=1)
        return tuple((same / (same + different)).tolist())
    if value is None:
        value = 0.5
    if isinstance(value, Tensor):
        value = value.tolist()
    if not checks.is_sequence(value):
        value = [value] * len(rates)
    if len(value) != len(rates):
        raise ValueError(
            f"positive_frequency must be a number or one for each of {len(rates)} rates, "
            f"got {len(value)} numbers"
        )
    return tuple(checks.check_number("positive_frequency", x, above=0, below=1) for x in value)


def _checked(
    affinity_logits: Tensor, target: Tensor, options: DilatedAffinityOptions
) -> tuple[Tensor, Tensor]:
    affinity_logits, target = checks.check_affinity_logits_and_target(
        affinity_logits, target, len(options.rates)
    )
    checks.check_label_values(target, None, options.ignore_index)
    return affinity_logits, target


def _terms(
    affinity_logits: Tensor, target: Tensor, options: DilatedAffinityOptions
) -> DilatedAffinityTerms:
    return DilatedAffinityTerms(*ops.terms(affinity_logits, target, options))


def _loss(
    affinity_logits: Tensor,
    target: Tensor,
    options: DilatedAffinityOptions,
    statistics: tuple[Tensor, Tensor] | None,
    normalizer: Tensor | None,
    process_group: dist.ProcessGroup | None,
) -> LossAndTerms:
    """The loss, and its terms by rate."""
    affinity_logits, target = _checked(affinity_logits, target, options)
    for count in statistics or ():
        checks.check_one_device("statistics", count, "affinity_logits", affinity_logits)
    if normalizer is not None:
        shape = len(options.rates), 9, 3
        normalizer = checks.check_normalizer(normalizer, shape, "affinity_logits", affinity_logits)
    checks.check_process_group(process_group)
    checks.check_together(options.reduction, normalizer, process_group)

    def of_batch(affinity_logits: Tensor, target: Tensor) -> LossAndTerms:
        loss_sum, signal_count, _, pixel_count = _terms(affinity_logits, target, options)
        if normalizer is not None:
            pixel_count, signal_count = normalizer[..., 0], normalizer[..., 1:]
        tables = loss_sum, signal_count, pixel_count
        loss_sum, signal_count, pixel_count = all_reduce(tables, process_group)
        counts = statistics or (pixel_count, signal_count)
        weight = signal_weight(options.weighting, *(count.to(loss_sum.dtype) for count in counts))
        total = (loss_sum * weight).sum(dim=(1, 2))
        counted = pixel_count.sum(dim=1)
        # The coefficient of a rate at which nothing counts is 0, not 1: the other rates'
        # coefficients are about 1 / millions, and rounding beside a 1 would drown them.
        by_rate = options.beta * (total * (counted > 0) / counted.clamp(min=1))
        names = (f"rate {down} x {across}" for down, across in options.rates)
        return by_rate.sum(), dict(zip(names, by_rate.detach().unbind(), strict=True))

    if options.reduction == "none":
        return by_image(of_batch, affinity_logits, target)
    return of_batch(affinity_logits, target)
