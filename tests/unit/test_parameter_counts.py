"""What the memory of a stage is estimated from, against models of all sizes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from molmo2core.model.attention_flex import BLOCK
from molmo2core.model.config import Size, named_config
from molmo2core.model.loss import CHUNK
from molmo2core.model.molmo2 import Molmo2
from molmo2core.packing.config import PackingConfig
from molmo2core.parallel.fsdp import fsdp_units
from molmo2core.testing.training import training_config
from molmo2core.training.config import CheckpointedActivations, LowRankConfig, ShardingConfig, TrainableParts
from molmo2core.training.memory_estimate import (
    LOSS_CHUNK,
    MASK_BLOCK,
    PackShape,
    estimate_memory,
    largest_pack,
)
from molmo2core.training.parameter_counts import count_parameters
from molmo2core.training.trainable import select_trained

SIZES: tuple[Size, ...] = ("tiny", "4b", "8b", "o-7b")
TRAINED: dict[str, dict[str, Any]] = {
    "all": {},
    "no embeddings": {"trainable": TrainableParts(input_embedding=False, output_head=False, final_norm=False)},
    "adapters": {
        "trainable": TrainableParts(vision_encoder=False, connector=False, decoder=False),
        "low_rank": LowRankConfig(parts=("decoder_attention", "decoder_mlp", "vision_encoder", "connector")),
    },
    "one adapter": {"trainable": TrainableParts(decoder=False), "low_rank": LowRankConfig(parts=("decoder_mlp",))},
}


@pytest.mark.parametrize("what", TRAINED)
@pytest.mark.parametrize("size", SIZES)
def test_parameters_are_those_of_the_model(size: Size, what: str) -> None:
    """All, trained, and gathered at a time.  Would catch a matrix that the model got and the estimate did not."""
    config = training_config(num_processes=8, **TRAINED[what])
    with torch.device("meta"):
        model = Molmo2(named_config(size))
    select_trained(model, config, seed=0)

    def count(module: torch.nn.Module, *, trained: bool) -> int:
        return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)

    for trained in (False, True):
        assert count_parameters(named_config(size), config, trained=trained) == count(model, trained=trained)
    is_unit, block = fsdp_units(model), model.decoder.stack.blocks[0]
    units = [module for module in model.modules() if is_unit(module)]
    root = [count(model, trained=t) - sum(count(unit, trained=t) for unit in units) for t in (False, True)]
    expected = sum(root) + 2 * count(block, trained=False) + count(block, trained=True)
    shape = PackShape(tokens=64, crops=1, visual_tokens=4)
    assert estimate_memory(named_config(size), config, shape).gathered == 4 * expected
    kept = dataclasses.replace(config, sharding=ShardingConfig(reshard_after_forward=False))
    assert estimate_memory(named_config(size), kept, shape).gathered >= 4 * count(model, trained=False)


def test_constants_are_those_of_the_modules_that_import_torch() -> None:
    assert (LOSS_CHUNK, MASK_BLOCK) == (CHUNK, BLOCK)


def test_state_of_one_rank_is_sixteen_bytes_a_parameter() -> None:
    """Weights, gradients and two moments in float32; eight ranks hold an eighth each."""
    model, shape = named_config("4b"), PackShape(tokens=64, crops=1, visual_tokens=4)
    assert estimate_memory(model, training_config(), shape).state == 16 * 4_461_913_040
    sharded = estimate_memory(model, training_config(num_processes=8), shape)
    assert sharded.state - sharded.gathered == 2 * 4_461_913_040


@pytest.mark.parametrize(
    ("changes", "saved"),
    [
        ({"activation_checkpointing": CheckpointedActivations(vision_encoder=1, connector=True, decoder=1)}, 0.5),
        ({"activation_checkpointing": CheckpointedActivations(decoder=2)}, 0.1),
        ({"trainable": TrainableParts(vision_encoder=False)}, 0.1),
        ({"sharding": ShardingConfig(precision="mixed")}, 0.02),
    ],
)
def test_what_saves_memory_is_estimated_to(changes: dict[str, Any], saved: float) -> None:
    """Each by more than a share; would catch a setting that the estimate reads the wrong way round."""
    model, shape = named_config("4b"), PackShape(tokens=16_384, crops=128, visual_tokens=10_368)
    plain = training_config(num_processes=8, precision="amp_bf16")
    before, after = (estimate_memory(model, c, shape) for c in (plain, dataclasses.replace(plain, **changes)))
    assert after.total < (1 - saved) * before.total


def test_what_moves_or_adds_memory() -> None:
    """Inputs that go to the host are not kept; gradients that wait for the last pass are whole."""
    model, shape = named_config("4b"), PackShape(tokens=16_384, crops=128, visual_tokens=10_368)
    here = CheckpointedActivations(vision_encoder=1, connector=True, decoder=1)
    plain = training_config(num_processes=8, precision="amp_bf16", activation_checkpointing=here)
    on_host = dataclasses.replace(plain, activation_checkpointing=dataclasses.replace(here, on_host=True))
    kept, left = (estimate_memory(model, config, shape).kept for config in (plain, on_host))
    assert kept - left == 36 * 16_384 * 2560 * 4 + 25 * 128 * 729 * 1152 * 4
    late = dataclasses.replace(plain, sharding=ShardingConfig(reduce_every_pass=False))
    sharded, whole = (estimate_memory(model, config, shape).gradients for config in (plain, late))
    assert whole - sharded == 4 * 4_461_913_040


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("ranks", [1, 8])
def test_nothing_grows_with_the_square_of_the_length(size: Size, ranks: int) -> None:
    """Lists of blocks of 128 x 128 are all that is beyond proportion: 3 MB for twice 36,864 tokens.  One byte a pair
    would be 2,700."""
    model = named_config(size)
    config = training_config(num_processes=ranks, context_parallel=ranks)
    once, twice = (PackShape(tokens=n * 36_864, crops=n * 384, visual_tokens=n * 31_104) for n in (1, 2))
    first, second = (estimate_memory(model, config, shape).activations for shape in (once, twice))
    assert second <= 2 * first + 3e6


def test_a_pack_uses_both_budgets() -> None:
    shape = largest_pack(named_config("4b"), PackingConfig(sequence_tokens=16_384, crop_budget=128))
    assert shape == PackShape(tokens=16_384, crops=128, visual_tokens=16_384)
    small = largest_pack(named_config("4b"), PackingConfig(sequence_tokens=16_384, crop_budget=10))
    assert small.visual_tokens == 10 * 14 * 14
