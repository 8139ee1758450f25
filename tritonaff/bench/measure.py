"""Time and memory of one implementation of one operation."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._inductor.utils import fresh_cache

from tritonaff.bench.cases import Case
from tritonaff.ops.backend import use_backend

MODES = ("fwd", "bwd", "fwd_bwd")
YARDSTICK = "cross_entropy"


@dataclass(frozen=True)
class Row:
    """One line of the bench; the field names are those of its JSON."""

    op: str
    impl: str
    mode: str
    dtype: str
    shape: tuple[int, ...]
    ms: float
    speedup_eager: float | None
    speedup_compiled: float | None
    compile_s: float | None
    peak_bytes: int
    gb_per_s: float | None


@dataclass(frozen=True)
class Measurement:
    ms: float
    compile_s: float | None
    peak_bytes: int


def measure(
    case: Case, impl: str, modes: tuple[str, ...], logits: Tensor, target: Tensor, quick: bool
) -> dict[str, Measurement]:
    """Median milliseconds, compile seconds and peak bytes over the inputs, by mode."""
    backend = {YARDSTICK: "auto", "compiled": "reference"}.get(impl, impl)
    loss = _cross_entropy if impl == YARDSTICK else case.loss
    if impl == "compiled":
        torch._dynamo.reset()
        loss = torch.compile(loss, fullgraph=True)
    logits = logits.detach().requires_grad_()

    def forward(_: Any = None) -> Tensor:
        return loss(logits, target)

    def backward(value: Tensor) -> None:
        torch.autograd.grad(value, logits)

    def forward_backward(_: Any = None) -> None:
        backward(forward())

    # What is timed, and what has to happen before every time.
    stages: dict[str, tuple[Callable[[Any], Any], Callable[[], Any]]] = {
        "fwd": (forward, lambda: None),
        "bwd": (backward, forward),
        "fwd_bwd": (forward_backward, lambda: None),
    }
    results = {}
    with use_backend(backend):
        compile_s = None
        if impl == "compiled":
            with fresh_cache():  # what an earlier process compiled would be found again
                start = time.perf_counter()
                forward_backward()
                compile_s = time.perf_counter() - start
        for mode in modes:
            run, prepare = stages[mode]
            ms = median_ms(run, logits.device, quick, prepare)
            results[mode] = Measurement(ms, compile_s, peak_bytes(run, logits.device, prepare))
    return results


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits, target.long(), ignore_index=255)


def median_ms(
    run: Callable[[Any], Any],
    device: torch.device,
    quick: bool,
    prepare: Callable[[], Any] = lambda: None,
) -> float:
    """Median of runs for about a second, at least 5 (2 if quick), after two to warm up.

    What ``prepare`` returns goes into ``run``; only ``run`` is timed.
    """
    seconds: list[float] = []
    for _ in range(2):
        run(prepare())
    deadline = time.perf_counter() + (0.1 if quick else 1.0)
    while len(seconds) < (2 if quick else 5) or time.perf_counter() < deadline:
        prepared = prepare()
        _wait(device)
        start = time.perf_counter()
        run(prepared)
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds)


def peak_bytes(
    run: Callable[[Any], Any], device: torch.device, prepare: Callable[[], Any] = lambda: None
) -> int:
    """The most memory that tensors held at one time during ``run``, over what they held before."""
    prepared = prepare()
    if device.type == "cuda":
        _wait(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run(prepared)
        _wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run(prepared)
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def copy_gb_per_s(device: torch.device) -> float:
    """Bandwidth of copying 1 GiB, read plus write: what a kernel can hope for."""
    source = torch.empty(1 << 28, dtype=torch.float32, device=device)
    sink = torch.empty_like(source)
    ms = median_ms(lambda _: sink.copy_(source), device, quick=False)
    return 2 * source.nbytes / ms / 1e6


def traffic_bytes(mode: str, logits: Tensor, target: Tensor) -> int:
    """The least that has to move: forward reads the logits, backward reads them and writes the
    gradient.
    """
    forward = logits.nbytes + target.nbytes
    backward = 2 * logits.nbytes + target.nbytes
    return {"fwd": forward, "bwd": backward, "fwd_bwd": forward + backward}[mode]


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)
