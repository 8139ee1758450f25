"""Sections of the report on decoders that were trained on frozen features."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import propagation
import torch
from charts import draw_differences, draw_sizes
from page import Page
from tables import (
    CHART,
    METRICS,
    NAMES,
    PROPAGATED,
    SHORT,
    THIN,
    TITLE,
    Metric,
    Rows,
    Scores,
    class_metrics,
    difference_table,
    short_cell,
    table,
    value_cell,
    value_table,
)

from tritonaff.plotting import plot_affinity


def sections(page: Page) -> None:
    page.say(
        "## Decoders on frozen features",
        "The same small decoder, trained with each loss: the same initial weights, the same "
        "batches in the same order, the same number of steps.",
    )
    for data in page.study["data"]:
        comparison(page, data)
    for section in (
        published,
        step_cost,
        regression,
        propagation.section,
        sizes,
        dilated,
        transfer,
        resolution,
        failures,
        settings,
    ):
        section(page)


def comparison(page: Page, data: str) -> None:
    rows, facts = page.rows(data), page.study["data"][data]
    if not rows:
        return
    images = facts["images"]
    page.say(
        f"### {TITLE[data]}",
        f"{images['train']} training, {images['val']} validation and {images['test']} test "
        f"images of {facts['width']}x{facts['height']}, {len(facts['classes'])} classes. "
        f"Boundary scores have a tolerance of {page.study['tolerance']} pixel; an instance "
        "is a connected part of a class, as the labels tell no instances apart.",
    )
    metrics = {k: v for k, v in METRICS.items() if not k.startswith("boundary ")}
    boundary = {k: v for k, v in METRICS.items() if k.startswith("boundary ")}
    main = metrics | {"boundary F": METRICS["boundary F"]}
    page.say(value_table(rows, main), difference_table(rows, main))
    drawn = {loss: seeds for loss, seeds in rows.items() if loss != PROPAGATED}
    draw_differences(
        {k: (drawn, m) for k, m in main.items()},
        page.picture(data, f"Differences to cross-entropy, {data}"),
    )
    page.say(CHART)
    val: dict[str, list[float]] = {}
    for result in page.named(data):
        miou = 100 * result["val"][-1]["miou"]
        val.setdefault(NAMES[result["run"]["loss"]], []).append(miou)
    words = "; ".join(f"{name} {value_cell(values)}" for name, values in val.items())
    page.say(f"mIoU on the validation split, at the logits' resolution: {words}.")
    page.say("Boundaries:", difference_table(rows, boundary))
    thin = class_metrics(facts["classes"], THIN)
    page.say("IoU of thin classes:", value_table(rows, thin))
    every = class_metrics(facts["classes"], facts["classes"])
    page.say("IoU of every class, mean difference:", difference_table(rows, every, cell=short_cell))
    choices(page, data)


def choices(page: Page, data: str) -> None:
    """The candidates for the weights, and their results on the validation split."""
    runs = [page.study["runs"][name] for name in page.study["tables"].get(f"{data} weights", ())]
    if not runs:
        return
    trials: dict[str, list[tuple[float, float]]] = {}
    for result in runs:
        pair = result["run"]["weight"], 100 * result["val"][-1]["miou"]
        trials.setdefault(result["run"]["loss"], []).append(pair)
    rows = []
    for loss, pairs in trials.items():
        best = max(pairs, key=lambda pair: pair[1])[0]
        end = " (an end)" if best in (pairs[0][0], pairs[-1][0]) else ""
        cells = [f"{w:g}: {v:.1f}" for w, v in pairs]
        rows.append([NAMES[loss], f"{best:g}{end}", ", ".join(cells)])
    rate = runs[0]["run"]["learning_rate"]
    steps = runs[0]["run"]["steps"]
    page.say(
        f"Chosen on the validation split, with one seed and {steps} steps: for all losses the "
        f"learning rate at which cross-entropy does best, {rate:g}, then the weight of each. "
        "Most of these mIoUs are closer together than two seeds are; the weights are a fair "
        "try, not the best ones. At an end of the candidates, a better one may lie beyond; a "
        "weight at the lower end brings a loss near to cross-entropy alone.",
        table(["loss", "weight", "mIoU on validation by weight"], rows),
    )


def published(page: Page) -> None:
    rows = page.rows("published")
    if len(rows) > 1:
        runs = {run["run"]["loss"]: run["run"] for run in page.named("published")}
        words = [f'"{NAMES[k]}" {run["weight"]:g}' for k, run in runs.items() if k != "ce"]
        page.say(
            "### With the papers' own weights",
            f"CamVid, as above, but for the weights: {', '.join(words)}.",
            value_table(rows, SHORT),
            difference_table(rows, SHORT),
        )


def step_cost(page: Page) -> None:
    if page.cost is None:
        return
    base = page.cost["losses"]["ce"]
    rows = [
        [
            NAMES[loss],
            f"{one['ms']:.0f}",
            f"{one['ms'] / base['ms']:.2f}",
            f"{one['peak_bytes'] / 1e6:.0f}",
            f"{one['peak_bytes'] / base['peak_bytes']:.2f}",
        ]
        for loss, one in page.cost["losses"].items()
    ]
    facts = page.cost["machine"]
    page.say(
        "### Cost of a step",
        f"Forward, backward and optimiser of the decoder, batch {page.cost['batch_size']}, "
        f"on {facts['device']}, {'compiled' if facts['compiled'] else 'eager'}: median, all "
        "losses in turn. Memory is the most that the step held beyond weights, optimiser and "
        "batch.",
        table(["loss", "ms", "of cross-entropy", "peak memory (MB)", "of cross-entropy"], rows),
    )


def regression(page: Page) -> None:
    parts = []
    for data in page.study["data"]:
        runs = {}
        for result in page.named(data):
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
    page.say(
        "### Affinity regression before and after",
        "The AR loss on the validation split after two thirds of the steps, when `ce+ar` "
        "adds the loss, and at the end. Up to two thirds, both rows are one training. The "
        "paper fine-tunes from the peak of cross-entropy and reports 0.187 before, 0.165 after "
        "(-12 %); the paper does not report further training with cross-entropy alone, the "
        "other row.",
        table(["", "before", "after", "change"], parts),
    )
    if "camvid" in page.study["data"]:
        matrices = {
            "label affinity": pair[0]["true"],
            "cross-entropy": pair[0]["predicted"],
            "+ affinity regression": pair[1]["predicted"],
        }
        page.say(
            "Mean over CamVid's test images of the affinity matrices of 6 x 6 points, row by "
            "row from the upper left, with the first seed:"
        )
        plot_affinity(
            {k: torch.tensor(np.array(v, float)) for k, v in matrices.items()},
            page.picture("affinity", "Mean affinity of the labels and of two networks"),
        )


def sizes(page: Page) -> None:
    runs = [run for run in page.named("camvid") if run["run"]["loss"] == "ce+aaf"]
    if runs:
        page.say(
            "### Sizes of affinity fields",
            "The learned weights of the edge term, by class, mean over seeds; the weights "
            "start at 1/3 each (Fig. 4 left of the paper).",
        )
        weights = np.mean([run["edge_weight"] for run in runs], axis=0)
        classes = page.study["data"]["camvid"]["classes"]
        text = "Learned weights of the sizes 3, 5 and 7 by class"
        draw_sizes(weights, (3, 5, 7), classes, page.picture("sizes", text))
    rows = page.rows("sizes", sizes_of)
    if len(rows) > 1:
        runs = [run["run"] for run in page.named("sizes")]
        weight = next(run["weight"] for run in runs if run["loss"] == "ce+aaf")
        page.say(
            f"Combinations of sizes on CamVid, {runs[0]['steps']} steps, all with the weight "
            f"{weight:g} (Table 10). The size 3 alone has nothing to adapt: this row is the "
            "affinity loss with the same weight.",
            value_table(rows, SHORT),
            difference_table(rows, SHORT),
        )


def dilated(page: Page) -> None:
    rows = dilated_rows(page, "weightings", weighting_of)
    heads = {label: seeds for label, seeds in rows.items() if label != "ce"}
    if heads:
        page.say(
            "### Weighting and rates of dilated affinity",
            f"CamVid, {page.named('weightings')[0]['run']['steps']} steps (Table 1). Accuracy is "
            "the accuracy of the affinity signals, mean over rates and categories. The verdicts on "
            "weightings take, for each, the β that is best on the validation split.",
            value_table(heads, SHORT | SIGNALS, "weighting"),
            difference_table(rows, SHORT),
        )
    rows = dilated_rows(page, "rates", rates_of)
    if rows:
        beta = page.named("rates")[0]["run"]["weight"]
        page.say(
            f'Rates, in pixels of the image, "sqrt", β = {beta:g} (Table 2):',
            value_table(rows, SHORT | {"mIoU, propagated": propagated_miou}, "rates"),
        )


def dilated_rows(page: Page, name: str, label: Callable[[dict[str, Any]], str]) -> Rows:
    """Scores of the test split, the other scores of a run beside them, and its validation mIoU."""
    rows: Rows = {}
    for result in page.named(name):
        run, scores = result["run"], result["scores"]
        one = scores["test"] | scores | {"val": 100 * result["val"][-1]["miou"]}
        rows.setdefault(label(run), {})[run["seed"]] = one
    return rows


def signal_accuracy(first: int, last: int) -> Metric:
    """Mean accuracy of the affinity signals of the categories from ``first`` to ``last``."""

    def metric(scores: Scores) -> float:
        accuracy = np.array(scores["affinity_accuracy"], float)
        return float(100 * np.nanmean(accuracy[:, first : last + 1]))

    return metric


SIGNALS = {"accuracy n0-n4": signal_accuracy(0, 4), "accuracy n5-n8": signal_accuracy(5, 8)}


def propagated_miou(scores: Scores) -> float:
    return METRICS["mIoU"](scores["propagated"])


def transfer(page: Page) -> None:
    rows = page.rows("transfer")
    if rows:
        steps = page.named("transfer")[0]["run"]["steps"]
        page.say(
            "### From daylight to dusk",
            "Trained on CamVid without its dusk clip, tested on that clip (0001TP, the images "
            f"of the test and of the training split), {steps} steps: the question of section "
            "5.5 of the AAF paper, in small.",
            value_table(rows, SHORT),
            difference_table(rows, SHORT),
        )


def resolution(page: Page) -> None:
    runs = page.named("resolution")
    if runs:
        lines = []
        for result in runs:
            run = result["run"]
            values = [f"{metric(result['scores']['test']):.1f}" for metric in SHORT.values()]
            where = {"logits": "the logits' (1/4)", "image": "the image's"}[run["resolution"]]
            lines.append([NAMES[run["loss"]], where, *values, f"{result['seconds']:.0f}"])
        page.say(
            "### Labels at the logits' or at the image's resolution",
            f"CamVid, one seed, {runs[0]['run']['steps']} steps, logits enlarged in the latter "
            "case. The size 3 is then a quarter as far, and most pairs are within a segment. "
            "The latter is trained in eager mode: Inductor (torch 2.13, CPU) compiles this "
            'graph to gradients of 0; with the backend "aot_eager" the gradients are right.',
            table(["loss", "resolution", *SHORT, "training (s)"], lines),
        )


def failures(page: Page) -> None:
    rows = {k: v for k, v in page.rows("camvid").items() if k != PROPAGATED}
    if not rows:
        return
    classes = page.study["data"]["camvid"]["classes"]
    lines = []
    for k, name in enumerate(classes):
        if name in THIN:
            shares = {}
            for loss, seeds in rows.items():
                pixels = np.sum([np.array(s["confusion"])[k] for s in seeds.values()], axis=0)
                shares[loss] = 100 * pixels / max(pixels.sum(), 1)
            order = [j for j in np.argsort(-shares["ce"]) if j != k][:3]
            lost = ", ".join(f"{classes[j]} {shares['ce'][j]:.0f}" for j in order)
            lines.append([name, *(f"{share[k]:.0f}" for share in shares.values()), lost])
    page.say(
        "### Failures",
        "The share of pixels found in CamVid's thin classes, percent, all seeds, and the "
        "classes that cross-entropy predicts for most of the others. A loss that thickens a "
        "class finds more pixels and takes pixels from the neighbours of the class: the IoU "
        "above counts both.",
        table(["class", *(NAMES[loss] for loss in rows), "cross-entropy: taken for"], lines),
    )


def settings(page: Page) -> None:
    runs = list(page.study["runs"].values())
    kinds = sorted({json.dumps(run["machine"], sort_keys=True) for run in runs})
    hours = sum(run["seconds"] for run in runs) / 3600
    lines = []
    for data in page.study["data"]:
        scored = page.named(data)
        if scored:
            run = scored[0]["run"]
            lines.append(
                f"- {TITLE[data]}: {run['steps']} steps, batch {run['batch_size']}, learning "
                f"rate {run['learning_rate']:g}; {scored[0]['parameters']} weights are trained."
            )
    page.say(
        "### Settings",
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


def weighting_of(run: dict[str, Any]) -> str:
    if run["loss"] == "ce":
        return "ce"
    return f"{option(run, 'weighting', 'sqrt')}, β {run['weight']:g}"


def rates_of(run: dict[str, Any]) -> str:
    """In the paper's notation."""
    rates = option(run, "rates", (8, 16))
    return "{" + ", ".join(str(r).replace("[", "(").replace("]", ")") for r in rates) + "}"


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
### Limits

- The backbone is frozen and small, the training short: far from the papers' networks, and from
  their scores. A loss that helps a small decoder need not help a network that is trained whole;
  the first part of this page has the same network trained whole.
- CamVid's validation split is one clip of near-identical frames; a choice by this split is weak.
  The test split holds a clip whose other part is in the training split. Images are JPEG copies of
  the usual PNGs. ISBI's 30 slices are one stack: neighbouring slices are alike across the splits,
  and with five test images the spread over seeds says nothing about other tissue.
- Boundary scores differ from the BSDS benchmark, which the papers use: one predicted pixel may
  match several true pixels, see `metrics.BoundaryScore`.
- CamVid is for non-commercial research, ISBI 2012 for research; both with citation, see
  [real-data.md](real-data.md). The plots and tables here hold statistics alone, no image."""
