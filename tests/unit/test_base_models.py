"""Qwen3, OLMo3 and SigLIP2 as transformers writes them, into our model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from molmo2core.checkpoints.base_models import load_decoder, load_vision_encoder, resampled_positions
from molmo2core.checkpoints.config import InitialWeights
from molmo2core.checkpoints.import_hf import initial_model
from molmo2core.checkpoints.native import our_logits
from molmo2core.checkpoints.weight_files import SINGLE, WeightFiles
from molmo2core.errors import CheckpointError, PlatformError
from molmo2core.model.config import ModelConfig
from molmo2core.model.initialization import build_model, empty_model
from molmo2core.model.molmo2 import Molmo2
from molmo2core.testing.tiny_model import Variant, random_prompt, tiny_config

VARIANTS: list[tuple[Variant, bool]] = [("qwen", False), ("qwen", True), ("olmo", False), ("olmo", True)]


def decoder_config(variant: Variant, *, tied: bool = False) -> ModelConfig:
    config = tiny_config(variant, tied=tied)
    if variant == "olmo":  # the rotary base that transformers' OLMo3 has in its sliding layers, whatever one asks for
        config = replace(config, decoder=replace(config.decoder, rope_theta=500_000.0))
    return config


def base_decoder(config: ModelConfig) -> Any:
    """Its random weights in transformers' own class, sliding windows wider than any test's text."""
    import transformers

    decoder = config.decoder
    sizes = {
        "vocab_size": decoder.vocab_size,
        "hidden_size": decoder.width,
        "intermediate_size": decoder.mlp_width,
        "num_hidden_layers": decoder.num_layers,
        "num_attention_heads": decoder.num_heads,
        "num_key_value_heads": decoder.num_kv_heads,
        "rms_norm_eps": decoder.norm_eps,
        "rope_theta": decoder.rope_theta,
        "tie_word_embeddings": decoder.tie_embeddings,
        "max_position_embeddings": 512,
    }
    torch.manual_seed(0)
    if decoder.norm_placement == "input":
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(head_dim=decoder.head_dim, **sizes))
    else:
        scaling, scaled = decoder.rope_scaling, decoder.rope_scaling_layers
        assert scaling is not None and scaled is not None
        kinds = ["full_attention" if i in scaled else "sliding_attention" for i in range(decoder.num_layers)]
        yarn = {"rope_type": "yarn", "rope_theta": decoder.rope_theta, **asdict(scaling)}
        olmo = transformers.Olmo3Config(layer_types=kinds, sliding_window=512, **sizes)
        olmo.rope_parameters["full_attention"] = yarn
        model = transformers.Olmo3ForCausalLM(olmo)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


@pytest.mark.parametrize(("variant", "tied"), VARIANTS)
def test_base_decoder_computes_what_transformers_computes(variant: Variant, tied: bool, tmp_path: Path) -> None:
    """Several shards.  Would catch OLMo3's norms in the wrong places, which no shape tells, and YaRN on the wrong
    layers.  Compared on text in float32: measured at most 9e-7 of the largest logit, allowed 1e-5."""
    config = decoder_config(variant, tied=tied)
    base = base_decoder(config)
    base.save_pretrained(tmp_path, max_shard_size="300KB")
    assert len(WeightFiles(tmp_path).files) > 1
    model = initial_model(config, InitialWeights(decoder=str(tmp_path)), seed=3, workspace="").eval()
    prompt = random_prompt(config, seed=1, words=40)
    with torch.no_grad():
        ours = our_logits(model, [prompt], pad_id=0)[0]
        theirs = base(torch.from_numpy(prompt.input_ids).long()[None]).logits[0]
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_what_base_models_leave_open_is_drawn_and_nothing_else(tmp_path: Path) -> None:
    """New tokens and connector have the values that they would have alone, whichever part was read.  Would catch a
    generator that the parameters share."""
    config = decoder_config("qwen")
    base_decoder(config).save_pretrained(tmp_path / "decoder")
    siglip(config).save_pretrained(tmp_path / "vision")
    random = build_model(config, seed=3).state_dict()
    decoder, vision = str(tmp_path / "decoder"), str(tmp_path / "vision")
    for weights in (
        InitialWeights(decoder=decoder),
        InitialWeights(vision_encoder=vision),
        InitialWeights(decoder=decoder, vision_encoder=vision),
    ):
        found = initial_model(config, weights, seed=3, workspace="").state_dict()
        for name, value in found.items():
            read = bool(
                (weights.decoder and name.startswith("decoder.") and name != "decoder.embedding.new")
                or (weights.vision_encoder and name.startswith("vision_encoder."))
            )
            norm = name.endswith("norm.weight") and not read
            assert torch.equal(value, random[name]) == (not read), name
            assert value.isfinite().all() and (not norm or bool((value == 1).all()))


def test_a_base_model_without_head_gives_its_embedding(tmp_path: Path) -> None:
    """Qwen3-4B stores no head.  A recipe that unties them starts from two equal matrices."""
    base_decoder(decoder_config("qwen", tied=True)).save_pretrained(tmp_path)
    assert "lm_head.weight" not in WeightFiles(tmp_path).tensors
    untied = initial_model(tiny_config(), InitialWeights(decoder=str(tmp_path)), seed=0, workspace="")
    assert untied.decoder.head is not None
    assert torch.equal(untied.decoder.head, untied.decoder.embedding.base)
    assert untied.decoder.head.data_ptr() != untied.decoder.embedding.base.data_ptr()
    tensors = load_file(tmp_path / SINGLE)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / SINGLE)
    load_decoder(tmp_path, empty_model(tiny_config(tied=True)))
    tensors["lm_head.weight"] += 1
    save_file(tensors, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match="differs from the embedding"):
        load_decoder(tmp_path, empty_model(tiny_config(tied=True)))


def field(name: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        *parents, last = name.split(".")
        for parent in parents:
            config = config[parent]
        if value is None:
            del config[last]
        else:
            config[last] = value

    return change


@pytest.mark.parametrize(
    ("variant", "change", "message"),
    [
        ("qwen", field("model_type", "llama"), "model_type.*'llama'.*'qwen3'"),
        ("qwen", field("model_type", None), "config.json.*no field model_type"),
        ("qwen", field("num_hidden_layers", 4), "num_hidden_layers.*4.*3"),
        ("qwen", field("num_attention_heads", 3), "num_attention_heads"),
        ("qwen", field("rms_norm_eps", 1e-5), "rms_norm_eps"),
        ("qwen", field("hidden_act", "gelu"), "hidden_act"),
        ("qwen", field("rope_parameters.rope_theta", 5e6), "rope_theta.*5000000.*10000"),
        ("qwen", field("rope_parameters", None), "rope_theta"),
        ("qwen", field("rope_parameters.rope_type", "linear"), "rope_type"),
        ("olmo", field("rope_parameters.full_attention.factor", 4.0), "rope_scaling.*factor=4.0"),
        ("olmo", field("rope_parameters.full_attention.beta_fast", None), "no field beta_fast"),
        ("olmo", field("rope_parameters.sliding_attention.rope_theta", 1.0), "rope_theta"),
        ("olmo", field("model_type", "olmo2"), "model_type"),
    ],
)
def test_another_base_decoder_is_refused(
    variant: Variant, change: Callable[[dict[str, Any]], None], message: str, tmp_path: Path
) -> None:
    """What no shape tells.  Would catch the plain Qwen3-4B (rotary base 1e6) in place of Instruct-2507 (5e6)."""
    config = decoder_config(variant)
    base_decoder(config).save_pretrained(tmp_path)
    load_decoder(tmp_path, empty_model(config))
    content = json.loads((tmp_path / "config.json").read_text())
    change(content)
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message):
        load_decoder(tmp_path, empty_model(config))


@pytest.mark.parametrize("variant", ["qwen", "olmo"])
def test_rotary_fields_of_older_files_are_read(variant: Variant, tmp_path: Path) -> None:
    """transformers 4 wrote `rope_theta` and `rope_scaling` at the top level, as the hub's files still have them."""
    config = decoder_config(variant)
    base_decoder(config).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    del content["rope_parameters"]
    yarn = config.decoder.rope_scaling
    content |= {
        "rope_theta": int(config.decoder.rope_theta),
        "rope_scaling": None if yarn is None else {"rope_type": "yarn", **asdict(yarn)},
    }
    (tmp_path / "config.json").write_text(json.dumps(content))
    load_decoder(tmp_path, empty_model(config))


def test_biases_and_other_extras_are_refused(tmp_path: Path) -> None:
    """Would catch a Qwen2, whose projections have biases that would be dropped."""
    base_decoder(decoder_config("qwen")).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / SINGLE) | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(96)}
    save_file(tensors, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=r"q_proj\.bias.*unknown"):
        load_decoder(tmp_path, empty_model(tiny_config()))


def siglip(config: ModelConfig, **changes: Any) -> Any:
    """One block more than is used."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    vision, geometry = config.vision_encoder, config.geometry
    torch.manual_seed(0)
    sizes = {
        "hidden_size": vision.width,
        "intermediate_size": vision.mlp_width,
        "num_hidden_layers": vision.num_declared_layers,
        "num_attention_heads": vision.num_heads,
        "image_size": geometry.crop_size,
        "patch_size": geometry.patch_size,
    }
    model = SiglipVisionModel(SiglipVisionConfig(**sizes | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def vision_model(folder: Path, config: ModelConfig) -> Molmo2:
    return initial_model(config, InitialWeights(vision_encoder=str(folder)), seed=0, workspace="").eval()


def with_prefix(folder: Path) -> None:
    """As a file of both halves holds it: below `vision_model.`, with a text half and a logit scale."""
    tensors = {
        f"vision_model.{name.removeprefix('vision_model.')}": t for name, t in load_file(folder / SINGLE).items()
    }
    tensors |= {"text_model.final_layer_norm.weight": torch.ones(4), "logit_scale": torch.ones(1)}
    save_file(tensors, folder / SINGLE)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({"model_type": "siglip", "text_config": {}, "vision_config": config})
    )


def without_prefix(folder: Path) -> None:
    tensors = {name.removeprefix("vision_model."): t for name, t in load_file(folder / SINGLE).items()}
    save_file(tensors, folder / SINGLE)


@pytest.mark.parametrize("layout", [with_prefix, without_prefix])
@torch.no_grad()
def test_base_vision_encoder_computes_what_transformers_computes(
    layout: Callable[[Path], None], tmp_path: Path
) -> None:
    """SigLIP as transformers writes it, alone and as half of a model.  Would catch a kernel flattened channel first.
    In float32: measured no difference, allowed 1e-5 of the largest feature (other builds sum in another order)."""
    config = tiny_config()
    geometry = config.geometry
    base = siglip(config)
    base.save_pretrained(tmp_path)
    layout(tmp_path)
    model = vision_model(tmp_path, config)
    pixels = torch.randint(0, 256, (2, geometry.grid, geometry.patch_size, geometry.grid, geometry.patch_size, 3))
    crops = pixels.permute(0, 1, 3, 2, 4, 5).reshape(2, geometry.num_patches, -1).to(torch.uint8)
    images = pixels.reshape(2, geometry.crop_size, geometry.crop_size, 3).permute(0, 3, 1, 2)
    ours = model.vision_encoder(crops)
    states = base(images / 127.5 - 1, output_hidden_states=True).hidden_states
    theirs = torch.cat([states[layer + 1] for layer in config.vision_encoder.feature_layers], dim=-1)
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@torch.no_grad()
def test_positions_of_another_grid_are_resampled(tmp_path: Path) -> None:
    """model.md 2.1: bicubic, corners not aligned, antialiased.  Compared with the definition, summed up in float64:
    measured at most 6e-7, allowed 1e-5.  A table of the same grid, or of no square, is left alone."""
    config = tiny_config()
    grid = config.geometry.grid
    base = siglip(config, image_size=config.geometry.patch_size * 12)
    base.save_pretrained(tmp_path)
    found = vision_model(tmp_path, config).vision_encoder.position_embedding
    [stored] = [p for name, p in base.named_parameters() if name.endswith("position_embedding.weight")]
    assert stored.shape[0] == 144
    for side, table in ((12, stored), (27, torch.randn(729, 5)), (4, torch.randn(16, 5))):
        weights = cubic_weights(side, grid)
        image = table.reshape(side, side, -1).double()
        expected = torch.einsum("ir,jc,rcw->ijw", weights, weights, image).flatten(0, 1)
        resampled = resampled_positions(table, grid=grid)
        assert (resampled - expected).abs().max() <= 1e-5
        if side == 12:
            assert torch.equal(found, resampled)
    same = torch.randn(grid * grid, 5)
    assert resampled_positions(same, grid=grid) is same
    assert resampled_positions(same[:15], grid=grid).shape[0] == 15


def cubic_weights(side: int, grid: int) -> torch.Tensor:
    """[grid, side] weights of Keys' kernel (a = -1/2), widened by the step between samples where that exceeds 1."""
    step = side / grid
    centres = (torch.arange(grid, dtype=torch.float64) + 0.5) * step
    distance = (torch.arange(side) + 0.5 - centres[:, None]).abs() / max(step, 1.0)
    near = 1.5 * distance**3 - 2.5 * distance**2 + 1
    far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
    weights = torch.where(distance < 1, near, torch.where(distance < 2, far, torch.zeros_like(far)))
    return weights / weights.sum(dim=1, keepdim=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (field("num_hidden_layers", 2), "num_hidden_layers.*2.*at least 3"),
        (field("num_attention_heads", 2), "num_attention_heads"),
        (field("hidden_act", "gelu"), "hidden_act.*gelu_pytorch_tanh"),
        (field("layer_norm_eps", 1e-5), "layer_norm_eps"),
        (field("patch_size", 14), "patch_size"),
        (field("hidden_size", None), "config.json.*no field hidden_size"),
    ],
)
def test_another_vision_encoder_is_refused(
    change: Callable[[dict[str, Any]], None], message: str, tmp_path: Path
) -> None:
    """What no shape tells: heads and activation."""
    config = tiny_config()
    siglip(config).save_pretrained(tmp_path)
    vision_model(tmp_path, config)
    content = json.loads((tmp_path / "config.json").read_text())
    change(content)
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message):
        vision_model(tmp_path, config)


def test_no_vision_encoder_in_there_is_refused(tmp_path: Path) -> None:
    """A class token is no part of SigLIP2; a decoder is none at all; blocks may be missing in the file alone."""
    config = tiny_config()
    siglip(config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / SINGLE)
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in tensors) else ""
    save_file(tensors | {f"{prefix}embeddings.class_embedding": torch.zeros(64)}, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=r"class_embedding.*unknown"):
        vision_model(tmp_path, config)
    few = {name: tensor for name, tensor in tensors.items() if ".layers.2." not in name}
    save_file(few, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=r"layers\.2.*missing"):
        vision_model(tmp_path, config)
    with pytest.raises(CheckpointError, match="model_type"):
        load_decoder(tmp_path, empty_model(config))
    base_decoder(config).save_pretrained(tmp_path / "decoder")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_vision_encoder(tmp_path / "decoder", empty_model(config))


@pytest.mark.parametrize(
    ("uri", "error"), [("hf://nobody/nothing-here", PlatformError), ("hf://not/a/name", CheckpointError)]
)
def test_hub_failures_are_messages(uri: str, error: type[Exception]) -> None:
    """Without network (conftest.py) a well-formed name is worth another try, a malformed one is the user's to mend."""
    with pytest.raises(error, match="hub"):
        initial_model(tiny_config(), InitialWeights(decoder=uri), seed=0, workspace="")
