"""Every operation's inputs and yardstick of correctness, declared once for the tests and the
bench.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tritonaff.functional import (
    affinity_field_loss,
    affinity_field_terms,
    affinity_regression_loss,
    affinity_regression_terms,
)
from tritonaff.ops.backend import use_backend

Shape = tuple[int, int, int, int]


@dataclass(frozen=True)
class Case:
    """One operation: how to make inputs for it, what to time, and what to compare."""

    name: str
    shapes: tuple[Shape, ...]
    quick_shapes: tuple[Shape, ...]
    loss: Callable[[Tensor, Tensor], Tensor]
    """(logits, target) to the scalar that is timed and differentiated."""
    tables: Callable[[Tensor, Tensor], tuple[Tensor, ...]]
    """(logits, target) to what the operation returns, for comparison."""
    largest_term: float
    """Of the operation's sums: its rounding is what a term is off by at most."""


def make_inputs(
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    *,
    confidence: float = 2.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Logits (N, C, H, W) and a target (N, H, W) of patches about a sixth of the image wide.

    At 256 x 512 some 6 % of the neighbouring pixels then differ, as in street scenes; 1 % of the
    pixels are ignored. ``confidence`` is how far the true class stands out of unit noise: 0 is a
    network at its start, 9 one that is sure.
    """
    n, c, height, width = shape
    generator = torch.Generator().manual_seed(seed)
    cell = max(4, min(height, width) // 6)
    patches = (-(-height // cell), -(-width // cell))
    target = torch.randint(0, c, (n, *patches), generator=generator)
    target = target.repeat_interleave(cell, dim=1).repeat_interleave(cell, dim=2)
    target = target[:, :height, :width].contiguous()
    one_hot = F.one_hot(target, c).movedim(-1, 1).contiguous()
    logits = confidence * one_hot + torch.randn(shape, generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.01] = 255
    return logits.to(device, dtype), target.to(device)


AFFINITY_FIELD_SIZES = (3, 5, 7)

CASES = {
    "affinity_field": Case(
        name="affinity_field",
        shapes=((2, 21, 60, 60), (2, 19, 90, 90), (1, 19, 256, 512)),
        quick_shapes=((1, 5, 32, 32),),
        loss=lambda logits, target: affinity_field_loss(logits, target, AFFINITY_FIELD_SIZES),
        tables=lambda logits, target: affinity_field_terms(logits, target, AFFINITY_FIELD_SIZES),
        largest_term=9.2,  # log(1 / eps), the divergence of a sure pixel and a sure other one
    ),
    "affinity_regression": Case(
        name="affinity_regression",
        shapes=((2, 21, 60, 60), (1, 19, 256, 512), (1, 19, 1024, 2048)),
        quick_shapes=((1, 5, 32, 32),),
        loss=affinity_regression_loss,
        tables=affinity_regression_terms,
        largest_term=1.0,
    ),
    "affinity_regression_every_pixel": Case(
        name="affinity_regression_every_pixel",
        shapes=((2, 21, 60, 60), (1, 19, 90, 90), (1, 19, 256, 512), (1, 19, 1024, 2048)),
        quick_shapes=((1, 5, 32, 32),),
        loss=lambda logits, target: affinity_regression_loss(logits, target, None),
        tables=lambda logits, target: affinity_regression_terms(logits, target, None),
        largest_term=1.0,
    ),
}


class ParityError(AssertionError):
    """An implementation does not compute what the reference computes."""


def obstacle(case: Case, shape: Shape) -> str | None:
    """Why the reference cannot run at this shape, compiled or not: it builds what no memory
    holds.
    """
    n, _, height, width = shape
    logits = torch.empty(shape, device="meta")
    target = torch.empty(n, height, width, dtype=torch.int64, device="meta")
    try:
        with use_backend("reference"):
            case.loss(logits, target)
    except ValueError as error:
        return str(error)
    return None


def evaluate(case: Case, backend: str, logits: Tensor, target: Tensor) -> dict[str, Tensor]:
    """The tables, the loss and its gradient, by name."""
    logits = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    with use_backend(backend):
        tables = case.tables(logits, target)
        loss = case.loss(logits, target)
        (grad,) = torch.autograd.grad(loss, logits)
    names = getattr(tables, "_fields", range(len(tables)))
    results = {str(name): table.detach() for name, table in zip(names, tables, strict=True)}
    return {**results, "loss": loss.detach(), "gradient": grad}


def check_parity(case: Case, backend: str, logits: Tensor, target: Tensor) -> None:
    """ParityError unless ``backend`` is about as close to the float64 reference as eager mode is.

    Counts must be equal. Any other result, as a whole tensor so that borders count, may be off by
    twice the sum of

    - the error of the eager reference in the logits' dtype,
    - what the exact result changes by when the logits are off by a few float32 roundings (where
      the exact result is nearly 0, eager mode may be right by luck),

    plus a few roundings of the result's own dtype, plus the rounding of one term per counted entry
    of a sum, which may come from a subtraction and is then off by its terms' rounding even where it
    is 0. The loss is a mean over entries, and its gradient that much smaller per logit.
    """
    # For float64 logits the yardstick itself is off: its 1 - p knows a q of 1e-4 to 1e-12.
    rounding = 1e-12 if logits.dtype == torch.float64 else torch.finfo(torch.float32).eps
    exact = evaluate(case, "reference", logits.double(), target)
    eager = evaluate(case, "reference", logits, target)
    nearby = evaluate(case, "reference", _a_few_roundings_off(logits), target)
    ours = evaluate(case, backend, logits, target)
    entries = sum(int(table.sum()) for table in exact.values() if not table.is_floating_point())
    for name, result in ours.items():
        if result.dtype != eager[name].dtype or result.shape != eager[name].shape:
            raise ParityError(
                f"{case.name} {backend}: {name} is {result.dtype} {tuple(result.shape)}, "
                f"expected {eager[name].dtype} {tuple(eager[name].shape)}"
            )
        if not result.is_floating_point():
            if not torch.equal(result, exact[name]):
                raise ParityError(f"{case.name} {backend}: {name} differs from the reference")
            continue
        error = _distance(result, exact[name])
        budget = 2 * (_distance(eager[name], exact[name]) + _distance(nearby[name], exact[name]))
        budget += 4 * torch.finfo(result.dtype).eps * float(exact[name].norm())
        scale = {"loss": 1.0, "gradient": max(1, logits.numel()) ** -0.5}.get(name, entries)
        budget += rounding * case.largest_term * scale
        if not error <= budget:
            raise ParityError(
                f"{case.name} {backend}: {name} is off by {error:.1e} from float64, "
                f"allowed are {budget:.1e} of {float(exact[name].norm()):.1e}"
            )


def check_agreement(
    what: str, result: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]
) -> None:
    """ParityError unless loss and gradient are the same to the digits that both should have.

    Coarser than :func:`check_parity`, for inputs too large for float64: what it finds is blocks
    left out or counted twice. Confident float32 gradients are themselves 1e-3 off.
    """
    for name, ours, theirs in zip(("loss", "gradient"), result, expected, strict=True):
        allowed = max(2e-3, 8 * torch.finfo(ours.dtype).eps) * float(theirs.double().norm())
        if not _distance(ours, theirs) <= allowed:
            raise ParityError(f"{what}: {name} of the inputs to time is off")


def _a_few_roundings_off(logits: Tensor) -> Tensor:
    dtype = logits.dtype if logits.dtype == torch.float64 else torch.float32
    sign = torch.randint(0, 2, logits.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    step = 4 * torch.finfo(dtype).eps * logits.double().abs().clamp(min=1)
    return logits.double() + sign.to(logits.device) * step


def _distance(result: Tensor, exact: Tensor) -> float:
    return float((result.double() - exact.double()).norm())
