"""Instance affinities as custom ops.

Images are volumes of depth 1: logits are (N, K, D, H, W), ids (N, D, H, W), and ``offsets`` are
dz0, dy0, dx0, dz1, ...: one step for every channel. The ids are signed or uint8.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tritonaff.ops.backend import current_backend, implementation
from tritonaff.ops.definition import define, register_gradients
from tritonaff.options import InstancePairs
from tritonaff.portable import instance_affinity as portable
from tritonaff.portable.blocks import precision

NAME = "instance_affinity"
PAIRS = "SymInt[] offsets, SymInt? background, SymInt? ignore_index"
OPTIONS = f"{PAIRS}, bool invert, float gamma, bool misses, bool focal, str backend"
# The same bits as signed integers: only equality matters.
SIGNED = {
    torch.uint16: torch.int16,
    torch.uint32: torch.int32,
    torch.uint64: torch.int64,
    torch.bool: torch.uint8,
}

Tables = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def tables(
    logits: Tensor,
    ids: Tensor,
    pairs: InstancePairs,
    gamma: float,
    *,
    misses: bool = True,
    focal: bool = True,
) -> Tables:
    """Sums of -log pt, 1 - pt, (1 - pt)^2 and (1 - pt)^gamma (-log pt), and counts of pairs, each
    (N, K, 2), (different, same).

    Without ``misses`` the second and the third sum may be 0, without ``focal`` the fourth.
    """
    logits = logits if logits.dim() == 5 else logits.unsqueeze(2)
    ids, background, ignore_index = _comparable(ids, pairs)
    backend, steps = current_backend(), _steps(pairs)
    result: Tables
    if backend == "reference":
        from tritonaff.reference import instance_affinity as equations

        result = equations.instance_affinity_tables(
            logits,
            ids,
            steps,
            background=background,
            ignore_index=ignore_index,
            invert=pairs.invert,
            gamma=gamma,
        )
        return result
    result = instance_affinity(
        logits, ids, _flat(steps), background, ignore_index,
        pairs.invert, gamma, misses, focal, backend,
    )  # fmt: skip
    return result


def counts(ids: Tensor, pairs: InstancePairs) -> Tensor:
    """Counts of pairs (N, K, 2), (different, same)."""
    ids, background, ignore_index = _comparable(ids, pairs)
    result: Tensor
    if current_backend() == "reference":
        from tritonaff.reference import instance_affinity as equations

        result = equations.instance_pair_counts(
            ids, _steps(pairs), background=background, ignore_index=ignore_index
        )
    else:
        result = instance_pair_counts(ids, _flat(_steps(pairs)), background, ignore_index)
    return result


def target(ids: Tensor, pairs: InstancePairs) -> Tensor:
    """(N, K, H, W) or (N, K, D, H, W) of uint8: the targets 1 and 0, 255 where no pair counts."""
    is_image = ids.dim() == 3
    ids, background, ignore_index = _comparable(ids, pairs)
    result: Tensor
    if current_backend() == "reference":
        from tritonaff.reference import instance_affinity as equations

        result = equations.instance_affinity_target(
            ids, _steps(pairs), background=background, ignore_index=ignore_index
        )
    else:
        result = instance_affinity_target(ids, _flat(_steps(pairs)), background, ignore_index)
    if pairs.invert:
        result = torch.where(result < 2, 1 - result, result)
    return result.squeeze(2) if is_image else result


def _comparable(ids: Tensor, pairs: InstancePairs) -> tuple[Tensor, int | None, int | None]:
    """Ids (N, D, H, W) in a dtype that the implementations read, and background and ignore_index
    as the ids show them: None for a number that is no id of this dtype.
    """
    dtype = ids.dtype
    bits = 1 if dtype == torch.bool else 8 * ids.element_size()
    is_signed = dtype.is_signed
    least, end = (-(1 << bits - 1), 1 << bits - 1) if is_signed else (0, 1 << bits)

    def as_id(number: int | None) -> int | None:
        if number is None or not least <= number < end:
            return None
        wraps = dtype in SIGNED and bits > 1 and number >= end // 2
        return number - end if wraps else number

    ids = ids if ids.dim() == 4 else ids.unsqueeze(1)
    ids = ids.view(SIGNED[dtype]) if dtype in SIGNED else ids
    return ids, as_id(pairs.background), as_id(pairs.ignore_index)


def _steps(pairs: InstancePairs) -> list[tuple[int, ...]]:
    """From each voxel to the other voxel of its pair, (dz, dy, dx)."""
    sign = 1 if pairs.anchor == "source" else -1
    return [(0, 0, *(sign * step for step in offset))[-3:] for offset in pairs.offsets]


def _flat(steps: list[tuple[int, ...]]) -> list[int]:
    return [distance for step in steps for distance in step]


@define(NAME, f"(Tensor logits, Tensor ids, {OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
def instance_affinity(
    logits: Tensor,
    ids: Tensor,
    offsets: list[int],
    background: int | None,
    ignore_index: int | None,
    invert: bool,
    gamma: float,
    misses: bool,
    focal: bool,
    backend: str,
) -> Tables:
    """Sums of -log pt, 1 - pt, (1 - pt)^2 and (1 - pt)^gamma (-log pt), and counts of pairs, each
    (N, K, 2), (different, same). Sums that are not asked for are 0.
    """
    result: Tables = _implementation(logits, backend).forward(
        logits, ids, list(offsets), background, ignore_index, invert, gamma, misses, focal
    )
    return result


@instance_affinity.register_fake
def _(logits: Tensor, ids: Tensor, offsets: list[int], *options: Any) -> Tables:
    shape = *logits.shape[:2], 2
    log_loss, miss_sum, miss_square_sum, focal_sum = (
        logits.new_empty(shape, dtype=precision(logits)) for _ in range(4)
    )
    count = logits.new_empty(shape, dtype=torch.int64)
    return log_loss, miss_sum, miss_square_sum, focal_sum, count


@define(
    "instance_affinity_backward",
    f"(Tensor coefficients, Tensor logits, Tensor ids, {OPTIONS}) -> Tensor",
)
def instance_affinity_backward(
    coefficients: Tensor,
    logits: Tensor,
    ids: Tensor,
    offsets: list[int],
    background: int | None,
    ignore_index: int | None,
    invert: bool,
    gamma: float,
    misses: bool,
    focal: bool,
    backend: str,
) -> Tensor:
    """The gradient of the logits, in their dtype and memory format, given the gradients of the
    four sums, (N, K, 2, 4).
    """
    grad: Tensor = _implementation(logits, backend).backward(
        coefficients.contiguous(), logits, ids, list(offsets),
        background, ignore_index, invert, gamma, misses, focal,
    )  # fmt: skip
    return grad


@instance_affinity_backward.register_fake
def _(coefficients: Tensor, logits: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(logits)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, ids, *ctx.pairs, _, _, ctx.backend = inputs
    *_, count = output
    ctx.save_for_backward(logits, ids)
    ctx.mark_non_differentiable(count)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads_of_outputs: Tensor | None) -> dict[str, Tensor]:
    *grads, _ = grads_of_outputs
    given = [grad for grad in grads if grad is not None]
    if not given:
        return {}
    zeros = torch.zeros_like(given[0])
    coefficients = torch.stack([zeros if grad is None else grad for grad in grads], dim=-1)
    _, miss_sum, miss_square_sum, focal_sum = grads
    misses = miss_sum is not None or miss_square_sum is not None
    grad = instance_affinity_backward(
        coefficients, *ctx.saved_tensors, *ctx.pairs, misses, focal_sum is not None, ctx.backend
    )
    return {"logits": grad}


register_gradients(instance_affinity, _backward, setup_context=_setup_context)

IDS = f"Tensor ids, {PAIRS}"


@define("instance_pair_counts", f"({IDS}) -> Tensor")
def instance_pair_counts(
    ids: Tensor, offsets: list[int], background: int | None, ignore_index: int | None
) -> Tensor:
    """Counts of pairs (N, K, 2), (different, same)."""
    return portable.pair_counts(ids, list(offsets), background, ignore_index)


@instance_pair_counts.register_fake
def _(ids: Tensor, offsets: list[int], *options: Any) -> Tensor:
    return ids.new_empty(len(ids), len(offsets) // 3, 2, dtype=torch.int64)


@define("instance_affinity_target", f"({IDS}) -> Tensor")
def instance_affinity_target(
    ids: Tensor, offsets: list[int], background: int | None, ignore_index: int | None
) -> Tensor:
    """(N, K, D, H, W) of uint8: 1 for same, 0 for different, 255 where the pair does not count."""
    return portable.affinity_target(ids, list(offsets), background, ignore_index)


@instance_affinity_target.register_fake
def _(ids: Tensor, offsets: list[int], *options: Any) -> Tensor:
    n, *size = ids.shape
    return ids.new_empty(n, len(offsets) // 3, *size, dtype=torch.uint8)


def _implementation(logits: Tensor, backend: str) -> Any:
    # A kernel reads one channel at a time: the number of channels has no limit.
    return implementation(NAME, backend, logits, max_classes=None)
