"""Totals of tables over several processes: the only place where a loss communicates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch import distributed as dist


def all_reduce(tables: Sequence[Tensor], group: dist.ProcessGroup | None) -> tuple[Tensor, ...]:
    """Adds up each of the tables over the processes of a group: one collective for any number of
    tables, and no collective in the backward pass.

    The gradient of a table is the gradient of its total, multiplied by the number of processes.
    Where every process goes on to the same loss, DistributedDataParallel's and FSDP's averaging of
    gradients cancels this factor: parameters get the gradient of the full batch.

    Args:
        tables: floating-point or integer tensors, of the same shapes in all processes: for example
            :class:`tritonaff.AffinityFieldTerms`. The collective adds them as float64: counts are
            exact up to 2 ** 53.
        group: None leaves the tables as they are.

    Returns:
        The totals, in the tables' shapes and dtypes; the same bits in every process, if the backend
        gives all processes the same sum.

    Raises:
        RuntimeError: from torch.distributed.

    Example:
        >>> import torch, tritonaff
        >>> from tritonaff.distributed import all_reduce
        >>> group = None  # or torch.distributed.group.WORLD
        >>> logits, target = torch.randn(1, 3, 8, 8), torch.randint(0, 3, (1, 8, 8))
        >>> terms = tritonaff.affinity_field_terms(logits, target)
        >>> terms = tritonaff.AffinityFieldTerms(*all_reduce(terms, group))
    """
    if group is None:
        return tuple(tables)
    # This private module has the only collective that torch.compile traces into a full graph. The
    # import stands here so that builds of torch without torch.distributed can import this file.
    from torch.distributed import _functional_collectives as collectives

    flat = torch.cat([table.flatten().double() for table in tables])
    total = collectives.all_reduce(flat.detach(), "sum", group)
    # The value is the total; the gradient is local, times the number of processes.
    total = total + group.size() * (flat - flat.detach())
    parts = total.split([table.numel() for table in tables])
    return tuple(
        part.view(table.shape).to(table.dtype) for part, table in zip(parts, tables, strict=True)
    )
