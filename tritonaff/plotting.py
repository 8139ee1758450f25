"""Pictures of what structured losses see. Needs the extra ``plot``, which is matplotlib; no window
opens, and pyplot's figures stay as they are.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from tritonaff import checks

try:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
except ImportError as error:
    raise ImportError("tritonaff.plotting needs matplotlib: pip install tritonaff[plot]") from error

MATRIX_DTYPES = (
    *checks.LOGITS_DTYPES,
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
)
IGNORED = "0.6"  # gray


def plot_affinity(matrices: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Draws affinity matrices side by side as heat maps: blue is 0, red is 1, gray is ignored.

    All share the scale from 0 to 1, whatever they hold; what is beyond looks like its nearer end.
    Row and column 0 are at the top left. Gray is NaN: where points do not count, fill their rows
    and columns with it, as in the example.

    Args:
        matrices: title -> matrix (L, L) or (1, L, L), at least one, of any floating (16 to 64
            bits), integer or boolean dtype, on any device; L may differ from matrix to matrix.
        path: where the picture goes, a PNG whatever its suffix. Folders that are missing are made.

    Raises:
        TypeError, ValueError: no mapping, an empty one, or what is in it is no such matrix.

    Paper: Cao, "Use Square Root Affinity to Regress Label in Semantic Segmentation", Fig. 4.

    Example:
        >>> import tempfile, torch
        >>> from pathlib import Path
        >>> from tritonaff.plotting import plot_affinity
        >>> labels = torch.tensor([0, 0, 1, 1, 255])  # of five points; the last one is ignored
        >>> affinity = (labels[:, None] == labels).float()
        >>> valid = labels != 255
        >>> affinity[~(valid[:, None] & valid)] = torch.nan
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "affinity.png"
        ...     plot_affinity({"labels": affinity}, path)
        ...     path.stat().st_size > 0
        True
    """
    if not isinstance(matrices, Mapping):
        raise TypeError(
            f"matrices must be a mapping of titles to tensors, got {type(matrices).__name__}"
        )
    if not matrices:
        raise ValueError("matrices must hold at least one matrix, got an empty mapping")
    pictures = {title: _check_matrix(title, matrix) for title, matrix in matrices.items()}

    # Its middle is yellow, where others have gray: here gray is what is ignored.
    colours = matplotlib.colormaps["RdYlBu_r"].with_extremes(bad=IGNORED)
    figure = Figure((3.3 * len(pictures) + 0.7, 3.7), layout="compressed")
    axes = figure.subplots(1, len(pictures), squeeze=False)[0]
    for axis, (title, matrix) in zip(axes, pictures.items(), strict=True):
        image = axis.imshow(matrix.numpy(), cmap=colours, vmin=0, vmax=1)
        axis.set_title(title)
        axis.set_xticks([])
        axis.set_yticks([])
    figure.colorbar(image, ax=axes, label="affinity", ticks=[0, 0.5, 1], pad=0.02)
    if any(matrix.isnan().any() for matrix in pictures.values()):
        ignored = Patch(color=IGNORED, label="ignored")
        figure.legend(handles=[ignored], loc="outside lower center", frameon=False)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=200)


def _check_matrix(title: str, matrix: Tensor) -> Tensor:
    """(L, L) float32 on the CPU."""
    if not isinstance(title, str):
        raise TypeError(f"every title must be a str, got {type(title).__name__}")
    name = f"matrices[{title!r}]"
    if isinstance(matrix, Tensor) and matrix.dim() == 3:
        checks.check_tensor(name, matrix, MATRIX_DTYPES, (1, "L", "L"))
        matrix = matrix[0]
    checks.check_tensor(name, matrix, MATRIX_DTYPES, ("L", "L"))
    if matrix.shape[0] != matrix.shape[1] or not matrix.shape[0]:
        raise ValueError(f"{name} must be square and not empty, got shape {tuple(matrix.shape)}")
    return matrix.detach().to("cpu", torch.float32)
