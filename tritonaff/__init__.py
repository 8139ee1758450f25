"""Structured losses of semantic segmentation as fused Triton kernels, traceable by
torch.compile.
"""

from tritonaff.api.affinity_field import (
    AdaptiveAffinityFieldLoss,
    AffinityFieldLoss,
    AffinityFieldTerms,
    affinity_field_cross_entropy,
    affinity_field_loss,
    affinity_field_terms,
)
from tritonaff.api.affinity_propagation import (
    AffinityPropagation,
    affinity_propagation,
)
from tritonaff.api.affinity_regression import (
    AffinityRegressionLoss,
    AffinityRegressionTerms,
    affinity_regression_loss,
    affinity_regression_terms,
    label_affinity,
    square_root_affinity,
)
from tritonaff.api.box_pairwise import (
    BoxPairwiseLoss,
    BoxPairwiseTerms,
    box_pairwise_loss,
    box_pairwise_terms,
    color_similarity,
)
from tritonaff.api.deep_supervision import (
    DeepSupervision,
)
from tritonaff.api.dilated_affinity import (
    DilatedAffinityHead,
    DilatedAffinityLoss,
    DilatedAffinityTerms,
    dilated_affinity_loss,
    dilated_affinity_terms,
)
from tritonaff.api.image_affinity import (
    PAMR,
    PAR,
    image_affinity,
)
from tritonaff.api.instance_affinity import (
    InstanceAffinityLoss,
    InstanceAffinityTerms,
    instance_affinity_loss,
    instance_affinity_target,
    instance_affinity_terms,
)
from tritonaff.api.labels import (
    resize_labels,
)
from tritonaff.api.neighbors import (
    NeighborStatistics,
    dilated_affinity_target,
    neighbor_categories,
)
from tritonaff.offsets import instance_offsets
from tritonaff.ops.backend import use_backend
from tritonaff.rates import expand_rates
from tritonaff.version import __version__

__all__ = [
    "PAMR",
    "PAR",
    "AdaptiveAffinityFieldLoss",
    "AffinityFieldLoss",
    "AffinityFieldTerms",
    "AffinityPropagation",
    "AffinityRegressionLoss",
    "AffinityRegressionTerms",
    "BoxPairwiseLoss",
    "BoxPairwiseTerms",
    "DeepSupervision",
    "DilatedAffinityHead",
    "DilatedAffinityLoss",
    "DilatedAffinityTerms",
    "InstanceAffinityLoss",
    "InstanceAffinityTerms",
    "NeighborStatistics",
    "__version__",
    "affinity_field_cross_entropy",
    "affinity_field_loss",
    "affinity_field_terms",
    "affinity_propagation",
    "affinity_regression_loss",
    "affinity_regression_terms",
    "box_pairwise_loss",
    "box_pairwise_terms",
    "color_similarity",
    "dilated_affinity_loss",
    "dilated_affinity_target",
    "dilated_affinity_terms",
    "expand_rates",
    "image_affinity",
    "instance_affinity_loss",
    "instance_affinity_target",
    "instance_affinity_terms",
    "instance_offsets",
    "label_affinity",
    "neighbor_categories",
    "resize_labels",
    "square_root_affinity",
    "use_backend",
]
