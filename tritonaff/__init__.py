"""Structured losses of semantic segmentation as fused Triton kernels, traceable by
torch.compile.
"""

from tritonaff.functional import AffinityFieldTerms, affinity_field_loss, affinity_field_terms
from tritonaff.modules import AdaptiveAffinityFieldLoss, AffinityFieldLoss
from tritonaff.ops.backend import use_backend
from tritonaff.version import __version__

__all__ = [
    "AdaptiveAffinityFieldLoss",
    "AffinityFieldLoss",
    "AffinityFieldTerms",
    "__version__",
    "affinity_field_loss",
    "affinity_field_terms",
    "use_backend",
]
