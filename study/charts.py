"""Charts of the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from tables import NAMES, Panels, paired, values_of

COLUMNS = 4, 3  # panels side by side: the first that leaves no gap, else the first


def draw_differences(panels: Panels, path: Path) -> None:
    """A panel for each metric: a dot for each seed, a bar for their mean, a gray band of the range
    of cross-entropy over seeds.
    """
    losses = list(dict.fromkeys(x for rows, _ in panels.values() for x in rows if x != "ce"))
    columns = next((n for n in COLUMNS if len(panels) % n == 0), COLUMNS[0])
    count = -(-len(panels) // columns)  # rows of panels
    size = 2.6 * columns + 1.6, count * (0.36 * len(losses) + 0.9) + 0.2
    figure = Figure(size, layout="constrained")
    axes = figure.subplots(count, columns, sharey=True, squeeze=False).ravel()
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, (rows, metric)) in zip(axes, panels.items(), strict=False):
        spread = np.ptp(values_of(rows, "ce", metric))
        axis.axvspan(-spread, spread, color="0.9")
        axis.axvline(0, color="0.5", linewidth=0.8)
        for k, loss in enumerate(losses):
            if loss in rows:
                each = np.subtract(*paired(rows, loss, metric))
                axis.plot(each, [k] * len(each), "o", color="tab:blue", markersize=4)
                axis.plot([each.mean()], [k], "|", color="black", markersize=12)
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(left=False)
    axes[0].set_yticks(range(len(losses)), [NAMES[loss] for loss in losses])
    axes[0].invert_yaxis()
    figure.supxlabel("percent points more than cross-entropy", fontsize=10)
    save(figure, path)


def draw_curves(curves: dict[str, list[list[tuple[int, float]]]], path: Path) -> None:
    """A panel for each title, a line for each seed: the validation split by step."""
    figure = Figure((3.2 * len(curves), 2.6), layout="constrained")
    for axis, (title, lines) in zip(
        figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True
    ):
        for line in lines:
            axis.plot(*zip(*line, strict=True), color="tab:blue", linewidth=1, marker=".")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supylabel("cross-entropy", fontsize=10)
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
