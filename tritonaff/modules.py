"""All operations as modules; see the files of :mod:`tritonaff.api`."""

from tritonaff.api.affinity_field import (
    AdaptiveAffinityFieldLoss,
    AffinityFieldLoss,
)
from tritonaff.api.affinity_propagation import (
    AffinityPropagation,
)
from tritonaff.api.affinity_regression import (
    AffinityRegressionLoss,
)
from tritonaff.api.box_pairwise import (
    BoxPairwiseLoss,
)
from tritonaff.api.deep_supervision import (
    DeepSupervision,
)
from tritonaff.api.dilated_affinity import (
    DilatedAffinityHead,
    DilatedAffinityLoss,
)
from tritonaff.api.image_affinity import (
    PAMR,
    PAR,
)
from tritonaff.api.instance_affinity import (
    InstanceAffinityLoss,
)

__all__ = [
    "PAMR",
    "PAR",
    "AdaptiveAffinityFieldLoss",
    "AffinityFieldLoss",
    "AffinityPropagation",
    "AffinityRegressionLoss",
    "BoxPairwiseLoss",
    "DeepSupervision",
    "DilatedAffinityHead",
    "DilatedAffinityLoss",
    "InstanceAffinityLoss",
]
