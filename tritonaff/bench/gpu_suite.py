"""The figures that the project aims at, measured on one device: ``python -m
tritonaff.bench.gpu_suite``.

Correctness first (the tests), then every row of :data:`ROWS` with its rivals in the same run, then
what profilers and sanitizers say. Every row is saved when it is done, to
docs/results/DEVICE.json, and is not measured again: a run that is cut short, or told ``--minutes``,
goes on where it was. A row that fails is recorded as failed, and is tried again with ``--retry``.
The exit status is 1 where anything failed and 2 where something is left to do. ``report`` writes
docs/performance.md from these files.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import DeviceType
from torch._inductor.utils import fresh_cache
from torch.nn import functional as F

import tritonaff
from tritonaff.bench import measure
from tritonaff.bench.__main__ import DTYPES, describe, versions, write_json
from tritonaff.bench.cases import (
    AFFINITY_FIELD_SIZES,
    CASES,
    Shape,
    differentiable,
    make_inputs,
)
from tritonaff.bench.performance_page import write_page

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "docs" / "results"
PARTS = ("correctness", "figures", "tools")
# What the tiles do; the other tests do not touch a GPU.
TEST_FILES = (
    "test_affinity_field.py",
    "test_affinity_regression.py",
    "test_affinity_propagation.py",
    "test_dilated_affinity.py",
    "test_offsets.py",
    "test_cuda_graphs.py",
    "test_compile.py",
    "test_backend.py",
)
FIELD_SHAPES = ((16, 21, 60, 60), (8, 19, 90, 90), (8, 19, 512, 512), (4, 19, 512, 1024),
                (4, 150, 512, 512))  # fmt: skip
SMALL = FIELD_SHAPES[0]
QUICK_SHAPE = (2, 5, 16, 20)
# The eager reference keeps so many times the logits of an affinity field in memory.
EAGER_FIELD_COPIES = 220
MINUTES, MINUTES_PER_ROW = 9, 4


class OutOfTime(Exception):
    """A row takes longer than it may."""


class NotHere(Exception):
    """A row that this device or this version has not."""


@dataclass(frozen=True)
class Row:
    """One measurement: ``measure(shape, dtype, bench)`` returns numbers by name."""

    name: str
    measure: Callable[[Shape, torch.dtype, Bench], dict[str, Any]]
    shapes: tuple[Shape, ...]
    dtypes: tuple[str, ...] = ("float32", "bfloat16")


@dataclass(frozen=True)
class Bench:
    """Where and how thoroughly."""

    device: torch.device
    quick: bool

    def ms(self, run: Callable[[], Any]) -> float:
        return round(measure.median_ms(lambda _: run(), self.device, self.quick), 5)

    def peak_bytes(self, run: Callable[[], Any]) -> int:
        return measure.peak_bytes(lambda _: run(), self.device)

    def launches(self, run: Callable[[], Any]) -> tuple[int, float]:
        """How many kernels, copies and fills the device ran, and their milliseconds."""
        if self.device.type != "cuda":
            raise NotHere("launches are counted on CUDA devices")
        run()
        torch.cuda.synchronize()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            run()
            torch.cuda.synchronize()
        events = [
            event
            for event in profile.events() or ()
            if event.device_type == DeviceType.CUDA and not event.is_user_annotation
        ]
        return len(events), sum(event.time_range.elapsed_us() for event in events) / 1e3


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
    """The yardstick; half precision as training scripts have it, under autocast."""
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
    """Of the eager reference, in two thirds of what is free."""
    if bench.device.type != "cuda":
        return 1
    free, _ = torch.cuda.mem_get_info(bench.device)
    one = 4 * shape[1] * shape[2] * shape[3] * EAGER_FIELD_COPIES
    fit = int(free * 2 / 3) // one
    if fit == 0:
        raise NotHere(f"one image takes eager mode {one / 1e9:.0f} GB, free are {free / 1e9:.0f}")
    return min(shape[0], fit)


def field_against_eager(shape: Shape, dtype: torch.dtype, bench: Bench) -> dict[str, Any]:
    shape = (images_that_fit(shape, bench), *shape[1:])
    inputs = make_inputs(shape, dtype, bench.device)
    ours, rival = (
        bench.ms(step(field, *inputs)),
        bench.ms(step(field, *inputs, backend="reference")),
    )
    return {"ms": ours, "rival_ms": rival, "ratio": rival / ours, "images": shape[0]}


def field_against_compiled(shape: Shape, dtype: torch.dtype, bench: Bench) -> dict[str, Any]:
    if not measure.compiler_works(bench.device):
        raise NotHere("no compiler")
    shape = (images_that_fit(shape, bench), *shape[1:])
    inputs = make_inputs(shape, dtype, bench.device)
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
    loss: Callable[..., Tensor], logits: Tensor, target: Tensor, bench: Bench
) -> dict[str, Any]:
    ours = bench.ms(step(loss, logits, target))
    rival = bench.ms(step(cross_entropy, logits, target))
    return {"ms": ours, "rival_ms": rival, "ratio": ours / rival}


def field_alone(shape: Shape, dtype: torch.dtype, bench: Bench) -> dict[str, Any]:
    return against_cross_entropy(field, *make_inputs(shape, dtype, bench.device), bench)


def field_fused(shape: Shape, dtype: torch.dtype, bench: Bench) -> dict[str, Any]:
    return against_cross_entropy(fused, *make_inputs(shape, dtype, bench.device), bench)


def field_memory(shape: Shape, dtype: torch.dtype, bench: Bench) -> dict[str, Any]:
    logits, target = make_inputs(shape, dtype, bench.device)
    run = step(field, logits, target)
    run()
    peak = bench.peak_bytes(run)
    return {"peak_bytes": peak, "gradient_bytes": logits.nbytes, "ratio": peak / logits.nbytes}


def launches(
    loss: Callable[..., Tensor], shape: Shape, dtype: torch.dtype, bench: Bench
) -> dict[str, Any]:
    inputs = make_inputs(shape, dtype, bench.device)
    values: dict[str, Any] = {}
    torch._dynamo.reset()
    for name, each in (("launches", loss), ("compiled_launches", torch.compile(loss))):
        values[name], values[f"{name}_ms"] = bench.launches(step(each, *inputs))
    return values


def grids(shape: Shape, dtype: torch.dtype, bench: Bench) -> dict[str, Any]:
    logits, target = make_inputs(shape, dtype, bench.device)
    return against_cross_entropy(tritonaff.affinity_regression_loss, logits, target, bench)


def every_pixel(shape: Shape, dtype: torch.dtype, bench: Bench) -> dict[str, Any]:
    case = CASES["affinity_regression_every_pixel"]
    return against_cross_entropy(case.loss, *make_inputs(shape, dtype, bench.device), bench)


def dilated(shape: Shape, dtype: torch.dtype, bench: Bench) -> dict[str, Any]:
    """Bytes that have to move over the time of the kernels, as a share of a copy's."""
    case = CASES["dilated_affinity"]
    inputs = case.make_inputs(shape, dtype, bench.device)
    leaf, target = inputs[0].detach().requires_grad_(), inputs[1]
    copy = measure.copy_gb_per_s(bench.device, bench.quick)

    def forward(_: Any = None) -> Tensor:
        return case.loss(leaf, target)

    def backward(loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, leaf)

    forward_ms = measure.median_ms(forward, bench.device, bench.quick)
    backward_ms = measure.median_ms(backward, bench.device, bench.quick, forward)
    values: dict[str, Any] = {"copy_gb_per_s": round(copy, 1)}
    for mode, ms in (("fwd", forward_ms), ("bwd", backward_ms)):
        gb_per_s = measure.traffic_bytes(mode, (leaf, target)) / ms / 1e6
        values |= {f"{mode}_ms": round(ms, 5), f"{mode}_percent": 100 * gb_per_s / copy}
    return values


def propagation(shape: Shape, dtype: torch.dtype, bench: Bench) -> dict[str, Any]:
    case = CASES["affinity_propagation"]
    inputs = case.make_inputs(shape, dtype, bench.device)
    ours = bench.ms(step(case.loss, *inputs))
    rival = bench.ms(step(case.loss, *inputs, backend="reference"))
    return {"ms": ours, "rival_ms": rival, "ratio": rival / ours}


class Step(torch.nn.Module):
    """What a training script compiles, with and without the loss."""

    def __init__(self, classes: int, with_loss: bool) -> None:
        super().__init__()
        self.net = torch.nn.Conv2d(3, classes, 3, padding=1)
        self.with_loss = with_loss

    def forward(self, image: Tensor, target: Tensor) -> Tensor:
        logits = self.net(image)
        loss = F.cross_entropy(logits, target, ignore_index=255)
        return loss + field(logits, target) if self.with_loss else loss


def compile_seconds(shape: Shape, dtype: torch.dtype, bench: Bench) -> dict[str, Any]:
    """What the loss adds to the first step; the kernels are compiled anew as well."""
    if not measure.compiler_works(bench.device):
        raise NotHere("no compiler")
    n, classes, height, width = shape
    image = torch.randn(n, 3, height, width, device=bench.device)
    _, target = make_inputs(shape, dtype, bench.device)
    seconds = []
    for with_loss in (False, False, True):  # the first one loads the compiler
        module = Step(classes, with_loss).to(bench.device)
        torch._dynamo.reset()
        with fresh_cache():
            start = time.perf_counter()
            torch.compile(module, fullgraph=True)(image, target).backward()
            if bench.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    return {"with_s": seconds[2], "without_s": seconds[1], "seconds": seconds[2] - seconds[1]}


def boundary(shape: Shape, dtype: torch.dtype, bench: Bench) -> dict[str, Any]:
    """One launch in a compiled function, registered as custom_op and as triton_op: microseconds of
    a call when calls follow each other, and those that the device works.
    """
    if bench.device.type != "cuda":
        raise NotHere("a triton_op runs on a GPU")
    from tritonaff.kernels import affinity_propagation as kernels

    def launch(kernel: Any, grad: Tensor, p: Tensor, total: Tensor) -> Tensor:
        out = torch.empty_like(p)
        _, classes, height, width = p.shape
        blocks = kernels.all_classes(p)
        kernel[kernels.grid(p, blocks)](
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
    inputs = make_inputs(shape, torch.float32, bench.device)
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
        values[f"{name}_launches"], ms = bench.launches(call)
        values[f"{name}_device_us"] = 1e3 * ms
    return values


def _repeat(call: Callable[[], Any], times: int) -> None:
    for _ in range(times):
        call()


# Cheap ones first: a run that is cut short has them.
ROWS = (
    Row("field_alone", field_alone, FIELD_SHAPES),
    Row("field_fused", field_fused, FIELD_SHAPES),
    Row("field_memory", field_memory, FIELD_SHAPES),
    Row("grids", grids, FIELD_SHAPES),
    Row("every_pixel", every_pixel, ((1, 19, 1024, 2048),)),
    Row("dilated", dilated, ((8, 32, 512, 512), (4, 32, 512, 1024))),
    Row("field_against_eager", field_against_eager, FIELD_SHAPES),
    Row("propagation", propagation, ((4, 21, 513, 513),)),
    Row("field_launches", partial(launches, field), (SMALL,)),
    Row("grids_launches", partial(launches, tritonaff.affinity_regression_loss), (SMALL,)),
    Row("boundary", boundary, (SMALL,), ("float32",)),
    Row("compile_seconds", compile_seconds, (SMALL,), ("float32",)),
    Row("field_against_compiled", field_against_compiled, FIELD_SHAPES),
)


def jobs(quick: bool) -> Iterator[tuple[str, Row, Shape, str]]:
    for row in ROWS:
        for dtype in row.dtypes:
            for shape in (QUICK_SHAPE,) if quick else row.shapes:
                if quick and row.name == "dilated":
                    shape = (2, 32, 16, 20)
                yield f"{row.name} {dtype} {','.join(map(str, shape))}", row, shape, dtype


class Record:
    """The results of one device and one version of everything, saved after every row."""

    def __init__(self, folder: Path, device: torch.device, quick: bool, retry: bool) -> None:
        name = describe(device)
        file = f"{name} quick" if quick else name
        self.path = folder / f"{re.sub(r'[^a-z0-9]+', '-', file.lower()).strip('-')}.json"
        head = {"suite": True, "device": name, "quick": quick, "versions": versions()}
        self.content: dict[str, Any] = {**head, "rows": {}}
        if self.path.exists():
            before = json.loads(self.path.read_text())
            if all(before.get(key) == value for key, value in head.items()):
                self.content = before
        if retry:
            rows = self.content["rows"].items()
            self.content["rows"] = {k: row for k, row in rows if row["status"] != "failed"}

    def has(self, key: str) -> bool:
        return key in self.content["rows"]

    def add(self, key: str, row: dict[str, Any]) -> None:
        self.content["rows"][key] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.content)
        print(f"{row['status']:8} {key}  {_summary(row)}", flush=True)

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
    """OutOfTime after so long; a call into a library ends first."""

    def stop(*_: Any) -> None:
        raise OutOfTime(f"took more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.1))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def attempt(seconds: float, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The row that ``work`` gives, whatever happens to it."""
    start = time.perf_counter()
    try:
        with at_most(seconds):
            row = {"status": "ok", **work()}
    except NotHere as reason:
        row = {"status": "left out", "error": str(reason)}
    except Exception as error:
        row = {"status": "failed", "error": f"{type(error).__name__}: {error}"}
    return {"took_s": round(time.perf_counter() - start, 1), **row}


def run_tests(file: str, seconds: float) -> dict[str, Any]:
    options = ["-o", "addopts=", "-p", "no:cacheprovider", "-q"]
    command = [sys.executable, "-m", "pytest", *options, f"tests/{file}"]
    start = time.perf_counter()
    try:
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=seconds)
    except subprocess.TimeoutExpired as late:
        raise OutOfTime(f"took more than {seconds:.0f} s") from late
    lines = (result.stdout + result.stderr).strip().splitlines() or [""]
    if result.returncode != 0:
        raise AssertionError("\n".join([lines[-1], *lines[-40:]]))
    return {"summary": lines[-1], "took_s": round(time.perf_counter() - start, 1)}


def exercise(device: torch.device) -> None:
    """Every operation once, forward and backward, on a small image: what sanitizers watch."""
    for case in CASES.values():
        channels = 32 if case.name == "dilated_affinity" else 5
        step(case.loss, *case.make_inputs((2, channels, 37, 70), device=device))()
    step(fused, *make_inputs((2, 5, 37, 70), device=device))()
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
    options = ["--tool", tool, "--error-exitcode", "9"]
    if tool == "ncu":
        options = ["--csv", "--metrics", ",".join(METRICS), "--kernel-name", "regex:_kernel$"]
    command = [path, *options, sys.executable, "-m", __spec__.name, "exercise"]
    # Every tensor an allocation of its own: else what is beyond one is another one's.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    result = subprocess.run(
        [*command, "--device", str(device)],
        capture_output=True, text=True, cwd=ROOT, env=environment,
    )  # fmt: skip
    if result.returncode != 0:
        lines = (result.stdout + result.stderr).strip().splitlines()
        raise RuntimeError("\n".join([line for line in lines if "=" in line][-20:] or lines[-20:]))
    return {"kernels": ncu_kernels(result.stdout)} if tool == "ncu" else {}


def ncu_kernels(output: str) -> list[dict[str, Any]]:
    """A row for every launch of ours: its name and metrics."""
    table = output[output.index('"ID"') :] if '"ID"' in output else ""
    kernels: dict[str, dict[str, Any]] = {}
    for line in csv.DictReader(io.StringIO(table)):
        if line["Metric Name"] in METRICS:
            kernel = kernels.setdefault(line["ID"], {"kernel": line["Kernel Name"]})
            value = float(line["Metric Value"].replace(",", ""))
            kernel[METRICS[line["Metric Name"]]] = value
    return list(kernels.values())


def run(args: argparse.Namespace) -> int:
    deadline: float = time.monotonic() + 60 * args.minutes
    device = torch.device(args.device)
    record = Record(args.results, device, args.quick, args.retry)
    print(f"{record.content['device']}, results in {record.path}")

    def left() -> float:
        return deadline - time.monotonic()

    def work(key: str, minutes: float, measure: Callable[[], dict[str, Any]]) -> bool:
        """False where there is no time left for it."""
        if record.has(key):
            return True
        if left() < 5:
            return False
        in_full = left() > 60 * minutes - 10
        row = attempt(min(60 * minutes, left()), measure)
        if not in_full and OutOfTime.__name__ in row.get("error", ""):
            return False  # the next run gives it all the time that it may take
        record.add(key, row)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return True

    files = ("test_rates.py",) if args.quick else TEST_FILES
    keys = [f"correctness {file}" for file in files]
    done = True
    if "correctness" in args.only:
        # Side by side: what takes their time is the compiler, which keeps one core busy.
        with ThreadPoolExecutor(len(files)) as pool:
            tests = {
                key: pool.submit(run_tests, file, left())
                for file, key in zip(files, keys, strict=True)
                if not record.has(key)
            }
            for key, result in tests.items():
                done &= work(key, MINUTES, result.result)
    wrong = [key for key in keys if record.content["rows"].get(key, {}).get("status") != "ok"]
    if "figures" in args.only and wrong:
        print(f"no figures: not green are {', '.join(wrong)}", file=sys.stderr)
        return 1 if record.failed() else 2
    if "figures" in args.only:
        bench = Bench(device, args.quick)
        for key, row, shape, dtype in jobs(args.quick):
            measure_it = partial(row.measure, shape, DTYPES[dtype], bench)
            done &= work(key, MINUTES_PER_ROW, measure_it)
    if "tools" in args.only and device.type == "cuda":
        for tool in ("memcheck", "racecheck", "ncu"):
            done &= work(f"tools {tool}", MINUTES, partial(run_tool, tool, device))
    if not done:
        print("not all is done: run it again", file=sys.stderr)
    if record.failed():
        return 1
    return 0 if done else 2


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tritonaff.bench.gpu_suite", description=__doc__)
    parser.add_argument("command", nargs="?", choices=("run", "report", "exercise"), default="run")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(PARTS))
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
    if args.command == "exercise":
        exercise(torch.device(args.device))
        return 0
    return run(args)


if __name__ == "__main__":
    sys.exit(main())
