"""Pictures of the test images in which a loss does the most harm."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from dataset import Dataset
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from pictures import name_of
from torch import Tensor

from tritonaff.files import replacing
from tritonaff.plotting import ERRORS, VOID, draw_boundaries, draw_errors, label_colors

ROWS = 3


def draw_failures(
    path: Path,
    data: Dataset,
    ignore_index: int,
    titles: tuple[str, str],
    predictions: Sequence[tuple[Tensor, Tensor]],
) -> None:
    """The images that lose the most: a row each, with the share of pixels that become wrong less
    the share that becomes right.

    ``predictions`` has two maps (H, W) of classes for every image of the test split, of
    cross-entropy and of the other loss, as ``titles``.
    """
    losses = []
    for (_, labels), (baseline, prediction) in zip(data.test, predictions, strict=True):
        target = torch.from_numpy(labels)
        counted = target != ignore_index
        change = (baseline == target).float() - (prediction == target).float()
        losses.append((change * counted).sum().item() / max(counted.sum().item(), 1))
    worst = np.argsort(losses)[::-1][:ROWS]
    height, width = data.test[0][1].shape
    figure = Figure((13, (3.2 * height / width + 0.3) * len(worst) + 0.8), layout="constrained")
    axes = figure.subplots(len(worst), 4, squeeze=False)
    for row, index in zip(axes, worst, strict=True):
        image, labels = data.test[index]
        target = torch.from_numpy(labels).long()
        row[0].imshow(image)
        draw_boundaries(row[0], target, linewidth=0.6)
        row[0].set_xlabel(f"{name_of(data, index)}: {-100 * losses[index]:+.1f} % right")
        for axis, classes in zip(row[1:], predictions[index], strict=False):
            shown = classes.masked_fill(target == ignore_index, -1)
            axis.imshow(label_colors(shown, len(data.classes), data.palette))
        draw_errors(row[3], predictions[index][1], target, len(data.classes), predictions[index][0])
    for axis, title in zip(axes[0], ("image, true boundaries", *titles, "compared"), strict=True):
        axis.set_title(title)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[], frame_on=False)
    shown = {**ERRORS, "void": VOID}
    patches = [Patch(facecolor=colour, edgecolor="0.6", label=x) for x, colour in shown.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False)
    with replacing(path) as new:
        figure.savefig(new, format="png", dpi=80)
