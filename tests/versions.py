"""Marks of tests that some versions of torch cannot pass."""

import pytest
import torch


def not_in_torch_2_6(reason):
    old = torch.__version__.startswith("2.6.")
    return pytest.mark.skipif(old, reason=f"the compiler of torch 2.6: {reason}")


wording = not_in_torch_2_6("an error in the graph may be its own")
