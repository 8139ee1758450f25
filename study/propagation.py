"""Why propagation along a predicted affinity harms, and settings that might not.

All of it at the resolution of the logits, for networks that were trained with dilated affinity.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise, product
from typing import Any

import torch
from evaluation import confusion, mean_iou
from torch import Tensor

from tritonaff import affinity_propagation, dilated_affinity_target
from tritonaff.metrics import AffinityAccuracy

SELF_WEIGHTS = 6.0, 24.0, 96.0  # lambda, the paper's first
STEEPNESSES = 7.0, 100.0  # mu, the paper's first
ITERATIONS = 1, 3, 10
# The pixels that take the result: every pixel; those whose largest probability is below SURE; those
# whose predicted affinity is "same" with every neighbour.
PIXELS = "all", "unsure", "inside"
SURE = 0.7
SETTINGS = list(product(SELF_WEIGHTS, STEEPNESSES, ITERATIONS, PIXELS))

Example = tuple[Tensor, Tensor, Tensor]  # probabilities, logits of affinity, labels


def search(examples: Iterable[Example], rates: list, ignore_index: int) -> list[float]:
    """Mean IoU without propagation, then with each of the SETTINGS."""
    tables = None
    for probs, affinity, labels in examples:
        count, before = probs.shape[1], probs.argmax(dim=1)
        if tables is None:
            tables = torch.zeros(1 + len(SETTINGS), count, count, dtype=torch.int64)
        found = [before]
        takes = {
            "all": torch.ones_like(before, dtype=torch.bool),
            "unsure": probs.amax(dim=1) < SURE,
            "inside": (affinity > 0).all(dim=1),
        }
        for self_weight, steepness in product(SELF_WEIGHTS, STEEPNESSES):
            after = probs
            for start, end in pairwise((0, *ITERATIONS)):
                after = affinity_propagation(
                    after,
                    affinity,
                    rates,
                    iterations=end - start,
                    self_weight=self_weight,
                    steepness=steepness,
                )
                found += [torch.where(takes[x], after.argmax(dim=1), before) for x in PIXELS]
        for table, prediction in zip(tables, found, strict=True):
            table += confusion(prediction, labels.numpy(), count, ignore_index)
    return [round(x, 5) for x in mean_iou(tables).tolist()]


COLUMNS = "pixels", "right", "right_after", "same", "other"


def by_category(examples: Iterable[Example], rates: list, ignore_index: int) -> dict[str, Any]:
    """For each rate and category: the accuracy of affinity; the number of pixels; how many are
    right before and after the paper's 10 iterations along this rate alone; and the sums of the
    gates to neighbours with the pixel's label and with another label.
    """
    counts = torch.zeros(len(rates), len(COLUMNS), 9, dtype=torch.float64)
    accuracy = AffinityAccuracy(rates, ignore_index)
    for probs, affinity, labels in examples:
        accuracy.update(affinity, labels)
        truth = dilated_affinity_target(labels, rates, ignore_index=ignore_index)
        before = probs.argmax(dim=1) == labels
        for table, rate, x, same in zip(
            counts, rates, affinity.split(8, dim=1), truth.split(8, dim=1), strict=True
        ):
            after = affinity_propagation(probs, x, [rate]).argmax(dim=1) == labels
            gates = torch.sigmoid(x * torch.tensor(STEEPNESSES[0]).log())
            pulls = ((gates * (same == wanted)).sum(dim=1) for wanted in (1, 0))
            counted = (labels != ignore_index) & ((same == 1) | (same == 0)).any(dim=1)
            category = 8 - (same == 0).sum(dim=1)[counted]
            for row, values in zip(
                table, (torch.ones_like(before), before, after, *pulls), strict=True
            ):
                row += torch.bincount(category, values[counted].double(), minlength=9)
    return {
        "accuracy": [
            [None if x != x else round(x, 4) for x in row]
            for row in accuracy.by_category().tolist()
        ],
        **{name: counts[:, k].round().tolist() for k, name in enumerate(COLUMNS)},
    }
