"""Counts words that make prose hard to read, in docstrings, comments and Markdown.

    python tools/prose.py [--check] [--show] [FILE ...]

Without files, every tracked .py and .md file is counted. ``--show`` prints each sentence that
breaks the rule; ``--check`` ends with status 1 if the rates of all files together pass a limit.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import subprocess
import sys
import tokenize
from collections import Counter
from pathlib import Path

LIMITS = {"what": 1.5, "those": 0.3, "one that": 0.2}  # per 1,000 words
PATTERNS = {name: re.compile(rf"\b{name}\b".replace(" ", r"\s+"), re.I) for name in LIMITS}
WORD = re.compile(r"[A-Za-z][A-Za-z'-]*")
OPENING = re.compile(r"(?:^|[.!?:]\s+|\n\s*\n\s*)[\"'(*_]*(?:What|Of|Those|That|It)\b[^.!?]*")


def python_prose(text: str) -> list[str]:
    """The docstrings of a Python file without their examples, and its comments, lines joined."""
    passages: list[str] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(node) or ""
            passages.append(re.sub(r"^ *(>>>|\.\.\.).*", "", docstring, flags=re.M))
    last = -2
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            words = token.string.lstrip("#: ")
            whole_line = not token.line[: token.start[1]].strip()
            if whole_line and token.start[0] == last + 1:
                passages[-1] += "\n" + words
            else:
                passages.append(words)
            last = token.start[0] if whole_line else -2
    return passages


def markdown_prose(text: str) -> list[str]:
    """The paragraphs of a Markdown file outside its fenced and its indented code."""
    text = re.sub(r"^[ ]*```.*?^[ ]*```", "", text, flags=re.M | re.S)
    paragraphs = re.split(r"\n\s*\n", text)
    in_list = False
    passages: list[str] = []
    for paragraph in paragraphs:
        if paragraph.startswith("    ") and not in_list:
            continue
        in_list = bool(re.match(r"\s*([-*]|\d+\.)\s", paragraph)) or paragraph.startswith("  ")
        for line in re.sub(r"\n(?![-*|]|\d+\.)\s*", " ", paragraph.strip("\n")).splitlines():
            line = re.sub(r"\]\([^)]*\)", "]", line)
            passages.extend(cell.strip(" -*") for cell in re.split(r"\s\|\s", line.strip("| ")))
    return passages


def count(path: Path) -> tuple[Counter[str], list[str]]:
    """Words and faults of a file, and the sentences and lines that have the faults."""
    text = path.read_text(encoding="utf-8")
    passages = python_prose(text) if path.suffix == ".py" else markdown_prose(text)
    total: Counter[str] = Counter()
    shown = []
    for passage in passages:
        prose = re.sub(r"``.*?``|`[^`]*`", "X", passage, flags=re.S)
        total["words"] += len(WORD.findall(prose))
        openings = [match.group().strip(". !?\n") for match in OPENING.finditer(prose)]
        total["openings"] += len(openings)
        shown += openings
        for name, pattern in PATTERNS.items():
            total[name] += len(pattern.findall(prose))
            shown += [s for s in re.split(r"(?<=[.!?])\s", prose) if pattern.search(s)]
    return total, [" ".join(s.split()) for s in dict.fromkeys(shown)]


def line(name: str, total: Counter[str]) -> str:
    rates = "".join(f"{1000 * total[n] / max(total['words'], 1):10.2f}" for n in LIMITS)
    return f"{name:50}{total['words']:8}{rates}{total['openings']:10}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--check", action="store_true", help="status 1 above a limit")
    parser.add_argument("--show", action="store_true", help="print the sentences at fault")
    arguments = parser.parse_args()
    listed = subprocess.run(["git", "ls-files", "*.py", "*.md"], capture_output=True, text=True)
    files = arguments.files or [Path(name) for name in listed.stdout.splitlines()]
    total: Counter[str] = Counter()
    print(f"{'file':50}{'words':>8}{'what':>10}{'those':>10}{'one that':>10}{'openings':>10}")
    for path in files:
        if path.is_symlink():
            continue
        counted, shown = count(path)
        total += counted
        print(line(str(path), counted))
        for sentence in shown if arguments.show else []:
            print("      " + sentence)
    print(line("all", total))
    print(f"{'limits':58}" + "".join(f"{limit:10.2f}" for limit in LIMITS.values()))
    above = any(1000 * total[n] > limit * total["words"] for n, limit in LIMITS.items())
    return 1 if arguments.check and above else 0


if __name__ == "__main__":
    sys.exit(main())
