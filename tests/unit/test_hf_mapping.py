"""Names, shapes and configuration of the released format, and importing from it and from base models."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from molmo2core.checkpoints import hf_mapping
from molmo2core.checkpoints.config import ExportConfig, InitialWeights
from molmo2core.checkpoints.export_hf import Lineage, export_model
from molmo2core.checkpoints.hf_config import (
    model_config,
    model_config_from_json,
    model_config_to_json,
    read_model_config,
    released_config,
    same_model,
)
from molmo2core.checkpoints.import_hf import import_released, initial_model, load_decoder, load_vision_encoder
from molmo2core.checkpoints.reference import load_weights, save_weights
from molmo2core.checkpoints.weight_files import INDEX, WeightFiles, write_weights
from molmo2core.errors import CheckpointError, PlatformError, RecipeError
from molmo2core.model.config import ModelConfig, Size, named_config
from molmo2core.preprocessing.config import PreprocessingConfig
from molmo2core.sources.shapes_tokenizer import save_tokenizer
from molmo2core.testing.tiny_model import Variant, tiny_config, tiny_model
from molmo2core.testing.tiny_tokenizer import tiny_tokenizer

IMAGE = {"overlap_margins": [1, 1], "pooling_size": [2, 2]}
VIDEO = {"pooling_size": [3, 3]}
VARIANTS: list[tuple[Variant, bool]] = [("qwen", False), ("qwen", True), ("olmo", False)]


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The table of model.md 3.3, written out a second time: names and shapes, without our names."""
    text, vit, pool = config.decoder, config.vision_encoder, config.connector
    query, key = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    per_head = text.qk_norm == "per_head"
    shapes: dict[str, tuple[int, ...]] = {
        "model.transformer.wte.embedding": (text.vocab_size, text.width),
        "model.transformer.wte.new_embedding": (128, text.width),
        "model.transformer.ln_f.weight": (text.width,),
        "lm_head.weight": (text.vocab_size, text.width),
    }
    for i in range(text.num_layers):
        block = f"model.transformer.blocks.{i}."
        shapes |= {
            f"{block}attn_norm.weight": (text.width,),
            f"{block}ff_norm.weight": (text.width,),
            f"{block}self_attn.att_proj.weight": (query + 2 * key, text.width),
            f"{block}self_attn.attn_out.weight": (text.width, query),
            f"{block}self_attn.q_norm.weight": (text.head_dim if per_head else query,),
            f"{block}self_attn.k_norm.weight": (text.head_dim if per_head else key,),
            f"{block}mlp.ff_proj.weight": (2 * text.mlp_width, text.width),
            f"{block}mlp.ff_out.weight": (text.width, text.mlp_width),
        }
    backbone = "model.vision_backbone."
    shapes |= {
        f"{backbone}image_vit.positional_embedding": (config.geometry.num_patches, vit.width),
        f"{backbone}image_vit.patch_embedding.weight": (vit.width, config.geometry.patch_bytes),
        f"{backbone}image_vit.patch_embedding.bias": (vit.width,),
        f"{backbone}image_projector.w1.weight": (pool.mlp_width, pool.width),
        f"{backbone}image_projector.w3.weight": (pool.mlp_width, pool.width),
        f"{backbone}image_projector.w2.weight": (text.width, pool.mlp_width),
    }
    for name in ("wq", "wk", "wv", "wo"):
        inputs = pool.width if name == "wo" else len(vit.feature_layers) * vit.width
        shapes[f"{backbone}image_pooling_2d.{name}.weight"] = (pool.width, inputs)
        shapes[f"{backbone}image_pooling_2d.{name}.bias"] = (pool.width,)
    for j in range(max(vit.feature_layers) + 1):
        block = f"{backbone}image_vit.transformer.resblocks.{j}."
        for name in ("wq", "wk", "wv", "wo"):
            shapes[f"{block}attention.{name}.weight"] = (vit.width, vit.width)
            shapes[f"{block}attention.{name}.bias"] = (vit.width,)
        for name in ("attention_norm", "ffn_norm"):
            shapes[f"{block}{name}.weight"] = shapes[f"{block}{name}.bias"] = (vit.width,)
        shapes[f"{block}feed_forward.w1.weight"] = (vit.mlp_width, vit.width)
        shapes[f"{block}feed_forward.w1.bias"] = (vit.mlp_width,)
        shapes[f"{block}feed_forward.w2.weight"] = (vit.width, vit.mlp_width)
        shapes[f"{block}feed_forward.w2.bias"] = (vit.width,)
    return shapes


@pytest.mark.parametrize("size", get_args(Size))
def test_names_and_shapes_are_those_of_the_released_files(size: Size) -> None:
    """Would catch a misspelt name, a head dimension computed from width / heads, a block too many."""
    config = named_config(size)
    assert hf_mapping.released_shapes(config) == expected_shapes(config)
    assert hf_mapping.num_tensors(config) == len(expected_shapes(config))


@pytest.mark.parametrize(
    ("size", "tensors", "values"),
    [("4b", 706, 4_850_869_200), ("8b", 706, 8_661_703_120), ("o-7b", 674, 7_760_786_896)],
)
def test_released_sizes_have_the_published_numbers(size: Size, tensors: int, values: int) -> None:
    """model.md 1.5.  Would catch any wrong width, and a tied head that is not stored."""
    shapes = hf_mapping.released_shapes(named_config(size))
    assert len(shapes) == tensors
    assert sum(math.prod(shape) for shape in shapes.values()) == values


@pytest.mark.parametrize(("variant", "tied"), VARIANTS)
def test_mapping_is_a_bijection(variant: Variant, tied: bool) -> None:
    """Every parameter goes out once and comes back bit by bit.  Would catch query/key/value in another order on one
    side only, and a parameter that no row names."""
    model = tiny_model(1, variant, tied=tied)
    state = model.state_dict()
    released = dict(hf_mapping.to_released(state, model.config))
    back = dict(hf_mapping.from_released(released.__getitem__, model.config, "test"))
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(back[name], tensor), name
    named = [name for row in hf_mapping.mapping(model.config) for name in row.ours]
    assert sorted(named) == sorted([*state, *(["decoder.embedding.base"] if tied else [])])


@torch.no_grad()
def test_fused_matrices_hold_up_before_gate_and_query_key_value() -> None:
    """model.md 3.3: the MLP is linear in its up branch only, and the released halves are ours.  Would catch a gate
    that comes first, which every shape allows."""
    model = tiny_model(1)
    released = dict(hf_mapping.to_released(model.state_dict(), model.config))
    block, width = model.decoder.stack.blocks[1], model.config.decoder.mlp_width
    assert torch.equal(released["model.transformer.blocks.1.mlp.ff_proj.weight"], block.mlp.up_gate.weight)
    x = torch.randn(3, model.config.decoder.width)
    before = block.mlp(x)
    block.mlp.up_gate.weight[:width] *= 2
    assert torch.allclose(block.mlp(x), 2 * before, rtol=1e-5, atol=1e-6)
    block.mlp.up_gate.weight[width:] *= 2
    assert not torch.allclose(block.mlp(x), 4 * before, rtol=1e-2, atol=1e-3)
    fused = released["model.transformer.blocks.1.self_attn.att_proj.weight"]
    assert torch.equal(fused, block.attention.query_key_value.weight) and block.attention.widths == (96, 32, 32)


@pytest.mark.parametrize("size", get_args(Size))
def test_config_survives_the_released_schema(size: Size) -> None:
    """Would catch a field that is written under one name and read under another."""
    config = named_config(size)
    image = {"overlap_margins": list(config.geometry.overlap_margins), "pooling_size": [2, 2]}
    found = model_config(released(config), image, VIDEO, where="x")
    assert found == replace(config, decoder=replace(config.decoder, tie_embeddings=False))
    assert same_model(found, config)


def released(config: ModelConfig) -> dict[str, Any]:
    return json.loads(json.dumps(released_config(config, tiny_tokenizer().special, dtype="float32")))  # type: ignore[no-any-return]


def test_released_config_has_the_published_values() -> None:
    """model.md 3.1 for the 8B, the values that other loaders read."""
    config = released(named_config("8b"))
    assert config["tie_word_embeddings"] is False
    assert config["vit_config"]["num_hidden_layers"] == 27
    assert config["vit_config"]["image_num_pos"] == 729
    assert config["adapter_config"]["vit_layers"] == [-3, -9]
    assert config["text_config"]["rope_theta"] == 1_000_000
    assert released(named_config("o-7b"))["text_config"]["rope_scaling"] == {
        "rope_type": "yarn",
        "factor": 8.0,
        "attention_factor": 1.2079441541679836,
        "original_max_position_embeddings": 8192,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    }


@pytest.mark.parametrize("variant", get_args(Variant))
def test_every_missing_field_is_named(variant: Variant) -> None:
    """Would catch any default that stands in for a missing field: the released defaults are another model's."""
    complete = released(tiny_config(variant))
    ignored = {"architectures", "auto_map", "dtype", "transformers_version", "use_cache", "initializer_range"}
    ignored |= {"image_high_res_id", "image_col_id", "image_low_res_id", "frame_start_token_id", "frame_end_token_id"}
    checked = 0
    for path in paths(complete):
        if path[0] in ignored:
            continue
        broken = copy.deepcopy(complete)
        parent = broken
        for name in path[:-1]:
            parent = parent[name]
        del parent[path[-1]]
        with pytest.raises(CheckpointError, match=rf"no field .*{path[-1]}|no field {path[0]}"):
            model_config(broken, IMAGE, VIDEO, where="x")
        checked += 1
    assert checked > 50


def paths(tree: dict[str, Any]) -> list[tuple[str, ...]]:
    own = [(key,) for key in tree]
    return own + [(key, *path) for key, value in tree.items() if isinstance(value, dict) for path in paths(value)]


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("text_config", "hidden_act", "gelu"),
        ("text_config", "qkv_bias", True),
        ("adapter_config", "pooling_attention_mask", False),
        ("vit_config", "num_key_value_heads", 2),
        ("adapter_config", "text_hidden_size", 7),
    ],
)
def test_refuses_models_that_it_cannot_be(section: str, key: str, value: object) -> None:
    """Would catch an import that computes another function than the file's model without a word."""
    config = released(tiny_config())
    config[section][key] = value
    with pytest.raises(CheckpointError, match=f"{section}.{key}"):
        model_config(config, IMAGE, VIDEO, where="x")


@pytest.mark.parametrize("variant", get_args(Variant))
def test_reads_what_transformers_saves(variant: Variant) -> None:
    """The native schema (model.md 3.2) as transformers itself derives it from our file."""
    from transformers import Molmo2Config

    config = tiny_config(variant)
    native = json.loads(Molmo2Config(**released(config)).to_json_string(use_diff=False))
    assert "vit_config" not in native
    assert same_model(model_config(native, IMAGE, VIDEO, where="x"), config)
    del native["text_config"]["rms_norm_eps"]
    with pytest.raises(CheckpointError, match="rms_norm_eps"):
        model_config(native, IMAGE, VIDEO, where="x")


def test_same_model_sees_what_matters() -> None:
    config = tiny_config("olmo")
    inverted = replace(config, decoder=replace(config.decoder, rope_scaling_layers=(1,)))
    assert same_model(config, replace(config, decoder=replace(config.decoder, tie_embeddings=True)))
    assert not same_model(config, inverted)


@pytest.mark.parametrize(("variant", "tied"), VARIANTS)
def test_weights_between_stages_are_exact(variant: Variant, tied: bool, tmp_path: Path) -> None:
    model = tiny_model(2, variant, tied=tied)
    save_weights(tmp_path, model, model.config)
    loaded = load_weights(tmp_path)
    assert loaded.config == model.config
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in loaded.parameters())
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    with torch.no_grad():  # what is loaded is a copy: training must not write into the committed file
        next(loaded.parameters()).zero_()
    assert torch.equal(load_weights(tmp_path).state_dict()["decoder.norm.weight"], model.decoder.norm.weight)


def test_loading_weights_is_strict(tmp_path: Path) -> None:
    """Would catch `strict=False`: a parameter left at its random values."""
    model = tiny_model(2)
    config = model.config
    save_weights(tmp_path, model, config)
    state = dict(model.state_dict())

    def broken(tensors: dict[str, torch.Tensor]) -> str:
        write_weights(tmp_path, tensors.items(), 10**9)
        with pytest.raises(CheckpointError) as error:
            load_weights(tmp_path)
        return str(error.value)

    missing = broken({name: tensor for name, tensor in state.items() if name != "decoder.norm.weight"})
    assert "decoder.norm.weight" in missing and "missing" in missing
    assert "decoder.extra" in broken(state | {"decoder.extra": torch.zeros(1)})
    shape = broken(state | {"decoder.norm.weight": torch.zeros(7)})
    assert "decoder.norm.weight" in shape and "(7,)" in shape and "(96,)" in shape
    (tmp_path / "model.safetensors").write_bytes(b"\x10")
    with pytest.raises(CheckpointError, match="damaged"):
        load_weights(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        load_weights(tmp_path)
    content = model_config_to_json(config)
    content["decoder"]["colour"] = 1
    with pytest.raises(CheckpointError, match="colour"):
        model_config_from_json(content, "x")
    del content["decoder"]["colour"], content["decoder"]["rope_theta"]
    with pytest.raises(CheckpointError, match="rope_theta"):
        model_config_from_json(content, "x")


def test_shards_hold_every_tensor_once_within_their_limit(tmp_path: Path) -> None:
    """Would catch a lost tensor at a shard's end, and an index that names the wrong file."""
    tensors = {f"t{n}": torch.full((10,), float(n)) for n in range(7)}  # 40 bytes each
    write_weights(tmp_path, tensors.items(), 100)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 280
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{n:05d}-of-00004.safetensors" for n in (1, 2, 3, 4)]
    assert all(list(index["weight_map"].values()).count(file) <= 2 for file in files)
    with WeightFiles(tmp_path) as weights:
        assert weights.names() == set(tensors)
        assert all(torch.equal(weights.read(name), tensor) for name, tensor in tensors.items())
    (tmp_path / files[2]).unlink()
    with pytest.raises(CheckpointError, match=files[2]), WeightFiles(tmp_path):
        pass


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(tiny_tokenizer().backend, folder)
    return folder


def exported(folder: Path, tokenizer: Path, variant: Variant, *, tied: bool, shard_bytes: int = 10**9) -> Path:
    folder.mkdir()
    export_model(
        folder,
        tiny_model(5, variant, tied=tied),
        tokenizer,
        export=ExportConfig(shard_bytes=shard_bytes),
        preprocessing=PreprocessingConfig(),
        lineage=Lineage(),
    )
    return folder


@pytest.mark.parametrize(("variant", "tied"), VARIANTS)
def test_import_gives_back_what_was_exported(variant: Variant, tied: bool, tokenizer: Path, tmp_path: Path) -> None:
    """One file and several, tied and untied, with the recipe's configuration and with the folder's own."""
    model = tiny_model(5, variant, tied=tied)
    folder = exported(tmp_path / "released", tokenizer, variant, tied=tied, shard_bytes=300_000)
    assert (folder / INDEX).is_file()
    found = initial_model(model.config, InitialWeights(molmo2="released"), seed=0, workspace=str(tmp_path)).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())
    own = import_released(folder)
    assert same_model(own.config, model.config) and not own.config.decoder.tie_embeddings
    assert torch.equal(own.decoder.head_weight, model.decoder.head_weight)


def test_import_refuses_another_model(tokenizer: Path, tmp_path: Path) -> None:
    """Would catch YaRN on other layers than the file says, and weights of an untied model in a tied one."""
    folder = exported(tmp_path / "released", tokenizer, "olmo", tied=False)
    weights = InitialWeights(molmo2=str(folder))
    config = read_model_config(folder)
    inverted = replace(config, decoder=replace(config.decoder, rope_scaling_layers=(1,)))
    with pytest.raises(CheckpointError, match="rope_scaling_layers"):
        initial_model(inverted, weights, seed=0, workspace="")
    tied = replace(config, decoder=replace(config.decoder, tie_embeddings=True))
    with pytest.raises(CheckpointError, match="differs from the embedding"):
        initial_model(tied, weights, seed=0, workspace="")
    with pytest.raises(RecipeError, match="one or the other"):
        initial_model(config, replace(weights, decoder="x"), seed=0, workspace="")


def test_initial_model_from_object_store(tokenizer: Path, tmp_path: Path, s3_bucket: str) -> None:
    from molmo2core import storage

    folder = exported(tmp_path / "released", tokenizer, "qwen", tied=False)
    for file in folder.iterdir():
        storage.write_bytes(storage.join(s3_bucket, "base", file.name), file.read_bytes())
    model = initial_model(tiny_config(), InitialWeights(molmo2="base"), seed=0, workspace=s3_bucket)
    assert torch.equal(model.decoder.norm.weight, tiny_model(5).decoder.norm.weight)


@pytest.mark.parametrize(("variant", "tied"), VARIANTS)
def test_base_decoder_computes_what_transformers_computes(variant: Variant, tied: bool, tmp_path: Path) -> None:
    """Qwen3, and OLMo3 with YaRN on its full-attention layers, as transformers writes them.  Would catch OLMo3's norms
    in the wrong places, which no shape tells, and YaRN on the wrong layers.  Compared on text
    in float32: measured at most 9e-7 of the largest logit, allowed 1e-5."""
    from molmo2core.checkpoints.native import our_logits
    from molmo2core.testing.tiny_model import random_prompt

    config = tiny_config(variant, tied=tied)
    if variant == "olmo":  # the rotary base that transformers' OLMo3 has in its sliding layers, whatever one asks for
        config = replace(config, decoder=replace(config.decoder, rope_theta=500_000.0))
    base = base_decoder(config)
    base.save_pretrained(tmp_path)
    weights = InitialWeights(decoder=str(tmp_path))
    model = initial_model(config, weights, seed=3, workspace="").eval()
    untouched = initial_model(config, InitialWeights(), seed=3, workspace="")
    assert torch.equal(model.decoder.embedding.new, untouched.decoder.embedding.new)
    assert torch.equal(model.connector.gate.weight, untouched.connector.gate.weight)
    prompt = random_prompt(config, seed=1, words=40)
    with torch.no_grad():
        ours = our_logits(model, [prompt], pad_id=0)[0]
        theirs = base(torch.from_numpy(prompt.input_ids).long()[None]).logits[0]
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()

    other = replace(config, decoder=replace(config.decoder, rope_theta=5e6))
    with pytest.raises(CheckpointError, match="rope_theta"):
        initial_model(other, weights, seed=0, workspace="")
    shallow = replace(config, decoder=replace(config.decoder, num_layers=2))
    with pytest.raises(CheckpointError, match="num_hidden_layers"):
        initial_model(shallow, weights, seed=0, workspace="")


def base_decoder(config: ModelConfig) -> Any:
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


def test_base_vision_encoder_computes_what_transformers_computes(tmp_path: Path) -> None:
    """SigLIP as transformers writes it, one block more than is used.  Would catch a kernel flattened channel first.
    In float32: measured no difference, allowed 1e-5 of the largest feature (other builds sum in another order)."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = tiny_config()
    vision, geometry = config.vision_encoder, config.geometry
    torch.manual_seed(0)
    base = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=vision.width,
            intermediate_size=vision.mlp_width,
            num_hidden_layers=vision.num_declared_layers,
            num_attention_heads=vision.num_heads,
            image_size=geometry.crop_size,
            patch_size=geometry.patch_size,
        )
    ).eval()
    base.save_pretrained(tmp_path)
    model = initial_model(config, InitialWeights(vision_encoder=str(tmp_path)), seed=0, workspace="").eval()
    pixels = torch.randint(0, 256, (2, geometry.grid, geometry.patch_size, geometry.grid, geometry.patch_size, 3))
    crops = pixels.permute(0, 1, 3, 2, 4, 5).reshape(2, geometry.num_patches, -1).to(torch.uint8)
    images = pixels.reshape(2, geometry.crop_size, geometry.crop_size, 3).permute(0, 3, 1, 2)
    with torch.no_grad():
        ours = model.vision_encoder(crops)
        states = base(images / 127.5 - 1, output_hidden_states=True).hidden_states
    theirs = torch.cat([states[layer + 1] for layer in vision.feature_layers], dim=-1)
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()

    deep = replace(config, vision_encoder=replace(vision, num_declared_layers=6, feature_layers=(4, 1)))
    with pytest.raises(CheckpointError, match=r"encoder\.layers\.4"):
        load_vision_encoder(tmp_path, initial_model(deep, InitialWeights(), seed=0, workspace=""))
    with pytest.raises(CheckpointError):  # no decoder in there
        load_decoder(tmp_path, model)


@pytest.mark.parametrize(
    ("uri", "error"), [("hf://nobody/nothing-here", PlatformError), ("hf://not/a/name", CheckpointError)]
)
def test_hub_failures_are_messages(uri: str, error: type[Exception]) -> None:
    """Without network (conftest.py) a well-formed name is worth another try, a malformed one is the user's to mend."""
    with pytest.raises(error, match="hub"):
        initial_model(tiny_config(), InitialWeights(molmo2=uri), seed=0, workspace="")
