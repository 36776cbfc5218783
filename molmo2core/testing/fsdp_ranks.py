"""What each rank of the tests of FSDP does (importable, since ranks are spawned)."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from composer import Trainer
from composer.utils.parallelism import FSDP2Config, ParallelismConfig
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule

from molmo2core.model.molmo2 import Molmo2
from molmo2core.testing.tiny_model import tiny_model
from molmo2core.testing.training import training_config
from molmo2core.testing.training_ranks import train_tiny
from molmo2core.training import batches, trainer
from molmo2core.training.config import (
    CheckpointedActivations,
    DropoutConfig,
    GroupSchedule,
    OptimizerConfig,
    ShardingConfig,
    TrainableParts,
    TrainingConfig,
)

_RATE = GroupSchedule(learning_rate=1e-2, warmup_steps=1)
_STAGE: dict[str, Any] = {
    "steps": 20,
    # A large epsilon makes AdamW nearly linear in the gradient, so that a wrong scale of gradients shows in weights.
    "optimizer": OptimizerConfig(vision_encoder=_RATE, connector=_RATE, decoder=_RATE, eps=1.0, clip_norm=0.5),
    "dropout": DropoutConfig(residual=0.1, response_residual=0.1),
}
_EVERYTHING = CheckpointedActivations(vision_encoder=1, connector=True, decoder=1)
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointed": {"activation_checkpointing": _EVERYTHING},
    "compiled": {"activation_checkpointing": _EVERYTHING, "compile": True},
    "frozen": {
        "trainable": TrainableParts(vision_encoder=False, input_embedding=False),
        "activation_checkpointing": CheckpointedActivations(vision_encoder=2, decoder=2),
        "sharding": ShardingConfig(reshard_after_forward=False),
    },
}
"""Each equals the same case in one process, where nothing is computed twice or compiled."""
CASES_OF = {2: ("plain", "compiled", "frozen"), 4: ("plain", "checkpointed")}
"""Number of ranks -> what is tried on them."""


def case(name: str, ranks: int) -> TrainingConfig:
    """Settings of a case; dropout is the same for any number of ranks."""
    return training_config(num_processes=ranks, **_STAGE | CASES[name])


def start(name: str) -> Molmo2:
    """What a case starts from: head and embedding are one matrix in one of them."""
    return tiny_model(tied=name == "plain")


def train_alone(name: str, folder: Path) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Weights and losses of one process."""
    without = {"activation_checkpointing": CheckpointedActivations(), "compile": False}
    config = training_config(**_STAGE | CASES[name] | without)
    weights, lines = train_tiny(folder / name, config, model=start(name))
    assert weights is not None
    return weights, [line["loss"] for line in lines]


def train_cases(folder: Path) -> dict[str, Any]:
    """On each rank: (weights, losses) of every case, where only rank 0 has the weights at the start; and the mesh."""
    ranks, results = dist.get_world_size(), dict[str, Any]()
    # As far as autograd's graphs: inductor's code takes a minute (tests/unit/test_blocks.py has some).
    with mock.patch.object(torch, "compile", functools.partial(torch.compile, backend="aot_eager")):
        for name in CASES_OF[ranks]:
            weights, lines = train_tiny(folder / name, case(name, ranks), model=_on_first_rank(start(name)))
            results[name] = weights, [line["loss"] for line in lines]
    results["programs"] = counters["stats"]["unique_graphs"]
    if ranks == 2:
        results["reductions"] = reductions(folder / "reductions")
    results["placed"] = _placement(folder / "placed", training_config(num_processes=ranks, steps=1))
    return results


def _on_first_rank(model: Molmo2) -> Molmo2:
    return model if dist.get_rank() == 0 else model.to("meta")


def reductions(folder: Path) -> dict[bool, tuple[int, dict[str, torch.Tensor] | None]]:
    """`reduce_every_pass` -> reduce-scatters in two steps of two passes each, and the weights then."""
    exchange, found = dist.reduce_scatter_tensor, {}
    for every_pass in (True, False):
        config = training_config(
            **_STAGE | {"steps": 2, "sharding": ShardingConfig(reduce_every_pass=every_pass)},
            num_processes=dist.get_world_size(),
            global_batch_packs=2 * dist.get_world_size(),
        )
        with (
            mock.patch.object(batches, "MERGED_TOKENS", 1),
            mock.patch.object(dist, "reduce_scatter_tensor", side_effect=exchange) as counted,
        ):
            weights, _ = train_tiny(folder / str(every_pass), config)
        found[every_pass] = counted.call_count, weights
    return found


def _placement(folder: Path, config: TrainingConfig) -> dict[str, Any]:
    """What Composer makes of a two-dimensional mesh, what is gathered at a time, and the optimizer."""
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
    seen: dict[str, Any] = {}

    def build(**arguments: Any) -> Trainer:
        arguments["parallelism_config"] = ParallelismConfig(fsdp2=FSDP2Config(device_mesh=mesh))
        built = Trainer(**arguments)
        seen["mesh"] = built.state.fsdp_config.device_mesh.shape
        seen["units"] = sorted(name for name, part in built.state.model.named_modules() if isinstance(part, FSDPModule))
        seen["fused"] = built.state.optimizers[0].defaults["fused"]
        return built

    with mock.patch.object(trainer, "Trainer", build):
        train_tiny(folder, config)
    return seen
