"""The tests catch every fault of the list."""

import pytest
from mutants import MUTANTS, is_caught


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_a_fault_is_caught(mutant):
    assert is_caught(mutant), "no test fails"
