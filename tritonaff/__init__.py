"""Structured losses of semantic segmentation as fused Triton kernels, traceable by
torch.compile.
"""

from tritonaff.functional import (
    AffinityFieldTerms,
    affinity_field_loss,
    affinity_field_terms,
    affinity_propagation,
)
from tritonaff.modules import AdaptiveAffinityFieldLoss, AffinityFieldLoss, AffinityPropagation
from tritonaff.ops.backend import use_backend
from tritonaff.rates import expand_rates
from tritonaff.version import __version__

__all__ = [
    "AdaptiveAffinityFieldLoss",
    "AffinityFieldLoss",
    "AffinityFieldTerms",
    "AffinityPropagation",
    "__version__",
    "affinity_field_loss",
    "affinity_field_terms",
    "affinity_propagation",
    "expand_rates",
    "use_backend",
]
