"""Learns masks from boxes alone, with and without the pairwise loss, and refines coarse ones.

    python examples/boxes.py FOLDER      # laid out as train.py --help says

The labels tell no instances apart: a connected part of a class is one. Each instance is a crop
around its box, of a fixed size; the network sees the crop and learns its mask from the box: the
projections of mask and box to the rows and columns shall agree, and, with the pairwise loss,
neighbours of similar colours have one label. The true masks serve for scores alone. Then the masks
of the last network are made coarse, and refined by the colours of the crops.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import NamedTuple

# The default, milliseconds of spinning, can stall a step for seconds on cores in use by others.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
import torch
from dataset import DataError, Dataset, Pair, load_folder
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

# ------------------------------------------------------------------------------------ instances


class Instances(NamedTuple):
    """A crop for each of M instances."""

    images: Tensor  # (M, S, S, 3) of bytes
    masks: Tensor  # (M, S, S) of bool
    boxes: Tensor  # (M, 4): left, top, right, bottom, edges included


def find_instances(pairs: list[Pair], classes: list[int], options: argparse.Namespace) -> Instances:
    """Connected parts of the classes, at least ``least`` pixels, in crops of one size."""
    images, masks, boxes = [], [], []
    for image, labels in pairs:
        for value in classes:
            parts, _ = ndimage.label(labels == value)
            for k, place in enumerate(ndimage.find_objects(parts), start=1):
                mask = parts == k
                if mask.sum() < options.least:
                    continue
                around = tuple(
                    slice(max(0, side.start - margin), min(size, side.stop + margin))
                    for side, size in zip(place, labels.shape, strict=True)
                    for margin in [(side.stop - side.start) // 4 + 1]
                )
                crop = resized(torch.from_numpy(image[around]).permute(2, 0, 1), options.size)
                images.append(crop.clamp(0, 255).to(torch.uint8).permute(1, 2, 0))
                masks.append(resized(torch.from_numpy(mask[around])[None], options.size)[0] > 0.5)
                boxes.append(box_of(masks[-1]))
    if not images:
        raise DataError(f"no instance of at least {options.least} pixels in one of the splits")
    return Instances(torch.stack(images), torch.stack(masks), torch.stack(boxes))


def resized(x: Tensor, size: int) -> Tensor:
    """(C, H, W) as (C, size, size), in floating point."""
    return F.interpolate(x[None].float(), (size, size), mode="bilinear", antialias=True)[0]


def box_of(mask: Tensor) -> Tensor:
    rows, columns = mask.nonzero().unbind(dim=1)
    return torch.stack((columns.min(), rows.min(), columns.max(), rows.max()))


def inside(boxes: Tensor, size: int) -> Tensor:
    """True in the boxes, (M, size, size)."""
    left, top, right, bottom = boxes[:, :, None, None].unbind(dim=1)
    place = torch.arange(size, device=boxes.device)
    rows, columns = place[:, None], place
    return (rows >= top) & (rows <= bottom) & (columns >= left) & (columns <= right)


# -------------------------------------------------------------------------- training, scores


def projection_loss(mask_logits: Tensor, in_box: Tensor) -> Tensor:
    """Dice of the projections of masks and boxes (M, S, S) to rows and columns."""
    loss = torch.zeros((), device=mask_logits.device)
    for dim in (1, 2):
        p, y = mask_logits.sigmoid().amax(dim=dim), in_box.amax(dim=dim).float()
        total = (p * p).sum(dim=1) + (y * y).sum(dim=1) + 1e-5
        loss = loss + (1 - 2 * (p * y).sum(dim=1) / total).mean()
    return loss


def train(loss: str, data: Instances, options: argparse.Namespace) -> nn.Module:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(options.seed)
    network = SmallUNet(1, widths=(8, 16, 32, 48)).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), options.learning_rate)
    steps = options.steps
    poly = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 - step / steps) ** 0.9)
    for step in range(steps):
        chosen = torch.randint(len(data.images), (options.batch_size,))
        images, boxes = data.images[chosen].to(device), data.boxes[chosen].to(device)
        mask_logits = network(to_input(images, device)).logits[:, 0]
        value = projection_loss(mask_logits, inside(boxes, options.size))
        if "pairwise" in loss:
            # Every crop is an image of its own.
            similarity = color_similarity(images.permute(0, 3, 1, 2), threshold=options.threshold)
            index = torch.arange(len(images), device=device)
            warmup = min(1.0, 3 * step / steps)
            value = value + box_pairwise_loss(mask_logits, similarity, boxes, index, warmup=warmup)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        poly.step()
        if (step + 1) * 4 // steps > step * 4 // steps:
            print(f"{LOSSES[loss]}: step {step + 1}/{steps}  loss {value.item():.2f}", flush=True)
    return network.eval()


@torch.inference_mode()
def probabilities(network: nn.Module, data: Instances) -> Tensor:
    """(M, S, S), 0 outside the boxes, on the CPU."""
    device = next(network.parameters()).device
    parts = [network(to_input(x, device)).logits[:, 0].sigmoid() for x in data.images.split(64)]
    return torch.cat(parts).cpu() * inside(data.boxes, data.masks.shape[-1])


def made_coarse(probs: Tensor) -> Tensor:
    """Means over COARSE x COARSE pixels, enlarged again."""
    means = F.avg_pool2d(probs[:, None], COARSE, ceil_mode=True, count_include_pad=False)
    return F.interpolate(means, probs.shape[1:], mode="bilinear")[:, 0]


def refined(probs: Tensor, data: Instances, iterations: int) -> Tensor:
    """Masks and background, each pixel by its neighbours of similar colours."""
    refine = PAR(dilations=[1, 2, 4, 8], num_iter=iterations)
    both = torch.stack((1 - probs, probs), dim=1)
    background, mask = refine(data.images.permute(0, 3, 1, 2), both).unbind(dim=1)
    return mask / (background + mask)


def mean_iou(masks: Tensor, data: Instances) -> float:
    """Mean over the instances."""
    both = (masks & data.masks).sum(dim=(1, 2))
    return (both / (masks | data.masks).sum(dim=(1, 2))).mean().item()


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
    training, test = (instances_of(data, split, options) for split in ("train", "test"))
    print(f"{len(training.images)} training and {len(test.images)} test instances", flush=True)
    masks = {"boxes": inside(test.boxes, options.size)}
    for loss in options.loss:
        probs = probabilities(train(loss, training, options), test)
        masks[LOSSES[loss]] = probs > 0.5
    coarse = made_coarse(probs)
    masks["coarse"] = coarse > 0.5
    masks["coarse, refined"] = refined(coarse, test, options.iterations) > 0.5

    console = Console()
    table = Table("masks", box=box.ROUNDED if console.is_terminal else box.ASCII)
    table.add_column("mean IoU", justify="right")
    for title, mask in masks.items():
        table.add_row(title, f"{mean_iou(mask, test):.3f}")
    console.print(table)
    draw(picture, test, masks)
    print(f"picture: {picture}")


def instances_of(data: Dataset, split: str, options: argparse.Namespace) -> Instances:
    classes = [data.classes.index(name) for name in options.classes]
    return find_instances(getattr(data, split), classes, options)


def draw(path: Path, data: Instances, masks: dict[str, Tensor], rows: int = 6) -> None:
    """Crops, evenly chosen, with the outlines of each mask."""
    chosen = np.linspace(0, len(data.images) - 1, min(rows, len(data.images))).astype(int)
    masks = {"truth": data.masks, **masks}
    figure = Figure((1.7 * len(masks), 1.7 * len(chosen) + 0.4), layout="constrained")
    axes = figure.subplots(len(chosen), len(masks), squeeze=False)
    for row, index in zip(axes, chosen, strict=True):
        for axis, mask in zip(row, masks.values(), strict=True):
            axis.imshow(data.images[index])
            axis.contour(mask[index].float(), [0.5], colors="yellow", linewidths=1.2)
            axis.axis("off")
    for axis, title in zip(axes[0], masks, strict=True):
        axis.set_title(title, fontsize=8)
    with replacing(path) as new:
        figure.savefig(new, format="png", dpi=110)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.description, add = __doc__.splitlines()[0], parser.add_argument
    # fmt: off
    add("data", type=Path, metavar="FOLDER", help="a data set as train.py --help describes")
    add("--ignore-index", type=whole(0, 255), default=255, help="label of pixels that never count")
    add("--classes", nargs="+", default=["car", "pedestrian"], help="names, of things with boxes")
    add("--least", type=whole(1), default=200, help="pixels of an instance")
    add("--loss", nargs="+", choices=LOSSES, default=list(LOSSES), help="losses to train with")
    add("--threshold", type=rate, default=0.3, help="least similarity of the pairwise loss")
    add("--iterations", type=whole(1), default=10, help="of the refinement")
    add("--steps", type=whole(1), default=600, help="of each training")
    add("--batch-size", type=whole(1), default=32, help="crops in a batch")
    add("--size", type=whole(8), default=64, help="rows and columns of a crop")
    add("--learning-rate", type=rate, default=3e-3, help="at the first step")
    add("--seed", type=whole(0), default=0, help="of initial weights and crops")
    add("--output", type=Path, default=Path("runs"), help="folder of the picture")
    # fmt: on
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
