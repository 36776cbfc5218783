"""How a model lies on the ranks and computes: attention kernel, shares of a sequence, shards of parameters, blocks that
are compiled or computed twice."""

from __future__ import annotations

from pathlib import Path

import torch
from composer.utils import dist
from composer.utils.parallelism import FSDP2Config, ParallelismConfig

from molmo2core.model.backends import select_attention
from molmo2core.model.molmo2 import Molmo2
from molmo2core.parallel.blocks import checkpoint_activations, compile_blocks
from molmo2core.parallel.context_parallel import apply_context_parallel
from molmo2core.parallel.mesh import build_mesh
from molmo2core.training.config import TrainingConfig


def place_model(model: Molmo2, config: TrainingConfig, device_type: str) -> None:
    """Change `model` in place, before Composer shards it.  Called by all ranks.

    Args:
        device_type: `cpu` or `cuda`.
    """
    select_attention(model, config.attention, torch.device(device_type))
    if config.context_parallel > 1:
        mesh = build_mesh(dist.get_world_size(), config.context_parallel, device_type)
        apply_context_parallel(model, mesh.get_group("cp"))
    if config.compile:
        compile_blocks(model)
    chosen = config.activation_checkpointing
    checkpoint_activations(
        model, vision_encoder=chosen.vision_encoder, connector=chosen.connector, decoder=chosen.decoder
    )


def sharding(ranks: int, checkpoint: Path | None) -> ParallelismConfig | None:
    """FSDP2 over several ranks; or in the form that `checkpoint`, perhaps of another number of ranks, was saved in.

    Composer loads a file into whole state dicts only, and a folder of shards into sharded ones only.
    """
    if ranks == 1 and (checkpoint is None or checkpoint.is_file()):
        return None
    is_whole = checkpoint is not None and checkpoint.is_file()
    return ParallelismConfig(fsdp2=FSDP2Config(state_dict_type="full" if is_whole else "sharded"))
