"""NVIDIA's profiler and sanitizers, run on every operation."""

from __future__ import annotations

import csv
import io
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from gpu_rows import NotHere

import tritonaff

METRICS = {
    "gpu__time_duration.sum": "ns",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "percent_of_instructions",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "percent_of_memory",
}


def run_tool(tool: str, device: torch.device) -> dict[str, Any]:
    """ncu's figures of our kernels, or the verdict of compute-sanitizer."""
    program = "ncu" if tool == "ncu" else "compute-sanitizer"
    path = shutil.which(program) or shutil.which(program, path="/usr/local/cuda/bin")
    if path is None:
        raise NotHere(f"{program} is not installed")
    # No API errors: torch asks the driver for features that it may not have.
    options, height = ["--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no"], 37
    if tool == "ncu":
        options = ["--csv", "--metrics", ",".join(METRICS), "--clock-control", "none"]
        options += ["--print-units", "base"]
        options += ["--kernel-name", f"regex:^({'|'.join(kernel_names())})$"]
        height = 514  # an image that fills the device
    rows = Path(__file__).with_name("gpu_rows.py")
    command = [path, *options, sys.executable, str(rows), "exercise"]
    command += ["--height", str(height)]
    # Every tensor has its own allocation: otherwise an address beyond a tensor is in another.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    result = run_group([*command, "--device", str(device)], environment)
    if result.returncode != 0:
        lines = (result.stdout + result.stderr).strip().splitlines()
        raise RuntimeError("\n".join([line for line in lines if "=" in line][-20:] or lines[-20:]))
    if tool != "ncu":
        return {}
    kernels = ncu_kernels(result.stdout)
    if not kernels:
        raise RuntimeError(f"ncu has seen no kernel: {result.stdout[-2000:]}")
    return {"kernels": kernels}


def run_group(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Runs a command; an interrupt ends the processes of the command too."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            output, errors = process.communicate()
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def kernel_names() -> list[str]:
    """Names of this library's kernels."""
    folder = Path(tritonaff.__file__).parent / "kernels"
    names = [
        re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.M) for path in folder.rglob("*.py")
    ]
    return sorted({name for each in names for name in each})


def ncu_kernels(output: str) -> list[dict[str, Any]]:
    """A row for every launch of this library's kernels: name and metrics."""
    table = output[output.index('"ID"') :] if '"ID"' in output else ""
    kernels: dict[str, dict[str, Any]] = {}
    for line in csv.DictReader(io.StringIO(table)):
        if line["Metric Name"] in METRICS and line["Metric Value"] != "n/a":
            kernel = kernels.setdefault(line["ID"], {"kernel": line["Kernel Name"]})
            value = float(line["Metric Value"].replace(",", ""))
            kernel[METRICS[line["Metric Name"]]] = value
    return list(kernels.values())
