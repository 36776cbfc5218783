"""Operations of packs: against torch's own counter on real models, the attention rule pair by pair, and by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from molmo2core.examples import PADDING
from molmo2core.message_tree.attention_rule import allowed
from molmo2core.model.attention import AttentionMask
from molmo2core.model.config import ModelConfig, named_config
from molmo2core.model.loss import weighted_loss
from molmo2core.model.molmo2 import Molmo2
from molmo2core.testing.packs import random_pack as random_mask
from molmo2core.testing.tiny_model import TINY_CONFIGS, random_model, tiny_model
from molmo2core.testing.training import Pack, random_pack
from molmo2core.training.config import CheckpointedActivations
from molmo2core.training.flops import (
    PARTS,
    PackCounts,
    PartFlops,
    attended_pairs,
    forward_flops,
    pack_counts,
    peak_flops,
    recomputed_flops,
    recomputed_shares,
    trained_shares,
    training_flops,
)

PRODUCTS = {"aten.mm", "aten.addmm", "aten.addmm_"}
WHOLE = dict.fromkeys(PARTS, 1.0)


def full_windows(config: ModelConfig, seed: int) -> Pack:
    """A pack whose pooling windows are not cut: the model computes cut ones too, we count what is there."""
    pack = random_pack(config, seed, tokens=90, images=3)
    pack["pooling"] = pack["pooling"].clamp(min=0)
    return pack


def product(_total: torch.Size, left: torch.Size, right: torch.Size, **_: object) -> int:
    return 2 * left[0] * left[1] * right[1]


def counted(model: Molmo2, pack: Pack, *, backward: bool) -> int:
    """Products with weights, by torch's counter, which does not know the CPU's fused attention."""
    in_place = {torch.ops.aten.addmm_: product}  # of the head's gradient: torch counts the other form alone
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        hidden = model(
            input_ids=pack["input_ids"][None],
            position_ids=pack["position_ids"][None],
            mask=AttentionMask(pack["subsegment_ids"][None], pack["is_visual"][None]),
            crops=pack["crops"],
            pooling=pack["pooling"],
        )
        with torch.set_grad_enabled(backward):
            parts = weighted_loss(hidden[0], model.decoder.head_weight, pack["target_ids"], pack["loss_weights"], 1e-4)
            if backward:
                parts.total.backward()
    assert {str(operation) for operation in counter.get_flop_counts()["Global"]} <= PRODUCTS
    return counter.get_total_flops()


def dense(forward: dict[str, PartFlops]) -> dict[str, PartFlops]:
    """Without attention."""
    return {name: replace(part, attention=0.0) for name, part in forward.items()}


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_products_with_weights_are_those_that_torch_counts(name: str) -> None:
    """Would catch a matrix left out or counted twice, grouped heads counted as all heads, the head on all positions,
    and pixels that are given a gradient."""
    model = random_model(TINY_CONFIGS[name], seed=0).train()
    pack = full_windows(model.config, 3)
    forward = dense(forward_flops(model.config, pack_counts([pack])))
    with torch.no_grad():
        assert sum(part.dense for part in forward.values()) == counted(model, pack, backward=False)
    assert training_flops(forward, WHOLE) == counted(model, pack, backward=True)
    assert trained_shares(model) == WHOLE


@pytest.mark.parametrize(
    ("frozen", "shares"),
    [
        (("vision_encoder",), {"vision_encoder": 0.0}),
        (("vision_encoder", "connector"), {"vision_encoder": 0.0, "connector": 0.0}),
        (("connector", "decoder.stack"), {"connector": 0.0, "decoder": 0.0}),
        (("decoder.stack", "decoder.embedding", "decoder.head"), {"embedding": 0.0, "decoder": 0.0, "head": 0.0}),
    ],
)
def test_frozen_parts_cost_less(frozen: tuple[str, ...], shares: dict[str, float]) -> None:
    """A frozen matrix costs two thirds, and one third where no gradient has to pass."""
    model = tiny_model().train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    pack = full_windows(model.config, 4)
    forward = dense(forward_flops(model.config, pack_counts([pack])))
    assert trained_shares(model) == WHOLE | shares
    assert training_flops(forward, trained_shares(model)) == counted(model, pack, backward=True)
    assert training_flops(forward, trained_shares(model)) < training_flops(forward, WHOLE)


def test_cut_windows_cost_what_they_hold() -> None:
    """The model multiplies places without a patch too; as operations of the model they do not count."""
    model = tiny_model().eval()
    pack = random_pack(model.config, 5, images=2)
    missing = int((pack["pooling"] == PADDING).sum())
    connector = model.config.connector
    of_a_patch = 2 * 2 * connector.num_heads * connector.head_dim * 2 * model.config.vision_encoder.width
    found = sum(part.dense for part in forward_flops(model.config, pack_counts([pack])).values())
    assert missing > 0
    with torch.no_grad():
        assert counted(model, pack, backward=False) - found == missing * of_a_patch


@settings(max_examples=300, deadline=None)  # 2 s: sequences are short
@given(seed=st.integers(0, 2**31))
def test_attended_pairs_are_the_rules(seed: int) -> None:
    """Would catch S^2, a branch that pays for its sisters, visual tokens that are only causal, and padding."""
    mask = random_mask(np.random.default_rng(seed), max_tokens=150)
    ids, visual = mask.subsegment_ids[0], mask.is_visual[0]
    rule = allowed(ids.numpy(), visual.numpy())
    assert attended_pairs(ids, visual) == int(rule.sum()) - int((ids == PADDING).sum())


def test_counts_of_packs_add_up_and_leave_padding_out() -> None:
    """Packs of one microbatch, padded for ranks that share it, are counted as packs of two."""
    config = named_config("tiny")
    packs = [random_pack(config, seed, images=seed) for seed in (0, 2)]
    assert pack_counts(packs) == pack_counts(packs[:1]) + pack_counts(packs[1:])
    padded = packs[1] | {
        "subsegment_ids": torch.cat([packs[1]["subsegment_ids"], torch.full((9,), PADDING)]),
        "is_visual": torch.cat([packs[1]["is_visual"], torch.zeros(9, dtype=torch.bool)]),
    }
    assert pack_counts([padded]) == pack_counts(packs[1:])
    assert pack_counts([]) == PackCounts()


def test_4b_as_worked_out_by_hand() -> None:
    """The numbers of the page's head: 4B, 16,384 tokens of one text, 4,096 targets, and 128 crops."""
    length = 16_384
    ids, visual = torch.zeros(length, dtype=torch.int64), torch.zeros(length, dtype=torch.bool)
    pairs = attended_pairs(ids, visual)
    assert pairs == 134_225_920
    config = named_config("4b")
    text = forward_flops(config, PackCounts(tokens=length, attended_pairs=pairs, targets=4_096))
    assert text["decoder"].dense == 119_056_493_445_120
    assert text["decoder"].attention == 79_169_669_038_080
    assert text["head"].dense == 3_186_328_862_720
    assert training_flops(text, WHOLE) == 604_237_474_037_760
    crops = forward_flops(config, PackCounts(crops=128))
    assert crops["vision_encoder"].total == 78_995_807_207_424
    assert crops["vision_encoder"].total / 128 / 1e9 == pytest.approx(617.15, abs=0.01)


def test_what_is_computed_again_stands_apart() -> None:
    """Every second block of 36 is half of them; of 25, thirteen."""
    config = named_config("4b")
    chosen = CheckpointedActivations(vision_encoder=2, connector=True, decoder=2)
    shares = recomputed_shares(config, chosen)
    assert shares == {"vision_encoder": 13 / 25, "decoder": 0.5, "connector": 1.0}
    forward = forward_flops(config, PackCounts(tokens=100, attended_pairs=5050, crops=1, visual_tokens=9))
    expected = 13 / 25 * forward["vision_encoder"].total + forward["connector"].total + forward["decoder"].total / 2
    assert recomputed_flops(forward, shares) == pytest.approx(expected)
    assert recomputed_flops(forward, recomputed_shares(config, CheckpointedActivations())) == 0


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A10G", 70.0),
        ("NVIDIA A10", 125.0),
        ("Tesla T4", None),
    ],
)
def test_peaks_of_gpus(name: str, expected: float | None) -> None:
    """Would catch an A10G taken for an A10, and an unknown GPU that is given some peak."""
    assert peak_flops(name) == (None if expected is None else expected * 1e12)
