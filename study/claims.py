"""The claims of the three papers, one by one, against the results; and Table 1 of the AAF paper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import end_to_end
import numpy as np
from frozen import (
    dilated_rows,
    propagated_miou,
    rates_of,
    signal_accuracy,
    sizes_of,
    weighting_of,
)
from page import Page
from tables import (
    CRF,
    METRICS,
    NAMES,
    PROPAGATED,
    THIN,
    TITLE,
    Metric,
    Rows,
    Scores,
    by_class,
    class_metrics,
    differs,
    mean_of,
    paired,
    table,
    value_cell,
    values_of,
)

AAF, AR, DILATED = "AAF", "affinity regression", "dilated affinity"


class Case(NamedTuple):
    """Something measured twice, with the seeds that both have."""

    name: str
    values: Sequence[float]
    others: Sequence[float]

    @property
    def change(self) -> float:
        return float(np.mean(self.values) - np.mean(self.others))

    @property
    def counts(self) -> bool:
        return differs(self.values, self.others)

    def __str__(self) -> str:
        change = f"{self.change:+.1f}"
        words = f"{self.name} {f'**{change}**' if self.counts else change}"
        return words if len(self.values) > 1 else f"{words} (one seed)"


def case(name: str, rows: Rows, loss: str, metric: Metric, base: str = "ce") -> list[Case]:
    """One case, or none where a side was not measured."""
    if loss not in rows or base not in rows:
        return []
    values, others = paired(rows, loss, metric, base)
    return [Case(name, values, others)] if values else []


def judged(
    paper: str, claim: str, cases: Sequence[Case], rises: bool = True, every: bool = False
) -> list[str]:
    """A line of the table. A claim holds where the change exceeds the spread over seeds; if it is
    about ``every`` case, such as the best of several, it does not hold in part.
    """
    tested = [c for c in cases if len(c.values) > 1]
    right = [c.counts and (c.change > 0) == rises for c in tested]
    wrong = [c.counts and (c.change > 0) != rises for c in tested]
    if not cases:
        said = "not measured yet"
    elif not tested:
        said = "not testable: one seed"
    elif all(right):
        said = "held"
    elif any(right) and not every:
        said = "mixed" if any(wrong) else "held in part"
    elif all(wrong):
        said = "not held: the reverse"
    elif any(right) or any(wrong):
        said = "not held"
    else:
        said = "not held, no difference"
    return [paper, claim, "; ".join(map(str, cases)), said]


def claims(page: Page) -> None:
    lines = [*of_aaf(page), *of_regression(page), *of_dilated(page)]
    lines.append(
        [
            "all",
            "the scores on VOC, Cityscapes, GTA5 and NYUv2",
            "",
            "not testable here: those data sets and networks need GPUs",
        ]
    )
    page.say(
        "## What the papers claim",
        "Changes in percent points, the test split, bold where the change exceeds the spread over "
        "seeds: a claim is held where the bold change has the claimed sign on all sets named, held "
        "in part where on some, mixed where another has the opposite; that one of several is "
        "best is held where each other is below. Frozen features if nothing else is said; of the "
        "networks trained end to end, CamVid's, as cracks and membranes are one class.",
        table(["paper", "claim", "here", "verdict"], lines),
    )


def of_aaf(page: Page) -> list[list[str]]:
    camvid, isbi = page.rows("camvid"), page.rows("isbi")
    sets = {"CamVid": camvid, "ISBI 2012": isbi}
    miou, classes = METRICS["mIoU"], page.study["data"]["camvid"]["classes"]
    thin = mean_of(class_metrics(classes, THIN))
    rest = mean_of(class_metrics(classes, [name for name in classes if name not in THIN]))
    lines = []
    for loss, words in (("ce+affinity", "affinity fields raise"), ("ce+aaf", "AAF raises")):
        cases = [c for name, rows in sets.items() for c in case(name, rows, loss, miou)]
        cases += end_to_end_miou(page, loss)
        lines.append(judged(AAF, f"{words} mIoU (Tables 2 to 5)", cases))
    cases = [c for n, r in sets.items() for c in case(n, r, "ce+aaf", miou, "ce+affinity")]
    cases += end_to_end_miou(page, "ce+aaf", "ce+affinity")
    lines.append(judged(AAF, "AAF raises mIoU above one fixed size (Tables 2, 3)", cases))
    whole = end_to_end.rows_of(page, "camvid")
    for loss in ("ce+affinity", "ce+aaf"):
        shown, gains = [], []
        for name, rows in (("", camvid), ("end to end, ", whole)):
            gain = case(f"{name}thin", rows, loss, thin)
            more = case(f"{name}thin minus other", rows, loss, lambda s: thin(s) - rest(s))
            shown += [*gain, *case(f"{name}other classes", rows, loss, rest), *more]
            gains += [*gain, *more]
        claim = f"thin classes gain most: {NAMES[loss].removeprefix('+ ')} (5.1)"
        line = judged(AAF, claim, gains, every=True)
        line[2] = f"CamVid: {'; '.join(map(str, shown))}"
        lines.append(line)
    cases = [
        c for n, r in sets.items() for c in case(n, r, "ce+aaf", METRICS["instance-wise mIoU"])
    ]
    lines.append(judged(AAF, "AAF raises instance-wise mIoU (Tables 6, 7)", cases))
    lines.append(recall_line("CamVid", camvid, "boundary_recall", classes))
    if "ce+aaf" in whole:
        lines.append(recall_line("CamVid, end to end", whole, "boundary_recall_1", classes))
    lines.append(sizes_line(page, classes))
    rows = page.rows("sizes", sizes_of)
    cases = case("{3, 5} minus {3}", rows, "{3, 5}", miou, "{3}")
    cases += case("{3, 5} minus {3, 5, 7}", rows, "{3, 5}", miou, "{3, 5, 7}")
    lines.append(judged(AAF, "the sizes 3 and 5 are best (Table 10)", cases, every=True))
    transfer = page.rows("transfer")
    cases = [
        c
        for name in ("mIoU", "pixel accuracy")
        for c in case(name, transfer, "ce+aaf", METRICS[name])
    ]
    lines.append(judged(AAF, "AAF generalises: CamVid, day to dusk (5.5)", cases))
    cases = [
        c
        for base in ("ce+contrastive", "ce+gan", CRF)
        for c in case(f"minus {NAMES[base]}", camvid, "ce+aaf", miou, base)
    ]
    claim = "AAF has a higher mIoU than embeddings, GAN and CRF (Tables 1 to 3)"
    return [*lines, judged(AAF, claim, cases, every=True)]


def end_to_end_miou(page: Page, loss: str, base: str = "ce") -> list[Case]:
    """mIoU of the networks that are trained whole on CamVid."""
    rows = end_to_end.rows_of(page, "camvid")
    return case("CamVid, end to end", rows, loss, METRICS["mIoU"], base)


def recall_line(title: str, rows: Rows, key: str, classes: Sequence[str]) -> list[str]:
    """Boundary recall rises in every class."""
    recall = by_class(key)
    cases = [
        c
        for k, name in enumerate(classes)
        for c in case(name, rows, "ce+aaf", lambda s, k=k: float(recall(s)[k]))
    ]
    line = judged(AAF, "boundary recall rises in every class: AAF (Tables 8, 9)", cases)
    if cases:
        up = sum(c.counts and c.change > 0 for c in cases)
        least = min(cases, key=lambda c: c.change)
        line[2] = f"{title}: rises in {up} of {len(cases)}; least: {least}"
    return line


def sizes_line(page: Page, classes: Sequence[str]) -> list[str]:
    """Thin classes learn smaller sizes than the other classes; the paper itself has exceptions."""
    thin = np.isin(classes, THIN)
    runs = [run for run in page.named("camvid") if run["run"]["loss"] == "ce+aaf"]
    sizes = [np.array(run["edge_weight"]) @ (3, 5, 7) for run in runs]
    cases = []
    if sizes:
        each = [s[thin].mean() for s in sizes], [s[~thin].mean() for s in sizes]
        cases = [Case("thin minus other, mean size", *each)]
    claim = "finer classes learn smaller sizes: person 3.1, dog 3.4, but plant 4.5 (5.4, Fig. 4)"
    line = judged(AAF, claim, cases, rises=False)
    if cases:
        words = (
            f"{name} {np.mean(v):.2f}" for name, v in zip(("thin", "other"), each, strict=True)
        )
        line[2] = f"mean size, CamVid: {', '.join(words)}"
    return line


def of_regression(page: Page) -> list[list[str]]:
    lines, cases = [], []
    for data in ("camvid", "isbi"):
        after = {
            loss: {
                run["run"]["seed"]: 100 * run["val"][-1]["ar"]
                for run in page.named(data)
                if run["run"]["loss"] == loss
            }
            for loss in ("ce", "ce+ar")
        }
        both = sorted(after["ce"].keys() & after["ce+ar"].keys())
        if both:
            values, others = ([after[loss][k] for k in both] for loss in ("ce+ar", "ce"))
            cases.append(Case(f"{TITLE[data]}, 100 times the loss", values, others))
    claim = "the AR loss of the validation split falls, against the same steps without (4.3)"
    lines.append(judged(AR, claim, cases, rises=False))
    miou = METRICS["mIoU"]
    cases = [c for d in ("camvid", "isbi") for c in case(TITLE[d], page.rows(d), "ce+ar", miou)]
    cases += case("CamVid, weight 0.1", page.rows("published"), "ce+ar", miou)
    cases += end_to_end_miou(page, "ce+ar")
    lines.append(judged(AR, "mIoU rises (Tables 1, 3)", cases))
    if page.cost is not None:
        ratio = page.cost["losses"]["ce+ar"]["ms"] / page.cost["losses"]["ce"]["ms"]
        said = "held" if ratio < 1.1 else "not held"
        lines.append([AR, "little computation is added", f"{ratio:.2f} times a step", said])
    return lines


def of_dilated(page: Page) -> list[list[str]]:
    miou, loss = METRICS["mIoU"], "ce+dilated"
    sets = {TITLE[name]: page.rows(name) for name in ("camvid", "isbi")}
    lines = []
    cases = [c for n, r in sets.items() for c in case(n, r, loss, miou)]
    short = dilated_rows(page, "weightings", weighting_of)
    cases += case("CamVid, fewer steps, β 0.1", short, "sqrt, β 0.1", miou)
    cases += end_to_end_miou(page, loss)
    lines.append(judged(DILATED, "joint training raises mIoU (Table 1)", cases))
    cases = case("CamVid", page.rows("published"), loss, miou)
    lines.append(judged(DILATED, "joint training with β 1.5, the paper's, raises mIoU", cases))
    cases = case("CamVid, 0.5 minus 0.1", short, "sqrt, β 0.5", miou, "sqrt, β 0.1")
    lines.append(judged(DILATED, "too large a β harms (3.2)", cases, rises=False))
    lines += [*weighting_lines(page), *rate_lines(page)]
    cases = [c for n, r in sets.items() for c in case(n, r, PROPAGATED, miou, loss)]
    cases += end_to_end_miou(page, PROPAGATED, loss)
    claim = "10 iterations along the predicted affinity raise mIoU (Tables 3, 4)"
    lines.append(judged(DILATED, claim, cases))
    cases = []
    for data in ("camvid", "isbi"):
        found = [
            r["scores"]["propagation"] for r in page.named(data) if "propagation" in r["scores"]
        ]
        if found:
            true = 100 * np.array(found)[:, 1]
            cases.append(Case(TITLE[data], true[:, -1].tolist(), true[:, 0].tolist()))
    claim = "10 iterations along the true affinity raise mIoU (Tables 3, 4)"
    return [*lines, judged(DILATED, claim, cases)]


def weighting_lines(page: Page) -> list[list[str]]:
    """Each weighting is judged at the β that is best on the validation split."""
    every = dilated_rows(page, "weightings", weighting_of)
    labels = sorted(every.keys() - {"ce"}, key=lambda x: np.mean(values_of(every, x, choice)))
    rows = {label.split(",")[0]: every[label] for label in labels}  # the last is the best
    names = sorted(rows)
    lines = []
    for claim, best, metric in (
        ('"sqrt" has the highest mIoU of the weightings (Table 1)', "sqrt", METRICS["mIoU"]),
        (
            '"neighbor" has the highest accuracy for n0 to n3 (Fig. 4)',
            "neighbor",
            signal_accuracy(0, 3),
        ),
    ):
        cases = [
            c
            for other in names
            if other != best
            for c in case(f'minus "{other}"', rows, best, metric, other)
        ]
        lines.append(judged(DILATED, claim, cases, every=True))
    return lines


def choice(scores: Scores) -> float:
    return scores["val"]


def rate_lines(page: Page) -> list[list[str]]:
    rows, paper = dilated_rows(page, "rates", rates_of), "{8, 16}"
    others = [name for name in rows if name != paper]

    def gain(scores: Scores) -> float:
        return propagated_miou(scores) - METRICS["mIoU"](scores)

    train = [c for x in others for c in case(f"minus {x}", rows, paper, METRICS["mIoU"], x)]
    spread = [c for x in others for c in case(f"{x} minus {paper}", rows, x, gain, paper)]
    return [
        judged(DILATED, "the rates 8 and 16 train best (Table 2)", train, every=True),
        judged(DILATED, "more rates propagate better (Table 4)", spread),
    ]


def structure_table(page: Page) -> None:
    """Table 1 of the AAF paper, with the numbers of this study."""
    rows, cost = page.rows("camvid"), page.cost["losses"] if page.cost else {}
    crf = [run["scores"]["crf_ms"] for run in page.named("camvid") if "crf_ms" in run["scores"]]
    guides = {
        "ce": "none",
        CRF: "input image",
        "ce+gan": "ground-truth labels",
        "ce+contrastive": "label affinity, in features",
        "ce+affinity": "label affinity",
        "ce+aaf": "label affinity",
        "ce+ar": "label affinity, at any distance",
        "ce+dilated": "label affinity, in a head of its own",
    }
    lines = []
    for loss, guide in guides.items():
        if loss in rows:
            source = "ce" if loss == CRF else loss
            ratio = f"{cost[source]['ms'] / cost['ce']['ms']:.2f}" if source in cost else ""
            extra = f"{np.median(crf):.0f} ms of CPU time an image" if loss == CRF else "no"
            score = value_cell(values_of(rows, loss, METRICS["mIoU"]))
            spread = np.ptp(values_of(rows, loss, METRICS["mIoU"]))
            lines.append([NAMES[loss], guide, ratio, f"{spread:.1f}", extra, score])
    page.say(
        "## Table 1 of the AAF paper, with the numbers of this study",
        "CamVid, frozen features. Training: the time of a step, cross-entropy's being 1, and the "
        'range of mIoU over seeds in place of the words "easy" and "hard". The paper: CRF 76.53, '
        "GAN 76.20, AAF 79.24 on Cityscapes.",
        table(
            ["", "structure guidance", "step", "range", "run-time inference", "mIoU"],
            lines,
        ),
    )
