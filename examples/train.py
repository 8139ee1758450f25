"""Trains one small network with several losses and compares them: a table and a picture.

    python examples/train_segmentation.py                  # drawn scenes; minutes on two CPU cores
    python examples/train_segmentation.py --data FOLDER    # your own images, see --help
    python examples/train_segmentation.py --loss ce ce+ar  # affinity regression, with heat maps
    python examples/train_segmentation.py --loss ce ce+dilated  # dilated affinity, propagation
    torchrun --nproc-per-node 4 examples/train_segmentation.py  # the same in several processes

Every loss gets the same initial weights, the same batches in the same order, the same number of
steps and the same optimiser. To compare another loss, add it to LOSSES. Several processes share
every batch and compute what one would; a training that was killed goes on with --resume.
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
import os
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import NamedTuple

# Before torch is imported: how long a thread spins while it waits for the others. The default, for
# milliseconds, can stall a step for seconds where another process wants the cores; not to spin at
# all would cost every short operation a wake-up.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import checkpoints
import matplotlib
import numpy as np
import ranks
import torch
from checkpoints import CheckpointError
from dataset import DataError, Dataset, Pair, load_folder, random_crops
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from scenes import CLASSES, make_scenes
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from tritonaff import (
    AdaptiveAffinityFieldLoss,
    AffinityRegressionLoss,
    DilatedAffinityHead,
    DilatedAffinityLoss,
    NeighborStatistics,
    affinity_propagation,
    dilated_affinity_target,
    label_affinity,
    square_root_affinity,
)
from tritonaff.distributed import all_reduce
from tritonaff.files import check_writable, replacing
from tritonaff.metrics import BoundaryScore
from tritonaff.plotting import plot_affinity

# ------------------------------------------------------------------------------------ losses


class CrossEntropy(nn.Module):
    changes_at = math.inf  # the progress from which on the loss is another one: never
    neighbors: NeighborStatistics | None = None  # what a head for affinity starts from: no head

    def __init__(self, data: Dataset, options: argparse.Namespace) -> None:
        super().__init__()
        self.ignore_index = options.ignore_index

    def forward(self, output: Output, target: Tensor, progress: Tensor) -> Tensor:
        ignore = self.ignore_index
        total = F.cross_entropy(output.logits, target, ignore_index=ignore, reduction="sum")
        # Of the pixels of all processes; in one process these are its own.
        total, count = all_reduce((total, (target != ignore).sum()), ranks.group())
        return total / count.clamp(min=1)

    def optimizer_groups(self, lr: float) -> list[dict]:
        """What the loss itself learns."""
        return []


class CrossEntropyAAF(CrossEntropy):
    def __init__(self, data: Dataset, options: argparse.Namespace) -> None:
        super().__init__(data, options)
        self.aaf = AdaptiveAffinityFieldLoss(
            len(data.classes),
            (3, 5, 7),
            ignore_index=options.ignore_index,
            cross_entropy=True,
            process_group=ranks.group(),
        )

    def forward(self, output: Output, target: Tensor, progress: Tensor) -> Tensor:
        return self.aaf(output.logits, target, progress)

    def optimizer_groups(self, lr: float) -> list[dict]:
        return [self.aaf.optimizer_group(lr)]


AR_FROM = 2 / 3  # of the progress
AR_WEIGHT = 0.1


class CrossEntropyAR(CrossEntropy):
    """Cross-entropy first, affinity regression beside it at the end: the paper adds it at the peak
    of the network, this script after a fixed part of the steps.
    """

    changes_at = AR_FROM

    def __init__(self, data: Dataset, options: argparse.Namespace) -> None:
        super().__init__(data, options)
        self.ar = AffinityRegressionLoss(
            ignore_index=options.ignore_index, process_group=ranks.group()
        )

    def forward(self, output: Output, target: Tensor, progress: Tensor) -> Tensor:
        # A weight of 0, not an "if": that would read the progress back from the device and compile
        # twice. What it costs in vain is little, the loss looks at 180 points of an image.
        weight = AR_WEIGHT * (progress >= AR_FROM)
        return super().forward(output, target, progress) + weight * self.ar(output.logits, target)


# Chosen on the scenes' validation split, with one seed. The paper's rates, 8 and 16 of 513 pixels,
# would be 2 and 4 of 128; with its beta, 1.5, this network segments worse than without the head.
DILATED_RATES = (4, 8)  # pixels of the labels
DILATED_BETA = 0.15
HEAD_STRIDE = 2  # pixels of the labels for one of the affinity head


class CrossEntropyDilated(CrossEntropy):
    """Cross-entropy and, for a head beside the classifier, dilated affinity."""

    def __init__(self, data: Dataset, options: argparse.Namespace) -> None:
        super().__init__(data, options)
        self.stride = {"labels": 1, "head": HEAD_STRIDE}[options.affinity_at]
        rates = [rate // self.stride for rate in DILATED_RATES]
        self.neighbors = NeighborStatistics(rates, options.ignore_index)
        for _, labels in data.train:
            self.neighbors.update(self.sampled(torch.from_numpy(labels)[None]))
        self.dilated = DilatedAffinityLoss(
            rates,
            statistics=self.neighbors,
            beta=DILATED_BETA,
            ignore_index=options.ignore_index,
            process_group=ranks.group(),
        )

    def forward(self, output: Output, target: Tensor, progress: Tensor) -> Tensor:
        labels = self.sampled(target)
        dilated = self.dilated(enlarged(output.affinity, labels), labels)
        return super().forward(output, target, progress) + dilated

    def sampled(self, target: Tensor) -> Tensor:
        return target[:, :: self.stride, :: self.stride]


def enlarged(affinity: Tensor, labels: Tensor) -> Tensor:
    """Logits as large as the labels; as they are where they already are."""
    return F.interpolate(affinity, labels.shape[1:], mode="bilinear")


LOSSES = {
    "ce": ("cross-entropy", CrossEntropy),
    "ce+aaf": ("cross-entropy + AAF", CrossEntropyAAF),
    "ce+ar": ("cross-entropy + AR", CrossEntropyAR),
    "ce+dilated": ("cross-entropy + dilated", CrossEntropyDilated),
}


def drawn_scenes() -> Dataset:
    """The same scenes for every --seed."""
    train, val, test = make_scenes(400, 1), make_scenes(50, 2), make_scenes(100, 3)
    return Dataset("scenes", list(CLASSES), train, val, test)


# ----------------------------------------------------------------------------------- network


def convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False),
        ranks.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class Output(NamedTuple):
    logits: Tensor  # (N, C, H, W)
    affinity: Tensor | None  # (N, 8 R, H / 2, W / 2), rounded up: logits of the affinity head


class SmallUNet(nn.Module):
    """Encoder and decoder with skip connections, 0.3 M parameters; logits as large as the image,
    those of the affinity head half as large.
    """

    def __init__(
        self,
        num_classes: int,
        neighbors: NeighborStatistics | None = None,
        widths: tuple[int, ...] = (16, 32, 64, 96),
    ) -> None:
        super().__init__()
        levels = list(pairwise(widths))
        self.stem = convolution(3, widths[0])
        self.shrink = nn.ModuleList(
            nn.Sequential(convolution(fine, coarse, stride=2), convolution(coarse, coarse))
            for fine, coarse in levels
        )
        self.enlarge = nn.ModuleList(
            nn.ConvTranspose2d(coarse, fine, kernel_size=2, stride=2) for fine, coarse in levels
        )
        self.merge = nn.ModuleList(convolution(fine, fine) for fine, _ in levels)
        self.classify = nn.Conv2d(widths[0], num_classes, kernel_size=1)
        # The last one made: all before it starts with the same weights, with it or without.
        self.affinity = None
        if neighbors is not None:
            self.affinity = DilatedAffinityHead(widths[1], neighbors.rates, neighbors)

    def forward(self, x: Tensor) -> Output:
        x = self.stem(x)
        skips = []
        for shrink in self.shrink:
            skips.append(x)
            x = shrink(x)
        for enlarge, merge in zip(reversed(self.enlarge), reversed(self.merge), strict=True):
            skip, half = skips.pop(), x
            # An odd size was rounded up on the way down: cut off what is too much.
            x = merge(skip + enlarge(x)[..., : skip.shape[2], : skip.shape[3]])
        return Output(self.classify(x), None if self.affinity is None else self.affinity(half))


def to_input(images: Tensor, device: torch.device) -> Tensor:
    """(N, H, W, 3) bytes to (N, 3, H, W) around 0, channels_last as they already lie."""
    return images.to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


# ---------------------------------------------------------------------------------- training


class Display:
    """One progress bar for each training; where there is no terminal, plain lines."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=console,
            expand=True,
            disable=not console.is_terminal,
        )

    def begin(self, title: str, steps: int, done: int, status: str) -> None:
        self.title, self.loss, self.val_iou = title, "", ""
        self.task = self.bars.add_task(title, total=steps, completed=done, status=status)
        if done:
            self.say(f"{title}: goes on after step {done}/{steps}")

    def advance(self, loss: float) -> None:
        self.loss = f"loss {loss:.2f}"
        self.bars.update(self.task, advance=1, status=f"{self.loss}  {self.val_iou}")

    def report(self, val_iou: float) -> None:
        self.val_iou = f"val mIoU {val_iou:.3f}"
        self.bars.update(self.task, status=f"{self.loss}  {self.val_iou}")
        if not self.console.is_terminal:
            task = self.bars.tasks[self.task]
            done = f"step {task.completed}/{task.total}"
            self.say(f"{self.title}: {done}  {self.loss}  {self.val_iou}")

    def say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)


REPORTS = 4  # how often a training looks at the validation split
# What must be the same where a training goes on. The number of processes need not.
RESUMED_WITH = (
    "steps",
    "batch_size",
    "size",
    "learning_rate",
    "seed",
    "ignore_index",
    "affinity_at",
)


class Result(NamedTuple):
    title: str
    network: nn.Module
    before: nn.Module | None  # the network when the loss changed, if it did
    losses: list[float]  # at each step
    step_ms: float


def train(
    name: str, data: Dataset, options: argparse.Namespace, device: torch.device, display: Display
) -> Result:
    title, make_criterion = LOSSES[name]
    criterion = make_criterion(data, options).to(device)
    torch.manual_seed(options.seed)
    network = SmallUNet(len(data.classes), criterion.neighbors)
    network.to(device, memory_format=torch.channels_last)
    lr, steps = options.learning_rate, options.steps
    groups = [{"params": network.parameters()}, *criterion.optimizer_groups(lr)]
    optimizer = torch.optim.AdamW(groups, lr)
    poly = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 - step / steps) ** 0.9)
    parts = {"network": network, "criterion": criterion, "optimizer": optimizer, "poly": poly}

    path = options.output / f"{data.name}-{name}.pt"
    training = {key: getattr(options, key) for key in RESUMED_WITH}
    training |= {"size": list(options.size), "classes": data.classes, "images": len(data.train)}
    saved = checkpoints.load(path, training) if options.resume else None
    losses, times, before = [], [], None
    if saved:
        losses, times = saved["losses"], saved["times"]
        if saved["before"]:
            before = copy.deepcopy(network)
            before.load_state_dict(saved["before"])
        for key, part in parts.items():
            part.load_state_dict(saved[key])
    done = len(losses)

    def next_batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
        """This process's part of a batch that is the same for any number of them."""
        images, target = (x[ranks.rank() :: ranks.size()] for x in next(crops))
        # The progress is a tensor: a Python number that changes would compile again.
        progress = torch.tensor(step / steps, device=device)
        return to_input(images, device), target.to(device, torch.int64), progress

    network.train()
    forward: nn.Module = Step(network, criterion)
    display.begin(title, steps, done, "compiling" if options.compile else "")
    if options.compile and done < steps:
        crops = random_crops(data.train, options)
        try:
            forward = compiled(forward, next_batch(0))
        except BackendCompilerFailed as error:
            options.compile = False
            reason = str(error).splitlines()[0]
            display.say(f"torch.compile does not work here, training in eager mode ({reason})")

    if ranks.group():
        forward = DistributedDataParallel(forward)  # averages gradients

    crops = islice(random_crops(data.train, options), done, None)
    for step in range(done, steps):
        if before is None and step / steps >= criterion.changes_at:
            before = copy.deepcopy(network)
        batch = next_batch(step)
        start = time.perf_counter()
        loss = forward(*batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())  # waits for the device
        times.append(time.perf_counter() - start)
        poly.step()
        display.advance(losses[-1])
        if (step + 1) * REPORTS // steps > step * REPORTS // steps:
            display.report(score(network, data.val, len(data.classes), options.ignore_index)[0])
        if ranks.rank() == 0 and ((step + 1) % options.save_every == 0 or step + 1 == steps):
            content = {key: part.state_dict() for key, part in parts.items()}
            content |= {"training": training, "losses": losses, "times": times}
            checkpoints.save(path, {**content, "before": before and before.state_dict()})
    return Result(title, network, before, losses, 1000 * statistics.median(times))


class Step(nn.Module):
    """All that is computed forward in a step of the training."""

    def __init__(self, network: nn.Module, criterion: nn.Module) -> None:
        super().__init__()
        self.network, self.criterion = network, criterion

    def forward(self, images: Tensor, target: Tensor, progress: Tensor) -> Tensor:
        return self.criterion(self.network(images), target, progress)


def compiled(step: Step, batch: tuple) -> nn.Module:
    """``step`` compiled, with its backward pass, on a batch that leaves no trace."""
    torch.compiler.reset()
    before = copy.deepcopy(step.state_dict())
    fast = torch.compile(step, fullgraph=True)
    try:
        fast(*batch).backward()
    finally:
        step.load_state_dict(before)  # batch normalisation counted the batch
    return fast


# -------------------------------------------------------------------------------- evaluation


def score(
    network: nn.Module, pairs: list[Pair], num_classes: int, ignore_index: int
) -> tuple[float, float]:
    """Mean IoU and mean boundary F over the classes, on full images; of all processes together."""
    table = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    boundary = BoundaryScore(num_classes, ignore_index=ignore_index)
    for image, labels in pairs[ranks.rank() :: ranks.size()]:
        prediction = predict(network, image)
        boundary.update(prediction[None], torch.from_numpy(labels)[None])
        table += confusion(prediction, labels, num_classes, ignore_index)
    boundary.counts = ranks.add_up(boundary.counts)
    return mean_iou(ranks.add_up(table)).item(), boundary.compute().f.nanmean().item()


def confusion(
    prediction: Tensor, labels: np.ndarray, num_classes: int, ignore_index: int
) -> Tensor:
    """Pixels by truth and prediction, (C, C)."""
    target = torch.from_numpy(labels).long()
    counted = target != ignore_index
    cells = target[counted] * num_classes + prediction[counted]
    return torch.bincount(cells, minlength=num_classes**2).view(num_classes, num_classes)


def mean_iou(table: Tensor) -> Tensor:
    """Of confusions (..., C, C)."""
    hits = table.diagonal(dim1=-2, dim2=-1)
    iou = hits / (table.sum(-2) + table.sum(-1) - hits)  # NaN for a class that never occurs
    return iou.nanmean(-1)


@torch.inference_mode()
def infer(network: nn.Module, image: np.ndarray) -> Output:
    """What the network says about one image."""
    device = next(network.parameters()).device
    network.eval()
    output = network(to_input(torch.from_numpy(image[None]), device))
    network.train()
    return output


def predict(network: nn.Module, image: np.ndarray) -> Tensor:
    """The classes (H, W) of one image, on the CPU."""
    return infer(network, image).logits.argmax(dim=1)[0].cpu()


ITERATIONS = (0, 1, 3, 6, 10)


@torch.inference_mode()
def refinement(
    network: nn.Module, pairs: list[Pair], num_classes: int, ignore_index: int
) -> Tensor:
    """Mean IoU after each of ITERATIONS of propagation, (2, 5): first with the affinity that the
    network predicts, then with the truth.
    """
    tables = torch.zeros(2, len(ITERATIONS), num_classes, num_classes, dtype=torch.int64)
    for image, labels in pairs:
        logits, affinity = infer(network, image)
        target = torch.from_numpy(labels)[None].to(logits.device)
        truth = dilated_affinity_target(target, DILATED_RATES, ignore_index=ignore_index) == 1
        sources = (enlarged(affinity, target), True), (truth.float(), False)
        for row, (source, from_logits) in zip(tables, sources, strict=True):
            probs, done = logits.softmax(dim=1), 0
            for table, iterations in zip(row, ITERATIONS, strict=True):
                probs = affinity_propagation(
                    probs,
                    source,
                    DILATED_RATES,
                    iterations=iterations - done,
                    from_logits=from_logits,
                )
                done = iterations
                prediction = probs.argmax(dim=1)[0].cpu()
                table += confusion(prediction, labels, num_classes, ignore_index)
    return mean_iou(tables)


class Cost(NamedTuple):
    parameters: int
    flops: int
    ms: float


@torch.inference_mode()
def costs(network: nn.Module, image: np.ndarray) -> dict[str, Cost]:
    """What one image costs: the network without its head, what the head adds until its logits are
    enlarged, and propagation. FLOPs are those of convolutions and of propagation's sums.
    """
    output, head, bare = infer(network, image), network.affinity, copy.deepcopy(network)
    bare.affinity = None
    labels, probs = output.logits[:, 0], output.logits.softmax(dim=1)
    affinity = enlarged(output.affinity, labels)
    features = output.affinity.new_zeros(1, head.in_channels, *output.affinity.shape[2:])
    features = features.contiguous(memory_format=torch.channels_last)
    # An iteration adds up every pixel and its neighbours, weighed: 2 FLOPs each, for every class.
    sums = ITERATIONS[-1] * probs.numel() * 2 * (1 + affinity.shape[1])
    parts = {
        "network": (bare.parameters(), 0, lambda: infer(bare, image)),
        "affinity head": (head.parameters(), 0, lambda: enlarged(head(features), labels)),
        f"{ITERATIONS[-1]} iterations": (
            (),
            sums,
            lambda: affinity_propagation(probs, affinity, DILATED_RATES, iterations=ITERATIONS[-1]),
        ),
    }
    result = {}
    for name, (parameters, flops, function) in parts.items():
        with FlopCounterMode(display=False) as counter:
            function()
        timer = Timer("f()", globals={"f": function}, num_threads=torch.get_num_threads())
        ms = 1000 * timer.blocked_autorange(min_run_time=0.3).median
        count = sum(parameter.numel() for parameter in parameters)
        result[name] = Cost(count, counter.get_total_flops() + flops, ms)
    return result


def affinity_regression(network: nn.Module, pairs: list[Pair], ignore_index: int) -> float:
    """The loss on full images, its mean over those that have a point which counts."""
    loss_fn = AffinityRegressionLoss(ignore_index=ignore_index)
    losses = []
    for image, labels in pairs:
        target = torch.from_numpy(labels)[None]
        if label_affinity(target, ignore_index=ignore_index)[1].any():
            losses.append(loss_fn(infer(network, image).logits.cpu(), target).item())
    return statistics.mean(losses) if losses else 0.0


def draw(path: Path, data: Dataset, results: list[Result], rows: int = 4) -> None:
    """Images of the test split, evenly chosen, their truth and what each network predicts."""
    chosen = np.linspace(0, len(data.test) - 1, min(rows, len(data.test))).astype(int)
    height, width = data.test[0][1].shape
    columns = 2 + len(results)
    figure = Figure((3 * columns, 3 * height / width * len(chosen) + 0.8), layout="constrained")
    palette = matplotlib.colormaps["tab10" if len(data.classes) <= 10 else "tab20"]
    axes = figure.subplots(len(chosen), columns, squeeze=False)
    for row, index in zip(axes, chosen, strict=True):
        image, labels = data.test[index]
        row[0].imshow(image)
        predictions = [predict(result.network, image).numpy() for result in results]
        for axis, classes in zip(row[1:], [labels, *predictions], strict=True):
            colours = palette(classes % palette.N)
            colours[classes >= len(data.classes)] = 0  # void
            axis.imshow(colours, interpolation="nearest")
    titles = ["image", "truth", *(result.title for result in results)]
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title)
    for axis in axes.flat:
        axis.axis("off")
    patches = [Patch(color=palette(k % palette.N), label=c) for k, c in enumerate(data.classes)]
    legend = figure.legend(handles=patches, loc="outside lower center", ncols=8, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)  # dollars in the name of a class are dollars
    with replacing(path) as new:
        figure.savefig(new, format="png", dpi=110)


def draw_affinity(path: Path, data: Dataset, result: Result, ignore_index: int) -> None:
    """The first image drawn above as the affinity regression sees it: Fig. 4 of its paper."""
    image, labels = data.test[0]
    affinity, valid = label_affinity(torch.from_numpy(labels)[None], ignore_index=ignore_index)
    matrices = {
        "label affinity": affinity,
        "before": square_root_affinity(infer(result.before, image).logits).cpu(),
        "after": square_root_affinity(infer(result.network, image).logits).cpu(),
    }
    ignored = ~(valid[:, :, None] & valid[:, None, :])
    with replacing(path) as new:
        plot_affinity({k: v.masked_fill(ignored, torch.nan) for k, v in matrices.items()}, new)


# ------------------------------------------------------------------------------ command line


def main() -> int:
    options = parse_arguments()
    device = ranks.join()
    try:
        return run(options, device)
    except (DataError, CheckpointError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        if ranks.rank() == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if ranks.rank() == 0:
            print(
                "interrupted: with --resume, the same command goes on from the checkpoints "
                f"in {options.output}",
                file=sys.stderr,
            )
        return 130
    finally:
        ranks.leave()


def run(options: argparse.Namespace, device: torch.device) -> int:
    console = Console(quiet=ranks.rank() > 0)
    display = Display(console)
    if options.batch_size < ranks.size():
        raise DataError(
            f"a batch of {options.batch_size} is too small for {ranks.size()} processes"
        )
    if options.batch_size == 1 and max(options.size) <= 8:  # a pixel where the network is coarsest
        raise DataError("a batch of one crop of 8x8 or less has no variance to normalise by")
    data = load_folder(options.data, options.ignore_index) if options.data else drawn_scenes()
    check_writable(options.output / f"{data.name}.png")
    display.say(
        f"{data.name}: {len(data.classes)} classes, {len(data.train)} training, "
        f"{len(data.val)} validation and {len(data.test)} test images; on {device}"
        + (f", {ranks.size()} processes" if ranks.group() else "")
    )
    with display.bars:
        results = [train(name, data, options, device, display) for name in options.loss]

    rows = []
    for result in results:
        iou, boundary_f = score(result.network, data.test, len(data.classes), options.ignore_index)
        rows.append((result.title, f"{iou:.3f}", f"{boundary_f:.3f}", f"{result.step_ms:.1f}"))
    if ranks.rank() > 0:
        return 0  # the first one reports
    print_table(console, ("loss", "mIoU", "boundary F", "step time (ms)"), rows)
    write_losses(options.output / f"{data.name}-losses.csv", options.loss, results)
    picture = options.output / f"{data.name}.png"
    draw(picture, data, results)
    display.say(f"picture: {picture}")
    for result in results:
        if result.before is None:
            continue
        # Any training lowers it: what was trained without it stands beside.
        networks = {"before": result.before, "after": result.network}
        networks |= {other.title: other.network for other in results if other.before is None}
        values = ", ".join(
            f"{affinity_regression(network, data.test, options.ignore_index):.4f} {title}"
            for title, network in networks.items()
        )
        display.say(f"affinity regression on the test split: {values}")
        picture = options.output / f"{data.name}-affinity.png"
        draw_affinity(picture, data, result, options.ignore_index)
        display.say(f"heat maps: {picture}")
    for result in results:
        if result.network.affinity is not None:
            report_refinement(console, data, result.network, options.ignore_index)
    return 0


def write_losses(path: Path, names: Sequence[str], results: list[Result]) -> None:
    with replacing(path) as new, new.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["step", *names])
        for step, losses in enumerate(zip(*(result.losses for result in results), strict=True)):
            table.writerow([step, *losses])


def report_refinement(
    console: Console, data: Dataset, network: nn.Module, ignore_index: int
) -> None:
    """Tables 3 and 4 of the paper, and what it takes."""
    ious = refinement(network, data.test, len(data.classes), ignore_index)
    rows = [
        (title, *(f"{iou:.3f}" for iou in row))
        for title, row in zip(("predicted affinity", "ground-truth affinity"), ious, strict=True)
    ]
    print_table(console, ("test mIoU after iterations", *map(str, ITERATIONS)), rows)
    image, labels = data.test[0]
    rows = [
        (title, f"{cost.parameters}", f"{cost.flops / 1e6:.1f}", f"{cost.ms:.2f}")
        for title, cost in costs(network, image).items()
    ]
    heading = "cost of an image, {}x{}".format(*labels.shape)
    print_table(console, (heading, "parameters", "MFLOP", "time (ms)"), rows)


def print_table(console: Console, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    table = Table(box=box.ROUNDED if console.is_terminal else box.ASCII)
    for k, heading in enumerate(headings):
        table.add_column(heading, justify="right" if k else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="a data set: images/{train,val,test}/NAME.jpg, .jpeg or .png, "
        "labels/{train,val,test}/NAME.png, 8-bit pixels whose value is the class, classes.txt "
        "with a name on each line, class 0 first (default: scenes drawn by the example)",
    )
    parser.add_argument(
        "--ignore-index",
        type=byte,
        default=255,
        metavar="VALUE",
        help="label of the pixels that count nowhere (default: %(default)s)",
    )
    parser.add_argument(
        "--loss",
        nargs="+",
        choices=LOSSES,
        metavar="LOSS",
        default=("ce", "ce+aaf"),
        help="which losses to train with: ce, ce+aaf, ce+ar, ce+dilated (default: ce ce+aaf); "
        "ce+ar is cross-entropy and, in the last third of the steps, affinity regression, and "
        "draws heat maps of it; ce+dilated also trains a head for dilated affinity, and shows what "
        "propagation along it does and costs",
    )
    parser.add_argument(
        "--affinity-at",
        choices=("labels", "head"),
        default="labels",
        help="where ce+dilated compares the head with the labels: at the labels' resolution, with "
        "the head's logits enlarged, as the paper does, or at the head's, half of it, with labels "
        "sampled (default: %(default)s)",
    )
    parser.add_argument("--steps", type=positive, default=800, help="default: %(default)s")
    parser.add_argument("--batch-size", type=positive, default=8, help="default: %(default)s")
    parser.add_argument(
        "--size",
        type=positive,
        nargs=2,
        default=(96, 128),
        metavar=("HEIGHT", "WIDTH"),
        help="of the random crops to train on (default: 96 128)",
    )
    parser.add_argument("--learning-rate", type=rate, default=3e-3, help="default: %(default)s")
    parser.add_argument(
        "--seed", type=seed, default=0, help="of initial weights and crops (default: %(default)s)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs"),
        metavar="FOLDER",
        help="where pictures, losses of every step and checkpoints go (default: %(default)s)",
    )
    parser.add_argument(
        "--save-every",
        type=positive,
        default=100,
        metavar="STEPS",
        help="how often a training saves a checkpoint (default: %(default)s)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the checkpoints in the output folder, where there are any; several "
        "machines must share it",
    )
    parser.add_argument(
        "--no-compile",
        dest="compile",
        action="store_false",
        help="train in eager mode, without torch.compile",
    )
    return parser.parse_args()


def byte(text: str) -> int:
    if not text.isdecimal() or int(text) > 255:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 255")
    return int(text)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2**63 - 1")
    return int(text)


def rate(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return number


if __name__ == "__main__":
    sys.exit(main())
