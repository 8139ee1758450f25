"""A network trained end to end with each loss, on streets, cracks and membranes, several seeds.

    python study/finetune.py train --crackforest FOLDER --camvid FOLDER --isbi FOLDER
    python study/finetune.py collect    # docs/results/study/finetune.json, for the report
    python study/finetune.py pictures --crackforest FOLDER    # where each loss fails
    python study/finetune.py score --crackforest FOLDER    # once more, after a change of metrics

A run takes minutes on a core and leaves a file: ``train`` goes on with the runs that have no file
and are not in finetune.json, the most informative first. study/study.py names the packages that it
needs.

Unlike study.py, which trains a decoder on features of a frozen backbone, all weights learn here, on
mirrored and resized crops; losses and scores are at the resolution of the image; and where there
are two classes, the network has one channel.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # see examples/train.py
sys.path.append(str(Path(__file__).parent.parent / "examples"))

import numpy as np
import torch
from architecture import GRAY, MULTIPLE, EfficientNetLite0, Network
from dataset import DataError, Dataset, Pair, load_folder
from evaluation import confusion, mean_iou
from failures import draw_failures
from losses import LOSSES, TITLES, Batch, CrossEntropy, Facts, Output, boundary_distance, log_loss
from PIL import Image
from thin import TENTHS, ThinScore, tolerant_f1
from torch import Tensor, nn
from torch.nn import functional as F
from training import rounded

from tritonaff import affinity_propagation
from tritonaff.bench.machine import describe
from tritonaff.bench.tables import write_json
from tritonaff.metrics import AffinityAccuracy, BoundaryScore
from tritonaff.version import __version__

# -------------------------------------------------------------------------------------- plan


@dataclass(frozen=True)
class Setting:
    """Facts about a data set, and how long to train on it."""

    ignore_index: int
    steps: int
    thin: int | None = None  # of two classes, the label that the one channel stands for
    cells: bool = False  # the other class is cells, which the thin class parts
    thresholds: tuple[float, ...] = TENTHS  # of the thin class's probability, to choose from
    rates: tuple[int, ...] = (8, 16)  # of dilated affinity, pixels
    every: int = 1  # how many images of the validation split make one look
    learning_rates: tuple[float, ...] = (3e-3, 1e-2)  # cross-entropy chooses


SETTINGS = {
    "crackforest": Setting(255, steps=300, thin=1, rates=(2, 4)),
    "camvid": Setting(11, steps=1200, every=8, learning_rates=(1e-2,)),
    "isbi": Setting(
        255,
        steps=300,
        thin=0,
        cells=True,
        # A hole of a membrane joins two cells: the Rand error is least far below 0.1.
        thresholds=(0.01, 0.02, 0.03, 0.05, 0.07, *TENTHS),
        rates=(2, 4),
    ),
}
SEEDS = (0, 1, 2)
BATCH_SIZE, CROP = 4, 224
# In the order of the runs, with the weight of each: the papers', but for U-Net's w0, 10 there, and
# dilated affinity's 1.5. Frozen features chose 10 (CamVid) and 1 (ISBI 2012) of w0, and 0.1.
FIRST = {"ce": 1.0, "ce+affinity": 1.0, "ce+aaf": 1.0}
THEN = {"ce+dice": 1.0, "unet": 3.0}
LAST = {"ce+dilated": 0.1, "ce+ar": 0.1}
WEIGHTS = FIRST | THEN | LAST
# Of "ce+affinity", each changed alone, with the first seed. The validation split chooses.
CHANGES: tuple[dict[str, Any], ...] = (
    {"weight": 0.3},
    {"weight": 3.0},
    {"options": (("margin", 1.0),)},
    {"options": (("kernel_sizes", (5,)),)},
    {"options": (("start", 0.5),)},
    {"options": (("decay", False),)},
)
MORE_SEEDS = (0, 1, 2, 3, 4)  # of the chosen settings, and of what they are compared with


@dataclass(frozen=True)
class Run:
    """A complete description of one training: equal descriptions are the same training."""

    data: str
    loss: str
    steps: int
    learning_rate: float
    weight: float = 1.0
    seed: int = 0  # of initial weights and crops
    options: tuple[tuple[str, Any], ...] = ()  # of the loss

    @classmethod
    def read(cls, fields: dict[str, Any]) -> Run:
        """A run from a file, where tuples are lists."""
        options = fields.get("options", ())
        options = ((key, tuple(x) if isinstance(x, list) else x) for key, x in options)
        return cls(**fields | {"options": tuple(options)})

    @property
    def name(self) -> str:
        """A file name."""
        words = [self.data, self.loss, f"{self.weight:g}"]
        for key, value in self.options:
            words.append(key + "".join(c for c in str(value) if c.isalnum() or c == "."))
        return "-".join([*words, f"{self.steps}", f"{self.learning_rate:g}", f"seed{self.seed}"])


Results = dict[str, dict[str, Any]]  # contents of the runs' files, by name


def plan(data: Sequence[str], results: Results) -> list[Run]:
    """The runs whose settings are known from the results so far, the most informative first."""
    runs = []
    for stage in (FIRST, THEN, None, LAST):
        for name in data:
            rates = learning_rates(name)
            runs += rates
            if any(run.name not in results for run in rates):
                return list(dict.fromkeys(runs))
            best = chosen_base(name, results)
            runs += search(best, results) if stage is None else with_losses(best, stage)
    return list(dict.fromkeys(runs))


def learning_rates(data: str) -> list[Run]:
    """Cross-entropy with the first seed, the rates to choose from."""
    setting = SETTINGS[data]
    return [Run(data, "ce", setting.steps, rate) for rate in setting.learning_rates]


def chosen_base(data: str, results: Results) -> Run | None:
    """The one that the validation split chooses of the runs that are known."""
    known = [run for run in learning_rates(data) if run.name in results]
    return max(known, key=lambda run: validation(results[run.name])) if known else None


def with_losses(base: Run, losses: dict[str, float]) -> list[Run]:
    return [
        replace(base, loss=loss, weight=weight, seed=seed)
        for seed in SEEDS
        for loss, weight in losses.items()
    ]


def trials(base: Run) -> list[Run]:
    """The settings to choose from, the plan's first."""
    default = replace(base, loss="ce+affinity", weight=FIRST["ce+affinity"])
    return [default, *(replace(default, **change) for change in CHANGES)]


def search(base: Run, results: Results) -> list[Run]:
    """The trials; when all are known, the best, the plan's and cross-entropy with more seeds."""
    runs = trials(base)
    if any(run.name not in results for run in runs):
        return runs
    winner = max(runs, key=lambda run: validation(results[run.name]))
    compared = winner, runs[0], base
    return runs + [replace(run, seed=seed) for seed in MORE_SEEDS for run in compared]


def validation(result: dict[str, Any]) -> float:
    """The score of the validation split that chooses: of thin structures F1 at 2 pixels, percent,
    at the best threshold; else the last mean IoU.
    """
    return tolerant_f1(result["val"]["thin"]).max() if "val" in result else last_iou(result)


def last_iou(result: dict[str, Any]) -> float:
    return 100 * result["looks"][-1]["miou"]


# -------------------------------------------------------------------------------------- data


def load(folder: Path, setting: Setting) -> Dataset:
    """A data set in memory; the thin class, if there is one, is label 1."""
    data = load_folder(folder, setting.ignore_index)
    if setting.thin != 0:
        return data
    swap = np.arange(256, dtype=np.uint8)
    swap[:2] = 1, 0
    splits = {
        name: [(image, swap[labels]) for image, labels in getattr(data, name)]
        for name in ("train", "val", "test")
    }
    return data._replace(classes=data.classes[::-1], **splits)


def batches(pairs: Sequence[Pair], run: Run) -> Iterator[tuple[Tensor, Batch]]:
    """Endless images (N, CROP, CROP, 3) and their labels. Every image gives a crop, then all again
    in another order. Every loss gets the same crops.
    """
    rng = np.random.default_rng(run.seed)
    ignore_index, queue = SETTINGS[run.data].ignore_index, []
    far = LOSSES[run.loss].needs_distance
    while True:
        crops = []
        for _ in range(BATCH_SIZE):
            queue = queue or rng.permutation(len(pairs)).tolist()
            crops.append(crop(*pairs[queue.pop()], ignore_index, rng))
        images, labels = (np.stack(parts) for parts in zip(*crops, strict=True))
        distance = None
        if far:
            distance = np.stack([boundary_distance(label, ignore_index) for label in labels])
            distance = torch.from_numpy(distance)
        yield torch.from_numpy(images), Batch(torch.from_numpy(labels).long(), distance)


def crop(
    image: np.ndarray, labels: np.ndarray, ignore_index: int, rng: np.random.Generator
) -> Pair:
    """A random window of half to twice the CROP, mirrored or not, resized to the CROP. Missing
    pixels are gray and ignored.
    """
    size = round(CROP * 2 ** rng.uniform(-1, 1))
    height, width = labels.shape
    y, x = (rng.integers(max(length - size, 0) + 1) for length in (height, width))
    step = rng.choice((1, -1))
    image, labels = (part[y : y + size, x : x + size][:, ::step] for part in (image, labels))
    image, labels = padded(image, labels, (size, size), ignore_index)
    resampling = Image.Resampling
    return (
        np.asarray(Image.fromarray(image).resize((CROP, CROP), resampling.BILINEAR)),
        np.asarray(Image.fromarray(labels).resize((CROP, CROP), resampling.NEAREST)),
    )


def padded(image: np.ndarray, labels: np.ndarray, size: tuple[int, int], ignore_index: int) -> Pair:
    """Image and labels, enlarged below and on the right."""
    missing = [(0, new - old) for new, old in zip(size, labels.shape, strict=True)]
    return (
        np.pad(image, [*missing, (0, 0)], constant_values=GRAY),
        np.pad(labels, missing, constant_values=ignore_index),
    )


# ---------------------------------------------------------------------------------- training

LOOKS = 6  # at the validation split, evenly


def make(run: Run, data: Dataset, backbone: nn.Module) -> tuple[Network, CrossEntropy]:
    """Network and loss as a run starts."""
    setting = SETTINGS[run.data]
    channels = len(data.classes) if setting.thin is None else 1
    facts = Facts(channels, setting.ignore_index, 1, [labels for _, labels in data.train])
    options = {"rates": setting.rates} if run.loss == "ce+dilated" else dict(run.options)
    criterion = LOSSES[run.loss](facts, run.weight, **options)
    torch.manual_seed(run.seed)
    network = Network(backbone, channels, criterion.neighbors, trained=True)
    return network.to(memory_format=torch.channels_last), criterion


def enlarged(output: Output, size: tuple[int, int]) -> Output:
    """The network's output at the resolution of the image."""
    logits, affinity = (
        None if x is None else F.interpolate(x, size, mode="bilinear")
        for x in (output.logits, output.affinity)
    )
    return output._replace(logits=logits, affinity=affinity)


def make_optimizer(
    network: Network, run: Run, more_groups: Sequence[dict[str, Any]] = ()
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW, and the scheduler of its rate. The backbone, pretrained, learns at a tenth of it."""
    rate = run.learning_rate
    new = [p for name, p in network.named_parameters() if not name.startswith("backbone.")]
    groups = [{"params": new}, {"params": network.backbone.parameters(), "lr": rate / 10}]
    optimizer = torch.optim.AdamW([*groups, *more_groups], rate, weight_decay=1e-4)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: (1 - step / run.steps) ** 0.9
    )


def train(run: Run, data: Dataset, backbone: nn.Module) -> tuple[dict[str, Any], Network]:
    """Trains a network: the content of the run's file, and the network."""
    network, criterion = make(run, data, backbone)
    optimizer, poly = make_optimizer(network, run, criterion.optimizer_groups(run.learning_rate))
    source, losses, seconds, looks = batches(data.train, run), [], [], []
    network.train()
    for step in range(run.steps):
        images, batch = next(source)
        before = time.process_time()  # the machine may be shared
        output = enlarged(network(images), (CROP, CROP))
        loss = criterion(output, batch, torch.tensor(step / run.steps))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seconds.append(time.process_time() - before)
        losses.append(loss.item())
        poly.step()
        if (step + 1) * LOOKS // run.steps > step * LOOKS // run.steps:
            looks.append({"step": step + 1, **look(run, network, data)})
            print(run.name, looks[-1], f"{statistics.median(seconds):.2f} s a step", flush=True)
    parts = max(run.steps // 20, 1)
    result = {
        "run": asdict(run),
        "curve": [
            round(statistics.mean(losses[k : k + parts]), 4) for k in range(0, len(losses), parts)
        ],
        "looks": looks,
        "step_cpu_ms": round(1000 * statistics.median(seconds), 1),
        "machine": {
            "device": describe(torch.device("cpu")),
            "torch": torch.__version__,
            "tritonaff": __version__,
        },
    }
    if run.loss == "ce+aaf":
        result["edge_weight"] = criterion.field.edge_weight.detach().numpy().round(4).tolist()
    return result, network


# -------------------------------------------------------------------------------- evaluation

TOLERANCES = 1, 2, 3  # of boundaries, pixels
ITERATIONS = 1, 3, 10  # of propagation


@torch.inference_mode()
def outputs(
    network: Network, pairs: Sequence[Pair], ignore_index: int
) -> Iterator[tuple[Output, Tensor]]:
    """The network's output for each image, at its resolution, and the labels (1, H, W)."""
    network.eval()
    for image, labels in pairs:
        height, width = labels.shape
        size = height + -height % MULTIPLE, width + -width % MULTIPLE
        image, _ = padded(image, labels, size, ignore_index)
        output = enlarged(network(torch.from_numpy(image[None])), size)
        logits, affinity = (
            None if x is None else x[..., :height, :width] for x in (output.logits, output.affinity)
        )
        yield output._replace(logits=logits, affinity=affinity), torch.from_numpy(labels[None])
    network.train()


def probabilities(logits: Tensor) -> Tensor:
    """(N, C, H, W): of one channel, no and yes."""
    if logits.shape[1] > 1:
        return logits.softmax(dim=1)
    return torch.cat(((-logits).sigmoid(), logits.sigmoid()), dim=1)


def look(run: Run, network: Network, data: Dataset) -> dict[str, float]:
    """Mean IoU and cross-entropy, the mean over pixels, of the validation split."""
    setting, count = SETTINGS[run.data], len(data.classes)
    table, total = torch.zeros(count, count, dtype=torch.int64), 0.0
    for output, labels in outputs(network, data.val[:: setting.every], setting.ignore_index):
        prediction = probabilities(output.logits).argmax(dim=1)
        table += confusion(prediction, labels.numpy(), count, setting.ignore_index)
        total += log_loss(output.logits, labels.long(), setting.ignore_index).sum().item()
    loss = total / max(table.sum().item(), 1)
    return {"miou": round(mean_iou(table).item(), 5), "cross_entropy": round(loss, 5)}


class Score:
    """All metrics of a split."""

    def __init__(self, setting: Setting, num_classes: int) -> None:
        self.setting, self.num_classes = setting, num_classes
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        self.boundary = [BoundaryScore(num_classes, t, setting.ignore_index) for t in TOLERANCES]
        self.thin = None
        if setting.thin is not None:
            self.thin = ThinScore(setting.ignore_index, setting.cells, setting.thresholds)

    def update(self, probs: Tensor, labels: Tensor) -> None:
        """Adds probabilities (1, C, H, W) and labels (1, H, W)."""
        prediction = probs.argmax(dim=1)
        table = confusion(prediction, labels.numpy(), self.num_classes, self.setting.ignore_index)
        self.confusion += table
        for boundary in self.boundary:
            boundary.update(prediction, labels)
        if self.thin is not None:
            self.thin.update(probs[0, 1].numpy(), labels[0].numpy())

    def compute(self) -> dict[str, Any]:
        scores: dict[str, Any] = {"confusion": self.confusion.tolist()}
        for tolerance, boundary in zip(TOLERANCES, self.boundary, strict=True):
            _, recall, f = boundary.by_class()
            scores[f"boundary_recall_{tolerance}"] = rounded(recall)
            scores[f"boundary_f_{tolerance}"] = rounded(f)
        if self.thin is not None:
            scores["thin"] = self.thin.compute()
        return scores


def score(run: Run, network: Network, data: Dataset) -> dict[str, Any]:
    """Metrics of the test split; where there is a threshold to choose, of the validation split too;
    with a head for dilated affinity, also after propagation.
    """
    setting, count = SETTINGS[run.data], len(data.classes)
    splits = {"test": data.test} | ({} if setting.thin is None else {"val": data.val})
    head, result = network.affinity, {}
    accuracy = None if head is None else AffinityAccuracy(head.rates, setting.ignore_index)
    for split, pairs in splits.items():
        done = (0,) if head is None else (0, *ITERATIONS)
        scores = {iterations: Score(setting, count) for iterations in done}
        for output, labels in outputs(network, pairs, setting.ignore_index):
            probs = probabilities(output.logits)
            scores[0].update(probs, labels)
            for before, after in pairwise(done):
                probs = affinity_propagation(
                    probs, output.affinity, head.rates, iterations=after - before
                )
                scores[after].update(probs, labels)
            if accuracy is not None and split == "test":
                accuracy.update(output.affinity, labels)
        result[split] = scores[0].compute()
        for iterations in done[1:]:
            result[f"{split}_{iterations}"] = scores[iterations].compute()
    if accuracy is not None:
        result["affinity_accuracy"] = rounded(accuracy.by_category())
    return result


# ------------------------------------------------------------------------------ command line


def finished(output: Path, collected: Path) -> Results:
    """The runs that ``collect`` wrote earlier, and the runs' files."""
    runs = json.loads(collected.read_text())["runs"] if collected.exists() else []
    files = {path.stem: json.loads(path.read_text()) for path in output.glob("*.json")}
    return dict(sorted(({Run.read(run["run"]).name: run for run in runs} | files).items()))


def train_missing(folders: dict[str, Path], output: Path, collected: Path) -> None:
    """Trains, scores and writes one run after the other until none is missing."""
    output.mkdir(parents=True, exist_ok=True)
    sets: dict[str, Dataset] = {}
    backbone = EfficientNetLite0()
    while True:
        results = finished(output, collected)
        missing = [run for run in plan(list(folders), results) if run.name not in results]
        if not missing:
            return
        run = missing[0]
        if run.data not in sets:
            sets[run.data] = load(folders[run.data], SETTINGS[run.data])
        print(f"{len(results)} runs done, {len(missing)} known to be missing", flush=True)
        result, network = train(run, sets[run.data], backbone)
        torch.save(network.state_dict(), output / f"{run.name}.pt")
        result |= score(run, network, sets[run.data])
        write_json(output / f"{run.name}.json", result)  # says that the run is complete


def trained(run: Run, data: Dataset, backbone: nn.Module, output: Path) -> Network:
    """The network of a run that left its weights."""
    network, _ = make(run, data, backbone)
    network.load_state_dict(torch.load(output / f"{run.name}.pt"))
    return network


def score_again(folders: dict[str, Path], output: Path, collected: Path) -> None:
    """Scores the networks that are here once more, after a change of the metrics."""
    backbone = EfficientNetLite0()
    for name, folder in folders.items():
        data = load(folder, SETTINGS[name])
        for key, result in finished(output, collected).items():
            run = Run.read(result["run"])
            if run.data == name and (output / f"{key}.pt").exists():
                print(key, flush=True)
                again = result | score(run, trained(run, data, backbone, output), data)
                write_json(output / f"{key}.json", again)


def draw(folders: dict[str, Path], output: Path, collected: Path) -> None:
    """For every loss whose network of the first seed is here, the images in which it fails most."""
    results, backbone = finished(output, collected), EfficientNetLite0()
    for name, folder in folders.items():
        setting, data, maps = SETTINGS[name], load(folder, SETTINGS[name]), {}
        base = chosen_base(name, results)
        for run in with_losses(base, WEIGHTS) if base else ():
            if run.seed or not (output / f"{run.name}.pt").exists():
                continue
            network = trained(run, data, backbone, output)
            pairs = outputs(network, data.test, setting.ignore_index)
            maps[run.loss] = [probabilities(output.logits).argmax(dim=1)[0] for output, _ in pairs]
        others = sorted(maps.keys() - {"ce"})
        if "ce" not in maps or not others:
            print(f"{name}: no networks of cross-entropy and of another loss, seed 0, in {output}")
            continue
        for loss in others:
            titles = TITLES["ce"], TITLES[loss]
            path = output / f"failures-{name}-{loss}.png"
            both = list(zip(maps["ce"], maps[loss], strict=True))
            draw_failures(path, data, setting.ignore_index, titles, both)
            print(path)


def collect(output: Path, path: Path) -> None:
    """One file for the report."""
    results = finished(output, path)
    write_json(path, {"runs": list(results.values())})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train and score every run that is missing")
    drawing = commands.add_parser("pictures", help="draw where each loss fails, beside the runs")
    scoring = commands.add_parser("score", help="score the networks that are here once more")
    for one in (training, scoring, drawing):
        for name in SETTINGS:
            one.add_argument(f"--{name}", type=Path, metavar="FOLDER", help="a data set")
    other = commands.add_parser("collect", help="write finetune.json for the report")
    for one in (training, scoring, drawing, other):
        one.add_argument("--output", type=Path, default=Path("runs/finetune"), metavar="FOLDER")
        one.add_argument("--results", type=Path, default=Path("docs/results/study/finetune.json"))
    options = parser.parse_args()
    try:
        if options.command == "collect":
            collect(options.output, options.results)
            return 0
        paths = {name: getattr(options, name) for name in SETTINGS}
        folders = {name: path for name, path in paths.items() if path is not None}
        acts = {"train": train_missing, "score": score_again, "pictures": draw}
        acts[options.command](folders, options.output, options.results)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
