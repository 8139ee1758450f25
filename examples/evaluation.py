"""Scores and pictures of trained networks."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import torch
from dataset import Dataset, Pair
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from network import to_input
from torch import Tensor, nn

from tritonaff.files import replacing
from tritonaff.metrics import BoundaryScore


def score(network: nn.Module, pairs: list[Pair], classes: int, ignore: int) -> tuple[float, float]:
    """Mean IoU and mean boundary F over the classes, on full images."""
    table = torch.zeros(classes, classes, dtype=torch.int64)
    boundary = BoundaryScore(classes, ignore_index=ignore)
    for image, labels in pairs:
        prediction = predict(network, image)
        boundary.update(prediction[None], torch.from_numpy(labels)[None])
        table += confusion(prediction, labels, classes, ignore)
    return mean_iou(table).item(), boundary.compute()["boundary_f"].item()


@torch.inference_mode()
def predict(network: nn.Module, image: np.ndarray) -> Tensor:
    """Classes (H, W) of an image (H, W, 3), on the CPU."""
    device = next(network.parameters()).device
    network.eval()
    logits = network(to_input(torch.from_numpy(image[None]), device)).logits
    network.train()
    return logits.argmax(dim=1)[0].cpu()


def confusion(prediction: Tensor, labels: np.ndarray, classes: int, ignore: int) -> Tensor:
    """Numbers of pixels by truth and prediction (C, C)."""
    target = torch.from_numpy(labels).long()
    counted = target != ignore
    cells = target[counted] * classes + prediction[counted]
    return torch.bincount(cells, minlength=classes**2).view(classes, classes)


def mean_iou(table: Tensor) -> Tensor:
    """Means over the classes that occur, of confusions (..., C, C)."""
    hits = table.diagonal(dim1=-2, dim2=-1)
    return (hits / (table.sum(-2) + table.sum(-1) - hits)).nanmean(-1)


def draw(path: Path, data: Dataset, networks: dict[str, nn.Module], rows: int = 4) -> None:
    """Images of the test split, evenly chosen, with their truth and each network's classes."""
    chosen = np.linspace(0, len(data.test) - 1, min(rows, len(data.test))).astype(int)
    height, width = data.test[0][1].shape
    columns = 2 + len(networks)
    figure = Figure((3 * columns, 3 * height / width * len(chosen) + 0.8), layout="constrained")
    palette = matplotlib.colormaps["tab10" if len(data.classes) <= 10 else "tab20"]
    axes = figure.subplots(len(chosen), columns, squeeze=False)
    for row, index in zip(axes, chosen, strict=True):
        image, labels = data.test[index]
        row[0].imshow(image)
        predictions = [predict(network, image).numpy() for network in networks.values()]
        for axis, classes in zip(row[1:], [labels, *predictions], strict=True):
            colours = palette(classes % palette.N)
            colours[classes >= len(data.classes)] = 0  # void
            axis.imshow(colours, interpolation="nearest")
    for axis, title in zip(axes[0], ["image", "truth", *networks], strict=True):
        axis.set_title(title)
    for axis in axes.flat:
        axis.axis("off")
    patches = [Patch(color=palette(k % palette.N), label=c) for k, c in enumerate(data.classes)]
    legend = figure.legend(handles=patches, loc="outside lower center", ncols=8, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)  # dollars in the name of a class are dollars
    with replacing(path) as new:
        figure.savefig(new, format="png", dpi=110)
