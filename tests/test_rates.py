"""Rates: the paper's notation, and the order of the neighbours."""

import pytest

import tritonaff
from tritonaff.checks import check_rates
from tritonaff.rates import rate_offsets


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ([8, (12, 24), 16], ((8, 8), (12, 24), (24, 12), (16, 16))),
        ([(5, 5), [1, 2]], ((5, 5), (1, 2), (2, 1))),
        ((1,), ((1, 1),)),
    ],
)
def test_expand_rates(rates, expected):
    assert tritonaff.expand_rates(rates) == expected


def test_a_pair_is_that_rate_alone():
    assert check_rates([8, (12, 24), [24, 12]]) == ((8, 8), (12, 24), (24, 12))


@pytest.mark.parametrize(
    ("rates", "error", "message"),
    [
        (8.0, TypeError, "rates must be a sequence of int and pairs of int, got float"),
        ("8", TypeError, "rates must be a sequence .* got str"),
        ([8.0], TypeError, "every one of rates that is no pair must be an int, got float"),
        ([True], TypeError, "must be an int, got bool"),
        ([(8, "8")], TypeError, "both of a pair of rates must be an int, got str"),
        ([(8, 8, 8)], ValueError, r"must be an int or a pair of int, got \(8, 8, 8\)"),
        ([], ValueError, "at least one of them"),
        ([0], ValueError, r"rates must be at least 1 .* got \[0\]"),
        ([(1, -1)], ValueError, "rates must be at least 1"),
        ([8, (8, 8)], ValueError, "distinct"),
    ],
)
@pytest.mark.parametrize("function", [check_rates, tritonaff.expand_rates])
def test_bad_rates(function, rates, error, message):
    with pytest.raises(error, match=message):
        function(rates)


def test_both_orders_and_their_expansion_are_one_rate_twice():
    rates = [(1, 2), (2, 1)]
    assert check_rates(rates) == ((1, 2), (2, 1))
    with pytest.raises(ValueError, match="distinct"):
        tritonaff.expand_rates(rates)


def test_neighbors_are_row_by_row_without_the_centre():
    down, across = 2, 5
    assert rate_offsets([(down, across), (1, 1)]) == [
        *(-2, -5, -2, 0, -2, 5, 0, -5, 0, 5, 2, -5, 2, 0, 2, 5),
        *(-1, -1, -1, 0, -1, 1, 0, -1, 0, 1, 1, -1, 1, 0, 1, 1),
    ]


def test_a_rate_beyond_64_bits():
    with pytest.raises(ValueError, match="rates that is no pair must fit 64 bits, got"):
        tritonaff.expand_rates([2**63])
