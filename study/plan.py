"""The runs of the study, and what they are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from architecture import STRIDE


@dataclass(frozen=True)
class Run:
    """A complete description of one training: equal descriptions are the same training."""

    data: str  # camvid, isbi or daylight
    loss: str
    steps: int
    batch_size: int
    weight: float = 1.0
    options: tuple[tuple[str, Any], ...] = ()  # of the loss
    learning_rate: float = 1e-2
    resolution: str = "logits"  # at which the loss compares; or "image"
    seed: int = 0  # of initial weights and batches

    @property
    def stride(self) -> int:
        """Pixels of the image for one of the labels that the loss compares."""
        return STRIDE if self.resolution == "logits" else 1

    @property
    def name(self) -> str:
        """A file name."""
        words = [self.data, self.loss, f"{self.weight:g}"]
        for key, value in self.options:
            words.append(key + "".join(c for c in str(value) if c.isalnum() or c == ","))
        words += [f"{self.steps}x{self.batch_size}", f"lr{self.learning_rate:g}"]
        words += ["image"] * (self.resolution == "image")
        return "-".join([*words, f"seed{self.seed}"])


SEEDS = (0, 1, 2)
FULL = {
    "camvid": Run("camvid", "ce", steps=500, batch_size=8),
    "isbi": Run("isbi", "ce", steps=200, batch_size=4),
}
SHORT = {"camvid": 150, "isbi": 60}  # steps
LEARNING_RATES = (3e-3, 1e-2, 3e-2)
# Candidates for the weight of each loss: beta of "ce+dilated", w0 of "unet".
WEIGHTS: dict[str, tuple[float, ...]] = {
    "ce+affinity": (0.3, 1.0, 3.0),
    "ce+aaf": (0.3, 1.0, 3.0),
    "ce+ar": (0.1, 1.0, 10.0),
    "ce+dilated": (0.1, 0.5, 1.5),
    "ce+contrastive": (0.1, 1.0, 10.0),
    "ce+gan": (0.01, 0.1, 1.0),
    "unet": (1.0, 3.0, 10.0),
}

PUBLISHED = {"ce+affinity": 1.0, "ce+aaf": 1.0, "ce+ar": 0.1, "ce+dilated": 1.5}

Results = dict[str, dict[str, Any]]  # contents of the runs' files, by name
Plan = dict[str, list[Run]]  # by the table of the report


def make_plan(data: Sequence[str], results: Results) -> Plan:
    """All runs whose settings are known from the results so far, the most important first."""
    tables: Plan = {}
    chosen: dict[str, dict[str, Run]] = {}  # by data set and loss
    for name in data:
        base = FULL[name]
        short = replace(base, steps=SHORT[name])
        rates = [replace(short, learning_rate=rate) for rate in LEARNING_RATES]
        tables[f"{name} learning rate"] = rates
        if (best := best_of(rates, results)) is None:
            continue
        base, short = (replace(run, learning_rate=best.learning_rate) for run in (base, short))
        trials = {
            loss: [replace(short, loss=loss, weight=weight) for weight in weights]
            for loss, weights in WEIGHTS.items()
        }
        tables[f"{name} weights"] = [run for runs in trials.values() for run in runs]
        winners = {loss: best_of(runs, results) for loss, runs in trials.items()}
        if None in winners.values():
            continue
        chosen[name] = {"ce": base} | {
            loss: replace(base, loss=loss, weight=winner.weight) for loss, winner in winners.items()
        }
        tables[name] = seeded(chosen[name].values())
    if "camvid" in chosen:
        tables |= ablations(chosen["camvid"])
    return tables


def best_of(runs: list[Run], results: Results) -> Run | None:
    """The run with the highest mIoU on the validation split; None until all runs are done."""
    if any(run.name not in results for run in runs):
        return None
    return max(runs, key=lambda run: results[run.name]["val"][-1]["miou"])


def seeded(runs: Sequence[Run]) -> list[Run]:
    """All runs with the first seed, then all with the second."""
    return [replace(run, seed=seed) for seed in SEEDS for run in runs]


def ablations(chosen: dict[str, Run]) -> Plan:
    """The many further runs on CamVid, most of them shorter. Some are the runs of a weight."""
    short = {loss: replace(run, steps=SHORT["camvid"]) for loss, run in chosen.items()}
    sizes = [
        replace(short["ce+aaf"], options=() if sizes == (3, 5, 7) else (("kernel_sizes", sizes),))
        for sizes in ((3,), (3, 5), (3, 5, 7))
    ]
    daylight = [replace(short[x], data="daylight") for x in ("ce", "ce+affinity", "ce+aaf")]
    weightings = [
        replace(
            short["ce+dilated"],
            options=() if weighting == "sqrt" else (("weighting", weighting),),
            weight=beta,
        )
        for weighting in ("none", "signal", "neighbor", "sqrt")
        for beta in WEIGHTS["ce+dilated"][:2]
    ]
    rates = [
        replace(short["ce+dilated"], options=() if rates == (8, 16) else (("rates", rates),))
        for rates in ((8, 16), (8, 16, 32), (8, (12, 24), 16))
    ]
    resolution = [
        replace(short["ce+affinity"], resolution=resolution, steps=SHORT["camvid"] // 2)
        for resolution in ("logits", "image")
    ]
    published = [replace(chosen[loss], weight=weight) for loss, weight in PUBLISHED.items()]
    return {
        "published": seeded([chosen["ce"], *published]),
        "sizes": seeded([short["ce"], *sizes]),
        "transfer": seeded(daylight),
        "weightings": seeded([short["ce"], *weightings]),
        "rates": seeded(rates),
        "resolution": resolution,
    }


def is_choice(table: str) -> bool:
    """True if the runs of this table choose a setting, on the validation split alone."""
    return table.endswith(("learning rate", "weights"))
