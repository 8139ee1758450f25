"""The images of the study, the features of the frozen backbone, and batches of both."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from architecture import GRAY, MULTIPLE
from dataset import SUFFIXES, DataError, Pair, load_folder
from losses import LOSSES, Batch, boundary_distance
from plan import Run
from scipy import ndimage
from torch import Tensor, nn

IGNORE_INDEX = {"camvid": 11, "isbi": 255}
DUSK = "0001TP"  # how the names of CamVid's dusk clip begin
Item = tuple[str, int]  # split and index
View = tuple[Item, bool]  # and whether mirrored


class ImageFolder:
    """A data set in memory, and the backbone's features of its images in files."""

    def __init__(self, name: str, folder: Path) -> None:
        self.ignore_index = IGNORE_INDEX[name]
        dataset = load_folder(folder, self.ignore_index)
        self.classes = dataset.classes
        self.pairs = {"train": dataset.train, "val": dataset.val, "test": dataset.test}
        self.names = {
            split: sorted(
                path.stem
                for path in (folder / "images" / split).iterdir()
                if path.suffix.lower() in SUFFIXES
            )
            for split in self.pairs
        }
        sizes = {labels.shape for pairs in self.pairs.values() for _, labels in pairs}
        if len(sizes) > 1:
            (h1, w1), (h2, w2) = sorted(sizes)[:2]
            raise DataError(f"{folder} has images of {w1}x{h1} and of {w2}x{h2}, not of one size")
        (self.size,) = sizes
        self.features: dict[str, list[np.ndarray]] = {}
        self.parts: dict[Item, np.ndarray] = {}
        self.distances: dict[tuple[Item, bool, int], np.ndarray] = {}

    def extract(self, backbone: nn.Module, cache: Path, say: Callable[[str], None]) -> None:
        """Fills ``features``: for each split and level, (images, h, w, channels) in float16.
        Training images count twice: also mirrored.
        """
        digest = hashlib.sha1(type(backbone).__name__.encode())
        for pairs in self.pairs.values():
            for image, _ in pairs:
                digest.update(image)
        folder = cache / digest.hexdigest()[:12]
        folder.mkdir(parents=True, exist_ok=True)
        for split, pairs in self.pairs.items():
            views = (False, True) if split == "train" else (False,)
            paths = [folder / f"{split}-{k}.npy" for k in range(len(backbone.channels))]
            if not all(path.exists() for path in paths):
                device = next(backbone.parameters()).device
                found = []
                for k in range(len(pairs)):
                    for mirrored in views:
                        image, _ = self.padded((split, k), mirrored)
                        with torch.inference_mode():
                            levels = backbone(torch.from_numpy(image[None]).to(device))
                        found.append([x[0].permute(1, 2, 0).half().cpu().numpy() for x in levels])
                    say(f"features of {split}: {k + 1}/{len(pairs)}")
                for path, level in zip(paths, zip(*found, strict=True), strict=True):
                    part = path.with_suffix(".part")
                    with part.open("wb") as file:
                        np.save(file, np.stack(level))
                    part.replace(path)
            self.features[split] = [np.load(path, mmap_mode="r") for path in paths]

    def features_of(self, views: Sequence[View], device: torch.device) -> list[Tensor]:
        """By level, (N, channels, h, w), in memory as channels_last."""
        rows = [
            (split, 2 * index + mirrored if split == "train" else index)
            for (split, index), mirrored in views
        ]
        levels = zip(
            *([level[k] for level in self.features[split]] for split, k in rows), strict=True
        )
        return [
            torch.from_numpy(np.stack(level)).to(device).float().permute(0, 3, 1, 2)
            for level in levels
        ]

    def padded(self, item: Item, mirrored: bool) -> Pair:
        """An image and its labels, mirrored or not, then enlarged below and on the right."""
        image, labels = self.pairs[item[0]][item[1]]
        missing = [(0, -size % MULTIPLE) for size in labels.shape]
        image, labels = (x[:, ::-1] if mirrored else x for x in (image, labels))
        return (
            np.pad(image, [*missing, (0, 0)], constant_values=GRAY),
            np.pad(labels, missing, constant_values=self.ignore_index),
        )

    def instances(self, item: Item) -> np.ndarray:
        """(H, W) int32: a number for each connected part of a class, in place of instances, which
        these data sets do not have.
        """
        if item not in self.parts:
            labels = self.pairs[item[0]][item[1]][1]
            ids = np.zeros(labels.shape, np.int32)
            for label in range(len(self.classes)):
                parts, _ = ndimage.label(labels == label, np.ones((3, 3)))
                ids = np.where(labels == label, parts + ids.max(), ids)
            self.parts[item] = ids.astype(np.int32)
        return self.parts[item]

    def target(self, item: Item, mirrored: bool, stride: int) -> np.ndarray:
        """Labels at a resolution."""
        return sampled(self.padded(item, mirrored)[1], stride)

    def distance(self, item: Item, mirrored: bool, stride: int) -> np.ndarray:
        """The distance of labels to the boundary, kept once computed."""
        key = item, mirrored, stride
        if key not in self.distances:
            target = self.target(*key)
            self.distances[key] = boundary_distance(target, self.ignore_index)
        return self.distances[key]


class Data:
    """The images of one comparison: for training, for validation and for scores."""

    def __init__(self, name: str, folder: ImageFolder) -> None:
        self.folder = folder
        items = {split: [(split, k) for k in range(len(p))] for split, p in folder.pairs.items()}
        if name == "daylight":
            dusk = {
                split: [k for k in items[split] if folder.names[split][k[1]].startswith(DUSK)]
                for split in items
            }
            items["train"] = [item for item in items["train"] if item not in dusk["train"]]
            items["test"] = dusk["train"] + dusk["test"]
        self.train, self.val, self.test = items["train"], items["val"], items["test"]


def batches(data: Data, run: Run, device: torch.device) -> Iterator[tuple[Any, Batch]]:
    """Endless pairs of inputs and targets: every image once, half of them mirrored, then all again
    in another order. Every loss gets the same pairs.
    """
    rng = np.random.default_rng(run.seed)
    folder, stride, queue = data.folder, run.stride, []
    far = LOSSES[run.loss].needs_distance
    while True:
        views, targets, distances = [], [], []
        for _ in range(run.batch_size):
            queue = queue or rng.permutation(len(data.train)).tolist()
            view = data.train[queue.pop()], bool(rng.integers(2))
            targets.append(folder.target(*view, stride))
            if far:
                distances.append(folder.distance(*view, stride))
            views.append(view)
        x = folder.features_of(views, device)
        target = torch.from_numpy(np.stack(targets)).to(device, torch.int64)
        yield x, Batch(target, torch.from_numpy(np.stack(distances)).to(device) if far else None)


def sampled(labels: np.ndarray, stride: int) -> np.ndarray:
    """Labels nearest to the centres of stride x stride pixels."""
    return labels[stride // 2 :: stride, stride // 2 :: stride]
