"""Inputs of properties: rows that cover every option in the gate, thousands at random nightly.

A maker is a function of ``pick``, which picks one of a sequence of options::

    @maker
    def inputs(pick, dtypes):
        return torch.randn(pick(range(1, 20)), 3).to(pick(dtypes))


    @given(inputs([torch.float32, torch.float64]), ["portable", "triton"])
    def test_something(values, backend): ...
"""

import functools
import os
import random

import pytest
from hypothesis import given as hypothesis_given
from hypothesis import strategies as st

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
ROWS = 12


def maker(function):
    """``function(pick, ...)`` as a function of its other arguments; ``pick`` comes later."""

    @functools.wraps(function)
    def with_arguments(*args, **options):
        return lambda pick: function(pick, *args, **options)

    return with_arguments


def given(*makers, rows=ROWS):
    """The test, called with the value of each maker. In place of a maker, a sequence of options."""

    def decorate(test):
        def run(pick):
            test(*(make(pick) if callable(make) else pick(make) for make in makers))

        if NIGHTLY:

            def at_random(data):
                run(lambda options: data.draw(st.sampled_from(options)))

            at_random.__name__ = test.__name__
            return hypothesis_given(st.data())(at_random)

        @pytest.mark.parametrize("row", range(rows))
        def in_rows(row):
            run(Row(test.__qualname__, row, rows))

        in_rows.__name__, in_rows.__doc__ = test.__name__, test.__doc__
        return in_rows

    return decorate


class Row:
    """One row of several. Each choice takes every option equally often over the rows; if options
    outnumber rows, a choice takes both ends and options evenly between. Orders differ from choice
    to choice, so that the rows combine options differently.
    """

    def __init__(self, name, row, rows):
        self.name, self.row, self.rows, self.choices = name, row, rows, 0

    def __call__(self, options):
        self.choices += 1
        order = list(range(self.rows))
        random.Random(f"{self.name} {self.choices}").shuffle(order)
        place, size = order[self.row], len(options)
        if size <= self.rows:
            return options[place * size // self.rows]
        return options[round(place * (size - 1) / (self.rows - 1))]


def subset(pick, options, most):
    """Some of the options, at least one and ``most`` at most, in any order."""
    chosen = []
    for _ in range(pick(range(1, most + 1))):
        chosen.append(pick([option for option in options if option not in chosen]))
    return chosen
