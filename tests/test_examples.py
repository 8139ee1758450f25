"""The training example as its users run it, small."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import tritonaff

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


def check_output(result, output, name, other="cross-entropy + AAF"):
    assert result.returncode == 0, result.stderr
    for title in ("cross-entropy", other):
        cells = re.escape(title), r"0\.\d+", r"0\.\d+", r"\d+\.\d"
        row = re.search(r"\|\s*" + r"\s*\|\s*".join(cells) + r"\s*\|", result.stdout)
        assert row, result.stdout
    table = [line for line in result.stdout.splitlines() if line.startswith(("|", "+"))]
    assert max(map(len, table)) <= 80
    picture = output / f"{name}.png"
    assert f"picture: {picture}" in result.stdout
    assert Image.open(picture).size[0] > 500


def test_drawn_scenes(tmp_path):
    result = run(*SMALL, "--no-compile", "--output", tmp_path)
    check_output(result, tmp_path, "scenes")
    assert "cross-entropy + AR" not in result.stdout  # only where it is asked for


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


def test_affinity_regression_and_its_heat_maps(folder, tmp_path):
    arguments = ["--data", folder, "--ignore-index", 11, "--output", tmp_path, "--no-compile"]
    result = run(*SMALL, *arguments, "--steps", 3, "--learning-rate", 0.1, "--loss", "ce", "ce+ar")
    check_output(result, tmp_path, "data", "cross-entropy + AR")
    line = (
        r"affinity regression on the test split: "
        r"(0\.\d{4}) before, (0\.\d{4}) after, (0\.\d{4}) cross-entropy\n"
    )
    ((before, after, without),) = re.findall(line, result.stdout)
    assert len({before, after, without}) == 3
    heat_maps = tmp_path / "data-affinity.png"
    assert f"heat maps: {heat_maps}" in result.stdout
    picture = np.asarray(Image.open(heat_maps).convert("RGB")).astype(int)
    assert picture.shape[1] > 2 * picture.shape[0] > 1000
    # The void pixel is a point of both grids: gray lines in each of the three.
    void = (np.ptp(picture, axis=-1) == 0) & (picture[..., 0] > 100) & (picture[..., 0] < 200)
    columns = np.flatnonzero(void.sum(axis=0) > picture.shape[0] / 2)
    assert len(np.flatnonzero(np.diff(columns, prepend=-9) > 1)) == 3 * 2


def test_fewer_steps_than_affinity_regression_needs(folder, tmp_path):
    arguments = ["--data", folder, "--ignore-index", 11, "--output", tmp_path, "--no-compile"]
    result = run(*SMALL, *arguments, "--loss", "ce", "ce+ar")
    check_output(result, tmp_path, "data", "cross-entropy + AR")
    assert "heat maps" not in result.stdout


def test_affinity_regression_joins_in_the_last_third(monkeypatch):
    monkeypatch.setenv("GOMP_SPINCOUNT", "10000")  # or the script would, for good
    monkeypatch.syspath_prepend(SCRIPT.parent)
    criterion = importlib.import_module("train_segmentation").CrossEntropyAR(3, ignore_index=255)
    logits, target = torch.randn(2, 3, 24, 24), torch.randint(0, 3, (2, 24, 24))
    target[:, :5] = 255
    before = F.cross_entropy(logits, target, ignore_index=255)
    after = before + 0.1 * tritonaff.AffinityRegressionLoss(ignore_index=255)(logits, target)
    assert after > before + 1e-3
    torch.compiler.reset()
    compiled = torch.compile(criterion, fullgraph=True, backend="eager")
    for step in range(9):
        progress = torch.tensor(step / 9)
        with torch.compiler.set_stance("fail_on_recompile" if step else "default"):
            loss = compiled(logits, target, progress)
        torch.testing.assert_close(loss, before if step < 6 else after)


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
