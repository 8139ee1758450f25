"""Logarithms of probabilities, for the focal loss."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def log1p_of_fraction(e):
    """log(1 + e) for 0 <= e <= 1: e times a polynomial, with a relative error of at most 1.6e-7."""
    p = 0.005364821292459965
    p = p * e - 0.030065780505537987
    p = p * e + 0.07920452207326889
    p = p * e - 0.13753801584243774
    p = p * e + 0.191536545753479
    p = p * e - 0.24857163429260254
    p = p * e + 0.3332132399082184
    p = p * e - 0.49999648332595825
    return (p * e + 1.0) * e


@triton.jit
def minus_logs(u, e):
    """-log(pt) and -log(1 - pt), pt = sigmoid(u), with e = exp(-|u|)."""
    log = log1p_of_fraction(e)
    return tl.maximum(-u, 0.0) + log, tl.maximum(u, 0.0) + log
