"""Native kernels count in 64 bits: images that lie more than 2^31 elements apart, and gradients of
more than 2^31 elements. Each test needs up to 7 GB.
"""

import pytest
import torch

from tritonaff.native import library
from tritonaff.ops.backend import use_backend
from tritonaff.testing import CASES, differentiable, evaluate

pytestmark = pytest.mark.skipif(library.find_compiler() is None, reason="no C++ compiler")
FAR = 2**31 + 5
# One channel, or few, and the others of the inputs as in the gate.
CHANNELS = {"dilated_affinity": 32, "instance_affinity": 12, "affinity_field_sigmoid": 1}


def far_apart(x):
    """The same images, FAR elements from each other; the memory between them is never touched."""
    if x.dim() < 3 or x.dtype == torch.int64:
        return x
    memory = torch.empty((len(x) - 1) * FAR + x[0].numel(), dtype=x.dtype)
    strides = (FAR, *x[0].contiguous().stride())
    return memory.as_strided(x.shape, strides).copy_(x)


@pytest.mark.parametrize("op", CASES)
def test_images_far_apart(op):
    case = CASES[op]
    inputs = case.make_inputs((2, CHANNELS.get(op, 3), 9, 11), torch.bfloat16)
    if op not in ("affinity_propagation", "refinement"):  # whose labels are torch's
        inputs = tuple(
            x.to(torch.uint8) if x.dtype == torch.int64 and x.dim() > 2 else x for x in inputs
        )
    near = evaluate(case, "native", *inputs)
    far = evaluate(case, "native", *map(far_apart, inputs))
    assert all(torch.equal(near[name], far[name]) for name in near)


@pytest.mark.parametrize(
    "op",
    [
        "affinity_field",
        "affinity_field_sigmoid",
        "affinity_regression_every_pixel",
        "affinity_propagation",
        "dilated_affinity",
        "instance_affinity",
    ],
)
def test_gradients_of_many_elements(op):
    """Equal images have equal gradients, the last one's beyond 2^31 elements."""
    case = CASES[op]
    channels = 2 if op == "affinity_propagation" else CHANNELS.get(op, 19)
    inputs = case.make_inputs((1, channels, 96, 128), torch.bfloat16)
    images = 2**31 // max(x.numel() for x in inputs) + 2
    inputs = [x.expand(images, *x.shape[1:]).detach() for x in inputs]
    leaves = [x.requires_grad_() if x.is_floating_point() else x for x in inputs]
    with use_backend("native"):
        gradients = torch.autograd.grad(case.loss(*leaves), differentiable(tuple(leaves)))
    assert max(grad.numel() for grad in gradients) > 2**31
    for grad in gradients:
        assert grad[0].abs().max() > 0
        assert torch.equal(grad[0], grad[-1])
        assert torch.equal(grad[0], grad[len(grad) // 2])
