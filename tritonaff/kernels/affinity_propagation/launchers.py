"""Launchers of affinity propagation's kernels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tritonaff.kernels.affinity_propagation.blocks import (
    Blocks,
    normalize_options,
    pixel_grid,
    step_options,
)
from tritonaff.kernels.affinity_propagation.gates import gates_backward_kernel, gates_kernel
from tritonaff.kernels.affinity_propagation.steps import step_kernel
from tritonaff.kernels.affinity_propagation.steps_backward import (
    normalize_backward_kernel,
    step_backward_kernel,
)
from tritonaff.kernels.blocks import overridden
from tritonaff.kernels.shared import launch, steps_in_32_bits
from tritonaff.portable import affinity_propagation as portable
from tritonaff.portable.blocks import in_layout_of


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
    blocks: Blocks | None = None,
) -> Tensor:
    """The refined probs, in their dtype and memory format."""
    if iterations == 0 or len(probs) == 0:
        return torch.empty_like(probs).copy_(probs)
    blocks = blocks or overridden("affinity_propagation", Blocks())
    buffers = [new_iterate(probs) for _ in range(min(iterations, 2))]
    gates = launch_gates(affinity, rates, steepness, from_logits, blocks, border)
    total = new_total(probs)
    p = probs.contiguous()
    for t in range(iterations):
        launch_step(
            p, gates, buffers[t % 2], total, rates, self_weight, blocks, normalize, border
        )  # fmt: skip
        p = buffers[t % 2]
    return in_layout_of(probs, p)


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
    blocks: Blocks | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradients of probs and of affinity; a gradient that is not needed is empty."""
    if (normalize, border) != ("sum", "valid"):
        return portable.backward(
            grad, probs, affinity, needs_probs, needs_affinity,
            rates, iterations, self_weight, steepness, from_logits, normalize, border,
        )  # fmt: skip
    grad_probs = probs.new_empty(0)
    grad_affinity = torch.empty_like(affinity) if needs_affinity else affinity.new_empty(0)
    if iterations == 0 or len(probs) == 0:
        if needs_probs:
            grad_probs = torch.empty_like(probs).copy_(grad)
        return grad_probs, grad_affinity.zero_()

    blocks = blocks or overridden("affinity_propagation", Blocks())
    height, width = probs.shape[2:]
    gates = launch_gates(affinity, rates, steepness, from_logits, blocks)
    iterates, totals = [probs.contiguous()], []
    for _ in range(iterations):
        totals.append(new_total(probs))
        iterates.append(new_iterate(probs))
        launch_step(iterates[-2], gates, iterates[-1], totals[-1], rates, self_weight, blocks)

    grad_y, other = new_iterate(probs), new_iterate(probs)
    last = iterates.pop()
    options = normalize_options(probs, blocks)
    launch(normalize_backward_kernel, pixel_grid(probs, options["BLOCK_P"]),
        grad, last, totals.pop(), grad_y,
        probs.shape[1], width, height * width, *grad.stride(), **options,
    )  # fmt: skip
    del last
    # A launch that does not use a tensor gets some tensor: here, and in place of the total before
    # the first iteration.
    grad_gates = torch.zeros_like(gates) if needs_affinity else gates
    step = step_options(probs, rates, blocks)
    for t in reversed(range(iterations)):
        p = iterates.pop()
        launch(step_backward_kernel, pixel_grid(probs, step["BLOCK_P"]),
            grad_y, p, gates, totals.pop() if t > 0 else gates, grad_gates, other,
            height, width, height * width, 4 * len(rates), self_weight,
            IS_FIRST=t == 0, NEEDS_P=t > 0 or needs_probs, NEEDS_GATES=needs_affinity, **step,
        )  # fmt: skip
        grad_y, other = other, grad_y
    if needs_probs:
        grad_probs = in_layout_of(probs, grad_y)
    if needs_affinity:
        launch(gates_backward_kernel, pixel_grid(affinity, blocks.gate_pixels),
            gates, grad_gates, grad_affinity, width, height * width,
            *grad_affinity.stride(), math.log(steepness),
            NUM_RATES=len(rates) // 2, FROM_LOGITS=from_logits, BLOCK_P=blocks.gate_pixels,
        )  # fmt: skip
    return grad_probs, grad_affinity


def launch_gates(
    affinity: Tensor,
    rates: list[int],
    steepness: float,
    from_logits: bool,
    blocks: Blocks,
    border: str = "valid",
) -> Tensor:
    """The gates [N, 4 len(rates), H, W] in float32."""
    n, channels, height, width = affinity.shape
    gates = affinity.new_empty(n, channels, height, width, dtype=torch.float32)
    launch(gates_kernel, pixel_grid(affinity, blocks.gate_pixels),
        affinity, gates, height, width, height * width, *affinity.stride(), math.log(steepness),
        RATES=steps_in_32_bits(rates), FROM_LOGITS=from_logits, REPLICATE=border == "replicate",
        BLOCK_P=blocks.gate_pixels,
    )  # fmt: skip
    return gates


def launch_step(
    p: Tensor,
    gates: Tensor,
    out: Tensor,
    total: Tensor,
    rates: list[int],
    self_weight: float,
    blocks: Blocks,
    normalize: str = "sum",
    border: str = "valid",
) -> None:
    """One iteration, from p to out."""
    height, width = p.shape[2:]
    options = step_options(p, rates, blocks, border)
    launch(step_kernel, pixel_grid(p, options["BLOCK_P"]),
        p, gates, out, total, height, width, height * width, 4 * len(rates), self_weight,
        NORMALIZE=normalize == "sum", REPLICATE=border == "replicate", **options,
    )  # fmt: skip


def new_iterate(probs: Tensor) -> Tensor:
    return probs.new_empty(probs.shape, dtype=torch.float32)


def new_total(probs: Tensor) -> Tensor:
    n, _, height, width = probs.shape
    return probs.new_empty(n, height, width, dtype=torch.float32)
