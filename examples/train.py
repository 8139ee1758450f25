"""Trains one small network with several losses and compares them: a table and two pictures.

    python examples/train.py                               # drawn scenes; minutes on two CPU cores
    python examples/train.py --data FOLDER                 # your own images, see --help
    python examples/train.py --loss ce ce+ar ce+dilated    # affinity regression, dilated affinity

Every loss gets the same initial weights, the same batches in the same order, the same number of
steps and the same optimiser. To compare another loss, add it to LOSSES.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import NamedTuple

# The default, milliseconds of spinning, can stall a step for seconds on cores in use by others.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
from dataset import DataError, Dataset, load_folder, random_crops
from evaluation import score, thin_classes, validate
from network import Output, SmallUNet, to_input
from pictures import draw_predictions, draw_training
from rich.console import Console
from rich.table import Table, box
from scenes import CLASSES, make_scenes
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn import functional as F

import tritonaff
from tritonaff.files import check_writable, replacing

# ------------------------------------------------------------------------------------ losses


class CrossEntropy(nn.Module):
    neighbors: tritonaff.NeighborStatistics | None = None  # for an affinity head, if there is one

    def __init__(self, data: Dataset, ignore_index: int) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.aaf: tritonaff.AdaptiveAffinityFieldLoss | None = None  # whose sizes are drawn

    def forward(self, output: Output, target: Tensor, progress: Tensor) -> Tensor:
        ignore = self.ignore_index
        total = F.cross_entropy(output.logits, target, ignore_index=ignore, reduction="sum")
        return total / (target != ignore).sum().clamp(min=1)  # 0 for crops that are all ignored

    def optimizer_groups(self, lr: float) -> list[dict]:
        """Groups of the parameters that the loss itself learns."""
        return []


class CrossEntropyAAF(CrossEntropy):
    def __init__(self, data: Dataset, ignore_index: int) -> None:
        super().__init__(data, ignore_index)
        self.aaf = tritonaff.AdaptiveAffinityFieldLoss(
            len(data.classes), (3, 5, 7), ignore_index=ignore_index, cross_entropy=True
        )

    def forward(self, output: Output, target: Tensor, progress: Tensor) -> Tensor:
        return self.aaf(output.logits, target, progress)

    def optimizer_groups(self, lr: float) -> list[dict]:
        return [self.aaf.optimizer_group(lr)]


class CrossEntropyAR(CrossEntropy):
    """Affinity regression joins in the last third; in the paper, at the peak of the network."""

    def __init__(self, data: Dataset, ignore_index: int) -> None:
        super().__init__(data, ignore_index)
        self.ar = tritonaff.AffinityRegressionLoss(ignore_index=ignore_index)

    def forward(self, output: Output, target: Tensor, progress: Tensor) -> Tensor:
        # A weight of 0, not an "if", which would read the progress back and compile twice.
        weight = 0.1 * (progress >= 2 / 3)
        return super().forward(output, target, progress) + weight * self.ar(output.logits, target)


class CrossEntropyDilated(CrossEntropy):
    """Dilated affinity, for a head beside the classifier."""

    def __init__(self, data: Dataset, ignore_index: int) -> None:
        super().__init__(data, ignore_index)
        # The paper's rates, 8 and 16 of 513 pixels, would be 2 and 4 of 128. With the paper's beta,
        # 1.5, this network segments worse than without the head.
        rates, beta = (4, 8), 0.15
        self.neighbors = tritonaff.NeighborStatistics(rates, ignore_index)
        for _, labels in data.train:
            self.neighbors.update(torch.from_numpy(labels)[None])
        self.dilated = tritonaff.DilatedAffinityLoss(
            rates, statistics=self.neighbors, beta=beta, ignore_index=ignore_index
        )

    def forward(self, output: Output, target: Tensor, progress: Tensor) -> Tensor:
        affinity = F.interpolate(output.affinity, target.shape[1:], mode="bilinear")
        return super().forward(output, target, progress) + self.dilated(affinity, target)


LOSSES = {
    "ce": ("cross-entropy", CrossEntropy),
    "ce+aaf": ("cross-entropy + AAF", CrossEntropyAAF),
    "ce+ar": ("cross-entropy + AR", CrossEntropyAR),
    "ce+dilated": ("cross-entropy + dilated", CrossEntropyDilated),
}

# ---------------------------------------------------------------------------------- training


class Result(NamedTuple):
    title: str
    network: nn.Module
    criterion: CrossEntropy
    losses: dict[int, float]  # by step
    val: dict[int, float]  # mIoU of the validation split by step
    step_ms: float


def train(name: str, data: Dataset, options: argparse.Namespace, device: torch.device) -> Result:
    title, make_criterion = LOSSES[name]
    criterion = make_criterion(data, options.ignore_index).to(device)
    torch.manual_seed(options.seed)
    network = SmallUNet(len(data.classes), criterion.neighbors)
    network.to(device, memory_format=torch.channels_last)
    lr, steps = options.learning_rate, options.steps
    groups = [{"params": network.parameters()}, *criterion.optimizer_groups(lr)]
    optimizer = torch.optim.AdamW(groups, lr)
    poly = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 - step / steps) ** 0.9)

    def objective(images: Tensor, target: Tensor, progress: Tensor) -> Tensor:
        return criterion(network(images), target, progress)

    torch.compiler.reset()
    forward = torch.compile(objective, fullgraph=True) if options.compile else objective
    losses, val, times = {}, {}, []
    for step, (images, target) in enumerate(islice(random_crops(data.train, options), steps)):
        # The progress is a tensor: a Python number that changes would compile again.
        progress = torch.tensor(step / steps, device=device)
        batch = to_input(images, device), target.to(device, torch.int64), progress
        start = time.perf_counter()
        try:
            loss = forward(*batch)
        except BackendCompilerFailed as error:
            reason = str(error).splitlines()[0]
            print(f"torch.compile does not work here, training in eager mode ({reason})")
            options.compile, forward = False, objective
            loss = forward(*batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses[step] = loss.item()  # waits for the device
        times.append(time.perf_counter() - start)
        poly.step()
        if (step + 1) * 8 // steps > step * 8 // steps:
            val[step] = validate(network, data.val, len(data.classes), options.ignore_index)
            status = f"loss {losses[step]:.2f}  val mIoU {val[step]:.3f}"
            print(f"{title}: step {step + 1}/{steps}  {status}", flush=True)
    return Result(title, network, criterion, losses, val, 1000 * statistics.median(times))


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
    if options.batch_size == 1 and max(options.size) <= 8:  # a pixel where the network is coarsest
        raise DataError("a batch of one crop of 8x8 or less has no variance to normalise by")
    if options.data:
        data = load_folder(options.data, options.ignore_index)
    else:  # the same scenes for every --seed
        scenes = make_scenes(400, 1), make_scenes(50, 2), make_scenes(100, 3)
        data = Dataset("scenes", list(CLASSES), *scenes)
    names = (f"{data.name}{end}" for end in (".png", "-training.png", "-losses.csv"))
    picture, training, losses = (options.output / name for name in names)
    check_writable(picture)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    counts = f"{len(data.train)} training, {len(data.val)} validation and {len(data.test)} test"
    print(f"{data.name}: {len(data.classes)} classes, {counts} images; on {device}", flush=True)
    results = [train(name, data, options, device) for name in options.loss]

    thin, ious = thin_classes(data.train, len(data.classes)), {}
    console = Console()
    table = Table("loss", box=box.ROUNDED if console.is_terminal else box.ASCII)
    for heading in ("mIoU", "thin IoU", "boundary F", "step time (ms)"):
        table.add_column(heading, justify="right")
    for result in results:
        iou, f = score(result.network, data.test, len(data.classes), options.ignore_index)
        of_thin = f"{iou[thin].nanmean():.3f}" if thin else "-"
        cells = f"{iou.nanmean():.3f}", of_thin, f"{f:.3f}", f"{result.step_ms:.1f}"
        table.add_row(result.title, *cells)
        ious[result.title] = iou
    console.print(table)
    print("thin classes:", ", ".join(data.classes[k] for k in thin) or "none")
    with replacing(losses) as new, new.open("w", newline="", encoding="utf-8") as file:
        heading = "step", *options.loss, *(f"{name} val mIoU" for name in options.loss)
        columns = *(result.losses for result in results), *(result.val for result in results)
        rows = ([step, *(x.get(step) for x in columns)] for step in range(options.steps))
        csv.writer(file).writerows([heading, *rows])
    networks = {result.title: result.network for result in results}
    draw_predictions(picture, data, networks, options.ignore_index)
    draw_training(training, data, results, ious, options.ignore_index)
    print(f"pictures: {picture}, {training}\nlosses and validation mIoU: {losses}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.description, add = __doc__.splitlines()[0], parser.add_argument
    # fmt: off
    add("--data", type=Path, metavar="FOLDER", help="a data set: images/{train,val,test}/NAME.jpg, "
        ".jpeg or .png, labels/{train,val,test}/NAME.png, 8-bit pixels whose value is the class, "
        "classes.txt with a name on each line, class 0 first; scenes are drawn without it")
    add("--ignore-index", type=whole(0, 255), default=255, help="label of pixels that never count")
    add("--loss", nargs="+", choices=LOSSES, default=["ce", "ce+aaf"], help="losses to train with")
    add("--steps", type=whole(1), default=800, help="of each training")
    add("--batch-size", type=whole(1), default=8, help="crops in a batch")
    add("--size", type=whole(1), nargs=2, default=[96, 128], metavar=("H", "W"), help="of a crop")
    add("--learning-rate", type=rate, default=3e-3, help="at the first step")
    add("--seed", type=whole(0), default=0, help="of initial weights and crops")
    add("--output", type=Path, default=Path("runs"), help="folder of the pictures and the losses")
    add("--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile")
    # fmt: on
    return parser.parse_args()


def whole(low: int, high: int = 2**63 - 1) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
        return int(text)

    return parse


def rate(text: str) -> float:
    if not 0 < float(text) < math.inf:
        raise ValueError
    return float(text)


if __name__ == "__main__":
    sys.exit(main())
