"""Draws README.md's figures and writes its rows of speed.

    python tools/readme.py

The figures are docs/neighbors.png and docs/speed.png; the rows and the chart are measurements of
docs/results/cpu.json, which ``make bench ARGS="--json docs/results/cpu.json"`` measures again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tritonaff.plotting import OKABE_ITO

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- tools/readme.py writes the table -->\n", "<!-- end of the table -->\n"
BLUE, VERMILLION = OKABE_ITO["blue"], OKABE_ITO["vermillion"]

# A lamp post, 2 pixels wide, in front of the sky.
LABELS = [
    ".........",
    ".........",
    "..#####..",
    "..##.....",
    "...##....",
    "...##....",
    "...##....",
    "...##....",
    "...##....",
]
CENTRE = 4, 4  # row and column
MARGIN = 3.0

# The operations of the bench that README.md shows, with their names in the table and its chart.
OPERATIONS = {
    "affinity_field": "affinity field, 3 sizes",
    "affinity_regression_every_pixel": "affinity regression, every pixel",
    "dilated_affinity": "dilated affinity, 4 rates",
    "affinity_propagation": "propagation, 10 iterations, 4 rates",
    "instance_affinity": "instance affinity",
}
# The library's implementations on a CPU; the fastest that was measured is shown.
OURS = ("native", "portable")
RIVALS = {"reference": "eager", "compiled": "torch.compile"}


def main() -> None:
    draw_neighbors(ROOT / "docs/neighbors.png")
    bench = json.loads((ROOT / "docs/results/cpu.json").read_text())
    draw_speed(bench, ROOT / "docs/speed.png")
    readme = ROOT / "README.md"
    readme.write_text(with_table(readme.read_text(), bench))


# --------------------------------------------------------------------------- pairs and their loss


def draw_neighbors(path: Path) -> None:
    """A pixel with its neighbours at three sizes, and the loss of both kinds of pairs."""
    figure = Figure((11, 2.9))
    grid = {"width_ratios": [1, 1, 1, 1.55], "wspace": 0.1, "left": 0.005, "right": 0.995}
    *panels, curves = figure.subplots(1, 4, gridspec_kw={**grid, "bottom": 0.155, "top": 0.9})
    box = curves.get_position()  # leaves room for the names of its axes
    curves.set_position((box.x0 + 0.025, box.y0, box.width - 0.025, box.height))
    for axis, size in zip(panels, (3, 5, 7), strict=True):
        _draw_pairs(axis, size)
    _draw_curves(curves)
    figure.savefig(path, dpi=150)


def _draw_pairs(axis: Axes, size: int) -> None:
    distance, (row, column) = (size - 1) // 2, CENTRE
    axis.imshow([[0.72 if cell == "#" else 0.94 for cell in line] for line in LABELS],
                cmap="gray", vmin=0, vmax=1)  # fmt: skip
    for line in range(len(LABELS) + 1):
        axis.axhline(line - 0.5, color="white", linewidth=1)
        axis.axvline(line - 0.5, color="white", linewidth=1)
    for down in (-distance, 0, distance):
        for right in (-distance, 0, distance):
            if down == right == 0:
                continue
            y, x = row + down, column + right
            same = LABELS[y][x] == LABELS[row][column]
            axis.plot([column, x], [row, y], color=BLUE if same else VERMILLION, linewidth=1.5)
            axis.plot(x, y, "o" if same else "s", color=BLUE if same else VERMILLION, markersize=8)
    axis.plot(column, row, "o", color="black", markersize=9)
    axis.set_title(f"size {size}: {distance} pixel{'s' * (distance > 1)} away", fontsize=12)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)


def _draw_curves(axis: Axes) -> None:
    axis.plot([0, MARGIN], [0, MARGIN], color=BLUE, linewidth=2.5)
    axis.plot([0, MARGIN, 4.4], [MARGIN, 0, 0], color=VERMILLION, linewidth=2.5)
    axis.plot(0, 0, "o", color=BLUE, markersize=9, clip_on=False, zorder=3)
    axis.plot(0, MARGIN, "s", color=VERMILLION, markersize=9, clip_on=False, zorder=3)
    for end, start, colour in (((0.55, 0.75), (1.2, 1.4), BLUE),
                               ((1.2, 2.0), (0.55, 2.65), VERMILLION)):  # fmt: skip
        arrow = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.5, "mutation_scale": 14}
        axis.annotate("", end, start, arrowprops=arrow)
    texts: dict[str, Any] = {"va": "center", "fontsize": 11}
    axis.text(2.95, 2.4, "same label:\npulled to agree", color=BLUE, **texts)
    axis.text(2.75, 0.75, "other label: pushed\napart, to the margin", color=VERMILLION, **texts)
    axis.text(0.2, 3.35, "an undecided network starts here", va="center", fontsize=10)
    axis.set_xlim(0, 5.2)
    axis.set_ylim(0, 3.6)
    axis.set_xticks([0, MARGIN], ["0", "3, the margin"])
    axis.set_yticks([0, MARGIN], ["0", "3"])
    axis.set_xlabel("KL divergence of the two predictions")
    axis.set_ylabel("loss of the pair", labelpad=-2)
    axis.spines[["top", "right"]].set_visible(False)


# ------------------------------------------------------------------------------------------ speed


def rows_of_speed(bench: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each operation: the largest shape that eager mode has computed, forward and
    backward, with the rows of the bench by name, "ours" among them.
    """
    measured: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}
    for row in bench["rows"]:
        if (row["mode"], row["dtype"]) == ("fwd_bwd", "float32"):
            measured.setdefault((row["op"], tuple(row["shape"])), {})[row["impl"]] = row
    rows: dict[str, dict[str, Any]] = {}
    for (op, shape), by_name in measured.items():
        ours = [by_name[name] for name in OURS if name in by_name]
        if op not in OPERATIONS or "reference" not in by_name or not ours:
            continue
        row = {**by_name, "op": op, "shape": shape, "ours": min(ours, key=lambda row: row["ms"])}
        if op not in rows or row["reference"]["ms"] > rows[op]["reference"]["ms"]:
            rows[op] = row
    return [rows[op] for op in OPERATIONS if op in rows]


def with_table(readme: str, bench: dict[str, Any]) -> str:
    """README.md with the table of speed between its two marks."""
    before, _, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"README.md must hold the lines {BEGIN!r} and {END!r}")
    columns = ["forward and backward", "logits", *RIVALS.values(), "tritonaff", "cross-entropy"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in rows_of_speed(bench):
        name = OPERATIONS[row["op"]]
        if row["ours"]["impl"] != OURS[0]:
            name += f" ({row['ours']['impl']})"
        shape = " x ".join(map(str, row["shape"]))
        cells = [_cell(row.get(name)) for name in (*RIVALS, "ours", "cross_entropy")]
        cells[2] = f"**{cells[2]}**"
        lines.append(f"| {name} | {shape} | " + " | ".join(cells) + " |")
    device, torch = bench["device"].removeprefix("CPU "), bench["versions"]["torch"]
    note = f"\n{device}, torch {torch.partition('+')[0]}, float32; memory beyond the inputs.\n"
    return before + BEGIN + "\n".join(lines) + "\n" + note + END + after


def _cell(row: dict[str, Any] | None) -> str:
    return "" if row is None else f"{_digits(row['ms'])} ms, {_digits(row['peak_bytes'] / 1e6)} MB"


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def draw_speed(bench: dict[str, Any], path: Path) -> None:
    """How many times faster than eager mode and torch.compile."""
    rows = rows_of_speed(bench)[::-1]
    figure = Figure((8, 0.5 + 0.5 * len(rows)), layout="constrained")
    axis = figure.subplots()
    colours = {"reference": OKABE_ITO["sky blue"], "compiled": OKABE_ITO["orange"]}
    for k, (rival, name) in enumerate(RIVALS.items()):
        for y, row in enumerate(rows):
            if rival not in row:
                continue
            factor = row[rival]["ms"] / row["ours"]["ms"]
            place = y + 0.18 - 0.36 * k
            label = f"than {name}" if y == 0 else None
            axis.barh(place, factor - 1, 0.34, left=1, color=colours[rival], label=label)
            axis.text(max(factor, 1) * 1.06, place, f"{_digits(factor)} x", va="center", fontsize=9)
    axis.set_xscale("log")
    axis.axvline(1, color="black", linewidth=1)
    axis.set_yticks(range(len(rows)), [OPERATIONS[row["op"]] for row in rows])
    axis.set_xticks([1, 10, 100], ["1", "10", "100"])
    axis.minorticks_off()
    axis.margins(x=0.12)
    axis.tick_params(axis="y", length=0)
    axis.set_title("times as fast on two CPU cores", fontsize=10, loc="left")
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.legend(frameon=False, loc="lower right", reverse=False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
