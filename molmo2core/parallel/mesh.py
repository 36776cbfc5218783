"""Which ranks share one sequence and which see different packs."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from molmo2core.errors import RecipeError
from molmo2core.model.config import DecoderConfig


def build_mesh(world_size: int, context_parallel: int, device_type: str) -> DeviceMesh:
    """Mesh (dp, cp); ranks that share a sequence are neighbours, so that they lie in one node.

    FSDP does not use it: parameters are sharded over all ranks (training_and_evaluation.md 3.1).
    """
    check_ranks(world_size, context_parallel)
    shape = (world_size // context_parallel, context_parallel)
    return init_device_mesh(device_type, shape, mesh_dim_names=("dp", "cp"))


def check_ranks(world_size: int, context_parallel: int, global_batch_packs: int | None = None) -> None:
    """Whether ranks divide evenly into groups, and a global batch into the groups.

    Raises:
        RecipeError: naming both numbers and the rule.
    """
    if context_parallel < 1 or world_size % context_parallel:
        raise RecipeError(
            "training.context_parallel",
            found=f"{context_parallel} ranks per sequence with {world_size} ranks",
            expected="a divisor of num_processes * num_nodes",
        )
    groups = world_size // context_parallel
    if global_batch_packs is not None and (global_batch_packs < groups or global_batch_packs % groups):
        raise RecipeError(
            "training.global_batch_packs",
            found=f"{global_batch_packs} packs over {groups} data-parallel groups",
            expected="a multiple of the number of groups (ranks / context_parallel)",
        )


def check_heads(decoder: DecoderConfig, context_parallel: int) -> None:
    """Whether attention heads can be dealt out to `context_parallel` ranks.

    Raises:
        RecipeError: query heads are no multiple of the ranks, or neither of key/value heads and ranks divides the
            other (fewer key/value heads than ranks are repeated before the exchange).
    """
    query_heads, key_heads = decoder.num_heads, decoder.num_kv_heads
    if query_heads % context_parallel or (key_heads % context_parallel and context_parallel % key_heads):
        raise RecipeError(
            "training.context_parallel",
            found=f"{context_parallel} ranks for {query_heads} query heads and {key_heads} key/value heads",
            expected="ranks that divide the query heads, and divide or are a multiple of the key/value heads",
        )
