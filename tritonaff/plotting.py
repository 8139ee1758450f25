"""Pictures of labels, errors, losses and affinities. The module needs the extra ``plot``, which is
matplotlib; no window opens, and pyplot's figures stay as they are.

Functions ``plot_...`` write a picture to a file; functions ``draw_...`` draw on axes of yours. The
colours are such that people with any colour vision tell them apart.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tritonaff import checks
from tritonaff.api.affinity_field import AdaptiveAffinityFieldLoss
from tritonaff.api.neighbors import NeighborStatistics
from tritonaff.options import Activation, affinity_field_options
from tritonaff.reference import affinity_field as equations

try:
    import matplotlib
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.collections import LineCollection
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from numpy.typing import NDArray
except ImportError as error:
    raise ImportError("tritonaff.plotting needs matplotlib: pip install matplotlib") from error

LABEL_DTYPES = torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64
MATRIX_DTYPES = (*checks.LOGITS_DTYPES, *LABEL_DTYPES)
IGNORED = "0.6"  # gray, in matrices
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
# Colours of classes: after these eight, twelve that are as far from all others and from white, for
# ordinary colour vision and for deuteranopia.
PALETTE = (
    *OKABE_ITO.values(),
    *("#602000", "#ffbf8f", "#800060", "#bf5040", "#dfcfff", "#003060"),
    *("#20308f", "#209fff", "#404030", "#efafaf", "#80709f", "#bfbf50"),
)
VOID = "#ffffff"
NEIGHBORS = "neighbours of 8 with the same label"
ERRORS = {
    "right": "#d0d0d0",
    "wrong": "#505050",
    "better": OKABE_ITO["sky blue"],
    "worse": OKABE_ITO["vermillion"],
}


def plot_affinity(
    matrices: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    grid_sizes: Sequence[int] | None = None,
) -> None:
    """Draws affinity matrices side by side as heat maps: white is 0, blue is 1, gray is ignored.

    All share the scale from 0 to 1, whatever they hold; a value beyond looks like the nearer end.
    Row and column 0 are at the top left. NaN is gray: fill the rows and columns of points that do
    not count with NaN, as in the example.

    Args:
        matrices: title -> matrix (L, L) or (1, L, L), at least one, of any floating (16 to 64
            bits), integer or boolean dtype, on any device; L may differ from matrix to matrix.
        path: file of the picture, a PNG whatever its suffix. Missing folders are made.
        grid_sizes: the grids of the L points, as the matrices were made with: names each grid on
            both axes, and draws a line where the next grid begins.

    Raises:
        TypeError, ValueError: no mapping, an empty mapping, an entry that is no such matrix, or
            grids of another number of points.

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
    grids = checks.check_grid_sizes(grid_sizes) or ()
    for title, matrix in pictures.items():
        if grids and len(matrix) != sum(grid**2 for grid in grids):
            raise ValueError(
                f"matrices[{title!r}] must have a row for each point of grid_sizes {grids}, "
                f"{sum(grid**2 for grid in grids)} in all, got {len(matrix)}"
            )

    colours = matplotlib.colormaps["Blues"].with_extremes(bad=IGNORED)
    figure = Figure((3.3 * len(pictures) + 0.7, 3.7), layout="compressed")
    axes = figure.subplots(1, len(pictures), squeeze=False)[0]
    for axis, (title, matrix) in zip(axes, pictures.items(), strict=True):
        image = axis.imshow(matrix.numpy(), cmap=colours, vmin=0, vmax=1)
        axis.set_title(title)
        axis.set(xlabel="point j", ylabel="point i", xticks=[], yticks=[])
        _name_grids(axis, grids)
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
    figure = Figure((3.2 + 0.8 * len(statistics.rates), 4.2), layout="compressed")
    axis = figure.subplots()
    xs = range(len(statistics.rates))
    for k, column in enumerate(percents.T.tolist()):
        axis.plot(xs, column, marker="o", color=_shade(k, 9), label=str(k))
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.set_xticks(xs, [_rate_name(rate) for rate in statistics.rates])
    axis.set_xlabel("rate")
    axis.set_ylabel("pixels (%)")
    axis.spines[["top", "right"]].set_visible(False)
    title = NEIGHBORS.replace(" with", "\nwith")
    figure.legend(title=title, loc="outside right center", frameon=False, reverse=True)
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
        axis.set_xticks(range(9))
        axis.set_ylim(-0.02, 1.02)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    axes[0].set_ylabel("accuracy of affinity")
    figure.supxlabel(NEIGHBORS, fontsize="medium")
    _save(figure, path)


def label_colors(
    labels: Tensor, num_classes: int, palette: Sequence[str] = PALETTE
) -> NDArray[np.uint8]:
    """The picture of a map of classes: an array (H, W, 3) of uint8, for ``imshow`` and Pillow.

    Args:
        labels: (H, W) of an integer dtype, on any device.
        num_classes: number of classes C. A label outside [0, C) is void, and white.
        palette: colours that matplotlib knows, by class; used again from the first where there
            are more classes.

    Raises:
        TypeError, ValueError: labels of another dtype or shape, no number of classes, no colour.

    Example:
        >>> import torch
        >>> from tritonaff.plotting import label_colors
        >>> label_colors(torch.tensor([[0, 255]]), num_classes=2).tolist()
        [[[0, 114, 178], [255, 255, 255]]]
    """
    labels = _check_labels("labels", labels)
    num_classes = checks.check_int("num_classes", num_classes, at_least=1)
    colours = [palette[k % len(palette)] for k in range(num_classes)]
    table = torch.tensor([to_rgb(colour) for colour in (*colours, VOID)])
    is_class = (labels >= 0) & (labels < num_classes)
    table = (255 * table).round().to(torch.uint8)
    return table[labels.where(is_class, num_classes)].numpy()


def draw_boundaries(axis: Axes, labels: Tensor, **line: Any) -> None:
    """Draws the boundaries between labels, as lines between pixels, over the image on the axes.

    Args:
        axis: axes with an image of this size, as ``imshow`` draws it.
        labels: (H, W) of an integer dtype, on any device; void is a label like any other.
        line: options of matplotlib's ``LineCollection``, such as ``color`` and ``linewidth``.

    Raises:
        TypeError, ValueError: labels of another dtype or shape.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> from tritonaff.plotting import draw_boundaries
        >>> axis = Figure().subplots()
        >>> image = axis.imshow(torch.rand(2, 3, 3).numpy())
        >>> draw_boundaries(axis, torch.tensor([[0, 0, 1], [0, 0, 1]]), color="black")
        >>> len(axis.collections[0].get_segments())
        2
    """
    labels = _check_labels("labels", labels)
    right = (labels[:, 1:] != labels[:, :-1]).nonzero().double()  # (row, column) left of a line
    below = (labels[1:] != labels[:-1]).nonzero().double()
    vertical = torch.stack((right + _half(-1, 1), right + _half(1, 1)), dim=1)
    horizontal = torch.stack((below + _half(1, -1), below + _half(1, 1)), dim=1)
    segments = torch.cat((vertical, horizontal)).flip(-1)  # from (row, column) to (x, y)
    options = {"color": OKABE_ITO["yellow"], "linewidth": 0.8, **line}
    axis.add_collection(LineCollection(list(segments.numpy()), **options), autolim=False)


def draw_errors(
    axis: Axes,
    prediction: Tensor,
    target: Tensor,
    num_classes: int,
    baseline: Tensor | None = None,
) -> None:
    """Draws where predicted classes are right and wrong; with a baseline, where they are better and
    worse than the baseline too. ``ERRORS`` has the colours; void is white.

    Args:
        axis: axes to draw on.
        prediction: (H, W) of an integer dtype, on any device.
        target: (H, W), likewise; a label outside [0, C) is void.
        num_classes: number of classes C.
        baseline: (H, W), classes that something else predicts. Then "wrong" is wrong in both.

    Raises:
        TypeError, ValueError: maps of other dtypes or shapes, no number of classes.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> from tritonaff.plotting import draw_errors
        >>> axis = Figure().subplots()
        >>> target = torch.tensor([[0, 0, 1, 1, 255]])
        >>> draw_errors(axis, torch.tensor([[0, 1, 1, 0, 0]]), target, num_classes=2)
    """
    target = _check_labels("target", target)
    prediction = _check_labels("prediction", prediction, target)
    num_classes = checks.check_int("num_classes", num_classes, at_least=1)
    names = list(ERRORS)
    right = prediction == target
    kinds = torch.where(right, names.index("right"), names.index("wrong"))
    if baseline is not None:
        baseline_right = _check_labels("baseline", baseline, target) == target
        kinds[right & ~baseline_right] = names.index("better")
        kinds[~right & baseline_right] = names.index("worse")
    kinds[(target < 0) | (target >= num_classes)] = len(names)
    colours = label_colors(kinds, len(names), tuple(ERRORS.values()))
    axis.imshow(colours, interpolation="nearest")


def draw_curves(axis: Axes, curves: Mapping[str, Mapping[int, float]], mean_over: int = 1) -> None:
    """Draws values by step: the loss, or a score of the validation images.

    Args:
        axis: axes to draw on.
        curves: title -> {step: value}, a line each.
        mean_over: number of values; above 1 the line is the mean of so many values up to a step,
            and the values themselves are a pale line behind.

    Raises:
        TypeError, ValueError: no mapping, an empty mapping, a number below 1.

    Example:
        >>> from matplotlib.figure import Figure
        >>> from tritonaff.plotting import draw_curves
        >>> axis = Figure().subplots()
        >>> draw_curves(axis, {"cross-entropy": {0: 2.2, 100: 0.9}, "+ AAF": {0: 5.1, 100: 2.3}})
    """
    _check_mapping("curves", curves)
    mean_over = checks.check_int("mean_over", mean_over, at_least=1)
    for k, (title, curve) in enumerate(curves.items()):
        colour, steps, values = PALETTE[k % len(PALETTE)], list(curve), list(curve.values())
        if mean_over > 1:
            axis.plot(steps, values, color=colour, alpha=0.25, linewidth=0.6)
            sums = torch.tensor([0.0, *values], dtype=torch.float64).cumsum(0)
            count = torch.arange(1, len(values) + 1).clamp(max=mean_over)
            values = ((sums[1:] - sums[torch.arange(1, len(values) + 1) - count]) / count).tolist()
        axis.plot(steps, values, color=colour, label=title, marker="o" * (len(steps) < 30))
    axis.set_xlabel("step")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)


def draw_class_scores(axis: Axes, scores: Mapping[str, Tensor], classes: Sequence[str]) -> None:
    """Draws a score by class, IoU for example: a dot for each seed, a line at the seeds' mean.

    Args:
        axis: axes to draw on.
        scores: title of a loss -> scores (C,) or (seeds, C), floating, on any device. NaN is left
            out.
        classes: the names of the C classes.

    Raises:
        TypeError, ValueError: no mapping, an empty mapping, or an entry that is no such tensor.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> from tritonaff.plotting import draw_class_scores
        >>> axis = Figure().subplots()
        >>> scores = {"cross-entropy": torch.rand(3, 2), "+ AAF": torch.rand(3, 2)}
        >>> draw_class_scores(axis, scores, ["road", "pole"])
    """
    _check_mapping("scores", scores)
    rows = torch.arange(len(classes), dtype=torch.float64)
    for k, (title, score) in enumerate(scores.items()):
        seeds = score[None] if isinstance(score, Tensor) and score.dim() == 1 else score
        shape = ("seeds", len(classes))
        checks.check_tensor(f"scores[{title!r}]", seeds, checks.LOGITS_DTYPES, shape)
        seeds, colour = seeds.detach().to("cpu", torch.float64), PALETTE[k % len(PALETTE)]
        heights = rows + 0.6 * (k - (len(scores) - 1) / 2) / len(scores)
        axis.plot(seeds.T.numpy(), heights.numpy(), "o", color=colour, markersize=4, label=title)
        axis.plot(seeds.nanmean(dim=0).numpy(), heights.numpy(), "|", color=colour, markersize=9)
    _name_classes(axis, classes)
    handles = {line.get_label(): line for line in axis.lines}
    _legend_below(axis, [handles[title] for title in scores], list(scores))


def draw_learned_sizes(axis: Axes, loss: AdaptiveAffinityFieldLoss, classes: Sequence[str]) -> None:
    """Draws the mean kernel size that each class has learned, by its edge weights and by its
    non-edge weights. A dotted line is where they began, with equal weights of all sizes.

    Args:
        axis: axes to draw on.
        loss: the loss after training.
        classes: the names of its classes.

    Raises:
        TypeError, ValueError: another kind of loss, or another number of names.

    Paper: Ke et al., ECCV 2018, 5.4.

    Example:
        >>> import tritonaff
        >>> from matplotlib.figure import Figure
        >>> from tritonaff.plotting import draw_learned_sizes
        >>> loss = tritonaff.AdaptiveAffinityFieldLoss(num_classes=2)
        >>> draw_learned_sizes(Figure().subplots(), loss, ["road", "pole"])
    """
    if not isinstance(loss, AdaptiveAffinityFieldLoss):
        raise TypeError(
            f"loss must be an AdaptiveAffinityFieldLoss, got {type(loss).__name__}: other losses "
            "learn no sizes"
        )
    if len(classes) != loss.num_classes:
        raise ValueError(
            f"classes must have a name for each of {loss.num_classes} classes, got {len(classes)}"
        )
    kinds = zip(("edges", "non-edges"), "os", ("blue", "orange"), strict=True)
    for (kind, marker, colour), means in zip(kinds, loss.effective_kernel_size(), strict=True):
        xs, heights = means.tolist(), range(len(classes))
        axis.plot(xs, heights, marker, color=OKABE_ITO[colour], markersize=5, label=kind)
    sizes = loss.options.kernel_sizes
    axis.axvline(sum(sizes) / len(sizes), color="0.6", linestyle=":", zorder=0)
    axis.set_xticks(sizes)
    axis.set_xlabel("mean kernel size")
    _name_classes(axis, classes)
    _legend_below(axis, *axis.get_legend_handles_labels())


def affinity_field_map(
    logits: Tensor,
    target: Tensor,
    kernel_sizes: Sequence[int] | int = (3,),
    *,
    margin: float = 3.0,
    eps: float = 1e-4,
    ignore_index: int | None = 255,
    activation: Activation = "softmax",
) -> Tensor:
    """Where the affinity field loss is large: the part of the loss that each pixel's pairs with its
    neighbours make. The parts add up to :func:`tritonaff.affinity_field_loss`.

    The computation is the papers' equations in torch operations, with memory of several times the
    logits: for pictures, not for training.

    Args:
        logits: (N, C, H, W) floating, on any device.
        target: labels (N, H, W) or (N, 1, H, W); with ``activation="sigmoid"`` (N, C, H, W) too.
        kernel_sizes: distinct odd sizes, each at least 3; an int is one size.
        margin: KL divergence, in nats, beyond which an edge is satisfied; at least 0.
        eps: clamp of the probabilities, above 0 and below 0.5.
        ignore_index: label of the pixels to leave out; None if there is no such label.
        activation: ``"softmax"``, one class per pixel; ``"sigmoid"``, one channel or several labels
            per pixel.

    Returns:
        (N, H, W), float32, float64 for float64 logits, without a gradient; in nats.

    Raises:
        TypeError, ValueError: as :func:`tritonaff.affinity_field_loss`.

    Paper: Ke et al., ECCV 2018, Eq. 3, 4, 7, pixel by pixel.

    Example:
        >>> import torch, tritonaff
        >>> from tritonaff.plotting import affinity_field_map
        >>> logits, target = torch.randn(1, 3, 8, 8), torch.randint(0, 3, (1, 8, 8))
        >>> parts = affinity_field_map(logits, target)
        >>> bool((parts.sum() - tritonaff.affinity_field_loss(logits, target)).abs() < 1e-4)
        True
    """
    options = affinity_field_options(
        kernel_sizes, margin=margin, eps=eps, ignore_index=ignore_index, activation=activation
    )
    logits, target = checks.check_logits_and_target(logits, target, activation)
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    num_labels = 2 if activation == "sigmoid" else logits.shape[1]
    checks.check_label_values(target, num_labels, options.ignore_index)
    label = checks.label_to_ignore(options.ignore_index)
    with torch.no_grad():
        has_label, counted = equations.labels(target, logits.shape[1], label, activation)
        logits = logits.where(counted == 1, 0)
        p = logits.softmax(dim=1) if activation == "softmax" else logits.sigmoid()
        p = p.clamp(eps, 1 - eps)
        total = logits.new_zeros(target.shape[0], *logits.shape[2:])
        for size in options.kernel_sizes:
            d = (size - 1) // 2
            parts = torch.zeros_like(total), torch.zeros_like(total)  # edges, non-edges
            counts = torch.zeros(2, dtype=torch.int64, device=logits.device)
            for dy, dx in equations.DIRECTIONS:
                kl, edge, non_edge = equations.pairs(
                    p, 1 - p, has_label, counted, d * dy, d * dx, "paper"
                )
                for k, (loss, kind) in enumerate(((F.relu(margin - kl), edge), (kl, non_edge))):
                    parts[k].add_((loss * kind).sum(dim=1))
                    counts[k] += kind.sum()
            for part, count in zip(parts, counts, strict=True):
                total += part / count.clamp(min=1) / len(options.kernel_sizes)
        return total


def _half(down: int, across: int) -> Tensor:
    """Half a pixel: (row, column)."""
    return torch.tensor((down / 2, across / 2), dtype=torch.float64)


def _name_classes(axis: Axes, classes: Sequence[str]) -> None:
    """A row for each class, the first one on top."""
    axis.set_yticks(range(len(classes)), classes, parse_math=False)
    axis.set_ylim(len(classes) - 0.5, -0.5)
    axis.grid(axis="y", color="0.9", zorder=0)
    axis.tick_params(left=False)
    axis.spines[["top", "right", "left"]].set_visible(False)


def _legend_below(axis: Axes, handles: Sequence[Any], titles: Sequence[str]) -> None:
    height = -0.1 if not axis.get_xlabel() else -0.2
    place = 0.5, height
    axis.legend(handles, titles, loc="upper center", bbox_to_anchor=place, ncols=2, frameon=False)


def _name_grids(axis: Axes, grids: Sequence[int]) -> None:
    begin, middles = 0, []
    for grid in grids:
        if begin:
            axis.axhline(begin - 0.5, color="black", linewidth=0.8)
            axis.axvline(begin - 0.5, color="black", linewidth=0.8)
        middles.append(begin + (grid**2 - 1) / 2)
        begin += grid**2
    names = [f"{grid} x {grid}" for grid in grids]
    axis.set_xticks(middles, names)
    axis.set_yticks(middles, names, rotation=90, va="center")
    axis.tick_params(length=0)


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


def _check_labels(name: str, labels: Tensor, like: Tensor | None = None) -> Tensor:
    """The labels (H, W) as int64 on the CPU; of the shape of ``like``, if given."""
    shape = ("H", "W") if like is None else tuple(like.shape)
    checks.check_tensor(name, labels, LABEL_DTYPES, shape)
    return labels.detach().to("cpu", torch.int64)
