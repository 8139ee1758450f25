"""Statistics of a data set's labels, which weigh the dilated affinity loss and start its head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from tritonaff import checks
from tritonaff.functional import neighbor_counts, signal_weight


class NeighborStatistics:
    """How many neighbours at each rate have a pixel's own label, counted over a data set.

    Adds up :func:`tritonaff.functional.neighbor_counts`, on the targets' device and without reading
    anything back. :class:`tritonaff.DilatedAffinityLoss` weighs signals by them, and
    :class:`tritonaff.DilatedAffinityHead` starts with their frequency. Rates are in pixels of the
    affinity map: labels must come at its resolution.

    Args:
        rates: R distinct rates; a pair (r1, r2) is r1 rows and r2 columns, an int r is (r, r). The
            paper's bracket notation: :func:`tritonaff.expand_rates`.
        ignore_index: label of the pixels to leave out.

    Attributes:
        pixel_count: (R, 9) int64, pixels by rate and category n0 ... n8.
        signal_count: (R, 9, 2) int64, signals by rate, category and whether the neighbour's label
            is different (0) or the same (1).

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

    def __init__(self, rates: Sequence[int | tuple[int, int]], ignore_index: int = 255) -> None:
        self.rates = checks.check_rates(rates)
        self.ignore_index = checks.check_ignore_index(ignore_index)
        self.pixel_count = torch.zeros(len(self.rates), 9, dtype=torch.int64)
        self.signal_count = torch.zeros(len(self.rates), 9, 2, dtype=torch.int64)

    def update(self, target: Tensor) -> None:
        """Adds a batch of labels: (N, H, W) of uint8, int32 or int64."""
        self._add(*neighbor_counts(target, self.rates, ignore_index=self.ignore_index))

    def merge(self, other: NeighborStatistics) -> None:
        """Adds what another one has counted, with the same rates and ignore_index."""
        if not isinstance(other, NeighborStatistics):
            raise TypeError(f"other must be a NeighborStatistics, got {type(other).__name__}")
        self._check_same(other.rates, other.ignore_index)
        device = self.pixel_count.device
        self._add(other.pixel_count.to(device), other.signal_count.to(device))

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Adds up the counts of all processes, in each of them. Call it once, at the end: a second
        call would count everything again.

        Raises:
            RuntimeError: torch.distributed is not initialised.
        """
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "all_reduce needs torch.distributed to be initialised: "
                "call torch.distributed.init_process_group first"
            )
        counts = torch.cat((self.pixel_count[..., None], self.signal_count), dim=-1)
        # By the group alone: a process that has seen no image must choose as the others do.
        if "cpu:" in dist.get_backend_config(group):
            counts = counts.cpu()
        else:
            counts = counts.to(torch.accelerator.current_accelerator())
        dist.all_reduce(counts, group=group)
        self.pixel_count, self.signal_count = counts[..., 0].clone(), counts[..., 1:].clone()

    def frequencies(self) -> Tensor:
        """(R, 9) float64 on the CPU: the proportions of n0 ... n8 among the pixels that count at
        each rate; zeros where none does.
        """
        count = self.pixel_count.cpu().double()
        return count / count.sum(dim=1, keepdim=True).clamp(min=1)

    def positive_frequency(self) -> Tensor:
        """(R,) float64 on the CPU: the fraction of signals at each rate whose target is "same"; 0
        where there is none.
        """
        count = self.signal_count.cpu().double().sum(dim=1)
        return count[:, 1] / count.sum(dim=1).clamp(min=1)

    def weight(self, weighting: str = "sqrt") -> Tensor:
        """(R, 9, 2), what each signal weighs in the loss; see
        :func:`tritonaff.functional.signal_weight`.
        """
        return signal_weight(weighting, self.pixel_count, self.signal_count)

    def state_dict(self) -> dict[str, Any]:
        """All there is to know, of plain types and tensors."""
        return {
            "rates": self.rates,
            "ignore_index": self.ignore_index,
            "pixel_count": self.pixel_count.clone(),
            "signal_count": self.signal_count.clone(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes the counts of a state dict with the same rates and ignore_index, or of the JSON
        file that ``tritonaff-stats`` has written; what else is in it is left alone.

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

    def _check_same(self, rates: tuple[tuple[int, int], ...], ignore_index: int) -> None:
        for name, mine, other in (
            ("rates", self.rates, rates),
            ("ignore_index", self.ignore_index, ignore_index),
        ):
            if mine != other:
                raise ValueError(f"both counts must be of the same {name}, got {mine} and {other}")
