"""Runs a function of a test module in several processes that form a gloo group."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import torch
from interpreted import BLOCKS
from torch import distributed as dist

from tritonaff.kernels.blocks import override


def run_processes(module, function, size, folder):
    """The results of ``function(rank, size)`` of a test module, one for each process."""
    for code, errors in end_processes(module, function, size, folder):
        assert code == 0, errors
    return [torch.load(folder / f"{rank}.pt") for rank in range(size)]


def end_processes(module, function, size, folder):
    """The exit status and the standard error of each process."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, __file__, module, function, str(size), str(folder)]
    processes = [
        subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True, env=environment)
        for rank in range(size)
    ]
    try:
        errors = [process.communicate(timeout=600)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, errors, strict=True)]


def main(module, function, size, folder, rank):
    size, folder, rank = int(size), Path(folder), int(rank)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=size)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    with override(**BLOCKS if interpreted else {}):
        result = getattr(importlib.import_module(module), function)(rank, size)
    torch.save(result, folder / f"{rank}.pt")
    dist.barrier()
    os._exit(0)  # an ordinary exit now and then aborts in gloo's threads


if __name__ == "__main__":
    main(*sys.argv[1:])
