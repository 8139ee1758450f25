"""The losses in the calling convention of segmentation_models_pytorch, which need not be there."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from tritonaff import checks

Mode = Literal["multiclass", "binary", "multilabel"]
# The options of the loss in each mode.
ACTIVATIONS: dict[Mode, tuple[str, ...]] = {
    "multiclass": ("softmax",),
    "binary": ("sigmoid", "softmax"),
    "multilabel": ("sigmoid",),
}


class SegmentationModelsLoss(nn.Module):
    """A loss of this library with the calling convention of segmentation_models_pytorch.

    Args:
        loss: :class:`tritonaff.AffinityFieldLoss`, :class:`tritonaff.AdaptiveAffinityFieldLoss` or
            :class:`tritonaff.AffinityRegressionLoss`. Its own ignore_index may be any label but a
            class; None only if ``ignore_index`` here is None too.
        mode: ``"multiclass"`` with a loss of the activation "softmax"; ``"multilabel"``, a channel
            for each label, with "sigmoid"; ``"binary"``, one channel, with "sigmoid", or with
            "softmax" for the same loss over two classes, where class 0 has the logit 0.
        from_logits: True: ``y_pred`` holds logits. False: ``y_pred`` holds probabilities.
        ignore_index: label of the pixels to leave out. None, the default here as there: all pixels
            count.

    Shapes:
        ``forward(y_pred, y_true)`` with y_pred (N, C, H, W), y_true (N, H, W) or (N, 1, H, W) gives
        a scalar. Binary: C = 1, y_true of any dtype that holds 0, 1 and ignore_index; an adaptive
        loss has num_classes=1, with "softmax" num_classes=2. Multilabel: y_true (N, C, H, W)
        likewise.

    Raises:
        TypeError, ValueError: a wrong option when the module is made, wrong tensors when it is
            called; on a CPU in eager mode a label that is neither a class nor ``ignore_index``,
            such as 255 in a mask of 0 and 255: elsewhere such pixels are left out.

    Example:
        >>> import torch, tritonaff
        >>> from tritonaff.smp import SegmentationModelsLoss
        >>> field = tritonaff.AffinityFieldLoss(activation="sigmoid", cross_entropy=True)
        >>> loss_fn = SegmentationModelsLoss(field, mode="binary")
        >>> y_pred = torch.randn(2, 1, 16, 16, requires_grad=True)
        >>> y_true = torch.randint(0, 2, (2, 1, 16, 16)).float()
        >>> loss_fn(y_pred, y_true).backward()
    """

    def __init__(
        self,
        loss: nn.Module,
        mode: Mode = "multiclass",
        from_logits: bool = True,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(loss, nn.Module):
            raise TypeError(f"loss must be a module, got {type(loss).__name__}")
        for name in ("ignore_index", "activation"):
            if not hasattr(loss, name):
                raise TypeError(f"loss must have an {name}, got {type(loss).__name__}")
        activations = ACTIVATIONS[checks.check_option("mode", mode, tuple(ACTIVATIONS))]
        if loss.activation not in activations:
            raise ValueError(
                f"loss must have the activation {activations[0]!r} with mode {mode!r}, got "
                f"{loss.activation!r}: make the loss with activation={activations[0]!r}"
            )
        self.loss = loss
        self.mode = mode
        self.from_logits = checks.check_bool("from_logits", from_logits)
        if ignore_index is not None:
            ignore_index = checks.check_ignore_index(ignore_index)
        self.ignore_index = ignore_index

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        """The loss of a batch: y_pred (N, C, H, W), y_true (N, H, W) or, in the modes "binary" and
        "multilabel", (N, C, H, W).
        """
        by_channel = self.loss.activation == "sigmoid"
        if self.mode == "binary":
            shape = "N", 1, "H", "W"
            y_pred = checks.check_tensor("y_pred", y_pred, checks.LOGITS_DTYPES, shape)
        else:
            y_pred = checks.check_logits(y_pred, "y_pred", "sigmoid" if by_channel else "softmax")
        if by_channel:
            y_true = checks.check_target_by_channel(y_true, y_pred, "y_true")
        else:
            y_true = checks.check_target(y_true, "y_true")
        if not self.from_logits:
            # Half precision would lose 1 - p, and the logarithms of small p.
            probs = y_pred.to(torch.promote_types(y_pred.dtype, torch.float32))
            y_pred = _log(probs) if self.mode == "multiclass" else _log(probs) - _log(1 - probs)
        if self.mode == "binary" and not by_channel:
            y_pred = torch.cat((torch.zeros_like(y_pred), y_pred), dim=1)
        loss: Tensor = self.loss(
            y_pred, self._labels_of_the_loss(y_true, 2 if by_channel else y_pred.shape[1])
        )
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


def _log(probs: Tensor) -> Tensor:
    return probs.clamp_min(torch.finfo(probs.dtype).tiny).log()
