"""Neighbours and their labels: targets of an affinity head, counts, statistics of a data set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from tritonaff import checks
from tritonaff.ops import dilated_affinity as ops
from tritonaff.options import WEIGHTINGS, Rates, Weighting
from tritonaff.portable.blocks import precision


def dilated_affinity_target(
    target: Tensor, rates: Rates, *, ignore_index: int | None = 255
) -> Tensor:
    """Target of an affinity head: 1 where a neighbour has the pixel's label, 0 where it has not.

    This tensor is for people and tests; the loss never builds it.

    Args:
        target: (N, H, W) or (N, 1, H, W): integers, bool, or whole floats. Every label of at least
            0 except ignore_index is a class: the number of classes is not known here.
        rates: R distinct rates; a pair (r1, r2) is r1 rows and r2 columns, an int r is (r, r).
            Pixels outside the image are no neighbours. The paper's bracket notation:
            :func:`expand_rates`.
        ignore_index: label of the pixels to leave out; None if there is no such label.

    Returns:
        (N, 8 R, H, W) of uint8: 1 for the same label, 0 for a different label, 255 where one of the
        two pixels is ignored or outside. Channels are ordered by rate and, within a rate (r1, r2),
        by neighbour: {-r1, 0, r1} rows x {-r2, 0, r2} columns without the centre, row by row.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape or range. A label below 0 other than ignore_index raises in eager
            mode on the CPU; elsewhere such pixels are ignored, unless TRITONAFF_CHECK=1 asserts
            labels on the device.

    Paper: "Improving Semantic Segmentation via Dilated Affinity", Eq. 1 to 3.

    Example:
        >>> import torch, tritonaff
        >>> target = torch.tensor([[[7, 7, 4]]])
        >>> left, right = tritonaff.dilated_affinity_target(target, rates=[1])[0, 3:5]
        >>> left.tolist(), right.tolist()
        ([[255, 1, 0]], [[1, 0, 255]])
    """
    return ops.signals(*_checked(target, rates, ignore_index))


class NeighborCounts(NamedTuple):
    """Numbers of pixels and signals in each neighbour category, at each of R rates; int64.

    The counts of a data set are the sums of its images' counts.
    """

    pixel_count: Tensor
    """(R, 9): pixels of category n0 ... n8."""
    signal_count: Tensor
    """(R, 9, 2): signals of the pixels of each category by target, (different, same)."""


def neighbor_counts(
    target: Tensor, rates: Rates, *, ignore_index: int | None = 255
) -> NeighborCounts:
    """Numbers of pixels and signals by rate and neighbour category.

    :class:`NeighborStatistics` adds them up over a data set.

    Args:
        target: (N, H, W) or (N, 1, H, W), of an integer dtype, bool, or floating point that holds
            whole numbers (looked at on a CPU, in eager mode).
        rates: R distinct rates; a pair (r1, r2) is r1 rows and r2 columns, an int r is (r, r).
        ignore_index: label of the pixels to leave out; None if there is no such label.

    Returns:
        :class:`NeighborCounts` on the target's device; categories as :func:`neighbor_categories`
        defines them.

    Raises:
        TypeError, ValueError: as :func:`dilated_affinity_target`.

    Example:
        >>> import torch
        >>> from tritonaff.functional import neighbor_counts
        >>> counts = neighbor_counts(torch.tensor([[[0, 0, 0, 1]]]), rates=[1])
        >>> counts.pixel_count[0, 7:].tolist(), counts.signal_count[0, 7:].tolist()
        ([2, 2], [[2, 1], [0, 3]])
    """
    return NeighborCounts(*ops.counts(*_checked(target, rates, ignore_index)))


def neighbor_categories(target: Tensor, rates: Rates, *, ignore_index: int | None = 255) -> Tensor:
    """Numbers of pixels by the number of neighbours of their own label, n0 ... n8.

    The category of a pixel at a rate is 8 minus the number of its valid neighbours with a different
    label; a neighbour is valid if it is in the image and neither of the two pixels is ignored. A
    pixel counts if it has a valid neighbour.

    Args:
        target: (N, H, W) or (N, 1, H, W), of an integer dtype, bool, or floating point that holds
            whole numbers (looked at on a CPU, in eager mode).
        rates: R distinct rates; a pair (r1, r2) is r1 rows and r2 columns, an int r is (r, r).
        ignore_index: label of the pixels to leave out; None if there is no such label.

    Returns:
        (R, 9) int64 on the target's device.

    Raises:
        TypeError, ValueError: as :func:`dilated_affinity_target`.

    Paper: "Improving Semantic Segmentation via Dilated Affinity", Sec. 3.2 and Fig. 3. The paper
    speaks of full neighbourhoods only; here a pixel at the border of a uniform image is n8, like
    the pixels inside.

    Example:
        >>> import torch, tritonaff
        >>> target = torch.tensor([[[0, 0, 0, 1]]])
        >>> tritonaff.neighbor_categories(target, rates=[1]).tolist()  # two of n7, two of n8
        [[0, 0, 0, 0, 0, 0, 0, 2, 2]]
    """
    return neighbor_counts(target, rates, ignore_index=ignore_index).pixel_count


def signal_weight(weighting: Weighting, pixel_count: Tensor, signal_count: Tensor) -> Tensor:
    r"""Weight of each signal in the dilated affinity loss, by rate, neighbour category and target.

    ================  ============================================
    ``"none"``        1
    ``"neighbor"``    n8 / nk
    ``"sqrt"``        sqrt(n8 / nk)
    ``"signal"``      1 for same, same / different for different
    ================  ============================================

    where nk is the number of pixels of category k at the rate, and same and different are the
    numbers of its signals in all categories. Every count n is read as n + 1: nothing divides by
    zero, and no missing category silences the loss. Pixels of category n8 weigh 1, except with
    "signal".

    Args:
        weighting: one of the four names.
        pixel_count: (R, 9) counts, integer or floating.
        signal_count: (R, 9, 2) counts, likewise.

    Returns:
        (R, 9, 2), without a gradient: float32, float64 for float64 counts.

    Raises:
        ValueError: an unknown weighting.

    Paper: "Improving Semantic Segmentation via Dilated Affinity", Sec. 3.2 and Table 1.

    Example:
        >>> import torch
        >>> from tritonaff.functional import signal_weight
        >>> pixel_count = torch.tensor([[0, 0, 0, 0, 0, 0, 0, 3, 15]])
        >>> signal_weight("sqrt", pixel_count, torch.zeros(1, 9, 2))[0, 7:].tolist()
        [[2.0, 2.0], [1.0, 1.0]]
    """
    checks.check_option("weighting", weighting, WEIGHTINGS)
    dtype = precision(pixel_count)
    pixels = pixel_count.detach().to(dtype) + 1
    if weighting == "none":
        weight = torch.ones_like(pixels)
    elif weighting == "signal":
        different, same = (signal_count.detach().to(dtype).sum(dim=1) + 1).unbind(dim=1)
        weight = torch.stack((same / different, torch.ones_like(same)), dim=1)
        return weight[:, None].expand(-1, pixels.shape[1], -1)
    else:
        weight = pixels[:, -1:] / pixels
        if weighting == "sqrt":
            weight = weight.sqrt()
    return weight[:, :, None].expand(-1, -1, 2)


class NeighborStatistics:
    """Statistics of a data set: how often neighbours at each rate have a pixel's own label.

    :meth:`update` adds up :func:`tritonaff.functional.neighbor_counts`, on the targets' device and
    without reading anything back. :class:`tritonaff.DilatedAffinityLoss` weighs signals by these
    counts, and :class:`tritonaff.DilatedAffinityHead` starts with the frequency of "same label".
    Rates are in pixels of the affinity map: labels must have the resolution of this map.

    Args:
        rates: R distinct rates; a pair (r1, r2) is r1 rows and r2 columns, an int r is (r, r). The
            paper's bracket notation: :func:`tritonaff.expand_rates`.
        ignore_index: label of the pixels to leave out; None if there is no such label.

    Attributes:
        pixel_count: (R, 9) int64, pixels by rate and category n0 ... n8.
        signal_count: (R, 9, 2) int64, signals by rate, category and target, (different, same).

    Raises:
        TypeError, ValueError: a wrong option; from ``update``, a target of a wrong type, dtype or
            shape, or labels that :func:`tritonaff.dilated_affinity_target` refuses.

    Paper: "Improving Semantic Segmentation via Dilated Affinity", section 3.2 and Fig. 3, which
    :func:`tritonaff.plotting.plot_neighbor_frequencies` draws. The command ``tritonaff-stats``
    reads a folder of label images; its JSON file is a state dict.

    Example:
        >>> import torch, tritonaff
        >>> statistics = tritonaff.NeighborStatistics(rates=[1])
        >>> target = torch.tensor([[[0, 0, 1, 1]]])  # the two pixels in the middle differ
        >>> for _ in range(10):
        ...     statistics.update(target)
        >>> statistics.frequencies()[0, 7:].tolist()  # of n7 and n8
        [0.5, 0.5]
        >>> round(statistics.positive_frequency().item(), 3)  # 2 of 3 pairs
        0.667
    """

    def __init__(self, rates: Rates, ignore_index: int | None = 255) -> None:
        self.rates = checks.check_rates(rates)
        self.ignore_index = checks.check_ignore_index(ignore_index)
        self.pixel_count = torch.zeros(len(self.rates), 9, dtype=torch.int64)
        self.signal_count = torch.zeros(len(self.rates), 9, 2, dtype=torch.int64)

    def update(self, target: Tensor) -> None:
        """Adds a batch of labels, (N, H, W), as losses take targets."""
        self._add(*neighbor_counts(target, self.rates, ignore_index=self.ignore_index))

    def merge(self, other: NeighborStatistics) -> None:
        """Adds the counts of other statistics with the same rates and ignore_index."""
        if not isinstance(other, NeighborStatistics):
            raise TypeError(f"other must be a NeighborStatistics, got {type(other).__name__}")
        self._check_same(other.rates, other.ignore_index)
        device = self.pixel_count.device
        self._add(other.pixel_count.to(device), other.signal_count.to(device))

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Gives every process the total of all processes' counts. Call this method once, at the
        end: a second call would count everything again.

        Raises:
            RuntimeError: torch.distributed is not initialised.
        """
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "all_reduce needs torch.distributed to be initialised: "
                "call torch.distributed.init_process_group first"
            )
        counts = torch.cat((self.pixel_count[..., None], self.signal_count), dim=-1)
        # The group alone decides: the counts of a process without images are still on the CPU, and
        # all processes must choose one device.
        if "cpu:" in dist.get_backend_config(group):
            counts = counts.cpu()
        else:
            counts = counts.to(torch.accelerator.current_accelerator())
        dist.all_reduce(counts, group=group)
        self.pixel_count, self.signal_count = counts[..., 0].clone(), counts[..., 1:].clone()

    def frequencies(self) -> Tensor:
        """Proportions of n0 ... n8 among the pixels that count at each rate: (R, 9) float64 on the
        CPU; zeros at a rate where no pixel counts.
        """
        count = self.pixel_count.cpu().double()
        return count / count.sum(dim=1, keepdim=True).clamp(min=1)

    def positive_frequency(self) -> Tensor:
        """Fraction of the signals at each rate whose target is "same": (R,) float64 on the CPU; 0
        at a rate without signals.
        """
        count = self.signal_count.cpu().double().sum(dim=1)
        return count[:, 1] / count.sum(dim=1).clamp(min=1)

    def weight(self, weighting: Weighting = "sqrt") -> Tensor:
        """Weight of each signal in the loss, (R, 9, 2); see
        :func:`tritonaff.functional.signal_weight`.
        """
        return signal_weight(weighting, self.pixel_count, self.signal_count)

    def state_dict(self) -> dict[str, Any]:
        """Rates, ignore_index and both counts, as plain types and tensors."""
        return {
            "rates": self.rates,
            "ignore_index": self.ignore_index,
            "pixel_count": self.pixel_count.clone(),
            "signal_count": self.signal_count.clone(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes the counts of a state dict with the same rates and ignore_index, or of the JSON
        file that ``tritonaff-stats`` has written; other entries are not read.

        Example:
            >>> import json, tritonaff
            >>> statistics = tritonaff.NeighborStatistics(rates=[1])
            >>> text = json.dumps({"rates": [[1, 1]], "ignore_index": 255, "images": 1,
            ...     "pixel_count": [[0] * 8 + [4]], "signal_count": [[[0, 0]] * 8 + [[0, 12]]]})
            >>> statistics.load_state_dict(json.loads(text))
            >>> statistics.positive_frequency().item()
            1.0
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict must be a mapping, got {type(state_dict).__name__}")
        missing = [name for name in self.state_dict() if name not in state_dict]
        if missing:
            raise ValueError(
                f"state_dict must hold {', '.join(self.state_dict())}, lacks {missing}"
            )
        self._check_same(checks.check_rates(state_dict["rates"]), state_dict["ignore_index"])
        counts = {
            name: torch.as_tensor(state_dict[name]) for name in ("pixel_count", "signal_count")
        }
        for name, count in counts.items():
            shape = tuple(getattr(self, name).shape)
            checks.check_tensor(f"state_dict[{name!r}]", count, (torch.int64,), shape)
        self.pixel_count = counts["pixel_count"].clone()
        self.signal_count = counts["signal_count"].clone()

    def __repr__(self) -> str:
        return f"NeighborStatistics(rates={self.rates}, ignore_index={self.ignore_index})"

    def _add(self, pixel_count: Tensor, signal_count: Tensor) -> None:
        device = pixel_count.device
        self.pixel_count = self.pixel_count.to(device) + pixel_count
        self.signal_count = self.signal_count.to(device) + signal_count

    def _check_same(self, rates: tuple[tuple[int, int], ...], ignore_index: int | None) -> None:
        for name, mine, other in (
            ("rates", self.rates, rates),
            ("ignore_index", self.ignore_index, ignore_index),
        ):
            if mine != other:
                raise ValueError(f"both counts must be of the same {name}, got {mine} and {other}")


def _checked(
    target: Tensor, rates: Rates, ignore_index: int | None
) -> tuple[Tensor, tuple[tuple[int, int], ...], int | None]:
    target = checks.check_target(target)
    pairs = checks.check_rates(rates)
    ignore_index = checks.check_ignore_index(ignore_index)
    checks.check_label_values(target, None, ignore_index)
    return target, pairs, ignore_index
