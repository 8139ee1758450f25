"""Structured losses of semantic segmentation as fused Triton kernels, traceable by
torch.compile.
"""

from tritonaff.functional import (
    AffinityFieldTerms,
    AffinityRegressionTerms,
    affinity_field_loss,
    affinity_field_terms,
    affinity_propagation,
    affinity_regression_loss,
    affinity_regression_terms,
    label_affinity,
    square_root_affinity,
)
from tritonaff.modules import (
    AdaptiveAffinityFieldLoss,
    AffinityFieldLoss,
    AffinityPropagation,
    AffinityRegressionLoss,
)
from tritonaff.ops.backend import use_backend
from tritonaff.rates import expand_rates
from tritonaff.version import __version__

__all__ = [
    "AdaptiveAffinityFieldLoss",
    "AffinityFieldLoss",
    "AffinityFieldTerms",
    "AffinityPropagation",
    "AffinityRegressionLoss",
    "AffinityRegressionTerms",
    "__version__",
    "affinity_field_loss",
    "affinity_field_terms",
    "affinity_propagation",
    "affinity_regression_loss",
    "affinity_regression_terms",
    "expand_rates",
    "label_affinity",
    "square_root_affinity",
    "use_backend",
]
