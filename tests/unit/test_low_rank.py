"""LoRA: adapters start as nothing, train alone, and merge into a plain model that computes the same."""

from __future__ import annotations

import re
from typing import get_args

import pytest
import torch
from torch import nn

from molmo2core.model.attention import AttentionMask
from molmo2core.model.molmo2 import Molmo2
from molmo2core.testing.tiny_model import TINY_CONFIGS, random_model, tiny_model
from molmo2core.testing.training import random_pack, training_config
from molmo2core.training.config import LowRankConfig, LowRankPart, TrainableParts
from molmo2core.training.low_rank import LowRankLinear, add_adapters, merge_adapters
from molmo2core.training.optimizer import build_optimizer
from molmo2core.training.trainable import select_trained

ALL: tuple[LowRankPart, ...] = get_args(LowRankPart)
EVERYWHERE = LowRankConfig(parts=ALL, rank=3, alpha=6.0)
NO_MATRIX = TrainableParts(vision_encoder=False, connector=False, decoder=False)

PLACE = {
    "decoder_attention": r"decoder\..*\.attention\.",
    "decoder_mlp": r"decoder\..*\.mlp\.",
    "vision_encoder": r"vision_encoder\.",
    "connector": r"connector\.",
}


def logits_of(model: Molmo2, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    pack = random_pack(model.config, 0, images=2)
    hidden = model.to(dtype)(
        input_ids=pack["input_ids"][None],
        position_ids=pack["position_ids"][None],
        mask=AttentionMask(pack["subsegment_ids"][None], pack["is_visual"][None]),
        crops=pack["crops"],
        pooling=pack["pooling"],
    )
    return model.logits(hidden)


def adapted_model(name: str = "qwen") -> Molmo2:
    """As after training: no adapter is 0."""
    model = random_model(TINY_CONFIGS[name], seed=0)
    add_adapters(model, EVERYWHERE, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("low_rank_b"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def adapters_of(model: Molmo2) -> dict[str, torch.Tensor]:
    return {name: value.detach() for name, value in model.named_parameters() if "low_rank" in name}


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_training_starts_from_the_model_as_it_was(name: str) -> None:
    plain, adapted = (random_model(TINY_CONFIGS[name], seed=0) for _ in range(2))
    add_adapters(adapted, EVERYWHERE, seed=0)
    with torch.no_grad():
        assert torch.equal(logits_of(adapted), logits_of(plain))


@pytest.mark.parametrize("name", TINY_CONFIGS)
@torch.no_grad()
def test_merged_weights_compute_what_the_adapted_model_does(name: str) -> None:
    """Would catch a wrong scale, a product the wrong way round, rows of a fused matrix that go astray, and an adapter
    that is forgotten.

    Computed in float64, so that only the rounding of merged weights to float32 is left.  Measured over these models,
    relative to the largest logit: 2.7e-7 to 5.0e-7; what the adapters change: 0.87 to 1.1.
    """
    plain, adapted = random_model(TINY_CONFIGS[name], seed=0), adapted_model(name)
    before = logits_of(plain, torch.float64)
    merged = random_model(TINY_CONFIGS[name], seed=5)
    merged.load_state_dict(merge_adapters(adapted.state_dict(), EVERYWHERE))
    expected, found = logits_of(adapted, torch.float64), logits_of(merged, torch.float64)
    largest = expected.abs().max()
    assert (found - expected).abs().max() < 1e-6 * largest
    assert (before - expected).abs().max() > 0.1 * largest


@pytest.mark.parametrize("part", ALL)
def test_each_part_is_adapted_alone(part: LowRankPart) -> None:
    """And all parts together adapt every linear layer but that of raw pixels, each once.  Would catch a layer that was
    renamed, and is then left out without a word."""
    model = tiny_model()
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    of_part = {name for name in linear if re.match(PLACE[part], name)} - {"vision_encoder.patch_embedding"}
    add_adapters(model, LowRankConfig(parts=(part,)), seed=0)
    assert {name for name, module in model.named_modules() if isinstance(module, LowRankLinear)} == of_part
    assert of_part
    assert linear == {"vision_encoder.patch_embedding"} | {n for n in linear for p in ALL if re.match(PLACE[p], n)}


def test_adapters_are_drawn_by_name() -> None:
    """Ranks draw them apart and must agree; another seed, and another layer, is another draw."""
    first, again = (adapters_of(adapted_model()) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    other_seed = tiny_model()
    add_adapters(other_seed, EVERYWHERE, seed=1)
    other = adapters_of(other_seed)
    a = [name for name in first if name.endswith("low_rank_a")]
    assert not any(torch.equal(first[name], other[name]) for name in a)
    layer = "decoder.stack.blocks.{}.mlp.down.low_rank_a"
    assert not torch.equal(first[layer.format(0)], first[layer.format(1)])
    widths = {name: value.shape[1] ** -0.5 for name, value in first.items() if name in a}
    for name, width in widths.items():
        assert other[name].std() == pytest.approx(width, rel=0.25), name


def test_only_adapters_and_trained_parts_have_gradients_and_optimizer_state() -> None:
    """Adapters learn at the rate of the part that they are in; of frozen matrices nothing is kept."""
    model = tiny_model()
    config = training_config(trainable=NO_MATRIX, low_rank=EVERYWHERE)
    select_trained(model, config, seed=0)
    logits_of(model).logsumexp(-1).sum().backward()
    others = {"decoder.embedding.base", "decoder.head", "decoder.norm.weight"}
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == adapters_of(model).keys() | others
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(model, config.optimizer)
    groups = {group["name"]: {names[id(p)] for p in group["params"]} for group in optimizer.param_groups}
    assert groups.keys() == {"vision_encoder", "connector", "decoder"}
    assert set().union(*groups.values()) == trained
    assert all(name.startswith(f"{group}.") for group, found in groups.items() for name in found)
    optimizer.step()
    assert len(optimizer.state) == len(trained)


def test_checkpoints_hold_the_plain_names() -> None:
    """So that a checkpoint can be read without knowing of adapters: they only add names."""
    model = tiny_model()
    plain = model.state_dict().keys()
    add_adapters(model, EVERYWHERE, seed=0)
    assert {name for name in model.state_dict() if "low_rank" not in name} == plain
    assert merge_adapters(model.state_dict(), EVERYWHERE).keys() == plain
