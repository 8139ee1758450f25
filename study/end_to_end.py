"""Sections of the report on networks that were trained end to end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import finetune
import numpy as np
from charts import draw_curves
from finetune import Run
from page import Page
from tables import (
    METRICS,
    NAMES,
    PROPAGATED,
    THIN,
    TITLE,
    Metric,
    Rows,
    by_class,
    class_metrics,
    difference_table,
    iou,
    mean,
    mean_of,
    table,
    value_table,
    values_of,
)
from thin import harmonic_mean, tolerant_f1

# ----------------------------------------------------------------------------------- metrics


def cl_dice(thin: dict[str, Any]) -> np.ndarray:
    """clDice by threshold, percent: Shit et al., CVPR 2021."""
    return harmonic_mean(
        thin,
        ("predicted_skeleton_hit", "predicted_skeleton"),
        ("true_skeleton_hit", "true_skeleton"),
    )


def thin_iou(thin: dict[str, Any]) -> np.ndarray:
    """IoU of the thin class by threshold, percent."""
    hit, predicted, true = (np.array(thin[name]) for name in ("hit", "predicted", "true"))
    return 100 * hit / np.maximum(predicted + true - hit, 1)


def no_rand_error(thin: dict[str, Any]) -> np.ndarray:
    """100 minus the adapted Rand error by threshold, percent."""
    return 100 * (1 - np.array(thin["rand_error"]))


ByThreshold = Callable[[dict[str, Any]], np.ndarray]


def tuned(metric: ByThreshold) -> Metric:
    """At the threshold that is best for the metric on the validation split."""
    return lambda s: float(metric(s["thin"])[metric(s["val"]["thin"]).argmax()])


def untuned(metric: ByThreshold) -> Metric:
    """At the threshold 0.5."""
    return lambda s: float(metric(s["thin"])[s["thin"]["thresholds"].index(0.5)])


THIN_SCORES = {"F1 at 2 pixels": tolerant_f1, "clDice": cl_dice, "IoU": thin_iou}
UNTUNED: dict[str, Metric] = {
    f"{name.removesuffix(' at 2 pixels')} at 0.5": untuned(f) for name, f in THIN_SCORES.items()
}
BOUNDARY: dict[str, Metric] = {
    f"boundary {name}, {k} pixel{'s' * (k > 1)}": mean(by_class(f"boundary_{key}_{k}"))
    for name, key in (("F", "f"), ("recall", "recall"))
    for k in (1, 2, 3)
}


def by_threshold(data: str) -> dict[str, ByThreshold]:
    """The scores of a data set that have a threshold to choose."""
    setting = finetune.SETTINGS[data]
    if setting.thin is None:
        return {}
    return ({"1 - Rand error": no_rand_error} if setting.cells else {}) | THIN_SCORES


def metrics_of(page: Page, data: str) -> dict[str, Metric]:
    """The main metrics of a data set."""
    chosen = by_threshold(data)
    if chosen:
        return {name: tuned(metric) for name, metric in chosen.items()} | UNTUNED
    thin = mean_of(class_metrics(page.study["data"]["camvid"]["classes"], THIN))
    return {
        "mIoU": mean(iou),
        "IoU of thin classes": thin,
        "boundary F, 1 pixel": BOUNDARY["boundary F, 1 pixel"],
        "boundary recall, 1 pixel": BOUNDARY["boundary recall, 1 pixel"],
    }


# ---------------------------------------------------------------------------------- sections


def data_sets(page: Page) -> list[str]:
    """The sets that have at least one comparison."""
    return [name for name in TITLE if len(rows_of(page, name)) > 1]


def runs_of(page: Page, data: str) -> list[dict[str, Any]]:
    """The runs that compare losses, with the learning rate that was chosen and every seed."""
    results = results_of(page)
    base = finetune.chosen_base(data, results)
    if base is None:
        return []
    compared = finetune.with_losses(base, finetune.WEIGHTS)
    return [run for run in results.values() if replace(Run.read(run["run"]), seed=0) in compared]


def results_of(page: Page) -> finetune.Results:
    return {Run.read(run["run"]).name: run for run in page.finetune["runs"]}


def rows_of(page: Page, data: str) -> Rows:
    """Scores of the test split by loss; where there is a threshold, with the validation split's.
    Rows that NAMES lacks, of propagation that ends early, come last.
    """
    rows: Rows = {}
    if page.finetune is None:
        return rows
    for run in runs_of(page, data):
        loss, seed = run["run"]["loss"], run["run"]["seed"]
        for key in run:
            if key == "test" or key.startswith("test_"):
                after = key.removeprefix("test")
                name = propagated(int(after[1:])) if after else loss
                val = run.get("val" + after)
                rows.setdefault(name, {})[seed] = run[key] | {"val": val}
    names = list(NAMES)
    place = {loss: names.index(loss) if loss in NAMES else len(names) for loss in rows}
    return dict(sorted(rows.items(), key=lambda row: place[row[0]]))


def propagated(iterations: int) -> str:
    """The row of scores after so many iterations."""
    if iterations == finetune.ITERATIONS[-1]:
        return PROPAGATED
    return f"+ dilated, then {iterations} iteration{'s' * (iterations > 1)}"


def section(page: Page) -> None:
    names = data_sets(page)
    if not names:
        return
    steps = "; ".join(
        f"{TITLE[name]} {run['steps']} steps at {run['learning_rate']:g}"
        for name in names
        for run in [runs_of(page, name)[0]["run"]]
    )
    missing = [
        f"- {TITLE[name]}: {'; '.join(NAMES[loss] for loss in left)}"
        for name in finetune.SETTINGS
        for rows in [rows_of(page, name)]
        for left in [[x for x in finetune.WEIGHTS if len(rows.get(x, ())) < len(finetune.SEEDS)]]
        if left
    ]
    page.say("## Networks trained end to end", SETTINGS, f"Steps and learning rate: {steps}.")
    if missing:
        page.say("Planned and not run with all seeds yet; `study/finetune.py train` goes on:")
        page.say("\n".join(missing))
    learning_rates(page, names)
    for name in names:
        rows, metrics = rows_of(page, name), metrics_of(page, name)
        counts = {NAMES[loss]: len(rows[loss]) for loss in finetune.WEIGHTS if loss in rows}
        seeds = "; ".join(f"{loss} {count}" for loss, count in counts.items())
        page.say(f"### {TITLE[name]}, end to end", *facts(page, name), f"Seeds: {seeds}.")
        page.say(value_table(rows, metrics), difference_table(rows, metrics))
        at_an_end(page, name)
        page.say("Boundaries, mean over the classes:", value_table(rows, BOUNDARY))
        if name == "camvid":
            classes = page.study["data"]["camvid"]["classes"]
            page.say("IoU of thin classes:", value_table(rows, class_metrics(classes, THIN)))
    search(page, names)
    curves(page, names)
    cost(page, names)


def facts(page: Page, name: str) -> list[str]:
    """Facts about a set that its scores need."""
    if name == "crackforest":
        return [CRACKS]
    if name == "camvid" and (about := undertrained(page)):
        return [about]
    return []


def undertrained(page: Page) -> str:
    """Says where networks trained whole are behind decoders on frozen features."""
    name = "camvid"
    frozen = page.rows(name)
    if "ce" in frozen and "ce" in rows_of(page, name):
        whole, decoder = (
            float(np.mean(values_of(rows, "ce", METRICS["mIoU"])))
            for rows in (rows_of(page, name), frozen)
        )
        if whole < decoder:
            steps = finetune.SETTINGS[name].steps
            return CAMVID.format(whole=whole, decoder=decoder, steps=steps)
    return ""


def learning_rates(page: Page, names: Sequence[str]) -> None:
    """The runs of cross-entropy of which the validation split chose one."""
    results, metric = results_of(page), {CHOICE: lambda s: s["choice"]}
    for name in names:
        runs = [results[run.name] for run in finetune.learning_rates(name) if run.name in results]
        if len(runs) > 1:
            rows = {
                f"{run['run']['learning_rate']:g}": {0: scores_with_choice(run)} for run in runs
            }
            page.say(
                f"Learning rates, {TITLE[name]}, cross-entropy with one seed:",
                value_table(rows, metric | metrics_of(page, name), "rate"),
            )
            first, second = sorted(map(finetune.validation, runs))[-2:]
            base = [run for run in runs_of(page, name) if run["run"]["loss"] == "ce"]
            spread = np.ptp([finetune.validation(run) for run in base])
            if second - first < spread:
                page.say(
                    f"The rates are {second - first:.2f} apart by the choice, less than the spread "
                    f"over seeds, {spread:.2f}: with the other rate every loss may score otherwise."
                )


def scores_with_choice(run: dict[str, Any]) -> dict[str, Any]:
    """Scores of the test split, and what the validation split chooses by."""
    return run["test"] | {"choice": finetune.validation(run), "val": run.get("val")}


CHOICE = "choice, validation split"


def at_an_end(page: Page, name: str) -> None:
    """Says where a better threshold may lie beyond the ones to choose from."""
    ends: dict[str, list[str]] = {}
    for loss, by_seed in rows_of(page, name).items():
        for title, metric in by_threshold(name).items():
            values = [metric(scores["val"]["thin"]) for scores in by_seed.values()]
            count = sum(v.argmax() in (0, len(v) - 1) for v in values)
            if count:
                ends.setdefault(title, []).append(f"{NAMES.get(loss, loss)} {count}")
    if ends:
        words = "; ".join(f"{title} of {', '.join(losses)}" for title, losses in ends.items())
        page.say(f"Choices at an end of the thresholds, by number of seeds: {words}.")


def search(page: Page, names: list[str]) -> None:
    """Settings of affinity fields, and the best of them with more seeds."""
    results = results_of(page)

    def rows_with(runs: dict[str, Run], seeds: Sequence[int]) -> Rows:
        found: Rows = {}
        for label, run in runs.items():
            for seed in seeds:
                result = results.get(replace(run, seed=seed).name)
                if result is not None:
                    found.setdefault(label, {})[seed] = scores_with_choice(result)
        return found

    begun = False
    for name in names:
        base = finetune.chosen_base(name, results)
        trials = {changed(run): run for run in finetune.trials(base)}
        rows = rows_with(trials, finetune.SEEDS[:1])
        if len(rows) < len(trials):
            continue
        if not begun:
            page.say("### Settings of affinity fields", SEARCH)
            begun = True
        metrics = {CHOICE: lambda s: s["choice"]} | metrics_of(page, name)
        page.say(f"{TITLE[name]}, one seed:", value_table(rows, metrics, "settings"))
        best = max(rows, key=lambda label: rows[label][0]["choice"])
        compared = {"cross-entropy": base, UNCHANGED: trials[UNCHANGED], best: trials[best]}
        rows = rows_with(compared, finetune.MORE_SEEDS)
        if best == UNCHANGED:
            page.say(f"{TITLE[name]}: the validation split chooses the plan's own settings.")
        elif set(rows[best]) == set(finetune.MORE_SEEDS):
            page.say(
                f"{TITLE[name]}, {len(finetune.MORE_SEEDS)} seeds, with the settings that the "
                "validation split chose:",
                difference_table(rows, metrics_of(page, name), base="cross-entropy"),
                difference_table(
                    {label: rows[label] for label in (UNCHANGED, best)},
                    metrics_of(page, name),
                    base=UNCHANGED,
                ),
            )


UNCHANGED = "the plan's settings"


def changed(run: Run) -> str:
    """How the settings differ from the plan's, in words."""
    words = [f"{key} {value}" for key, value in run.options]
    if run.weight != finetune.WEIGHTS[run.loss]:
        words.append(f"weight {run.weight:g}")
    return ", ".join(words) or UNCHANGED


def curves(page: Page, names: list[str]) -> None:
    """How far cross-entropy was from its end on the validation split."""
    lines, words = {}, []
    for name in names:
        runs = [run for run in runs_of(page, name) if run["run"]["loss"] == "ce"]
        lines[TITLE[name]] = [
            [(look["step"], look["cross_entropy"]) for look in run["looks"]] for run in runs
        ]
        last = [100 * (run["looks"][-1]["miou"] - run["looks"][-2]["miou"]) for run in runs]
        count = len(runs[0]["looks"])
        words.append(f"{TITLE[name]} {np.mean(last):+.1f} (last 1/{count} of the steps)")
    page.say(
        "Cross-entropy of the validation split, networks trained with cross-entropy alone, a line "
        "for each seed:"
    )
    draw_curves(lines, page.picture("curves", "Cross-entropy of the validation split by step"))
    page.say(
        f"The mean change of the validation split's mIoU at the end: {'; '.join(words)}. The "
        "learning rate goes to 0, so that every curve flattens at its end: a longer schedule may "
        "still reach more."
    )


def step_times(page: Page, data: str) -> dict[str, float]:
    """CPU milliseconds of a step by loss, the median."""
    times: dict[str, list[float]] = {}
    for run in runs_of(page, data):
        times.setdefault(run["run"]["loss"], []).append(run["step_cpu_ms"])
    return {loss: float(np.median(each)) for loss, each in times.items()}


def cost(page: Page, names: list[str]) -> None:
    lines = []
    for name in names:
        times = step_times(page, name)
        for loss, ms in sorted(times.items(), key=lambda one: list(NAMES).index(one[0])):
            lines.append([TITLE[name], NAMES[loss], f"{ms:.0f}", f"{ms / times['ce']:.2f}"])
    page.say(
        "CPU time of a step, the median over steps and seeds; the machine was shared, so that "
        "differences of 20 percent mean nothing:",
        table(["data", "loss", "ms", "of cross-entropy"], lines),
    )


SETTINGS = """\
- The same EfficientNet-Lite0 and decoder as below, all weights trained: AdamW, weight decay 1e-4,
  the backbone at a tenth of the learning rate and with ImageNet's statistics in its batch
  normalisation; learning rate times (1 - step / steps)^0.9.
- Batches of 4 crops of 224 pixels from images mirrored or not and resized 0.5 to 2 times.
- Losses and scores at the resolution of the image, logits of stride 4 enlarged bilinearly. Where
  there are two classes, one channel with a sigmoid: crack against road, membrane against cell.
- Weights: affinity fields and AAF 1, affinity regression 0.1 in the last third of the steps (the
  papers'), Dice 1, U-Net's w0 3 (10 in its paper), dilated affinity 0.1 (1.5 in its paper, which
  harms decoders on frozen features) with the rates 8 and 16 pixels (CamVid) or 2 and 4. One setting
  each; further below, others of affinity fields.
- Cross-entropy with the first seed chose between the learning rates 0.003 and 0.01 on the
  validation split, by F1 at 2 pixels at the best threshold; CamVid has CrackForest's choice.
- F1 counts a predicted pixel as right within 2 pixels of a labelled one and the reverse, clDice
  compares skeletons (scikit-image), IoU is of the thin class; all pool the split. "At 0.5" and
  boundary scores call a pixel thin from the probability 0.5; all other scores from the threshold
  that is best for the score on the validation split, of 0.1, 0.2 ... 0.9, on ISBI 2012 also 0.01,
  0.02, 0.03, 0.05 and 0.07. Rand error: cells are the connected parts of all that is no membrane,
  predicted membranes thinned to nothing; mean over images."""
SEARCH = """\
"+ affinity, size 3" with one setting changed at a time: the weight 0.3 or 3 instead of 1, the
margin 1 instead of 3, the size 5 instead of 3, cross-entropy alone in the first half of the steps
(start), no decay of the weight by 10^-progress. The budget is seven trainings on each set with the
first seed. The validation split chooses, by F1 at 2 pixels at the best threshold (CrackForest, ISBI
2012) or by the mean IoU of every eighth image (CamVid); the chosen settings are then trained with
more seeds. The first seed, which chose, is the first in the brackets and counts in the means."""
CRACKS = """\
70 training, 16 validation and 32 test photographs of road surface, 480x320, split at random for
this study: some show the same stretch of road, so that the test split is not new road. Cracks are 1
to 5 pixels wide, 1.6 % of the pixels: F1 at 2 pixels does not punish a crack that is drawn up to 4
pixels too wide, IoU does. For non-commercial research, with citation: Shi et al., IEEE
Transactions on Intelligent Transportation Systems 17(12), 2016; Cui et al., ICDS 2015."""
CAMVID = (
    "On CamVid, cross-entropy trained end to end on crops reaches an mIoU of {whole:.1f} after "
    "{steps} steps; a decoder on frozen features, on whole images, {decoder:.1f} (further below). "
    "These networks are far from what they can reach: a loss that gains here may just learn faster."
)
