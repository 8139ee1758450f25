"""The loss modules: options, decay, the minimax game, state, and what an editor shows of them."""

import inspect
import re
import typing

import pytest
import torch

import tritonaff
from tritonaff.testing import make_inputs


def test_the_plain_module_is_the_function():
    logits, target = make_inputs((2, 4, 9, 9))
    options = {"edge_lambda": 0.5, "non_edge_lambda": 2.0, "margin": 1.0, "eps": 1e-3}
    module = tritonaff.AffinityFieldLoss((3, 5), **options)
    expected = tritonaff.affinity_field_loss(logits, target, (3, 5), **options)
    torch.testing.assert_close(module(logits, target), expected)


def test_the_adaptive_module_starts_as_the_function():
    """Equal weights of the sizes, which is the function's default."""
    logits, target = make_inputs((2, 4, 9, 9))
    module = tritonaff.AdaptiveAffinityFieldLoss(4, (3, 5, 7), variant="authors")
    expected = tritonaff.affinity_field_loss(logits, target, (3, 5, 7), variant="authors")
    torch.testing.assert_close(module(logits, target), expected)
    torch.testing.assert_close(module.edge_weight, torch.full((4, 3), 1 / 3))
    torch.testing.assert_close(module.non_edge_weight, torch.full((4, 3), 1 / 3))


@pytest.mark.parametrize("progress", [0, 0.25, 1.0, torch.tensor(0.25)])
def test_decay(progress):
    logits, target = make_inputs((1, 4, 9, 9))
    module = tritonaff.AdaptiveAffinityFieldLoss(4)
    torch.testing.assert_close(
        module(logits, target, progress), module(logits, target) * 10 ** -float(progress)
    )


def test_lambdas_scale_the_two_terms():
    logits, target = make_inputs((1, 4, 9, 9))

    def loss(edge, non_edge):
        return tritonaff.affinity_field_loss(
            logits, target, edge_lambda=edge, non_edge_lambda=non_edge
        )

    assert loss(0, 0) == 0
    torch.testing.assert_close(loss(2, 3), 2 * loss(1, 0) + 3 * loss(0, 1))


def test_the_loss_is_the_formula():
    logits, target = make_inputs((1, 4, 9, 9), torch.float64)
    edge_weight, non_edge_weight = torch.rand(2, 4, 2, dtype=torch.float64)
    terms = tritonaff.affinity_field_terms(logits, target, (3, 7))
    loss = tritonaff.affinity_field_loss(
        logits, target, (3, 7), edge_weight=edge_weight, non_edge_weight=non_edge_weight
    )
    expected = sum(
        (edge_weight[:, k] @ terms.edge_sum[:, k]) / terms.edge_count[:, k].sum()
        + (non_edge_weight[:, k] @ terms.non_edge_sum[:, k]) / terms.non_edge_count[:, k].sum()
        for k in range(2)
    )
    torch.testing.assert_close(loss, expected)


def test_one_optimiser_step_descends_the_logits_and_ascends_the_weights():
    logits, target = make_inputs((2, 4, 12, 12), torch.float64)
    logits.requires_grad_()
    module = tritonaff.AdaptiveAffinityFieldLoss(4).double()
    optimizer = torch.optim.SGD([{"params": [logits]}, module.optimizer_group(lr=0.1)], lr=0.1)
    before = module(logits, target)
    before.backward()
    old_logits = logits.detach().clone()
    optimizer.step()
    with torch.no_grad():
        assert module(old_logits, target) > before  # the weights alone
        module_of_equal_weights = tritonaff.AdaptiveAffinityFieldLoss(4).double()
        assert module_of_equal_weights(logits, target) < before  # the logits alone


def test_the_weights_climb_to_the_hard_sizes():
    logits, target = make_inputs((1, 3, 24, 24), torch.float64, confidence=3.0)
    module = tritonaff.AdaptiveAffinityFieldLoss(3, (3, 13)).double()
    optimizer = torch.optim.SGD([module.optimizer_group(lr=5.0)], lr=5.0)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = module(logits, target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses)
    assert losses[-1] > losses[0]
    edge, non_edge = module.effective_kernel_size()
    assert edge.shape == non_edge.shape == (3,)
    sizes = torch.tensor([3.0, 13.0]).double()
    torch.testing.assert_close(edge, (module.edge_weight @ sizes).detach())
    torch.testing.assert_close(non_edge, (module.non_edge_weight @ sizes).detach())
    assert ((edge - 8).abs() > 0.5).any()


def test_optimizer_group_has_no_weight_decay():
    module = tritonaff.AdaptiveAffinityFieldLoss(4)
    optimizer = torch.optim.AdamW([module.optimizer_group(lr=0.5)], lr=0.1, weight_decay=0.3)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.5, 0.0)
    assert {id(p) for p in group["params"]} == {id(p) for p in module.parameters()}


def test_state_dict_round_trip():
    logits, target = make_inputs((1, 4, 9, 9))
    module = tritonaff.AdaptiveAffinityFieldLoss(4)
    torch.nn.init.normal_(module.edge_scores)
    torch.nn.init.normal_(module.non_edge_scores)
    copy = tritonaff.AdaptiveAffinityFieldLoss(4)
    copy.load_state_dict(module.state_dict())
    assert torch.equal(copy(logits, target), module(logits, target))
    assert sorted(module.state_dict()) == ["edge_scores", "non_edge_scores"]


def test_half_precision_modules_and_logits():
    logits, target = make_inputs((1, 4, 9, 9), torch.bfloat16)
    module = tritonaff.AdaptiveAffinityFieldLoss(4).bfloat16()
    logits.requires_grad_()
    loss = module(logits, target)
    loss.backward()
    assert loss.dtype == torch.float32
    assert logits.grad.dtype == torch.bfloat16
    assert module.edge_scores.grad.dtype == torch.bfloat16


def test_repr_names_the_options():
    text = repr(tritonaff.AdaptiveAffinityFieldLoss(4, (3, 9), margin=2.0))
    assert all(part in text for part in ("num_classes=4", "(3, 9)", "margin=2.0"))


RATES = [8, (2, 4)]
STATISTICS = tritonaff.NeighborStatistics(RATES)
# At the first rate the same label in 3 of 4 signals, smoothed; at the second always.
STATISTICS.signal_count[0, 4] = torch.tensor([0, 299])
STATISTICS.signal_count[0, 7] = torch.tensor([99, 0])
STATISTICS.signal_count[1, 8, 1] = 998


@pytest.mark.parametrize(
    ("frequency", "expected"),
    [
        (None, [0.5, 0.5]),
        (0.9, [0.9, 0.9]),
        ([0.9, 0.6], [0.9, 0.6]),
        (torch.tensor([0.9, 0.6], dtype=torch.float64), [0.9, 0.6]),
        (torch.tensor(0.9, dtype=torch.float64), [0.9, 0.9]),
        (STATISTICS, [0.75, 0.999]),
        (tritonaff.NeighborStatistics(RATES), [0.5, 0.5]),
    ],
)
def test_the_head_starts_with_the_frequency_of_positive_signals(frequency, expected):
    head = tritonaff.DilatedAffinityHead(5, RATES, frequency)
    first = head(torch.zeros(2, 5, 3, 4)).sigmoid()
    assert first.shape == (2, 16, 3, 4)
    for rate, value in enumerate(expected):
        channels = first[:, 8 * rate : 8 * rate + 8]
        torch.testing.assert_close(channels, torch.full_like(channels, value))


def test_the_head_hardly_looks_at_features_at_first_and_can_start_again():
    torch.manual_seed(0)
    head = tritonaff.DilatedAffinityHead(256, [8], 0.9)
    assert head.weight.std().item() == pytest.approx(0.01, rel=0.1)
    with torch.no_grad():
        head.weight.fill_(1)
        head.bias.fill_(1)
    head.reset_parameters()
    assert head.weight.std().item() == pytest.approx(0.01, rel=0.1)
    torch.testing.assert_close(head.bias.sigmoid(), torch.full((8,), 0.9))
    assert "rates=((8, 8),), positive_frequency=(0.9)" in repr(head)


def test_what_the_head_predicts_is_what_loss_and_propagation_take():
    rates = tritonaff.expand_rates([1, (1, 2)])
    statistics = tritonaff.NeighborStatistics(rates)
    target = torch.randint(0, 2, (2, 6, 6))
    statistics.update(target)
    head = tritonaff.DilatedAffinityHead(4, rates, statistics)
    affinity = head(torch.randn(2, 4, 6, 6))
    tritonaff.DilatedAffinityLoss(rates, statistics=statistics)(affinity, target).backward()
    assert head.weight.grad.isfinite().all()
    probs = torch.full((2, 2, 6, 6), 0.5)
    assert tritonaff.AffinityPropagation(rates)(probs, affinity).shape == probs.shape


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, RATES), ValueError, "in_channels must be at least 1, got 0"),
        ((1.0, RATES), TypeError, "in_channels must be an int, got float"),
        ((4, 8.0), TypeError, "rates must be a sequence"),
        ((4, RATES, 0), ValueError, r"positive_frequency must be in \(0, 1\), got 0"),
        ((4, RATES, [0.5, 1.0]), ValueError, r"positive_frequency must be in \(0, 1\), got 1.0"),
        ((4, RATES, float("nan")), ValueError, r"positive_frequency must be in \(0, 1\), got nan"),
        ((4, RATES, "0.5"), TypeError, "positive_frequency must be a number, got str"),
        ((4, RATES, [[0.5, 0.5]] * 2), TypeError, "positive_frequency must be a number, got list"),
        ((4, RATES, [0.5]), ValueError, "one for each of 2 rates, got 1 numbers"),
        ((4, RATES, tritonaff.NeighborStatistics([8])), ValueError, r"the rates .* got \(\(8, 8\)"),
    ],
)
def test_bad_heads(arguments, error, message):
    with pytest.raises(error, match=message):
        tritonaff.DilatedAffinityHead(*arguments)


PUBLIC = [getattr(tritonaff, name) for name in tritonaff.__all__ if name != "__version__"]


def test_an_editor_shows_every_parameter_where_it_is():
    for thing in PUBLIC:
        assert not re.search(r"(?m)^ +[\w, ]+:( \([^)]*\) \w+,)? see :", thing.__doc__ or ""), thing
        forward = vars(thing).get("forward") if isinstance(thing, type) else None
        if forward is not None:
            names = inspect.signature(forward).parameters.keys() - {"self"}
            missing = [name for name in names if not re.search(rf"\b{name}\b", forward.__doc__)]
            assert missing == [], thing


def test_an_editor_offers_the_values_of_options():
    names = {"variant", "mode", "weighting", "backend", "activation", "reduction", "balance"}
    seen = set()
    for thing in PUBLIC:
        function = thing.__init__ if isinstance(thing, type) else thing
        hints = typing.get_type_hints(function) if inspect.isfunction(function) else {}
        for name in names & hints.keys():
            assert typing.get_origin(hints[name]) is typing.Literal, (thing, name)
            seen.add(name)
    assert seen == names
