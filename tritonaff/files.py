"""Files of the commands and the examples: label images as input, and outputs that are written as a
whole or not at all.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

LABEL_MODES = ("L", "P")  # 8 bits, gray or with a palette


def read_label(path: Path) -> Tensor:
    """The labels of an image, (H, W) uint8; ValueError for an image that is not 8-bit gray or with
    a palette. Needs pillow.
    """
    from PIL import Image

    with Image.open(path) as image:
        if image.format != "PNG":
            raise ValueError(f"expected a PNG file, got {image.format}")
        if image.mode not in LABEL_MODES:
            raise ValueError(f"expected 8-bit pixels of mode L or P, got mode {image.mode}")
        # Pillow stretches gray values of fewer bits to 8, but leaves indices into a palette alone.
        bits = path.read_bytes()[24]
        if image.mode == "L" and bits != 8:
            raise ValueError(f"expected 8-bit pixels, got {bits} bits")
        width, height = image.size
        pixels = bytearray(image.tobytes())
    return torch.frombuffer(pixels, dtype=torch.uint8).view(height, width)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file to write, which takes the place of ``path`` in one step once it is whole. If the
    writing fails, the new file is removed and the old file stays.
    """
    new = _new_file(path)
    if new == path:
        yield path
        return
    try:
        yield new
        with new.open("rb+") as file:
            os.fsync(file.fileno())  # the bytes must reach the disk before the name does
        new.replace(os.path.realpath(path))
    except BaseException as error:
        new.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # if the disk is full, the system names no file
        raise


def check_writable(path: Path) -> None:
    """Makes the folder of an output, and raises OSError if :func:`replacing` could not write the
    output. Call this function before the work that computes the output.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = _new_file(path)
    if new == path:
        return
    if path.exists():
        path.open("ab").close()  # raises for a folder and for a protected file
    new.touch()
    new.unlink(missing_ok=True)  # several processes may check at once


def _new_file(path: Path) -> Path:
    """The new file's path, beside the file that ``path`` leads to through links; for a device or a
    pipe, which cannot be replaced, ``path`` itself.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        return path
    real = Path(os.path.realpath(path))
    return real.with_name(real.name + ".new")
