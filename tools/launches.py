"""Records how an operation launches its kernels, and compiles a launch for a GPU that is not here.

Tensors on the meta device have sizes and strides and no memory: launchers choose block sizes for
them as for a GPU, and what they launch is written down.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton import JITFunction
from triton.backends.compiler import GPUTarget

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class Launch(NamedTuple):
    """A kernel with its arguments by name; options like num_warps are among them."""

    kernel: JITFunction[Any]
    programs: int
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        name: str = self.kernel.__name__
        return name

    def constants(self) -> dict[str, Any]:
        names = [p.name for p in self.kernel.params if p.is_constexpr]
        return {name: self.arguments[name] for name in names}


def launches_of(call: Callable[[], object], target: str) -> list[Launch]:
    """All launches of a call, in order, on the kind of GPU that the target is."""
    launches: list[Launch] = []

    def record(
        kernel: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **options: Any
    ) -> None:
        arguments = dict(zip(kernel.arg_names, args, strict=False)) | options
        launches.append(Launch(kernel, math.prod(grid), arguments))

    # Meta tensors have no device module: this one says that their device is the current one.
    here = SimpleNamespace(current_device=lambda: None)
    hip = "6.0" if TARGETS[target].backend == "hip" else None
    with (
        mock.patch.object(JITFunction, "run", record),
        mock.patch.object(torch, "get_device_module", return_value=here),
        mock.patch.object(torch.version, "hip", hip),
    ):
        call()
    return launches


class Driver:
    """Answers the questions that Triton asks of a device before it compiles."""

    def __init__(self, target: str) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.target]

    def get_current_device(self) -> str:
        return self.target  # Triton keeps compiled kernels by device

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def driver_of(target: str) -> Iterator[None]:
    with mock.patch.object(triton.runtime.driver, "_active", Driver(target)):
        yield


def compile_launch(launch: Launch, target: str) -> Any:
    """The kernel as Triton compiles it when this launch is the first one."""
    with driver_of(target):
        return launch.kernel.run(grid=(launch.programs,), warmup=True, **launch.arguments)
