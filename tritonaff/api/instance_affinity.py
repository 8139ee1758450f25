"""Instance affinities: a network predicts which voxels at some offsets belong to one instance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from tritonaff import checks
from tritonaff.api.module import Loss, LossAndTerms
from tritonaff.distributed import all_reduce
from tritonaff.ops import instance_affinity as ops
from tritonaff.options import (
    Anchor,
    Balance,
    Channels,
    InstanceAffinityOptions,
    Offsets,
    Reduction,
    instance_affinity_options,
    instance_pairs,
    pairs_of,
)

InstanceLoss = Literal["bce", "dice", "mse", "focal"]
# BalanceLabels of gunpowder and the pos_weight of PyTC.
LEAST_FRACTION, LARGEST_FRACTION = 0.05, 0.95
LARGEST_POSITIVE_WEIGHT = 10.0


class InstanceAffinityTerms(NamedTuple):
    """Sums and counts of instance affinities by image, channel and target.

    The last index is the target, (different, same). p is the sigmoid of the logit, pt the
    probability of the target. Sums are float32, float64 for float64 logits, and differentiable.
    """

    count: Tensor  # type: ignore[assignment]
    """(N, K, 2): number of pairs; int64."""
    log_loss: Tensor
    """(N, K, 2): sum of -log pt."""
    p_sum: Tensor
    """(N, K, 2): sum of p."""
    p_square_sum: Tensor
    """(N, K, 2): sum of p squared."""
    focal_sum: Tensor
    """(N, K, 2): sum of (1 - pt)^gamma (-log pt)."""


def instance_affinity_target(
    ids: Tensor,
    offsets: Offsets,
    *,
    background: int | None = 0,
    ignore_index: int | None = None,
    anchor: Anchor = "source",
    invert: bool = False,
) -> Tensor:
    """Target of a network for instance affinities: 1 where a pair of voxels has one id, else 0.

    This tensor is for people and tests; the loss never builds it.

    Args:
        ids: (N, H, W) or (N, D, H, W) of any integer dtype or bool: two voxels are of one instance
            if their ids are equal.
        offsets: K signed steps in voxels, (dy, dx) for images, (dz, dy, dx) for volumes, none of
            them 0. :func:`instance_offsets` has known sets.
        background: the id of voxels without an instance: a pair with such a voxel, or two of them,
            has the target 0. None: every id is an instance.
        ignore_index: the id of voxels to leave out. None: all voxels count.
        anchor: channel k at x is the pair (x, x + offset k) for ``"source"``, (x, x - offset k) for
            ``"destination"``.
        invert: 1 stands for "different" (a boundary) and 0 for "same".

    Returns:
        (N, K, H, W) or (N, K, D, H, W) of uint8: 255 where the other voxel is outside or one of the
        two voxels is ignored.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape or range; offsets of 0, or of another number of axes.

    Example:
        >>> import torch, tritonaff
        >>> ids = torch.tensor([[[7, 7, 4, 0, 0]]])
        >>> tritonaff.instance_affinity_target(ids, [(0, -1)]).tolist()
        [[[[255, 1, 0, 0, 0]]]]
        >>> tritonaff.instance_affinity_target(ids, [(0, -1)], background=None).tolist()
        [[[[255, 1, 0, 0, 1]]]]
    """
    pairs = instance_pairs(
        offsets, background=background, ignore_index=ignore_index, anchor=anchor, invert=invert
    )
    return ops.target(checks.check_ids(ids, len(pairs.offsets[0])), pairs)


def instance_affinity_terms(
    logits: Tensor,
    ids: Tensor,
    offsets: Offsets,
    *,
    background: int | None = 0,
    ignore_index: int | None = None,
    anchor: Anchor = "source",
    gamma: float = 2.0,
    invert: bool = False,
) -> InstanceAffinityTerms:
    r"""Sums and counts from which losses of instance affinities are computed, in one pass.

    With p the sigmoid of a logit and t the target of its pair, see
    :func:`instance_affinity_target`, the tables hold the number of pairs, and the sums of

    .. math::

        -\log p_t, \quad p, \quad p^2, \quad (1 - p_t)^\gamma (-\log p_t),
        \quad p_t = p \text{ if } t = 1 \text{ else } 1 - p

    for each image, channel and target. All terms and their gradients are finite for every finite
    logit.

    Args:
        logits: (N, K, H, W) or (N, K, D, H, W) of float16, bfloat16, float32 or float64, any
            strides, with a channel for every offset. Half precision is read as it is and computed
            in float32. Logits of pairs that do not count may be NaN.
        ids: (N, H, W) or (N, D, H, W), or with one channel after N, of any integer dtype up to 64
            bits; only equality matters.
        offsets: K offsets, each a tuple of signed integers, one for each axis of the ids, not all
            0: channel k is the pair of a voxel and the voxel at offsets[k] from it.
        background: id of the voxels that belong to no instance, whose pairs all have the target
            "different"; None: 0 is an id like any other.
        ignore_index: id of the voxels to leave out; None if there is no such id.
        anchor: ``"source"``: a channel at x is the pair (x, x + offset); ``"destination"``: (x, x -
            offset).
        gamma: the focusing parameter, at least 0; 0 is binary cross-entropy.
        invert: the logits speak of "different" (a boundary): pt is 1 - p for pairs of one instance.
            The tables stay (different, same).

    Returns:
        :class:`InstanceAffinityTerms`. Differentiable with respect to the logits: once, in reverse
        mode.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device or range.

    Papers: the targets of "Superhuman Accuracy on the SNEMI3D Connectomics Challenge" (2017) and
    "The Mutex Watershed" (ECCV 2018). They leave the border open: here a pair with a voxel outside
    does not count.

    Example:
        >>> import torch, tritonaff
        >>> logits = torch.zeros(1, 1, 1, 3)  # no idea, says the network
        >>> ids = torch.tensor([[[7, 7, 4]]])
        >>> terms = tritonaff.instance_affinity_terms(logits, ids, [(0, 1)])
        >>> terms.count.tolist(), terms.p_sum.tolist()
        ([[[1, 1]]], [[[0.5, 0.5]]])
    """
    pairs = instance_pairs(
        offsets, background=background, ignore_index=ignore_index, anchor=anchor, invert=invert
    )
    gamma = checks.check_number("gamma", gamma, at_least=0)
    logits, ids = checks.check_logits_and_ids(logits, ids, pairs.offsets)
    log_loss, miss_sum, miss_square_sum, focal_sum, count = ops.tables(logits, ids, pairs, gamma)
    # p is 1 - pt where the channel's own target is 0, and pt where it is 1.
    p_sum = _by_target(miss_sum, count - miss_sum, invert)
    p_square_sum = _by_target(miss_square_sum, count - 2 * miss_sum + miss_square_sum, invert)
    return InstanceAffinityTerms(count, log_loss, p_sum, p_square_sum, focal_sum)


def instance_affinity_loss(
    logits: Tensor,
    ids: Tensor,
    offsets: Offsets,
    *,
    loss: InstanceLoss | Mapping[str, float] = "bce",
    balance: Balance = "none",
    channels: Channels = "mean",
    background: int | None = 0,
    ignore_index: int | None = None,
    anchor: Anchor = "source",
    invert: bool = False,
    gamma: float = 2.0,
    reduction: Reduction = "mean",
    normalizer: Tensor | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    r"""A loss of instance affinities from ids: targets, masks and weights are never built.

    With the pairs and targets of :func:`instance_affinity_target`, sums over the pairs (i, t) of a
    channel k that count, n_k of them, n_kt with the target t, and y = t (1 - t with ``invert``):

    .. math::

        bce_k = \frac{1}{n_k} \sum w_{kt} (-\log p_t), \quad
        mse_k = \frac{1}{n_k} \sum w_{kt} (p - y)^2, \quad
        focal_k = \frac{1}{n_k} \sum w_{kt} (1 - p_t)^\gamma (-\log p_t), \\
        dice_k = 1 - \frac{2 \sum p y}{\max(\sum p^2 + \sum y, 10^{-7})}

    and L is their mean over the channels. A channel in which nothing counts contributes 0 with a
    zero gradient. Weights are constants for the gradient:

    ============  ==============================================================================
    balance       w
    ============  ==============================================================================
    ``none``      1
    ``inverse``   n_k / (2 n_kt): each target's mean, halved
    ``clipped``   1 / (2 clip(f_t, 0.05, 0.95)), f_t the fraction of the target in all channels of
                  the image (gunpowder's BalanceLabels)
    ``positive``  min(n_k0 / n_k1, 10) for y = 1 (1 if there is none), 1 for y = 0 (PyTC), 0 and 1
                  being values of y
    ============  ==============================================================================

    Args:
        logits: (N, K, H, W) or (N, K, D, H, W) of float16, bfloat16, float32 or float64, any
            strides, with a channel for every offset. Logits of pairs that do not count may be NaN.
        ids: (N, H, W) or (N, D, H, W), or with one channel after N, of any integer dtype up to 64
            bits; only equality matters.
        offsets: K offsets, each a tuple of signed integers, one for each axis of the ids, not all
            0: channel k is the pair of a voxel and the voxel at offsets[k] from it.
        background: id of the voxels that belong to no instance, whose pairs all have the target
            "different"; None: 0 is an id like any other.
        ignore_index: id of the voxels to leave out; None if there is no such id.
        anchor: ``"source"``: a channel at x is the pair (x, x + offset); ``"destination"``: (x, x -
            offset).
        loss: ``"bce"``, ``"dice"``, ``"mse"`` or ``"focal"``, or weights of several of them,
            ``{"bce": 1.0, "dice": 1.0}``.
        balance: weights of the targets, see above; Dice has none.
        channels: ``"mean"`` or ``"sum"`` over the channels, or ``"pooled"``: the pairs of all
            channels are one sum, as in LSD, bootstrapper and torch's own losses.
        invert: the channels say 1 for "different", as torch-em's do.
        gamma: the focusing parameter of ``"focal"``.
        reduction: ``"mean"``: all images are one batch of pairs. ``"none"``: the loss of every
            image for itself. No ``"sum"``: each channel is a mean over a number of its own.
        normalizer: (K, 2) of int32 or int64, counts (different, same) to use in place of the
            batch's own; :meth:`InstanceAffinityLoss.normalizer` counts them. Not for Dice, which is
            no sum over images.
        process_group: None: the loss of this process's batch. A group: the loss of all its
            processes' batches as one batch, for which every process must call; its gradient is
            multiplied by the number of processes, a factor that averaging of gradients cancels.

    Returns:
        A scalar, or (N,) with ``reduction="none"``: float32, float64 for float64 logits.

    Raises:
        TypeError, ValueError: as :func:`instance_affinity_terms`; an unknown loss, balance or
            reduction; a negative weight; a normalizer of a wrong dtype, shape or device, or with
            Dice; a normalizer or a process_group with ``reduction="none"``.

    Sources: torch-em (Dice), gunpowder and LSD (balanced MSE), PyTC (BCE), each from its code;
    docs/instance_affinity.md says what differs, above all at the border.

    Example:
        >>> import torch, tritonaff
        >>> offsets = tritonaff.instance_offsets("mutex_watershed_2d")
        >>> logits = torch.randn(2, len(offsets), 64, 64, requires_grad=True)
        >>> ids = torch.randint(0, 9, (2, 8, 8)).repeat_interleave(8, 1).repeat_interleave(8, 2)
        >>> loss = tritonaff.instance_affinity_loss(logits, ids, offsets, balance="inverse")
        >>> loss.backward()
    """
    options = instance_affinity_options(
        offsets, loss=loss, balance=balance, channels=channels, gamma=gamma, reduction=reduction,
        background=background, ignore_index=ignore_index, anchor=anchor, invert=invert,
    )  # fmt: skip
    loss_of_all, _ = _loss(logits, ids, options, normalizer, process_group)
    return loss_of_all


class InstanceAffinityLoss(Loss):
    """:func:`tritonaff.instance_affinity_loss` with fixed options.

    Args:
        offsets: K offsets, each a tuple of signed integers, one for each axis of the ids, not all
            0: channel k is the pair of a voxel and the voxel at offsets[k] from it.
        loss: ``"bce"``, ``"dice"``, ``"mse"`` or ``"focal"``, or weights of several of them,
            ``{"bce": 1.0, "dice": 1.0}``.
        balance: weights of the targets: ``"none"``, ``"inverse"`` (each target's mean, halved),
            ``"clipped"`` (gunpowder's) or ``"positive"`` (PyTC's); Dice has none.
        channels: ``"mean"`` or ``"sum"`` over the channels, or ``"pooled"``: the pairs of all
            channels are one sum.
        background: id of the voxels that belong to no instance, whose pairs all have the target
            "different"; None: 0 is an id like any other.
        ignore_index: id of the voxels to leave out; None if there is no such id.
        anchor: ``"source"``: a channel at x is the pair (x, x + offset); ``"destination"``: (x, x -
            offset).
        invert: the channels say 1 for "different", as torch-em's do.
        gamma: the focusing parameter of ``"focal"``, at least 0.
        reduction: ``"mean"``: all images are one batch of pairs. ``"none"``: the loss of each
            image, (N,).
        process_group: None: the loss of this process's batch. A group: the loss of all its
            processes' batches as one batch, for which every process must call; its gradient is
            multiplied by the number of processes, a factor that averaging of gradients cancels.

    Shapes:
        ``loss(logits, ids)`` with logits (N, K, H, W) and ids (N, H, W), or (N, K, D, H, W) and
        (N, D, H, W), gives a scalar, or (N,) with ``reduction="none"``; :meth:`forward` has more
        arguments.

    Raises:
        TypeError, ValueError: a wrong option when the module is made, wrong tensors when it is
            called.

    Example:
        >>> import torch, tritonaff
        >>> offsets = tritonaff.instance_offsets("nearest_3d")
        >>> loss_fn = tritonaff.InstanceAffinityLoss(offsets, loss={"bce": 1.0, "dice": 0.5})
        >>> logits = torch.randn(1, 3, 4, 16, 16, requires_grad=True)
        >>> ids = torch.randint(0, 3, (1, 4, 16, 16))
        >>> loss_fn(logits, ids).backward()
    """

    def __init__(
        self,
        offsets: Offsets,
        *,
        loss: InstanceLoss | Mapping[str, float] = "bce",
        balance: Balance = "none",
        channels: Channels = "mean",
        background: int | None = 0,
        ignore_index: int | None = None,
        anchor: Anchor = "source",
        invert: bool = False,
        gamma: float = 2.0,
        reduction: Reduction = "mean",
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        options = instance_affinity_options(
            offsets, loss=loss, balance=balance, channels=channels, gamma=gamma,
            reduction=reduction, background=background, ignore_index=ignore_index, anchor=anchor,
            invert=invert,
        )  # fmt: skip
        super().__init__(options, process_group)

    def forward(
        self,
        logits: Tensor,
        ids: Tensor,
        normalizer: Tensor | None = None,
        return_terms: bool = False,
    ) -> Any:
        """The loss of a batch.

        Args:
            logits: (N, K, H, W) or (N, K, D, H, W) of float16, bfloat16, float32 or float64.
            ids: (N, H, W) or (N, D, H, W), or with one channel after N, of any integer dtype up to
                64 bits; only equality matters.
            normalizer: (K, 2) of int32 or int64, counts (different, same) to use in place of the
                batch's own; :meth:`normalizer` counts them.
            return_terms: also return the terms, for logs: a dict of the detached terms by the names
                of the losses, which add up to the loss.

        Returns:
            A scalar, or (N,) with ``reduction="none"``: float32, float64 for float64 logits; with
            ``return_terms=True`` a pair (loss, terms).
        """
        checks.check_bool("return_terms", return_terms)
        loss, terms = _loss(logits, ids, self.options, normalizer, self.process_group)
        return (loss, terms) if return_terms else loss

    def normalizer(self, ids: Tensor) -> Tensor:
        """Counts (different, same) of ids (N, H, W) or (N, D, H, W): (K, 2) int64. Add up the
        counts of a batch's parts and give ``forward`` the total with every part.
        """
        pairs = pairs_of(self.options)
        return ops.counts(checks.check_ids(ids, len(pairs.offsets[0])), pairs).sum(dim=0)


class _Tables(NamedTuple):
    """Tables (M, K, 2) of which each entry of M has a loss: images, or one batch."""

    count: Tensor  # type: ignore[assignment]
    log_loss: Tensor
    miss_sum: Tensor
    miss_square_sum: Tensor
    focal_sum: Tensor
    # The last three with the weights of balance="clipped", which an image has for itself.
    weighted_log_loss: Tensor
    weighted_square_sum: Tensor
    weighted_focal_sum: Tensor


def _loss(
    logits: Tensor,
    ids: Tensor,
    options: InstanceAffinityOptions,
    normalizer: Tensor | None,
    process_group: dist.ProcessGroup | None,
) -> LossAndTerms:
    """The loss, and its terms by the names of the losses."""
    logits, ids = checks.check_logits_and_ids(logits, ids, options.offsets)
    checks.check_process_group(process_group)
    checks.check_together(options.reduction, normalizer, process_group)
    if normalizer is not None and options.uses("dice"):
        raise ValueError("a normalizer must be of a sum over images, got the loss 'dice'")
    if normalizer is not None:
        shape = len(options.offsets), 2
        normalizer = checks.check_normalizer(normalizer, shape, "logits", logits)
    *sums, count = ops.tables(
        logits, ids, pairs_of(options), options.gamma,
        misses=options.uses("dice", "mse"), focal=options.uses("focal"),
    )  # fmt: skip
    # Without a derivative, a table that no loss uses costs the gradient nothing.
    users = ("bce",), ("dice",), ("dice", "mse"), ("focal",)
    sums = [x if options.uses(*names) else x.detach() for x, names in zip(sums, users, strict=True)]
    log_loss, _, miss_square_sum, focal_sum = sums
    weight = _weight_of_images(count, options, log_loss.dtype)
    weighted = (weight * table for table in (log_loss, miss_square_sum, focal_sum))
    tables = _Tables(count if normalizer is None else normalizer[None], *sums, *weighted)
    if options.reduction == "mean":
        totals = all_reduce([table.sum(dim=0) for table in tables], process_group)
        tables = _Tables(*(table[None] for table in totals))
    if options.channels == "pooled":
        tables = _Tables(*(table.sum(dim=1, keepdim=True) for table in tables))
    terms = {}
    for name, factor in options.loss:
        value = _loss_of_channels(name, tables, options)
        value = value.mean(dim=1) if options.channels == "mean" else value.sum(dim=1)
        terms[name] = factor * (value if options.reduction == "none" else value.squeeze(0))
    total = sum(terms.values(), torch.zeros((), dtype=log_loss.dtype, device=logits.device))
    return total, {name: term.detach() for name, term in terms.items()}


def _loss_of_channels(name: str, tables: _Tables, options: InstanceAffinityOptions) -> Tensor:
    """One of the losses, (M, K)."""
    if name == "dice":
        return _dice(tables, options.invert)
    weighted = {
        "bce": tables.weighted_log_loss,
        "mse": tables.weighted_square_sum,
        "focal": tables.weighted_focal_sum,
    }[name]
    counts = tables.count.to(weighted.dtype)
    if options.balance == "inverse":
        # The coefficient of a sum of nothing is 0, not 1: the others are about 1 / millions, and
        # rounding beside a 1 would drown them.
        return 0.5 * (weighted * (counts > 0) / counts.clamp(min=1)).sum(dim=-1)
    if options.balance == "positive":
        negative, positive = _negative_and_positive(counts, options.invert)
        ratio = (negative / positive.clamp(min=1)).clamp(max=LARGEST_POSITIVE_WEIGHT)
        ratio = torch.where(positive > 0, ratio, 1)
        of_negative, of_positive = _negative_and_positive(weighted, options.invert)
        total = of_negative + ratio * of_positive
    else:
        total = weighted.sum(dim=-1)
    pairs = counts.sum(dim=-1)
    return total * (pairs > 0) / pairs.clamp(min=1)


def _dice(tables: _Tables, invert: bool) -> Tensor:
    """1 - 2 sum(p y) / (sum(p^2) + sum(y)) as sum((p - y)^2) / (sum(p^2) + sum(y)), which keeps its
    digits where the network is right. Without any y = 1 the loss is 1, a constant.
    """
    square_sum = tables.miss_square_sum.sum(dim=-1)
    _, positive = _negative_and_positive(tables.count, invert)
    _, miss = _negative_and_positive(tables.miss_sum, invert)
    # Here p = 1 - miss where y is 1, and p = miss where y is 0.
    denominator = 2 * positive - 2 * miss + square_sum
    dice = square_sum / torch.where(positive > 0, denominator, 1)
    constant = (tables.count.sum(dim=-1) > 0).to(dice.dtype)
    return torch.where(positive > 0, dice, constant)


def _by_target(of_negative: Tensor, of_positive: Tensor, invert: bool) -> Tensor:
    """The table whose entries are taken from the first one for y = 0, from the second for y = 1."""
    negative, _ = _negative_and_positive(of_negative, invert)
    _, positive = _negative_and_positive(of_positive, invert)
    return torch.stack((positive, negative) if invert else (negative, positive), dim=-1)


def _negative_and_positive(table: Tensor, invert: bool) -> tuple[Tensor, Tensor]:
    """The entries of y = 0 and y = 1, from a table whose last index is (different, same)."""
    different, same = table.unbind(dim=-1)
    return (same, different) if invert else (different, same)


def _weight_of_images(
    count: Tensor, options: InstanceAffinityOptions, dtype: torch.dtype
) -> Tensor:
    """(N, 1, 2): weights of the targets that depend on the image alone; ones if there are none."""
    if options.balance != "clipped":
        return count.new_ones(len(count), 1, 2, dtype=dtype)
    counts = count.sum(dim=1, keepdim=True).to(dtype)
    fraction = counts / counts.sum(dim=-1, keepdim=True).clamp(min=1)
    return 0.5 / fraction.clamp(LEAST_FRACTION, LARGEST_FRACTION)
