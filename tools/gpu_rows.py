"""The rows that tools/gpu_suite.py measures: a loss or a call, its rivals, shapes and dtypes."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.nn import functional as F

import tritonaff
from tritonaff.bench import measure
from tritonaff.testing import AFFINITY_FIELD_SIZES, CASES, Shape, differentiable, make_inputs

FIELD_SHAPES = ((16, 21, 60, 60), (8, 19, 90, 90), (8, 19, 512, 512), (4, 19, 512, 1024),
                (4, 150, 512, 512))  # fmt: skip
SMALL = FIELD_SHAPES[0]
QUICK_SHAPE = (2, 5, 16, 20)
# Memory of the eager affinity field, in multiples of the logits.
EAGER_FIELD_COPIES = 220
# Profiled runs for one time.
PROFILED_RUNS = 10


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
    loss: Callable[..., Tensor], *inputs: Tensor, backend: Any = "auto"
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
    return side_by_side(step(loss, *inputs), step(cross_entropy, *inputs), bench)


def against_binary_cross_entropy(
    name: str, shape: Shape, dtype: torch.dtype, bench: Bench
) -> dict[str, Any]:
    """A case against binary cross-entropy with given targets."""
    case = CASES[name]
    inputs = case.make_inputs(shape, dtype, bench.device)
    rival, of_rival = case.yardstick(*inputs) if case.yardstick else (case.loss, inputs)
    return side_by_side(step(case.loss, *inputs), step(rival, *of_rival), bench)


def side_by_side(ours: Callable[[], Any], rival: Callable[[], Any], bench: Bench) -> dict[str, Any]:
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
    output = subprocess.run(command, capture_output=True, text=True)
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
    Row("boxes", partial(against_binary_cross_entropy, "box_pairwise"), ((2, 40, 200, 336),)),
    Row(
        "field_sigmoid",
        partial(against_binary_cross_entropy, "affinity_field_sigmoid"),
        CASES["affinity_field_sigmoid"].shapes,
    ),
    Row(
        "instances",
        partial(against_binary_cross_entropy, "instance_affinity"),
        ((2, 12, 32, 160, 160), (4, 12, 384, 384)),
    ),
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


def exercise(device: torch.device, height: int) -> None:
    """Runs every operation once, forward and backward, for sanitizers and profilers."""
    images = height, 2 * height - 4
    for case in CASES.values():
        channels = 32 if case.name == "dilated_affinity" else 19
        step(case.loss, *case.make_inputs((2, channels, *images), device=device))()
    step(fused, *make_inputs((2, 19, *images), device=device))()
    if device.type == "cuda":
        torch.cuda.synchronize()


def main(argv: Sequence[str] | None = None) -> None:
    """In a process of its own: every operation once, or the first steps of training."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("command", choices=("exercise", "compile"))
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--height", type=int, default=37, help="of the images of exercise")
    args = parser.parse_args(argv)
    if args.command == "exercise":
        exercise(args.device, args.height)
    else:
        print(json.dumps(first_steps(SMALL, args.device)))


if __name__ == "__main__":
    main()
