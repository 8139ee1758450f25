"""Masks of cars and pedestrians that are learned from boxes, with the pairwise loss and without.

    python study/boxes.py FOLDER      # CamVid; prints a table and draws a picture

The labels give the boxes, of the connected parts of a class, and serve for scores. The network is
finetune.py's, with a channel for each class. All pixels in a box count as the class and all pixels
outside as another, each kind with half the weight; the pairwise loss says that neighbours of
similar colours have one label, and so parts an object from the rest of its box. Then pixel-adaptive
refinement sharpens the masks by the colours of the image. study.py names the packages needed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import finetune
import numpy as np
import torch
from architecture import EfficientNetLite0, Network
from dataset import DataError, Dataset, Pair, load_folder
from finetune import Run
from matplotlib.figure import Figure
from scipy import ndimage
from tables import table, value_cell
from torch import Tensor, nn
from torch.nn import functional as F

from tritonaff import PAR, box_pairwise_loss, color_similarity
from tritonaff.files import check_writable, replacing

CLASSES = "car", "pedestrian"
LEAST = 100  # pixels of a box; smaller ones are ignored
WITHOUT, WITH = "without the pairwise loss", "with the pairwise loss"
REFINED = f"{WITH}, refined"
EVERY = 4  # takes each so many-th test image

# ------------------------------------------------------------------------------------ boxes


class Boxes(NamedTuple):
    """M instances in a batch of N images."""

    edges: Tensor  # (M, 4): left, top, right, bottom, edges included
    image_index: Tensor  # (M,)
    channel: Tensor  # (M,): the class, as a channel of the network


def find_boxes(labels: Tensor, classes: list[int]) -> Boxes:
    """Boxes of the connected parts of the classes in labels (N, H, W)."""
    rows = [
        (x.start, y.start, x.stop - 1, y.stop - 1, image, channel)
        for image, of_image in enumerate(labels.numpy())
        for channel, value in enumerate(classes)
        for y, x in ndimage.find_objects(ndimage.label(of_image == value)[0])
        if (x.stop - x.start) * (y.stop - y.start) >= LEAST
    ]
    rows = torch.tensor(rows, dtype=torch.int64).view(-1, 6)
    return Boxes(rows[:, :4], rows[:, 4], rows[:, 5])


def filled(boxes: Boxes, shape: tuple[int, ...]) -> Tensor:
    """True in any box of the channel, (N, C, H, W)."""
    inside = torch.zeros(shape, dtype=torch.bool)
    for (left, top, right, bottom), image, channel in zip(
        boxes.edges.tolist(), boxes.image_index.tolist(), boxes.channel.tolist(), strict=True
    ):
        inside[image, channel, top : bottom + 1, left : right + 1] = True
    return inside


# -------------------------------------------------------------------------- training, scores


def box_loss(logits: Tensor, boxes: Boxes, counted: Tensor) -> Tensor:
    """Cross-entropy of the filled boxes and of the pixels (N, 1, H, W) outside that count."""
    inside = filled(boxes, logits.shape)
    outside = ~inside & counted
    within = (F.softplus(-logits) * inside).sum() / inside.sum().clamp(min=1)
    return within + (F.softplus(logits) * outside).sum() / outside.sum().clamp(min=1)


def train(pairwise: bool, run: Run, pairs: list[Pair], classes: list[int]) -> nn.Module:
    torch.manual_seed(run.seed)
    network = Network(EfficientNetLite0(), len(classes), None, trained=True)
    network = network.to(memory_format=torch.channels_last).train()
    optimizer, poly = finetune.make_optimizer(network, run)
    for step, (images, batch) in zip(range(run.steps), finetune.batches(pairs, run), strict=False):
        boxes = find_boxes(batch.target, classes)
        logits = finetune.enlarged(network(images), batch.target.shape[1:]).logits
        counted = (batch.target != finetune.SETTINGS["camvid"].ignore_index)[:, None]
        loss = box_loss(logits, boxes, counted)
        if pairwise:
            # Once an image: all its masks share it.
            similarity = color_similarity(images.movedim(-1, 1).contiguous())
            loss = loss + box_pairwise_loss(
                logits[boxes.image_index, boxes.channel], similarity, boxes.edges,
                boxes.image_index, warmup=min(1.0, 4 * step / run.steps),
            )  # fmt: skip
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        poly.step()
    return network


def masks_of(
    networks: dict[str, nn.Module], pairs: list[Pair], classes: list[int]
) -> Iterator[dict[str, Tensor]]:
    """For each image the masks (C, H, W) by title, cut off at the boxes."""
    refine = PAR(dilations=[1, 2, 4, 8], num_iter=10)
    ignore_index = finetune.SETTINGS["camvid"].ignore_index
    found = {
        title: finetune.outputs(network, pairs, ignore_index) for title, network in networks.items()
    }
    for image, labels in pairs:
        boxes = find_boxes(torch.from_numpy(labels)[None], classes)
        inside = filled(boxes, (1, len(classes), *labels.shape))[0]
        masks = {"filled boxes": inside}
        for title, outputs in found.items():
            probs = next(outputs)[0].logits.sigmoid()
            masks[title] = (probs[0] > 0.5) & inside
        # The last network's masks: each pixel by its neighbours of similar colours.
        probs = refine(torch.from_numpy(image[None]).movedim(-1, 1).contiguous(), probs)
        yield masks | {REFINED: (probs[0] > 0.5) & inside}


def count(mask: Tensor, labels: np.ndarray, classes: list[int]) -> Tensor:
    """Pixels in mask (C, H, W) and truth, and in either of them, (2, C)."""
    target = torch.from_numpy(labels)
    truth = torch.stack([target == value for value in classes])
    counted = target != finetune.SETTINGS["camvid"].ignore_index
    return torch.stack([x.sum(dim=(1, 2)) for x in ((mask & truth), (mask | truth) & counted)])


# ------------------------------------------------------------------------------ command line


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="CamVid")
    parser.add_argument("--steps", type=int, default=200, help="of each training")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each loss")
    parser.add_argument("--output", type=Path, default=Path("runs/boxes.png"), metavar="FILE")
    options = parser.parse_args()
    try:
        run(options)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(options: argparse.Namespace) -> None:
    data = load_folder(options.folder, finetune.SETTINGS["camvid"].ignore_index)
    classes = [data.classes.index(name) for name in CLASSES]
    check_writable(options.output)
    pairs = data.test[::EVERY]
    scores: dict[str, list[Tensor]] = {}  # IoU (C,) by title, for each seed
    for seed in range(options.seeds):
        plan = Run("camvid", "ce", options.steps, 1e-2, seed=seed)
        networks = {
            title: train(pairwise, plan, data.train, classes)
            for title, pairwise in ((WITHOUT, False), (WITH, True))
        }
        shown, counts = [], {}
        for masks, (_, labels) in zip(masks_of(networks, pairs, classes), pairs, strict=True):
            shown.append(masks)
            for title, mask in masks.items():
                counts[title] = counts.get(title, 0) + count(mask, labels, classes)
        for title, (both, either) in counts.items():
            scores.setdefault(title, []).append(100 * both / either)
        print(f"seed {seed} of {options.seeds} done", flush=True)
    lines = []
    for title, each in scores.items():
        cells = [value_cell([iou[c].item() for iou in each]) for c in range(len(CLASSES))]
        lines.append([title, *cells])
    print(table(["masks, cut off at the boxes", *(f"IoU of {name}" for name in CLASSES)], lines))
    print(f"{len(pairs)} test images, {options.seeds} seeds, {options.steps} steps")
    draw(options.output, data, pairs, shown)
    print(f"picture: {options.output}")


def draw(path: Path, data: Dataset, pairs: list[Pair], shown: list[dict[str, Tensor]]) -> None:
    """The images in which boxes cover the most, with the outlines of the masks."""
    area = [masks["filled boxes"].sum().item() for masks in shown]
    chosen = np.argsort(area)[::-1][:4]
    titles = list(shown[0])
    height, width = pairs[0][1].shape
    size = 3.2 * len(titles), 3.2 * height / width * len(chosen) + 0.4
    figure = Figure(size, layout="constrained")
    axes = figure.subplots(len(chosen), len(titles), squeeze=False)
    for row, index in zip(axes, chosen, strict=True):
        for axis, title in zip(row, titles, strict=True):
            axis.imshow(pairs[index][0])
            for mask, color in zip(shown[index][title], ("yellow", "cyan"), strict=False):
                axis.contour(mask.numpy(), [0.5], colors=color, linewidths=1)
            axis.axis("off")
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title)
    with replacing(path) as new:
        figure.savefig(new, format="png", dpi=80)


if __name__ == "__main__":
    sys.exit(main())
