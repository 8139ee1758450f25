"""Says what runs on this machine: versions, backends, and where compiled files lie.

Command line: ``python -m tritonaff``. Add its output to a bug report.
"""

from __future__ import annotations

import argparse
import os
import platform
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from tritonaff.bench.machine import describe, versions
from tritonaff.native import library
from tritonaff.ops.backend import triton_obstacle
from tritonaff.version import __version__

WIDTH = 80


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tritonaff",
        description="Says what runs on this machine: versions, the backends that can run and why "
        "the others cannot, and where compiled files lie. Add the output to a bug report.",
        epilog="Other commands: tritonaff-stats (neighbours and classes of label images), "
        "tritonaff-bench (time and memory), python -m tritonaff.native (compiles the kernels for "
        "this CPU ahead).",
    )
    parser.add_argument("--version", action="version", version=f"tritonaff {__version__}")
    parser.parse_args(argv)
    for name, text in (*_versions(), ("", ""), *_backends(), ("", ""), *_files()):
        first, *rest = textwrap.wrap(text, WIDTH - 11, break_on_hyphens=False) or [""]
        print(f"{name:10} {first}".rstrip())
        for line in rest:
            print(" " * 11 + line)
    return 0


def _versions() -> Iterator[tuple[str, str]]:
    known = versions()
    yield "tritonaff", f"{known['tritonaff']}, {Path(__file__).parent} ({known['commit']})"
    yield "python", f"{known['python']}, {platform.platform()}"
    built_for = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}
    kinds = "".join(f", {name} {version}" for name, version in built_for.items() if version)
    yield "torch", known["torch"] + kinds
    yield "triton", known["triton"]
    for device in _devices():
        yield str(device), describe(device)


def _devices() -> list[torch.device]:
    """The accelerators, then the CPU."""
    devices = []
    for kind in ("cuda", "xpu"):
        module = getattr(torch, kind)
        if module.is_available():
            devices += [torch.device(kind, index) for index in range(module.device_count())]
    return [*devices, torch.device("cpu")]


def _backends() -> Iterator[tuple[str, str]]:
    """The backends of :func:`tritonaff.use_backend`, the fastest first."""
    obstacles = {device: triton_obstacle(device) for device in _devices()}
    able = [str(device) for device, obstacle in obstacles.items() if obstacle is None]
    if able:
        yield "triton", f"runs on {', '.join(able)}"
    else:
        yield "triton", f"cannot run: {next(iter(obstacles.values()))}"
    yield "native", _native()
    yield "portable", "runs: torch operations, for any device and dtype"
    yield "reference", "runs: the papers' equations; slow, for comparison"


def _native() -> str:
    builds = [library.plan(operation) for operation in library.OPERATIONS]
    done = sum(build.path.exists() for build in builds)
    state = f"{done} of {len(builds)} operations compiled"
    if library.turned_off():
        return "cannot run: TRITONAFF_NATIVE turns native kernels off"
    if done < len(builds) and builds[0].compiler is None:
        return f"cannot run: no C++ compiler ($CXX, {', '.join(library.COMPILERS)}); {state}"
    if done < len(builds):
        return f"runs on cpu: {state}, the rest on first use by {builds[0].compiler}"
    return f"runs on cpu: {state}"


def _files() -> Iterator[tuple[str, str]]:
    yield "compiled", f"{library.cache_folder()} (native; $TRITONAFF_CACHE)"
    home = os.environ.get("TRITON_HOME", os.path.expanduser("~"))
    cache = os.environ.get("TRITON_CACHE_DIR") or os.path.join(home, ".triton", "cache")
    yield "", f"{cache} (Triton's; $TRITON_CACHE_DIR)"


if __name__ == "__main__":
    raise SystemExit(main())
