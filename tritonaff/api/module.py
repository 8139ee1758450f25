"""The bases of the public modules, and losses by image."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist

from tritonaff import checks

LossAndTerms = tuple[Tensor, dict[str, Tensor]]


class OptionsModule(nn.Module):
    """A module that holds the options of an operation as attributes."""

    def __init__(self, options: NamedTuple) -> None:
        super().__init__()
        self._kind: Any = type(options)
        for name, value in options._asdict().items():
            setattr(self, name, value)

    @property
    def options(self) -> Any:
        """The attributes as the options tuple that the operation takes."""
        return self._kind(*(getattr(self, name) for name in self._kind._fields))

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options._asdict().items())


class Loss(OptionsModule):
    """A loss with a process_group. Deep copies of the module, as averaging of weights makes them,
    share the group: a group stands for the processes themselves and cannot be copied.
    """

    def __init__(self, options: NamedTuple, process_group: dist.ProcessGroup | None) -> None:
        super().__init__(options)
        checks.check_process_group(process_group)
        self.process_group = process_group

    def __deepcopy__(self, memo: dict[int, Any]) -> Loss:
        memo[id(self.process_group)] = self.process_group
        copied = memo[id(self)] = type(self).__new__(type(self))
        state = copy.deepcopy(self.__getstate__(), memo)  # type: ignore[no-untyped-call]
        copied.__setstate__(state)  # type: ignore[no-untyped-call]
        return copied


def by_image(loss_of_batch: Callable[..., LossAndTerms], *tensors: Tensor) -> LossAndTerms:
    """The loss and the terms of each image as a batch of its own, (N,) each."""
    images = zip(*(torch.split(tensor, 1) for tensor in tensors), strict=True)
    losses, terms = zip(*(loss_of_batch(*image) for image in images), strict=True)
    n = len(tensors[0])  # a batch of no images splits into one of no images
    stacked = {name: torch.stack([of_image[name] for of_image in terms])[:n] for name in terms[0]}
    return torch.stack(losses)[:n], stacked
