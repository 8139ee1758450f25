"""Time and memory of one implementation of one operation."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler

from tritonaff.bench.rivals import Maker, rivals
from tritonaff.ops.backend import use_backend
from tritonaff.testing import Case, differentiable

try:
    from torch._inductor.utils import fresh_cache as fresh_cache
except ImportError:  # torch before 2.8
    from torch._inductor.utils import fresh_inductor_cache as fresh_cache

# torch 2.13 prints two lines whenever it profiles.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
MODES = ("fwd", "bwd", "fwd_bwd")
YARDSTICK = "cross_entropy"


@dataclass(frozen=True)
class Row:
    """One row of the table and of the JSON, with the same names."""

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


@dataclass(frozen=True)
class Measured:
    """One implementation on some inputs."""

    result: tuple[Tensor, ...]
    """Loss and gradients."""
    by_mode: dict[str, Measurement]


def measure(
    case: Case, impl: str, modes: tuple[str, ...], inputs: tuple[Tensor, ...], quick: bool
) -> Measured:
    """Runs one implementation: its result, and time and memory by mode.

    Compile seconds are the time of torch.compile's first call, forward and backward, with nothing
    in its caches: for "compiled" on the reference, for our own on the opaque op.
    """
    others = yardsticks(case)
    backend: Any = "auto" if impl in others else {"compiled": "reference"}.get(impl, impl)
    loss = case.loss
    if impl in others:
        loss, inputs = others[impl](*inputs)
    inputs = tuple(x.detach().requires_grad_(x.is_floating_point()) for x in inputs)
    device = inputs[0].device
    run_loss = loss
    compile_s = None

    def forward(_: Any = None) -> Tensor:
        return run_loss(*inputs)

    def backward(value: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(value, differentiable(inputs))

    def forward_backward(_: Any = None) -> tuple[Tensor, ...]:
        value = forward()
        return value.detach(), *backward(value)

    if impl not in ("reference", *others) and compiler_works(device):
        torch._dynamo.reset()
        with fresh_cache(), use_backend(backend):
            run_loss = torch.compile(loss, fullgraph=True)
            start = time.perf_counter()
            forward_backward()
            _wait(device)
            compile_s = time.perf_counter() - start
        if impl != "compiled":
            run_loss = loss

    # The function that is timed, and the preparation before every time.
    stages: dict[str, tuple[Callable[[Any], Any], Callable[[], Any]]] = {
        "fwd": (forward, lambda: None),
        "bwd": (backward, forward),
        "fwd_bwd": (forward_backward, lambda: None),
    }
    by_mode = {}
    with use_backend(backend):
        result = forward_backward()
        for mode in modes:
            run, prepare = stages[mode]
            ms = median_ms(run, device, quick, prepare)
            by_mode[mode] = Measurement(ms, compile_s, peak_bytes(run, device, prepare))
    return Measured(result, by_mode)


def yardsticks(case: Case) -> dict[str, Maker]:
    """Losses of others, by the name of their row."""
    return {YARDSTICK: case.yardstick or _cross_entropy, **rivals(case.name)}


def compiler_works(device: torch.device) -> bool:
    """True if Inductor finds the compiler that it needs."""
    if device.type != "cpu":
        return True
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True


def _cross_entropy(
    logits: Tensor, target: Tensor, *_: Tensor
) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    def loss(logits: Tensor, target: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(logits, target.long(), ignore_index=255)

    return loss, (logits, target)


def median_ms(
    run: Callable[[Any], Any],
    device: torch.device,
    quick: bool,
    prepare: Callable[[], Any] = lambda: None,
) -> float:
    """Median of runs for about a second, at least 5 (2 if quick), after two to warm up.

    ``run`` takes the result of ``prepare``; only ``run`` is timed.
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
    """Peak memory of tensors during ``run``, beyond the memory held before."""
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


def copy_gb_per_s(device: torch.device, quick: bool = False) -> float:
    """Bandwidth of copying 1 GiB (16 MiB if quick), read plus write: an upper bound for kernels."""
    source = torch.empty(1 << (22 if quick else 28), dtype=torch.float32, device=device)
    sink = torch.empty_like(source)
    ms = median_ms(lambda _: sink.copy_(source), device, quick)
    return 2 * source.nbytes / ms / 1e6


def traffic_bytes(mode: str, inputs: tuple[Tensor, ...]) -> int:
    """The least bytes to move: inputs in; in the backward pass inputs in, gradients out."""
    forward = sum(x.nbytes for x in inputs)
    backward = forward + sum(x.nbytes for x in differentiable(inputs))
    return {"fwd": forward, "bwd": backward, "fwd_bwd": forward + backward}[mode]


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)
