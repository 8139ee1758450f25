"""Dilation rates and the neighbours that they stand for, which affinity heads, losses and
propagation have in common.
"""

from __future__ import annotations

from collections.abc import Sequence

from tritonaff import checks

# {-1, 0, 1} x {-1, 0, 1} without the centre, row by row: the order of the affinity's channels.
DIRECTIONS = tuple((dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0))


def expand_rates(rates: Sequence[int | tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """The paper's notation of rates, in which a pair stands for both of its orders.

    Args:
        rates: positive ints, r for (r, r), and pairs of them, (r1, r2) for (r1, r2) and (r2, r1).

    Returns:
        Pairs (vertical, horizontal), as the other functions take them.

    Raises:
        TypeError: ``rates`` is no sequence, or an entry neither an int nor a pair of ints.
        ValueError: no rate, a rate below 1, or a rate given twice.

    Example:
        >>> import tritonaff
        >>> tritonaff.expand_rates([8, (12, 24), 16])
        ((8, 8), (12, 24), (24, 12), (16, 16))
    """
    expanded: list[tuple[int, int]] = []
    for down, across in checks.check_rates(rates):
        expanded.append((down, across))
        if down != across:
            expanded.append((across, down))
    return checks.check_rates(expanded)


def rate_offsets(rates: Sequence[tuple[int, int]]) -> list[int]:
    """Offsets of the 8 R neighbours: dy0, dx0, dy1, dx1, ... in the order of the channels."""
    return [
        step * rate
        for pair in rates
        for direction in DIRECTIONS
        for step, rate in zip(direction, pair, strict=True)
    ]
