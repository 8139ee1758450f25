"""Compiles the C++ kernels of an operation on first use, keeps the result, and loads it.

A compiled library is a file in the user's cache folder. Its name holds a hash of everything that
decides about its content: sources, flags, CPU and compiler.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

OPERATIONS = (
    "affinity_field",
    "affinity_propagation",
    "affinity_regression",
    "box_pairwise",
    "dilated_affinity",
    "instance_affinity",
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
# The numbers of dtypes in common.h.
CODES = {dtype: code for code, dtype in enumerate((*DTYPES, *INTEGERS))}
COMPILERS = ("c++", "g++", "clang++")
# -ffast-math is not among the flags: NaN must stay NaN. -fopenmp is not among them either: the
# kernels take their threads from the runtime that torch has loaded, see common.h.
FLAGS = (
    "-std=c++17",
    "-O2",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fopenmp-simd",
    "-fvisibility=hidden",
    "-fPIC",
    "-shared",
)
SOURCES = Path(__file__).parent
REMEDY = "set TRITONAFF_CACHE to a folder that this user alone can write to"

_lock = threading.Lock()
_loaded: dict[str, ctypes.CDLL] = {}
_obstacles: dict[str, str] = {}


class Images(ctypes.Structure):
    """A tensor (N, C, H, W) as the kernels take it; common.h holds the same fields."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int64),
        ("stride_n", ctypes.c_int64),
        ("stride_c", ctypes.c_int64),
        ("stride_h", ctypes.c_int64),
        ("stride_w", ctypes.c_int64),
    )


def images(tensor: Tensor) -> Images:
    """The fields of a tensor (N, C, H, W), or of labels (N, H, W), which must outlive them."""
    stride_n, *stride_c, stride_h, stride_w = tensor.stride()
    strides = stride_n, *(stride_c or (0,)), stride_h, stride_w
    return Images(tensor.data_ptr(), CODES[tensor.dtype], *strides)


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    """The address of a contiguous tensor's elements, or null for None."""
    if tensor is not None and not tensor.is_contiguous():
        raise AssertionError("a native kernel takes contiguous memory here")
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def integers(values: list[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)


def obstacle(operation: str, tensor: Tensor) -> str | None:
    """The reason why no native kernel can run for this tensor, None if it can. Compiles the kernel
    if that has not been done.
    """
    if tensor.device.type != "cpu":
        return f"native kernels run on CPUs, got device {tensor.device}"
    if tensor.dtype not in DTYPES:
        return f"native kernels compute in float32, got {tensor.dtype}"
    if turned_off():
        return "TRITONAFF_NATIVE turns native kernels off"
    if operation not in _loaded and operation not in _obstacles:
        with _lock:
            _load_once(operation)
    return _obstacles.get(operation)


def turned_off() -> bool:
    return os.environ.get("TRITONAFF_NATIVE", "1").lower() in ("0", "false", "off", "no")


def library(operation: str) -> ctypes.CDLL:
    """The loaded kernels of an operation for which :func:`obstacle` gave None."""
    return _loaded[operation]


def _load_once(operation: str) -> None:
    if operation in _loaded or operation in _obstacles:
        return
    try:
        path, seconds = compile_library(operation)
        try:
            _loaded[operation] = ctypes.CDLL(str(path))
        except OSError:
            # A damaged file, of a crash or a full disk: compiles it again, once.
            path.unlink()
            path, seconds = compile_library(operation)
            _loaded[operation] = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        _obstacles[operation] = str(error)
        warnings.warn(
            f"tritonaff: no native kernels for {operation}: {error}. Portable torch operations "
            f"run instead, which are slower; TRITONAFF_NATIVE=0 chooses them without this warning",
            stacklevel=2,
        )
        return
    if seconds:
        line = f"tritonaff: compiled {operation} for this CPU in {seconds:.1f} s, once: {path}"
        print(line, file=sys.stderr)


class Build(NamedTuple):
    """One compiled library: where it is and from what it is made."""

    path: Path
    compiler: str | None
    command: list[str]


def plan(operation: str) -> Build:
    """The library of an operation for this CPU and the compiler at hand. Without a compiler, a
    library that any compiler made for this CPU.
    """
    made_from = hashlib.sha256()
    for source in (SOURCES / "common.h", SOURCES / f"{operation}.cpp"):
        made_from.update(source.read_bytes())
    made_from.update(" ".join([*flags(), cpu()]).encode())
    stem = f"{operation}-{made_from.hexdigest()[:16]}"
    compiler = find_compiler()
    if compiler is None:
        compiled = sorted(cache_folder().glob(f"{stem}-*.so"))
        return Build(compiled[0] if compiled else cache_folder() / f"{stem}.so", None, [])
    # The size and the time of the compiler's file stand for its version: asking it takes longer.
    program = os.stat(compiler[0])
    identity = f"{compiler} {program.st_size} {program.st_mtime_ns}"
    suffix = hashlib.sha256(identity.encode()).hexdigest()[:8]
    path = cache_folder() / f"{stem}-{suffix}.so"
    return Build(
        path, shlex.join(compiler), [*compiler, *flags(), str(SOURCES / f"{operation}.cpp"), "-o"]
    )


def compile_library(operation: str) -> tuple[Path, float]:
    """The path of the compiled library, and the seconds that compiling took, 0 if it was there.

    Raises:
        OSError: no compiler, or no cache folder to write to.
        subprocess.SubprocessError: the compiler fails.
    """
    build = plan(operation)
    folder = build.path.parent
    if build.path.exists():
        check_private(folder)
        return build.path, 0.0
    if build.compiler is None:
        tried = os.environ.get("CXX", "").strip() or ", ".join(COMPILERS)
        raise FileNotFoundError(
            f"no C++ compiler found (tried {tried}); install one, for example the package g++, or "
            "name it in $CXX, or compile ahead with python -m tritonaff.native"
        )
    start = time.perf_counter()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        check_private(folder)
        # Processes that compile at the same time write files of their own; the last one to be
        # moved stays, and no process sees half a file.
        handle, temporary = tempfile.mkstemp(dir=folder, suffix=".tmp")
    except OSError as error:
        if isinstance(error, NotPrivateError):
            raise
        raise OSError(
            f"nothing can be written to the cache folder {folder} ({error.strerror}); {REMEDY}"
        ) from error
    os.close(handle)
    try:
        result = subprocess.run(
            [*build.command, temporary],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=300,
            check=False,
        )
        if result.returncode:
            lines = result.stderr.strip().splitlines()[-3:] or [f"status {result.returncode}"]
            raise subprocess.SubprocessError(f"{build.compiler} failed: {' '.join(lines)}")
        os.replace(temporary, build.path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return build.path, time.perf_counter() - start


def find_compiler() -> list[str] | None:
    """The command of the C++ compiler, its program as a path: $CXX, else the first one found."""
    given = shlex.split(os.environ.get("CXX", ""))
    for program, *arguments in [given] if given else [[name] for name in COMPILERS]:
        found = shutil.which(program)
        if found:
            return [found, *arguments]
    return None


def flags() -> list[str]:
    return [*FLAGS, f"-march={architecture()}"] if architecture() else list(FLAGS)


def cache_folder() -> Path:
    given = os.environ.get("TRITONAFF_CACHE")
    if given:
        return Path(given)
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "tritonaff"


class NotPrivateError(PermissionError):
    """Others could put files into a folder whose files are loaded into processes."""


def check_private(folder: Path) -> None:
    """NotPrivateError if other users can write to the folder."""
    status = folder.stat()
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise NotPrivateError(
            f"others can write to the cache folder {folder}, and its files are loaded into this "
            f"process; chmod go-w {folder}, or {REMEDY}"
        )
    if hasattr(os, "getuid") and status.st_uid not in (0, os.getuid()):
        raise NotPrivateError(f"the cache folder {folder} is another user's; {REMEDY}")


def architecture() -> str:
    """The value of -march: the CPU of this machine, or the one that TRITONAFF_NATIVE_ARCH names."""
    return os.environ.get("TRITONAFF_NATIVE_ARCH", "native")


@cache
def _this_cpu() -> str:
    """The CPU's model and features: libraries for one CPU may not run on another."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    kinds = ("model name", "flags", "CPU part", "Features")
    return " ".join(sorted({line for line in lines if line.startswith(kinds)}))


def cpu() -> str:
    """The CPU that libraries are compiled for."""
    return _this_cpu() if architecture() == "native" else platform.machine()
