"""The adaptive affinity field loss in the registry of MMSegmentation: a config imports this module
with ``custom_imports = dict(imports=["tritonaff.mmseg"])``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tritonaff import checks
from tritonaff.modules import AdaptiveAffinityFieldLoss


class AAFLoss(AdaptiveAffinityFieldLoss):
    """:class:`tritonaff.AdaptiveAffinityFieldLoss` for a decode head's ``loss_decode``.

    A head builds the loss from ``dict(type="AAFLoss", num_classes=19)`` beside its other losses and
    calls it with logits as large as the labels and with the head's ignore_index, which replaces the
    ignore_index of the options. The loss's weights are parameters of the head: the runner's
    optimiser trains them, and
    ``paramwise_cfg=dict(custom_keys={"edge_scores": dict(decay_mult=0.0)})`` spares both weights
    the weight decay.

    Args:
        num_classes, options: see :class:`tritonaff.AdaptiveAffinityFieldLoss`.
        loss_weight: factor of the loss, at least 0.
        loss_name: name of the loss in the log; the head trains with the loss if the name begins
            with ``loss_``.
        use_sigmoid: the option ``activation="sigmoid"`` by MMSegmentation's name: for a head of
            ``out_channels=1`` with ``num_classes=1`` here.
        class_weight: the option ``weight`` by MMSegmentation's name, for ``cross_entropy=True``.

    Shapes:
        ``forward(cls_score, label, ...)`` with cls_score (N, C, H, W), label (N, H, W) gives a
        scalar.

    Raises:
        TypeError, ValueError: a wrong option when the module is made, wrong tensors when it is
            called; a weight (as a pixel sampler gives), an avg_factor or a reduction_override other
            than "mean": pairs of pixels have none of them.

    Example:
        >>> import torch
        >>> from tritonaff.mmseg import AAFLoss
        >>> loss_decode = AAFLoss(num_classes=3, loss_weight=0.5)
        >>> score, label = torch.randn(1, 3, 16, 16), torch.randint(0, 3, (1, 16, 16))
        >>> losses = {loss_decode.loss_name: loss_decode(score, label, ignore_index=255)}
        >>> list(losses)
        ['loss_aaf']
    """

    def __init__(
        self,
        num_classes: int,
        loss_weight: float = 1.0,
        loss_name: str = "loss_aaf",
        use_sigmoid: bool = False,
        class_weight: Tensor | Sequence[float] | None = None,
        **options: Any,
    ) -> None:
        if checks.check_bool("use_sigmoid", use_sigmoid):
            options["activation"] = "sigmoid"
        if class_weight is not None:
            options["weight"] = class_weight
        super().__init__(num_classes, **options)
        self.loss_weight = checks.check_number("loss_weight", loss_weight, at_least=0)
        self.loss_name = loss_name

    def forward(  # type: ignore[override]
        self,
        cls_score: Tensor,
        label: Tensor,
        weight: None = None,
        avg_factor: None = None,
        reduction_override: str | None = None,
        ignore_index: int | None = None,
    ) -> Tensor:
        """The loss of a batch, as decode heads call it: cls_score (N, C, H, W), label (N, H, W)."""
        for name, value in (("weight", weight), ("avg_factor", avg_factor)):
            if value is not None:
                raise ValueError(
                    f"{name} must be None, got {type(value).__name__}: {checks.NO_PIXEL_WEIGHTS}"
                )
        if reduction_override is not None:
            checks.check_option("reduction_override", reduction_override, ("mean",))
        if ignore_index is not None:
            self.ignore_index = checks.check_ignore_index(ignore_index)
        loss: Tensor = self.loss_weight * super().forward(cls_score, label)
        return loss

    def extra_repr(self) -> str:
        name = f"loss_name={self.loss_name!r}"
        return f"{super().extra_repr()}, loss_weight={self.loss_weight}, {name}"


try:
    # MMEngine's registry: MMSegmentation's own registry looks here too.
    from mmengine.registry import MODELS
except ImportError:
    pass
else:
    MODELS.register_module(module=AAFLoss)
