"""Parts of a batch, each divided by the counts of the whole, add up to the loss of the batch."""

import pytest
import torch

import tritonaff
from tritonaff.testing import make_inputs

RATES = [1, (2, 3)]
MODULES = {
    "paper": (tritonaff.AffinityFieldLoss((3, 5)), (4,)),
    "authors": (tritonaff.AffinityFieldLoss((3, 5), variant="authors"), (4,)),
    "adaptive": (tritonaff.AdaptiveAffinityFieldLoss(4), ()),
    "regression": (tritonaff.AffinityRegressionLoss((4, 3)), ()),
    "every pixel": (tritonaff.AffinityRegressionLoss(None), ()),
    "dilated": (tritonaff.DilatedAffinityLoss(RATES), ()),
    "dilated, signal": (tritonaff.DilatedAffinityLoss(RATES, weighting="signal"), ()),
    "instances": (
        tritonaff.InstanceAffinityLoss(
            [(0, 1), (1, 0), (-2, 1), (0, -3)], balance="inverse", ignore_index=255
        ),
        (),
    ),
}


@pytest.fixture
def batch():
    _, target = make_inputs((5, 4, 10, 13))
    target[1] = 255  # nothing counts
    target[2] = 3  # no edge
    target[3, 2:] = 255
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 16, 10, 13, dtype=torch.float64, generator=generator)
    return logits, target


@pytest.mark.parametrize("name", MODULES)
def test_gradients_accumulate_to_those_of_the_batch(name, batch):
    module, arguments = MODULES[name]
    logits, target = batch
    if "dilated" not in name:
        logits = logits[:, :4]
    logits = logits.clone().requires_grad_()
    loss = module(logits, target)
    (expected,) = torch.autograd.grad(loss, logits)

    parts = [slice(0, 1), slice(1, 2), slice(2, 3), slice(3, 5)]
    normalizer = sum(module.normalizer(target[part], *arguments) for part in parts)
    assert torch.equal(normalizer, module.normalizer(target, *arguments))
    losses = [module(logits[part], target[part], normalizer=normalizer) for part in parts]
    torch.testing.assert_close(sum(losses), loss)
    assert (sum(module(logits[part], target[part]) for part in parts) / 4 - loss).abs() > 1e-3
    (grad,) = torch.autograd.grad(sum(losses), logits)
    torch.testing.assert_close(grad, expected)

    own = module(logits, target, normalizer=module.normalizer(target, *arguments).int())
    torch.testing.assert_close(own, loss)


@pytest.mark.parametrize("name", ["adaptive", "regression", "dilated"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x: 7, TypeError, "normalizer must be a tensor, got int"),
        (lambda x: x.float(), TypeError, "normalizer must have dtype int32, int64, got float32"),
        (lambda x: x[None], ValueError, "normalizer must have shape"),
        (
            lambda x: x.to("meta"),
            ValueError,
            r"normalizer and (affinity_)?logits must be on one device",
        ),
    ],
)
def test_what_is_no_normalizer(name, change, error, message, batch):
    module, _ = MODULES[name]
    logits, target = batch
    logits = logits if name == "dilated" else logits[:, :4]
    with pytest.raises(error, match=message):
        module(logits, target, normalizer=change(module.normalizer(target)))


def test_cross_entropy_divides_by_another_number():
    module = tritonaff.AffinityFieldLoss(cross_entropy=True)
    logits, target = torch.randn(1, 3, 6, 6), torch.randint(0, 3, (1, 6, 6))
    with pytest.raises(ValueError, match="normalizer must be None with cross_entropy=True"):
        module(logits, target, normalizer=module.normalizer(target, 3))


@pytest.mark.parametrize("name", ["adaptive", "regression", "dilated"])
def test_what_is_no_target(name):
    module, _ = MODULES[name]
    with pytest.raises(TypeError, match="target must have dtype"):
        module.normalizer(torch.zeros(1, 2, 3, dtype=torch.complex64))
    with pytest.raises(ValueError, match="target must have shape"):
        module.normalizer(torch.zeros(2, 3, dtype=torch.int64))
