"""The losses as segmentation_models_pytorch calls its own; that library itself is not needed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tritonaff import checks

MODES = ("binary", "multiclass")


class SegmentationModelsLoss(nn.Module):
    """A loss of this library, called as those of segmentation_models_pytorch are.

    Args:
        loss: :class:`tritonaff.AffinityFieldLoss`, :class:`tritonaff.AdaptiveAffinityFieldLoss` or
            :class:`tritonaff.AffinityRegressionLoss`. It has the ignore_index: 255 by default,
            where theirs is None. Masks of 0 and 255 are to be divided by 255 first.
        mode: ``"multiclass"``, or ``"binary"``: then the one channel is the logit of class 1, and
            the loss sees two classes, the other with the logit 0. Their "multilabel" has no
            counterpart: affinity compares the one label of a pixel with that of another.
        from_logits: whether ``y_pred`` holds logits; if not, probabilities.

    Shapes:
        ``forward(y_pred, y_true)`` with y_pred (N, C, H, W), y_true (N, H, W) gives a scalar.
        Binary: y_pred (N, 1, H, W), y_true (N, H, W) or (N, 1, H, W) of any dtype that holds 0, 1
        and the loss's ignore_index; an adaptive loss has num_classes=2.

    Raises:
        TypeError, ValueError: a wrong option when the module is made, wrong tensors when it is
            called.

    Example:
        >>> import torch, tritonaff
        >>> from tritonaff.smp import SegmentationModelsLoss
        >>> loss_fn = SegmentationModelsLoss(tritonaff.AffinityFieldLoss(), mode="binary")
        >>> y_pred = torch.randn(2, 1, 16, 16, requires_grad=True)
        >>> y_true = torch.randint(0, 2, (2, 1, 16, 16)).float()
        >>> loss_fn(y_pred, y_true).backward()
    """

    def __init__(self, loss: nn.Module, mode: str = "multiclass", from_logits: bool = True) -> None:
        super().__init__()
        if not isinstance(loss, nn.Module):
            raise TypeError(f"loss must be a module, got {type(loss).__name__}")
        checks.check_option("mode", mode, MODES)
        self.loss = loss
        self.mode = mode
        self.from_logits = checks.check_bool("from_logits", from_logits)

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        checks.check_logits(y_pred, "y_pred")
        if not isinstance(y_true, Tensor):
            raise TypeError(f"y_true must be a tensor, got {type(y_true).__name__}")
        if self.mode == "binary":
            if y_pred.shape[1] != 1:
                raise ValueError(f"y_pred must have one channel, got shape {tuple(y_pred.shape)}")
            # With probabilities, log(1 - p) and log p are the logits of the two classes.
            other = torch.zeros_like(y_pred) if self.from_logits else 1 - y_pred
            y_pred = torch.cat((other, y_pred), dim=1)
            if y_true.dim() == 4:
                if y_true.shape[1] != 1:
                    raise ValueError(
                        f"y_true must have one channel, got shape {tuple(y_true.shape)}"
                    )
                y_true = y_true[:, 0]
            label = y_true.to(torch.int64)
            if checks.may_look_into(y_true) and not torch.equal(label.to(y_true.dtype), y_true):
                raise ValueError("y_true must hold whole numbers, got soft labels")
            y_true = label
        if not self.from_logits:
            y_pred = y_pred.clamp_min(torch.finfo(y_pred.dtype).tiny).log()
        loss: Tensor = self.loss(y_pred, y_true)
        return loss

    def extra_repr(self) -> str:
        return f"mode={self.mode!r}, from_logits={self.from_logits}"
