"""The measured machine, and everything else that a figure depends on."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch

from tritonaff.version import __version__

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def usable_device(name: str) -> torch.device:
    """Raises ValueError, in one line, for a device that cannot compute here."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # a meta tensor has nothing to read back
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"device {name} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def describe(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cpu":
        return f"CPU {cpu_name()}, {torch.get_num_threads()} threads"
    return str(torch.get_device_module(device).get_device_name(device))


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Everything a figure depends on."""
    result = {
        "tritonaff": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    try:
        result["triton"] = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        result["triton"] = "none"
    git = ["git", "-C", str(Path(__file__).parent)]
    # Results, and the page about them, change during a measurement.
    status = ["status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude,top)docs"]
    try:
        commit, changes = (
            subprocess.run([*git, *what], capture_output=True, text=True, check=True).stdout.strip()
            for what in (["describe", "--always"], status)
        )
        result["commit"] = commit + ("-dirty" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        code = (path.read_bytes() for path in sorted(Path(__file__).parent.parent.rglob("*.py")))
        result["commit"] = f"unknown, files {hashlib.sha256(b''.join(code)).hexdigest()[:7]}"
    return result


def one_line(names: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in names.items())
