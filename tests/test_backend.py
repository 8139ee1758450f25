"""The choice of an implementation, and the messages where none can run."""

import math
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from interpreted import smaller_if_interpreted

import tritonaff
from tritonaff.ops import backend as backends
from tritonaff.testing import CASES, evaluate, make_inputs


def test_unknown_backend():
    with pytest.raises(ValueError, match=r"backend must be one of .* got 'cuda'"):
        tritonaff.use_backend("cuda")  # at once, even without a "with"


def test_the_choice_ends_with_the_block_even_after_an_error():
    with tritonaff.use_backend("portable"):
        with tritonaff.use_backend("reference"):
            assert backends.current_backend() == "reference"
        assert backends.current_backend() == "portable"
        with pytest.raises(KeyError), tritonaff.use_backend("triton"):
            raise KeyError
        assert backends.current_backend() == "portable"
    assert backends.current_backend() == "auto"


def test_a_backward_pass_runs_what_its_forward_pass_ran(monkeypatch):
    from tritonaff.portable import affinity_field as portable

    calls = []
    compute = portable.compute
    monkeypatch.setattr(
        portable, "compute", lambda *args, **options: calls.append(1) or compute(*args, **options)
    )
    logits, target = make_inputs((1, 3, 6, 6))
    logits.requires_grad_()
    with tritonaff.use_backend("portable"):
        terms = tritonaff.affinity_field_terms(logits, target)
    with tritonaff.use_backend("triton"):
        terms.edge_sum.sum().backward()
    assert calls == [1, 1]


@pytest.mark.parametrize(
    ("dtype", "classes", "variant", "reason"),
    [
        (torch.float64, 3, "paper", "the tiles compute in float32, got torch.float64"),
        (torch.float32, 1025, "paper", "at most 1024 classes, got 1025"),
        (torch.float32, 3, "authors", "this variant has no tile"),
    ],
)
def test_triton_where_there_is_no_tile(device, dtype, classes, variant, reason):
    pytest.importorskip("triton", minversion="3.6")
    logits = torch.zeros(1, classes, 3, 3, dtype=dtype, device=device)
    target = torch.zeros(1, 3, 3, dtype=torch.uint8, device=device)
    tritonaff.affinity_field_loss(logits, target, variant=variant)  # "auto" falls back
    with tritonaff.use_backend("triton"), pytest.raises(ValueError, match=reason):
        tritonaff.affinity_field_loss(logits, target, variant=variant)


@pytest.mark.parametrize(
    ("classes", "grid_sizes", "reason"),
    [
        (257, (12, 6), "at most 256 classes, got 257"),
        (3, (60, 40), "at most 4096 points of grids, got 5200"),
    ],
)
def test_affinity_regression_where_there_is_no_tile(device, classes, grid_sizes, reason):
    pytest.importorskip("triton", minversion="3.6")
    logits = torch.zeros(1, classes, 3, 3, device=device)
    target = torch.zeros(1, 3, 3, dtype=torch.uint8, device=device)
    tritonaff.affinity_regression_loss(logits, target, grid_sizes)
    with tritonaff.use_backend("triton"), pytest.raises(ValueError, match=reason):
        tritonaff.affinity_regression_loss(logits, target, grid_sizes)


@pytest.fixture
def nothing_emulated(pytestconfig):
    if pytestconfig.getoption("--ptx"):
        pytest.skip("a GPU is emulated")


@pytest.mark.usefixtures("nothing_emulated")
def test_triton_without_a_device_or_interpreter(monkeypatch):
    pytest.importorskip(
        "triton", minversion="3.6"
    )  # it asks for the interpreter when it is imported
    monkeypatch.setattr(backends, "_interprets", lambda: False)
    logits, target = make_inputs((1, 3, 6, 6))
    tritonaff.affinity_field_loss(logits, target)
    with (
        tritonaff.use_backend("triton"),
        pytest.raises(ValueError, match=r"no Triton on device cpu .* before Triton is imported"),
    ):
        tritonaff.affinity_field_loss(logits, target)


def test_the_interpreter_is_chosen_when_triton_is_imported():
    """A variable that is set later changes nothing, with any backend."""
    pytest.importorskip("triton", minversion="3.6")
    script = """
import os, torch, triton, tritonaff
logits, target = torch.randn(1, 3, 6, 6), torch.zeros(1, 6, 6, dtype=torch.long)
os.environ["TRITON_INTERPRET"] = "1"
tritonaff.affinity_field_loss(logits, target)
try:
    with tritonaff.use_backend("triton"):
        tritonaff.affinity_field_loss(logits, target)
except ValueError as error:
    print(error)
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment
    )
    assert "no Triton on device cpu" in result.stdout, result.stderr


@pytest.mark.usefixtures("nothing_emulated")
def test_a_triton_that_is_too_old(monkeypatch, device):
    triton = pytest.importorskip("triton")
    logits, target = make_inputs((1, 3, 6, 6), device=device)
    with monkeypatch.context() as patch:
        patch.setattr(triton, "__version__", "3.5.1")
        patch.setattr(backends, "_interprets", lambda: True)
        backends._no_triton.cache_clear()
        tritonaff.affinity_field_loss(logits, target)
        with (
            tritonaff.use_backend("triton"),
            pytest.raises(ValueError, match=r"need Triton 3.6 .*got 3.5.1"),
        ):
            tritonaff.affinity_field_loss(logits, target)
    backends._no_triton.cache_clear()


@pytest.mark.usefixtures("nothing_emulated")
def test_a_gpu_that_is_too_old(monkeypatch):
    pytest.importorskip("triton", minversion="3.6")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    monkeypatch.setattr(torch.version, "hip", None)
    backends._too_old.cache_clear()
    obstacle = backends.triton_obstacle(torch.device("cuda", 0))
    backends._too_old.cache_clear()
    assert obstacle == "the tiles need a GPU of compute capability 7.0, got 6.1"


@pytest.mark.usefixtures("nothing_emulated")
def test_triton_not_installed(monkeypatch):
    monkeypatch.setattr(backends, "_triton_installed", lambda: False)
    logits, target = make_inputs((1, 3, 6, 6))
    tritonaff.affinity_field_loss(logits, target)
    with (
        tritonaff.use_backend("triton"),
        pytest.raises(ValueError, match="triton is not installed"),
    ):
        tritonaff.affinity_field_loss(logits, target)


def test_importing_the_package_needs_torch_alone():
    """A loss on the CPU imports neither Triton nor any package of an extra."""
    script = """
import sys
for extra in ("triton", "numpy", "rich", "matplotlib", "PIL", "scipy", "torchmetrics"):
    sys.modules[extra] = None  # an import of it fails
import torch
before = set(sys.modules)
import tritonaff
for extra in ("metrics", "plotting", "bench"):
    assert f"tritonaff.{extra}" not in sys.modules
logits = torch.randn(1, 3, 6, 6, requires_grad=True)
target = torch.zeros(1, 6, 6, dtype=torch.long)
tritonaff.affinity_field_loss(logits, target).backward()
tritonaff.affinity_regression_loss(logits, target).backward()
assert not any(name.startswith("tritonaff.reference") for name in sys.modules)
print("fine")
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment
    )
    assert result.stdout.strip() == "fine", result.stderr


def test_a_launch_is_on_the_device_of_its_tensors(monkeypatch):
    pytest.importorskip("triton", minversion="3.6")
    from tritonaff.kernels import shared

    current, launched = [0], []

    @contextmanager
    def device(there):
        before, current[0] = current[0], there.index
        yield
        current[0] = before

    module = SimpleNamespace(current_device=lambda: current[0], device=device)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    kernel = {(1,): lambda *args, **options: launched.append((current[0], options))}
    for there in (0, None):  # the index of meta tensors
        current[0] = there
        shared.launch(kernel, (1,), 3, torch.empty(1, device="meta"), BLOCK=2)
        assert current[0] == there
    assert launched == [(None, {"BLOCK": 2, "enable_fp_fusion": True})] * 2


# Losses of targets that ignore pixels.
OTHERS = ("affinity_propagation", "box_pairwise", "refinement")
LOSSES = {name: case for name, case in CASES.items() if name not in OTHERS}
for title, loss in {
    "authors": partial(tritonaff.affinity_field_loss, variant="authors"),
    "cross_entropy": partial(tritonaff.affinity_field_cross_entropy, kernel_sizes=(3, 5)),
}.items():
    LOSSES[title] = replace(CASES["affinity_field"], loss=loss, tables=lambda *_: ())


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_ignored_pixels_may_hold_no_numbers(any_backend, device, loss, bad):
    """The result equals the result of zeros, and the gradient is zero."""
    if any_backend in ("native", "triton") and loss == "authors":
        pytest.skip("this variant has neither tile nor native kernel")
    if any_backend == "triton" and not math.isnan(bad) and not torch.cuda.is_available():
        pytest.skip("interpreted, one bad number is enough")
    if any_backend == "portable":
        device = torch.device("cpu")  # GPUs scatter with atomics, in any order
    case = LOSSES[loss]
    shape = 2, 32 if loss == "dilated_affinity" else 5, 13, 17
    logits, target = case.make_inputs(smaller_if_interpreted(shape, any_backend, device))
    target[torch.rand(target.shape, generator=torch.Generator().manual_seed(0)) < 0.2] = 255
    ignored = (target == 255).view(2, -1, *target.shape[-2:]).to(device)
    logits, target = logits.to(device), target.to(device)
    results = evaluate(case, any_backend, logits.masked_fill(ignored, bad), target)
    expected = evaluate(case, any_backend, logits.masked_fill(ignored, 0), target)
    torch.testing.assert_close(results, expected, rtol=0, atol=0)
    assert not results["gradient"].masked_select(ignored).any()
