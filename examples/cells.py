"""Images of cells and their ids: connected cells of a labelled data set, or drawn volumes."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from dataset import DataError, Pair, load_folder
from skimage.measure import label

MEMBRANE, IGNORED = 0, -1  # ids of voxels without an instance
LONGEST_OFFSET = 27  # a mutex watershed refuses smaller images
# Drawn volumes, whose planes are four times as far apart as rows and columns.
SIZE, SPACING = np.array((8, 64, 64)), np.array((4, 1, 1))
NUM_SEEDS = 25


class Cells(NamedTuple):
    """Images (H, W, 3) or (D, H, W, 3) of uint8 and their ids (H, W) or (D, H, W)."""

    name: str
    train: list[Pair]
    val: list[Pair]
    test: list[Pair]


def load_cells(folder: Path, ignore_index: int) -> Cells:
    """Connected cells of each image, from a data set of membranes and cells."""
    data = load_folder(folder, ignore_index)
    if len(data.classes) != 2:
        raise DataError(f"expected two classes, membrane first, got {len(data.classes)}")

    def split(name: str) -> list[Pair]:
        pairs = []
        for image, labels in getattr(data, name):
            ids = label(labels == 1, connectivity=1)
            ids[labels == ignore_index] = IGNORED
            pairs.append((image, ids))
        if any((ids <= MEMBRANE).all() for _, ids in pairs):
            raise DataError(
                f"expected a cell in every image, got none in {folder / 'labels' / name}"
            )
        height, width = np.min([ids.shape for _, ids in pairs], axis=0)
        if min(height, width) <= LONGEST_OFFSET:
            raise DataError(
                f"expected images larger than {LONGEST_OFFSET}x{LONGEST_OFFSET}, the longest "
                f"offset, got {width}x{height} in {folder / 'images' / name}"
            )
        return pairs

    return Cells(data.name, split("train"), split("val"), split("test"))


def draw_cells() -> Cells:
    """Noisy volumes of Voronoi cells, the same ones in every call."""
    rng = np.random.default_rng(0)
    train, val, test = ([draw_volume(rng) for _ in range(count)] for count in (8, 2, 2))
    return Cells("volume", train, val, test)


def draw_volume(rng: np.random.Generator) -> Pair:
    places = np.stack(np.meshgrid(*map(np.arange, SIZE), indexing="ij"), axis=-1) * SPACING
    seeds = torch.from_numpy(rng.uniform(0, SIZE * SPACING, (NUM_SEEDS, 3)))
    distances = torch.cdist(torch.from_numpy(places.reshape(-1, 3)).double(), seeds)
    distance, seed = (x.numpy().reshape(*SIZE, 2) for x in distances.topk(2, largest=False))
    is_membrane = distance[..., 1] - distance[..., 0] < 2
    gray = np.where(is_membrane, 90, 160 + rng.normal(0, 15, NUM_SEEDS)[seed[..., 0]])
    gray = (gray + rng.normal(0, 30, SIZE)).clip(0, 255).astype(np.uint8)
    ids = label(np.where(is_membrane, MEMBRANE, 1 + seed[..., 0]), connectivity=1)
    return np.stack([gray] * 3, axis=-1), ids
