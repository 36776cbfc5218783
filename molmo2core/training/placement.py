"""How a model lies on the ranks and computes: attention kernel, shares of a sequence, shards of parameters, blocks that
are compiled or computed twice."""

from __future__ import annotations

import torch
from composer.utils import dist
from composer.utils.parallelism import FSDP2Config, ParallelismConfig

from molmo2core.model.backends import select_attention
from molmo2core.model.molmo2 import Molmo2
from molmo2core.parallel.blocks import checkpoint_activations, compile_blocks
from molmo2core.parallel.context_parallel import apply_context_parallel
from molmo2core.parallel.fsdp import reduce_a_head_alone
from molmo2core.parallel.mesh import build_mesh
from molmo2core.training.config import ShardingConfig, ShardingPrecision, TrainingConfig

_COMPOSERS_NAMES: dict[ShardingPrecision, str] = {"full": "FULL", "mixed": "DEFAULT", "pure": "PURE"}


def place_model(model: Molmo2, config: TrainingConfig, device_type: str) -> None:
    """Change `model` in place, before Composer shards it.  Called by all ranks.

    Args:
        device_type: `cpu` or `cuda`.
    """
    select_attention(model, config.attention, torch.device(device_type))
    if dist.get_world_size() > 1:
        reduce_a_head_alone(model)
    if config.context_parallel > 1:
        mesh = build_mesh(dist.get_world_size(), config.context_parallel, device_type)
        apply_context_parallel(model, mesh.get_group("cp"))
    if config.compile:
        compile_blocks(model)
    chosen = config.activation_checkpointing
    checkpoint_activations(
        model,
        vision_encoder=chosen.vision_encoder,
        connector=chosen.connector,
        decoder=chosen.decoder,
        on_host=chosen.on_host,
    )


def sharding(config: ShardingConfig, ranks: int) -> ParallelismConfig | None:
    """FSDP2 over several ranks, each of which saves its shard.

    One-dimensional over all ranks: Composer replaces a mesh that it is given.
    """
    if ranks == 1:
        return None
    return ParallelismConfig(
        fsdp2=FSDP2Config(
            state_dict_type="sharded",
            mixed_precision=_COMPOSERS_NAMES[config.precision],
            reshard_after_forward=config.reshard_after_forward,
        )
    )
