"""The losses in the calling convention of segmentation_models_pytorch, which need not be there."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tritonaff import checks

MODES = ("binary", "multiclass")


class SegmentationModelsLoss(nn.Module):
    """A loss of this library with the calling convention of segmentation_models_pytorch.

    Args:
        loss: :class:`tritonaff.AffinityFieldLoss`, :class:`tritonaff.AdaptiveAffinityFieldLoss` or
            :class:`tritonaff.AffinityRegressionLoss`. Its own ignore_index may be any label but a
            class.
        mode: ``"multiclass"``, or ``"binary"``: the single channel is the logit of class 1, and the
            loss sees two classes, where class 0 has the logit 0. The mode "multilabel" has no
            counterpart: affinity compares two pixels that have a single label each.
        from_logits: True: ``y_pred`` holds logits. False: ``y_pred`` holds probabilities.
        ignore_index: label of the pixels to leave out. None, the default here as there: all pixels
            count.

    Shapes:
        ``forward(y_pred, y_true)`` with y_pred (N, C, H, W), y_true (N, H, W) gives a scalar.
        Binary: y_pred (N, 1, H, W), y_true (N, H, W) or (N, 1, H, W) of any dtype that holds 0, 1
        and ignore_index; an adaptive loss has num_classes=2.

    Raises:
        TypeError, ValueError: a wrong option when the module is made, wrong tensors when it is
            called; on a CPU in eager mode a label that is neither a class nor ``ignore_index``,
            such as 255 in a mask of 0 and 255: elsewhere such pixels are left out.

    Example:
        >>> import torch, tritonaff
        >>> from tritonaff.smp import SegmentationModelsLoss
        >>> loss_fn = SegmentationModelsLoss(tritonaff.AffinityFieldLoss(), mode="binary")
        >>> y_pred = torch.randn(2, 1, 16, 16, requires_grad=True)
        >>> y_true = torch.randint(0, 2, (2, 1, 16, 16)).float()
        >>> loss_fn(y_pred, y_true).backward()
    """

    def __init__(
        self,
        loss: nn.Module,
        mode: str = "multiclass",
        from_logits: bool = True,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(loss, nn.Module):
            raise TypeError(f"loss must be a module, got {type(loss).__name__}")
        if not hasattr(loss, "ignore_index"):
            raise TypeError(f"loss must have an ignore_index, got {type(loss).__name__}")
        checks.check_option("mode", mode, MODES)
        self.loss = loss
        self.mode = mode
        self.from_logits = checks.check_bool("from_logits", from_logits)
        if ignore_index is not None:
            ignore_index = checks.check_ignore_index(ignore_index)
        self.ignore_index = ignore_index

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        if self.mode == "binary":
            shape = "N", 1, "H", "W"
            y_pred = checks.check_tensor("y_pred", y_pred, checks.LOGITS_DTYPES, shape)
        else:
            y_pred = checks.check_logits(y_pred, "y_pred")
        y_true = checks.check_target(y_true, "y_true")
        if not self.from_logits:
            # Half precision would lose 1 - p, and the logarithms of small p.
            y_pred = y_pred.to(torch.promote_types(y_pred.dtype, torch.float32))
        if self.mode == "binary":
            # With probabilities, log(1 - p) and log p are the logits of the two classes.
            other = torch.zeros_like(y_pred) if self.from_logits else 1 - y_pred
            y_pred = torch.cat((other, y_pred), dim=1)
        if not self.from_logits:
            y_pred = y_pred.clamp_min(torch.finfo(y_pred.dtype).tiny).log()
        loss: Tensor = self.loss(y_pred, self._labels_of_the_loss(y_true, y_pred.shape[1]))
        return loss

    def _labels_of_the_loss(self, y_true: Tensor, num_classes: int) -> Tensor:
        """The labels, with the loss's ignore_index in the place of this module's."""
        ignored, by_loss = self.ignore_index, self.loss.ignore_index
        ignored_by_loss = checks.label_to_ignore(by_loss)  # type: ignore[arg-type]
        if ignored is not None and by_loss is None:
            raise ValueError(
                f"loss.ignore_index must be a label with ignore_index {ignored}, got None"
            )
        if 0 <= ignored_by_loss < num_classes and ignored_by_loss != ignored:
            raise ValueError(
                f"loss.ignore_index must be no class in [0, {num_classes}) with the ignore_index "
                f"{ignored}, got {ignored_by_loss}: make the loss with another ignore_index"
            )
        label = y_true.to(torch.int64)
        if checks.may_look_into(label):
            wrong = (label < 0) | (label >= num_classes)
            if ignored is not None:
                wrong &= label != ignored
            if wrong.any():
                raise ValueError(
                    f"y_true must hold classes in [0, {num_classes}) or ignore_index {ignored}, "
                    f"got {torch.unique(label[wrong])[:5].tolist()} at {int(wrong.sum())} pixels: "
                    "divide a mask of 0 and 255 by 255, or pass ignore_index, the label of the "
                    "pixels to leave out"
                )
        return label if ignored is None else label.masked_fill(label == ignored, ignored_by_loss)

    def extra_repr(self) -> str:
        options = f"mode={self.mode!r}, from_logits={self.from_logits}"
        return f"{options}, ignore_index={self.ignore_index}"
