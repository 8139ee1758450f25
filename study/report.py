"""The report of the study, docs/study.md with its plots, from the JSON files of its results.

The report computes from these files everything that depends on a result: every number, and every
verdict on a loss.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib
import numpy as np
import torch
from losses import TITLES
from matplotlib.figure import Figure

from tritonaff.plotting import plot_affinity

Scores = dict[str, Any]  # metrics of one split, from study.py
Rows = dict[str, list[Scores]]  # by loss, a value for each seed

THIN = "pole", "sign_symbol", "fence", "pedestrian", "bicyclist", "membrane"
PROPAGATED = "ce+dilated, propagated"
NAMES = TITLES | {PROPAGATED: "+ dilated, then 10 iterations"}

# ----------------------------------------------------------------------------------- metrics


def iou(scores: Scores) -> np.ndarray:
    """(C,) percent; NaN for a class in neither labels nor predictions."""
    table = np.array(scores["confusion"], float)
    hits = np.diag(table)
    with np.errstate(invalid="ignore"):
        return 100 * hits / (table.sum(axis=0) + table.sum(axis=1) - hits)


def by_class(key: str) -> Callable[[Scores], np.ndarray]:
    return lambda scores: 100 * np.array(scores[key], float)  # None becomes NaN


def mean(values: Callable[[Scores], np.ndarray]) -> Callable[[Scores], float]:
    return lambda scores: float(np.nanmean(values(scores)))


def pixel_accuracy(scores: Scores) -> float:
    table = np.array(scores["confusion"], float)
    return float(100 * np.trace(table) / table.sum())


Metric = Callable[[Scores], float]
METRICS: dict[str, Metric] = {
    "mIoU": mean(iou),
    "instance-wise mIoU": mean(by_class("instance_iou")),
    "boundary F": mean(by_class("boundary_f")),
    "boundary precision": mean(by_class("boundary_precision")),
    "boundary recall": mean(by_class("boundary_recall")),
    "pixel accuracy": pixel_accuracy,
}


def class_metrics(classes: Sequence[str], chosen: Sequence[str]) -> dict[str, Metric]:
    """IoU of some classes."""
    return {
        name: (lambda scores, k=k: float(iou(scores)[k]))
        for k, name in enumerate(classes)
        if name in chosen
    }


# ------------------------------------------------------------------------------- differences


def differs(values: Sequence[float], others: Sequence[float]) -> bool:
    """True if the mean difference of the seeds exceeds the spread over seeds: the larger of the two
    ranges. One seed has no spread: nothing is then called a difference.
    """
    if min(len(values), len(others)) < 2:
        return False
    spread = max(np.ptp(values), np.ptp(others))
    return bool(abs(np.mean(values) - np.mean(others)) > spread)


def value_cell(values: Sequence[float]) -> str:
    """Mean, and over several seeds the smallest and the largest."""
    text = f"{np.mean(values):.1f}"
    return text if len(values) < 2 else f"{text} ({min(values):.1f} to {max(values):.1f})"


def difference_cell(values: Sequence[float], others: Sequence[float]) -> str:
    """Mean of the paired differences, bold where it counts as one, and each seed's difference."""
    each = [value - other for value, other in zip(values, others, strict=True)]
    text = f"{np.mean(each):+.1f}"
    text = f"**{text}**" if differs(values, others) else text
    return text if len(each) < 2 else f"{text} ({', '.join(f'{x:+.1f}' for x in each)})"


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def value_table(rows: Rows, metrics: dict[str, Metric]) -> str:
    return table(
        ["loss", *metrics],
        [
            [NAMES.get(loss, loss), *(value_cell([m(s) for s in seeds]) for m in metrics.values())]
            for loss, seeds in rows.items()
        ],
    )


def short_cell(values: Sequence[float], others: Sequence[float]) -> str:
    """Mean difference alone."""
    return difference_cell(values, others).split(" ")[0]


def difference_table(
    rows: Rows,
    metrics: dict[str, Metric],
    base: str = "ce",
    cell: Callable[[Sequence[float], Sequence[float]], str] = difference_cell,
) -> str:
    return table(
        [f"minus {NAMES.get(base, base)}", *metrics],
        [
            [
                NAMES.get(loss, loss),
                *(
                    cell([m(s) for s in seeds], [m(s) for s in rows[base]])
                    for m in metrics.values()
                ),
            ]
            for loss, seeds in rows.items()
            if loss != base
        ],
    )


def verdict(rows: Rows, loss: str, metrics: dict[str, Metric], base: str = "ce") -> str:
    """Names, in words, the metrics in which a loss differs."""
    found: dict[str, list[str]] = {"raises": [], "lowers": []}
    for title, metric in metrics.items():
        values, others = ([metric(scores) for scores in rows[name]] for name in (loss, base))
        change = np.mean(values) - np.mean(others)
        # A difference of 0.0 in the tables is not worth a word.
        if differs(values, others) and abs(change) >= 0.05:
            word = "raises" if change > 0 else "lowers"
            found[word].append(f"{title} by {abs(change):.1f}")
    words = [f"{word} {listed(changes)}" for word, changes in found.items() if changes]
    return " and ".join(words) if words else "makes no difference above the spread over seeds"


def listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


# -------------------------------------------------------------------------------- the report


class Report:
    """The page as a list of paragraphs, and the pictures beside it."""

    def __init__(self, results: Path, docs: Path) -> None:
        self.study = json.loads((results / "study.json").read_text())
        cost = results / "cost.json"
        self.cost = json.loads(cost.read_text()) if cost.exists() else None
        self.docs, self.parts = docs, []
        self.docs.mkdir(parents=True, exist_ok=True)

    def write(self) -> Path:
        self.opening()
        for data in self.study["data"]:
            if self.named(data):
                self.comparison(data)
        self.published()
        self.step_cost()
        self.regression()
        self.propagation()
        self.sizes()
        self.dilated()
        self.transfer()
        self.resolution()
        self.failures()
        self.settings()
        path = self.docs / "study.md"
        path.write_text("\n\n".join(self.parts) + "\n")
        return path

    def say(self, *parts: str) -> None:
        """Adds paragraphs; a paragraph of one line is wrapped."""
        for part in parts:
            wrap = "\n" not in part and not part.startswith(("#", "!", "|"))
            self.parts.append(fill(part, 100, break_on_hyphens=False) if wrap else part)

    def named(self, name: str) -> list[dict[str, Any]]:
        """The runs of a table that are scored."""
        runs = (self.study["runs"][run] for run in self.study["tables"].get(name, ()))
        return [run for run in runs if "scores" in run]

    def rows(self, name: str, label: Callable[[dict[str, Any]], str] | None = None) -> Rows:
        """Scores by loss, or by the ``label`` of a run, with the seeds that all losses have."""
        rows: dict[str, dict[int, Scores]] = {}
        for result in self.named(name):
            run, scores = result["run"], result["scores"]
            rows.setdefault(label(run) if label else run["loss"], {})[run["seed"]] = scores["test"]
            if "propagated" in scores:
                rows.setdefault(PROPAGATED, {})[run["seed"]] = scores["propagated"]
        seeds = set.intersection(*(set(by_seed) for by_seed in rows.values())) if rows else set()
        return {
            loss: [by_seed[seed] for seed in sorted(seeds)]
            for loss, by_seed in rows.items()
            if seeds
        }

    def picture(self, name: str, text: str) -> Path:
        self.say(f"![{text}](study-{name}.png)")
        return self.docs / f"study-{name}.png"

    # The sections.

    def opening(self) -> None:
        runs = [run["run"] for data in self.study["data"] for run in self.named(data)]
        seeds = len({run["seed"] for run in runs})
        self.say(
            "# Does it help? A controlled study",
            "The same small network, trained on real images with each loss: the same initial "
            "weights, the same batches in the same order, the same number of steps, with "
            f"{seeds} seeds. `study/study.py report` writes everything on this page, verdicts "
            "included, from [the results](results/study/study.json).",
            "**How to read it.** Numbers are percent, of the test split if nothing else is said: "
            "the mean over seeds and, in brackets, the smallest and the largest. Tables "
            "of differences subtract cross-entropy with the same seed: the mean and, in brackets, "
            "each seed's difference. This page calls a change a difference, and prints the mean "
            "bold, only where the mean exceeds the spread over seeds: the larger range of the two, "
            "this loss's and cross-entropy's. With three seeds, normally spread, and no effect, "
            "the mean would still exceed the spread one time in twenty, and there are many cells "
            "below: do not rely on a single cell. One seed allows no judgement at all.",
        )
        lines = []
        for data in self.study["data"]:
            rows = self.rows(data)
            for loss in rows:
                if loss != "ce":
                    said = verdict(rows, loss, METRICS)
                    line = f"- {TITLE[data]}, {NAMES[loss]}: {said}."
                    lines.append(fill(line, 100, subsequent_indent="  "))
        if lines:
            self.say("**In short**, against cross-entropy alone:", "\n".join(lines))

    def comparison(self, data: str) -> None:
        rows, facts = self.rows(data), self.study["data"][data]
        if not rows:
            return
        images = facts["images"]
        self.say(
            f"## {TITLE[data]}",
            f"{images['train']} training, {images['val']} validation and {images['test']} test "
            f"images of {facts['width']}x{facts['height']}, {len(facts['classes'])} classes. "
            f"Boundary scores have a tolerance of {self.study['tolerance']} pixel; an instance "
            "is a connected part of a class, as the labels tell no instances apart.",
        )
        metrics = {k: v for k, v in METRICS.items() if not k.startswith("boundary ")}
        boundary = {k: v for k, v in METRICS.items() if k.startswith("boundary ")}
        main = metrics | {"boundary F": METRICS["boundary F"]}
        self.say(value_table(rows, main), difference_table(rows, main))
        drawn = {loss: seeds for loss, seeds in rows.items() if loss != PROPAGATED}
        draw_differences(drawn, main, self.picture(data, f"Differences to cross-entropy, {data}"))
        self.say(
            "A dot is a seed, a bar their mean; the gray band is as wide on each side as the range "
            "of cross-entropy over seeds: a bar within the band is no difference. Propagation is "
            "left out, because its bars would set the scale."
        )
        val: dict[str, list[float]] = {}
        for result in self.named(data):
            miou = 100 * result["val"][-1]["miou"]
            val.setdefault(NAMES[result["run"]["loss"]], []).append(miou)
        words = "; ".join(f"{name} {value_cell(values)}" for name, values in val.items())
        self.say(f"mIoU on the validation split, at the logits' resolution: {words}.")
        self.say("Boundaries:", difference_table(rows, boundary))
        thin = class_metrics(facts["classes"], THIN)
        self.say("IoU of thin classes:", value_table(rows, thin))
        every = class_metrics(facts["classes"], facts["classes"])
        self.say(
            "IoU of every class, mean difference:", difference_table(rows, every, cell=short_cell)
        )
        self.choices(data)

    def choices(self, data: str) -> None:
        """The candidates for the weights, and their results on the validation split."""
        runs = [
            self.study["runs"][name] for name in self.study["tables"].get(f"{data} weights", ())
        ]
        if not runs:
            return
        trials: dict[str, list[tuple[float, float]]] = {}
        for result in runs:
            pair = result["run"]["weight"], 100 * result["val"][-1]["miou"]
            trials.setdefault(result["run"]["loss"], []).append(pair)
        rows = []
        for loss, pairs in trials.items():
            best = max(pairs, key=lambda pair: pair[1])
            cells = [f"{w:g}: {v:.1f}" for w, v in pairs]
            rows.append([NAMES[loss], f"{best[0]:g}", ", ".join(cells)])
        rate = runs[0]["run"]["learning_rate"]
        steps = runs[0]["run"]["steps"]
        self.say(
            f"Chosen on the validation split, with one seed and {steps} steps: for all losses the "
            f"learning rate at which cross-entropy does best, {rate:g}, then the weight of each. "
            "Most of these mIoUs are closer together than two seeds are; the weights are a fair "
            "try, not the best ones.",
            table(["loss", "weight", "mIoU on validation by weight"], rows),
        )

    def published(self) -> None:
        rows = self.rows("published")
        if len(rows) > 1:
            runs = {run["run"]["loss"]: run["run"] for run in self.named("published")}
            words = [f'"{NAMES[k]}" {run["weight"]:g}' for k, run in runs.items() if k != "ce"]
            self.say(
                "## With the papers' own weights",
                f"CamVid, as above, but for the weights: {', '.join(words)}.",
                value_table(rows, SHORT),
                difference_table(rows, SHORT),
            )

    def step_cost(self) -> None:
        if self.cost is None:
            return
        base = self.cost["losses"]["ce"]
        rows = [
            [
                NAMES[loss],
                f"{one['ms']:.0f}",
                f"{one['ms'] / base['ms']:.2f}",
                f"{one['peak_bytes'] / 1e6:.0f}",
                f"{one['peak_bytes'] / base['peak_bytes']:.2f}",
            ]
            for loss, one in self.cost["losses"].items()
        ]
        facts = self.cost["machine"]
        self.say(
            "## Cost of a step",
            f"Forward, backward and optimiser of the decoder, batch {self.cost['batch_size']}, "
            f"on {facts['device']}, {'compiled' if facts['compiled'] else 'eager'}: median, all "
            "losses in turn. Memory is the most that the step held beyond weights, optimiser and "
            "batch. The decoder is small: with a backbone that is trained too, the same loss is a "
            "smaller part.",
            table(["loss", "ms", "of cross-entropy", "peak memory (MB)", "of cross-entropy"], rows),
        )

    def regression(self) -> None:
        parts = []
        for data in self.study["data"]:
            runs = {}
            for result in self.named(data):
                runs.setdefault(result["run"]["loss"], []).append(result)
            if "ce" not in runs or "ce+ar" not in runs:
                continue
            rows = []
            for loss in ("ce", "ce+ar"):
                before, after = (
                    np.array([run["val"][k]["ar"] for run in runs[loss]]) for k in (-2, -1)
                )
                rows.append(
                    [
                        f"{TITLE[data]}, {NAMES[loss]}",
                        f"{before.mean():.4f}",
                        f"{after.mean():.4f} ({after.min():.4f} to {after.max():.4f})",
                        f"{100 * (after / before - 1).mean():+.0f} %",
                    ]
                )
            parts += rows
            if data == "camvid":
                pair = [runs[loss][0]["scores"]["affinity"] for loss in ("ce", "ce+ar")]
        if not parts:
            return
        self.say(
            "## Affinity regression before and after",
            "The AR loss on the validation split after two thirds of the steps, when `ce+ar` "
            "adds the loss, and at the end. Up to two thirds, both rows are one training. The "
            "paper fine-tunes from the peak of cross-entropy and reports 0.187 before, 0.165 after "
            "(-12 %); the paper does not report further training with cross-entropy alone, the "
            "other row.",
            table(["", "before", "after", "change"], parts),
        )
        if "camvid" in self.study["data"]:
            matrices = {
                "label affinity": pair[0]["true"],
                "cross-entropy": pair[0]["predicted"],
                "+ affinity regression": pair[1]["predicted"],
            }
            self.say(
                "Mean over CamVid's test images of the affinity matrices of 6 x 6 points, row by "
                "row from the upper left, with the first seed:"
            )
            plot_affinity(
                {k: torch.tensor(np.array(v, float)) for k, v in matrices.items()},
                self.picture("affinity", "Mean affinity of the labels and of two networks"),
            )

    def propagation(self) -> None:
        lines = []
        for data in self.study["data"]:
            tables = [
                100 * np.array(result["scores"]["propagation"])
                for result in self.named(data)
                if "propagation" in result["scores"]
            ]
            if tables:
                for k, name in enumerate(("predicted", "ground-truth")):
                    cells = np.stack(tables)[:, k]
                    lines.append(
                        [
                            f"{TITLE[data]}, {name} affinity",
                            *(value_cell(column) for column in cells.T.tolist()),
                        ]
                    )
        if lines:
            count = len(lines[0]) - 1
            self.say(
                "## Propagation",
                "mIoU after some iterations at the logits' resolution, along the affinity that the "
                "head predicts and along the affinity of the labels, as Tables 3 and 4 of the "
                "paper:",
                table(["iterations", *map(str, ITERATIONS[:count])], lines),
            )

    def sizes(self) -> None:
        runs = [run for run in self.named("camvid") if run["run"]["loss"] == "ce+aaf"]
        if runs:
            self.say(
                "## Sizes of affinity fields",
                "The learned weights of the edge term, by class, mean over seeds; the weights "
                "start at 1/3 each (Fig. 4 left of the paper).",
            )
            weights = np.mean([run["edge_weight"] for run in runs], axis=0)
            classes = self.study["data"]["camvid"]["classes"]
            text = "Learned weights of the sizes 3, 5 and 7 by class"
            draw_sizes(weights, (3, 5, 7), classes, self.picture("sizes", text))
        rows = self.rows("sizes", sizes_of)
        if len(rows) > 1:
            runs = [run["run"] for run in self.named("sizes")]
            weight = next(run["weight"] for run in runs if run["loss"] == "ce+aaf")
            self.say(
                f"Combinations of sizes on CamVid, {runs[0]['steps']} steps, all with the weight "
                f"{weight:g} (Table 10). The size 3 alone has nothing to adapt: this row is the "
                "affinity loss with the same weight.",
                value_table(rows, SHORT),
                difference_table(rows, SHORT),
            )

    def dilated(self) -> None:
        weightings = self.named("weightings")
        if weightings:
            lines = []
            for result in weightings:
                run, scores = result["run"], result["scores"]
                name, beta, cells = NAMES["ce"], "", ["", ""]
                if run["loss"] != "ce":
                    name, beta = option(run, "weighting", "sqrt"), f"{run['weight']:g}"
                    accuracy = 100 * np.array(scores["affinity_accuracy"], float)
                    cells = [f"{np.nanmean(x):.1f}" for x in (accuracy[:, :5], accuracy[:, 5:])]
                values = [f"{metric(scores['test']):.1f}" for metric in SHORT.values()]
                lines.append([name, beta, *values, *cells])
            self.say(
                "## Weighting and rates of dilated affinity",
                f"CamVid, one seed, {weightings[0]['run']['steps']} steps (Table 1): these rows "
                "show no more than a tendency. Accuracy is the accuracy of the affinity signals, "
                "mean over rates and categories.",
                table(["weighting", "β", *SHORT, "accuracy n0-n4", "accuracy n5-n8"], lines),
            )
        rates = self.named("rates")
        if rates:
            lines = []
            for result in rates:
                run, scores = result["run"], result["scores"]
                names = [
                    str(r).replace("[", "(").replace("]", ")")
                    for r in option(run, "rates", (8, 16))
                ]
                values = [f"{metric(scores['test']):.1f}" for metric in SHORT.values()]
                propagated = f"{METRICS['mIoU'](scores['propagated']):.1f}"
                lines.append(["{" + ", ".join(names) + "}", *values, propagated])
            self.say(
                f'Rates, in pixels of the image, "sqrt", β = {rates[0]["run"]["weight"]:g} '
                "(Table 2):",
                table(["rates", *SHORT, "mIoU, propagated"], lines),
            )

    def transfer(self) -> None:
        rows = self.rows("transfer")
        if rows:
            steps = self.named("transfer")[0]["run"]["steps"]
            self.say(
                "## From daylight to dusk",
                "Trained on CamVid without its dusk clip, tested on that clip (0001TP, the images "
                f"of the test and of the training split), {steps} steps: the question of section "
                "5.5 of the AAF paper, in small.",
                value_table(rows, SHORT),
                difference_table(rows, SHORT),
            )

    def resolution(self) -> None:
        runs = self.named("resolution")
        if runs:
            lines = []
            for result in runs:
                run = result["run"]
                values = [f"{metric(result['scores']['test']):.1f}" for metric in SHORT.values()]
                where = {"logits": "the logits' (1/4)", "image": "the image's"}[run["resolution"]]
                lines.append([NAMES[run["loss"]], where, *values, f"{result['seconds']:.0f}"])
            self.say(
                "## Labels at the logits' or at the image's resolution",
                f"CamVid, one seed, {runs[0]['run']['steps']} steps, logits enlarged in the latter "
                "case. The size 3 is then a quarter as far, and most pairs are within a segment. "
                "The latter is trained in eager mode: Inductor (torch 2.13, CPU) compiles this "
                'graph to gradients of 0; with the backend "aot_eager" the gradients are right.',
                table(["loss", "resolution", *SHORT, "training (s)"], lines),
            )

    def failures(self) -> None:
        rows = {k: v for k, v in self.rows("camvid").items() if k != PROPAGATED}
        if not rows:
            return
        classes = self.study["data"]["camvid"]["classes"]
        lines = []
        for k, name in enumerate(classes):
            if name in THIN:
                shares = {}
                for loss, seeds in rows.items():
                    pixels = np.sum([np.array(scores["confusion"])[k] for scores in seeds], axis=0)
                    shares[loss] = 100 * pixels / max(pixels.sum(), 1)
                order = [j for j in np.argsort(-shares["ce"]) if j != k][:3]
                lost = ", ".join(f"{classes[j]} {shares['ce'][j]:.0f}" for j in order)
                lines.append([name, *(f"{share[k]:.0f}" for share in shares.values()), lost])
        self.say(
            "## Failures",
            "The share of pixels found in CamVid's thin classes, percent, all seeds, and the "
            "classes that cross-entropy predicts for most of the others. A loss that thickens a "
            "class finds more pixels and takes pixels from the neighbours of the class: the IoU "
            "above counts both.",
            table(["class", *(NAMES[loss] for loss in rows), "cross-entropy: taken for"], lines),
        )

    def settings(self) -> None:
        runs = list(self.study["runs"].values())
        kinds = sorted({json.dumps(run["machine"], sort_keys=True) for run in runs})
        hours = sum(run["seconds"] for run in runs) / 3600
        lines = []
        for data in self.study["data"]:
            scored = self.named(data)
            if scored:
                run = scored[0]["run"]
                lines.append(
                    f"- {TITLE[data]}: {run['steps']} steps, batch {run['batch_size']}, learning "
                    f"rate {run['learning_rate']:g}; {scored[0]['parameters']} weights are trained."
                )
        self.say(
            "## Settings",
            SETTINGS,
            "\n".join(lines),
            f"{len(runs)} trainings, {hours:.1f} hours of them, on: "
            + "; ".join(
                f"{k['device']}, torch {k['torch']}, {'compiled' if k['compiled'] else 'eager'}"
                for k in map(json.loads, kinds)
            )
            + ". The machine was shared with other programs.",
            LIMITS,
        )


def option(run: dict[str, Any], name: str, default: Any) -> Any:
    """An option of a run's loss."""
    return dict(map(tuple, run["options"])).get(name, default)


def sizes_of(run: dict[str, Any]) -> str:
    if run["loss"] != "ce+aaf":
        return run["loss"]
    return "{" + ", ".join(map(str, option(run, "kernel_sizes", (3, 5, 7)))) + "}"


TITLE = {"camvid": "CamVid", "isbi": "ISBI 2012"}
ITERATIONS = (0, 1, 3, 6, 10)
SHORT = {k: METRICS[k] for k in ("mIoU", "instance-wise mIoU", "boundary F")}

SETTINGS = """\
- Backbone: EfficientNet-Lite0 with ImageNet weights, frozen; its features at strides 4, 8, 16 and
  32 are computed once, of the image and of its mirror image, and kept as float16.
- Decoder, the only trained part: 1 x 1 convolutions to 32 channels, from coarse to fine enlarged,
  added and merged by separable 3 x 3 convolutions with batch normalisation; logits at stride 4.
- AdamW, weight decay 1e-4 (none on AAF's weights, which learn at the network's rate), learning rate
  times (1 - step / steps)^0.9. Every image once in random order, mirrored or not, then again.
- Loss at the logits' resolution, on the labels nearest to the centres of 4 x 4 pixels; scores on
  full images, logits enlarged bilinearly.
- Affinity fields and AAF decay by 10^-progress, as in the authors' code. Affinity regression joins
  for the last third of the steps, within the same number of steps. Dilated affinity: rates 8 and 16
  pixels, weighting "sqrt", statistics of the training labels. Contrastive: the AAF paper's Eq. 9
  with margin 0.2 on the 32 features before the classifier, pairs of a pixel and its 8 neighbours.
  Weighted at boundaries: U-Net's 1 + w0 exp(-d^2 / (2 sigma^2)), sigma 5 pixels of the image, d the
  distance to the nearest other label."""

LIMITS = """\
## Limits

- The backbone is frozen and small, the training short: far from the papers' networks, and from
  their scores. A loss that helps a small decoder need not help a network that is trained whole;
  `--finetune` trains the whole network, where there is a GPU.
- CamVid's validation split is one clip of near-identical frames; a choice by this split is weak.
  The test split holds a clip whose other part is in the training split. Images are JPEG copies of
  the usual PNGs. ISBI's 30 slices are one stack: neighbouring slices are alike across the splits,
  and with five test images the spread over seeds says nothing about other tissue.
- Boundary scores differ from the BSDS benchmark, which the papers use: one predicted pixel may
  match several true pixels, see `metrics.BoundaryScore`.
- CamVid is for non-commercial research, ISBI 2012 for research; both with citation, see
  [real-data.md](real-data.md). The plots and tables here hold statistics alone, no image."""


def draw_differences(rows: Rows, metrics: dict[str, Metric], path: Path) -> None:
    """A dot for each seed, a bar for their mean, a gray band of cross-entropy's own spread."""
    losses = [loss for loss in rows if loss != "ce"]
    figure = Figure((2.6 * len(metrics) + 1.6, 0.36 * len(losses) + 1.1), layout="constrained")
    axes = figure.subplots(1, len(metrics), sharey=True)
    for axis, (title, metric) in zip(axes, metrics.items(), strict=True):
        base = np.array([metric(scores) for scores in rows["ce"]])
        axis.axvspan(-np.ptp(base), np.ptp(base), color="0.9")
        axis.axvline(0, color="0.5", linewidth=0.8)
        for k, loss in enumerate(losses):
            each = np.array([metric(scores) for scores in rows[loss]]) - base
            axis.plot(each, [k] * len(each), "o", color="tab:blue", markersize=4)
            axis.plot([each.mean()], [k], "|", color="black", markersize=12)
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(left=False)
    axes[0].set_yticks(range(len(losses)), [NAMES[loss] for loss in losses])
    axes[0].invert_yaxis()
    figure.supxlabel("percent points more than cross-entropy", fontsize=10)
    save(figure, path)


def draw_sizes(
    weights: np.ndarray, sizes: Sequence[int], classes: Sequence[str], path: Path
) -> None:
    figure = Figure((6.4, 2.8), layout="constrained")
    axis = figure.subplots()
    bottom = np.zeros(len(classes))
    for k, size in enumerate(sizes):
        colour = matplotlib.colormaps["viridis"](0.9 * k / (len(sizes) - 1))
        axis.bar(classes, weights[:, k], bottom=bottom, color=colour, label=f"{size} x {size}")
        bottom += weights[:, k]
    axis.set_ylabel("weight in the edge term")
    axis.set_xticks(range(len(classes)), classes, rotation=40, ha="right", rotation_mode="anchor")
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False, reverse=True)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=110)
