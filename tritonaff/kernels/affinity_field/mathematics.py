"""Elementary functions, as exact as the kernels need and no slower."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.language.target_info import is_cuda


@triton.jit
def exp(x):
    return tl.exp2(x * 1.4426950408889634)


@triton.constexpr_function
def has_fast_log():
    return is_cuda() and not triton.knobs.runtime.interpret


@triton.jit
def log(x):
    """log(x) for x >= 0. NVIDIA's takes 2 instructions; its error is 3e-7, absolute or relative."""
    return libdevice.fast_logf(x) if has_fast_log() else tl.log(x)


@triton.jit
def log_1p(x):
    """log(1 + x) for x >= 0, with the digits that 1 + x would round away."""
    y = 1 + x
    return tl.log(y) + (x - (y - 1)) * reciprocal(y)


@triton.jit
def reciprocal(x):
    """1 / x for x >= 1: a Newton step on the square of a fast root. The division of Triton takes
    care of any x and costs twice.
    """
    root = tl.rsqrt(x)
    y = root * root
    return y * (2 - x * y)
