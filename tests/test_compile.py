"""torch.compile: one graph per training step, for any image size; export; other transformations."""

import pytest
import torch

import tritonaff
from tritonaff.bench.measure import compiler_works
from tritonaff.testing import make_inputs


class Step(torch.nn.Module):
    """A network, cross-entropy and the losses: the compiled part of a training script."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Conv2d(3, 4, 3, padding=1)
        self.aaf = tritonaff.AdaptiveAffinityFieldLoss(4, (3, 5))
        self.ar_of_grids = tritonaff.AffinityRegressionLoss((4, 2))
        self.ar_of_pixels = tritonaff.AffinityRegressionLoss(None)

    def forward(self, image, target, progress):
        logits = self.net(image)
        loss = torch.nn.functional.cross_entropy(logits, target, ignore_index=255)
        loss = loss + self.aaf(logits, target, progress)
        return loss + 0.1 * (self.ar_of_grids(logits, target) + self.ar_of_pixels(logits, target))


def batch(n, height, width, device="cpu"):
    torch.manual_seed(0)
    image = torch.randn(n, 3, height, width)
    return image.to(device), torch.randint(0, 4, (n, height, width)).to(device)


def counting_backend():
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    return graphs, backend


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


@pytest.fixture
def portable():
    """For tests of the ops alone, which are the same for every backend."""
    with tritonaff.use_backend("portable"):
        yield


def test_two_graphs_serve_every_image_size(backend, device):
    graphs, compiler = counting_backend()
    step = Step().to(device)
    compiled = torch.compile(step, backend=compiler, fullgraph=True)
    shapes = [(2, 8, 9), (3, 7, 11), (2, 6, 7), (4, 9, 5), (5, 7, 7)]
    for i, (n, height, width) in enumerate(shapes[:2] if backend == "triton" else shapes):
        image, target = batch(n, height, width, device)
        progress = torch.tensor(i / 10, device=device)
        with tritonaff.use_backend(backend):
            loss = compiled(image, target, progress)
            loss.backward()
            gradients = [p.grad.clone() for p in step.parameters()]
            step.zero_grad()
            expected = step(image, target, progress)
            expected.backward()
        torch.testing.assert_close(loss, expected)
        for gradient, parameter in zip(gradients, step.parameters(), strict=True):
            torch.testing.assert_close(gradient, parameter.grad)
        step.zero_grad()
    assert len(graphs) <= 2


def test_cross_entropy_in_the_same_operation(backend, device):
    graphs, compiler = counting_backend()
    loss = tritonaff.AffinityFieldLoss(
        (3, 5), cross_entropy=True, weight=torch.tensor([1.0, 0.5, 2.0, 0.0])
    ).to(device)
    compiled = torch.compile(loss, backend=compiler, fullgraph=True, dynamic=True)
    shapes = ((2, 4, 8, 9), (3, 4, 7, 11), (4, 4, 6, 5))
    for shape in shapes[:2] if backend == "triton" else shapes:
        logits, target = make_inputs(shape, device=device)
        logits.requires_grad_()
        with tritonaff.use_backend(backend):
            result, expected = compiled(logits, target), loss(logits, target)
            (gradient,) = torch.autograd.grad(result, logits)
            (expected_gradient,) = torch.autograd.grad(expected, logits)
        torch.testing.assert_close(result, expected)
        torch.testing.assert_close(gradient, expected_gradient)
    assert len(graphs) <= 2


@pytest.mark.skipif(not compiler_works(torch.device("cpu")), reason="Inductor needs a C++ compiler")
def test_inductor(backend, device):
    """The real compiler, once: the op stays opaque."""
    logits, target = make_inputs((1, 4, 12, 10), device=device)
    logits.requires_grad_()

    def loss(logits, target):
        return 3 * tritonaff.affinity_field_loss(2 * logits, target, (3, 5))

    with tritonaff.use_backend(backend):
        compiled = torch.compile(loss, fullgraph=True)(logits, target)
        (gradient,) = torch.autograd.grad(compiled, logits)
        (expected,) = torch.autograd.grad(loss(logits, target), logits)
    torch.testing.assert_close(gradient, expected)


def test_changing_the_backend_reaches_a_compiled_function(monkeypatch):
    logits, target = make_inputs((1, 4, 12, 10))
    compiled = torch.compile(tritonaff.affinity_field_loss, backend="eager", fullgraph=True)
    with tritonaff.use_backend("portable"):
        expected = compiled(logits, target)

    def refuse(*args, **options):
        raise RuntimeError("the portable implementation ran")

    monkeypatch.setattr("tritonaff.portable.affinity_field.compute", refuse)
    with tritonaff.use_backend("reference"):
        torch.testing.assert_close(compiled(logits, target), expected)
    with tritonaff.use_backend("portable"), pytest.raises(RuntimeError, match="the portable"):
        compiled(logits, target)


@pytest.mark.usefixtures("portable")
def test_export():
    image, target = batch(2, 8, 8)
    step = Step()
    exported = torch.export.export(step, (image, target, torch.tensor(0.5)))
    result = exported.module()(image, target, torch.tensor(0.5))
    torch.testing.assert_close(result, step(image, target, torch.tensor(0.5)))


def test_meta_tensors_have_the_right_shapes():
    logits = torch.empty(2, 5, 8, 9, device="meta", requires_grad=True)
    target = torch.empty(2, 8, 9, dtype=torch.uint8, device="meta")
    terms = tritonaff.affinity_field_terms(logits, target, (3, 5))
    assert [tuple(table.shape) for table in terms] == [(5, 2)] * 4
    assert tritonaff.affinity_field_loss(logits, target).shape == ()


@pytest.mark.usefixtures("portable")
def test_autocast_hands_bfloat16_through():
    image, target = batch(1, 9, 9)
    step = Step()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = step(image, target, None)
    loss.backward()
    assert loss.dtype == torch.float32
    assert step.net.weight.grad.isfinite().all()


@pytest.mark.usefixtures("portable")
def test_checkpointing_recomputes_the_same():
    image, target = batch(1, 9, 9)
    step = Step()
    step(image, target, None).backward()
    expected = step.net.weight.grad.clone()
    step.zero_grad()
    torch.utils.checkpoint.checkpoint(step, image, target, None, use_reentrant=False).backward()
    torch.testing.assert_close(step.net.weight.grad, expected)
