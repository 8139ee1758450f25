"""Measures the figures that the project aims at on one device.

    python tools/gpu_suite.py           # on a machine with a GPU; --device cpu --quick tries it
    python tools/gpu_suite.py report    # writes docs/performance.md from docs/results/

Correctness comes first (the tests), then every row of :data:`ROWS` with its rivals in the same run,
then profilers and sanitizers. Every finished row is saved, with its commit, to
docs/results/DEVICE.json, and is not measured again: after an interrupt, or after ``--minutes``, the
next run resumes. A failed row is recorded as failed, and is tried again with ``--retry``. The
output of the tests is in DEVICE.log. The exit status is 1 if anything failed, 2 if rows are left,
and 3 if an error has left this process without its device: the next run resumes. In the report, a
figure does not count if its tests failed or ran at another commit.
"""

from __future__ import annotations

import argparse
import csv
import faulthandler
import gc
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from performance_page import write_page
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.nn import functional as F

import tritonaff
from tritonaff.bench import measure
from tritonaff.bench.machine import DTYPES, describe, usable_device, versions
from tritonaff.bench.tables import write_json
from tritonaff.testing import (
    AFFINITY_FIELD_SIZES,
    CASES,
    Shape,
    differentiable,
    make_inputs,
)

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
COMMANDS = ("run", "report", "exercise", "compile")
PARTS = ("correctness", "figures", "tools")
# Tests that run tiles, and their numbers of processes; the other tests do not touch a GPU.
TEST_FILES = {
    "test_affinity_field.py": 4,
    "test_affinity_regression.py": 2,
    "test_affinity_propagation.py": 1,
    "test_dilated_affinity.py": 1,
    "test_cuda_graphs.py": 1,
    "test_compile.py": 1,
    "test_backend.py": 1,
    "nightly/test_offsets.py": 1,
}
# Fills the memory of a GPU.
ALONE = "nightly/test_offsets.py"
FIELD_SHAPES = ((16, 21, 60, 60), (8, 19, 90, 90), (8, 19, 512, 512), (4, 19, 512, 1024),
                (4, 150, 512, 512))  # fmt: skip
SMALL = FIELD_SHAPES[0]
QUICK_SHAPE = (2, 5, 16, 20)
# Memory of the eager affinity field, in multiples of the logits.
EAGER_FIELD_COPIES = 220
MINUTES, MINUTES_OF_TESTS, MINUTES_PER_ROW = 9, 5, 4
# Profiled runs for one time.
PROFILED_RUNS = 10


class OutOfTime(Exception):
    """A row exceeds its time."""


class NotHere(Exception):
    """A row that this device or this version does not have."""


@dataclass(frozen=True)
class Row:
    """One measurement: ``measure(shape, dtype, bench)`` returns numbers by name."""

    name: str
    measure: Callable[[Shape, torch.dtype, Bench], dict[str, Any]]
    shapes: tuple[Shape, ...]
    dtypes: tuple[str, ...] = ("float32", "bfloat16")


@dataclass(frozen=True)
class Bench:
    """The device, and the thoroughness of the measurement."""

    device: torch.device
    quick: bool

    def ms(self, run: Callable[[], Any]) -> float:
        return round(measure.median_ms(ignoring(run), self.device, self.quick), 5)

    def peak_bytes(self, run: Callable[[], Any]) -> int:
        return measure.peak_bytes(ignoring(run), self.device)

    def launches(
        self, run: Callable[[Any], Any], prepare: Callable[[], Any] = lambda: None
    ) -> tuple[float, float]:
        """The number of kernels, copies and fills that the device runs, and their milliseconds."""
        if self.device.type != "cuda":
            raise NotHere("launches are counted on CUDA devices")
        run(prepare())
        prepared = [prepare() for _ in range(PROFILED_RUNS)]
        torch.cuda.synchronize()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            while prepared:
                run(prepared.pop())
            torch.cuda.synchronize()
        us = [
            event.time_range.elapsed_us()
            for event in profile.events() or ()
            if event.device_type == DeviceType.CUDA and not event.is_user_annotation
        ]
        if not us:
            raise NotHere("the profiler sees no kernels")
        return len(us) / PROFILED_RUNS, sum(us) / 1e3 / PROFILED_RUNS

    def device_ms(
        self, run: Callable[[Any], Any], prepare: Callable[[], Any] = lambda: None
    ) -> float | None:
        """Milliseconds of the kernels alone; None where no profiler sees them."""
        try:
            return self.launches(run, prepare)[1]
        except NotHere:
            return None

    def inputs(self, shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        logits, target = _inputs(shape)
        return logits.to(self.device, dtype), target.to(self.device)


def ignoring(run: Callable[[], Any]) -> Callable[[Any], Any]:
    return lambda _: run()


# Drawing inputs takes longer than the rows that use them.
_inputs = cache(make_inputs)


def step(
    loss: Callable[..., Tensor], *inputs: Tensor, backend: str = "auto"
) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward of a loss."""
    leaves = tuple(x.detach().requires_grad_(x.is_floating_point()) for x in inputs)

    def run() -> tuple[Tensor, ...]:
        with tritonaff.use_backend(backend):
            return torch.autograd.grad(loss(*leaves), differentiable(leaves))

    return run


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """The yardstick; half precision runs under autocast, as in training scripts."""
    autocast: AbstractContextManager[object] = nullcontext()
    if logits.dtype != torch.float32:
        autocast = torch.autocast(logits.device.type, dtype=logits.dtype)
    with autocast:
        loss: Tensor = F.cross_entropy(logits, target, ignore_index=255)
    return loss


def field(logits: Tensor, target: Tensor) -> Tensor:
    return tritonaff.affinity_field_loss(logits, target, AFFINITY_FIELD_SIZES)


def fused(logits: Tensor, target: Tensor) -> Tensor:
    return tritonaff.affinity_field_cross_entropy(logits, target, AFFINITY_FIELD_SIZES)


def images_that_fit(shape: Shape, bench: Bench) -> int:
    """Number of images that the eager reference holds in two thirds of the free memory."""
    if bench.device.type != "cuda":
        return 1
    free, _ = torch.cuda.mem_get_info(bench.device)
    one = 4 * shape[1] * shape[2] * shape[3] * EAGER_FIELD_COPIES
    fit = int(free * 2 / 3) // one
    if fit == 0:
        raise NotHere(f"one image takes eager mode {one / 1e9:.0f} GB, free are {free / 1e9:.0f}")
    return min(shape[0], fit)


def against_eager(
    loss: Callable[..., Tensor], inputs: tuple[Tensor, ...], bench: Bench
) -> dict[str, Any]:
    ours, rival = (bench.ms(step(loss, *inputs, backend=x)) for x in ("auto", "reference"))
    return {"ms": ours, "rival_ms": rival, "ratio": rival / ours}


def field_against_eager(shape: Shape, dtype: torch.dtype, bench: Bench) -> dict[str, Any]:
    shape = (images_that_fit(shape, bench), *shape[1:])
    return {**against_eager(field, bench.inputs(shape, dtype), bench), "images": shape[0]}


def propagation(shape: Shape, dtype: torch.dtype, bench: Bench) -> dict[str, Any]:
    case = CASES["affinity_propagation"]
    return against_eager(case.loss, case.make_inputs(shape, dtype, bench.device), bench)


def field_against_compiled(shape: Shape, dtype: torch.dtype, bench: Bench) -> dict[str, Any]:
    if not measure.compiler_works(bench.device):
        raise NotHere("no compiler")
    shape = (images_that_fit(shape, bench), *shape[1:])
    inputs = bench.inputs(shape, dtype)
    ours = bench.ms(step(field, *inputs))
    torch._dynamo.reset()
    run = step(torch.compile(field, fullgraph=True), *inputs, backend="reference")
    start = time.perf_counter()
    run()
    compile_s = time.perf_counter() - start
    rival = bench.ms(run)
    values = {"ms": ours, "rival_ms": rival, "ratio": rival / ours, "images": shape[0]}
    return {**values, "compile_s": round(compile_s, 1)}


def against_cross_entropy(
    loss: Callable[..., Tensor], shape: Shape, dtype: torch.dtype, bench: Bench
) -> dict[str, Any]:
    inputs = bench.inputs(shape, dtype)
    ours, rival = (step(each, *inputs) for each in (loss, cross_entropy))
    values = {"ms": bench.ms(ours), "rival_ms": bench.ms(rival)}
    values["ratio"] = values["ms"] / values["rival_ms"]
    of_kernels, of_rival = (bench.device_ms(ignoring(run)) for run in (ours, rival))
    if of_kernels and of_rival:
        ratio = of_kernels / of_rival
        values |= {"device_ms": of_kernels, "rival_device_ms": of_rival, "device_ratio": ratio}
    return values


def field_memory(shape: Shape, dtype: torch.dtype, bench: Bench) -> dict[str, Any]:
    logits, target = bench.inputs(shape, dtype)
    run = step(field, logits, target)
    run()
    peak = bench.peak_bytes(run)
    return {"peak_bytes": peak, "gradient_bytes": logits.nbytes, "ratio": peak / logits.nbytes}


def launches(
    loss: Callable[..., Tensor], shape: Shape, dtype: torch.dtype, bench: Bench
) -> dict[str, Any]:
    inputs = bench.inputs(shape, dtype)
    values: dict[str, Any] = {}
    torch._dynamo.reset()
    for name, each in (("launches", loss), ("compiled_launches", torch.compile(loss))):
        run = step(each, *inputs)
        values[name], values[f"{name}_ms"] = bench.launches(ignoring(run))
    return values


def dilated(shape: Shape, dtype: torch.dtype, bench: Bench) -> dict[str, Any]:
    """The bandwidth of the kernels (bytes to move / time), as a share of a copy's bandwidth."""
    case = CASES["dilated_affinity"]
    inputs = case.make_inputs(shape, dtype, bench.device)
    leaf, target = inputs[0].detach().requires_grad_(), inputs[1]
    copy = measure.copy_gb_per_s(bench.device, bench.quick)

    def forward(_: Any = None) -> Tensor:
        return case.loss(leaf, target)

    def backward(loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, leaf)

    values: dict[str, Any] = {"copy_gb_per_s": round(copy, 1)}
    modes: tuple[tuple[str, Callable[[Any], Any], Callable[[], Any]], ...] = (
        ("fwd", forward, lambda: None), ("bwd", backward, forward),
    )  # fmt: skip
    for mode, run, prepare in modes:
        ms = measure.median_ms(run, bench.device, bench.quick, prepare)
        of_kernels = bench.device_ms(run, prepare) or ms
        gb_per_s = measure.traffic_bytes(mode, (leaf, target)) / of_kernels / 1e6
        values |= {f"{mode}_ms": round(ms, 5), f"{mode}_device_ms": round(of_kernels, 5)}
        values[f"{mode}_percent"] = 100 * gb_per_s / copy
    return values


class Step(torch.nn.Module):
    """The part of a training script that is compiled, with and without the loss."""

    def __init__(self, classes: int, with_loss: bool) -> None:
        super().__init__()
        self.net = torch.nn.Conv2d(3, classes, 3, padding=1)
        self.with_loss = with_loss

    def forward(self, image: Tensor, target: Tensor) -> Tensor:
        logits = self.net(image)
        loss = F.cross_entropy(logits, target, ignore_index=255)
        return loss + field(logits, target) if self.with_loss else loss


def compile_seconds(shape: Shape, dtype: torch.dtype, bench: Bench) -> dict[str, Any]:
    """Seconds that the loss adds to the first step, in a process that has compiled no kernel."""
    if not measure.compiler_works(bench.device):
        raise NotHere("no compiler")
    command = [sys.executable, __file__, "compile", "--device", str(bench.device)]
    output = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if output.returncode != 0:
        raise RuntimeError(output.stderr[-2000:])
    values: dict[str, Any] = json.loads(output.stdout.splitlines()[-1])
    return values


def first_steps(shape: Shape, device: torch.device) -> dict[str, float]:
    """Seconds of the first compiled step with and without the loss, nothing in any cache."""
    n, classes, height, width = shape
    image = torch.randn(n, 3, height, width, device=device)
    _, target = make_inputs(shape, device=device)
    seconds = []
    for with_loss in (False, False, True):  # the first one loads the compiler
        module = Step(classes, with_loss).to(device)
        torch._dynamo.reset()
        with measure.fresh_cache():
            start = time.perf_counter()
            torch.compile(module, fullgraph=True)(image, target).backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    return {"with_s": seconds[2], "without_s": seconds[1], "seconds": seconds[2] - seconds[1]}


def boundary(shape: Shape, dtype: torch.dtype, bench: Bench) -> dict[str, Any]:
    """One launch in a compiled function, registered as custom_op and as triton_op: microseconds of
    a call when calls follow each other, and microseconds of work on the device.
    """
    if bench.device.type != "cuda":
        raise NotHere("a triton_op runs on a GPU")
    from tritonaff.kernels import affinity_propagation as kernels

    def launch(kernel: Any, grad: Tensor, p: Tensor, total: Tensor) -> Tensor:
        out = torch.empty_like(p)
        _, classes, height, width = p.shape
        blocks = kernels.blocks.normalize_options(p, kernels.Blocks())
        kernel[kernels.blocks.pixel_grid(p, blocks["BLOCK_P"])](
            grad, p, total, out, classes, width, height * width, *grad.stride(), **blocks
        )  # fmt: skip
        return out

    @torch.library.custom_op("tritonaff_bench::by_custom_op", mutates_args=())
    def by_custom_op(grad: Tensor, p: Tensor, total: Tensor) -> Tensor:
        return launch(kernels.normalize_backward_kernel, grad, p, total)

    by_custom_op.register_fake(lambda grad, p, total: torch.empty_like(p))

    @torch.library.triton_op("tritonaff_bench::by_triton_op", mutates_args=())
    def by_triton_op(grad: Tensor, p: Tensor, total: Tensor) -> Tensor:
        kernel = torch.library.wrap_triton(kernels.normalize_backward_kernel)
        return launch(kernel, grad, p, total)

    n, _, height, width = shape
    grad, p = (torch.rand(shape, device=bench.device) for _ in range(2))
    total = torch.ones(n, height, width, device=bench.device)
    inputs = bench.inputs(shape, torch.float32)
    torch._dynamo.reset()
    calls: dict[str, Callable[[], Any]] = {
        name: partial(torch.compile(op, fullgraph=True), grad, p, total)
        for name, op in (("custom_op", by_custom_op), ("triton_op", by_triton_op))
    }
    calls["loss"] = step(field, *inputs)
    calls["compiled_loss"] = step(torch.compile(field, fullgraph=True), *inputs)
    calls["compiled_cross_entropy"] = step(torch.compile(cross_entropy), *inputs)
    values: dict[str, Any] = {}
    for name, call in calls.items():
        values[f"{name}_us"] = 1e3 * bench.ms(partial(_repeat, call, 100)) / 100
        values[f"{name}_launches"], ms = bench.launches(ignoring(call))
        values[f"{name}_device_us"] = 1e3 * ms
    return values


def _repeat(call: Callable[[], Any], times: int) -> None:
    for _ in range(times):
        call()


# Cheap rows first: an interrupted run has them. The compiler takes half a minute for the
# reference at every shape.
COMPILED_SHAPES = (FIELD_SHAPES[2], SMALL, FIELD_SHAPES[4], FIELD_SHAPES[3], FIELD_SHAPES[1])
EVERY_PIXEL = CASES["affinity_regression_every_pixel"].loss
ROWS = (
    Row("field_alone", partial(against_cross_entropy, field), FIELD_SHAPES),
    Row("field_fused", partial(against_cross_entropy, fused), FIELD_SHAPES),
    Row("field_memory", field_memory, FIELD_SHAPES),
    Row("grids", partial(against_cross_entropy, tritonaff.affinity_regression_loss), FIELD_SHAPES),
    Row("every_pixel", partial(against_cross_entropy, EVERY_PIXEL), ((1, 19, 1024, 2048),)),
    Row("many_classes", partial(against_cross_entropy, EVERY_PIXEL), (FIELD_SHAPES[4],)),
    Row("dilated", dilated, ((8, 32, 512, 512), (4, 32, 512, 1024))),
    Row("field_against_eager", field_against_eager, FIELD_SHAPES),
    Row("propagation", propagation, ((4, 21, 513, 513),)),
    Row("field_launches", partial(launches, field), (SMALL,)),
    Row("grids_launches", partial(launches, tritonaff.affinity_regression_loss), (SMALL,)),
    Row("boundary", boundary, (SMALL,), ("float32",)),
    Row("compile_seconds", compile_seconds, (SMALL,), ("float32",)),
    Row("field_against_compiled", field_against_compiled, COMPILED_SHAPES),
)


def jobs(quick: bool) -> Iterator[tuple[str, Row, Shape, str]]:
    for row in ROWS:
        for dtype in row.dtypes:
            for shape in (QUICK_SHAPE,) if quick else row.shapes:
                if quick and row.name == "dilated":
                    shape = (2, 32, 16, 20)
                yield f"{row.name} {dtype} {','.join(map(str, shape))}", row, shape, dtype


class Record:
    """The results of one device and one version of Python, torch and Triton, saved after every row;
    each row has its commit.
    """

    def __init__(self, folder: Path, device: torch.device, quick: bool, retry: bool) -> None:
        name = describe(device)
        file = f"{name} quick" if quick else name
        self.path = folder / f"{re.sub(r'[^a-z0-9]+', '-', file.lower()).strip('-')}.json"
        used = versions()
        self.commit = used.pop("commit")
        head = {"suite": True, "device": name, "quick": quick, "versions": used}
        self.content: dict[str, Any] = {**head, "rows": {}}
        if self.path.exists():
            before = json.loads(self.path.read_text())
            if all(before.get(key) == value for key, value in head.items()):
                self.content = before
        for row in self.content["rows"].values():
            if row["status"] == "started":
                row |= {"status": "failed", "error": "the process ended before the row did"}
        if retry:
            rows = self.content["rows"].items()
            self.content["rows"] = {k: row for k, row in rows if row["status"] != "failed"}

    def has(self, key: str) -> bool:
        return key in self.content["rows"]

    def add(self, key: str, row: dict[str, Any]) -> None:
        self.content["rows"][key] = {**row, "commit": self.commit}
        self._save()
        print(f"{row['status']:8} {key}  {_summary(row)}", flush=True)

    def start(self, key: str) -> None:
        """Marks a row as begun: if this process dies, the next process knows the row."""
        self.content["rows"][key] = {"status": "started"}
        self._save()

    def forget(self, key: str) -> None:
        del self.content["rows"][key]
        self._save()

    def _save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.content)

    def failed(self, prefix: str = "") -> list[str]:
        rows = self.content["rows"].items()
        return [key for key, row in rows if key.startswith(prefix) and row["status"] == "failed"]


def _summary(row: dict[str, Any]) -> str:
    if "error" in row:
        return str(row["error"]).splitlines()[0][:100]
    numbers = {k: v for k, v in row.items() if isinstance(v, (int, float)) and k != "took_s"}
    return "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises OutOfTime after ``seconds``; a call into a library ends first."""

    def stop(*_: Any) -> None:
        raise OutOfTime(f"took more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.1))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def attempt(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The row of ``work``, or the row of its failure."""
    start = time.perf_counter()
    try:
        row = {"status": "ok", **work()}
    except NotHere as reason:
        row = {"status": "left out", "error": str(reason)}
    except Exception as error:
        row = {"status": "failed", "error": f"{type(error).__name__}: {error}"}
        row["traceback"] = traceback.format_exc()[-3000:]
    return {"took_s": round(time.perf_counter() - start, 1), **row}


_log_lock = threading.Lock()


def run_tests(file: str, workers: int, seconds: float, log: Path) -> dict[str, Any]:
    """The last line of pytest's output; the whole output is appended to a file."""
    options = ["-o", "addopts=", "-p", "no:cacheprovider", "-v", "--tb=short", "-rs"]
    options += ["--durations=10", "-o", "faulthandler_timeout=60"]
    if workers > 1:
        if importlib.util.find_spec("xdist"):
            options += ["-n", str(workers)]
        else:
            print(f"{file} takes {workers} times as long without pytest-xdist", file=sys.stderr)
    command = [sys.executable, "-m", "pytest", *options, f"tests/{file}"]
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        try:
            status = subprocess.run(
                command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, timeout=seconds,
                env={**os.environ, "COLUMNS": "250"},
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired as late:
            raise OutOfTime(f"took more than {seconds:.0f} s") from late
        finally:
            output.seek(0)
            text = output.read()
            with _log_lock, log.open("a") as lines:
                lines.write(text)
    last = text.strip().splitlines()[-40:] or [""]
    if status != 0:
        raise AssertionError("\n".join([last[-1], *last]))
    return {"summary": last[-1].strip("= "), "took_s": round(time.perf_counter() - start, 1)}


def exercise(device: torch.device, height: int) -> None:
    """Runs every operation once, forward and backward, for sanitizers and profilers."""
    images = height, 2 * height - 4
    for case in CASES.values():
        channels = 32 if case.name == "dilated_affinity" else 19
        step(case.loss, *case.make_inputs((2, channels, *images), device=device))()
    step(fused, *make_inputs((2, 19, *images), device=device))()
    if device.type == "cuda":
        torch.cuda.synchronize()


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
    command = [path, *options, sys.executable, __file__, "exercise"]
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
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
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


def run(args: argparse.Namespace, device: torch.device) -> int:
    deadline: float = time.monotonic() + 60 * args.minutes
    record = Record(args.results, device, args.quick, args.retry)
    print(f"{record.content['device']}, commit {record.commit}, results in {record.path}")

    def left() -> float:
        return deadline - time.monotonic()

    done = True
    if "correctness" in args.only:
        files = {"test_rates.py": 1} if args.quick else TEST_FILES
        # Side by side: the compiler takes most of their time, and keeps one core busy.
        for alone in (False, True):
            done &= run_test_files(
                record,
                {file: n for file, n in files.items() if (file == ALONE) == alone},
                min(60 * MINUTES_OF_TESTS, left()),
            )

    work: list[tuple[str, Callable[[], dict[str, Any]]]] = []
    if "figures" in args.only:
        bench = Bench(device, args.quick)
        for key, row, shape, dtype in jobs(args.quick):
            work.append((key, partial(row.measure, shape, DTYPES[dtype], bench)))
    if "tools" in args.only and device.type == "cuda":
        for tool in ("memcheck", "racecheck", "ncu"):
            work.append((f"tools {tool}", partial(run_tool, tool, device)))
    for key, measure_it in work:
        if record.has(key):
            continue
        if left() < 5:
            done = False
            break
        limit = min(60 * MINUTES_PER_ROW, left())
        result = run_row(record, key, measure_it, limit)
        if OutOfTime.__name__ in result.get("error", "") and limit < 60 * MINUTES_PER_ROW - 10:
            done = False  # the next run gives the row all its time
            record.forget(key)
        else:
            record.add(key, result)
        if is_lost(device):
            print("the device is lost to this process: run it again", file=sys.stderr)
            return 3
    if not done:
        print("not all is done: run it again", file=sys.stderr)
    if record.failed():
        return 1
    return 0 if done else 2


def run_test_files(record: Record, files: dict[str, int], seconds: float) -> bool:
    """Runs the files side by side; True if all have finished."""
    waiting = {file: n for file, n in files.items() if not record.has(f"correctness {file}")}
    if not waiting:
        return True
    if seconds < 5:
        return False
    done = True
    log = record.path.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(len(waiting)) as pool:
        tests = {pool.submit(run_tests, file, n, seconds, log): file for file, n in waiting.items()}
        for test in as_completed(tests):
            row = attempt(test.result)
            if OutOfTime.__name__ in row.get("error", ""):
                print(f"not done: {tests[test]}, {row['error']}", file=sys.stderr)
                done = False
            else:
                record.add(f"correctness {tests[test]}", row)
    return done


def run_row(
    record: Record, key: str, measure_it: Callable[[], dict[str, Any]], seconds: float
) -> dict[str, Any]:
    def timed() -> dict[str, Any]:
        with at_most(seconds):
            return measure_it()

    record.start(key)
    # No signal ends a kernel that never ends.
    faulthandler.dump_traceback_later(seconds + 20, exit=True, file=2)
    try:
        return attempt(timed)
    finally:
        faulthandler.cancel_dump_traceback_later()


def is_lost(device: torch.device) -> bool:
    """True if an error of a kernel keeps this process from doing anything more."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
        gc.collect()  # tensors that an error holds
        torch.cuda.empty_cache()
    except RuntimeError:
        return True
    return False


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure the figures that the project aims at.")
    parser.add_argument("command", nargs="?", choices=COMMANDS, default="run")
    parser.add_argument("--device", default="cuda", help="cuda unless given")
    parser.add_argument(
        "--only", type=lambda text: text.split(","), default=list(PARTS), metavar="PARTS",
        help=f"of {','.join(PARTS)}",
    )  # fmt: skip
    parser.add_argument("--height", type=int, default=37, help="of the images of exercise")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: tries the suite itself")
    parser.add_argument("--retry", action="store_true", help="rows that failed, once more")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="stops after them")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "performance.md")
    args = parser.parse_args(argv)
    if unknown := set(args.only) - set(PARTS):
        parser.error(f"unknown {sorted(unknown)}, choose from {','.join(PARTS)}")
    if args.command == "report":
        write_page(args.results, args.page)
        return 0
    try:
        device = usable_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    if args.command == "exercise":
        exercise(device, args.height)
        return 0
    if args.command == "compile":
        print(json.dumps(first_steps(SMALL, device)))
        return 0
    return run(args, device)


if __name__ == "__main__":
    sys.exit(main())
