"""The page that the report writes: paragraphs, pictures beside them, and the results."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from textwrap import fill
from typing import Any

from tables import CRF, PROPAGATED, Rows

Result = dict[str, Any]  # the content of a run's file
BESIDE = {"propagated": PROPAGATED, "crf": CRF}  # rows of their own, by the key in scores


class Page:
    def __init__(self, results: Path, docs: Path) -> None:
        self.study = json.loads((results / "study.json").read_text())
        self.cost, self.finetune, self.propagation = (
            json.loads(path.read_text()) if path.exists() else None
            for name in ("cost", "finetune", "propagation")
            for path in [results / f"{name}.json"]
        )
        self.docs, self.parts = docs, []
        self.docs.mkdir(parents=True, exist_ok=True)

    def say(self, *parts: str) -> None:
        """Adds paragraphs; a paragraph of one line is wrapped."""
        for part in parts:
            wrap = "\n" not in part and not part.startswith(("#", "!", "|"))
            self.parts.append(fill(part, 100, break_on_hyphens=False) if wrap else part)

    def picture(self, name: str, text: str) -> Path:
        self.say(f"![{text}](study-{name}.png)")
        return self.docs / f"study-{name}.png"

    def write(self) -> Path:
        path = self.docs / "study.md"
        path.write_text("\n\n".join(self.parts) + "\n")
        return path

    # Decoders on frozen features.

    def named(self, name: str) -> list[Result]:
        """The runs of a table that are scored."""
        runs = (self.study["runs"][run] for run in self.study["tables"].get(name, ()))
        return [run for run in runs if "scores" in run]

    def rows(self, name: str, label: Callable[[Result], str] | None = None) -> Rows:
        """Scores by loss, or by the ``label`` of a run."""
        rows: Rows = {}
        for result in self.named(name):
            run, scores = result["run"], result["scores"]
            rows.setdefault(label(run) if label else run["loss"], {})[run["seed"]] = scores["test"]
            for key, row in BESIDE.items():
                if key in scores:
                    rows.setdefault(row, {})[run["seed"]] = scores[key]
        return rows
