"""Learns masks from boxes alone, with and without the pairwise loss, and refines coarse ones.

    python examples/boxes.py FOLDER      # laid out as train.py --help says

The labels give the boxes, and serve for scores: a connected part of a class is an instance. The
network has a channel for each class. Outside of all boxes of its class a pixel is background; in a
box, the mask's projections to rows and columns shall be the box's; and, with the pairwise loss,
neighbours of similar colours have one label. Then the masks of the last network are made coarse,
and refined by the colours of the images.
"""

from __future__ import annotations

import argparse
import os
import sys
from itertools import islice
from pathlib import Path
from typing import NamedTuple

# The default, milliseconds of spinning, can stall a step for seconds on cores in use by others.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
import torch
from dataset import DataError, Pair, load_folder, random_crops
from matplotlib.figure import Figure
from network import SmallUNet, to_input
from rich.console import Console
from rich.table import Table, box
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional as F
from train import rate, whole

from tritonaff import PAR, box_pairwise_loss, color_similarity
from tritonaff.files import check_writable, replacing

LOSSES = {"projection": "projections", "projection+pairwise": "projections + pairwise"}
COARSE = 8  # pixels of the coarse masks, a side

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
    ]
    table = torch.tensor(rows, dtype=torch.int64).view(-1, 6)
    return Boxes(table[:, :4], table[:, 4], table[:, 5])


def inside(edges: Tensor, height: int, width: int) -> Tensor:
    """True in the boxes, (M, H, W)."""
    left, top, right, bottom = edges[:, :, None, None].unbind(dim=1)
    rows = torch.arange(height, device=edges.device)[:, None]
    columns = torch.arange(width, device=edges.device)
    return (rows >= top) & (rows <= bottom) & (columns >= left) & (columns <= right)


def filled(boxes: Boxes, shape: tuple[int, ...]) -> Tensor:
    """True in any box of the channel, (N, C, H, W)."""
    n, channels, height, width = shape
    count = torch.zeros(n * channels, height, width, device=boxes.edges.device)
    place = boxes.image_index * channels + boxes.channel
    count.index_add_(0, place, inside(boxes.edges, height, width).float())
    return count.view(shape) > 0


# -------------------------------------------------------------------------- training, scores


def background_loss(logits: Tensor, boxes: Boxes, counted: Tensor) -> Tensor:
    """Cross-entropy of the pixels that are outside of all boxes of their channel."""
    outside = ~filled(boxes, logits.shape) & counted
    return (F.softplus(logits) * outside).sum() / outside.sum().clamp(min=1)


def projection_loss(mask_logits: Tensor, in_box: Tensor) -> Tensor:
    """Dice of the projections of masks and boxes (M, H, W) to rows and columns."""
    loss = torch.zeros((), device=mask_logits.device)
    for dim in (1, 2):
        p, y = (mask_logits.sigmoid() * in_box).amax(dim=dim), in_box.amax(dim=dim).float()
        total = (p * p).sum(dim=1) + (y * y).sum(dim=1) + 1e-5
        loss = loss + (1 - 2 * (p * y).sum(dim=1) / total).sum() / max(1, len(p))
    return loss


def train(
    loss: str, pairs: list[Pair], classes: list[int], options: argparse.Namespace
) -> nn.Module:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(options.seed)
    network = SmallUNet(len(classes)).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), options.learning_rate)
    steps = options.steps
    poly = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 - step / steps) ** 0.9)
    for step, (images, labels) in enumerate(islice(random_crops(pairs, options), steps)):
        boxes = Boxes(*(x.to(device) for x in find_boxes(labels, classes)))
        logits = network(to_input(images, device)).logits
        mask_logits = logits[boxes.image_index, boxes.channel]
        counted = (labels != options.ignore_index)[:, None].to(device)
        value = background_loss(logits, boxes, counted)
        value = value + projection_loss(mask_logits, inside(boxes.edges, *logits.shape[2:]))
        if "pairwise" in loss:
            # Once an image: all its masks share it.
            colors = images.permute(0, 3, 1, 2).to(device)
            similarity = color_similarity(colors, threshold=options.threshold)
            value = value + box_pairwise_loss(
                mask_logits, similarity, boxes.edges, boxes.image_index,
                warmup=min(1.0, 4 * step / steps),
            )  # fmt: skip
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        poly.step()
        if (step + 1) * 4 // steps > step * 4 // steps:
            print(f"{LOSSES[loss]}: step {step + 1}/{steps}  loss {value.item():.2f}", flush=True)
    return network.eval()


@torch.inference_mode()
def probabilities(network: nn.Module, image: np.ndarray) -> Tensor:
    """(C, H, W) of an image (H, W, 3), on the CPU."""
    device = next(network.parameters()).device
    return network(to_input(torch.from_numpy(image[None]), device)).logits[0].sigmoid().cpu()


def made_coarse(probs: Tensor) -> Tensor:
    """Means over COARSE x COARSE pixels, enlarged again."""
    means = F.avg_pool2d(probs[None], COARSE, ceil_mode=True, count_include_pad=False)
    return F.interpolate(means, probs.shape[1:], mode="bilinear")[0]


def refined(probs: Tensor, image: np.ndarray, refine: PAR) -> Tensor:
    """Masks (C, H, W) and their complements, each pixel by its neighbours of similar colours."""
    both = torch.cat((probs, 1 - probs))[None]
    masks, others = refine(torch.from_numpy(image[None]).permute(0, 3, 1, 2), both)[0].chunk(2)
    return masks / (masks + others)


def count(
    masks: Tensor, labels: np.ndarray, options: argparse.Namespace, classes: list[int]
) -> Tensor:
    """Pixels in mask and truth, and in either of them, (2, C)."""
    target = torch.from_numpy(labels)
    truth = torch.stack([target == value for value in classes])
    counted = target != options.ignore_index
    return torch.stack([x.sum(dim=(1, 2)) for x in ((masks & truth), (masks | truth) & counted)])


# ------------------------------------------------------------------------------ command line


def main() -> int:
    options = parse_arguments()
    try:
        run(options)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the next run starts anew", file=sys.stderr)
        return 130
    return 0


def run(options: argparse.Namespace) -> None:
    data = load_folder(options.data, options.ignore_index)
    unknown = [name for name in options.classes if name not in data.classes]
    if unknown:
        raise DataError(f"{unknown[0]} is none of the classes {', '.join(data.classes)}")
    picture = options.output / f"{data.name}-boxes.png"
    check_writable(picture)
    classes = [data.classes.index(name) for name in options.classes]
    networks = {LOSSES[loss]: train(loss, data.train, classes, options) for loss in options.loss}

    refine, rows, counts = PAR(dilations=[1, 2, 4, 8], num_iter=options.iterations), [], {}
    for image, labels in data.test[:: options.every]:
        boxes = find_boxes(torch.from_numpy(labels)[None], classes)
        masks = {"boxes": filled(boxes, (1, len(classes), *labels.shape))[0]}
        for title, network in networks.items():
            probs = probabilities(network, image)
            masks[title] = probs > 0.5
        coarse = made_coarse(probs)
        masks["coarse"] = coarse > 0.5
        masks["coarse, refined"] = refined(coarse, image, refine) > 0.5
        for title, mask in masks.items():
            counts[title] = counts.get(title, 0) + count(mask, labels, options, classes)
        rows.append((image, masks))

    console = Console()
    table = Table("masks", box=box.ROUNDED if console.is_terminal else box.ASCII)
    for name in options.classes:
        table.add_column(f"IoU of {name}", justify="right")
    for title, (both, either) in counts.items():
        table.add_row(title, *(f"{iou:.3f}" for iou in (both / either).tolist()))
    console.print(table)
    print(f"of {len(rows)} test images; the boxes are the true ones")
    draw(picture, rows)
    print(f"picture: {picture}")


def draw(path: Path, rows: list[tuple[np.ndarray, dict[str, Tensor]]], most: int = 4) -> None:
    """Images, evenly chosen, with the outlines of each mask."""
    chosen = np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(int)
    titles = list(rows[0][1])
    height, width = rows[0][0].shape[:2]
    size = 2.6 * len(titles), 2.6 * height / width * len(chosen) + 0.4
    figure = Figure(size, layout="constrained")
    axes = figure.subplots(len(chosen), len(titles), squeeze=False)
    for axis_row, index in zip(axes, chosen, strict=True):
        image, masks = rows[index]
        for axis, title in zip(axis_row, titles, strict=True):
            axis.imshow(image)
            for mask, color in zip(masks[title], ("yellow", "cyan", "red"), strict=False):
                axis.contour(mask.numpy(), [0.5], colors=color, linewidths=0.9)
            axis.axis("off")
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=9)
    with replacing(path) as new:
        figure.savefig(new, format="png", dpi=110)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.description, add = __doc__.splitlines()[0], parser.add_argument
    # fmt: off
    add("data", type=Path, metavar="FOLDER", help="a data set as train.py --help describes")
    add("--ignore-index", type=whole(0, 255), default=255, help="label of pixels that never count")
    add("--classes", nargs="+", default=["car", "pedestrian"], help="names, of things with boxes")
    add("--loss", nargs="+", choices=LOSSES, default=list(LOSSES), help="losses to train with")
    add("--threshold", type=rate, default=0.3, help="least similarity of the pairwise loss")
    add("--iterations", type=whole(1), default=10, help="of the refinement")
    add("--steps", type=whole(1), default=400, help="of each training")
    add("--batch-size", type=whole(1), default=8, help="crops in a batch")
    add("--size", type=whole(1), nargs=2, default=[96, 128], metavar=("H", "W"), help="of a crop")
    add("--learning-rate", type=rate, default=3e-3, help="at the first step")
    add("--every", type=whole(1), default=4, help="takes each so many-th test image")
    add("--seed", type=whole(0), default=0, help="of initial weights and crops")
    add("--output", type=Path, default=Path("runs"), help="folder of the picture")
    # fmt: on
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
