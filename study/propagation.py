"""Why propagation along a predicted affinity harms, and settings that might not.

All of it at the resolution of the logits, for networks that were trained with dilated affinity.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise, product
from typing import Any

import numpy as np
import torch
from architecture import STRIDE
from evaluation import confusion, mean_iou
from page import Page
from tables import TITLE, difference_cell, table, value_cell
from torch import Tensor

from tritonaff import affinity_propagation, dilated_affinity_target
from tritonaff.metrics import AffinityAccuracy

SELF_WEIGHTS = 6.0, 24.0, 96.0  # lambda, the paper's first
STEEPNESSES = 7.0, 100.0  # mu, the paper's first
ITERATIONS = 1, 3  # 10, as in the paper, harm more: see SCORED
# The pixels that take the result: every pixel; those whose largest probability is below SURE; those
# whose predicted affinity is "same" with every neighbour.
PIXELS = "all", "unsure", "inside"
SURE = 0.7
SETTINGS = list(product(SELF_WEIGHTS, STEEPNESSES, ITERATIONS, PIXELS))

Example = tuple[Tensor, Tensor, Tensor]  # probabilities, logits of affinity, labels


def search(examples: Iterable[Example], rates: list, ignore_index: int) -> list[float]:
    """Mean IoU without propagation, then with each of the SETTINGS."""
    tables = None
    for probs, affinity, labels in examples:
        count, before = probs.shape[1], probs.argmax(dim=1)
        if tables is None:
            tables = torch.zeros(1 + len(SETTINGS), count, count, dtype=torch.int64)
        found = [before]
        takes = {
            "all": torch.ones_like(before, dtype=torch.bool),
            "unsure": probs.amax(dim=1) < SURE,
            "inside": (affinity > 0).all(dim=1),
        }
        for self_weight, steepness in product(SELF_WEIGHTS, STEEPNESSES):
            after = probs
            for start, end in pairwise((0, *ITERATIONS)):
                after = affinity_propagation(
                    after,
                    affinity,
                    rates,
                    iterations=end - start,
                    self_weight=self_weight,
                    steepness=steepness,
                )
                found += [torch.where(takes[x], after.argmax(dim=1), before) for x in PIXELS]
        for row, prediction in zip(tables, found, strict=True):
            row += confusion(prediction, labels.numpy(), count, ignore_index)
    return [round(x, 5) for x in mean_iou(tables).tolist()]


COLUMNS = "pixels", "right", "right_after", "same", "other"


def by_category(examples: Iterable[Example], rates: list, ignore_index: int) -> dict[str, Any]:
    """For each rate and category: the accuracy of affinity; the number of pixels; how many are
    right before and after the paper's 10 iterations along this rate alone; and the sums of the
    gates to neighbours with the pixel's label and with another label.
    """
    counts = torch.zeros(len(rates), len(COLUMNS), 9, dtype=torch.float64)
    accuracy = AffinityAccuracy(rates, ignore_index)
    for probs, affinity, labels in examples:
        accuracy.update(affinity, labels)
        truth = dilated_affinity_target(labels, rates, ignore_index=ignore_index)
        before = probs.argmax(dim=1) == labels
        for sums, rate, x, same in zip(
            counts, rates, affinity.split(8, dim=1), truth.split(8, dim=1), strict=True
        ):
            after = affinity_propagation(probs, x, [rate]).argmax(dim=1) == labels
            gates = torch.sigmoid(x * torch.tensor(STEEPNESSES[0]).log())
            pulls = ((gates * (same == wanted)).sum(dim=1) for wanted in (1, 0))
            counted = (labels != ignore_index) & ((same == 1) | (same == 0)).any(dim=1)
            category = 8 - (same == 0).sum(dim=1)[counted]
            for row, values in zip(
                sums, (torch.ones_like(before), before, after, *pulls), strict=True
            ):
                row += torch.bincount(category, values[counted].double(), minlength=9)
    return {
        "accuracy": [
            [None if x != x else round(x, 4) for x in row]
            for row in accuracy.by_category().tolist()
        ],
        **{name: counts[:, k].round().tolist() for k, name in enumerate(COLUMNS)},
    }


# -------------------------------------------------------------------------------- the report


def section(page: Page) -> None:
    lines = []
    for data in page.study["data"]:
        tables = [
            100 * np.array(result["scores"]["propagation"])
            for result in page.named(data)
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
        page.say(
            "### Propagation",
            "mIoU after some iterations at the logits' resolution, along the affinity that the "
            "head predicts and along the affinity of the labels, as Tables 3 and 4 of the "
            "paper:",
            table(["iterations", *map(str, SCORED[:count])], lines),
        )
    if page.propagation is not None:
        harm(page)
        page.say(*remedy(page))


GROUPS = {"n0 to n2": (0, 1, 2), "n3 to n5": (3, 4, 5), "n6, n7": (6, 7), "n8": (8,)}


def harm(page: Page) -> None:
    """Why propagation harms: what each category gains and loses."""
    lines = []
    for data in page.study["data"]:
        found = [run for run in page.propagation["networks"] if run["data"] == data]
        for k in range(len(found[0]["rates"]) if found else 0):
            sums = {name: sum(np.array(run[name][k]) for run in found) for name in COLUMNS}
            accuracy = np.nanmean([np.array(run["accuracy"], float)[k] for run in found], axis=0)
            for group, members in GROUPS.items():
                one = {name: values[[*members]].sum() for name, values in sums.items()}
                if one["pixels"]:
                    cells = [
                        100 * one["pixels"] / sums["pixels"].sum(),
                        100 * np.nanmean(accuracy[[*members]]),
                        100 * one["right"] / one["pixels"],
                        100 * one["right_after"] / one["pixels"],
                        one["same"] / one["pixels"],
                        one["other"] / one["pixels"],
                    ]
                    pixels = STRIDE * found[0]["rates"][k][0]
                    name = f"{TITLE[data]}, rate {pixels}, {group}"
                    lines.append([name, *(f"{x:.1f}" for x in cells)])
    headings = "share", "affinity right", "pixels right", "after", "same", "other"
    page.say(HARM, table(["", *headings], lines))


def remedy(page: Page) -> list[str]:
    """The settings that were tried, and whether one is safe."""
    found, settings = page.propagation, [tuple(x) for x in page.propagation["settings"]]
    sets = list(dict.fromkeys(run["data"] for run in found["networks"]))
    changes = {  # by split and set: (seeds, settings), percent points of mIoU
        (split, data): np.array(
            [
                100 * (np.array(run[split][1:]) - run[split][0])
                for run in found["networks"]
                if run["data"] == data
            ]
        )
        for split in ("val", "test")
        for data in sets
    }
    least = np.min([changes["val", data].min(axis=0) for data in sets], axis=0)
    lines = []
    for pixels in PIXELS:
        own = [k for k, setting in enumerate(settings) if setting[-1] == pixels]
        for k in dict.fromkeys((own[len(ITERATIONS) - 1], max(own, key=lambda k: least[k]))):
            weight, steepness, iterations, _ = settings[k]
            name = f"{pixels}: λ {weight:g}, μ {steepness:g}, {iterations} iterations"
            cells = [
                difference_cell(
                    *(
                        [100 * run[split][n] for run in found["networks"] if run["data"] == data]
                        for n in (k + 1, 0)
                    )
                )
                for split in ("val", "test")
                for data in sets
            ]
            lines.append([name, *cells])
    best = int(least.argmax())
    weight, steepness, iterations, pixels = settings[best]
    setting = f'"{pixels}", λ {weight:g}, μ {steepness:g}, {iterations} iterations'
    gains = "; ".join(
        f"{TITLE[data]} {changes[split, data][:, best].mean():+.2f} ({split})"
        for split in ("val", "test")
        for data in sets
    )
    if least[best] > -0.05:  # 0.0 in the tables
        verdict = f"Rule: with {setting}, no seed loses 0.05 on the validation split of any set."
    else:
        verdict = (
            f"There is no rule: with each setting a seed loses, at least {-least[best]:.2f} on the "
            f"validation split of a set, with {setting}."
        )
    heads = [f"{TITLE[data]}, {split}" for split in ("validation", "test") for data in sets]
    return [
        REMEDY.format(count=len(settings), sure=found["sure"]),
        table(["pixels, setting", *heads], lines),
        f"{verdict} Its mean changes: {gains}.",
    ]


HARM = (
    "Why: the pixels by their number of neighbours with the same label, along one rate, 10 "
    "iterations, λ 6, μ 7, percent. The last two columns are no percent: sums of the gates to a "
    "pixel's neighbours with its label and with another label. A pixel keeps its class "
    "while λ max p and the same gates outweigh the other gates, in each of 10 iterations; the "
    "pixels of thin things and beside boundaries have the least accurate affinity and the most "
    "neighbours of another label."
)
REMEDY = (
    "Settings, {count} in all: λ, μ, the number of iterations, and the pixels that take the "
    'result: "all"; "unsure", whose largest probability is below {sure:g}; "inside", whose '
    'predicted affinity is "same" with every neighbour. For each kind of pixels the '
    "paper's λ and μ, then the setting that is best with its worst seed on the validation split of "
    "its worst set. mIoU minus mIoU without propagation, at the logits' resolution:"
)
SCORED = (0, 1, 3, 6, 10)  # iterations, see scoring.py
