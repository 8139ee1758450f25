"""Choice of the implementation: by the tensors, or by the user, for tests and bug reports."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tritonaff.native.library import OPERATIONS
from tritonaff.native.library import obstacle as native_obstacle
from tritonaff.options import Backend

BACKENDS: tuple[Backend, ...] = ("auto", "triton", "native", "portable", "reference")
# Most tiles hold a pixel's classes in one block, of at most this size.
MAX_TILE_CLASSES = 1024
LEAST_TRITON = (3, 6)
# Triton's assembler fails for older GPUs.
LEAST_CAPABILITY = (7, 0)

_current = "auto"


def use_backend(backend: Backend) -> AbstractContextManager[None]:
    """Chooses the implementation of every operation of this library inside a ``with`` block.

    Args:
        backend: ``"auto"`` (the default: Triton tiles where they can run, native kernels on a CPU
            with a C++ compiler, portable torch operations elsewhere), ``"triton"``, ``"native"``,
            ``"portable"``, or ``"reference"`` (the papers' equations in eager PyTorch).

    Raises:
        ValueError: an unknown name; later, from an operation, ``"triton"`` where no tile can run,
            ``"native"`` where no native kernel can run.

    The choice holds for the whole process, and a backward pass runs the implementation that its
    forward pass ran. A call without ``with`` chooses nothing.

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
    """True if a tile takes this call; ValueError if the user asks for a tile and none can run.

    ``max_classes`` is the largest number of classes that the tile takes, None where channels are no
    classes; ``obstacle`` says why the operation's own options rule out a tile.
    """
    if backend in ("native", "portable"):
        return False
    obstacle = obstacle or _obstacle(logits, max_classes)
    if obstacle and backend == "triton":
        raise ValueError(f"backend 'triton' cannot run here: {obstacle}")
    return obstacle is None


def implementation(
    name: str,
    backend: str,
    tensor: Tensor,
    *,
    max_classes: int | None = MAX_TILE_CLASSES,
    obstacle: str | None = None,
) -> Any:
    """The module that computes the operation ``name`` for this call: tiles, native kernels or
    portable torch.

    :func:`tile_runs` explains the arguments. "reference" never comes here: the reference runs
    outside the ops, so that autograd differentiates the equations themselves.
    """
    if tile_runs(backend, tensor, max_classes=max_classes, obstacle=obstacle):
        room = "kernels"
    elif native_runs(name, backend, tensor):
        room = "native"
    else:
        room = "portable"
    return _module(room, name)


@cache
def _module(room: str, name: str) -> Any:
    return importlib.import_module(f"..{room}.{name}", __package__)


def native_runs(name: str, backend: str, tensor: Tensor) -> bool:
    """True if a native kernel takes this call; ValueError if the user asks for native kernels and
    none can run.
    """
    if backend not in ("auto", "native"):
        return False
    obstacle = f"{name} has no native kernel" if name not in OPERATIONS else None
    obstacle = obstacle or native_obstacle(name, tensor)
    if obstacle and backend == "native":
        raise ValueError(f"backend 'native' cannot run here: {obstacle}")
    return obstacle is None


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Turns autocast off, which would compute an operation's float32 products in half precision."""
    device = tensor.device.type
    if not torch.amp.is_autocast_available(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def _obstacle(logits: Tensor, max_classes: int | None) -> str | None:
    if logits.element_size() > 4:
        return f"the tiles compute in float32, got {logits.dtype}"
    if max_classes is not None and logits.shape[1] > max_classes:
        return f"the tiles take at most {max_classes} classes, got {logits.shape[1]}"
    return triton_obstacle(logits.device)


def triton_obstacle(device: torch.device) -> str | None:
    """The reason why no tile can run on a device, None if tiles can."""
    if not _triton_installed():
        return "triton is not installed"
    if device.type in ("cuda", "xpu"):
        return _no_triton() or _too_old(device)
    if not _interprets():
        return (
            f"no Triton on device {device} (TRITON_INTERPRET=1, set before Triton is imported, "
            "would interpret the tiles)"
        )
    return _no_triton()


@cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _no_triton() -> str | None:
    try:
        import triton
    except ImportError as error:
        return f"importing triton fails: {error}"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < LEAST_TRITON:
        least = ".".join(map(str, LEAST_TRITON))
        return f"the tiles need Triton {least} (torch 2.11 brings it), got {triton.__version__}"
    return None


def _interprets() -> bool:
    """True if tiles are interpreted. Triton reads the environment when it is imported: a variable
    set later would mix interpreted and compiled functions.
    """
    triton = sys.modules.get("triton")
    if triton is None:
        return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
    return not isinstance(triton.language.cdiv, triton.JITFunction)


@cache
def _too_old(device: torch.device) -> str | None:
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        return (
            f"the tiles need a GPU of compute capability {'.'.join(map(str, LEAST_CAPABILITY))}, "
            f"got {'.'.join(map(str, capability))}"
        )
    return None
