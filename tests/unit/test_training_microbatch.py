"""Merging packs, the dummy crop, padding and shares of targets change no loss and no gradient."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from molmo2core.examples import DOCUMENT, PADDING
from molmo2core.model.attention import AttentionMask
from molmo2core.model.loss import weighted_loss
from molmo2core.model.molmo2 import Molmo2
from molmo2core.testing.tiny_model import tiny_model
from molmo2core.testing.training import Pack, as_batch, random_pack
from molmo2core.training.config import DropoutConfig
from molmo2core.training.microbatch import Microbatch, MicrobatchMaker, NoCopy, merge_packs, with_visual_input

NO_DROPOUT = DropoutConfig()


@pytest.fixture(scope="module")
def model() -> Molmo2:
    return tiny_model()


def packs_of(model: Molmo2) -> list[Pack]:
    """Odd lengths, two images, none, one; a tree and a text in each."""
    return [
        random_pack(model.config, seed, tokens=40 + seed, images=images) for seed, images in ((1, 2), (2, 0), (3, 1))
    ]


def loss_and_gradients(model: Molmo2, microbatches: list[Microbatch]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    total = 0.0
    for batch in microbatches:
        hidden = model(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            mask=AttentionMask(batch["subsegment_ids"], batch["is_visual"]),
            crops=batch["crops"],
            pooling=batch["pooling"],
        )
        parts = weighted_loss(hidden[0], model.decoder.head_weight, batch["target_ids"], batch["loss_weights"], 1e-4)
        parts.total.backward()
        total += float(parts.total)
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_merged_packs_give_the_loss_and_gradients_of_single_packs(model: Molmo2) -> None:
    """Would catch documents of two packs that see each other, and pooling that points into another pack's crops.

    Tolerance: float32 sums in another order; measured 4e-6 on gradients up to 8.
    """
    maker = MicrobatchMaker(im_patch_id=model.im_patch_id, dropout=NO_DROPOUT)
    batch = as_batch(packs_of(model))
    single, merged = maker.split(batch, 1), maker.split(batch, 3)
    assert (len(single), len(merged)) == (3, 1)
    assert len(merged[0]["subsegment_ids"].div(DOCUMENT, rounding_mode="floor").unique()) == 6
    loss, gradients = loss_and_gradients(model, single)
    merged_loss, merged_gradients = loss_and_gradients(model, merged)
    assert merged_loss == pytest.approx(loss, rel=1e-6)
    assert merged_gradients.keys() == gradients.keys() == dict(model.named_parameters()).keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(merged_gradients[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_wrongly_merged_packs_would_be_noticed(model: Molmo2) -> None:
    """The test above can fail: if documents see each other, the loss is another."""
    right = merge_packs(packs_of(model))
    wrong = right | {"subsegment_ids": right["subsegment_ids"] % DOCUMENT}
    maker = MicrobatchMaker(im_patch_id=model.im_patch_id, dropout=NO_DROPOUT)
    losses = [loss_and_gradients(model, [maker.make([pack])])[0] for pack in (right, wrong)]
    assert abs(losses[0] - losses[1]) > 1e-2


def test_a_dummy_crop_reaches_every_vision_parameter_with_zero_gradient(model: Molmo2) -> None:
    """Would catch a pack without images that leaves the vision encoder out: FSDP ranks would hang."""
    pack = random_pack(model.config, 5, images=0)
    maker = MicrobatchMaker(im_patch_id=model.im_patch_id, dropout=NO_DROPOUT)
    batch = maker.make([pack])
    assert batch["crops"].shape[0] == batch["pooling"].shape[0] == 1
    loss, gradients = loss_and_gradients(model, [batch])
    vision = [name for name, _ in model.named_parameters() if name.startswith(("vision_encoder.", "connector."))]
    assert vision and all(name in gradients and not gradients[name].any() for name in vision)
    bare = copy.deepcopy(batch)
    length = pack["input_ids"].shape[0]
    for name in ("input_ids", "position_ids", "subsegment_ids", "is_visual"):
        bare[name] = batch[name][:, :length]  # type: ignore[literal-required]
    bare["crops"], bare["pooling"] = pack["crops"], pack["pooling"]
    bare["target_ids"], bare["loss_weights"] = pack["target_ids"], pack["loss_weights"]
    assert loss == pytest.approx(loss_and_gradients(model, [bare])[0], rel=1e-6)


def test_plain_text_stays_plain_causal(model: Molmo2) -> None:
    """Would catch a dummy crop, or a root with its one branch, that keeps flash-attn from every batch of training."""
    maker = MicrobatchMaker(im_patch_id=model.im_patch_id, dropout=NO_DROPOUT, context_size=2)
    batch = maker.make([random_pack(model.config, seed, tokens=43, images=0, branches=1) for seed in (1, 2)])
    assert batch["is_visual"].any() and (batch["subsegment_ids"] == PADDING).any()
    assert AttentionMask(batch["subsegment_ids"], batch["is_visual"]).is_plain_causal


def test_compiled_blocks_get_every_pass_in_one_length(model: Molmo2) -> None:
    """Would catch a program per length of pack, and padding that is trained on."""
    maker = MicrobatchMaker(im_patch_id=model.im_patch_id, dropout=NO_DROPOUT)
    padding = MicrobatchMaker(im_patch_id=model.im_patch_id, dropout=NO_DROPOUT, tokens_per_pack=64)
    packs = [random_pack(model.config, seed, tokens=40 + seed, images=seed % 2) for seed in range(4)]
    plain, padded = ([maker.make(packs[start : start + 2]) for start in (0, 2)] for maker in (maker, padding))
    assert {batch["input_ids"].shape[1] for batch in plain} == {81, 85}
    assert {batch["input_ids"].shape[1] for batch in padded} == {128}
    for short, long in zip(plain, padded, strict=True):
        loss, gradients = loss_and_gradients(model, [short])
        same, others = loss_and_gradients(model, [long])
        assert same == pytest.approx(loss, rel=1e-6)
        for name, gradient in gradients.items():
            torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_a_pack_with_images_is_left_alone(model: Molmo2) -> None:
    pack = random_pack(model.config, 1, images=1)
    assert with_visual_input(pack, model.im_patch_id) is pack


@pytest.mark.parametrize("size", [2, 3])
def test_shares_of_targets_cover_an_odd_sequence_once(model: Molmo2, size: int) -> None:
    """Would catch targets counted on no rank or on two, and padding that carries weight."""
    pack = random_pack(model.config, 7, tokens=43)
    makers = [
        MicrobatchMaker(im_patch_id=model.im_patch_id, dropout=NO_DROPOUT, context_rank=rank, context_size=size)
        for rank in range(size)
    ]
    shares = [maker.make([pack]) for maker in makers]
    length = shares[0]["input_ids"].shape[1]
    assert length % size == 0 and length - 43 < size
    assert torch.cat([share["target_ids"] for share in shares])[:43].equal(pack["target_ids"])
    assert torch.cat([share["loss_weights"] for share in shares])[:43].equal(pack["loss_weights"])
    assert not torch.cat([share["loss_weights"] for share in shares])[43:].any()
    assert (shares[0]["subsegment_ids"][0, 43:] == PADDING).all()
    assert sum(share["loss_weight"] for share in shares) == pytest.approx(float(pack["loss_weights"].sum()))


def test_dropout_follows_what_a_token_predicts(model: Molmo2) -> None:
    """The configured meaning, unlike the published code's (training_and_evaluation.md 1.6)."""
    pack = random_pack(model.config, 1)
    dropout = DropoutConfig(residual=0.25, response_residual=0.5)
    probabilities = MicrobatchMaker(im_patch_id=model.im_patch_id, dropout=dropout).make([pack])["token_dropout"]
    assert probabilities is not None
    predicts = pack["loss_weights"] > 0
    assert predicts.any() and not predicts.all()
    assert (probabilities[0, predicts] == 0.5).all() and (probabilities[0, ~predicts] == 0.25).all()
    assert MicrobatchMaker(im_patch_id=model.im_patch_id, dropout=NO_DROPOUT).make([pack])["token_dropout"] is None


@pytest.mark.parametrize("residual", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("response", [0.0, 0.1, 0.2])
def test_official_compat_is_the_published_rule(model: Molmo2, residual: float, response: float) -> None:
    """(training_and_evaluation.md 1.6), for any two rates: the branch with a mask only runs when the response rate is
    above 0, else the residual rate is for every token.  Which is why one switch does, and no second pair of rates."""
    pack = random_pack(model.config, 1)
    dropout = DropoutConfig(residual=residual, response_residual=response, official_compat=True)
    made = MicrobatchMaker(im_patch_id=model.im_patch_id, dropout=dropout).make([pack])
    mask = (pack["loss_weights"] > 0).float()
    rule = mask * response + (1 - mask) * residual if response > 0 else torch.full_like(mask, residual)
    found = torch.zeros_like(mask) if made["token_dropout"] is None else made["token_dropout"][0]
    torch.testing.assert_close(found, rule)


def test_dropout_is_that_of_the_pack(model: Molmo2) -> None:
    """Merged, alone, with a token added for ranks without images: keys follow a pack's number, not its place."""
    packs = packs_of(model)
    maker = MicrobatchMaker(im_patch_id=model.im_patch_id, dropout=DropoutConfig(residual=0.1), seed=3)
    merged = maker.split(as_batch(packs, [7, 9, 8]), 3)[0]
    single = maker.split(as_batch(packs, [7, 9, 8]), 1)
    alone = maker.make(packs[1:2], numbers=[9])
    assert single[1]["dropout_keys"].equal(alone["dropout_keys"])
    lengths = [len(pack["input_ids"]) for pack in packs]
    starts = [0, lengths[0], lengths[0] + lengths[1]]
    for start, length, made in zip(starts, lengths, single, strict=True):
        keys = made["dropout_keys"][0, :length]
        assert merged["dropout_keys"][0, start : start + length].equal(keys)
    assert len(merged["dropout_keys"][0].unique()) == sum(lengths)
    other = replace(maker, seed=4).make(packs[1:2], numbers=[9])
    assert not other["dropout_keys"].equal(alone["dropout_keys"])


def test_composer_copies_no_pixels(model: Molmo2) -> None:
    """Composer deep-copies every microbatch on the device; a plain dict would be copied."""
    pack = random_pack(model.config, 1)
    assert copy.deepcopy(NoCopy(pack))["crops"] is pack["crops"]
    assert copy.deepcopy(dict(pack))["crops"] is not pack["crops"]
