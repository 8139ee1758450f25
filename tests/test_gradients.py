"""Autograd formulas return a gradient per argument of their op, on every path through them."""

import pytest
import torch

import tritonaff
from tritonaff.ops import (
    affinity_field,
    affinity_propagation,
    affinity_regression,
    box_pairwise,
    definition,
    dilated_affinity,
    image_affinity,
    instance_affinity,
)
from tritonaff.testing import (
    CASES,
    make_dilated_affinity_inputs,
    make_inputs,
    make_propagation_inputs,
)

MODULES = (
    affinity_field,
    affinity_propagation,
    affinity_regression,
    box_pairwise,
    dilated_affinity,
    image_affinity,
    instance_affinity,
)
OPS = {
    op._name: op
    for module in MODULES
    for op in vars(module).values()
    if isinstance(op, torch.library.CustomOpDef) and op._backward_fn is not None
}


@pytest.fixture
def returned(monkeypatch):
    """The number of arguments and of gradients of each formula that ran."""
    seen = []
    in_order = definition.in_order

    def spy(names, grads):
        result = in_order(names, grads)
        seen.append((tuple(names), len(result), {name for name in grads}))
        return result

    monkeypatch.setattr(definition, "in_order", spy)
    return seen


def affinity_field_terms(name):
    logits, target = make_inputs((1, 3, 6, 7))
    terms = tritonaff.affinity_field_terms(logits.requires_grad_(), target, (3, 5))
    getattr(terms, name).sum().backward()


def fused(*, create_graph=False, twice=False, learned=False):
    logits, target = make_inputs((1, 3, 6, 7))
    weight = torch.rand(3, 1, requires_grad=learned)
    loss = tritonaff.affinity_field_cross_entropy(
        logits.requires_grad_(), target, 3, edge_weight=weight
    )
    loss.backward(create_graph=create_graph, retain_graph=twice)
    if twice:
        loss.backward()


def log_loss_alone():
    logits, target = make_inputs((1, 3, 6, 7))
    _, _, *pixels = affinity_field.affinity_field_statistics(
        logits, target, [3], 255, "paper", "portable"
    )
    options = [3], 3.0, 1e-4, "paper", "portable"
    _, log_loss = affinity_field.affinity_field(logits.requires_grad_(), *pixels, *options)
    log_loss.sum().backward()


def affinity_regression_loss(grid_sizes):
    logits, target = make_inputs((1, 3, 6, 7))
    tritonaff.affinity_regression_loss(logits.requires_grad_(), target, grid_sizes).backward()


def square_root_affinity():
    logits, _ = make_inputs((1, 3, 6, 7))
    tritonaff.square_root_affinity(logits.requires_grad_(), (3,)).sum().backward()


def dilated_affinity_loss():
    logits, target = make_dilated_affinity_inputs((1, 32, 6, 7))
    rates = (1, 2, 3, 4)
    tritonaff.dilated_affinity_loss(logits.requires_grad_(), target, rates).backward()


def instance_affinity_table(name):
    """A table alone: the others have no gradient."""
    case = CASES["instance_affinity"]
    logits, ids = case.make_inputs((1, 12, 6, 7))
    terms = case.tables(logits.requires_grad_(), ids)
    getattr(terms, name).sum().backward()


def box_pairwise_loss():
    logits, *others = CASES["box_pairwise"].make_inputs((1, 2, 6, 7))
    tritonaff.box_pairwise_loss(logits.requires_grad_(), *others).backward()


def image_affinity_weights():
    images = torch.rand(1, 3, 6, 7, requires_grad=True)
    tritonaff.image_affinity(images, [1]).square().sum().backward()


def propagate(needs_probs, needs_affinity):
    logits, _, affinity = make_propagation_inputs((1, 3, 6, 7))
    probs = logits.softmax(dim=1).requires_grad_(needs_probs)
    result = tritonaff.affinity_propagation(
        probs, affinity.requires_grad_(needs_affinity), (1, 2, 3, 4)
    )
    result.square().sum().backward()


PATHS = {
    "edges alone": lambda: affinity_field_terms("edge_sum"),
    "non-edges alone": lambda: affinity_field_terms("non_edge_sum"),
    "cross-entropy alone": log_loss_alone,
    "fused": fused,
    "fused, create_graph": lambda: fused(create_graph=True),
    "fused, twice": lambda: fused(twice=True),
    "fused, learned weights": lambda: fused(learned=True),
    "fused, learned weights, create_graph": lambda: fused(learned=True, create_graph=True),
    "regression of grids": lambda: affinity_regression_loss((3, 2)),
    "regression of pixels": lambda: affinity_regression_loss(None),
    "matrices": square_root_affinity,
    "dilated": dilated_affinity_loss,
    "instances, -log pt": lambda: instance_affinity_table("log_loss"),
    "instances, p": lambda: instance_affinity_table("p_sum"),
    "instances, focal": lambda: instance_affinity_table("focal_sum"),
    "boxes": box_pairwise_loss,
    "weights from images": image_affinity_weights,
    "propagation": lambda: propagate(True, True),
    "propagation of probs": lambda: propagate(True, False),
    "propagation of affinity": lambda: propagate(False, True),
}


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_every_formula_returns_a_gradient_for_every_argument(returned):
    with tritonaff.use_backend("portable"):
        for path in PATHS.values():
            path()
    schemas = {
        tuple(argument.name for argument in op._opoverload._schema.arguments) for op in OPS.values()
    }
    assert {names for names, _, _ in returned} == schemas
    assert all(count == len(names) for names, count, _ in returned)


SEVERAL_OUTPUTS = {name: op for name, op in OPS.items() if len(op._opoverload._schema.returns) > 1}


@pytest.mark.parametrize("op", SEVERAL_OUTPUTS.values(), ids=SEVERAL_OUTPUTS)
def test_no_gradients_in_are_no_gradients_out(op):
    """A formula of several outputs also runs where no output has a gradient."""
    schema = op._opoverload._schema
    result = op._backward_fn(None, *(None for _ in schema.returns))
    assert result == (None,) * len(schema.arguments)


def test_a_gradient_of_no_argument_is_an_error():
    with pytest.raises(RuntimeError, match=r"gradients of \['logit'\]"):
        definition.in_order(["logits", "target"], {"logit": torch.zeros(1)})
