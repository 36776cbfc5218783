"""How much memory training has taken."""

from __future__ import annotations

import resource
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from molmo2core.training.callbacks.step_record import OwnNumbers, StepSource

if TYPE_CHECKING:
    from composer import State

_GIB = 2**30
_MAXRSS_UNIT = 1024  # Linux counts in KiB


class Memory(StepSource):
    """`memory`: GiB at most since the process began, of the rank that took most.  `host`: resident, without loader
    workers; on GPUs also `allocated` by tensors, and `reserved` by torch's allocator.
    """

    def own(self, state: State) -> OwnNumbers:
        """This rank's peaks."""
        peaks = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_UNIT}
        if torch.cuda.is_available():
            peaks |= {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
        return OwnNumbers(each=peaks)

    def fields(self, step: int, summed: Mapping[str, float], each: Mapping[str, Sequence[float]]) -> dict[str, Any]:
        """See the class."""
        return {"memory": {name: round(max(values) / _GIB, 3) for name, values in each.items()}}
