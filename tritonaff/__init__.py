"""Structured losses of semantic segmentation as fused Triton kernels, traceable by
torch.compile.
"""

from tritonaff.functional import (
    AffinityFieldTerms,
    AffinityRegressionTerms,
    DilatedAffinityTerms,
    affinity_field_cross_entropy,
    affinity_field_loss,
    affinity_field_terms,
    affinity_propagation,
    affinity_regression_loss,
    affinity_regression_terms,
    dilated_affinity_loss,
    dilated_affinity_target,
    dilated_affinity_terms,
    label_affinity,
    neighbor_categories,
    square_root_affinity,
)
from tritonaff.modules import (
    AdaptiveAffinityFieldLoss,
    AffinityFieldLoss,
    AffinityPropagation,
    AffinityRegressionLoss,
    DilatedAffinityHead,
    DilatedAffinityLoss,
)
from tritonaff.ops.backend import use_backend
from tritonaff.rates import expand_rates
from tritonaff.statistics import NeighborStatistics
from tritonaff.version import __version__

__all__ = [
    "AdaptiveAffinityFieldLoss",
    "AffinityFieldLoss",
    "AffinityFieldTerms",
    "AffinityPropagation",
    "AffinityRegressionLoss",
    "AffinityRegressionTerms",
    "DilatedAffinityHead",
    "DilatedAffinityLoss",
    "DilatedAffinityTerms",
    "NeighborStatistics",
    "__version__",
    "affinity_field_cross_entropy",
    "affinity_field_loss",
    "affinity_field_terms",
    "affinity_propagation",
    "affinity_regression_loss",
    "affinity_regression_terms",
    "dilated_affinity_loss",
    "dilated_affinity_target",
    "dilated_affinity_terms",
    "expand_rates",
    "label_affinity",
    "neighbor_categories",
    "square_root_affinity",
    "use_backend",
]
