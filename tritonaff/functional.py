"""All operations as functions; see the files of :mod:`tritonaff.api`."""

from tritonaff.api.affinity_field import (
    AffinityFieldTerms,
    affinity_field_cross_entropy,
    affinity_field_loss,
    affinity_field_terms,
)
from tritonaff.api.affinity_propagation import (
    affinity_propagation,
)
from tritonaff.api.affinity_regression import (
    AffinityRegressionTerms,
    affinity_regression_loss,
    affinity_regression_terms,
    label_affinity,
    square_root_affinity,
)
from tritonaff.api.box_pairwise import (
    BoxPairwiseTerms,
    box_pairwise_loss,
    box_pairwise_terms,
    color_similarity,
)
from tritonaff.api.dilated_affinity import (
    DilatedAffinityTerms,
    dilated_affinity_loss,
    dilated_affinity_terms,
)
from tritonaff.api.image_affinity import (
    image_affinity,
)
from tritonaff.api.instance_affinity import (
    InstanceAffinityTerms,
    instance_affinity_loss,
    instance_affinity_target,
    instance_affinity_terms,
)
from tritonaff.api.labels import (
    resize_labels,
)
from tritonaff.api.neighbors import (
    NeighborCounts,
    dilated_affinity_target,
    neighbor_categories,
    neighbor_counts,
    signal_weight,
)
from tritonaff.options import VARIANTS, WEIGHTINGS

__all__ = [
    "VARIANTS",
    "WEIGHTINGS",
    "AffinityFieldTerms",
    "AffinityRegressionTerms",
    "BoxPairwiseTerms",
    "DilatedAffinityTerms",
    "InstanceAffinityTerms",
    "NeighborCounts",
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
    "image_affinity",
    "instance_affinity_loss",
    "instance_affinity_target",
    "instance_affinity_terms",
    "label_affinity",
    "neighbor_categories",
    "neighbor_counts",
    "resize_labels",
    "signal_weight",
    "square_root_affinity",
]
