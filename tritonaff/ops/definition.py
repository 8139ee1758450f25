"""Definition of custom ops: opaque to the compiler, differentiable by a formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

# "tritonaff"; where a copy of the package has another name, its ops have their own namespace.
NAMESPACE = __name__.partition(".")[0]


def define(
    name: str, schema: str, mutates: tuple[str, ...] = ()
) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """A decorator that turns a function into the op ``tritonaff::name`` with this schema."""
    return torch.library.custom_op(f"{NAMESPACE}::{name}", mutates_args=mutates, schema=schema)


def register_gradients(
    op: Any,
    formula: Callable[..., dict[str, Tensor]],
    *,
    setup_context: Callable[..., None],
) -> None:
    """Registers ``formula(ctx, *grads)``, which returns the gradients of some of the op's
    arguments by name. All other arguments have no gradient.
    """
    names = [argument.name for argument in op._opoverload._schema.arguments]

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return in_order(names, formula(ctx, *grads))

    op.register_autograd(backward, setup_context=setup_context)


def in_order(names: list[str], grads: dict[str, Tensor]) -> tuple[Tensor | None, ...]:
    """One gradient or None per name: autograd takes gradients by position."""
    unknown = grads.keys() - set(names)
    if unknown:
        raise RuntimeError(f"gradients of {sorted(unknown)}, which are no arguments")
    return tuple(grads.get(name) for name in names)
