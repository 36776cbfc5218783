"""`ModelConfig` <-> `config.json` of a released Molmo2 (model.md 3.1), and reading transformers' own schema (3.2).

Every field is written, because the defaults of the released Python classes are those of another model; for the same
reason a missing field is an error when reading, never a default.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from molmo2core.errors import CheckpointError
from molmo2core.model.config import ConnectorConfig, DecoderConfig, ModelConfig, VisionEncoderConfig, YarnConfig
from molmo2core.preprocessing.config import VisualGeometry
from molmo2core.special_tokens import SpecialTokens

HUB_REPOSITORY = "allenai/Molmo2-8B"
"""Where loaders that want the released Python files (vLLM, transformers < 5.23) find them: our exports carry none."""

_QK_NORM = {"per_head": "qwen3", "full": "olmo"}


def released_config(config: ModelConfig, special: SpecialTokens, *, dtype: str) -> dict[str, Any]:
    """The content of `config.json`, complete (model.md 3.1).

    The head is always stored, so `tie_word_embeddings` is false whatever `config.decoder.tie_embeddings` says.
    """
    return {
        "architectures": ["Molmo2ForConditionalGeneration"],
        "model_type": "molmo2",
        "auto_map": {
            "AutoConfig": f"{HUB_REPOSITORY}--configuration_molmo2.Molmo2Config",
            "AutoModelForImageTextToText": f"{HUB_REPOSITORY}--modeling_molmo2.Molmo2ForConditionalGeneration",
        },
        "dtype": dtype,
        "transformers_version": "4.57.1",
        "tie_word_embeddings": False,
        "use_cache": True,
        "initializer_range": 0.02,
        "use_frame_special_tokens": False,
        **_token_ids(special),
        **_sub_configs(config),
    }


def read_model_config(folder: Path) -> ModelConfig:
    """The model of a folder in the released format: `config.json` and the two preprocessor files beside it.

    `tie_embeddings` is false, since a released folder stores both matrices.

    Raises:
        CheckpointError: a file or field is missing, or a field has a value that this project's model cannot have.
    """
    released = read_json(folder / "config.json")
    image = read_json(folder / "preprocessor_config.json")
    video = read_json(folder / "video_preprocessor_config.json")
    return model_config(released, image, video, where=str(folder))


def model_config(
    released: Mapping[str, Any], image: Mapping[str, Any], video: Mapping[str, Any], *, where: str
) -> ModelConfig:
    """The model that these three JSON objects describe; `released` in either schema (model.md 3.1 or 3.2).

    Raises:
        CheckpointError: see `read_model_config`.
    """
    found = _from_native(released, f"{where}/config.json") if "vision_config" in released else released
    fields = _Fields(found, f"{where}/config.json")
    declared_layers = fields.get("vit_config.num_hidden_layers")
    scaling = fields.get("text_config.rope_scaling")
    scaling_layers = fields.get("text_config.rope_scaling_layers")
    config = ModelConfig(
        geometry=VisualGeometry(
            crop_size=fields.get("vit_config.image_default_input_size")[0],
            patch_size=fields.get("vit_config.image_patch_size"),
            overlap_margins=_pair(_Fields(image, f"{where}/preprocessor_config.json").get("overlap_margins")),
            image_pooling=_pair(_Fields(image, f"{where}/preprocessor_config.json").get("pooling_size")),
            video_pooling=_pair(_Fields(video, f"{where}/video_preprocessor_config.json").get("pooling_size")),
        ),
        vision_encoder=VisionEncoderConfig(
            width=fields.get("vit_config.hidden_size"),
            num_heads=fields.get("vit_config.num_attention_heads"),
            head_dim=fields.get("vit_config.head_dim"),
            mlp_width=fields.get("vit_config.intermediate_size"),
            num_declared_layers=declared_layers,
            feature_layers=tuple(layer % declared_layers for layer in fields.get("adapter_config.vit_layers")),
            norm_eps=fields.get("vit_config.layer_norm_eps"),
        ),
        connector=ConnectorConfig(
            width=fields.get("adapter_config.hidden_size"),
            num_heads=fields.get("adapter_config.num_attention_heads"),
            head_dim=fields.get("adapter_config.head_dim"),
            mlp_width=fields.get("adapter_config.intermediate_size"),
        ),
        decoder=DecoderConfig(
            width=fields.get("text_config.hidden_size"),
            num_layers=fields.get("text_config.num_hidden_layers"),
            num_heads=fields.get("text_config.num_attention_heads"),
            num_kv_heads=fields.get("text_config.num_key_value_heads"),
            head_dim=fields.get("text_config.head_dim"),
            mlp_width=fields.get("text_config.intermediate_size"),
            vocab_size=fields.get("text_config.vocab_size"),
            additional_vocab_size=fields.get("text_config.additional_vocab_size"),
            max_position_embeddings=fields.get("text_config.max_position_embeddings"),
            rope_theta=fields.get("text_config.rope_theta"),
            rope_scaling=None if scaling is None else _yarn(_Fields(scaling, f"{where}/config.json: rope_scaling")),
            rope_scaling_layers=None if scaling is None or scaling_layers is None else tuple(scaling_layers),
            norm_placement="output" if fields.get("text_config.norm_after") else "input",
            qk_norm="full" if fields.get("text_config.qk_norm_type") == "olmo" else "per_head",
            norm_eps=fields.get("text_config.layer_norm_eps"),
        ),
    )
    _check_rest(found, config, f"{where}/config.json")
    return config


def same_model(left: ModelConfig, right: ModelConfig) -> bool:
    """Whether both describe the same computation: tying and blocks that do not exist make no difference."""
    return _canonical(left) == _canonical(right)


def model_config_to_json(config: ModelConfig) -> dict[str, Any]:
    """`config` as the JSON object of our own `model_config.json` (between stages)."""
    return dataclasses.asdict(config)


def model_config_from_json(found: Mapping[str, Any], where: str) -> ModelConfig:
    """Inverse of `model_config_to_json`.

    Raises:
        CheckpointError: a field is missing or unknown.
    """
    decoder = _Fields(found, where).get("decoder")
    scaling = _Fields(decoder, where).get("rope_scaling")
    return ModelConfig(
        geometry=_build(VisualGeometry, found, "geometry", where),
        vision_encoder=_build(VisionEncoderConfig, found, "vision_encoder", where),
        connector=_build(ConnectorConfig, found, "connector", where),
        decoder=dataclasses.replace(
            _build(DecoderConfig, found, "decoder", where),
            rope_scaling=None if scaling is None else _build(YarnConfig, decoder, "rope_scaling", where),
        ),
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a checkpoint folder.

    Raises:
        CheckpointError: no such file, or no JSON object.
    """
    if not path.is_file():
        raise CheckpointError(str(path), found="no such file", mend="check the folder of the checkpoint")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(str(path), found=f"no JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(str(path), found=type(content).__name__, expected="a JSON object")
    return content


def _token_ids(special: SpecialTokens) -> dict[str, int]:
    return {
        "image_start_token_id": special.im_start,
        "image_end_token_id": special.im_end,
        "image_patch_id": special.im_patch,
        "image_high_res_id": special.im_patch,
        "image_col_id": special.im_col,
        "low_res_image_start_token_id": special.low_res_im_start,
        "image_low_res_id": special.im_low,
        "frame_start_token_id": special.frame_start,
        "frame_end_token_id": special.frame_end,
    }


def _sub_configs(config: ModelConfig) -> dict[str, dict[str, Any]]:
    decoder, encoder, connector, geometry = (
        config.decoder, config.vision_encoder, config.connector, config.geometry,
    )  # fmt: skip
    return {
        "text_config": {
            "model_type": "molmo2_text",
            "hidden_size": decoder.width,
            "num_attention_heads": decoder.num_heads,
            "num_key_value_heads": decoder.num_kv_heads,
            "head_dim": decoder.head_dim,
            "vocab_size": decoder.vocab_size,
            "additional_vocab_size": decoder.additional_vocab_size,
            "qkv_bias": False,
            "num_hidden_layers": decoder.num_layers,
            "intermediate_size": decoder.mlp_width,
            "hidden_act": "silu",
            "embedding_dropout": 0.0,
            "attention_dropout": 0.0,
            "residual_dropout": 0.0,
            "max_position_embeddings": decoder.max_position_embeddings,
            "rope_theta": decoder.rope_theta,
            "rope_scaling": (
                None
                if decoder.rope_scaling is None
                else {"rope_type": "yarn", **dataclasses.asdict(decoder.rope_scaling)}
            ),
            "rope_scaling_layers": (
                None if decoder.rope_scaling_layers is None else list(decoder.rope_scaling_layers)
            ),
            "use_qk_norm": True,
            "qk_norm_type": _QK_NORM[decoder.qk_norm],
            "layer_norm_eps": decoder.norm_eps,
            "norm_after": decoder.norm_placement == "output",
            "initializer_range": 0.02,
            "use_cache": True,
            "attn_implementation": "sdpa",
        },
        "vit_config": {
            "model_type": "molmo2",
            "hidden_size": encoder.width,
            "intermediate_size": encoder.mlp_width,
            "num_hidden_layers": encoder.num_declared_layers,
            "num_attention_heads": encoder.num_heads,
            "num_key_value_heads": encoder.num_heads,
            "head_dim": encoder.head_dim,
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": encoder.norm_eps,
            "image_default_input_size": [geometry.crop_size, geometry.crop_size],
            "image_patch_size": geometry.patch_size,
            "image_num_pos": geometry.num_patches,
            "attention_dropout": 0.0,
            "residual_dropout": 0.0,
            "initializer_range": 0.02,
            "float32_attention": True,
            "attn_implementation": "sdpa",
        },
        "adapter_config": {
            "model_type": "molmo2",
            "vit_layers": [layer - encoder.num_declared_layers for layer in encoder.feature_layers],
            "pooling_attention_mask": True,
            "hidden_size": connector.width,
            "num_attention_heads": connector.num_heads,
            "num_key_value_heads": connector.num_heads,
            "head_dim": connector.head_dim,
            "float32_attention": True,
            "attention_dropout": 0.0,
            "residual_dropout": 0.0,
            "hidden_act": "silu",
            "intermediate_size": connector.mlp_width,
            "text_hidden_size": decoder.width,
            "image_feature_dropout": 0.0,
            "initializer_range": 0.02,
            "attn_implementation": "sdpa",
        },
    }  # fmt: skip


def _from_native(native: Mapping[str, Any], where: str) -> dict[str, Any]:
    """transformers' own schema in the released one's words (model.md 3.2); what native leaves open is fixed there."""
    fields = _Fields(native, where)
    text, vision, adapter = (dict(fields.get(name)) for name in ("text_config", "vision_config", "adapter_config"))
    rope = _Fields(text, f"{where}: text_config").get("rope_parameters")
    _rename(text, {"attention_bias": "qkv_bias", "rms_norm_eps": "layer_norm_eps"}, f"{where}: text_config")
    _rename(
        vision,
        {
            "image_size": "image_default_input_size",
            "patch_size": "image_patch_size",
            "num_position_embeddings": "image_num_pos",
        },
        f"{where}: vision_config",
    )
    _rename(adapter, {"vision_feature_layer": "vit_layers"}, f"{where}: adapter_config")
    adapter["vit_layers"] = [
        layer % vision["num_hidden_layers"] - vision["num_hidden_layers"] for layer in adapter["vit_layers"]
    ]
    scaled = rope["rope_type"] != "default"
    yarn_fields = ["rope_type", *(field.name for field in dataclasses.fields(YarnConfig))]
    dropouts = {"attention_dropout": 0.0, "residual_dropout": 0.0}
    return {
        **native,
        "use_cache": True,
        "use_frame_special_tokens": False,
        "image_high_res_id": fields.get("image_patch_id"),
        "image_col_id": None,
        "image_low_res_id": None,
        "text_config": {
            **text,
            **dropouts,
            "model_type": "molmo2_text",
            "embedding_dropout": 0.0,
            "use_qk_norm": True,
            "use_cache": True,
            "attn_implementation": "sdpa",
            "rope_theta": rope["rope_theta"],
            "rope_scaling": {name: rope[name] for name in yarn_fields if name in rope} if scaled else None,
            "rope_scaling_layers": text["rope_scaling_layers"] if scaled else None,
        },
        "vit_config": {
            **vision,
            **dropouts,
            "model_type": "molmo2",
            "float32_attention": True,
            "attn_implementation": "sdpa",
        },
        "adapter_config": {
            **adapter,
            **dropouts,
            "model_type": "molmo2",
            "pooling_attention_mask": True,
            "float32_attention": True,
            "image_feature_dropout": 0.0,
            "attn_implementation": "sdpa",
        },
    }


def _check_rest(found: Mapping[str, Any], config: ModelConfig, where: str) -> None:
    """Refuse what `ModelConfig` has no field for and what is not as in every released model."""
    expected = {
        "model_type": "molmo2",
        "tie_word_embeddings": False,
        "use_frame_special_tokens": False,
        **_sub_configs(config),
    }
    fields = _Fields(found, where)
    for key, value in _leaves(expected):
        if fields.get(key) != value:
            raise CheckpointError(
                f"{where}: {key}", found=repr(fields.get(key)), expected=repr(value), mend="this model is not supported"
            )
    for key in ("image_patch_id", "image_start_token_id", "image_end_token_id", "low_res_image_start_token_id"):
        fields.get(key)


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and key != "rope_scaling":
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


class _Fields:
    """Access by dotted key that names what is missing."""

    def __init__(self, tree: Mapping[str, Any], where: str) -> None:
        self._tree, self._where = tree, where

    def get(self, dotted: str) -> Any:
        node: Any = self._tree
        for name in dotted.split("."):
            if not isinstance(node, Mapping) or name not in node:
                raise CheckpointError(
                    self._where,
                    found=f"no field {dotted}",
                    expected="every field of the released schema",
                    mend="a default would silently be another model; take the value from where the weights come from",
                )
            node = node[name]
        return node


def _rename(section: dict[str, Any], names: Mapping[str, str], where: str) -> None:
    for old, new in names.items():
        section[new] = _Fields(section, where).get(old)


def _yarn(scaling: _Fields) -> YarnConfig:
    if scaling.get("rope_type") != "yarn":
        raise CheckpointError("rope_scaling.rope_type", found=repr(scaling.get("rope_type")), expected="'yarn'")
    return YarnConfig(**{field.name: scaling.get(field.name) for field in dataclasses.fields(YarnConfig)})


def _pair(value: Any) -> tuple[int, int]:
    rows, columns = value
    return rows, columns


def _build(kind: Any, tree: Mapping[str, Any], name: str, where: str) -> Any:
    section = _Fields(tree, where).get(name)
    known = {field.name for field in dataclasses.fields(kind)}
    if unknown := sorted(section.keys() - known):
        raise CheckpointError(where, found=f"unknown field {name}.{unknown[0]}", expected=f"fields of {kind.__name__}")
    values = {key: _Fields(section, f"{where}: {name}").get(key) for key in known}
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def _canonical(config: ModelConfig) -> ModelConfig:
    decoder = dataclasses.replace(config.decoder, tie_embeddings=False)
    if decoder.rope_scaling is None or decoder.rope_scaling_layers == tuple(range(decoder.num_layers)):
        decoder = dataclasses.replace(decoder, rope_scaling_layers=None)
    encoder = dataclasses.replace(config.vision_encoder, num_declared_layers=config.vision_encoder.num_layers)
    return dataclasses.replace(config, decoder=decoder, vision_encoder=encoder)
