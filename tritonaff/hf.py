"""The losses in the calling convention of the Trainer of transformers, which need not be there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

import tritonaff
from tritonaff import checks

Resolution = Literal["labels", "logits"]
RESOLUTIONS: tuple[Resolution, ...] = ("labels", "logits")
# The label that the Trainer leaves out where it counts the items of a batch.
NOT_AN_ITEM = -100


class SegmentationLoss(nn.Module):
    """A loss of this library as ``Trainer(..., compute_loss_func=SegmentationLoss(loss))``.

    Models of semantic segmentation give logits at a fraction of the labels' resolution, SegFormer
    at a quarter, and enlarge them bilinearly for their own loss.

    Args:
        loss: :class:`tritonaff.AffinityFieldLoss`, :class:`tritonaff.AdaptiveAffinityFieldLoss` or
            :class:`tritonaff.AffinityRegressionLoss`; with ``num_labels=1`` of the activation
            "sigmoid". The models' own ``semantic_loss_ignore_index`` is 255, as these losses'
            ignore_index.
        resolution: ``"labels"``: logits are enlarged to the labels' size, as the models do.
            ``"logits"``: the labels are sampled at the logits' size, for a fraction of the time;
            kernel sizes then reach further.

    Shapes:
        ``forward(outputs, labels, num_items_in_batch=None)`` with the model's outputs, whose logits
        are (N, C, h, w), and labels (N, H, W), with sigmoid (N, C, H, W) too, gives a scalar.
        ``num_items_in_batch`` is the number of labels, in all processes and all steps whose
        gradients the Trainer accumulates: the scalar is then this batch's share of their mean.

    Raises:
        TypeError, ValueError: a wrong option when the module is made, wrong outputs or labels when
            it is called.

    Example:
        >>> import torch, tritonaff
        >>> from tritonaff.hf import SegmentationLoss
        >>> compute_loss = SegmentationLoss(tritonaff.AffinityFieldLoss(cross_entropy=True))
        >>> outputs = {"logits": torch.randn(2, 3, 16, 16, requires_grad=True)}
        >>> compute_loss(outputs, torch.randint(0, 3, (2, 64, 64))).backward()
    """

    def __init__(self, loss: nn.Module, resolution: Resolution = "labels") -> None:
        super().__init__()
        if not isinstance(loss, nn.Module):
            raise TypeError(f"loss must be a module, got {type(loss).__name__}")
        self.loss = loss
        self.resolution = checks.check_option("resolution", resolution, RESOLUTIONS)

    def forward(
        self,
        outputs: Mapping[str, Tensor] | Sequence[Tensor],
        labels: Tensor,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The loss of a batch, as the Trainer calls it.

        Args:
            outputs: the model's outputs, with the key "logits" or the logits in front.
            labels: (N, H, W), with sigmoid (N, C, H, W) too.
            num_items_in_batch: number of labels in all processes and all steps whose gradients are
                accumulated.
        """
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
        if not isinstance(labels, Tensor):
            raise TypeError(
                f"labels must be a tensor, got {type(labels).__name__}: the data set's items need "
                "the key 'labels'"
            )
        target = labels
        if self.resolution == "logits":
            target = tritonaff.resize_labels(labels, logits.shape[-2:])
        elif logits.shape[-2:] != labels.shape[-2:]:
            logits = F.interpolate(logits, labels.shape[-2:], mode="bilinear")
        loss: Tensor = self.loss(logits, target)
        if num_items_in_batch is not None:
            loss = loss * ((labels != NOT_AN_ITEM).sum() / num_items_in_batch)
        return loss

    def extra_repr(self) -> str:
        return f"resolution={self.resolution!r}"
