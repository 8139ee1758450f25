"""The output of commands: tables, a progress bar, errors in one line, JSON files."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tritonaff.files import check_writable, replacing
from tritonaff.testing import ParityError


def run_command(
    program: str, command: Callable[[argparse.Namespace], int], args: argparse.Namespace
) -> int:
    """Exit status of ``command(args)``. Errors take one line on the standard error and return 1, an
    interrupt 130. An ``args.json`` that cannot be written is refused before any work.
    """
    try:
        if getattr(args, "json", None):
            check_writable(args.json)
        return command(args)
    except (OSError, ParityError, ValueError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replaces ``path`` in one step. A table, which is a list or a mapping of rows, takes a line
    for each row; every other value takes one line.
    """
    with replacing(path) as new:
        new.write_text(to_json(content))


def to_json(content: Mapping[str, Any]) -> str:
    entries = (f"{json.dumps(key)}: {_to_lines(value)}" for key, value in content.items())
    return "{\n" + ",\n".join(entries) + "\n}\n"


def _to_lines(value: Any) -> str:
    if isinstance(value, Mapping):
        rows = [f"{json.dumps(key)}: {json.dumps(row)}" for key, row in value.items()]
        are_rows = all(isinstance(row, (Mapping, list)) for row in value.values())
        first, last = "{}"
    elif isinstance(value, list):
        rows = [json.dumps(row) for row in value]
        are_rows = all(isinstance(row, (Mapping, list)) for row in value)
        first, last = "[]"
    else:
        return json.dumps(value)
    if not rows or not are_rows:
        return json.dumps(value)
    return first + "\n " + ",\n ".join(rows) + "\n" + last


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar on a terminal; nothing elsewhere."""
    if not sys.stderr.isatty() or not _has_rich():
        yield lambda what: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        started = False

        def step(what: str) -> None:
            nonlocal started
            bar.update(task, advance=1 if started else 0, description=what)
            started = True

        yield step


def print_table(title: str, columns: list[str], lines: list[list[str]]) -> None:
    """A table: rich on a terminal, plain text elsewhere."""
    if sys.stdout.isatty() and _has_rich():
        from rich.console import Console
        from rich.table import Table

        table = Table(
            title=title, title_justify="left", title_style="dim", box=None, pad_edge=False
        )
        for i, column in enumerate(columns):
            table.add_column(
                column, justify="right" if _numeric(lines, i) else "left", no_wrap=True
            )
        for line in lines:
            table.add_row(*line)
        Console().print(table)
        return
    print(title)
    widths = [max(len(line[i]) for line in (columns, *lines)) for i in range(len(columns))]
    for line in (columns, *lines):
        cells = [
            cell.rjust(width) if _numeric(lines, i) else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def _numeric(lines: list[list[str]], column: int) -> bool:
    cells = (line[column].replace(".", "", 1) for line in lines)
    return all(cell.isdigit() or cell in ("-", "") for cell in cells)


def _has_rich() -> bool:
    return importlib.util.find_spec("rich") is not None
