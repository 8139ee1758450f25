from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.language.target_info import is_cuda

from tritonaff.kernels.shared import INTERPRETED


@triton.jit
def exp(x):
    return tl.exp2(x * 1.4426950408889634)


@triton.constexpr_function
def has_fast_log():
    return is_cuda() and not INTERPRETED


@triton.jit
def log(x):
    """For x >= 0. NVIDIA's takes 2 instructions, and is off by 3e-7, or by 3e-7 of itself."""
    return libdevice.fast_logf(x) if has_fast_log() else tl.log(x)


@triton.jit
def reciprocal(x):
    """For x >= 1: a Newton step on the square of a fast root. 1 / x minds any x and costs twice."""
    root = tl.rsqrt(x)
    y = root * root
    return y * (2 - x * y)


@triton.jit
def log_1p(x):
    """log(1 + x) for x >= 0, whose digits 1 + x would round away."""
    y = 1 + x
    return tl.log(y) + (x - (y - 1)) * reciprocal(y)
