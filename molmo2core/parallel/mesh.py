"""Which ranks share one sequence and which see different packs."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


def build_mesh(world_size: int, context_parallel: int, device_type: str) -> DeviceMesh:
    """Mesh (dp, cp); ranks that share a sequence are neighbours, so that they lie in one node.

    FSDP does not use it: parameters are sharded over all ranks (training_and_evaluation.md 3.1).  The numbers obey
    ranks.check_ranks.
    """
    shape = (world_size // context_parallel, context_parallel)
    return init_device_mesh(device_type, shape, mesh_dim_names=("dp", "cp"))
