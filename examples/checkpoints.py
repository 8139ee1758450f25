"""Checkpoints that are there as a whole or not at all, whenever the process is killed."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tritonaff.files import replacing


class CheckpointError(Exception):
    """What is wrong with a checkpoint, in one line."""


def save(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Into memory first: where a disk is full, torch says that its position is unexpected.
    buffer = io.BytesIO()
    torch.save(dict(content), buffer)
    with replacing(path) as new:
        new.write_bytes(buffer.getbuffer())


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
