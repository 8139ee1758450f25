"""CUDA graphs of a training step: nothing is read back to the host, so a captured step replays."""

import copy

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn import functional as F

import tritonaff

CLASSES, RATES = 4, ((1, 1), (2, 3))
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Step(torch.nn.Module):
    """A network with two heads, cross-entropy and one of the losses."""

    def __init__(self, name):
        super().__init__()
        self.name = name
        self.net = torch.nn.Conv2d(3, CLASSES + 8 * len(RATES), 3, padding=1)
        self.affinity_field = tritonaff.AdaptiveAffinityFieldLoss(CLASSES, (3, 5))
        self.affinity_regression = tritonaff.AffinityRegressionLoss((4, 2))
        self.affinity_regression_every_pixel = tritonaff.AffinityRegressionLoss(None)
        self.dilated_affinity = tritonaff.DilatedAffinityLoss(RATES)
        self.affinity_propagation = tritonaff.AffinityPropagation(RATES, iterations=3)

    def forward(self, image, target):
        logits, affinity = self.net(image).split((CLASSES, 8 * len(RATES)), dim=1)
        loss = F.cross_entropy(logits, target, ignore_index=255)
        operation = getattr(self, self.name)
        if self.name == "dilated_affinity":
            return loss + operation(affinity, target)
        if self.name == "affinity_propagation":
            refined = operation(logits.softmax(dim=1), affinity)
            return loss + F.nll_loss(refined.clamp(min=1e-6).log(), target, ignore_index=255)
        return loss + operation(logits, target)


OPS = (
    "affinity_field",
    "affinity_regression",
    "affinity_regression_every_pixel",
    "dilated_affinity",
    "affinity_propagation",
)


def batch(seed, device):
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(2, 3, 33, 40, generator=generator)
    target = torch.randint(0, CLASSES, (2, 33, 40), generator=generator)
    target[:, :2] = 255
    return image.to(device), target.to(device)


def train(step, image, target):
    """Loss and gradients of one step."""
    step.zero_grad(set_to_none=True)
    loss = step(image, target)
    loss.backward()
    return [loss.detach().clone(), *gradients(step)]


def gradients(step):
    return [p.grad.clone() for p in step.parameters() if p.grad is not None]


def assert_same(result, expected):
    assert len(result) == len(expected)
    for ours, eager in zip(result, expected, strict=True):
        # The convolution's gradient adds up in any order.
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", OPS)
def test_every_step_depends_on_its_batch_and_its_loss(name, device):
    """Otherwise a graph that replays the old batch, or omits the loss, would pass below."""
    torch.manual_seed(0)
    step = Step(name).to(device)
    with tritonaff.use_backend("auto" if device.type == "cuda" else "portable"):
        first, second = (train(step, *batch(seed, device)) for seed in (1, 2))
    assert all((one - other).abs().max() > 1e-4 for one, other in zip(first, second, strict=True))
    image, target = batch(1, device)
    cross_entropy = F.cross_entropy(step.net(image)[:, :CLASSES], target, ignore_index=255)
    assert (first[0] - cross_entropy).abs() > 1e-3


@needs_gpu
@pytest.mark.parametrize("name", OPS)
def test_a_captured_step_replays(name, device):
    torch.manual_seed(0)
    step = Step(name).to(device)
    expected_step = copy.deepcopy(step)
    image, target = batch(0, device)
    # Kernels compile, and libraries choose theirs, before the capture and on another stream.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            train(step, image, target)
    torch.cuda.current_stream().wait_stream(stream)
    step.zero_grad(set_to_none=True)  # the graph allocates the gradients that it writes
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(image, target)
        loss.backward()
    for seed in (1, 2):
        for static, new in zip((image, target), batch(seed, device), strict=True):
            static.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        result = [loss.detach().clone(), *gradients(step)]
        assert_same(result, train(expected_step, *batch(seed, device)))


@needs_gpu
@pytest.mark.parametrize("name", OPS)
def test_reduce_overhead_replays(name, device):
    torch.manual_seed(0)
    torch._dynamo.reset()
    counters.clear()
    step = Step(name).to(device)
    expected_step = copy.deepcopy(step)
    compiled = torch.compile(step, mode="reduce-overhead", fullgraph=True)
    # The first calls warm up, then the graphs are recorded, then they replay.
    for seed in range(5):
        image, target = batch(seed, device)
        torch.compiler.cudagraph_mark_step_begin()
        step.zero_grad(set_to_none=True)
        loss = compiled(image, target)
        loss.backward()
        result = [loss.detach().clone(), *gradients(step)]
        assert_same(result, train(expected_step, image, target))
    assert counters["inductor"]["cudagraph_skips"] == 0
