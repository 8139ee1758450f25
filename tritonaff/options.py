"""The options of each operation: one tuple, checked when it is made, before any work.

Functions and modules make the tuple from their arguments; :mod:`tritonaff.ops` trusts it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from tritonaff import checks

Variant = Literal["paper", "authors"]
Weighting = Literal["sqrt", "neighbor", "signal", "none"]
Activation = Literal["softmax", "sigmoid"]
Reduction = Literal["mean", "sum", "none"]
Backend = Literal["auto", "triton", "native", "portable", "reference"]
ACTIVATIONS: tuple[Activation, ...] = ("softmax", "sigmoid")
VARIANTS: tuple[Variant, ...] = ("paper", "authors")
REDUCTIONS: tuple[Reduction, ...] = ("mean", "sum", "none")
WEIGHTINGS: tuple[Weighting, ...] = ("sqrt", "neighbor", "signal", "none")
Rates = Sequence["int | tuple[int, int]"]


class AffinityFieldOptions(NamedTuple):
    """See :func:`tritonaff.affinity_field_loss`; ``cross_entropy`` adds cross-entropy."""

    kernel_sizes: tuple[int, ...]
    edge_lambda: float
    non_edge_lambda: float
    affinity_lambda: float
    margin: float
    eps: float
    ignore_index: int | None
    variant: Variant
    cross_entropy: bool
    activation: Activation
    label_smoothing: float
    include_background: bool
    reduction: Reduction


def affinity_field_options(
    kernel_sizes: Any,
    *,
    edge_lambda: Any = 1.0,
    non_edge_lambda: Any = 1.0,
    affinity_lambda: Any = 1.0,
    margin: Any = 3.0,
    eps: Any = 1e-4,
    ignore_index: Any = 255,
    variant: Any = "paper",
    cross_entropy: Any = False,
    activation: Any = "softmax",
    label_smoothing: Any = 0.0,
    include_background: Any = True,
    reduction: Any = "mean",
) -> AffinityFieldOptions:
    if variant == "authors" and activation == "sigmoid":
        raise ValueError(
            "variant 'authors' has no activation 'sigmoid': its rows are the labels of pixels, "
            "which have one label each; pass variant='paper'"
        )
    label_smoothing = checks.check_number("label_smoothing", label_smoothing, at_least=0, at_most=1)
    if label_smoothing and not cross_entropy:
        raise ValueError("label_smoothing needs cross_entropy=True: pairs have none")
    if label_smoothing and activation == "sigmoid":
        raise ValueError(
            "label_smoothing needs activation='softmax', got 'sigmoid': torch's binary "
            "cross-entropy has none"
        )
    return AffinityFieldOptions(
        checks.check_kernel_sizes(kernel_sizes),
        checks.check_number("edge_lambda", edge_lambda, at_least=0),
        checks.check_number("non_edge_lambda", non_edge_lambda, at_least=0),
        checks.check_number("affinity_lambda", affinity_lambda, at_least=0),
        checks.check_number("margin", margin, at_least=0),
        checks.check_number("eps", eps, above=0, below=0.5),
        checks.check_ignore_index(ignore_index),
        checks.check_option("variant", variant, VARIANTS),
        checks.check_bool("cross_entropy", cross_entropy),
        checks.check_option("activation", activation, ACTIVATIONS),
        label_smoothing,
        checks.check_bool("include_background", include_background),
        _reduction_of_pairs(reduction),
    )


def _reduction_of_pairs(reduction: Any) -> Reduction:
    checked = checks.check_option("reduction", reduction, REDUCTIONS)
    if checked == "sum":
        raise ValueError(
            "reduction must be 'mean' or 'none', got 'sum': the loss adds up several means, each "
            "over its own pairs, and a sum over all pairs would lose their balance; add up the "
            "images' losses of reduction='none'"
        )
    return checked


class AffinityRegressionOptions(NamedTuple):
    """See :func:`tritonaff.affinity_regression_loss`."""

    grid_sizes: tuple[int, ...] | None
    ignore_index: int | None
    activation: Activation
    reduction: Reduction


def affinity_regression_options(
    grid_sizes: Any,
    *,
    ignore_index: Any = 255,
    activation: Any = "softmax",
    reduction: Any = "mean",
) -> AffinityRegressionOptions:
    return AffinityRegressionOptions(
        checks.check_grid_sizes(grid_sizes),
        checks.check_ignore_index(ignore_index),
        checks.check_option("activation", activation, ACTIVATIONS),
        checks.check_option("reduction", reduction, REDUCTIONS),
    )


class DilatedAffinityOptions(NamedTuple):
    """See :func:`tritonaff.dilated_affinity_loss`."""

    rates: tuple[tuple[int, int], ...]
    weighting: Weighting
    gamma: float
    beta: float
    ignore_index: int | None
    reduction: Reduction


def dilated_affinity_options(
    rates: Any,
    *,
    weighting: Any = "sqrt",
    gamma: Any = 2.0,
    beta: Any = 1.0,
    ignore_index: Any = 255,
    reduction: Any = "mean",
) -> DilatedAffinityOptions:
    return DilatedAffinityOptions(
        checks.check_rates(rates),
        checks.check_option("weighting", weighting, WEIGHTINGS),
        checks.check_number("gamma", gamma, at_least=0),
        checks.check_number("beta", beta, at_least=0),
        checks.check_ignore_index(ignore_index),
        _reduction_of_pairs(reduction),
    )


Normalize = Literal["sum", "none"]
Border = Literal["valid", "replicate"]
NORMALIZATIONS: tuple[Normalize, ...] = ("sum", "none")
BORDERS: tuple[Border, ...] = ("valid", "replicate")


class AffinityPropagationOptions(NamedTuple):
    """See :func:`tritonaff.affinity_propagation`."""

    rates: tuple[tuple[int, int], ...]
    iterations: int
    self_weight: float
    steepness: float
    from_logits: bool
    normalize: Normalize
    border: Border


def affinity_propagation_options(
    rates: Any,
    *,
    iterations: Any = 10,
    self_weight: Any = 6.0,
    steepness: Any = 7.0,
    from_logits: Any = True,
    normalize: Any = "sum",
    border: Any = "valid",
) -> AffinityPropagationOptions:
    return AffinityPropagationOptions(
        checks.check_rates(rates),
        checks.check_int("iterations", iterations, at_least=0),
        checks.check_number("self_weight", self_weight, at_least=0),
        checks.check_number("steepness", steepness, above=1),
        checks.check_bool("from_logits", from_logits),
        checks.check_option("normalize", normalize, NORMALIZATIONS),
        checks.check_option("border", border, BORDERS),
    )


ImageAffinityMode = Literal["pamr", "par"]


class RefinementOptions(NamedTuple):
    """See :class:`tritonaff.PAMR` and :class:`tritonaff.PAR`."""

    num_iter: int
    dilations: tuple[int, ...]


def refinement_options(num_iter: Any, dilations: Any) -> RefinementOptions:
    return RefinementOptions(
        checks.check_int("num_iter", num_iter, at_least=0), checks.check_dilations(dilations)
    )


ColorSpace = Literal["lab", "rgb"]


class BoxPairwiseOptions(NamedTuple):
    """See :func:`tritonaff.box_pairwise_loss`."""

    threshold: float
    dilation: int
    stride: int
    reduction: Reduction


def box_pairwise_options(
    *, threshold: Any = 0.3, dilation: Any = 2, stride: Any = 1, reduction: Any = "mean"
) -> BoxPairwiseOptions:
    return BoxPairwiseOptions(
        checks.check_number("threshold", threshold, at_least=0, at_most=1),
        checks.check_int("dilation", dilation, at_least=1),
        checks.check_int("stride", stride, at_least=1),
        checks.check_option("reduction", reduction, REDUCTIONS),
    )


Anchor = Literal["source", "destination"]
Balance = Literal["none", "inverse", "clipped", "positive"]
Channels = Literal["mean", "sum", "pooled"]
ANCHORS: tuple[Anchor, ...] = ("source", "destination")
BALANCES: tuple[Balance, ...] = ("none", "inverse", "clipped", "positive")
CHANNELS: tuple[Channels, ...] = ("mean", "sum", "pooled")
INSTANCE_LOSSES = ("bce", "dice", "mse", "focal")
Offsets = Sequence[Sequence[int]]


class InstancePairs(NamedTuple):
    """The pairs of voxels, and their targets: see :func:`tritonaff.instance_affinity_target`."""

    offsets: tuple[tuple[int, ...], ...]
    background: int | None
    ignore_index: int | None
    anchor: Anchor
    invert: bool


def instance_pairs(
    offsets: Any,
    *,
    background: Any = 0,
    ignore_index: Any = None,
    anchor: Any = "source",
    invert: Any = False,
) -> InstancePairs:
    return InstancePairs(
        checks.check_offsets(offsets),
        checks.check_id("background", background),
        checks.check_id("ignore_index", ignore_index),
        checks.check_option("anchor", anchor, ANCHORS),
        checks.check_bool("invert", invert),
    )


class InstanceAffinityOptions(NamedTuple):
    """See :func:`tritonaff.instance_affinity_loss`. The first fields are an ``InstancePairs``."""

    offsets: tuple[tuple[int, ...], ...]
    background: int | None
    ignore_index: int | None
    anchor: Anchor
    invert: bool
    loss: tuple[tuple[str, float], ...]
    balance: Balance
    channels: Channels
    gamma: float
    reduction: Reduction

    def uses(self, *names: str) -> bool:
        """True if one of these losses is part of the loss."""
        return any(name in names for name, _ in self.loss)


def pairs_of(options: InstanceAffinityOptions) -> InstancePairs:
    """The first fields. A property would be no graph for the compiler of torch 2.6."""
    return InstancePairs(
        options.offsets, options.background, options.ignore_index, options.anchor, options.invert
    )


def instance_affinity_options(
    offsets: Any,
    *,
    loss: Any = "bce",
    balance: Any = "none",
    channels: Any = "mean",
    gamma: Any = 2.0,
    reduction: Any = "mean",
    **pairs: Any,
) -> InstanceAffinityOptions:
    return InstanceAffinityOptions(
        *instance_pairs(offsets, **pairs),
        checks.check_weighted("loss", loss, INSTANCE_LOSSES),
        checks.check_option("balance", balance, BALANCES),
        checks.check_option("channels", channels, CHANNELS),
        checks.check_number("gamma", gamma, at_least=0),
        _reduction_of_pairs(reduction),
    )
