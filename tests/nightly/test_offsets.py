"""Offsets of more than 2^31 elements: no tile multiplies strides or counts pixels in 32 bits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tritonaff
from tritonaff import affinity_propagation
from tritonaff.testing import AFFINITY_RATES, CASES, differentiable

TOOLS = Path(__file__).parent.parent.parent / "tools"
# Channels of sigmoid are the tiles of two classes; refinement is propagation.
OPS = [name for name in CASES if name not in ("affinity_field_sigmoid", "refinement")]


@pytest.fixture(scope="module")
def results():
    """Results of every case, each in a process: a wrong offset may be a segmentation fault."""
    pytest.importorskip("triton", minversion="3.6")
    if torch.cuda.is_available():
        pytest.skip("a GPU runs the tiles itself")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(
        [sys.executable, str(TOOLS / "far_offsets.py")],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reserves address space as Linux does")
@pytest.mark.parametrize("far", ["strides", "pixels"])
@pytest.mark.parametrize("op", [*OPS, "affinity_regression_many_classes", "square_root_affinity"])
def test_the_tiles_interpreted(results, op, far):
    """Elements 2^31 apart, and the last programs of 2^31 pixels."""
    if (op, far) == ("affinity_regression", "pixels"):
        pytest.skip("points of grids are few, however many pixels there are")
    assert results[f"{op}-{far}"] == "right"


def test_tables_of_many_programs():
    """A program stores its part of a table at its number times a size, computed in 64 bits."""
    pytest.importorskip("triton", minversion="3.6")
    script = """
import re
from launches import compile_launch
from static_counts import measured
for each in measured("sm_90"):
    ir = compile_launch(each.launch, "sm_90").asm["ttir"]
    for name in re.findall(r"(%\\S+) = tt.get_(?:program_id|num_programs) x", ir):
        products = re.findall(rf"arith.muli .*{name}\\b.* : i32", ir)
        assert not products, (each.launch.name, products)
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment, cwd=TOOLS)


def gradient_with_tables(logits, target):
    """A result that carries the gradient stored by the affinity field's losses; times 3."""
    ops = torch.ops.tritonaff
    sizes, ones = (3, 5, 7), torch.ones(2, logits.shape[1], 3, device=logits.device)
    _, _, *pixels = ops.affinity_field_statistics(
        logits.detach(), target, sizes, 255, "paper", "triton"
    )
    *_, zero, _ = ops.affinity_field_with_gradient(
        logits, ones, None, *pixels, sizes, 3.0, 1e-4, "paper", "triton"
    )
    return 3 * zero


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("op", [op for op in OPS if op != "box_pairwise"])  # masks are no images
def test_more_elements_than_2_to_the_31(op):
    """The last image of a large batch has the same gradients as alone."""
    case = CASES[op]
    n, c, height, width = 2, 32 if op == "dilated_affinity" else 19, 256, 512
    images = (1 << 31) // (c * height * width) + 2
    # Inputs, gradients and tensors between them; propagation holds iterates and gates in float32.
    needed = images * c * height * width * (48 if op == "affinity_propagation" else 24)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < needed:
        pytest.skip(f"needs {needed / 1e9:.0f} GB, free are {free / 1e9:.0f}")

    def gradients(inputs):
        leaves = tuple(x.detach().requires_grad_(x.is_floating_point()) for x in inputs)
        with tritonaff.use_backend("triton"):
            if op == "affinity_propagation":
                logits, _, affinity = leaves
                results = [affinity_propagation(logits, affinity, AFFINITY_RATES, iterations=2)]
            else:
                results = [x for x in case.tables(*leaves) if x.is_floating_point()]
                if op == "affinity_field":
                    results.append(gradient_with_tables(*leaves))
            ones = [torch.ones((), dtype=x.dtype, device=x.device).expand_as(x) for x in results]
            return torch.autograd.grad(results, differentiable(leaves), ones)

    two = case.make_inputs((n, c, height, width), torch.float16, "cuda")
    batch = tuple(torch.cat((x[:1].expand(images - 1, *x.shape[1:]), x[1:])) for x in two)
    for of_batch, alone in zip(gradients(batch), gradients(x[1:] for x in two), strict=True):
        assert of_batch.numel() > 1 << 31
        torch.testing.assert_close(of_batch[-1:], alone)
