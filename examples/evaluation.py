"""Scores of trained networks."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from dataset import Pair
from network import to_input
from torch import Tensor, nn
from torch.nn import functional as F

from tritonaff.metrics import BoundaryScore


class Scores(NamedTuple):
    iou: Tensor  # (C,); NaN for a class that does not occur
    boundary_f: float  # mean over the classes


def score(network: nn.Module, pairs: list[Pair], classes: int, ignore: int) -> Scores:
    """Scores over all pixels of full images."""
    table = torch.zeros(classes, classes, dtype=torch.int64)
    boundary = BoundaryScore(classes, ignore_index=ignore)
    for image, labels in pairs:
        prediction = predict(network, image)
        boundary.update(prediction[None], torch.from_numpy(labels)[None])
        table += confusion(prediction, labels, classes, ignore)
    return Scores(iou_by_class(table), boundary.compute()["boundary_f"].item())


def validate(network: nn.Module, pairs: list[Pair], classes: int, ignore: int) -> float:
    """Mean IoU alone, which takes a fraction of the time."""
    tables = [confusion(predict(network, image), x, classes, ignore) for image, x in pairs]
    return mean_iou(torch.stack(tables).sum(dim=0)).item()


def predict(network: nn.Module, image: np.ndarray) -> Tensor:
    """Classes (H, W) of an image (H, W, 3), on the CPU."""
    return logits_of(network, image).argmax(dim=1)[0].cpu()


@torch.inference_mode()
def logits_of(network: nn.Module, image: np.ndarray) -> Tensor:
    """(1, C, H, W)"""
    device = next(network.parameters()).device
    network.eval()
    logits = network(to_input(torch.from_numpy(image[None]), device)).logits
    network.train()
    return logits


def confusion(prediction: Tensor, labels: np.ndarray, classes: int, ignore: int) -> Tensor:
    """Numbers of pixels by truth and prediction (C, C)."""
    target = torch.from_numpy(labels).long()
    counted = target != ignore
    cells = target[counted] * classes + prediction[counted]
    return torch.bincount(cells, minlength=classes**2).view(classes, classes)


def iou_by_class(table: Tensor) -> Tensor:
    """(..., C) of confusions (..., C, C); NaN for a class that does not occur."""
    hits = table.diagonal(dim1=-2, dim2=-1)
    return hits / (table.sum(-2) + table.sum(-1) - hits)


def mean_iou(table: Tensor) -> Tensor:
    """Means over the classes that occur, of confusions (..., C, C)."""
    return iou_by_class(table).nanmean(-1)


WIDE = 7  # pixels


def thin_pixels(labels: np.ndarray) -> Tensor:
    """The pixels (H, W) that lie in no square of 7 x 7 pixels of one label."""
    x, options = torch.from_numpy(labels)[None].float(), (WIDE, 1, WIDE // 2)
    centre = F.max_pool2d(x, *options) == -F.max_pool2d(-x, *options)
    return F.max_pool2d(centre.float(), *options)[0] == 0


def thin_classes(pairs: list[Pair], classes: int) -> list[int]:
    """The classes most of whose pixels are thin."""
    count = torch.zeros(2, 256, dtype=torch.int64)
    for _, labels in pairs:
        target, thin = torch.from_numpy(labels).long(), thin_pixels(labels)
        for row, mask in zip(count, (thin, ~thin), strict=True):
            row += torch.bincount(target[mask], minlength=256)
    return (count[0] > count[1])[:classes].nonzero().flatten().tolist()
