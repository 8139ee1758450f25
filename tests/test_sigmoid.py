"""Activation "sigmoid": every channel is a question of its own, with labels 0 and 1."""

import itertools
import math

import pytest
import torch
from conftest import available
from inputs import given, maker
from layouts import LAYOUTS, laid_out
from torch.nn import functional as F

import tritonaff
from tritonaff.testing import Case, check_parity

SIZES = (3, 7)


def binary_inputs(shape, dtype=torch.float32, *, confidence=2.0, seed=0, device="cpu"):
    """Logits (N, C, H, W) and a target of the same shape: patches of 0 and 1, a few ignored."""
    generator = torch.Generator().manual_seed(seed)
    n, c, height, width = shape
    target = torch.randint(0, 2, (n, c, -(-height // 3), -(-width // 4)), generator=generator)
    target = target.repeat_interleave(3, dim=2).repeat_interleave(4, dim=3)[..., :height, :width]
    logits = confidence * (2.0 * target - 1) + torch.randn(shape, generator=generator)
    target = target.masked_fill(torch.rand(shape, generator=generator) < 0.05, 255)
    return logits.to(device, dtype), target.contiguous().to(device)


def loss_of_tables(edge_sum, non_edge_sum, edge_count, non_edge_count):
    weight = 1 + torch.arange(edge_sum.numel(), device=edge_sum.device).view_as(edge_sum) / 7
    entries = (edge_count.sum() + non_edge_count.sum()).clamp(min=1)
    return ((edge_sum * weight + non_edge_sum * weight.flip(0)).sum()) / entries


def tables(logits, target):
    return tritonaff.affinity_field_terms(logits, target, SIZES, activation="sigmoid")


FIELD = Case.of_tables("sigmoid affinity field", tables, loss_of_tables, 9.2)
REGRESSION = Case.of_tables(
    "sigmoid affinity regression",
    lambda logits, target: tritonaff.affinity_regression_terms(
        logits, target, (3, 2), activation="sigmoid"
    ),
    lambda squared_error, pair_count: (squared_error / pair_count.clamp(min=1)).mean(),
    2.0,
)


def test_reference_is_the_definition():
    logits, target = binary_inputs((2, 2, 5, 4), torch.float64)
    eps, margin = 1e-3, 2.0
    p = logits.sigmoid().clamp(eps, 1 - eps)
    expected = torch.zeros(4, 2, len(SIZES), dtype=torch.float64)
    spots = itertools.product(range(2), range(2), range(5), range(4), enumerate(SIZES))
    for n, c, y, x, (k, size) in spots:
        d = size // 2
        for dy, dx in itertools.product((-d, 0, d), repeat=2):
            j_y, j_x = y + dy, x + dx
            if (dy, dx) == (0, 0) or not (0 <= j_y < 5 and 0 <= j_x < 4):
                continue
            label_i, label_j = int(target[n, c, y, x]), int(target[n, c, j_y, j_x])
            if 255 in (label_i, label_j):
                continue
            p_i, p_j = float(p[n, c, y, x]), float(p[n, c, j_y, j_x])
            kl = p_j * math.log(p_j / p_i) + (1 - p_j) * math.log((1 - p_j) / (1 - p_i))
            row = 0 if label_i != label_j else 1
            expected[row, c, k] += max(0.0, margin - kl) if row == 0 else kl
            expected[2 + row, c, k] += 1
    with tritonaff.use_backend("reference"):
        terms = tritonaff.affinity_field_terms(
            logits, target, SIZES, margin=margin, eps=eps, activation="sigmoid"
        )
    for table, value in zip(terms, expected, strict=True):
        torch.testing.assert_close(table.double(), value, rtol=1e-12, atol=1e-12)


@maker
def inputs(pick):
    shape = pick([1, 2]), pick([1, 2, 3]), pick([1, 5, 9]), pick([2, 7, 18])
    dtype = pick([torch.float32, torch.bfloat16, torch.float16])
    logits, target = binary_inputs(shape, dtype, confidence=pick([0.0, 2.0, 9.0]))
    if pick([True, False]) and shape[1] == 1:
        target = target[:, 0]
    return laid_out(logits, pick(LAYOUTS)), target.to(pick([torch.uint8, torch.int16]))


@given(inputs(), [FIELD, REGRESSION], ["portable", "native", "triton"], rows=18)
def test_every_backend_matches_the_reference(values, case, backend):
    check_parity(case, available(backend), *values)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("weighted", [True, False])
def test_binary_cross_entropy_beside_it(any_backend, device, channels, weighted):
    logits, target = binary_inputs((2, channels, 7, 9), device=device)
    pos_weight = torch.arange(2.0, 2 + channels, device=device) if weighted else None
    counted = target != 255
    x = logits.double().requires_grad_()
    entry_weight = None if pos_weight is None else pos_weight.view(-1, 1, 1)
    entries = F.binary_cross_entropy_with_logits(
        x, target.clamp(max=1).double(), pos_weight=entry_weight, reduction="none"
    )
    expected = entries[counted].mean()
    expected = expected + tritonaff.affinity_field_loss(x, target, SIZES, activation="sigmoid")
    (exact,) = torch.autograd.grad(expected, x)
    logits.requires_grad_()
    module = tritonaff.AffinityFieldLoss(
        SIZES, cross_entropy=True, activation="sigmoid", pos_weight=pos_weight
    )
    with tritonaff.use_backend(any_backend):
        loss = tritonaff.affinity_field_cross_entropy(
            logits, target, SIZES, activation="sigmoid", pos_weight=pos_weight
        )
        (gradient,) = torch.autograd.grad(loss, logits)
        assert torch.equal(module(logits, target), loss)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    assert (gradient - exact).norm() <= 2e-5 * exact.norm()


def test_one_channel_is_the_softmax_over_two(backend, device):
    """The tables of (0, x) are equal in both channels, and so is their mean."""
    logits, target = binary_inputs((2, 1, 8, 9), device=device)
    two = torch.cat((torch.zeros_like(logits), logits), dim=1)
    with tritonaff.use_backend(backend):
        for loss in (tritonaff.affinity_field_loss, tritonaff.affinity_regression_loss):
            expected = loss(two, target[:, 0])
            for one_channel in (target, target[:, 0]):
                result = loss(logits, one_channel, activation="sigmoid")
                torch.testing.assert_close(result, expected)


def test_sizes_are_learned_by_channel(device):
    logits, target = binary_inputs((2, 1, 9, 11), device=device)
    module = tritonaff.AdaptiveAffinityFieldLoss(1, SIZES, activation="sigmoid").to(device)
    module(logits, target).backward()
    assert module.edge_scores.grad.shape == (1, 2)
    assert module.edge_scores.grad.any()
    parts = [module.normalizer(part) for part in target.split(1)]
    total = sum(
        module(x, y, normalizer=sum(parts))
        for x, y in zip(logits.split(1), target.split(1), strict=True)
    )
    torch.testing.assert_close(total, module(logits, target))


def test_regression_is_a_mean_over_images_and_channels(device):
    logits, target = binary_inputs((2, 3, 9, 11), device=device)
    target[1, 2] = 255
    module = tritonaff.AffinityRegressionLoss((3, 2), activation="sigmoid")
    terms = tritonaff.affinity_regression_terms(logits, target, (3, 2), activation="sigmoid")
    assert terms.squared_error.shape == terms.pair_count.shape == (2, 3)
    assert int(module.normalizer(target)) == 5
    expected = (terms.squared_error / terms.pair_count.clamp(min=1)).sum() / 5
    torch.testing.assert_close(module(logits, target), expected)


def test_one_graph(device):
    torch._dynamo.reset()
    logits, target = binary_inputs((1, 2, 6, 7), device=device)
    loss = tritonaff.AffinityFieldLoss(SIZES, cross_entropy=True, activation="sigmoid")
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    with tritonaff.use_backend("portable"):
        torch.testing.assert_close(compiled(logits, target), loss(logits, target))


ONE, LABELS = torch.zeros(2, 1, 4, 5), torch.zeros(2, 4, 5, dtype=torch.long)
SIGMOID = {"activation": "sigmoid"}


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((ONE, LABELS), {}, r"at least two classes, got 1.*pass activation='sigmoid'"),
        ((ONE, LABELS + 2), SIGMOID, r"target must hold classes in \[0, 2\)"),
        ((ONE, LABELS[:1]), SIGMOID, r"\(N, C, H, W\) = \(2, 1, 4, 5\) of logits"),
        ((ONE.expand(-1, 3, -1, -1), LABELS), SIGMOID, r"target must have shape \(N, 3, H, W\)"),
        ((ONE, LABELS), {"activation": "tanh"}, r"activation must be one of .* got 'tanh'"),
        ((ONE, LABELS), {**SIGMOID, "variant": "authors"}, "'authors' has no activation 'sigmoid'"),
        ((ONE, LABELS), {**SIGMOID, "weight": torch.ones(1)}, "weight needs activation='softmax'"),
        (
            (ONE.expand(-1, 2, -1, -1), LABELS),
            {"pos_weight": torch.ones(2)},
            "pos_weight needs activation='sigmoid'",
        ),
    ],
)
def test_what_is_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        tritonaff.affinity_field_cross_entropy(*arguments, **options)
