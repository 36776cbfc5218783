"""Freezing: each part alone, what it saves, and what the optimizer then holds."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from molmo2core.errors import RecipeError
from molmo2core.model.attention import AttentionMask
from molmo2core.model.molmo2 import Molmo2
from molmo2core.testing.tiny_model import TINY_CONFIGS, random_model, tiny_model
from molmo2core.testing.training import random_pack, training_config
from molmo2core.training.config import TrainableParts
from molmo2core.training.optimizer import build_optimizer
from molmo2core.training.trainable import freeze, part_of_parameter, select_trained

PARTS = [field.name for field in fields(TrainableParts)]
NOTHING = TrainableParts(**dict.fromkeys(PARTS, False))


def parameters_of(model: Molmo2, part: str) -> set[str]:
    return {name for name, _ in model.named_parameters() if part_of_parameter(name) == part}


def loss_of(model: Molmo2) -> torch.Tensor:
    """Every parameter matters to it."""
    pack = random_pack(model.config, 0)
    hidden = model(
        input_ids=torch.cat([pack["input_ids"], torch.tensor([model.im_patch_id + 1])])[None],
        position_ids=torch.cat([pack["position_ids"], torch.tensor([0])])[None],
        mask=AttentionMask(
            torch.cat([pack["subsegment_ids"], pack["subsegment_ids"][-1:]])[None],
            torch.cat([pack["is_visual"], torch.tensor([False])])[None],
        ),
        crops=pack["crops"],
        pooling=pack["pooling"],
    )
    return model.logits(hidden).logsumexp(-1).sum()


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_every_parameter_is_in_one_part(name: str) -> None:
    """Would catch a new parameter that no switch freezes, and a tied head that is found twice."""
    model = random_model(TINY_CONFIGS[name], seed=0)
    of_parts = {part: parameters_of(model, part) for part in PARTS}
    assert sum(map(len, of_parts.values())) == len(list(model.named_parameters()))
    assert of_parts["input_embedding"] == {"decoder.embedding.base"}
    assert of_parts["output_head"] == (set() if model.decoder.head is None else {"decoder.head"})
    assert of_parts["final_norm"] == {"decoder.norm.weight"}
    assert "decoder.embedding.new" in of_parts["connector"]
    assert all(name.startswith("decoder.stack.blocks.") for name in of_parts["decoder"])


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("trained", [True, False], ids=["alone", "others"])
def test_switches_are_independent(part: str, trained: bool) -> None:
    """With one part trained, and with one part frozen: gradients and optimizer hold exactly what is trained.

    Would catch a head that is frozen with the embedding although they are two matrices, and groups without parameters.
    """
    model = tiny_model()
    config = training_config(trainable=replace(NOTHING if trained else TrainableParts(), **{part: trained}))
    select_trained(model, config, seed=0)
    loss_of(model).backward()
    expected = {n for n, _ in model.named_parameters() if (part_of_parameter(n) == part) == trained}
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == expected
    optimizer = build_optimizer(model, config.optimizer)
    in_groups = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert in_groups == {id(parameter) for name, parameter in model.named_parameters() if name in expected}
    assert all(group["params"] for group in optimizer.param_groups)
    groups = {"vision_encoder": ["vision_encoder"], "connector": ["connector"]}.get(part, ["decoder"])
    if trained:
        assert [group["name"] for group in optimizer.param_groups] == groups


def backward_flops(parts: TrainableParts) -> int:
    """Of products of matrices."""
    model = tiny_model()
    freeze(model, parts)
    loss = loss_of(model)
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    return counter.get_total_flops()


def trained_features(parts: TrainableParts) -> torch.Tensor:
    model = tiny_model()
    freeze(model, parts)
    features: torch.Tensor = model.vision_encoder(random_pack(model.config, 0)["crops"])
    return features


def forward_flops(model: Molmo2, prefix: str) -> int:
    with FlopCounterMode(display=False) as counter:
        loss_of(model)
    return sum(counter.get_flop_counts()[f"Molmo2.{prefix}"].values())


def test_frozen_parts_cost_no_backward_pass() -> None:
    """Counted, not timed: a frozen vision encoder has no backward pass at all, layers of frozen decoder blocks half of
    theirs (the gradient of their inputs), a frozen head one product of its two."""
    model = tiny_model()
    vision, blocks = forward_flops(model, "vision_encoder"), forward_flops(model, "decoder.stack")
    first_layer = forward_flops(model, "vision_encoder.patch_embedding")  # pixels need no gradient
    everything = backward_flops(TrainableParts())
    assert not trained_features(TrainableParts(vision_encoder=False)).requires_grad
    # At least: attention's backward pass costs 2.5 times its forward pass, and the connector can stop at the features.
    assert everything - backward_flops(TrainableParts(vision_encoder=False)) >= 2 * vision - first_layer
    # Attention has no weights: its part of the backward pass stays.
    linear = sum(
        forward_flops(model, f"decoder.stack.blocks.{block}.{layer}")
        for block in range(model.config.decoder.num_layers)
        for layer in ("attention.query_key_value", "attention.out", "mlp")
    )
    assert 0.8 * blocks < linear <= blocks
    assert everything - backward_flops(TrainableParts(decoder=False)) == linear
    head = 2 * (random_pack(model.config, 0)["input_ids"].numel() + 1) * model.decoder.head_weight.numel()
    assert everything - backward_flops(TrainableParts(output_head=False)) == head


def test_parameters_are_in_the_order_of_their_names() -> None:
    """An order that follows from how modules were made would give another checkpoint after a harmless change."""
    model = tiny_model()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in build_optimizer(model, training_config().optimizer).param_groups:
        found = [names[id(parameter)] for parameter in group["params"]]
        assert found == sorted(found)


def test_adamw_is_the_published_one() -> None:
    """training_and_evaluation.md 1.3, in every group; one fused kernel per step."""
    groups = build_optimizer(tiny_model(), training_config().optimizer).param_groups
    assert [group["name"] for group in groups] == ["vision_encoder", "connector", "decoder"]
    for group in groups:
        found = {name: group[name] for name in ("betas", "eps", "weight_decay", "fused", "amsgrad", "maximize")}
        assert found == {
            "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.0, "fused": True, "amsgrad": False, "maximize": False,
        }  # fmt: skip


def test_a_tied_matrix_is_one_part() -> None:
    """The published code's frozen input embedding freezes the head of a tied model (training_and_evaluation.md 1.4)."""
    tied = tiny_model(tied=True)
    both = replace(TrainableParts(), input_embedding=False, output_head=False)
    select_trained(tied, training_config(trainable=both), seed=0)
    loss_of(tied).backward()
    assert tied.decoder.head_weight.grad is None
    assert all(p.grad is not None for n, p in tied.named_parameters() if n != "decoder.embedding.base")
    for part in ("input_embedding", "output_head"):
        with pytest.raises(RecipeError, match=r"input_embedding (true|false) with output_head (true|false)"):
            select_trained(tied, training_config(trainable=replace(TrainableParts(), **{part: False})), seed=0)


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(RecipeError, match="every part is frozen"):
        select_trained(tiny_model(), training_config(trainable=NOTHING), seed=0)
