"""Block sizes in place of a GPU's.

Every operation has a NamedTuple ``Blocks``. Its launchers take one as an argument, or compute one
for GPUs, whose fields can be replaced here: Triton's interpreter takes its time per program,
whatever the size, and tests look for seams between small blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

_fields: dict[str, dict[str, Any]] = {}


@contextmanager
def override(**operations: Mapping[str, Any]) -> Iterator[None]:
    """Replaces fields of an operation's ``Blocks`` inside a ``with`` block.

    ``override(dilated_affinity={"pixels": 32})``, for instance. Nested ones add up.
    """
    global _fields
    before = _fields
    new = {name: {**before.get(name, {}), **fields} for name, fields in operations.items()}
    _fields = {**before, **new}
    try:
        yield
    finally:
        _fields = before


def overridden(operation: str, blocks: Any) -> Any:
    """The ``Blocks`` of an operation with the replaced fields."""
    fields = _fields.get(operation)
    return blocks._replace(**fields) if fields else blocks
