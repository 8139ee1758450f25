"""The training example as its users run it, small."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

Image = pytest.importorskip("PIL.Image")
np = pytest.importorskip("numpy")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

SCRIPT = Path(__file__).parent.parent / "examples/train_segmentation.py"
SMALL = ["--steps", "2", "--batch-size", "2", "--size", "32", "48"]


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "80", **environment},
    )


@pytest.fixture
def folder(tmp_path):
    """A data set of two gray and one colour image, each with a void pixel."""
    root = tmp_path / "data"
    rng = np.random.default_rng(0)
    for i, split in enumerate(("train", "val", "test")):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        size = (40, 56) if i else (40, 56, 3)
        image = rng.integers(0, 256, size).astype(np.uint8)
        Image.fromarray(image).save(root / "images" / split / "one.png")
        labels = rng.integers(0, 3, (40, 56)).astype(np.uint8)
        labels[0, 0] = 11
        Image.fromarray(labels).save(root / "labels" / split / "one.png")
    (root / "classes.txt").write_text("road\npole\nsky\n")
    return root


def check_output(result, output, name):
    assert result.returncode == 0, result.stderr
    for title in ("cross-entropy", "cross-entropy \\+ AAF"):
        row = re.search(
            rf"\|\s*{title}\s*\|\s*0\.\d+\s*\|\s*0\.\d+\s*\|\s*\d+\.\d\s*\|", result.stdout
        )
        assert row, result.stdout
    table = [line for line in result.stdout.splitlines() if line.startswith(("|", "+"))]
    assert max(map(len, table)) <= 80
    picture = output / f"{name}.png"
    assert f"picture: {picture}" in result.stdout
    assert Image.open(picture).size[0] > 500


def test_drawn_scenes(tmp_path):
    result = run(*SMALL, "--no-compile", "--output", tmp_path)
    check_output(result, tmp_path, "scenes")


def test_a_data_set_in_a_folder(folder, tmp_path):
    arguments = ["--data", folder, "--ignore-index", 11, "--output", tmp_path]
    result = run(*SMALL, "--no-compile", *arguments)
    check_output(result, tmp_path, "data")


def test_without_a_compiler_it_says_so_and_trains(folder, tmp_path):
    arguments = ["--data", folder, "--ignore-index", 11, "--output", tmp_path]
    cache = tmp_path / "cache"
    result = run(*SMALL, *arguments, CXX="/nowhere/g++", TORCHINDUCTOR_CACHE_DIR=str(cache))
    check_output(result, tmp_path, "data")
    assert len(re.findall("training in eager mode", result.stdout)) == 1


def remove_labels(folder):
    (folder / "labels/train/one.png").unlink()


def remove_classes(folder):
    (folder / "classes.txt").unlink()


def empty_split(folder):
    (folder / "images/val/one.png").unlink()


def other_size(folder):
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(folder / "labels/train/one.png")


def strange_label(folder):
    Image.fromarray(np.full((40, 56), 77, np.uint8)).save(folder / "labels/test/one.png")


def colour_label(folder):
    Image.fromarray(np.zeros((40, 56, 3), np.uint8)).save(folder / "labels/train/one.png")


def broken_image(folder):
    (folder / "images/train/one.png").write_bytes(b"no image")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_labels, "has no labels"),
        (remove_classes, "there is no .*classes.txt"),
        (empty_split, "there is no .jpg or .png in .*val"),
        (other_size, "is 4x4, its image .* is 56x40"),
        (strange_label, "holds 77, neither one of the 3 classes"),
        (colour_label, "8-bit value per pixel, has mode RGB"),
        (broken_image, "cannot read .*one.png"),
    ],
)
def test_a_broken_folder_is_named_in_one_line(folder, damage, message):
    damage(folder)
    result = run("--data", folder, "--ignore-index", 11)
    assert result.returncode == 2
    assert re.fullmatch(f"error: .*{message}.*\n", result.stderr)
    assert result.stdout == ""
