"""Guards against faults of Composer 0.32.1 and torch that would otherwise pass in silence.

Each says what goes wrong without it; tests/unit/test_training_guards.py and tests/distributed show each fault.
"""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Any

import torch
from composer.utils import collect_env

from molmo2core.errors import PlatformError

if TYPE_CHECKING:
    from composer import State


def average_gradients_on_gloo() -> None:
    """Have FSDP2 average gradients on CPU under torch 2.7.

    Its gloo sums in a reduce-scatter that asks for the average, so gradients come out times the number of ranks.
    AdamW hides it, clipping and eps do not.  Later versions of torch average and need nothing.
    """
    if not torch.__version__.startswith("2.7."):
        return
    import torch.distributed.fsdp._fully_shard._fsdp_collectives as collectives

    def divide_after_sum(
        reduce_scatter_group: Any, all_reduce_group: Any, reduce_dtype: torch.dtype, device_type: str = ""
    ) -> tuple[float, float]:
        replicas = all_reduce_group.size() if all_reduce_group is not None else 1
        return 1.0, float(reduce_scatter_group.size() * replicas)

    collectives._get_gradient_divide_factors = divide_after_sum


def name_the_processor_without_probing() -> None:
    """Have Composer ask the system for the processor's name.

    Its Trainer has py-cpuinfo find it out: a process that sleeps a second and counts the processor's ticks, and that
    on a busy virtual machine never came back (seen: both ranks waited while two of them used a core each for minutes).
    """
    collect_env.get_cpu_model = lambda: platform.processor() or platform.machine()


def check_fsdp2(state: State) -> None:
    """Whether Composer really shards: a configuration that it does not understand silently gives DDP.

    Raises:
        PlatformError: it does not.
    """
    if not (state.fsdp_enabled and state.fsdp_config_version == 2):
        raise PlatformError(
            "Composer", found="the model is not sharded with FSDP2", mend="install the locked version of mosaicml"
        )
