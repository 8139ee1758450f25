"""Metrics that show the purpose of structured losses, as torchmetrics: they need the extra
``metrics``, add up over the processes of a distributed run, and are moved to the tensors' device
with ``.to(device)``. Their counts stay on that device until ``compute()``.

Mean IoU and pixel accuracy are torchmetrics' own:

    >>> import torch
    >>> from torchmetrics import MetricCollection
    >>> from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex
    >>> metrics = MetricCollection(
    ...     {
    ...         "mIoU": MulticlassJaccardIndex(4, ignore_index=255),
    ...         "IoU": MulticlassJaccardIndex(4, average="none", ignore_index=255),
    ...         "pixel accuracy": MulticlassAccuracy(4, average="micro", ignore_index=255),
    ...     }
    ... )
    >>> prediction = torch.tensor([[[0, 1, 1, 2]]])
    >>> target = torch.tensor([[[0, 0, 1, 255]]])
    >>> {name: value.tolist() for name, value in metrics(prediction, target).items()}
    {'IoU': [0.5, 0.5, 0.0, 0.0], 'mIoU': 0.5, 'pixel accuracy': 0.6666666865348816}

``compute()`` of this module's metrics gives a dict of scalars, which Lightning's ``log_dict`` and a
``MetricCollection`` take. Values by class, category or distance are beside: ``by_class()``,
``by_category()``, ``report()``.

docs/metrics.md explains torchmetrics' metrics and the scope of each metric here. A collection of
this module's metrics needs the option ``compute_groups=False``: torchmetrics would merge two
metrics whose counts agree on the first batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritonaff import checks
from tritonaff.functional import VARIANTS, dilated_affinity_terms

try:
    from torchmetrics import Metric
except ImportError:

    class Metric:  # type: ignore[no-redef]
        """Stands in for torchmetrics' class, so that the rest of this file works without it."""

        def __init__(self, **kwargs: Any) -> None:
            raise ImportError(f"{type(self).__name__} needs torchmetrics: pip install torchmetrics")


class BoundaryScores(NamedTuple):
    """Scores by class, each (C,) float64 on the CPU; NaN for a class without any boundary."""

    precision: Tensor
    recall: Tensor
    f: Tensor


MEANS = ("f", "precision", "recall")


class BoundaryScore(Metric):
    """Precision, recall and F of the boundaries of each class, with a tolerance in pixels.

    A boundary pixel of class c has label c and, among its 4 neighbours, a pixel that counts and has
    another label. Precision is the fraction of the prediction's boundary pixels with a boundary
    pixel of the truth of the same class at most ``tolerance`` pixels away in row and column; recall
    is the same fraction with prediction and truth exchanged; F is their harmonic mean. Ignored
    pixels belong to no boundary. All images count into one precision and one recall.

    This metric is not the contour benchmark of BSDS, which the papers use: BSDS thins boundaries,
    matches them one to one and combines several annotators. Here one boundary pixel may match
    several, so that precision and recall are at least as high as with the largest one-to-one
    matching, and equal at tolerance 0. A tolerance forgives every error within its distance: where
    boundaries are dense, as in textures, even tolerance 1 forgives nearly everything;
    docs/metrics.md has figures.

    Args:
        num_classes: C, at least 1.
        tolerance: in pixels, at least 0.
        ignore_index: label of the pixels of the truth to leave out.
        kwargs: options of ``torchmetrics.Metric``.

    Raises:
        ImportError: torchmetrics is not installed: ``pip install torchmetrics``.
        TypeError, ValueError: a wrong option; from ``update``, tensors of a wrong dtype, shape or
            device, and on a CPU a label that is neither a class nor ``ignore_index``: elsewhere
            such pixels are left out.

    Example:
        >>> import torch
        >>> from tritonaff.metrics import BoundaryScore
        >>> truth = torch.zeros(1, 8, 8, dtype=torch.long)
        >>> truth[:, :, 4:] = 1
        >>> prediction = torch.zeros_like(truth)
        >>> prediction[:, :, 5:] = 1  # the boundary is one pixel off, and a quarter of it missing
        >>> prediction[:, :2] = 0
        >>> score = BoundaryScore(num_classes=2, tolerance=1)
        >>> score.update(prediction, truth)
        >>> score.by_class().recall.tolist()
        [0.875, 0.875]
        >>> {name: round(value.item(), 3) for name, value in score.compute().items()}
        {'boundary_f': 0.782, 'boundary_precision': 0.708, 'boundary_recall': 0.875}
    """

    full_state_update = False
    higher_is_better = True
    counts: Tensor
    _by_class: BoundaryScores

    def __init__(
        self, num_classes: int, tolerance: int = 1, ignore_index: int | None = 255, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.num_classes = checks.check_int("num_classes", num_classes, at_least=1)
        self.tolerance = checks.check_int("tolerance", tolerance, at_least=0)
        self.ignore_index = checks.check_ignore_index(ignore_index)
        # Rows: predicted boundary pixels, the matched among them; true boundary pixels, the matched
        # among them.
        counts = torch.zeros(4, self.num_classes, dtype=torch.int64)
        self.add_state("counts", counts, dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Adds a batch: predicted classes and labels, both (N, H, W), as losses take targets."""
        target = checks.check_target(target)
        prediction = _check_like_target("prediction", prediction, target)
        checks.check_label_values(target, self.num_classes, self.ignore_index)
        counted = _counted(target, self.num_classes, self.ignore_index)
        predicted = self._boundaries(prediction, counted)
        true = self._boundaries(target, counted)
        predicted_matched = predicted & _dilate(true, self.tolerance)
        true_matched = true & _dilate(predicted, self.tolerance)
        rows = (predicted, predicted_matched, true, true_matched)
        # Mask by mask: torch counts a whole mask many times faster than along dimensions.
        counts = [mask.count_nonzero() for row in rows for mask in row.unbind(dim=1)]
        self.counts += torch.stack(counts).view_as(self.counts)

    def compute(self) -> dict[str, Tensor]:
        """Means over the classes that have a boundary, of all batches since the start or the last
        ``reset``: ``boundary_f``, ``boundary_precision``, ``boundary_recall``, float64 scalars on
        the CPU.
        """
        scores = self._by_class = self._scores()
        return {f"boundary_{name}": getattr(scores, name).nanmean() for name in MEANS}

    def by_class(self) -> BoundaryScores:
        """The scores of each class. In a distributed run all processes must call this method, as
        ``compute``.
        """
        self.compute()
        return self._by_class

    def _scores(self) -> BoundaryScores:
        predicted, predicted_matched, true, true_matched = self.counts.cpu().double()
        nothing = (predicted + true) == 0
        precision = (predicted_matched / predicted.clamp(min=1)).masked_fill(nothing, torch.nan)
        recall = (true_matched / true.clamp(min=1)).masked_fill(nothing, torch.nan)
        f = 2 * precision * recall / (precision + recall).clamp(min=torch.finfo(torch.float64).tiny)
        return BoundaryScores(precision, recall, f)

    def _boundaries(self, label: Tensor, counted: Tensor) -> Tensor:
        """Mask of the pixels on the boundary of each class, (N, C, H, W)."""
        differs = torch.zeros_like(counted)
        for dim in (1, 2):
            size = label.shape[dim] - 1
            first, second = label.narrow(dim, 0, size), label.narrow(dim, 1, size)
            step = (first != second) & counted.narrow(dim, 0, size) & counted.narrow(dim, 1, size)
            differs.narrow(dim, 0, size).logical_or_(step)
            differs.narrow(dim, 1, size).logical_or_(step)
        classes = torch.arange(self.num_classes, device=label.device)[:, None, None]
        return (label[:, None] == classes) & differs[:, None]


class InstanceMeanIoU(Metric):
    """AAF's instance-wise mean IoU: each image counts as often as it has instances of the class.

        U_c = sum_m n_mc IoU_mc / sum_m n_mc

    over images m, where IoU_mc is the intersection over union of class c in the image, and n_mc is
    the number of instances of class c in the image: the number of distinct ids among the pixels
    with label c. A prediction of c in an image without c changes only the IoU of other classes.

    This metric is not Cityscapes' iIoU, which weighs pixels by the size of their instance: here the
    size of an instance never enters.

    Args:
        num_classes: C, at least 1.
        ignore_index: label of the pixels to leave out; None if there is no such label.
        variant: ``"paper"``, the equation above; ``"authors"``, the published script:

            - an id is one instance, of the class that most of its pixels have, in a tie of the
              lower class; an id whose pixels are all left out is an instance of class 0;
            - only the first 255 distinct ids of an image count, in ascending order: the script
              leaves out an id by its position in this order and not by its value, so that ids of
              background and void are instances;
            - labels outside [0, C) are left out as ``ignore_index`` is;
            - a predicted value C is a false positive of class C - 1; other values outside [0, C)
              are false positives of no class;
            - IoU = intersection / (union + 1e-12), U_c = sum / (sum_m n_mc + 1e-12); a class
              without instances is 0 and counts in the mean.
        kwargs: options of ``torchmetrics.Metric``.

    Raises:
        ImportError: torchmetrics is not installed: ``pip install torchmetrics``.
        TypeError, ValueError: a wrong option; from ``update``, tensors of a wrong dtype, shape or
            device, and on a CPU, with the variant "paper", a label that is neither a class nor
            ``ignore_index``: elsewhere such pixels are left out.

    Paper: Ke et al., "Adaptive Affinity Fields for Semantic Segmentation", section 5.2, Tables 6
    and 7.

    Example:
        >>> import torch
        >>> from tritonaff.metrics import InstanceMeanIoU
        >>> target = torch.tensor([[[0, 0, 1, 1]], [[0, 0, 0, 1]]])
        >>> instance_ids = torch.tensor([[[0, 0, 1, 2]], [[0, 0, 0, 1]]])
        >>> prediction = torch.tensor([[[0, 0, 1, 1]], [[0, 0, 0, 0]]])
        >>> metric = InstanceMeanIoU(num_classes=2)
        >>> metric.update(prediction, target, instance_ids)
        >>> metric.by_class().tolist()  # (1 + 3 / 4) / 2 and (2 * 1 + 1 * 0) / 3
        [0.875, 0.6666666666666666]
    """

    full_state_update = False
    higher_is_better = True
    weighted_iou: Tensor
    instance_count: Tensor
    _by_class: Tensor

    def __init__(
        self,
        num_classes: int,
        ignore_index: int | None = 255,
        variant: str = "paper",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.num_classes = checks.check_int("num_classes", num_classes, at_least=1)
        self.ignore_index = checks.check_ignore_index(ignore_index)
        checks.check_option("variant", variant, VARIANTS)
        self.variant = variant
        zeros = torch.zeros(self.num_classes, dtype=torch.int64)
        self.add_state("instance_count", zeros, dist_reduce_fx="sum")
        # As digits, see _digits: some devices have no float64.
        self.add_state("weighted_iou", zeros.repeat(3, 1), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor, instance_ids: Tensor) -> None:
        """Adds a batch: predicted classes, labels, and ids that tell the instances of an image
        apart, each (N, H, W), as losses take targets.
        """
        target = checks.check_target(target)
        prediction = _check_like_target("prediction", prediction, target)
        instance_ids = _check_like_target("instance_ids", instance_ids, target)
        if self.variant == "paper":
            checks.check_label_values(target, self.num_classes, self.ignore_index)
        for images in zip(prediction.long(), target.long(), instance_ids, strict=True):
            predicted, true, ids = (image.flatten() for image in images)
            counted = _counted(true, self.num_classes, self.ignore_index)
            iou = self._iou(predicted[counted], true[counted])
            count = self._instance_count(true, counted, ids)
            self.weighted_iou += _digits(count.cpu() * iou).to(count.device)
            self.instance_count += count

    def compute(self) -> dict[str, Tensor]:
        """``instance_miou``, the mean over the classes with instances (with the variant "authors",
        over all classes) of all batches since the start or the last ``reset``: a float64 scalar on
        the CPU, NaN if no class has an instance.
        """
        by_class = self._by_class = self._ious()
        return {"instance_miou": by_class.nanmean()}

    def by_class(self) -> Tensor:
        """U_c, (C,) float64 on the CPU. A class without instances has NaN; with the variant
        "authors", 0. In a distributed run all processes must call this method, as ``compute``.
        """
        self.compute()
        return self._by_class

    def _ious(self) -> Tensor:
        weighted_iou, count = _number(self.weighted_iou.cpu()), self.instance_count.cpu().double()
        if self.variant == "authors":
            return weighted_iou / (count + 1e-12)
        return weighted_iou / count

    def _iou(self, predicted: Tensor, true: Tensor) -> Tensor:
        """IoU over the pixels that count in one image: (C,) float64 on the CPU; 0 for a class
        without such pixels.
        """
        hits = self._pixels(true[predicted == true])
        if self.variant == "authors":
            predicted = predicted.where(predicted != self.num_classes, self.num_classes - 1)
        is_class = (predicted >= 0) & (predicted < self.num_classes)
        union = self._pixels(true) + self._pixels(predicted[is_class]) - hits
        hits, union = torch.stack((hits, union)).cpu().double().unbind()
        if self.variant == "authors":
            return hits / (union + 1e-12)
        return hits / union.clamp(min=1)

    def _pixels(self, classes: Tensor) -> Tensor:
        """Number of pixels of each class, (C,)."""
        return torch.bincount(classes, minlength=self.num_classes)

    def _instance_count(self, true: Tensor, counted: Tensor, ids: Tensor) -> Tensor:
        """Number of instances of each class in one image, (C,)."""
        distinct, number = torch.unique(ids, return_inverse=True)
        # A cell for each instance and class: the table counts pixels.
        cells = number[counted] * self.num_classes + true[counted]
        table = torch.bincount(cells, minlength=len(distinct) * self.num_classes)
        table = table.view(-1, self.num_classes)
        if self.variant == "authors":
            return torch.bincount(table[:255].argmax(dim=1), minlength=self.num_classes)
        return (table > 0).sum(dim=0)


def _digits(value: Tensor) -> Tensor:
    """Digits (3, C) int64, to the base 2**31, of numbers (C,) float64 of at least 0; the first
    digit is before the point. Sums of digits are exact, whatever their order, for 2**32 images.
    """
    digits = []
    for _ in range(3):
        digits.append(value.floor())
        value = (value - digits[-1]) * 2**31
    return torch.stack(digits).long()


def _number(digits: Tensor) -> Tensor:
    """The numbers (C,) float64 that sums of digits (3, C) stand for."""
    first, second, third = digits.double().unbind()
    return first + (second + third / 2**31) / 2**31


class AffinityAccuracy(Metric):
    """Accuracy of dilated affinity by rate and by category of the pixel, as a torchmetric: the
    fraction of signals that are predicted right.

    A signal, a pixel and one of its 8 neighbours at a rate, is predicted as "same label" if its
    logit is above 0. :func:`tritonaff.neighbor_categories` defines the category n0 ... n8 of a
    pixel at a rate. Most pixels are n8: ``affinity_accuracy``, the fraction of all signals, is high
    even for a head that always says "same".

    Args:
        rates: R distinct rates; a pair (r1, r2) is r1 rows and r2 columns, an int r is (r, r).
        ignore_index: label of the pixels to leave out; None if there is no such label.
        kwargs: options of ``torchmetrics.Metric``.

    Raises:
        ImportError: torchmetrics is not installed: ``pip install torchmetrics``.
        TypeError, ValueError: a wrong option; from ``update``, as
            :func:`tritonaff.dilated_affinity_terms`.

    Paper: "Improving Semantic Segmentation via Dilated Affinity", Fig. 4, which
    :func:`tritonaff.plotting.plot_affinity_accuracy` draws.

    Example:
        >>> import torch
        >>> from tritonaff.metrics import AffinityAccuracy
        >>> accuracy = AffinityAccuracy(rates=[1])
        >>> target = torch.tensor([[[0, 0, 1]]])
        >>> accuracy.update(torch.ones(1, 8, 1, 3), target)  # "same" everywhere
        >>> accuracy.by_category()[0, 7:].tolist()  # of n7 and n8
        [0.3333333333333333, 1.0]
        >>> {name: round(value.item(), 3) for name, value in accuracy.compute().items()}
        {'affinity_accuracy': 0.5, 'affinity_accuracy_by_category': 0.667}
    """

    full_state_update = False
    higher_is_better = True
    signal_count: Tensor
    correct_count: Tensor
    _by_category: Tensor

    def __init__(
        self, rates: Sequence[int | tuple[int, int]], ignore_index: int | None = 255, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.rates = checks.check_rates(rates)
        self.ignore_index = checks.check_ignore_index(ignore_index)
        # By rate, category and target, (different, same).
        shape = len(self.rates), 9, 2
        for name in ("signal_count", "correct_count"):
            self.add_state(name, torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, affinity_logits: Tensor, target: Tensor) -> None:
        """Adds a batch: logits (N, 8 R, H, W) and labels (N, H, W)."""
        terms = dilated_affinity_terms(
            affinity_logits, target, self.rates, gamma=0, ignore_index=self.ignore_index
        )
        self.signal_count += terms.signal_count
        self.correct_count += terms.correct_count

    def compute(self) -> dict[str, Tensor]:
        """``affinity_accuracy``, the fraction of all signals that are right, and
        ``affinity_accuracy_by_category``, the mean over rates and categories, of all batches since
        the start or the last ``reset``: float64 scalars on the CPU, NaN if there is no signal.
        """
        correct, signals = (
            count.cpu().double().sum(dim=-1) for count in (self.correct_count, self.signal_count)
        )
        by_category = self._by_category = correct / signals
        return {
            "affinity_accuracy": correct.sum() / signals.sum(),
            "affinity_accuracy_by_category": by_category.nanmean(),
        }

    def by_category(self) -> Tensor:
        """Accuracies by rate and category n0 ... n8 of the pixel, (R, 9) float64 on the CPU; NaN
        where there is no signal. In a distributed run all processes must call this method, as
        ``compute``.
        """
        self.compute()
        return self._by_category


class Refinement(NamedTuple):
    """Changes by a refinement, by the pixel's distance to the nearest boundary of the labels.

    ``print`` shows them as lines and columns. The counts are (D + 1,) int64 on the CPU: pixels at
    most ``distances[0]`` away, farther and at most ``distances[1]``, ..., farther than the last
    distance.
    """

    distances: tuple[int, ...]
    pixel_count: Tensor
    """Pixels that are not ignored."""
    became_right: Tensor
    """Pixels that were wrong before and are right after."""
    became_wrong: Tensor
    """Pixels that were right before and are wrong after."""
    stayed_wrong: Tensor
    """Pixels that were wrong before and have another class after, which is wrong too."""

    @property
    def changed(self) -> Tensor:
        """Pixels with another class after than before, (D + 1,) int64."""
        return self.became_right + self.became_wrong + self.stayed_wrong

    @property
    def changed_fraction(self) -> Tensor:
        """Fraction of the pixels that changed, (D + 1,) float64; NaN where there is no pixel."""
        return self.changed.double() / self.pixel_count

    @property
    def fractions(self) -> Tensor:
        """Fractions of the changed pixels that became right, became wrong and stayed wrong:
        (3, D + 1) float64; NaN where no pixel changed.
        """
        counts = torch.stack((self.became_right, self.became_wrong, self.stayed_wrong))
        return counts.double() / self.changed

    def __str__(self) -> str:
        names = [*(f"<= {d}" for d in self.distances), f"> {self.distances[-1]}", "all"]
        kinds = (self.became_right, self.became_wrong, self.stayed_wrong)
        counts = torch.stack((self.pixel_count, *kinds))
        counts = torch.cat((counts, counts.sum(dim=1, keepdim=True)), dim=1)
        lines = ["distance       pixels    changed  % changed  % right  % wrong  % still wrong"]
        for name, (pixels, *changes) in zip(names, counts.T.tolist(), strict=True):
            changed = sum(changes)
            percents = [_percent(changed, pixels), *(_percent(n, changed) for n in changes)]
            cells = zip((pixels, changed, *percents), (12, 11, 11, 9, 9, 15), strict=True)
            lines.append(f"{name:9}" + "".join(str(cell).rjust(width) for cell, width in cells))
        return "\n".join(lines)


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2f}" if whole else "-"


class RefinementReport(Metric):
    """Changes by a refinement such as :func:`tritonaff.affinity_propagation`, for better or worse,
    by distance to the nearest boundary of the labels, as a torchmetric.

    The distance of a pixel is the distance to the nearest pixel of another label, the larger of
    rows and columns: 1 beside a boundary. Ignored pixels are not counted and belong to no boundary;
    a boundary that they cover lies between the labels on their two sides.

    Args:
        distances: D ascending distances, each at least 1: the last pixel of each bin. Pixels
            farther away than the last distance are a bin too.
        ignore_index: label of the pixels to leave out; None if there is no such label.
        kwargs: options of ``torchmetrics.Metric``.

    Raises:
        ImportError: torchmetrics is not installed: ``pip install torchmetrics``.
        TypeError, ValueError: a wrong option; from ``update``, tensors of a wrong dtype, shape or
            device, and on a CPU a label below 0 that is not ``ignore_index``: elsewhere such
            pixels are left out.

    Example:
        >>> import torch
        >>> from tritonaff.metrics import RefinementReport
        >>> target = torch.tensor([[[0, 0, 0, 1, 1]]])
        >>> before = torch.tensor([[[0, 1, 0, 0, 1]]])
        >>> after = torch.tensor([[[0, 0, 0, 1, 0]]])
        >>> report = RefinementReport(distances=(1,))
        >>> report.update(before, after, target)
        >>> result = report.report()
        >>> result.became_right.tolist(), result.became_wrong.tolist()
        ([1, 1], [0, 1])
        >>> {name: round(value.item(), 3) for name, value in report.compute().items()}
        {'became_right': 0.4, 'became_wrong': 0.2, 'stayed_wrong': 0.0}
    """

    full_state_update = False
    counts: Tensor
    _report: Refinement

    def __init__(
        self,
        distances: Sequence[int] = (1, 2, 4, 8, 16),
        ignore_index: int | None = 255,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.distances = checks.check_distances(distances)
        self.ignore_index = checks.check_ignore_index(ignore_index)
        # Rows: pixels, became right, became wrong, stayed wrong.
        counts = torch.zeros(4, len(self.distances) + 1, dtype=torch.int64)
        self.add_state("counts", counts, dist_reduce_fx="sum")

    def update(self, before: Tensor, after: Tensor, target: Tensor) -> None:
        """Adds a batch: predicted classes before and after, and labels, each (N, H, W), as losses
        take targets.
        """
        target = checks.check_target(target)
        before = _check_like_target("before", before, target)
        after = _check_like_target("after", after, target)
        checks.check_label_values(target, None, self.ignore_index)
        was_right, is_right = before == target, after == target
        stayed_wrong = ~was_right & ~is_right & (before != after)
        ignored = checks.label_to_ignore(self.ignore_index)
        counted = (target >= 0) & (target.to(torch.int64) != ignored)
        kinds = torch.stack((counted, ~was_right & is_right, was_right & ~is_right, stayed_wrong))
        near = self._near_boundary(target, counted)
        # Pixels within each distance, and all pixels; the differences are the bins.
        within = torch.stack([(kinds & n).sum(dim=(1, 2, 3)) for n in (*near, counted)], dim=1)
        self.counts += torch.diff(within, dim=1, prepend=torch.zeros_like(within[:, :1]))

    def compute(self) -> dict[str, Tensor]:
        """``became_right``, ``became_wrong`` and ``stayed_wrong`` as fractions of the pixels that
        count, at any distance, of all batches since the start or the last ``reset``: float64
        scalars on the CPU, NaN if no pixel counts.
        """
        counts = self.counts.cpu()
        self._report = Refinement(self.distances, *counts.unbind())
        pixels, *changes = counts.sum(dim=1).double()
        names = ("became_right", "became_wrong", "stayed_wrong")
        return {name: change / pixels for name, change in zip(names, changes, strict=True)}

    def report(self) -> Refinement:
        """The counts by distance. In a distributed run all processes must call this method, as
        ``compute``.
        """
        self.compute()
        return self._report

    def _near_boundary(self, target: Tensor, counted: Tensor) -> Iterator[Tensor]:
        """For each distance, a mask (N, H, W) of the pixels that count and have another label
        within it.
        """
        # The numbers of the distinct labels: float32 tells these apart, but not all labels.
        _, number = torch.unique(target, return_inverse=True)
        label, ignored = number[:, None].float(), ~counted[:, None]
        # The largest and the smallest label within the distance: they differ across a boundary.
        highest = label.masked_fill(ignored, -torch.inf)
        lowest = label.masked_fill(ignored, torch.inf)
        done = 0
        for distance in self.distances:
            highest = _dilate(highest, distance - done)
            lowest = -_dilate(-lowest, distance - done)
            done = distance
            yield counted & (highest != lowest)[:, 0]


def _check_like_target(name: str, value: Any, target: Tensor) -> Tensor:
    labels = checks.check_target(value, name)
    checks.check_tensor(name, labels, checks.LABEL_DTYPES, tuple(target.shape))
    checks.check_one_device(name, labels, "target", target)
    return labels


def _counted(target: Tensor, num_classes: int, ignore_index: int | None) -> Tensor:
    """Mask of the pixels whose label is a class and not ignored."""
    # As int64: ignore_index and num_classes must not wrap around in a narrower dtype.
    label = target.to(torch.int64)
    counted = label != checks.label_to_ignore(ignore_index)
    return counted & (label >= 0) & (label < num_classes)


def _dilate(image: Tensor, distance: int) -> Tensor:
    """The maximum of (N, K, H, W) within the distance in rows and columns; of masks, the union.

    The image is shifted repeatedly, each time at most one pixel farther than the shifts before
    reach together: at a border, a longer shift would leave pixels out.
    """
    for dim in (2, 3):
        size, reach = image.shape[dim], 0
        while reach < min(distance, size - 1):
            shift = min(reach + 1, distance - reach)
            before, image = image, image.clone()
            left, right = (image.narrow(dim, start, size - shift) for start in (0, shift))
            torch.maximum(left, before.narrow(dim, shift, size - shift), out=left)
            torch.maximum(right, before.narrow(dim, 0, size - shift), out=right)
            reach += shift
    return image
