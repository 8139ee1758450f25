"""Sets of offsets that networks for instance segmentation predict affinities at."""

from __future__ import annotations

from tritonaff import checks

# From "The Mutex Watershed" (ECCV 2018): direct neighbours attract, the others repel.
_IN_PLANE = (
    (-9, 0), (0, -9), (-9, -9), (9, -9), (-9, -4), (-4, -9), (4, -9), (9, -4), (-27, 0), (0, -27),
)  # fmt: skip
_DIAGONAL = ((-1, -1, -1), (-1, 1, 1), (-1, -1, 1), (-1, 1, -1))
OFFSETS: dict[str, tuple[tuple[int, ...], ...]] = {
    "nearest_2d": ((-1, 0), (0, -1)),
    "nearest_3d": ((-1, 0, 0), (0, -1, 0), (0, 0, -1)),
    "mutex_watershed_2d": ((-1, 0), (0, -1), *_IN_PLANE),
    "mutex_watershed_3d": (
        (-1, 0, 0), (0, -1, 0), (0, 0, -1), *_DIAGONAL, *((0, dy, dx) for dy, dx in _IN_PLANE),
    ),
}  # fmt: skip


def instance_offsets(name: str) -> tuple[tuple[int, ...], ...]:
    """A set of offsets by its name.

    Args:
        name: ``"nearest_2d"``, ``"nearest_3d"``: the neighbour before, along every axis;
            ``"mutex_watershed_2d"`` (12 offsets), ``"mutex_watershed_3d"`` (17): the sets of "The
            Mutex Watershed" for the ISBI challenge, up to 27 voxels long; three, in 2-D two, of
            them attract.

    Returns:
        Offsets (dy, dx) or (dz, dy, dx), in voxels, for the anchor ``"source"``.

    Raises:
        ValueError: an unknown name.

    Example:
        >>> import tritonaff
        >>> tritonaff.instance_offsets("nearest_3d")
        ((-1, 0, 0), (0, -1, 0), (0, 0, -1))
    """
    return OFFSETS[checks.check_option("name", name, tuple(OFFSETS))]
