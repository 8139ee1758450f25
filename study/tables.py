"""Tables of the report: values and differences by loss, and which of them count."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from losses import TITLES

Scores = dict[str, Any]  # metrics of one split, from study.py
Rows = dict[str, dict[int, Scores]]  # by loss and seed
Metric = Callable[[Scores], float]

TITLE = {"crackforest": "CrackForest", "camvid": "CamVid", "isbi": "ISBI 2012"}
PROPAGATED, CRF = "ce+dilated, propagated", "ce, CRF"
NAMES = TITLES | {PROPAGATED: "+ dilated, then 10 iterations", CRF: "then a dense CRF"}

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


METRICS: dict[str, Metric] = {
    "mIoU": mean(iou),
    "instance-wise mIoU": mean(by_class("instance_iou")),
    "boundary F": mean(by_class("boundary_f")),
    "boundary precision": mean(by_class("boundary_precision")),
    "boundary recall": mean(by_class("boundary_recall")),
    "pixel accuracy": pixel_accuracy,
}


SHORT = {k: METRICS[k] for k in ("mIoU", "instance-wise mIoU", "boundary F")}
THIN = "pole", "sign_symbol", "fence", "pedestrian", "bicyclist", "membrane"


def class_metrics(classes: Sequence[str], chosen: Sequence[str]) -> dict[str, Metric]:
    """IoU of some classes."""
    return {
        name: (lambda scores, k=k: float(iou(scores)[k]))
        for k, name in enumerate(classes)
        if name in chosen
    }


def mean_of(metrics: dict[str, Metric]) -> Metric:
    return lambda scores: float(np.nanmean([metric(scores) for metric in metrics.values()]))


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


def values_of(rows: Rows, loss: str, metric: Metric) -> list[float]:
    return [metric(scores) for _, scores in sorted(rows[loss].items())]


def paired(
    rows: Rows, loss: str, metric: Metric, base: str = "ce"
) -> tuple[list[float], list[float]]:
    """Values of a loss and of its base, with the seeds that both have."""
    seeds = sorted(rows[loss].keys() & rows.get(base, {}).keys())
    return tuple([metric(rows[name][seed]) for seed in seeds] for name in (loss, base))


def value_table(rows: Rows, metrics: dict[str, Metric], heading: str = "loss") -> str:
    return table(
        [heading, *metrics],
        [
            [
                NAMES.get(loss, loss),
                *(value_cell(values_of(rows, loss, m)) for m in metrics.values()),
            ]
            for loss in rows
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
            [NAMES.get(loss, loss), *(cell(*paired(rows, loss, m, base)) for m in metrics.values())]
            for loss in rows
            if loss != base and rows[loss].keys() & rows[base].keys()
        ],
    )


CHART = (
    "A dot is a seed, a bar their mean; the gray band is as wide on each side as the range of "
    "cross-entropy over seeds: a bar within the band is no difference, a bar outside is one where "
    "the table is bold. Propagation is left out, because its bars would set the scale."
)
Panels = dict[str, tuple[Rows, Metric]]  # by title


def panels(rows: Rows, metrics: dict[str, Metric], title: str = "") -> Panels:
    return {title + name: (rows, metric) for name, metric in metrics.items()}


def verdict(panels: Panels, loss: str, base: str = "ce") -> str:
    """Names, in words, the metrics in which a loss differs. One seed is not judged."""
    found: dict[str, list[str]] = {"raises": [], "lowers": []}
    judged = []
    for title, (rows, metric) in panels.items():
        values, others = paired(rows, loss, metric, base) if loss in rows else ([], [])
        if len(values) < 2:
            continue
        judged.append(title)
        # A difference of 0.0 in the tables is not worth a word.
        if differs(values, others) and abs(np.mean(values) - np.mean(others)) >= 0.05:
            found["raises" if np.mean(values) > np.mean(others) else "lowers"].append(title)
    if not judged:
        return "is not judged, with one seed"
    where, everywhere = (
        list(dict.fromkeys(title.partition(" (")[2].removesuffix(")") for title in titles))
        for titles in (judged, panels)
    )
    on = "" if where == everywhere else f" on {listed(where)}"
    for word, titles in found.items():
        if len(titles) == len(judged) > 2:
            return f"{word} every score{on}"
    words = [f"{word} {listed(by_metric(titles))}" for word, titles in found.items() if titles]
    return " and ".join(words) if words else f"makes no difference{on}"


def by_metric(titles: Sequence[str]) -> list[str]:
    """Each metric once: of "IoU (a)" and "IoU (b)", "IoU (a, b)"."""
    sets: dict[str, list[str]] = {}
    for title in titles:
        metric, _, data = title.removesuffix(")").partition(" (")
        sets.setdefault(metric, []).append(data)
    return [
        f"{metric} ({', '.join(names)})" if any(names) else metric for metric, names in sets.items()
    ]


def listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
