"""Affinity propagation in native kernels, on CPUs.

Same functions as ``portable/affinity_propagation.py``; affinity_propagation.cpp has the kernels.
"""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from tritonaff.native.library import DTYPES, images, integers, library
from tritonaff.portable import affinity_propagation as portable
from tritonaff.rates import rate_offsets

NAME = "affinity_propagation"


def forward(
    probs: Tensor,
    affinity: Tensor,
    rates: list[int],
    iterations: int,
    self_weight: float,
    steepness: float,
    from_logits: bool,
    normalize: str,
    border: str,
) -> Tensor:
    """The refined probs (N, C, H, W), in the dtype and memory format of ``probs``."""
    result = torch.empty_like(probs)
    affinity = _readable(affinity)
    library(NAME).affinity_propagation_forward(
        ctypes.byref(images(probs)),
        ctypes.byref(images(affinity)),
        *_options(probs, rates, iterations, self_weight, steepness, from_logits, normalize, border),
        ctypes.byref(images(result)),
    )
    return result


def backward(
    grad: Tensor,
    probs: Tensor,
    affinity: Tensor,
    needs_probs: bool,
    needs_affinity: bool,
    rates: list[int],
    iterations: int,
    self_weight: float,
    steepness: float,
    from_logits: bool,
    normalize: str,
    border: str,
) -> tuple[Tensor, Tensor]:
    """The gradients of probs and affinity; a gradient that is not needed is an empty tensor."""
    if (normalize, border) != ("sum", "valid"):
        return portable.backward(
            grad, probs, affinity, needs_probs, needs_affinity,
            rates, iterations, self_weight, steepness, from_logits, normalize, border,
        )  # fmt: skip
    dtype = affinity.dtype
    grad, affinity = _readable(grad), _readable(affinity)
    grad_probs = torch.empty_like(probs) if needs_probs else probs.new_empty(0)
    grad_affinity = torch.empty_like(affinity) if needs_affinity else affinity.new_empty(0)
    library(NAME).affinity_propagation_backward(
        ctypes.byref(images(grad)),
        ctypes.byref(images(probs)),
        ctypes.byref(images(affinity)),
        *_options(probs, rates, iterations, self_weight, steepness, from_logits, normalize, border),
        ctypes.byref(images(grad_probs)) if needs_probs else None,
        ctypes.byref(images(grad_affinity)) if needs_affinity else None,
    )
    return grad_probs, grad_affinity.to(dtype)


def _readable(tensor: Tensor) -> Tensor:
    """The tensor in a dtype that the kernels read: affinities may be float64 beside other probs."""
    return tensor if tensor.dtype in DTYPES else tensor.to(torch.float32)


def _options(
    probs: Tensor,
    rates: list[int],
    iterations: int,
    self_weight: float,
    steepness: float,
    from_logits: bool,
    normalize: str,
    border: str,
) -> tuple[object, ...]:
    offsets = rate_offsets(list(zip(rates[::2], rates[1::2], strict=True)))
    return (
        integers([*probs.shape, len(offsets) // 2]),
        integers(offsets),
        ctypes.c_int64(iterations),
        ctypes.c_double(self_weight),
        ctypes.c_int64(from_logits),
        ctypes.c_double(math.log(steepness)),
        ctypes.c_int64(normalize == "sum"),
        ctypes.c_int64(border == "replicate"),
        ctypes.c_int64(torch.get_num_threads()),
    )
