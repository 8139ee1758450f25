"""torchvision beside a CPU build of torch. The package index has torchvision for CUDA alone, whose
compiled operations do not load there; networks and losses of segmentation do not call them.
"""

import pytest
import torch

# The import of torchvision 0.28 asks for these; both have the arguments below.
OPERATORS = ("nms", "qnms")
_declared: list[torch.library.Library] = []  # as long as a library lives, so do its declarations


def import_torchvision() -> None:
    """The first import of torchvision in a process; skips the test where it is not installed."""
    try:
        pytest.importorskip("torchvision")
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise
        operators = torch.library.Library("torchvision", "FRAGMENT")
        for name in OPERATORS:
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(operators)
        pytest.importorskip("torchvision")
