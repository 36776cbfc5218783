"""`config.json` in both schemas <-> ModelConfig."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import pytest
from transformers import Molmo2Config

from molmo2core.checkpoints.fields import Fields
from molmo2core.checkpoints.hf_config import model_config, released_config, same_model
from molmo2core.errors import CheckpointError
from molmo2core.model.config import ModelConfig, Size, YarnConfig, named_config
from molmo2core.testing.tiny_model import Variant, tiny_config
from molmo2core.testing.tiny_tokenizer import tiny_tokenizer

Json = dict[str, Any]

BOOKKEEPING = {"architectures", "auto_map", "dtype", "transformers_version"}
"""Fields that say nothing about the model."""


def released(config: ModelConfig) -> Json:
    special = tiny_tokenizer(config.decoder.vocab_size).special if config.decoder.vocab_size < 1000 else None
    found = released_config(config, special or tiny_tokenizer().special, dtype="float32")
    if special is None:  # a tokenizer of that size takes too long to train: its ids follow the vocabulary
        shift = config.decoder.vocab_size - tiny_tokenizer().special.im_start
        found |= {name: found[name] + shift for name in found if name.endswith("_id")}
    return json.loads(json.dumps(found))  # type: ignore[no-any-return]


def native(config: ModelConfig) -> Json:
    """What transformers' own class saves, without what it merely passes on from the released schema."""
    saved = written(Molmo2Config(**{key: value for key, value in released(config).items() if key not in BOOKKEEPING}))
    fresh = written(Molmo2Config())
    rope = saved["text_config"]["rope_parameters"]
    saved = {key: value for key, value in saved.items() if key in fresh}
    for name, section in saved.items():
        if isinstance(section, dict):
            saved[name] = {key: value for key, value in section.items() if key in fresh[name]}
    saved["text_config"]["rope_parameters"] = rope
    return saved


def written(config: Molmo2Config) -> Json:
    return json.loads(config.to_json_string())  # type: ignore[no-any-return]


def image_of(config: ModelConfig) -> Json:
    geometry = config.geometry
    return {
        "size": {"height": geometry.crop_size, "width": geometry.crop_size},
        "patch_size": geometry.patch_size,
        "overlap_margins": list(geometry.overlap_margins),
        "pooling_size": list(geometry.image_pooling),
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 2,
    }


def read(config_json: Json, config: ModelConfig, image: Json | None = None, video: Json | None = None) -> ModelConfig:
    plain_video = {k: v for k, v in image_of(config).items() if k != "overlap_margins"}
    plain_video["pooling_size"] = list(config.geometry.video_pooling)
    return model_config(
        Fields(config_json, "config.json"),
        image=Fields(image_of(config) if image is None else image, "preprocessor_config.json"),
        video=Fields(plain_video if video is None else video, "video_preprocessor_config.json"),
    )


SCHEMAS: list[Callable[[ModelConfig], Json]] = [released, native]


@pytest.mark.parametrize("write", SCHEMAS)
@pytest.mark.parametrize("size", get_args(Size))
def test_config_survives_both_schemas(size: Size, write: Callable[[ModelConfig], Json]) -> None:
    """Would catch a field that is written under one name and read under another, and 27 blocks for 25."""
    config = named_config(size)
    found = read(write(config), config)
    assert same_model(found, config)
    assert found.vision_encoder.num_layers == config.vision_encoder.num_layers
    if write is released:
        assert found == replace(config, decoder=replace(config.decoder, tie_embeddings=False))


def test_released_config_has_the_published_values() -> None:
    """model.md 3.1 for the 8B, the values that other loaders read."""
    config = released(named_config("8b"))
    assert config["tie_word_embeddings"] is False
    assert config["vit_config"]["num_hidden_layers"] == 27
    assert config["vit_config"]["image_num_pos"] == 729
    assert config["adapter_config"]["vit_layers"] == [-3, -9]
    assert config["text_config"]["rope_theta"] == 1_000_000
    assert config["image_patch_id"] == 151938 and config["frame_end_token_id"] == 151944
    assert released(named_config("o-7b"))["text_config"]["rope_scaling"] == {
        "rope_type": "yarn",
        "factor": 8.0,
        "attention_factor": 1.2079441541679836,
        "original_max_position_embeddings": 8192,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    }


def paths(tree: Json) -> list[tuple[str, ...]]:
    own = [(key,) for key in tree]
    return own + [(key, *path) for key, value in tree.items() if isinstance(value, dict) for path in paths(value)]


def changed(tree: Json, path: tuple[str, ...], *value: object) -> Json:
    """A copy with one field removed, or set."""
    result = copy.deepcopy(tree)
    parent = result
    for name in path[:-1]:
        parent = parent[name]
    if value:
        parent[path[-1]] = value[0]
    else:
        del parent[path[-1]]
    return result


@pytest.mark.parametrize("write", SCHEMAS)
@pytest.mark.parametrize("variant", get_args(Variant))
def test_every_missing_field_is_named(variant: Variant, write: Callable[[ModelConfig], Json]) -> None:
    """Would catch any default that stands in for a missing field: the released defaults are another model's."""
    config = tiny_config(variant)
    complete = write(config)
    read(complete, config)
    checked = 0
    for path in paths(complete):
        if path[0] in BOOKKEEPING:
            continue
        if path == ("vision_config",):  # without it, it is the released schema
            continue
        with pytest.raises(CheckpointError, match=rf"config\.json.*no field (\w+\.)*{path[-1]}\b"):
            read(changed(complete, path), config)
        checked += 1
    assert checked > (55 if write is native else 70)


@pytest.mark.parametrize("file", ["image", "video"])
def test_every_missing_field_of_a_processor_is_named(file: str) -> None:
    config = tiny_config()
    complete = image_of(config)
    for name in complete:
        if file == "video" and name == "overlap_margins":
            continue
        with pytest.raises(CheckpointError, match=rf"preprocessor_config\.json.*no field {name}"):
            read(released(config), config, **{file: changed(complete, (name,))})
    with pytest.raises(CheckpointError, match=r"patch_size.*expected 9"):
        read(released(config), config, **{file: changed(complete, ("patch_size",), 14)})


@pytest.mark.parametrize("write", SCHEMAS)
@pytest.mark.parametrize("variant", get_args(Variant))
def test_every_field_of_another_kind_is_named(variant: Variant, write: Callable[[ModelConfig], Json]) -> None:
    """A text for a number, an object for null: a message, never a trace."""
    config = tiny_config(variant)
    complete = write(config)
    free = {"use_cache", "initializer_range", "attn_implementation", "float32_attention"}
    for path in paths(complete):
        if path[0] in BOOKKEEPING or path[-1] in free or "dropout" in path[-1]:
            continue
        if path[-1] == "model_type" and len(path) > 1:
            continue
        if path[-1] == "rope_scaling_layers" and variant == "qwen":
            continue  # says nothing without a scaling
        with pytest.raises(CheckpointError, match=rf"config\.json.*{path[-1]}"):
            read(changed(complete, path, 1.5 if isinstance(value_at(complete, path), str) else "x"), config)


def value_at(tree: Any, path: tuple[str, ...]) -> object:
    for name in path:
        tree = tree[name]
    return tree


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("text_config", "hidden_act"), "gelu"),
        (("text_config", "qkv_bias"), True),
        (("text_config", "use_qk_norm"), False),
        (("text_config", "qk_norm_type"), "layer"),
        (("text_config", "rope_scaling"), {"rope_type": "linear", "factor": 2.0}),
        (("text_config", "rope_scaling_layers"), [0, 3]),
        (("adapter_config", "pooling_attention_mask"), False),
        (("adapter_config", "text_hidden_size"), 7),
        (("adapter_config", "vit_layers"), [-3, -9]),
        (("adapter_config", "vit_layers"), [4, 1]),
        (("adapter_config", "vit_layers"), []),
        (("vit_config", "num_key_value_heads"), 2),
        (("vit_config", "image_num_pos"), 37),
        (("vit_config", "image_default_input_size"), [54, 63]),
        (("vit_config", "image_patch_size"), 0),
        (("tie_word_embeddings",), True),
        (("use_frame_special_tokens",), True),
        (("image_patch_id",), 769),
        (("image_col_id",), 1),
    ],
)
def test_refuses_models_that_it_cannot_be(path: tuple[str, ...], value: object) -> None:
    """Would catch an import that computes another function than the file's model without a word."""
    config = tiny_config("olmo")
    with pytest.raises(CheckpointError, match=path[-1] if value != 0 else "config.json"):
        read(changed(released(config), path, value), config)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("text_config", "rms_norm_eps"), 1e-5),
        (("vision_config", "attention_bias"), False),
        (("vision_config", "num_channels"), 1),
        (("adapter_config", "mlp_bias"), True),
        (("text_config", "rope_parameters", "mscale"), 1.0),
        (("text_config", "rope_parameters", "truncate"), False),
        (("text_config", "rope_parameters", "rope_type"), "llama3"),
        (("image_patch_id",), 769),
    ],
)
def test_refuses_native_models_that_it_cannot_be(path: tuple[str, ...], value: object) -> None:
    config = tiny_config("olmo")
    if path[-1] == "rms_norm_eps":  # a model of ours, but another one
        assert read(changed(native(config), path, value), config) != read(native(config), config)
        return
    with pytest.raises(CheckpointError, match=path[-1]):
        read(changed(native(config), path, value), config)


def test_feature_layers_count_from_either_end() -> None:
    """model.md 3.2: -3 and -9 of 27 are 24 and 18, in that order, and only 25 blocks exist."""
    config = named_config("8b")
    for layers in ([-3, -9], [24, 18], [24, -9]):
        found = read(changed(released(config), ("adapter_config", "vit_layers"), layers), config)
        assert found.vision_encoder.feature_layers == (24, 18) and found.vision_encoder.num_layers == 25
    swapped = read(changed(released(config), ("adapter_config", "vit_layers"), [-9, -3]), config)
    assert swapped.vision_encoder.feature_layers == (18, 24) and not same_model(swapped, config)


@pytest.mark.parametrize("write", SCHEMAS)
def test_scaled_layers_are_read_never_derived(write: Callable[[ModelConfig], Json]) -> None:
    """A file may name the complement of the full-attention layers (model.md 1.2): it must come through."""
    config = tiny_config("olmo")
    for layers in ([1], [0, 2], [0, 1, 2], []):
        found = read(changed(write(config), ("text_config", "rope_scaling_layers"), layers), config)
        assert found.decoder.rope_scaling_layers == tuple(layers)
        assert found.decoder.rope_scaling == config.decoder.rope_scaling
    everywhere = read(changed(write(config), ("text_config", "rope_scaling_layers"), None), config)
    assert everywhere.decoder.rope_scaling_layers is None
    all_layers = replace(config, decoder=replace(config.decoder, rope_scaling_layers=(0, 1, 2)))
    assert same_model(everywhere, all_layers)


def test_rotary_base_and_scaling_of_both_schemas_agree() -> None:
    """`rope_theta` and `rope_scaling` there, `rope_parameters` here."""
    config = tiny_config("olmo")
    yarn = YarnConfig(factor=4.0, attention_factor=1.1, original_max_position_embeddings=96, beta_fast=20, beta_slow=2)
    config = replace(config, decoder=replace(config.decoder, rope_theta=12345.0, rope_scaling=yarn))
    assert native(config)["text_config"]["rope_parameters"]["rope_theta"] == 12345.0
    assert "rope_theta" not in native(config)["text_config"]
    assert read(native(config), config).decoder == read(released(config), config).decoder == config.decoder


def test_same_model_sees_what_matters() -> None:
    config = tiny_config("olmo")
    inverted = replace(config, decoder=replace(config.decoder, rope_scaling_layers=(1,)))
    assert same_model(config, replace(config, decoder=replace(config.decoder, tie_embeddings=True)))
    assert not same_model(config, inverted)
