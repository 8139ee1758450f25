"""Tables, losses and gradients equal the values in a file, written by the release before.

``python tests/test_values.py`` writes the file again, after an intended change of results.
"""

import sys
from pathlib import Path

import pytest
import torch
from conftest import available

import tritonaff
from tritonaff.testing import CASES, evaluate, make_dilated_affinity_inputs, make_inputs

FILE = Path(__file__).parent / "data" / "values.pt"


def of_case(name, backend, dtype):
    channels = 32 if name == "dilated_affinity" else 5
    return evaluate(CASES[name], backend, *CASES[name].make_inputs((1, channels, 14, 17), dtype))


def of_modules(backend, dtype):
    """Losses with every option away from its default, and their gradients."""
    logits, target = make_inputs((2, 5, 9, 11), dtype)
    affinity_logits, labels = make_dilated_affinity_inputs((2, 32, 9, 11), dtype)
    target[0, 3:5] = 7
    weight = torch.arange(1.0, 6.0)
    fields = {
        "adaptive": tritonaff.AdaptiveAffinityFieldLoss(
            5, (3, 9), edge_lambda=0.5, margin=2.0, eps=1e-3, ignore_index=7
        ),
        "cross-entropy": tritonaff.AffinityFieldLoss(
            (5, 13), non_edge_lambda=2.0, ignore_index=7, cross_entropy=True, weight=weight
        ),
        "regression": tritonaff.AffinityRegressionLoss((4, 3), ignore_index=7),
        "regression of pixels": tritonaff.AffinityRegressionLoss(None, ignore_index=7),
    }
    if backend == "portable":
        fields["authors"] = tritonaff.AffinityFieldLoss(
            (3, 5), variant="authors", ignore_index=7, cross_entropy=True
        )
    target[target == 255] = 7
    results = {}
    for name, module in fields.items():
        x = logits.clone().requires_grad_()
        inputs = (x, target, 0.25) if "regression" not in name else (x, target)
        results[name] = module(*inputs)
        (results[f"{name} gradient"],) = torch.autograd.grad(results[name], x, retain_graph=True)
        for which, scores in module.named_parameters():
            (grad,) = torch.autograd.grad(results[name], scores, retain_graph=True)
            results[f"{name} gradient of {which}"] = grad
    for weighting in ("sqrt", "neighbor", "signal", "none"):
        x = affinity_logits.clone().requires_grad_()
        loss = tritonaff.dilated_affinity_loss(
            x, labels, [1, (2, 3), 4, 9], weighting=weighting, gamma=1.5, beta=0.3
        )
        results[weighting] = loss
        (results[f"{weighting} gradient"],) = torch.autograd.grad(loss, x)
    results["matrix"] = tritonaff.square_root_affinity(logits, (4, 3))
    results["propagated"] = tritonaff.affinity_propagation(
        logits.softmax(dim=1), affinity_logits.sigmoid(), [1, (2, 3), 4, 9],
        iterations=3, self_weight=2.0, from_logits=False,
    )  # fmt: skip
    return {name: value.detach() for name, value in results.items()}


def values(backend, dtype):
    with tritonaff.use_backend(backend):
        results = {name: of_case(name, backend, dtype) for name in CASES}
        results["modules"] = of_modules(backend, dtype)
    return results


# Another processor's exponentials differ in the last digits; on the same processor the bits are
# equal.
TOLERANCES = {
    "portable": (torch.float64, 1e-11),
    "native": (torch.float32, 1e-4),
    "triton": (torch.float32, 1e-4),
}


@pytest.mark.parametrize(
    "backend", ["portable", "native", pytest.param("triton", marks=pytest.mark.nightly)]
)
def test_values(backend):
    available(backend)
    dtype, tolerance = TOLERANCES[backend]
    expected = torch.load(FILE)[backend]
    for group, tables in values(backend, dtype).items():
        assert tables.keys() == expected[group].keys()
        for name, value in tables.items():
            assert value.dtype == expected[group][name].dtype
            scale = expected[group][name].abs().max().item() if value.numel() else 0
            torch.testing.assert_close(
                value,
                expected[group][name],
                rtol=0,
                atol=tolerance * scale,
                msg=lambda text, where=(group, name): f"{where}: {text}",
            )


def main():
    """Writes the file; with ``--exact``, compares bits with it instead."""
    from interpreted import BLOCKS

    from tritonaff.kernels.blocks import override

    with override(**BLOCKS):  # like the test that compares with the file
        results = {backend: values(backend, dtype) for backend, (dtype, _) in TOLERANCES.items()}
    if "--exact" not in sys.argv:
        torch.save(results, FILE)
        return
    expected = torch.load(FILE)
    for backend, groups in results.items():
        for group, tables in groups.items():
            for name, value in tables.items():
                if not torch.equal(value, expected[backend][group][name]):
                    print(f"{backend} {group} {name}: bits differ")


if __name__ == "__main__":
    main()
