"""Pictures of affinities, neighbours and accuracies. The module needs the extra ``plot``, which is
matplotlib; no window opens, and pyplot's figures stay as they are.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tritonaff import checks
from tritonaff.api.neighbors import NeighborStatistics

try:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
except ImportError as error:
    raise ImportError("tritonaff.plotting needs matplotlib: pip install matplotlib") from error

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
# Colours that people with any colour vision tell apart (Okabe and Ito, "Color Universal Design").
OKABE_ITO = {
    "blue": "#0072b2",
    "orange": "#e69f00",
    "green": "#009e73",
    "purple": "#cc79a7",
    "sky blue": "#56b4e9",
    "vermillion": "#d55e00",
    "yellow": "#f0e442",
    "black": "#000000",
}


def plot_affinity(matrices: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Draws affinity matrices side by side as heat maps: blue is 0, red is 1, gray is ignored.

    All share the scale from 0 to 1, whatever they hold; a value beyond looks like the nearer end.
    Row and column 0 are at the top left. NaN is gray: fill the rows and columns of points that do
    not count with NaN, as in the example.

    Args:
        matrices: title -> matrix (L, L) or (1, L, L), at least one, of any floating (16 to 64
            bits), integer or boolean dtype, on any device; L may differ from matrix to matrix.
        path: file of the picture, a PNG whatever its suffix. Missing folders are made.

    Raises:
        TypeError, ValueError: no mapping, an empty mapping, or an entry that is no such matrix.

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
    _check_mapping("matrices", matrices)
    pictures = {title: _check_matrix(title, matrix) for title, matrix in matrices.items()}

    # The middle of this colour map is yellow; others have gray, which stands for "ignored" here.
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
    _save(figure, path)


def plot_neighbor_frequencies(statistics: NeighborStatistics, path: str | os.PathLike[str]) -> None:
    """Draws the proportions of n0 to n8, the pixels with 0 to 8 neighbours of their own label, by
    rate and on a logarithmic scale.

    Args:
        statistics: the counts; rates are drawn in their order. A category without pixels is left
            out.
        path: file of the picture, a PNG whatever its suffix. Missing folders are made.

    Raises:
        TypeError: ``statistics`` is no :class:`tritonaff.NeighborStatistics`.

    Paper: "Improving Semantic Segmentation via Dilated Affinity", Fig. 3.

    Example:
        >>> import tempfile, torch, tritonaff
        >>> from pathlib import Path
        >>> from tritonaff.plotting import plot_neighbor_frequencies
        >>> statistics = tritonaff.NeighborStatistics(rates=[1, (1, 2)])
        >>> statistics.update(torch.randint(0, 2, (1, 16, 16)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "neighbors.png"
        ...     plot_neighbor_frequencies(statistics, path)
        ...     path.stat().st_size > 0
        True
    """
    if not isinstance(statistics, NeighborStatistics):
        raise TypeError(f"statistics must be a NeighborStatistics, got {type(statistics).__name__}")
    percents = 100 * statistics.frequencies()
    percents[percents == 0] = torch.nan
    figure = Figure((2.5 + 0.8 * len(statistics.rates), 4.2), layout="compressed")
    axis = figure.subplots()
    xs = range(len(statistics.rates))
    for k, column in enumerate(percents.T.tolist()):
        axis.plot(xs, column, marker="o", color=_shade(k, 9), label=f"n{k}")
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.set_xticks(xs, [_rate_name(rate) for rate in statistics.rates])
    axis.set_xlabel("rate")
    axis.set_ylabel("pixels (%)")
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False, reverse=True)
    _save(figure, path)


def plot_affinity_accuracy(
    accuracies: Mapping[str, Tensor],
    rates: Sequence[int | tuple[int, int]],
    path: str | os.PathLike[str],
) -> None:
    """Draws the accuracy of affinity by category n0 to n8: a panel for each title, with a line for
    each rate. If there are several titles, a last panel compares their means over the rates.

    Args:
        accuracies: title -> accuracies (R, 9) in [0, 1], floating, on any device, such as
            :class:`tritonaff.metrics.AffinityAccuracy` computes. NaN is left out.
        rates: the R rates, as given to the metric.
        path: file of the picture, a PNG whatever its suffix. Missing folders are made.

    Raises:
        TypeError, ValueError: no mapping, an empty mapping, or an entry that is no such tensor.

    Paper: "Improving Semantic Segmentation via Dilated Affinity", Fig. 4.

    Example:
        >>> import tempfile, torch
        >>> from pathlib import Path
        >>> from tritonaff.plotting import plot_affinity_accuracy
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "accuracy.png"
        ...     plot_affinity_accuracy({"sqrt": torch.rand(2, 9)}, [8, 16], path)
        ...     path.stat().st_size > 0
        True
    """
    rates = checks.check_rates(rates)
    _check_mapping("accuracies", accuracies)
    lines = {}
    for title, accuracy in accuracies.items():
        name = f"accuracies[{title!r}]"
        checks.check_tensor(name, accuracy, checks.LOGITS_DTYPES, (len(rates), 9))
        lines[title] = accuracy.detach().to("cpu", torch.float64)
    panels = {
        title: {_rate_name(rate): row for rate, row in zip(rates, accuracy, strict=True)}
        for title, accuracy in lines.items()
    }
    if len(lines) > 1:
        panels["mean over rates"] = {title: line.nanmean(dim=0) for title, line in lines.items()}

    figure = Figure((3.6 * len(panels) + 0.4, 3.6), layout="compressed")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, (title, rows) in zip(axes, panels.items(), strict=True):
        for k, (name, row) in enumerate(rows.items()):
            axis.plot(range(9), row.tolist(), marker="o", color=_shade(k, len(rows)), label=name)
        axis.set_title(title)
        axis.set_xticks(range(9), [f"n{k}" for k in range(9)])
        axis.set_ylim(-0.02, 1.02)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    axes[0].set_ylabel("accuracy of affinity")
    _save(figure, path)


def _rate_name(rate: tuple[int, int]) -> str:
    down, across = rate
    return str(down) if down == across else f"{down},{across}"


def _shade(k: int, count: int) -> tuple[float, float, float, float]:
    """The k-th of ``count`` colours from dark violet to yellow-green: their order is visible."""
    return matplotlib.colormaps["viridis"](0.9 * k / max(count - 1, 1))


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=200)


def _check_mapping(name: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise TypeError(
            f"{name} must be a mapping of titles to tensors, got {type(value).__name__}"
        )
    if not value:
        raise ValueError(f"{name} must hold at least one entry, got an empty mapping")
    for title in value:
        if not isinstance(title, str):
            raise TypeError(f"every title must be a str, got {type(title).__name__}")


def _check_matrix(title: str, matrix: Tensor) -> Tensor:
    """The matrix (L, L) as float32 on the CPU."""
    name = f"matrices[{title!r}]"
    if isinstance(matrix, Tensor) and matrix.dim() == 3:
        checks.check_tensor(name, matrix, MATRIX_DTYPES, (1, "L", "L"))
        matrix = matrix[0]
    checks.check_tensor(name, matrix, MATRIX_DTYPES, ("L", "L"))
    if matrix.shape[0] != matrix.shape[1] or not matrix.shape[0]:
        raise ValueError(f"{name} must be square and not empty, got shape {tuple(matrix.shape)}")
    return matrix.detach().to("cpu", torch.float32)
