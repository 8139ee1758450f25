"""Which implementation runs: the tensors decide, or the user, for tests and bug reports."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "portable", "reference")
# Most tiles hold a pixel's classes in one block of this size at most.
MAX_TILE_CLASSES = 1024

_current = "auto"


def use_backend(backend: str) -> AbstractContextManager[None]:
    """Chooses the implementation of every operation of this library inside a ``with`` block.

    Args:
        backend: ``"auto"`` (the default: Triton tiles where they can run, portable torch operations
            elsewhere), ``"triton"``, ``"portable"``, or ``"reference"`` (the papers' equations in
            eager PyTorch).

    Raises:
        ValueError: an unknown name; later, from an operation, ``"triton"`` where no tile can run.

    The choice holds for the whole process, and a backward pass runs what its forward pass ran. A
    call without ``with`` chooses nothing.

    Example:
        >>> import torch, tritonaff
        >>> logits, target = torch.randn(1, 3, 8, 8), torch.randint(0, 3, (1, 8, 8))
        >>> with tritonaff.use_backend("reference"):
        ...     expected = tritonaff.affinity_field_loss(logits, target)
        >>> torch.allclose(tritonaff.affinity_field_loss(logits, target), expected)
        True
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    return _using(backend)


@contextmanager
def _using(backend: str) -> Iterator[None]:
    global _current
    previous, _current = _current, backend
    try:
        yield
    finally:
        _current = previous


def current_backend() -> str:
    return _current


def tile_runs(
    backend: str,
    logits: Tensor,
    *,
    max_classes: int | None = MAX_TILE_CLASSES,
    obstacle: str | None = None,
) -> bool:
    """Whether a tile takes this call; ValueError where the user insists on one and none can.

    ``max_classes`` is how many the logits may have, None where their channels are no classes;
    ``obstacle`` says what speaks against a tile in the operation's own options.
    """
    if backend == "portable":
        return False
    obstacle = obstacle or _obstacle(logits, max_classes)
    if obstacle and backend == "triton":
        raise ValueError(f"backend 'triton' cannot run here: {obstacle}")
    return obstacle is None


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """What an operation computes in float32 stays float32: under autocast products would not."""
    device = tensor.device.type
    if not torch.amp.is_autocast_available(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def _obstacle(logits: Tensor, max_classes: int | None) -> str | None:
    if logits.element_size() > 4:
        return f"the tiles compute in float32, got {logits.dtype}"
    if max_classes is not None and logits.shape[1] > max_classes:
        return f"the tiles take at most {max_classes} classes, got {logits.shape[1]}"
    if not _triton_installed():
        return "triton is not installed"
    return _no_triton_on(logits.device)


def _no_triton_on(device: torch.device) -> str | None:
    if device.type in ("cuda", "xpu") or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"no Triton on device {device} (TRITON_INTERPRET=1 would interpret the tiles)"


@cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None
