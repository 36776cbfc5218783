"""Our Molmo2 against transformers' own, on random tiny weights, float32, CPU.

Tolerances: over all variants and inputs and ten seeds of the model, the largest difference measured was 2.0e-6 of the
largest logit, and 5.5e-6 of a tensor's largest gradient (x86, torch 2.7, one thread).  Allowed is 1e-5 and 2e-5: other
builds sum in another order.  The negative controls at the end differ by more than 0.7.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from molmo2core.checkpoints.hf_config import released_config
from molmo2core.checkpoints.hf_mapping import to_released
from molmo2core.checkpoints.native import load_native, native_logits, our_logits
from molmo2core.checkpoints.processor_files import write_json
from molmo2core.checkpoints.weight_files import write_weights
from molmo2core.examples import TokenizedExample
from molmo2core.model.config import ModelConfig
from molmo2core.model.molmo2 import Molmo2
from molmo2core.testing.tiny_model import Variant, random_prompt, tiny_model
from molmo2core.testing.tiny_tokenizer import tiny_tokenizer

LOGIT_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 2e-5
SPECIAL = tiny_tokenizer().special

Pair = tuple[Molmo2, Any]
"""Our model and transformers', with the same weights."""


@pytest.fixture(scope="module", params=[("qwen", False), ("qwen", True), ("olmo", False), ("olmo", True)], ids=str)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    variant, tied = request.param
    return make_pair(tiny_model(3, variant, tied=tied), tmp_path_factory.mktemp("released"))


def make_pair(model: Molmo2, folder: Path) -> Pair:
    write_json(folder / "config.json", released_config(model.config, SPECIAL, dtype="float32"))
    write_weights(folder, to_released(model.state_dict(), model.config), 10**9)
    return model, load_native(folder)


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


INPUTS = (text, image, several_images, video, padded_batch)
Inputs = Callable[[ModelConfig], list[TokenizedExample]]


def relative_difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    largest = max(float(tensor.abs().max()) for tensor in theirs)
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)) / largest


@pytest.mark.parametrize("inputs", INPUTS)
@torch.no_grad()
def test_logits(pair: Pair, inputs: Inputs) -> None:
    """Would catch any wrong norm, rotary table, feature layer, pooling mask, merge or attention mask."""
    model, native = pair
    prompts = inputs(model.config)
    ours = our_logits(model, prompts, pad_id=SPECIAL.pad)
    theirs = native_logits(native, prompts, pad_id=SPECIAL.pad, video=inputs is video)
    assert relative_difference(ours, theirs) <= LOGIT_TOLERANCE


@pytest.mark.parametrize("inputs", INPUTS)
def test_gradients(pair: Pair, inputs: Inputs) -> None:
    """Every parameter's gradient of a cross-entropy.  Would catch a detached branch, gradients through clamped or
    masked patches, and a tied head that learns on one side only."""
    model, native = pair
    prompts = inputs(model.config)
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(
        0, model.config.decoder.vocab_size, (sum(len(p.input_ids) for p in prompts),), generator=generator
    )
    model.zero_grad(set_to_none=True)
    native.zero_grad(set_to_none=True)
    F.cross_entropy(torch.cat(our_logits(model, prompts, pad_id=SPECIAL.pad)), targets).backward()
    theirs = native_logits(native, prompts, pad_id=SPECIAL.pad, video=inputs is video)
    F.cross_entropy(torch.cat(theirs), targets).backward()
    compared = 0
    for name, parameter in model.named_parameters():
        expected = native_gradient(native, name, model.config)
        if expected is None or not expected.any():  # no visual input: neither side may have a gradient there
            assert parameter.grad is None or not parameter.grad.any(), name
            continue
        assert parameter.grad is not None, name
        if re.fullmatch(r"(vision_encoder\.blocks\.\d+|connector)\.key\.bias", name):
            continue  # softmax ignores a shift of all its inputs: the gradient is rounding around zero
        assert relative_difference([parameter.grad], [expected]) <= GRADIENT_TOLERANCE, name
        compared += 1
    assert compared > (20 if inputs is text else 65)


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


def causal_only(model: Molmo2, prompts: list[TokenizedExample]) -> list[TokenizedExample]:
    return [replace(prompt, is_visual=prompt.is_visual & False) for prompt in prompts]


def other_layers_scaled(model: Molmo2, prompts: list[TokenizedExample]) -> list[TokenizedExample]:
    model.decoder.stack.config = replace(model.config.decoder, rope_scaling_layers=(1,))
    return prompts


def gate_and_up_swapped(model: Molmo2, prompts: list[TokenizedExample]) -> list[TokenizedExample]:
    matrix = model.decoder.stack.blocks[0].mlp.up_gate.weight
    matrix.copy_(torch.cat(matrix.chunk(2)[::-1]))
    return prompts


def features_in_other_order(model: Molmo2, prompts: list[TokenizedExample]) -> list[TokenizedExample]:
    model.vision_encoder.feature_layers = model.vision_encoder.feature_layers[::-1]
    return prompts


@pytest.mark.parametrize(
    ("variant", "spoil"),
    [
        ("qwen", causal_only),
        ("olmo", other_layers_scaled),
        ("qwen", gate_and_up_swapped),
        ("qwen", features_in_other_order),
    ],
)
@torch.no_grad()
def test_these_inputs_tell_wrong_models_apart(variant: Variant, spoil: Callable[..., Any], tmp_path: Path) -> None:
    """Negative controls: the known traps of model.md 8.1, each on our side alone, are far above the tolerance."""
    model, native = make_pair(tiny_model(3, variant), tmp_path)
    prompts = several_images(model.config)
    spoiled = copy.deepcopy(model)
    ours = our_logits(spoiled, spoil(spoiled, prompts), pad_id=SPECIAL.pad)
    theirs = native_logits(native, prompts, pad_id=SPECIAL.pad, video=False)
    assert relative_difference(ours, theirs) > 0.1
