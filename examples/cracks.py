"""Finds cracks, or other thin things, by a network of one channel: compares losses over seeds.

    python examples/cracks.py FOLDER     # two classes, laid out as train.py --help says

The affinity field costs nothing when the network is used. Both losses get the same initial weights,
the same batches in the same order and the same number of steps; the threshold of the probability
is the best of each training on the validation images. A training that has ended is kept in a file,
and a later call goes on with the next one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from itertools import islice
from pathlib import Path
from typing import NamedTuple

# The default, milliseconds of spinning, can stall a step for seconds on cores in use by others.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
from dataset import DataError, Dataset, Pair, load_folder, random_crops
from evaluation import confusion, mean_iou
from network import SmallUNet, to_input
from rich.console import Console
from rich.table import Table, box
from torch import Tensor, nn
from torch.nn import functional as F
from train import rate, whole

from tritonaff import AffinityFieldLoss
from tritonaff.files import check_writable, replacing

TOLERANCE = 2  # pixels
THRESHOLDS = [k / 20 for k in range(1, 20)]

# ------------------------------------------------------------------------------------ losses


class CrossEntropy(nn.Module):
    """Binary cross-entropy over the pixels that count."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__()
        self.ignore_index = options.ignore_index
        self.register_buffer("pos_weight", torch.tensor([options.pos_weight]))

    def forward(self, logits: Tensor, target: Tensor, progress: Tensor) -> Tensor:
        counted = (target != self.ignore_index)[:, None]
        label = (target == 1)[:, None].float()
        loss = F.binary_cross_entropy_with_logits(
            logits, label, counted.float(), reduction="sum", pos_weight=self.pos_weight
        )
        return loss / counted.sum().clamp(min=1)


class CrossEntropyField(nn.Module):
    """The same plus an affinity field, in one operation."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__()
        self.loss = AffinityFieldLoss(
            options.kernel_sizes,
            activation="sigmoid",
            cross_entropy=True,
            pos_weight=[options.pos_weight],
            ignore_index=options.ignore_index,
        )

    def forward(self, logits: Tensor, target: Tensor, progress: Tensor) -> Tensor:
        return self.loss(logits, target, progress)


LOSSES = {
    "bce": ("cross-entropy", CrossEntropy),
    "bce+field": ("cross-entropy + field", CrossEntropyField),
}

# -------------------------------------------------------------------------- training, scores


class Scores(NamedTuple):
    precision: float  # predicted pixels near a true one
    recall: float  # true pixels near a predicted one
    f1: float
    miou: float  # over both classes, without tolerance


def train(loss: str, seed: int, data: Dataset, options: argparse.Namespace) -> nn.Module:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    criterion = LOSSES[loss][1](options).to(device)
    torch.manual_seed(seed)
    network = SmallUNet(1, widths=(8, 16, 32, 48)).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), options.learning_rate)
    steps = options.steps
    poly = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 - step / steps) ** 0.9)
    crops = random_crops(data.train, argparse.Namespace(**{**vars(options), "seed": seed}))
    for step, (images, target) in enumerate(islice(crops, steps)):
        logits = network(to_input(images, device)).logits
        progress = torch.tensor(step / steps, device=device)
        value = criterion(logits, target.to(device, torch.int64), progress)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        poly.step()
        if (step + 1) * 4 // steps > step * 4 // steps:
            print(f"{LOSSES[loss][0]}, seed {seed}: step {step + 1}/{steps}", flush=True)
    return network.eval()


def evaluate(network: nn.Module, data: Dataset, ignore_index: int) -> dict[str, object]:
    """The threshold that is best on the validation images, and the scores of all images with it."""
    val = probabilities(network, data.val)
    by_threshold = {t: score(val, data.val, t, ignore_index) for t in THRESHOLDS}
    best = max(THRESHOLDS, key=lambda t: (by_threshold[t].f1, by_threshold[t].miou))
    test = score(probabilities(network, data.test), data.test, best, ignore_index)
    return {"threshold": best, "val": by_threshold[best]._asdict(), "test": test._asdict()}


@torch.inference_mode()
def probabilities(network: nn.Module, pairs: list[Pair]) -> list[Tensor]:
    """The probability (H, W) of class 1 in every image, on the CPU."""
    device = next(network.parameters()).device
    inputs = (to_input(torch.from_numpy(image[None]), device) for image, _ in pairs)
    return [network(x).logits[0, 0].float().sigmoid().cpu() for x in inputs]


def score(probs: list[Tensor], pairs: list[Pair], threshold: float, ignore_index: int) -> Scores:
    """Scores over the pixels of all images together."""
    table = torch.zeros(2, 2, dtype=torch.int64)
    near_true = near_predicted = 0
    for prob, (_, labels) in zip(probs, pairs, strict=True):
        truth = torch.from_numpy(labels)
        predicted, true = (prob > threshold) & (truth != ignore_index), truth == 1
        near_true += int((predicted & near(true)).sum())
        near_predicted += int((true & near(predicted)).sum())
        table += confusion(predicted.long(), labels, 2, ignore_index)
    precision = near_true / max(int(table[:, 1].sum()), 1)
    recall = near_predicted / max(int(table[1].sum()), 1)
    f1 = 2 * precision * recall / max(precision + recall, 1e-9)
    return Scores(precision, recall, f1, mean_iou(table).item())


def near(mask: Tensor) -> Tensor:
    """The pixels at most TOLERANCE rows and columns from a pixel of the mask (H, W)."""
    size = 2 * TOLERANCE + 1
    return F.max_pool2d(mask[None].float(), size, stride=1, padding=TOLERANCE)[0] > 0


# ------------------------------------------------------------------------------ command line


def main() -> int:
    options = parse_arguments()
    try:
        run(options)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the next call goes on with the training cut short", file=sys.stderr)
        return 130
    return 0


def run(options: argparse.Namespace) -> None:
    try:
        for loss in options.loss:
            LOSSES[loss][1](options)
    except ValueError as error:
        raise DataError(str(error)) from error
    data = load_folder(options.data, options.ignore_index)
    if len(data.classes) != 2:
        raise DataError(f"expected two classes, background first, got {len(data.classes)}")
    check_writable(options.output)
    ended = read_trainings(options.output)
    asked = ("pos_weight", "kernel_sizes", "steps", "batch_size", "size", "learning_rate")
    settings = {"data": data.name, **{name: getattr(options, name) for name in asked}}
    chosen = []
    for seed in range(options.seeds):
        for loss in options.loss:
            key = {"loss": loss, "seed": seed, **settings}
            row = next((row for row in ended if key.items() <= row.items()), None)
            if row is None:
                network = train(loss, seed, data, options)
                row = {**key, **evaluate(network, data, options.ignore_index)}
                ended.append(row)
                with replacing(options.output) as new:
                    new.write_text("".join(f"{json.dumps(row)}\n" for row in ended))
            chosen.append(row)

    console = Console()
    table = Table("test images", box=box.ROUNDED if console.is_terminal else box.ASCII)
    for heading in ("F1", "mIoU"):
        table.add_column(f"{heading} (least to most)", justify="right")
    for loss in options.loss:
        of_loss = [row["test"] for row in chosen if row["loss"] == loss]
        cells = [spread([scores[name] for scores in of_loss]) for name in ("f1", "miou")]
        table.add_row(LOSSES[loss][0], *cells)
    console.print(table)
    print(f"means of {options.seeds} seeds; all trainings: {options.output}")


def read_trainings(path: Path) -> list[dict]:
    """The rows of an earlier call, one for each training that has ended."""
    lines = path.read_text().splitlines() if path.exists() else []
    try:
        return [dict(json.loads(line)) for line in lines]
    except ValueError as error:
        raise DataError(f"{path} is no file of trainings: choose another --output") from error


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.description, add = __doc__.splitlines()[0], parser.add_argument
    # fmt: off
    add("data", type=Path, metavar="FOLDER", help="a data set as train.py --help describes; "
        "class 1 is the thin thing")
    add("--ignore-index", type=whole(2, 255), default=255, help="label of pixels that never count")
    add("--loss", nargs="+", choices=LOSSES, default=list(LOSSES), help="losses to train with")
    add("--pos-weight", type=rate, default=1.0, help="weight of class 1 in cross-entropy")
    add("--kernel-sizes", type=whole(3), nargs="+", default=[3], help="of the affinity field")
    add("--seeds", type=whole(1), default=3, help="number of trainings of each loss")
    add("--steps", type=whole(1), default=1500, help="of each training")
    add("--batch-size", type=whole(1), default=8, help="crops in a batch")
    add("--size", type=whole(1), nargs=2, default=[128, 160], metavar=("H", "W"), help="of a crop")
    add("--learning-rate", type=rate, default=3e-3, help="at the first step")
    add("--output", type=Path, default=Path("runs/cracks.jsonl"), help="file of the trainings")
    # fmt: on
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
