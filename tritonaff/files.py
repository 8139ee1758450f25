"""Files of the commands and the examples: label images that they read, and outputs that are there
as a whole or not at all.
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
    """(H, W) uint8; ValueError for an image that is not 8-bit gray or with a palette. Needs
    pillow.
    """
    from PIL import Image

    with Image.open(path) as image:
        if image.format != "PNG":
            raise ValueError(f"expected a PNG file, got {image.format}")
        if image.mode not in LABEL_MODES:
            raise ValueError(f"expected 8-bit pixels of mode L or P, got mode {image.mode}")
        # Pillow stretches gray values of fewer bits to 8; indices into a palette it leaves alone.
        bits = path.read_bytes()[24]
        if image.mode == "L" and bits != 8:
            raise ValueError(f"expected 8-bit pixels, got {bits} bits")
        width, height = image.size
        pixels = bytearray(image.tobytes())
    return torch.frombuffer(pixels, dtype=torch.uint8).view(height, width)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file to write, which takes the place of ``path`` in one step once it is whole. Where
    writing it fails it is removed, and what was there stays.
    """
    new = _new_file(path)
    if new == path:
        yield path
        return
    try:
        yield new
        with new.open("rb+") as file:
            os.fsync(file.fileno())  # its bytes are on the disk before its name is
        new.replace(os.path.realpath(path))
    except BaseException as error:
        new.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # where a disk is full, the system names no file
        raise


def check_writable(path: Path) -> None:
    """Makes the folder of an output, and raises OSError if :func:`replacing` could not write it:
    before the work whose result it is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = _new_file(path)
    if new == path:
        return
    if path.exists():
        path.open("ab").close()  # not into a folder, nor into what is protected
    new.touch()
    new.unlink(missing_ok=True)  # several processes may look at once


def _new_file(path: Path) -> Path:
    """Beside what it replaces, where links lead. A device or a pipe is not replaced: itself."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        return path
    real = Path(os.path.realpath(path))
    return real.with_name(real.name + ".new")
