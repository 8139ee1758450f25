"""The tests catch every fault of the list; with MUTANT_SECONDS in the environment, every fault that
is begun in time. The others count as skipped.
"""

import os
import time

import pytest
from mutants import MUTANTS, fail, in_turns, is_caught, main, mutated

END = time.monotonic() + float(os.environ.get("MUTANT_SECONDS", "inf"))


def test_nothing_fails_without_a_fault():
    assert not fail({test for mutant in MUTANTS for test in mutant.tests}, {})


def test_every_fault_has_its_place():
    for mutant in MUTANTS:
        mutated(mutant)


def test_files_take_turns():
    turns = in_turns(MUTANTS)
    assert sorted(turns) == sorted(MUTANTS)
    files = {mutant.file for mutant in MUTANTS}
    assert {mutant.file for mutant in turns[: len(files)]} == files


def test_no_time(capsys):
    assert main(["--seconds", "0", "kernels/dilated_affinity", "kernels/shared"]) == 0
    left_out = sum("kernels/dilated" in m.file or "kernels/shared" in m.file for m in MUTANTS)
    assert capsys.readouterr().out == f"0 of 0 survived, {left_out} left out\n"


@pytest.mark.parametrize("mutant", in_turns(MUTANTS), ids=str)
def test_a_fault_is_caught(mutant):
    if time.monotonic() >= END:
        pytest.skip("no time left")
    assert is_caught(mutant), "no test fails"
