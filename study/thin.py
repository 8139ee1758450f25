"""Scores of thin structures: cracks in a road, membranes between cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import ndimage
from skimage.metrics import adapted_rand_error
from skimage.morphology import skeletonize

TENTHS = tuple(k / 10 for k in range(1, 10))  # thresholds of the probability
TOLERANCE = 2.0  # pixels, as papers on cracks have it
COUNTS = (
    "predicted",  # pixels that are predicted thin
    "hit",  # and are labelled thin
    "near",  # or at most TOLERANCE from a pixel that is labelled thin
    "true",  # pixels that are labelled thin
    "found",  # and at most TOLERANCE from a pixel that is predicted thin
    "predicted_skeleton",
    "predicted_skeleton_hit",  # pixels of the predicted skeleton that are labelled thin
    "true_skeleton",
    "true_skeleton_hit",  # pixels of the labels' skeleton that are predicted thin
)


class ThinScore:
    """Counts over the images of a split, for each threshold, from which follow IoU, F1, F1 with a
    tolerance and clDice; and, if ``cells``, the adapted Rand error, a mean over images.
    """

    def __init__(
        self, ignore_index: int, cells: bool = False, thresholds: Sequence[float] = TENTHS
    ) -> None:
        self.ignore_index, self.cells, self.thresholds = ignore_index, cells, thresholds
        self.counts = np.zeros((len(thresholds), len(COUNTS)), np.int64)
        self.rand: list[list[float]] = []  # by image and threshold

    def update(self, probs: np.ndarray, labels: np.ndarray) -> None:
        """Adds an image: probabilities of the thin class and labels, 1 for thin, both (H, W)."""
        counted = labels != self.ignore_index
        true = labels == 1
        true_skeleton, from_true = skeletonize(true), distance_to(true)
        for row, threshold in zip(self.counts, self.thresholds, strict=True):
            predicted = (probs >= threshold) & counted
            skeleton = skeletonize(predicted)
            masks = (
                predicted,
                predicted & true,
                predicted & (from_true <= TOLERANCE),
                true,
                true & (distance_to(predicted) <= TOLERANCE),
                skeleton,
                skeleton & true,
                true_skeleton,
                true_skeleton & predicted,
            )
            row += [np.count_nonzero(mask) for mask in masks]
        if self.cells:
            self.rand.append([rand_error(probs < t, labels == 0) for t in self.thresholds])

    def compute(self) -> dict[str, Any]:
        """The thresholds, and by name a number for each."""
        found: dict[str, Any] = {"thresholds": list(self.thresholds)}
        found |= zip(COUNTS, self.counts.T.tolist(), strict=True)
        if self.cells:
            found["rand_error"] = np.mean(self.rand, axis=0).round(5).tolist()
        return found


def distance_to(mask: np.ndarray) -> np.ndarray:
    """Distance of each pixel to the nearest pixel of the mask; infinite if the mask is empty."""
    return ndimage.distance_transform_edt(~mask) if mask.any() else np.full(mask.shape, np.inf)


def rand_error(predicted: np.ndarray, true: np.ndarray) -> float:
    """Adapted Rand error of the cells, the connected parts (4 neighbours) of two masks of cells'
    interiors, over the pixels inside true cells. Predicted membranes are thinned to nothing: each
    of their pixels goes to the nearest predicted cell.
    """
    cells, count = ndimage.label(predicted)
    if count:
        nearest = ndimage.distance_transform_edt(
            ~predicted, return_distances=False, return_indices=True
        )
        cells = cells[tuple(nearest)]
    return float(adapted_rand_error(ndimage.label(true)[0], cells)[0])


def tolerant_f1(thin: dict[str, Any]) -> np.ndarray:
    """F1 by threshold, percent, from the counts; a pixel is right within the tolerance."""
    return harmonic_mean(thin, ("near", "predicted"), ("found", "true"))


def harmonic_mean(thin: dict[str, Any], *shares: tuple[str, str]) -> np.ndarray:
    """Percent, by threshold, of two shares of counts."""
    first, second = (np.array(thin[a]) / np.maximum(thin[b], 1) for a, b in shares)
    return 100 * 2 * first * second / np.maximum(first + second, 1e-12)
