"""Pictures of trained networks: their predictions, and the course of their training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from dataset import Dataset
from evaluation import confusion, logits_of, mean_iou, predict, thin_pixels
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from torch import Tensor, nn
from torch.nn import functional as F

from tritonaff.files import replacing
from tritonaff.plotting import (
    ERRORS,
    VOID,
    affinity_field_map,
    draw_boundaries,
    draw_class_scores,
    draw_curves,
    draw_errors,
    draw_learned_sizes,
    label_colors,
)

if TYPE_CHECKING:
    from train import Result

ZOOM = 4
VOID_LABEL = -1


def draw_predictions(
    path: Path, data: Dataset, networks: Mapping[str, nn.Module], ignore: int, count: int = 2
) -> None:
    """Images of the test split, evenly chosen: a row with the boundaries of the truth, the truth,
    every network's classes and how they compare with the first network; below it, the part of the
    image with the most thin things, larger.
    """
    chosen = np.linspace(0, len(data.test) - 1, min(count, len(data.test))).astype(int)
    baseline, *others = networks
    compared = others or [baseline]
    names = ["errors"] if not others else [f"{other}\nagainst {baseline}" for other in others]
    titles = ["image, true boundaries", "truth", *networks, *names]
    height, width = data.test[0][1].shape
    rows = 2 * len(chosen)
    size = 2.5 * len(titles), (2.5 * height / width + 0.15) * rows + 1.2
    figure = Figure(size, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.05)
    axes = figure.subplots(rows, len(titles), squeeze=False)
    for k, index in enumerate(chosen):
        image, labels = data.test[index]
        top, left, bottom, right = thinnest(labels, len(data.classes))
        target = torch.from_numpy(labels).long()
        target[target == ignore] = VOID_LABEL
        predictions = {title: predict(network, image) for title, network in networks.items()}
        for row in axes[2 * k : 2 * k + 2]:
            _draw_row(row, data, image, target, predictions, compared)
        whole, part = axes[2 * k : 2 * k + 2]
        whole[0].set_xlabel(name_of(data, index))
        whole[0].xaxis.label.set_parse_math(False)  # dollars in a name are dollars
        for axis, prediction in zip(whole[2:], predictions.values(), strict=False):
            table = confusion(prediction, labels, len(data.classes), ignore)
            axis.set_xlabel(f"mIoU {mean_iou(table):.3f}")
        for axis in part:
            axis.set(xlim=(left - 0.5, right - 0.5), ylim=(bottom - 0.5, top - 0.5))
        frame = (left - 0.5, top - 0.5), right - left, bottom - top
        whole[0].add_patch(Rectangle(*frame, fill=False, color="white", linewidth=1.5))
        part[0].set_xlabel(f"the frame, {ZOOM} times as large")
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize="medium")
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    _legend(figure, data, bool(others))
    with replacing(path) as new:
        figure.savefig(new, format="png", dpi=110)


def _draw_row(
    row: Sequence[Axes],
    data: Dataset,
    image: np.ndarray,
    target: Tensor,
    predictions: Mapping[str, Tensor],
    compared: Sequence[str],
) -> None:
    c, void = len(data.classes), target == VOID_LABEL
    row[0].imshow(image)
    draw_boundaries(row[0], target, linewidth=0.6)
    for axis, classes in zip(row[1:], [target, *predictions.values()], strict=False):
        shown = classes.masked_fill(void, VOID_LABEL)
        axis.imshow(label_colors(shown, c, data.palette), interpolation="nearest")
    first = next(iter(predictions))
    for axis, title in zip(row[-len(compared) :], compared, strict=True):
        baseline = None if title == first else predictions[first]
        draw_errors(axis, predictions[title], target, c, baseline)


def name_of(data: Dataset, index: int) -> str:
    return data.test_names[index] if data.test_names else f"test image {index}"


def thinnest(labels: np.ndarray, classes: int) -> tuple[int, int, int, int]:
    """Top, left, bottom, right of the part, a fourth of the image in height and width, with the
    most thin pixels of any class.
    """
    height, width = (max(size // ZOOM, 1) for size in labels.shape)
    thin = thin_pixels(labels) & torch.from_numpy(labels < classes)
    sums = thin.long().cumsum(0).cumsum(1)
    sums = F.pad(sums, (1, 0, 1, 0))
    inside = sums[height:, width:] - sums[:-height, width:] - sums[height:, :-width]
    inside += sums[:-height, :-width]
    top, left = divmod(int(inside.argmax()), inside.shape[1])
    return top, left, top + height, left + width


def _legend(figure: Figure, data: Dataset, compared: bool) -> None:
    palette = data.palette
    patches = [Patch(color=palette[k % len(palette)], label=c) for k, c in enumerate(data.classes)]
    patches.append(Patch(facecolor=VOID, edgecolor="0.6", label="void"))
    for name, colour in list(ERRORS.items())[: 4 if compared else 2]:
        patches.append(Patch(color=colour, label=name))
    legend = figure.legend(handles=patches, loc="outside lower center", ncols=8, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)


def draw_training(
    path: Path, data: Dataset, results: Sequence[Result], iou: Mapping[str, Tensor], ignore: int
) -> None:
    """The loss and the validation mIoU by step, the IoU of the test split by class, the kernel
    sizes that classes have learned; and where the affinity field loss is large in a test image,
    for the first and the last network.
    """
    figure = Figure((13, 3.4 + 0.24 * len(data.classes)), layout="constrained")
    (loss, miou, by_class), (learned, *maps) = figure.subplots(2, 3)
    mean_over = max(len(results[0].losses) // 20, 1)
    draw_curves(loss, {result.title: result.losses for result in results}, mean_over)
    loss.set(title="loss", ylim=(0, None))
    draw_curves(miou, {result.title: result.val for result in results})
    miou.set(title="validation mIoU", ylim=(0, None))
    draw_class_scores(by_class, iou, data.classes)
    by_class.set(title="test IoU by class", xlim=(0, 1))
    sizes = next((result.criterion.aaf for result in results if result.criterion.aaf), None)
    if sizes is None:
        learned.axis("off")
    else:
        draw_learned_sizes(learned, sizes, data.classes)
        learned.set_title("learned sizes by class")
    image, labels = data.test[0]
    target = torch.from_numpy(labels)[None]
    ends = results[:: max(len(results) - 1, 1)]
    parts = [
        affinity_field_map(
            logits_of(end.network, image).cpu(), target, (3, 5, 7), ignore_index=ignore
        )
        for end in ends
    ]
    largest = max(np.quantile(part.numpy(), 0.999) for part in parts) or 1.0
    for axis in maps:
        axis.set(xticks=[], yticks=[], frame_on=False)
    for axis, end, part in zip(maps, ends, parts, strict=False):
        shown = axis.imshow(part[0].numpy(), cmap="magma", vmin=0, vmax=largest)
        axis.set_title(f"affinity loss of {end.title}")
        axis.set_xlabel(f"{name_of(data, 0)}, sum {part.sum():.2f}")
        axis.xaxis.label.set_parse_math(False)
    figure.colorbar(
        shown, ax=maps, label="loss of a pixel's pairs", ticks=[0, largest], format="%.1g"
    )
    with replacing(path) as new:
        figure.savefig(new, format="png", dpi=110)
