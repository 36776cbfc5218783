"""Gradients of one sequence on several ranks that share it (importable, since ranks are spawned)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from molmo2core.model.config import ModelConfig
from molmo2core.model.initialization import build_model
from molmo2core.model.molmo2 import Molmo2
from molmo2core.parallel.blocks import checkpoint_activations, compile_blocks
from molmo2core.parallel.context_parallel import apply_context_parallel
from molmo2core.testing.tiny_model import Variant, random_model, tiny_config
from molmo2core.testing.training import Pack, random_pack
from molmo2core.training.composer_model import TrainedMolmo2
from molmo2core.training.config import DropoutConfig
from molmo2core.training.microbatch import MicrobatchMaker

Gradients = dict[str, torch.Tensor]
DROPOUT = DropoutConfig(residual=0.2, response_residual=0.1)


def _compile_and_recompute(model: Molmo2) -> None:
    compile_blocks(model)
    checkpoint_activations(model, vision_encoder=1, connector=True, decoder=1)


def _recompute_from_host(model: Molmo2) -> None:
    checkpoint_activations(model, vision_encoder=1, connector=True, decoder=1, on_host=True)


CHANGES: dict[str, Callable[[Molmo2], None]] = {
    "recomputed from the host": _recompute_from_host,
    "compiled and recomputed": _compile_and_recompute,
}


def packs_for(config: ModelConfig) -> dict[str, Pack]:
    """Pools of random_pack reach into any crop, as windows of stitched crops do and more."""
    return {
        "one long video": random_pack(config, 1, tokens=180, images=24, branches=1),
        "a tree with images and a text": random_pack(config, 2, tokens=96, images=3, branches=5),
        "fewer crops than ranks": random_pack(config, 3, tokens=64, images=1),
        "no image": random_pack(config, 4, tokens=64, images=0),
        "an odd length": random_pack(config, 5, tokens=61, images=2),
    }


def steep(config: ModelConfig) -> Molmo2:
    """Random weights in which everything matters, in float64."""
    return random_model(config, seed=3).double()


def as_training_starts(config: ModelConfig) -> Molmo2:
    """Initial weights, in float32."""
    return build_model(config, seed=3)


def gradients_of_all(
    models: Mapping[str, ModelConfig],
    size: int = 1,
    group: dist.ProcessGroup | None = None,
    change: Callable[[Molmo2], None] | None = None,
    build: Callable[[ModelConfig], Molmo2] = steep,
) -> dict[tuple[str, str], tuple[float, Gradients]]:
    """Loss and gradients of each model and pack, summed over the `size` ranks of `group`, which share the pack.

    Each rank has all weights, so that what is compared is the cutting and the exchanges and nothing else.

    Args:
        change: what else is done to each model.
        build: makes it, the same on every rank.
    """
    results = {}
    for model_name, config in models.items():
        model = build(config)
        if group is not None:
            apply_context_parallel(model, group)
        if change is not None:
            change(model)
        maker = MicrobatchMaker(
            im_patch_id=model.im_patch_id,
            dropout=DROPOUT,
            context_rank=group.rank() if group is not None else 0,
            context_size=size,
        )
        for pack_name, pack in packs_for(config).items():
            model.zero_grad()
            loss, gradients = loss_and_gradients(model, maker, pack)
            if group is not None:
                for value in (loss, *gradients.values()):
                    dist.all_reduce(value, group=group)
            results[model_name, pack_name] = (float(loss), gradients)
    return results


def shared_gradients(
    models: Mapping[str, ModelConfig], size: int, build: Callable[[ModelConfig], Molmo2]
) -> dict[tuple[str, str], tuple[float, Gradients]]:
    """`gradients_of_all` in groups of `size` neighbouring ranks.  Of rank 0; others return nothing."""
    first = dist.get_rank() // size * size
    groups = [dist.new_group(range(start, start + size)) for start in range(0, dist.get_world_size(), size)]
    results = gradients_of_all(models, size, groups[first // size], build=build)
    return results if dist.get_rank() == 0 else {}


def shared_gradients_by_size(
    models: Mapping[str, ModelConfig], sizes: Sequence[int]
) -> dict[str, dict[int, dict[tuple[str, str], tuple[float, Gradients]]]]:
    """For each way to build models and each size of a group, in one run of ranks."""
    return {
        build.__name__: {size: shared_gradients(models, size, build) for size in sizes}
        for build in (steep, as_training_starts)
    }


def gradients_of_changed_blocks(
    models: Mapping[str, ModelConfig],
) -> dict[str, dict[tuple[str, str], tuple[float, Gradients]]]:
    """`gradients_of_all` of all ranks in one group, with blocks that are compiled (as far as autograd's graphs) and
    computed twice, or whose inputs wait on the host."""
    group = dist.group.WORLD
    assert group is not None
    results = {}
    with mock.patch.object(torch, "compile", partial(torch.compile, backend="aot_eager")):
        for name, change in CHANGES.items():
            results[name] = gradients_of_all(models, group.size(), group, change)
    return results


def exchanged(model_config: ModelConfig, pack: Pack) -> dict[str, list[int]]:
    """Elements that this rank gives to each exchange of one training step, in order: forward, backward."""
    group = dist.group.WORLD
    assert group is not None
    model = random_model(model_config, seed=3)
    apply_context_parallel(model, group)
    maker = MicrobatchMaker(
        im_patch_id=model.im_patch_id, dropout=DROPOUT, context_rank=group.rank(), context_size=group.size()
    )
    counted: dict[str, list[int]] = {"forward": [], "backward": []}
    exchange = dist.all_to_all_single

    def counting(received: torch.Tensor, sent: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        counted["backward" if torch._C._current_graph_task_id() != -1 else "forward"].append(sent.numel())
        return exchange(received, sent, *arguments, **named)

    with mock.patch.object(dist, "all_to_all_single", counting):
        loss_and_gradients(model, maker, pack)
    return counted


def loss_and_gradients(model: Molmo2, maker: MicrobatchMaker, pack: Pack) -> tuple[torch.Tensor, Gradients]:
    """Of this rank's targets."""
    microbatch = maker.make([pack])
    trained, batch = TrainedMolmo2(model, z_coefficient=1e-4), dict(microbatch)
    loss = trained.loss(trained.forward(batch), batch)["total"] * microbatch["loss_weight"]
    loss.backward()
    return loss.detach(), {
        name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()
    }


def eight_heads(key_heads: int, variant: Variant = "qwen") -> ModelConfig:
    """The tiny model with eight query heads, which share `key_heads` key/value heads."""
    config = tiny_config(variant)
    return replace(config, decoder=replace(config.decoder, num_heads=8, num_kv_heads=key_heads))
