"""Gradients of one sequence on several ranks that share it (importable, since ranks are spawned)."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn

from molmo2core.model.attention import AttentionMask
from molmo2core.model.config import ModelConfig
from molmo2core.model.initialization import build_model
from molmo2core.model.loss import weighted_loss
from molmo2core.model.molmo2 import Molmo2
from molmo2core.parallel.context_parallel import apply_context_parallel
from molmo2core.testing.tiny_model import tiny_config
from molmo2core.testing.training import Pack
from molmo2core.training.config import DropoutConfig
from molmo2core.training.microbatch import MicrobatchMaker

Gradients = dict[str, torch.Tensor]


def context_parallel_gradients(
    pack: Pack, variants: list[tuple[ModelConfig, dict[str, torch.Tensor]]]
) -> list[tuple[float, Gradients]]:
    """Loss and gradients of `pack`, summed over the ranks that share it, for each model."""
    results = []
    group = dist.group.WORLD
    assert group is not None
    for config, weights in variants:
        model = build_model(config, seed=0)
        model.load_state_dict(weights)
        apply_context_parallel(model, group)
        maker = MicrobatchMaker(
            im_patch_id=model.im_patch_id,
            dropout=DropoutConfig(),
            context_rank=group.rank(),
            context_size=group.size(),
        )
        loss, gradients = loss_and_gradients(model, maker, pack)
        for value in (loss, *gradients.values()):
            dist.all_reduce(value)
        results.append((float(loss), gradients))
    return results


def loss_and_gradients(model: Molmo2, maker: MicrobatchMaker, pack: Pack) -> tuple[torch.Tensor, Gradients]:
    """Of this rank's targets."""
    batch = maker.make([pack])
    hidden = model(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        mask=AttentionMask(batch["subsegment_ids"], batch["is_visual"]),
        crops=batch["crops"],
        pooling=batch["pooling"],
    )
    parts = weighted_loss(hidden[0], model.decoder.head_weight, batch["target_ids"], batch["loss_weights"], 1e-4)
    loss = parts.total
    loss.backward()
    zero = torch.zeros(())
    return loss.detach(), {
        name: zero.expand_as(p).clone() if p.grad is None else p.grad for name, p in model.named_parameters()
    }


def key_heads(count: int) -> ModelConfig:
    """The tiny model with `count` key/value heads."""
    config = tiny_config()
    return replace(config, decoder=replace(config.decoder, num_kv_heads=count))


def parameters_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Detached copies."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}
