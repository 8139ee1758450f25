"""Deep supervision: a loss at several resolutions of one network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tritonaff import checks
from tritonaff.api.labels import resize_labels


class DeepSupervision(nn.Module):
    r"""A weighted sum of one loss over the outputs of a network at several resolutions.

    .. math:: L = \sum_i w_i \, loss(logits_i, target_i)

    Kernel sizes, rates and offsets are in pixels of the resolution at which the loss is applied: a
    size of 3 at an eighth of the image's resolution compares pixels 8 apart.

    Args:
        loss: a module of this library, or any module that is called with logits and a target. An
            adaptive loss learns one set of weights for all resolutions.
        weights: a factor of at least 0 for each output, from the first one on; an output whose
            factor is 0 is not looked at. Default: halves 1, 1/2, 1/4, ..., divided by their sum.
        align_corners: how one target is resized: the pixels of the corners are kept, instead of the
            image's edges.

    Shapes:
        ``loss(logits, target)`` with a sequence of logits (N, C, H, W), or (N, K, D, H, W), and one
        target or as many, gives the loss's value.

    Raises:
        TypeError, ValueError: a wrong option when the module is made; another number of logits than
            of targets or weights; as the loss does.

    Sources: nnU-Net's wrapper, whose last factor is 0, and MONAI's DeepSupervisionLoss, whose
    factors are 1, 1/2, 1/4, ...; both may wrap a loss of this library too.

    Example:
        >>> import torch, tritonaff
        >>> loss_fn = tritonaff.DeepSupervision(tritonaff.AffinityFieldLoss((3, 5)))
        >>> outputs = [torch.randn(1, 3, s, s, requires_grad=True) for s in (32, 16, 8)]
        >>> loss_fn(outputs, torch.randint(0, 3, (1, 32, 32))).backward()
    """

    def __init__(
        self,
        loss: nn.Module,
        weights: Sequence[float] | None = None,
        *,
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(loss, nn.Module):
            raise TypeError(f"loss must be a module, got {type(loss).__name__}")
        self.loss = loss
        self.weights = None if weights is None else checks.check_factors("weights", weights)
        self.align_corners = checks.check_bool("align_corners", align_corners)

    def forward(
        self,
        logits: Tensor | Sequence[Tensor],
        target: Tensor | Sequence[Tensor],
        progress: float | Tensor | None = None,
    ) -> Tensor:
        """The loss of all outputs.

        Args:
            logits: a sequence of logits, (N, C, H, W) or (N, K, D, H, W), each of its own size. A
                single tensor, as networks give in evaluation, is one output with the factor 1.
            target: one target, which is resized to each of the logits, or a sequence of targets,
                one for each.
            progress: fraction of training done, in [0, 1], for losses that take it.

        Returns:
            A scalar, or whatever the loss gives.
        """
        options = {} if progress is None else {"progress": progress}
        if isinstance(logits, Tensor):
            value: Tensor = self.loss(logits, target, **options)
            return value
        weights = self._weights(len(logits))
        targets = [target] * len(logits) if isinstance(target, Tensor) else target
        if not len(logits) == len(targets) == len(weights):
            raise ValueError(
                f"logits must be as many as targets and weights, got {len(logits)}, "
                f"{len(targets)} and {len(weights)}"
            )
        losses = []
        for x, labels, weight in zip(logits, targets, weights, strict=True):
            if weight == 0:
                continue
            if isinstance(target, Tensor):
                labels = resize_labels(labels, x.shape[2:], align_corners=self.align_corners)
            losses.append(weight * self.loss(x, labels, **options))
        return torch.stack(losses).sum(dim=0)

    def _weights(self, number: int) -> tuple[float, ...]:
        if self.weights is not None:
            return self.weights
        total = 2 - 0.5 ** (number - 1)
        return tuple(0.5**i / total for i in range(number))

    def extra_repr(self) -> str:
        weights = "halves" if self.weights is None else self.weights
        return f"weights={weights}, align_corners={self.align_corners}"
