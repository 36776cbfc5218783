"""Which ranks share one sequence and which see different packs."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


def build_mesh(world_size: int, context_parallel: int, device_type: str) -> DeviceMesh:
    """Mesh (dp, cp); ranks that share a sequence are neighbours, so that they lie in one node.

    FSDP does not use it: parameters are sharded over all ranks (training_and_evaluation.md 3.1).  The numbers obey
    ranks.check_ranks.
    """
    shape = (world_size // context_parallel, context_parallel)
    return init_device_mesh(device_type, shape, mesh_dim_names=("dp", "cp"))


def host_context_group(context_parallel: int) -> dist.ProcessGroup:
    """This rank's context-parallel group for tensors on the CPU, whatever the device.  Called by all ranks."""
    firsts = range(0, dist.get_world_size(), context_parallel)
    groups = [dist.new_group(list(range(first, first + context_parallel)), backend="gloo") for first in firsts]
    return groups[dist.get_rank() // context_parallel]
