"""Metrics of trained networks."""

from __future__ import annotations

import statistics
import time
from typing import Any

import crf
import numpy as np
import torch
from architecture import STRIDE, Network
from evaluation import confusion, mean_iou
from images import Data, ImageFolder, Item
from plan import SEEDS, Run
from torch import Tensor
from torch.nn import functional as F
from training import outputs, rounded

from tritonaff import (
    affinity_propagation,
    dilated_affinity_target,
    label_affinity,
    square_root_affinity,
)
from tritonaff.metrics import AffinityAccuracy, BoundaryScore, InstanceMeanIoU

TOLERANCE = 1  # of boundaries, in pixels of the image


class Score:
    """All metrics of a split, on full images."""

    def __init__(self, folder: ImageFolder) -> None:
        self.folder = folder
        num_classes, ignore_index = len(folder.classes), folder.ignore_index
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        self.boundary = BoundaryScore(num_classes, TOLERANCE, ignore_index)
        self.instance = InstanceMeanIoU(num_classes, ignore_index)

    def update(self, prediction: Tensor, items: list[Item]) -> None:
        """Adds predicted classes (N, H, W)."""
        folder, prediction = self.folder, prediction.cpu()
        labels = np.stack([folder.pairs[split][index][1] for split, index in items])
        ids = np.stack([folder.instances(item) for item in items])
        target = torch.from_numpy(labels)
        self.confusion += confusion(prediction, labels, len(folder.classes), folder.ignore_index)
        self.boundary.update(prediction, target)
        self.instance.update(prediction, target, torch.from_numpy(ids))

    def compute(self) -> dict[str, Any]:
        boundary = self.boundary.by_class()
        return {
            "confusion": self.confusion.tolist(),
            "instance_iou": rounded(self.instance.by_class()),
            "boundary_precision": rounded(boundary.precision),
            "boundary_recall": rounded(boundary.recall),
            "boundary_f": rounded(boundary.f),
        }


def classes_of(logits: Tensor, folder: ImageFolder) -> Tensor:
    """(N, H, W): the largest of the enlarged logits."""
    return enlarged(logits, folder).argmax(dim=1)


def enlarged(logits: Tensor, folder: ImageFolder) -> Tensor:
    """Logits at the resolution of the image."""
    height, width = folder.size
    return F.interpolate(logits, scale_factor=STRIDE, mode="bilinear")[..., :height, :width]


def score(
    run: Run, network: Network, data: Data, device: torch.device, whole: bool
) -> dict[str, Any]:
    """All metrics of the test split; if ``whole``, also the further figures of the report."""
    plain = Score(data.folder)
    for items, output in outputs(network, data, data.test, device):
        plain.update(classes_of(output.logits, data.folder), items)
    result = {"test": plain.compute()}
    if run.loss == "ce+dilated":
        result |= propagation(network, data, device, whole)
    elif whole and run.seed == SEEDS[0] and run.loss in ("ce", "ce+ar"):
        result["affinity"] = mean_affinity(network, data, device)
    if whole and run.loss == "ce":
        result |= after_crf(network, data, device)
    return result


def is_complete(run: Run, scores: dict[str, Any] | None, whole: bool) -> bool:
    """True if scores of an earlier ``score`` lack nothing."""
    return scores is not None and ("crf" in scores or not whole or run.loss != "ce")


def after_crf(network: Network, data: Data, device: torch.device) -> dict[str, Any]:
    """Metrics of the test split after a dense CRF, and its CPU time for an image."""
    folder, score, seconds = data.folder, Score(data.folder), []
    for items, output in outputs(network, data, data.test, device):
        probs = enlarged(output.logits, folder).softmax(dim=1).cpu().numpy()
        classes = []
        for (split, index), one in zip(items, probs, strict=True):
            start = time.process_time()
            classes.append(crf.refined(one, folder.pairs[split][index][0]).argmax(axis=0))
            seconds.append(time.process_time() - start)
        score.update(torch.from_numpy(np.stack(classes)), items)
    return {"crf": score.compute(), "crf_ms": round(1000 * statistics.median(seconds), 1)}


ITERATIONS = 0, 1, 3, 6, 10  # of propagation
GRID = 6  # of the points in the heat maps of affinity regression


def mean_affinity(network: Network, data: Data, device: torch.device) -> dict[str, Any]:
    """Affinity (36, 36) of the network and of the labels, each a mean over the test images in which
    both points count.
    """
    folder, points = data.folder, GRID**2
    sums, counts = torch.zeros(2, points, points), torch.zeros(points, points)
    for items, output in outputs(network, data, data.test, device):
        target = np.stack([folder.target(item, False, STRIDE) for item in items])
        predicted = square_root_affinity(output.logits, (GRID,)).cpu()
        true, valid = label_affinity(
            torch.from_numpy(target), (GRID,), ignore_index=folder.ignore_index
        )
        both = valid[:, :, None] & valid[:, None, :]
        for total, matrix in zip(sums, (predicted, true), strict=True):
            total += (matrix * both).sum(dim=0)
        counts += both.sum(dim=0)
    predicted, true = (rounded(total / counts, 2) for total in sums)
    return {"predicted": predicted, "true": true}


def propagation(network: Network, data: Data, device: torch.device, whole: bool) -> dict[str, Any]:
    """Metrics of the test split after the last of ITERATIONS along the predicted affinity, and the
    accuracy of this affinity. If ``whole``, mean IoU after each, also along the true affinity.
    """
    folder, num_classes, rates = data.folder, len(data.folder.classes), network.affinity.rates
    last, accuracy = Score(folder), AffinityAccuracy(rates, folder.ignore_index)
    steps, sources = (ITERATIONS, 2) if whole else (ITERATIONS[-1:], 1)
    tables = torch.zeros(sources, len(steps), num_classes, num_classes, dtype=torch.int64)
    for items, output in outputs(network, data, data.test, device):
        labels = np.stack([folder.pairs[split][index][1] for split, index in items])
        target = np.stack([folder.target(item, False, STRIDE) for item in items])
        target = torch.from_numpy(target).to(device)
        accuracy.update(output.affinity.cpu(), target.cpu())
        truth = dilated_affinity_target(target, rates, ignore_index=folder.ignore_index) == 1
        for row, source in zip(tables, (output.affinity, truth.float()), strict=False):
            probs, done = output.logits.softmax(dim=1), 0
            for table, iterations in zip(row, steps, strict=True):
                probs = affinity_propagation(
                    probs,
                    source,
                    rates,
                    iterations=iterations - done,
                    from_logits=source is output.affinity,
                )
                done = iterations
                # Logarithms: before the first iteration, the logits up to a constant.
                logits = probs.clamp(min=torch.finfo(probs.dtype).tiny).log()
                prediction = classes_of(logits, folder).cpu()
                table += confusion(prediction, labels, num_classes, folder.ignore_index)
            if source is output.affinity:
                last.update(prediction, items)
    result = {
        "propagated": last.compute(),
        "affinity_accuracy": rounded(accuracy.by_category()),
    }
    return result | ({"propagation": rounded(mean_iou(tables))} if whole else {})
