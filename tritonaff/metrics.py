"""Metrics that show what structured losses are for. Counts stay on the tensors' device until
``compute()``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tritonaff import checks


class BoundaryScores(NamedTuple):
    """Each (C,) float64 on the CPU: a value per class, NaN for a class without any boundary."""

    precision: Tensor
    recall: Tensor
    f: Tensor


class BoundaryScore:
    """Precision, recall and F of the boundaries of each class, accumulated over a data set.

    A boundary pixel of class c has label c and, among its 4 neighbours, a pixel that counts and has
    another one. Precision is the fraction of the prediction's boundary pixels with a boundary pixel
    of the truth of the same class at most ``tolerance`` pixels away in row and column; recall is
    the same with the two exchanged; F is their harmonic mean. Ignored pixels belong to no boundary.
    All images count into one precision and one recall.

    This is not the contour benchmark of BSDS, which matches boundaries one to one and averages over
    annotators: here one boundary pixel may stand for several.

    Args:
        num_classes: C, at least 1.
        tolerance: in pixels, at least 0.
        ignore_index: label of the pixels of the truth to leave out.

    Raises:
        TypeError, ValueError: a wrong option; from ``update``, tensors of a wrong dtype, shape or
            device.

    Example:
        >>> import torch
        >>> from tritonaff.metrics import BoundaryScore
        >>> truth = torch.zeros(1, 8, 8, dtype=torch.long)
        >>> truth[:, :, 4:] = 1
        >>> prediction = torch.zeros_like(truth)
        >>> prediction[:, :, 5:] = 1  # the boundary is one pixel off, and a quarter of it missing
        >>> prediction[:, :2] = 0
        >>> score = BoundaryScore(num_classes=2, tolerance=1)
        >>> score.update(prediction, truth)
        >>> score.compute().recall.tolist()
        [0.875, 0.875]
    """

    def __init__(self, num_classes: int, tolerance: int = 1, ignore_index: int = 255) -> None:
        self.num_classes = checks.check_int("num_classes", num_classes, at_least=1)
        self.tolerance = checks.check_int("tolerance", tolerance, at_least=0)
        self.ignore_index = checks.check_int("ignore_index", ignore_index)
        self.reset()

    def reset(self) -> None:
        # Rows: boundary pixels predicted, of these matched, boundary pixels true, of these matched.
        self.counts = torch.zeros(4, self.num_classes, dtype=torch.int64)

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Adds a batch: predicted classes and labels, both (N, H, W) of uint8, int32 or int64."""
        checks.check_tensor("target", target, checks.TARGET_DTYPES, ("N", "H", "W"))
        checks.check_tensor("prediction", prediction, checks.TARGET_DTYPES, tuple(target.shape))
        if prediction.device != target.device:
            raise ValueError(
                f"prediction and target must be on one device, "
                f"got {prediction.device} and {target.device}"
            )
        counted = target != self.ignore_index
        predicted = self._boundaries(prediction, counted)
        true = self._boundaries(target, counted)
        rows = (predicted, predicted & self._near(true), true, true & self._near(predicted))
        self.counts = self.counts.to(target.device) + torch.stack(
            [row.sum(dim=(0, 2, 3)) for row in rows]
        )

    def compute(self) -> BoundaryScores:
        """The scores of all batches since the start or the last ``reset``."""
        predicted, predicted_matched, true, true_matched = self.counts.cpu().double()
        nothing = (predicted + true) == 0
        precision = (predicted_matched / predicted.clamp(min=1)).masked_fill(nothing, torch.nan)
        recall = (true_matched / true.clamp(min=1)).masked_fill(nothing, torch.nan)
        f = 2 * precision * recall / (precision + recall).clamp(min=torch.finfo(torch.float64).tiny)
        return BoundaryScores(precision, recall, f)

    def _boundaries(self, label: Tensor, counted: Tensor) -> Tensor:
        """(N, C, H, W): which pixels are on the boundary of which class."""
        differs = torch.zeros_like(counted)
        for dim in (1, 2):
            size = label.shape[dim] - 1
            first, second = label.narrow(dim, 0, size), label.narrow(dim, 1, size)
            step = (first != second) & counted.narrow(dim, 0, size) & counted.narrow(dim, 1, size)
            differs.narrow(dim, 0, size).logical_or_(step)
            differs.narrow(dim, 1, size).logical_or_(step)
        classes = torch.arange(self.num_classes, device=label.device)[:, None, None]
        return (label[:, None] == classes) & differs[:, None]

    def _near(self, boundary: Tensor) -> Tensor:
        size = 2 * self.tolerance + 1
        return F.max_pool2d(boundary.float(), size, stride=1, padding=self.tolerance) > 0
