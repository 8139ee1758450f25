"""Each operation with each implementation, once, at a small size. This test runs
with every version of torch and Triton.
"""

import pytest

from tritonaff.testing import CASES, check_parity


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_op(backend, device, case):
    channels = {"dilated_affinity": 32, "affinity_field_sigmoid": 2}.get(case.name, 5)
    check_parity(case, backend, *case.make_inputs((1, channels, 20, 24), device=device))
