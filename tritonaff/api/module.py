"""The bases of the public modules."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

from torch import distributed as dist
from torch import nn

from tritonaff import checks


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
