"""The losses in the words of MONAI, which need not be there. Each class takes MONAI's arguments
beside the arguments of its base class:

- ``softmax`` or ``sigmoid``: one of them must be True. The losses take logits, where MONAI's take
  probabilities unless told otherwise.
- ``to_onehot_y``: True: the target (N, 1, H, W) holds class numbers. False, the default as in
  MONAI: the target (N, C, H, W) is one-hot, or with sigmoid has any number of labels.
- ``include_background``: False leaves out class 0.
- ``ignore_index``: None by default, as in MONAI.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import tritonaff
from tritonaff import checks


class _InWordsOfMonai(nn.Module):
    """In front of a loss among the bases of a class."""

    activation: str
    ignore_index: int | None

    def __init__(
        self,
        *args: Any,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        ignore_index: int | None = None,
        **options: Any,
    ) -> None:
        if checks.check_bool("sigmoid", sigmoid) == checks.check_bool("softmax", softmax):
            raise ValueError(
                f"one of sigmoid and softmax must be True, got sigmoid={sigmoid} and "
                f"softmax={softmax}: the losses take logits, not probabilities"
            )
        activation = "sigmoid" if sigmoid else "softmax"
        super().__init__(*args, activation=activation, ignore_index=ignore_index, **options)
        self.to_onehot_y = checks.check_bool("to_onehot_y", to_onehot_y)

    def forward(self, input: Tensor, target: Tensor, *args: Any, **options: Any) -> Any:
        """The loss of a batch: input (N, C, H, W) of logits, target as the options say; further
        arguments are the loss's own.
        """
        return super().forward(input, self._labels(input, target), *args, **options)

    def _labels(self, input: Tensor, target: Tensor) -> Tensor:
        """MONAI's target as the labels that the loss takes."""
        logits = checks.check_logits(input, "input", self.activation)
        by_channel = self.activation == "sigmoid"
        num_channels = logits.shape[1]
        if num_channels > 1 and not self.to_onehot_y:
            target = checks.check_target_by_channel(target, logits)
            return target if by_channel else _classes(target)
        target = checks.check_target(target)
        if num_channels > 1 and by_channel:
            classes = torch.arange(num_channels, device=target.device)[:, None, None]
            label = target.to(torch.int64)[:, None]
            ignored = label == checks.label_to_ignore(self.ignore_index)
            return label.where(ignored, (label == classes).to(torch.int64))
        return target

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, to_onehot_y={self.to_onehot_y}"


class AffinityFieldLoss(_InWordsOfMonai, tritonaff.AffinityFieldLoss):  # type: ignore[misc]
    """:class:`tritonaff.AffinityFieldLoss` in the words of MONAI.

    Args:
        args, options: see :class:`tritonaff.AffinityFieldLoss`, which has ``include_background``
            and ``reduction`` too.
        to_onehot_y, sigmoid, softmax, ignore_index: see :mod:`tritonaff.monai`.

    Shapes:
        ``forward(input, target)`` with logits (N, C, H, W) and a target (N, C, H, W), or
        (N, 1, H, W) with ``to_onehot_y`` or one channel, of any dtype that holds whole numbers,
        gives a scalar.

    Raises:
        TypeError, ValueError: a wrong option when the module is made, wrong tensors when it is
            called; in eager mode on a CPU a target that is not one-hot.

    Example:
        >>> import torch
        >>> from tritonaff.monai import AffinityFieldLoss
        >>> loss_fn = AffinityFieldLoss(to_onehot_y=True, softmax=True, cross_entropy=True)
        >>> input = torch.randn(2, 3, 16, 16, requires_grad=True)
        >>> loss_fn(input, torch.randint(0, 3, (2, 1, 16, 16)).float()).backward()
    """


class AdaptiveAffinityFieldLoss(  # type: ignore[misc]
    _InWordsOfMonai, tritonaff.AdaptiveAffinityFieldLoss
):
    """:class:`tritonaff.AdaptiveAffinityFieldLoss` in the words of MONAI: see
    :class:`AffinityFieldLoss`. The first argument is ``num_classes``, the number of channels; the
    loss has parameters, :meth:`tritonaff.AdaptiveAffinityFieldLoss.optimizer_group`.

    Example:
        >>> from tritonaff.monai import AdaptiveAffinityFieldLoss
        >>> AdaptiveAffinityFieldLoss(3, to_onehot_y=True, softmax=True).edge_weight.shape
        torch.Size([3, 3])
    """


class AffinityRegressionLoss(_InWordsOfMonai, tritonaff.AffinityRegressionLoss):
    """:class:`tritonaff.AffinityRegressionLoss` in the words of MONAI: see
    :class:`AffinityFieldLoss`. ``include_background=False`` needs sigmoid: with softmax the
    affinity of two pixels is a sum over all classes.

    Example:
        >>> import torch
        >>> from tritonaff.monai import AffinityRegressionLoss
        >>> loss_fn = AffinityRegressionLoss(sigmoid=True, include_background=False)
        >>> input = torch.randn(2, 3, 16, 16, requires_grad=True)
        >>> loss_fn(input, torch.randint(0, 2, (2, 3, 16, 16))).backward()
    """

    def __init__(self, *args: Any, include_background: bool = True, **options: Any) -> None:
        super().__init__(*args, **options)
        self.include_background = checks.check_bool("include_background", include_background)
        if self.activation == "softmax" and not include_background:
            raise ValueError(
                "include_background must be True with softmax: the affinity of two pixels is a sum "
                "over all classes"
            )

    def forward(  # type: ignore[override]
        self, input: Tensor, target: Tensor, *args: Any, **options: Any
    ) -> Any:
        """The loss of a batch: input (N, C, H, W) of logits, target as the options say."""
        target = self._labels(input, target)
        if not self.include_background and input.shape[1] > 1:
            input, target = input[:, 1:], target[:, 1:]
        return tritonaff.AffinityRegressionLoss.forward(self, input, target, *args, **options)


def _classes(target: Tensor) -> Tensor:
    """The class numbers (N, H, W) of a one-hot target (N, C, H, W)."""
    if checks.may_look_into(target):
        wrong = ((target != 0) & (target != 1)).any(dim=1) | (target.sum(dim=1) != 1)
        if wrong.any():
            raise ValueError(
                f"target must be one-hot, a single 1 at every pixel, got {int(wrong.sum())} other "
                "pixels: pass to_onehot_y=True with class numbers (N, 1, H, W), or sigmoid=True "
                "with several labels per pixel"
            )
    return target.argmax(dim=1)
