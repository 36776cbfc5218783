"""Rules about numbers of ranks, checked before any rank starts.  Torch-free."""

from __future__ import annotations

from molmo2core.errors import RecipeError
from molmo2core.model.config import DecoderConfig


def check_ranks(
    world_size: int,
    context_parallel: int,
    global_batch_packs: int,
    decoder: DecoderConfig,
    *,
    ranks_per_node: int | None = None,
    where: str = "training",
) -> None:
    """Whether ranks divide into groups, a global batch over the groups, and attention heads over a group.

    Args:
        ranks_per_node: a group must lie in one node, or take up whole nodes; None: all ranks are on one.
        where: the place that errors name.

    Raises:
        RecipeError: naming both numbers and the rule.
    """
    if context_parallel < 1 or world_size % context_parallel:
        raise RecipeError(
            f"{where}.context_parallel",
            found=f"{context_parallel} ranks per sequence with {world_size} ranks",
            expected="a divisor of num_processes * num_nodes",
        )
    per_node = ranks_per_node or world_size
    if per_node % context_parallel and context_parallel % per_node:
        raise RecipeError(
            f"{where}.context_parallel",
            found=f"{context_parallel} ranks per sequence with {per_node} ranks on a node",
            expected="a divisor or a multiple of num_processes, so that no group of ranks lies across two nodes",
        )
    groups = world_size // context_parallel
    if global_batch_packs % groups:
        raise RecipeError(
            f"{where}.global_batch_packs",
            found=f"{global_batch_packs} packs over {groups} data-parallel groups",
            expected="a multiple of the number of groups (ranks / context_parallel)",
        )
    check_heads(decoder, context_parallel, where=where)


def check_heads(decoder: DecoderConfig, context_parallel: int, *, where: str = "training") -> None:
    """Whether attention heads can be dealt out to `context_parallel` ranks.

    Raises:
        RecipeError: query heads are no multiple of the ranks, or neither of key/value heads and ranks divides the
            other (fewer key/value heads than ranks are repeated before the exchange).
    """
    query_heads, key_heads = decoder.num_heads, decoder.num_kv_heads
    if query_heads % context_parallel or (key_heads % context_parallel and context_parallel % key_heads):
        raise RecipeError(
            f"{where}.context_parallel",
            found=f"{context_parallel} ranks for {query_heads} query heads and {key_heads} key/value heads",
            expected="ranks that divide the query heads, and divide or are a multiple of the key/value heads",
        )
