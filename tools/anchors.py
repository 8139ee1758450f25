"""Draws docs/instance-anchors.png: one offset with both anchors, on a row of ids.

python tools/anchors.py
"""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

import tritonaff
from tritonaff.options import Anchor
from tritonaff.plotting import OKABE_ITO

PICTURE = Path(__file__).parent.parent / "docs" / "instance-anchors.png"
IDS = [7, 7, 7, 7, 4, 4, 4, 0, 0]
OFFSET = -2
# The numbers repeat the meaning of the colours.
COLOURS = {1: OKABE_ITO["sky blue"], 0: OKABE_ITO["orange"], 255: "0.93"}


def row(axis: Axes, height: float, values: list[int], colours: list[str], name: str) -> None:
    axis.text(-0.3, height, name, ha="right", va="center")
    for x, (value, colour) in enumerate(zip(values, colours, strict=True)):
        axis.add_patch(Rectangle((x, height - 0.4), 1, 0.8, facecolor=colour, edgecolor="black"))
        text = "-" if value == 255 else str(value)
        axis.text(x + 0.5, height, text, ha="center", va="center")


def main() -> None:
    figure = Figure((6.4, 3.9), layout="constrained")
    axis = figure.subplots()
    row(axis, 0, IDS, ["white"] * len(IDS), "ids")
    anchors: tuple[tuple[Anchor, int], ...] = (("source", 1), ("destination", -1))
    for anchor, side in anchors:
        (target,) = tritonaff.instance_affinity_target(
            torch.tensor([[IDS]]), [(0, OFFSET)], anchor=anchor
        )
        values = target.flatten().tolist()
        row(axis, 2.2 * side, values, [COLOURS[value] for value in values], f"target,\n{anchor}")
        for x, value in enumerate(values):
            if value != 255:  # from the voxel that has the value to the other one
                other = x + OFFSET * side
                axis.add_patch(
                    FancyArrowPatch(
                        (x + 0.5, 1.75 * side), (other + 0.5, 0.45 * side),
                        arrowstyle="-|>", mutation_scale=11, color="0.25",
                    )
                )  # fmt: skip
    axis.set_xlim(-2.2, len(IDS) + 0.1)
    axis.set_ylim(-3.3, 2.8)
    axis.set_title(f"offset {OFFSET}: from a voxel with a value to the other voxel of its pair")
    axis.text(4.5, -3.0, "1: one instance   0: not   -: no pair", ha="center", va="center")
    axis.axis("off")
    figure.savefig(PICTURE, dpi=110)


if __name__ == "__main__":
    main()
