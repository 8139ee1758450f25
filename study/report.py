"""The report of the study, docs/study.md with its charts, from the JSON files of its results.

The report computes from these files everything that depends on a result: every number, and every
verdict on a loss or on a claim.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import end_to_end
import frozen
import numpy as np
from charts import draw_differences
from claims import claims, structure_table
from page import Page
from tables import (
    CHART,
    METRICS,
    NAMES,
    PROPAGATED,
    THIN,
    TITLE,
    Panels,
    class_metrics,
    listed,
    mean_of,
    paired,
    short_cell,
    table,
    values_of,
    verdict,
)


def write(results: Path, docs: Path) -> Path:
    page = Page(results, docs)
    first_page(page)
    claims(page)
    structure_table(page)
    end_to_end.section(page)
    frozen.sections(page)
    return page.write()


FIRST_PAGE = (
    *("F1 at 2 pixels", "clDice", "F1 at 0.5"),
    *("mIoU", "IoU of thin classes", "boundary F, 1 pixel"),
)


def headline(page: Page) -> Panels:
    """The metrics of the first page, by title: of networks trained end to end; of frozen features
    where there are none.
    """
    found: Panels = {}
    whole = end_to_end.data_sets(page)
    for name in whole:
        rows = end_to_end.rows_of(page, name)
        for title, metric in end_to_end.metrics_of(page, name).items():
            if title in FIRST_PAGE:
                found[f"{title} ({TITLE[name]})"] = rows, metric
    for name in page.study["data"]:
        rows = page.rows(name)
        if len(rows) > 1 and name not in whole:
            classes = page.study["data"][name]["classes"]
            title = f"({TITLE[name]}{', frozen' * bool(whole)})"
            found[f"mIoU {title}"] = rows, METRICS["mIoU"]
            if name == "camvid":
                thin = mean_of(class_metrics(classes, THIN))
                found[f"IoU of thin classes {title}"] = rows, thin
            found[f"boundary F {title}"] = rows, METRICS["boundary F"]
    return found


def first_page(page: Page) -> None:
    found = headline(page)
    losses = [loss for loss in NAMES if any(loss in rows for rows, _ in found.values())]
    tried = {loss for name in page.study["data"] for loss in page.rows(name)} - set(losses)
    elsewhere = [NAMES[loss].removeprefix("+ ") for loss in NAMES if loss in tried]
    page.say("# Does it help? A controlled study", " ".join(sentences(page, found, losses)))
    scores = [f"{np.mean(values_of(rows, 'ce', metric)):.1f}" for rows, metric in found.values()]
    lines = [[NAMES["ce"], *scores]]
    for loss in losses:
        if loss != "ce":
            cells = [
                short_cell(*paired(rows, loss, metric)) if loss in rows else ""
                for rows, metric in found.values()
            ]
            lines.append([NAMES[loss], *cells])
    page.say(
        table(["minus cross-entropy", *found], lines),
        "Mean differences in percent points, bold where they exceed the spread over seeds: the "
        "larger range of the two losses; of cross-entropy the scores. The chart has each seed:",
    )
    shown = {
        title.replace(" (", "\n("): (
            {loss: rows[loss] for loss in losses if loss in rows and loss != PROPAGATED},
            metric,
        )
        for title, (rows, metric) in found.items()
    }
    draw_differences(shown, page.picture("differences", "Differences to cross-entropy"))
    page.say(
        CHART,
        *([about] if (about := end_to_end.undertrained(page)) else ()),
        *([FROZEN] if any("frozen" in title for title in found) else ()),
        *([THRESHOLD] if end_to_end.data_sets(page) else ()),
        *(
            [f"On frozen features alone, further below: {'; '.join(elsewhere)}."]
            if elsewhere
            else ()
        ),
        READING,
    )


def sentences(page: Page, found: Panels, losses: list[str]) -> list[str]:
    """The five sentences of the first page."""
    runs = len(page.study["runs"]) + len(page.finetune["runs"] if page.finetune else ())
    seeds = {len(seeds) for rows, _ in found.values() for seeds in rows.values()}
    counts = f"{min(seeds)} to {max(seeds)}" if len(seeds) > 1 else f"{max(seeds)}"
    dilated = [loss for loss in ("ce+dilated", PROPAGATED) if loss in losses]
    others = [x for x in losses if x not in ("ce", *FIELDS, *dilated)]
    whole = ", in the table trained end to end" * bool(end_to_end.data_sets(page))
    told = [
        f"**Five sentences.** {runs} trainings, choices of settings included, compare losses on "
        f"the same network with the same batches{whole}, {counts} seeds for each loss; a "
        "difference is one above the spread over seeds.",
        *(
            f"{start}, {verdicts(found, names)}."
            for start, names in (
                ("Beside cross-entropy", FIELDS),
                ("By comparison", others),
                ("With a head of its own", dilated),
            )
            if names
        ),
    ]
    if page.cost is not None:
        base = page.cost["losses"]["ce"]["ms"]
        ratios = [
            f"{page.cost['losses'][loss]['ms'] / base:.2f} ({NAMES[loss].removeprefix('+ ')})"
            for loss in (*FIELDS, "ce+ar", "ce+dilated")
        ]
        told.append(
            f"A step of the small decoder takes {listed(ratios)} times as long as with "
            "cross-entropy; inference takes no longer, but for a CRF and propagation."
        )
    return told


FIELDS = "ce+affinity", "ce+aaf"


def verdicts(found: Panels, losses: Sequence[str]) -> str:
    return "; ".join(f"{NAMES[x].removeprefix('+ ')} {verdict(found, x)}" for x in losses)


FROZEN = '"Frozen": a small decoder on frozen features; the others are trained end to end.'
THRESHOLD = (
    "Scores of cracks and membranes are at the threshold of the probability that is best for the "
    'score on the validation split, but for "at 0.5", without a choice: a loss that moves '
    "probabilities towards 0 and 1, and segments no better, gains there alone."
)
READING = (
    "**How to read the rest.** Numbers are percent, of the test split if nothing else is said: the "
    "mean over seeds and, in brackets, the smallest and the largest. Tables of differences "
    "subtract cross-entropy with the same seed: the mean and, in brackets, each seed's difference. "
    "With normally spread scores and no effect, the mean would still exceed the spread one time in "
    "five with two seeds, in twenty with three and in 400 with five, and there are many cells "
    "below: do not rely on a single cell. One seed allows no judgement at all. "
    "`study/study.py report` writes everything on this page, verdicts included, from [the results](https://github.com/tritonaff/tritonaff/tree/main/docs/results/study)."
)
