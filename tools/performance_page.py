"""Writes docs/performance.md from docs/results/: the figures with an aim, and the verdicts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Criterion:
    """A figure with an aim: its title, and the rows and the value that decide."""

    title: str
    row: str
    value: str
    least: float
    aim: float
    dtype: str | None = None
    """Only rows of this dtype count; without a dtype, all rows."""

    @property
    def more_is_better(self) -> bool:
        return self.aim > self.least

    @property
    def tests(self) -> str:
        """The tests that must have passed on the device before a figure counts."""
        return f"test_{TESTS[self.row.partition('_')[0]]}.py"

    def holds(self, value: float) -> str:
        """ "aim", "yes" or "no"."""
        sign = 1 if self.more_is_better else -1
        if sign * value >= sign * self.aim:
            return "aim"
        return "yes" if sign * value >= sign * self.least else "no"

    def bound(self, value: float) -> str:
        return f"{'≥' if self.more_is_better else '≤'} {value:g}"


# Test files by the first word of a row's name.
TESTS = {
    "field": "affinity_field",
    "grids": "affinity_regression",
    "every": "affinity_regression",
    "dilated": "dilated_affinity",
    "propagation": "affinity_propagation",
    "instances": "instance_affinity",
    "boxes": "box_pairwise",
    "compile": "compile",
}
CRITERIA = (
    Criterion("affinity field, times as fast as eager", "field_against_eager", "ratio", 50, 200),
    Criterion("... as torch.compile", "field_against_compiled", "ratio", 8, 30),
    Criterion("cross-entropy + affinity field in one op, times cross-entropy, float32",
              "field_fused", "ratio", 2.5, 1.0, "float32"),
    Criterion("... bfloat16, against autocast", "field_fused", "ratio", 1.5, 0.8, "bfloat16"),
    Criterion("affinity field, extra peak memory, times the gradient",
              "field_memory", "ratio", 1.30, 1.05),
    Criterion("... launches, compiled, 60 x 60", "field_launches", "compiled_launches", 8, 4),
    Criterion("affinity regression 12 / 6, launches, compiled",
              "grids_launches", "compiled_launches", 4, 3),
    Criterion("... times cross-entropy", "grids", "ratio", 1.0, 0.3),
    Criterion("affinity regression, every pixel, times cross-entropy",
              "every_pixel", "ratio", 3.0, 1.2),
    Criterion("dilated affinity, forward, % of copy bandwidth", "dilated", "fwd_percent", 60, 85),
    Criterion("... backward", "dilated", "bwd_percent", 60, 85),
    Criterion("instance affinities, times binary cross-entropy with given targets",
              "instances", "ratio", 1.0, 0.75),
    Criterion("propagation, times as fast as eager", "propagation", "ratio", 10, 40),
    Criterion("seconds that the loss adds to compiling a step",
              "compile_seconds", "seconds", 5, 1),
)  # fmt: skip

HEAD = """# Performance

`python tools/gpu_suite.py report` writes this page from `docs/results/`: do not edit it by hand.

The aims are for five shapes of logits (16 x 21 x 60 x 60, 8 x 19 x 90 x 90, 8 x 19 x 512 x 512,
4 x 19 x 512 x 1024, 4 x 150 x 512 x 512), float32 and bfloat16, forward and backward. The yardstick
is `F.cross_entropy` on the same logits in the same run. "holds" is "yes" if every row reaches the
least, and "aim" if every row reaches the aim; the figure is the worst of the rows.
"""


def write_page(results: Path, page: Path) -> None:
    content = {path.name: json.loads(path.read_text()) for path in sorted(results.glob("*.json"))}
    lines = [HEAD]
    suites = {
        name: suite for name, suite in content.items() if suite.get("suite") and not suite["quick"]
    }
    for name, suite in suites.items():
        lines += [*_measured(name, suite), ""]
    if not any(_is_gpu(suite) for suite in suites.values()):
        lines += [
            "No GPU has been measured yet: `python tools/gpu_suite.py` measures one.",
            "",
        ]
    if "static.json" in content:
        lines += [*_implied(content["static.json"]), ""]
    if "cpu.json" in content:
        lines += [*_cpu(content["cpu.json"]), ""]
    page.write_text("\n".join(lines).rstrip() + "\n")


def _is_gpu(suite: dict[str, Any]) -> bool:
    return not suite["device"].startswith("CPU")


def table(columns: list[str], rows: list[list[str]]) -> list[str]:
    lines = [columns, ["---"] * len(columns), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def judged(suite: dict[str, Any]) -> Iterator[tuple[Criterion, list[tuple[str, dict[str, Any]]]]]:
    """Every criterion with the rows that it is judged by."""
    for criterion in CRITERIA:
        yield (
            criterion,
            [
                (key.partition(" ")[2], row)
                for key, row in suite["rows"].items()
                if key.split()[0] == criterion.row
                and (criterion.dtype is None or key.split()[1] == criterion.dtype)
            ],
        )


def _measured(name: str, suite: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{what} {version}" for what, version in suite["versions"].items())
    lines = [f"## Measured: {suite['device']}", "", f"{versions} ([{name}](results/{name})).", ""]
    verdicts = []
    for criterion, rows in judged(suite):
        measured = {key: row for key, row in rows if row["status"] == "ok"}
        values = {key: row[criterion.value] for key, row in measured.items()}
        missing = [f"{key}: {row['status']}" for key, row in rows if row["status"] != "ok"]
        worst, where, holds = "", "", "not measured"
        if values:
            where = (min if criterion.more_is_better else max)(values, key=values.__getitem__)
            worst, holds = f"{values[where]:.3g}", criterion.holds(values[where])
        if any(row["status"] == "failed" for _, row in rows):
            holds = f"no ({'; '.join(missing)})"
        tests = suite["rows"].get(f"correctness {criterion.tests}", {"status": "not run"})
        if rows and tests["status"] != "ok":
            holds = f"no ({criterion.tests}: {tests['status']})"
        elif any(row.get("commit") != tests.get("commit") for row in measured.values()):
            holds = f"no ({criterion.tests}: of another commit)"
        verdict = [criterion.title, worst, where, criterion.bound(criterion.least)]
        verdicts.append([*verdict, criterion.bound(criterion.aim), holds])
    lines += table(["", "measured", "at", "at least", "aim", "holds"], verdicts)
    clock = "`ms` and `ratio` are by the clock, one call at a time, the host's work included; "
    clock += "`device_ms` and `device_ratio` are of the kernels alone."
    lines += ["", f"Every row. {clock}", ""]
    cells = [
        [key, row["status"], "; ".join(_values(row)) or _words(row), row.get("commit", "")]
        for key, row in suite["rows"].items()
    ]
    return [*lines, *table(["row", "", "values", "commit"], cells)]


def _words(row: dict[str, Any]) -> str:
    return str(row.get("error") or row.get("summary", "")).partition("\n")[0]


def _values(row: dict[str, Any]) -> list[str]:
    return [f"{name} {value:.4g}" for name, value in row.items()
            if isinstance(value, (int, float)) and name != "took_s"]  # fmt: skip


# Operations and kernels of the static table from which a criterion is read.
IMPLIED = {
    "field_fused bfloat16": ("affinity_field_cross_entropy_bfloat16", None),
    "field_fused": ("affinity_field_cross_entropy", None),
    "grids": ("affinity_regression", None),
    "every_pixel": ("affinity_regression_every_pixel", None),
    "fwd_percent": ("dilated_affinity", "tables_kernel"),
    "bwd_percent": ("dilated_affinity", "gradient_kernel"),
}


def implied_by(criterion: Criterion) -> tuple[str, ...]:
    return f"{criterion.row} {criterion.dtype}", criterion.value, criterion.row


def _implied(static: dict[str, Any]) -> list[str]:
    """Figures of a compiler, named as such."""
    versions = static["versions"]
    lines = [
        "## Implied by the compiled kernels",
        "",
        f"Least times, from [static.json](results/static.json) (Triton {versions['triton']}): the "
        "larger of bytes / bandwidth",
        "and instructions / rate, of float32 at 8 x 19 x 512 x 512 (32 neighbours, 10 iterations), "
        "with caches that",
        "serve every second read. No number of this section is measured. Cross-entropy counts as 5 "
        "passes over the logits,",
        "and under autocast two conversions more. The figures hold for losses that nothing "
        "multiplies.",
        "",
    ]
    gpus = static["cross_entropy_ms"]
    rows = []
    for op in dict.fromkeys(row["op"] for row in static["implied"]):
        cells = [op]
        for gpu, yardstick in _yardsticks(static, op).items():
            ms = _implied_ms(static, op, gpu)
            cells += [f"{ms:.2f}", f"{ms / yardstick:.2f}"]
        rows.append(cells)
    columns = [f"{gpu}{unit}" for gpu in gpus for unit in (", ms", ", x cross-entropy")]
    lines += [*table(["", *columns], rows), ""]
    rows = []
    for criterion in CRITERIA:
        names = implied_by(criterion)
        op, kernel = next((IMPLIED[name] for name in names if name in IMPLIED), ("", None))
        if not any(row["op"] == op for row in static["implied"]):
            continue
        for gpu, yardstick in _yardsticks(static, op).items():
            value = _implied_ms(static, op, gpu) / yardstick
            if kernel:
                (value,) = (
                    row["percent_of_copy"]
                    for row in static["implied"]
                    if (row["op"], row["kernel"], row["gpu"]) == (op, kernel, gpu)
                )
            title = criterion.title
            if title.startswith("... "):
                title = f"{op.removesuffix('_bfloat16').replace('_', ' ')}: {title[4:]}"
            figure = f"{value:.0f}" if value >= 10 else f"{value:.2f}"
            cells = [title, gpu, figure, criterion.bound(criterion.least)]
            rows.append([*cells, criterion.bound(criterion.aim), criterion.holds(value)])
    return [*lines, *table(["", "GPU", "implied", "at least", "aim", "would hold"], rows)]


def _yardsticks(static: dict[str, Any], op: str) -> dict[str, float]:
    name = "autocast_cross_entropy_ms" if op.endswith("bfloat16") else "cross_entropy_ms"
    yardsticks: dict[str, float] = static[name]
    return yardsticks


def _implied_ms(static: dict[str, Any], op: str, gpu: str) -> float:
    rows = (row for row in static["implied"] if (row["op"], row["gpu"]) == (op, gpu))
    return sum(float(row["ms"]) for row in rows)


def _cpu(bench: dict[str, Any]) -> list[str]:
    """Native kernels, or portable operations where none was measured, against their rivals."""
    ms = {
        (row["op"], tuple(row["shape"]), row["impl"]): row["ms"]
        for row in bench["rows"]
        if (row["mode"], row["dtype"]) == ("fwd_bwd", "float32")
    }
    ours = "native" if any(impl == "native" for _, _, impl in ms) else "portable"
    rivals = {name: title for name, title in CPU_RIVALS.items() if name != ours}
    kind = "native kernels" if ours == "native" else "portable torch operations"
    lines = [
        "## Measured on a CPU",
        "",
        f"{bench['device']}, torch {bench['versions']['torch']} ([cpu.json](results/cpu.json)):",
        f"{kind}, float32, forward and backward. The columns after ms are the times of others",
        "divided by it. The yardstick is `F.cross_entropy` on the same logits and labels; for",
        "instance affinities, binary cross-entropy with given targets.",
        "",
    ]
    rows = []
    for (op, shape, impl), time in ms.items():
        if impl != ours:
            continue
        others = (ms.get((op, shape, name)) for name in rivals)
        factors = ["-" if other is None else _three_digits(other / time) for other in others]
        size = " x ".join(map(str, shape))
        rows.append([op.replace("_", " "), size, _three_digits(time), *factors])
    return [*lines, *table(["", "logits", "ms", *rivals.values()], rows)]


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


CPU_RIVALS = {
    "reference": "eager",
    "compiled": "torch.compile",
    "portable": "portable",
    "cross_entropy": "yardstick",
}
