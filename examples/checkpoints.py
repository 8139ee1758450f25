"""Checkpoints that are there as a whole or not at all, whenever the process is killed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


class CheckpointError(Exception):
    """What is wrong with a checkpoint, in one line."""


def save(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a new file and lets it take the old one's place, in one step of the file system."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    with new.open("wb") as file:
        torch.save(dict(content), file)
        file.flush()
        os.fsync(file.fileno())  # its bytes are on the disk before its name is
    os.replace(new, path)


def load(path: Path, training: Mapping[str, Any]) -> dict[str, Any] | None:
    """What was saved last, of the same training; None if there is nothing."""
    if not path.exists():
        return None
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        before = content["training"]
    except Exception as error:  # of almost any kind, for a broken file
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"cannot read {path}: {reason}") from error
    for name, value in training.items():
        if before.get(name) != value:
            raise CheckpointError(
                f"{path} is of a training with {name} {before.get(name)}, not {value}: "
                "resume with the same, or leave --resume out"
            )
    return content
