"""The training example as ``make demo`` runs it, on drawn scenes: with a compiler and without."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tritonaff.bench.measure import compiler_works

Image = pytest.importorskip("PIL.Image")
torch = pytest.importorskip("torch")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

SCRIPT = Path(__file__).parent.parent.parent / "examples/train.py"


def run(folder, *arguments, **environment):
    """Two steps with each of two losses; the standard output."""
    arguments = ["--steps", 2, "--batch-size", 2, "--size", 32, 48, "--output", folder, *arguments]
    result = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0", "COLUMNS": "80", **environment},
    )
    assert result.returncode == 0, result.stderr
    for title in ("cross-entropy", "cross-entropy + AAF"):
        assert re.search(rf"\| {re.escape(title)} +\|", result.stdout)
    assert "cross-entropy + AR" not in result.stdout  # only where it is asked for
    assert f"pictures: {folder}/scenes.png, {folder}/scenes-training.png" in result.stdout
    assert Image.open(folder / "scenes.png").size[0] > 500
    return result.stdout


def test_it_compiles(tmp_path):
    if not compiler_works(torch.device("cpu")):
        pytest.skip("needs a C++ compiler")
    assert "training in eager mode" not in run(tmp_path)


def test_without_a_compiler_it_says_so_and_trains(tmp_path):
    cache = str(tmp_path / "cache")
    output = run(tmp_path, CXX="/nowhere/g++", TORCHINDUCTOR_CACHE_DIR=cache)
    assert len(re.findall("training in eager mode", output)) == 1
    eager = run(tmp_path / "eager", "--no-compile")
    assert "training in eager mode" not in eager
    losses = (tmp_path / "scenes-losses.csv").read_text()
    assert losses == (tmp_path / "eager/scenes-losses.csv").read_text()
