"""Segments cells: a network predicts affinities, and a mutex watershed makes instances of them.

    pip install -e ".[instances]"
    python examples/instances.py FOLDER  # two classes, membrane and cell, as train.py --help says
    python examples/instances.py         # without images: a volume of drawn cells, in 3-D

An instance is a connected cell of an image. Beside it, the same network with one channel predicts
membranes, and connected components are the instances. Both get the same batches in the same order
and the same number of steps; the threshold of each is the best one on the validation images.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from itertools import islice
from pathlib import Path
from typing import NamedTuple

# The default, milliseconds of spinning, can stall a step for seconds on cores in use by others.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import mwatershed
import numpy as np
import torch
from cells import IGNORED, MEMBRANE, Cells, draw_cells, load_cells
from dataset import DataError, Pair, random_crops
from matplotlib import colormaps
from matplotlib.figure import Figure
from network import SmallUNet, to_input
from rich.console import Console
from rich.table import Table, box
from skimage.measure import label
from skimage.metrics import adapted_rand_error, variation_of_information
from skimage.segmentation import find_boundaries, watershed
from torch import Tensor
from torch.nn import functional as F
from train import rate, whole

import tritonaff
from tritonaff.files import check_writable, replacing

SMALLEST = 50  # voxels of a segment

# ----------------------------------------------------------------------------------- methods


class Affinities:
    """The probability that a voxel and another one, at each of the offsets, are of one cell."""

    title = "affinities"
    thresholds = 0.4, 0.5, 0.6

    def __init__(self, dimensions: int) -> None:
        self.offsets = tritonaff.instance_offsets(f"mutex_watershed_{dimensions}d")
        self.channels = len(self.offsets)
        self.loss = tritonaff.InstanceAffinityLoss(
            self.offsets, background=MEMBRANE, ignore_index=IGNORED
        )

    def segment(self, probs: np.ndarray, threshold: float) -> np.ndarray:
        """Segments of probabilities (K, H, W) or (K, D, H, W): above the threshold they attract."""
        segments = mwatershed.agglom(probs.astype(np.float64) - threshold, self.offsets)
        nearest = probs[: segments.ndim]
        return grow(segments.astype(np.int64), 1 - nearest.mean(axis=0))


class Boundaries:
    """The probability of a membrane."""

    title = "boundaries"
    thresholds = 0.05, 0.1, 0.2, 0.3, 0.5
    channels = 1

    def __init__(self, dimensions: int) -> None:
        pass

    def loss(self, logits: Tensor, ids: Tensor) -> Tensor:
        counted, membrane = (ids != IGNORED).float(), (ids == MEMBRANE).float()
        x = logits[:, 0]
        total = F.binary_cross_entropy_with_logits(x, membrane, counted, reduction="sum")
        return total / counted.sum().clamp(min=1)

    def segment(self, probs: np.ndarray, threshold: float) -> np.ndarray:
        return grow(label(probs[0] < threshold, connectivity=1), probs[0])


def grow(segments: np.ndarray, height: np.ndarray) -> np.ndarray:
    """Gives voxels without a segment, and small segments, to neighbours: lowest voxels first."""
    sizes = np.bincount(segments.ravel())
    sizes[MEMBRANE] = 0
    return watershed(height, np.where(sizes[segments] >= SMALLEST, segments, 0))


METHODS = {"affinities": Affinities, "boundaries": Boundaries}

# -------------------------------------------------------------------------- training, scores


class Result(NamedTuple):
    title: str
    threshold: float
    scores: np.ndarray  # means over the test images: Rand error, split, merge
    probs: np.ndarray  # (K, H, W) or (K, D, H, W), and
    segments: np.ndarray  # (H, W) or (D, H, W), of the last test image
    seconds: float


def train(name: str, cells: Cells, options: argparse.Namespace) -> Result:
    start = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = cells.train[0][1].shape
    method = METHODS[name](len(shape))
    torch.manual_seed(options.seed)
    network = SmallUNet(method.channels, dimensions=len(shape)).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), options.learning_rate)
    steps = options.steps
    poly = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 - step / steps) ** 0.9)
    size = np.minimum(shape, (*shape[:-2], *options.size))  # all planes of a volume
    chosen = {**vars(options), "size": size, "ignore_index": IGNORED}
    crops = random_crops(cells.train, argparse.Namespace(**chosen))
    for step, (images, ids) in enumerate(islice(crops, steps)):
        loss = method.loss(network(to_input(images, device)).logits, ids.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        poly.step()
        if (step + 1) * 4 // steps > step * 4 // steps:
            print(f"{method.title}: step {step + 1}/{steps}  loss {loss.item():.3f}", flush=True)

    val = [predict(network, image) for image, _ in cells.val]
    threshold = min(method.thresholds, key=lambda t: score(method, val, cells.val, t)[0][0])
    test = [predict(network, image) for image, _ in cells.test]
    scores, segments = score(method, test, cells.test, threshold)
    seconds = time.perf_counter() - start
    return Result(method.title, threshold, scores, test[-1], segments, seconds)


@torch.inference_mode()
def predict(network: SmallUNet, image: np.ndarray) -> np.ndarray:
    """Probabilities of all channels, (K, H, W) or (K, D, H, W)."""
    device = next(network.parameters()).device
    network.eval()
    x = to_input(torch.from_numpy(image[None]), device)
    return network(x).logits[0].sigmoid().cpu().numpy()


def score(
    method: Affinities | Boundaries, probs: list[np.ndarray], pairs: list[Pair], threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """Mean scores inside the true cells, and the segments of the last image."""
    rows = []
    for prob, (_, ids) in zip(probs, pairs, strict=True):
        segments, truth = method.segment(prob, threshold), np.where(ids == IGNORED, 0, ids)
        error, *_ = adapted_rand_error(truth, segments, ignore_labels=(0,))
        # Entropies in bits: of the segments given the cell, and of the cells given the segment.
        split, merge = variation_of_information(truth, segments, ignore_labels=(0,))
        rows.append((error, split, merge))
    return np.mean(rows, axis=0), segments


def draw(path: Path, image: np.ndarray, ids: np.ndarray, results: list[Result]) -> None:
    """The image and its ids; probabilities and segments of every method; one plane of a
    volume.
    """
    plane = ... if ids.ndim == 2 else ids.shape[0] // 2
    columns = [("image", image[plane], "ids", paint(ids[plane], ids[plane]))]
    for result in results:
        probs = np.stack([prob[plane] for prob in result.probs])
        # Red, green and blue: the voxel above, nine above, nine to the left. Gray: the membrane.
        channels = [ids.ndim - 2, -10, -9] if len(probs) > 1 else [0]
        shown = probs[channels].transpose(1, 2, 0)
        segments = paint(result.segments[plane], ids[plane])
        columns.append((result.title, shown, f"segments of {result.title}", segments))
    figure = Figure((3 * len(columns), 6.4), layout="constrained")
    axes = figure.subplots(2, len(columns))
    for column, (title, above, title_below, below) in zip(axes.T, columns, strict=True):
        for axis, text, values in ((column[0], title, above), (column[1], title_below, below)):
            axis.imshow(values, cmap="gray", interpolation="nearest")
            axis.set_title(text)
            axis.axis("off")
    with replacing(path) as new:
        figure.savefig(new, format="png", dpi=110)


def paint(segments: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Colours (..., 4) of segments: each has the colour of the true cell that it covers most, and
    borders are black.
    """
    _, numbers = np.unique(segments, return_inverse=True)
    overlap = np.zeros((numbers.max() + 1, ids.max() + 1), int)
    np.add.at(overlap, (numbers, ids.clip(0)), 1)
    overlap[:, 0] = 0
    colours = colormaps["tab20"](overlap.argmax(axis=1)[numbers] * 7 % 20)
    colours[(segments <= 0) | find_boundaries(segments)] = 0, 0, 0, 1
    return colours


# ------------------------------------------------------------------------------ command line


def main() -> int:
    options = parse_arguments()
    try:
        run(options)
    except (DataError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the next run starts anew", file=sys.stderr)
        return 130
    return 0


def run(options: argparse.Namespace) -> None:
    cells = load_cells(options.data, options.ignore_index) if options.data else draw_cells()
    picture = options.output / f"{cells.name}-instances.png"
    check_writable(picture)
    results = [train(name, cells, options) for name in METHODS]

    console = Console()
    table = Table("test images", box=box.ROUNDED if console.is_terminal else box.ASCII)
    for heading in ("Rand error", "VI split", "VI merge", "threshold", "seconds"):
        table.add_column(heading, justify="right")
    for result in results:
        scores = (f"{value:.3f}" for value in result.scores)
        table.add_row(result.title, *scores, f"{result.threshold}", f"{result.seconds:.0f}")
    console.print(table)
    draw(picture, *cells.test[-1], results)
    print(f"picture: {picture}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.description, add = __doc__.splitlines()[0], parser.add_argument
    # fmt: off
    add("data", type=Path, nargs="?", metavar="FOLDER", help="a data set as train.py --help "
        "describes; class 0 is the membrane; a volume is drawn without it")
    add("--ignore-index", type=whole(2, 255), default=255, help="label of pixels that never count")
    add("--steps", type=whole(1), default=400, help="of each training")
    add("--batch-size", type=whole(1), default=4, help="crops in a batch")
    add("--size", type=whole(16), nargs=2, default=[160, 160], metavar=("H", "W"), help="of a crop")
    add("--learning-rate", type=rate, default=3e-3, help="at the first step")
    add("--seed", type=whole(0), default=0, help="of initial weights and crops")
    add("--output", type=Path, default=Path("runs"), help="folder of the picture")
    # fmt: on
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
