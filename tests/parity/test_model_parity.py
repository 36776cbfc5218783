"""Our Molmo2 against transformers' own, on random tiny weights, float32, CPU.

Bounds are absolute: logits have a standard deviation of 1.4 and reach 8.3, gradients of the mean cross-entropy reach
2.4, so 1e-5 is about twenty of float32's last bits.  Largest differences over seven decoders, seven inputs and twenty
seeds of the weights (`python tests/parity/test_model_parity.py 20`; x86, torch 2.7, one thread):

    logits      6.9e-6; of single sequences 0, bit by bit
    gradients   2.6e-6, or 1.4e-5 of a tensor's largest gradient

They are not zero because sums run in another order.  transformers pads a batch to its longest prompt and masks whole
rows, ours attends to each document's own keys; backwards, ours has one matrix each for query-key-value and for up-gate
where transformers adds the gradients of five.
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from molmo2core.checkpoints.hf_config import released_config
from molmo2core.checkpoints.hf_mapping import to_released
from molmo2core.checkpoints.native import native_inputs, native_logits, our_logits
from molmo2core.examples import ROOT, TokenizedExample
from molmo2core.model.attention_sdpa import SHORT
from molmo2core.model.config import ModelConfig, Size, named_config
from molmo2core.model.molmo2 import Molmo2
from molmo2core.model.rope import inverse_frequencies
from molmo2core.testing.native_twin import native_twin
from molmo2core.testing.reference_model import ReferenceModel
from molmo2core.testing.tiny_model import TINY_CONFIGS, branch_alone, random_model, random_prompt, random_tree
from molmo2core.testing.tiny_tokenizer import tiny_tokenizer
from molmo2core.testing.wrong_models import WRONG

TOLERANCE = 1e-5
"""Absolute, of logits and of gradients."""
SHARE = 3e-5
"""Of a tensor's largest gradient: the bound for tensors whose gradients are small."""
PAD = tiny_tokenizer().special.pad
TREE_TOLERANCE = 3e-5
"""Branches stand in a longer sequence than the conversations that they are; measured 6.2e-6 over 60 trees."""
SEED = 3


class Pair(NamedTuple):
    """Our model and transformers', with the same weights."""

    ours: Molmo2
    native: Any


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """One for each tiny decoder."""
    return {kind: make_pair(kind, SEED, tmp_path_factory.mktemp(kind)) for kind in TINY_CONFIGS}


def make_pair(kind: str, seed: int, folder: Path) -> Pair:
    model = random_model(TINY_CONFIGS[kind], seed=seed)
    return Pair(model, native_twin(model, folder))


Inputs = Callable[[ModelConfig], list[TokenizedExample]]


def text(config: ModelConfig) -> list[TokenizedExample]:
    return [random_prompt(config, seed=1, words=100)]


def image(config: ModelConfig) -> list[TokenizedExample]:
    return [random_prompt(config, seed=2, images=1)]


def several_images(config: ModelConfig) -> list[TokenizedExample]:
    return [random_prompt(config, seed=3, images=4)]


def video(config: ModelConfig) -> list[TokenizedExample]:
    return [random_prompt(config, seed=4, frames=5)]


def padded_batch(config: ModelConfig) -> list[TokenizedExample]:
    return [
        random_prompt(config, seed=5, images=2),
        random_prompt(config, seed=6, words=30),
        random_prompt(config, seed=7, images=1, words=3),
    ]


def mixed_windows(config: ModelConfig) -> list[TokenizedExample]:
    """Windows of four and of nine patches in one call.  transformers refuses images with videos, but not this."""
    return [random_prompt(config, seed=8, images=2, frames=2), random_prompt(config, seed=9, frames=1)]


def long_document(config: ModelConfig) -> list[TokenizedExample]:
    """Longer than what attention_sdpa computes at once."""
    return [random_prompt(config, seed=10, images=3, words=SHORT)]


INPUTS = (text, image, several_images, video, padded_batch, mixed_windows, long_document)


def largest(tensors: list[Tensor]) -> float:
    return max(float(tensor.abs().max()) for tensor in tensors)


def difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    return largest([a - b for a, b in zip(ours, theirs, strict=True)])


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("kind", TINY_CONFIGS)
@torch.no_grad()
def test_logits(pairs: dict[str, Pair], kind: str, inputs: Inputs) -> None:
    """Would catch any wrong norm, rotary table, feature layer, pooling mask, merge or attention mask."""
    ours, theirs = both_logits(pairs[kind], inputs)
    assert difference(ours, theirs) <= TOLERANCE
    assert torch.cat(theirs).std() > 1  # else an absolute bound would say little


def both_logits(pair: Pair, inputs: Inputs) -> tuple[list[Tensor], list[Tensor]]:
    prompts = inputs(pair.ours.config)
    return (
        our_logits(pair.ours, prompts, pad_id=PAD),
        native_logits(pair.native, prompts, pad_id=PAD, video=inputs is video),
    )


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("kind", TINY_CONFIGS)
def test_gradients(pairs: dict[str, Pair], kind: str, inputs: Inputs) -> None:
    """Every parameter's gradient of a cross-entropy.  Would catch a detached branch, gradients through clamped or
    masked patches, and a tied head that learns on one side only."""
    compared = 0
    for name, ours, theirs in both_gradients(pairs[kind], inputs):
        bound = TOLERANCE
        if not ALWAYS_ZERO.fullmatch(name):
            bound = min(bound, SHARE * float(theirs.abs().max()))
        assert (ours - theirs).abs().max() <= bound, name
        compared += bool(theirs.any())
    assert compared >= (26 if inputs is text else 80)


ALWAYS_ZERO = re.compile(r"(vision_encoder\.blocks\.\d+|connector)\.key\.bias")
"""A softmax ignores a shift of all its inputs: these gradients are rounding around zero."""


def both_gradients(pair: Pair, inputs: Inputs) -> list[tuple[str, Tensor, Tensor]]:
    """Name, our gradient and transformers' of each parameter; zeros for what took no part."""
    for model in pair:
        model.zero_grad(set_to_none=True)
    for logits in both_logits(pair, inputs):
        joined = torch.cat(logits)
        targets = torch.randint(0, joined.shape[1], joined.shape[:1], generator=torch.Generator().manual_seed(0))
        F.cross_entropy(joined, targets).backward()
    rows = []
    for name, parameter in pair.ours.named_parameters():
        theirs = native_gradient(pair.native, name, pair.ours.config)
        zero = torch.zeros_like(parameter)
        rows.append((name, zero if parameter.grad is None else parameter.grad, zero if theirs is None else theirs))
    return rows


def native_gradient(native: Any, name: str, config: ModelConfig) -> Tensor | None:
    """Gradient of our parameter `name` in transformers' model: the right column of model.md 3.3."""
    gradients = {key: parameter.grad for key, parameter in native.named_parameters()}
    size = config.decoder.vocab_size
    embedding = gradients["model.language_model.embed_tokens.weight"]
    if name == "decoder.embedding.new":
        return embedding[size:]  # type: ignore[no-any-return]
    if name == "decoder.embedding.base":
        both = config.decoder.tie_embeddings
        return embedding[:size] + gradients["lm_head.weight"] if both else embedding[:size]  # type: ignore[no-any-return]
    if fused := re.fullmatch(r"decoder\.stack\.blocks\.(\d+)\.(attention\.query_key_value|mlp\.up_gate)\.weight", name):
        layer = f"model.language_model.layers.{fused[1]}."
        parts = ("mlp.up", "mlp.gate") if fused[2] == "mlp.up_gate" else ("self_attn.q", "self_attn.k", "self_attn.v")
        return torch.cat([gradients[f"{layer}{part}_proj.weight"] for part in parts])
    for ours, theirs in NATIVE_NAMES:
        renamed, count = re.subn(f"^{ours}", theirs, name)
        if count:
            return gradients[renamed]
    raise AssertionError(name)


NATIVE_NAMES = (
    (r"decoder\.head$", "lm_head.weight"),
    (r"decoder\.norm", "model.language_model.norm"),
    (r"decoder\.stack\.blocks\.(\d+)\.attention_norm", r"model.language_model.layers.\1.input_layernorm"),
    (r"decoder\.stack\.blocks\.(\d+)\.mlp_norm", r"model.language_model.layers.\1.post_attention_layernorm"),
    (r"decoder\.stack\.blocks\.(\d+)\.attention\.query_norm", r"model.language_model.layers.\1.self_attn.q_norm"),
    (r"decoder\.stack\.blocks\.(\d+)\.attention\.key_norm", r"model.language_model.layers.\1.self_attn.k_norm"),
    (r"decoder\.stack\.blocks\.(\d+)\.attention\.out", r"model.language_model.layers.\1.self_attn.o_proj"),
    (r"decoder\.stack\.blocks\.(\d+)\.mlp\.down", r"model.language_model.layers.\1.mlp.down_proj"),
    (r"vision_encoder\.position_embedding", "model.vision_tower.positional_embedding"),
    (r"vision_encoder\.patch_embedding", "model.vision_tower.patch_embedding"),
    (r"vision_encoder\.blocks\.(\d+)\.attention_norm", r"model.vision_tower.layers.\1.layer_norm1"),
    (r"vision_encoder\.blocks\.(\d+)\.mlp_norm", r"model.vision_tower.layers.\1.layer_norm2"),
    (r"vision_encoder\.blocks\.(\d+)\.query", r"model.vision_tower.layers.\1.self_attn.q_proj"),
    (r"vision_encoder\.blocks\.(\d+)\.key", r"model.vision_tower.layers.\1.self_attn.k_proj"),
    (r"vision_encoder\.blocks\.(\d+)\.value", r"model.vision_tower.layers.\1.self_attn.v_proj"),
    (r"vision_encoder\.blocks\.(\d+)\.attention_out", r"model.vision_tower.layers.\1.self_attn.o_proj"),
    (r"vision_encoder\.blocks\.(\d+)\.mlp_in", r"model.vision_tower.layers.\1.mlp.fc1"),
    (r"vision_encoder\.blocks\.(\d+)\.mlp_out", r"model.vision_tower.layers.\1.mlp.fc2"),
    (r"connector\.pool_out", "model.multi_modal_projector.image_pooling_2d.o_proj"),
    (r"connector\.query", "model.multi_modal_projector.image_pooling_2d.q_proj"),
    (r"connector\.key", "model.multi_modal_projector.image_pooling_2d.k_proj"),
    (r"connector\.value", "model.multi_modal_projector.image_pooling_2d.v_proj"),
    (r"connector\.(gate|up|down)", r"model.multi_modal_projector.image_projector.\1_proj"),
)


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("kind", ["qwen", "olmo"])
@torch.no_grad()
def test_bfloat16(pairs: dict[str, Pair], kind: str, inputs: Inputs) -> None:
    """All weights bfloat16.  Would catch casts in another order, which float32 cannot show: in a norm, in the rotary
    table, in the mean of a window, or pixels normalised after the cast, which gave differences of 0.16 to 1.0.

    Tolerance: over seven decoders and ten seeds single sequences were equal bit by bit; in batches single roundings
    differ, and logits by up to 0.0625, two of their last bits.
    """
    pair = copy.deepcopy(pairs[kind])
    for model in pair:
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()  # `model.bfloat16()` would round transformers' frequencies too
    ours, theirs = both_logits(pair, inputs)
    assert ours[0].dtype == theirs[0].dtype == torch.bfloat16
    assert difference(ours, theirs) <= 0.1


@pytest.mark.parametrize("kind", ["qwen", "olmo"])
@torch.no_grad()
def test_long_positions(pairs: dict[str, Pair], kind: str) -> None:
    """The last of 36,864 positions.  Would catch rotary frequencies that differ in their last bit only: computed in
    float64 and rounded once, they gave logits that differ by up to 0.004 with heads of 128."""
    model, native = pairs[kind]
    (prompt,) = several_images(model.config)
    prompt = replace(prompt, position_ids=prompt.position_ids + 36_864 - len(prompt.position_ids))
    (ours,) = our_logits(model, [prompt], pad_id=PAD)
    positions = torch.from_numpy(prompt.position_ids).long()[None]
    inputs = native_inputs([prompt], pad_id=PAD, video=False)
    theirs = native(**inputs, position_ids=positions, use_cache=False).logits[0]
    assert difference([ours], [theirs]) <= TOLERANCE


@pytest.mark.parametrize("size", ["4b", "8b", "o-7b"])
def test_rotary_frequencies_bit_by_bit(size: Size) -> None:
    """Of the released sizes, where the test above would need their width."""
    from transformers import Molmo2Config
    from transformers.models.molmo2.modeling_molmo2 import Molmo2RotaryEmbedding

    config = named_config(size)
    released = released_config(config, tiny_tokenizer().special, dtype="float32")
    theirs = Molmo2RotaryEmbedding(Molmo2Config(**released).text_config)
    decoder = config.decoder
    ours = inverse_frequencies(decoder.head_dim, decoder.rope_theta, decoder.rope_scaling)
    assert torch.equal(ours, theirs.inv_freq)
    assert theirs.attention_scaling == (decoder.rope_scaling.attention_factor if decoder.rope_scaling else 1.0)


@pytest.mark.parametrize("kind", ["qwen", "olmo"])
@torch.no_grad()
def test_branches_of_a_tree_are_conversations(pairs: dict[str, Pair], kind: str) -> None:
    """transformers knows no trees, but what each branch should compute: the conversation that it is.  More trees, and
    packs of them, are in tests/property/test_packs_equal_examples.py."""
    model, native = pairs[kind]
    tree = random_tree(model.config, seed=5, images=2, branches=(9, 7, 11))
    (logits,) = our_logits(model, [tree], pad_id=PAD)
    for branch in range(3):
        (theirs,) = native_logits(native, [branch_alone(tree, branch)], pad_id=PAD, video=False)
        kept = torch.from_numpy((tree.subsegment_ids == ROOT) | (tree.subsegment_ids == branch))
        assert difference([logits[kept]], [theirs]) <= TREE_TOLERANCE


NOT_IN_ONE_CONVERSATION = ("PositionsGoOn", "BranchesSeeEachOther", "ImagesSeeOtherExamples")


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        pytest.param(kind, wrong, id=f"{number}-{kind}-{wrong.__name__}")
        for number, kind, wrong in (*(("right", kind, ReferenceModel) for kind in TINY_CONFIGS), *WRONG)
        if wrong.__name__ not in NOT_IN_ONE_CONVERSATION
    ],
)
@torch.no_grad()
def test_transformers_is_none_of_the_wrong_models(
    pairs: dict[str, Pair], kind: str, wrong: type[ReferenceModel]
) -> None:
    """Negative controls: these inputs tell transformers' model from every known mistake (model.md 8.1), while the
    description in numpy and float64 agrees with it.  Bounds as in tests/unit/test_model_goldens.py."""
    model, native = pairs[kind]
    prompts = mixed_windows(model.config)[:1]
    weights = {name: tensor.numpy() for name, tensor in to_released(model.state_dict(), model.config)}
    (theirs,) = native_logits(native, prompts, pad_id=PAD, video=False)
    off = np.abs(wrong(weights, model.config).logits(prompts[0]) - theirs.numpy()).max()
    assert off <= 2e-4 if wrong is ReferenceModel else off >= 2e-3


def measure(num_seeds: int) -> None:
    """Print the numbers of this file's docstring."""
    logits, gradients, shares, single, scale = [], [], [], [], []
    for seed, kind in product(range(num_seeds), TINY_CONFIGS):
        with TemporaryDirectory() as folder:
            pair = make_pair(kind, seed, Path(folder))
        for inputs in INPUTS:
            with torch.no_grad():
                ours, theirs = both_logits(pair, inputs)
            logits.append(difference(ours, theirs))
            single += logits[-1:] if len(ours) == 1 else []
            scale.append(largest(theirs))
            for name, ours_gradient, theirs_gradient in both_gradients(pair, inputs):
                gradients.append(difference([ours_gradient], [theirs_gradient]))
                if theirs_gradient.any() and not ALWAYS_ZERO.fullmatch(name):
                    shares.append(gradients[-1] / largest([theirs_gradient]))
    print(f"logits {max(logits):.2g} (largest {max(scale):.2g}), of single sequences {max(single):.2g}")
    print(f"gradients {max(gradients):.2g}, of a tensor's largest {max(shares):.2g}")


if __name__ == "__main__":
    measure(int(sys.argv[1]))
