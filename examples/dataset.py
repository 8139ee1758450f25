"""A data set in a folder, checked before any training, and random crops of it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tritonaff.files import read_label
from tritonaff.plotting import PALETTE

T = TypeVar("T")
SUFFIXES = ".jpg", ".jpeg", ".png"  # of images, in lower case
Pair = tuple[np.ndarray, np.ndarray]  # image (H, W, 3) and labels (H, W), both uint8


class Dataset(NamedTuple):
    name: str
    classes: list[str]
    train: list[Pair]
    val: list[Pair]
    test: list[Pair]
    test_names: tuple[str, ...] = ()
    palette: tuple[str, ...] = PALETTE  # colours of the classes


class DataError(Exception):
    """A fault of a data set, in one line."""


def load_folder(folder: Path, ignore_index: int) -> Dataset:
    """Reads a whole data set, laid out as the help of --data says, into memory."""
    path = folder / "classes.txt"
    if not path.is_file():
        raise DataError(f"there is no {path}: one class name per line")
    classes = path.read_text(encoding="utf-8", errors="replace").split("\n")
    while classes and not classes[-1].strip():
        classes.pop()
    if not classes:
        raise DataError(f"{path} is empty: one class name per line")

    def split(name: str) -> tuple[list[Pair], list[Path]]:
        paths = (folder / "images" / name).glob("*")
        images = sorted(path for path in paths if path.suffix.lower() in SUFFIXES)
        if not images:
            raise DataError(f"there is no .jpg, .jpeg or .png in {folder / 'images' / name}")
        labels = folder / "labels" / name
        pairs = [
            load_pair(image, labels / f"{image.stem}.png", len(classes), ignore_index)
            for image in images
        ]
        if all((values == ignore_index).all() for _, values in pairs):
            raise DataError(f"all pixels in {labels} are ignored, --ignore-index {ignore_index}")
        return pairs, images

    (train, _), (val, _), (test, images) = map(split, ("train", "val", "test"))
    palette = read_palette(folder / "labels/test" / f"{images[0].stem}.png", len(classes))
    names = tuple(image.name for image in images)
    return Dataset(folder.resolve().name, classes, train, val, test, names, palette or PALETTE)


def load_pair(image_path: Path, label_path: Path, num_classes: int, ignore_index: int) -> Pair:
    if not label_path.is_file():
        raise DataError(f"{image_path} has no labels {label_path}")
    image, labels = read(read_image, image_path), read(read_label, label_path).numpy()
    if labels.shape != image.shape[:2]:
        label_size, image_size = (f"{x.shape[1]}x{x.shape[0]}" for x in (labels, image))
        raise DataError(f"{label_path} is {label_size}, its image {image_path} is {image_size}")
    wrong = [v for v in np.unique(labels).tolist() if v >= num_classes and v != ignore_index]
    if wrong:
        raise DataError(
            f"{label_path} holds {wrong[0]}, neither one of the {num_classes} classes "
            f"of classes.txt nor --ignore-index {ignore_index}"
        )
    return image, labels


def read(reader: Callable[[Path], T], path: Path) -> T:
    try:
        return reader(path)
    except Exception as error:  # a broken file raises almost any
        raise DataError(f"cannot read {path}: {str(error) or type(error).__name__}") from error


def read_palette(path: Path, num_classes: int) -> tuple[str, ...] | None:
    """The colours of the classes in a label image's palette; None if there is no such palette."""
    with Image.open(path) as image:
        values = (image.getpalette() or [])[: 3 * num_classes]
    colours = tuple(f"#{bytes(rgb).hex()}" for rgb in zip(*[iter(values)] * 3, strict=False))
    return colours if len(set(colours)) == num_classes else None


MODES_OF_8_BITS = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK")  # Pillow stretches fewer bits to 8


def read_image(path: Path) -> np.ndarray:
    """(H, W, 3) uint8."""
    with Image.open(path) as image:
        if image.mode in MODES_OF_8_BITS:
            return np.array(image.convert("RGB"))
        # Gray of 16 bits, which convert() would clip; older versions of Pillow call a PNG's "I".
        if image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PNG"):
            gray = (np.array(image) / 65535 * 255).round().astype(np.uint8)
            return np.stack([gray] * 3, axis=-1)
        raise ValueError(f"expected 8-bit or 16-bit pixels, got mode {image.mode}")


def random_crops(pairs: list[Pair], options: argparse.Namespace) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of images (N, H, W, 3) and labels (N, H, W), half of them mirrored; of
    volumes, (N, D, H, W, 3) and (N, D, H, W).
    """
    rng = np.random.default_rng(options.seed)
    shape = (options.batch_size, *options.size)
    while True:
        images = np.zeros((*shape, 3), np.uint8)
        labels = np.full(shape, options.ignore_index, pairs[0][1].dtype)
        for k, index in enumerate(rng.integers(len(pairs), size=len(images))):
            image, label = pairs[index]
            spare = [max(n - size, 0) for n, size in zip(label.shape, options.size, strict=True)]
            starts = [rng.integers(length + 1) for length in spare]
            window = tuple(slice(x, x + n) for x, n in zip(starts, options.size, strict=True))
            mirror = slice(None, None, rng.choice((1, -1)))
            # An image smaller than the crop fills a corner; the rest of the crop is ignored.
            corner = (k, *map(slice, label.shape))
            images[corner] = image[window][..., mirror, :]
            labels[corner] = label[window][..., mirror]
        yield torch.from_numpy(images), torch.from_numpy(labels)
