"""`ModelConfig` <-> `config.json` of a Molmo2, in the released schema (model.md 3.1) and transformers' own (3.2).

Every field is written, because the defaults of the released Python classes are those of another model; for the same
reason a missing field is an error when reading, in both schemas, never a default.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molmo2core.checkpoints.fields import Fields, read_json
from molmo2core.errors import CheckpointError
from molmo2core.model.config import ConnectorConfig, DecoderConfig, ModelConfig, VisionEncoderConfig, YarnConfig
from molmo2core.preprocessing.config import VisualGeometry
from molmo2core.special_tokens import EXTRA_TOKENS, SpecialTokens

HUB_REPOSITORY = "allenai/Molmo2-8B"
"""Where loaders that want the released Python files (vLLM, transformers < 5.23) find them: our exports carry none."""
PROCESSOR_FLAGS = {
    "image_use_col_tokens": True,
    "use_single_crop_col_tokens": False,
    "use_single_crop_start_token": True,
    "video_use_col_tokens": False,
    "use_frame_special_tokens": False,
}
"""Of `processor_config.json`: the token layout of all released models, the only one that preprocessing/ makes."""
BILINEAR = 2
"""PIL's number."""
HALF = [0.5, 0.5, 0.5]


@dataclass(frozen=True, kw_only=True)
class Schema:
    """Where the two schemas have other words for the same thing."""

    vision: str
    crop_size: str
    patch_size: str
    positions: str
    feature_layers: str
    attention_bias: str
    norm_eps: str
    is_native: bool


RELEASED = Schema(
    vision="vit_config",
    crop_size="image_default_input_size",
    patch_size="image_patch_size",
    positions="image_num_pos",
    feature_layers="vit_layers",
    attention_bias="qkv_bias",
    norm_eps="layer_norm_eps",
    is_native=False,
)
NATIVE = Schema(
    vision="vision_config",
    crop_size="image_size",
    patch_size="patch_size",
    positions="num_position_embeddings",
    feature_layers="vision_feature_layer",
    attention_bias="attention_bias",
    norm_eps="rms_norm_eps",
    is_native=True,
)

_QK_NORM = {"per_head": "qwen3", "full": "olmo"}
_TOKEN_IDS = {
    "image_start_token_id": "im_start",
    "image_end_token_id": "im_end",
    "image_patch_id": "im_patch",
    "low_res_image_start_token_id": "low_res_im_start",
    "frame_start_token_id": "frame_start",
    "frame_end_token_id": "frame_end",
}
"""Field -> attribute of SpecialTokens."""
_RELEASED_TOKEN_IDS = _TOKEN_IDS | {
    "image_high_res_id": "im_patch", "image_col_id": "im_col", "image_low_res_id": "im_low",
}  # fmt: skip
_ANY_VALUE = {
    "use_cache", "initializer_range", "attn_implementation", "float32_attention", "attention_dropout",
    "residual_dropout", "embedding_dropout", "image_feature_dropout", "text_config.model_type",
    "vit_config.model_type", "vision_config.model_type", "adapter_config.model_type",
}  # fmt: skip
"""Must be there, and change nothing of what the model computes outside of training."""
_READ = {
    "num_hidden_layers",
    "vit_layers",
    "vision_feature_layer",
    "rope_scaling",
    "rope_scaling_layers",
    "rope_parameters",
}
"""Are read, and written in another way that means the same."""


def released_config(config: ModelConfig, special: SpecialTokens, *, dtype: str) -> dict[str, Any]:
    """The content of `config.json`, complete (model.md 3.1), with the token ids of the tokenizer that goes with it.

    The head is always stored, so `tie_word_embeddings` is false whatever `config.decoder.tie_embeddings` says.
    """
    return {
        "architectures": ["Molmo2ForConditionalGeneration"],
        "auto_map": {
            "AutoConfig": f"{HUB_REPOSITORY}--configuration_molmo2.Molmo2Config",
            "AutoModelForImageTextToText": f"{HUB_REPOSITORY}--modeling_molmo2.Molmo2ForConditionalGeneration",
        },
        "dtype": dtype,
        "transformers_version": "4.57.1",
        **schema_fields(config, RELEASED, dataclasses.asdict(special)),
    }


def read_model_config(folder: Path) -> ModelConfig:
    """The model of a folder: `config.json` in either schema, and the processor's files beside it.

    `tie_embeddings` is false, since such a folder stores both matrices.

    Raises:
        CheckpointError: a file or field is missing, or a field has a value that this project's model cannot have.
    """
    where = folder / "processor_config.json"
    processor = Fields(read_json(where), str(where))
    for flag, value in PROCESSOR_FLAGS.items():
        processor.expect(flag, value)

    def part(section: str, file: str) -> Fields:  # transformers 5 keeps all in one file, older ones in three
        if section in processor.tree:
            return processor.section(section)
        return Fields(read_json(folder / file), str(folder / file))

    return model_config(
        Fields(read_json(folder / "config.json"), str(folder / "config.json")),
        image=part("image_processor", "preprocessor_config.json"),
        video=part("video_processor", "video_preprocessor_config.json"),
    )


def model_config(fields: Fields, *, image: Fields, video: Fields) -> ModelConfig:
    """The model that a configuration, an image processor's and a video processor's describe.

    Raises:
        CheckpointError: see `read_model_config`.
    """
    schema = NATIVE if NATIVE.vision in fields.tree else RELEASED
    text, adapter = fields.section("text_config"), fields.section("adapter_config")
    vision = fields.section(schema.vision)
    declared_layers = vision.value("num_hidden_layers", int)
    config = ModelConfig(
        geometry=_geometry(vision, image, video, schema),
        vision_encoder=VisionEncoderConfig(
            width=vision.value("hidden_size", int),
            num_heads=vision.value("num_attention_heads", int),
            head_dim=vision.value("head_dim", int),
            mlp_width=vision.value("intermediate_size", int),
            num_declared_layers=declared_layers,
            feature_layers=_feature_layers(adapter, schema, declared_layers),
            norm_eps=vision.value("layer_norm_eps", float),
        ),
        connector=ConnectorConfig(
            width=adapter.value("hidden_size", int),
            num_heads=adapter.value("num_attention_heads", int),
            head_dim=adapter.value("head_dim", int),
            mlp_width=adapter.value("intermediate_size", int),
        ),
        decoder=_decoder(text, schema),
    )
    _check_rest(fields, config, schema)
    for processor in (image, video):
        processor.expect("patch_size", config.geometry.patch_size)
        processor.expect("size", {"height": config.geometry.crop_size, "width": config.geometry.crop_size})
        for name, value in (("image_mean", HALF), ("image_std", HALF), ("resample", BILINEAR)):
            processor.expect(name, value)
    return config


def same_model(left: ModelConfig, right: ModelConfig) -> bool:
    """Whether both describe the same computation: tying and blocks that do not exist make no difference."""
    return _canonical(left) == _canonical(right)


def schema_fields(config: ModelConfig, schema: Schema, token_ids: Mapping[str, int]) -> dict[str, Any]:
    """All fields of a configuration that describe the model (model.md 3.1, 3.2), in one schema.

    Args:
        token_ids: by attribute of SpecialTokens.
    """
    decoder, encoder, connector, geometry = (
        config.decoder, config.vision_encoder, config.connector, config.geometry,
    )  # fmt: skip
    declared = encoder.num_layers if schema.is_native else encoder.num_declared_layers
    offset = 0 if schema.is_native else declared
    tokens = _TOKEN_IDS if schema.is_native else _RELEASED_TOKEN_IDS
    run = {"initializer_range": 0.02, "attention_dropout": 0.0}
    released_run = {"residual_dropout": 0.0, "attn_implementation": "sdpa"}
    text: dict[str, Any] = {
        "model_type": "molmo2_text",
        "hidden_size": decoder.width,
        "num_attention_heads": decoder.num_heads,
        "num_key_value_heads": decoder.num_kv_heads,
        "head_dim": decoder.head_dim,
        "vocab_size": decoder.vocab_size,
        "additional_vocab_size": decoder.additional_vocab_size,
        schema.attention_bias: False,
        "num_hidden_layers": decoder.num_layers,
        "intermediate_size": decoder.mlp_width,
        "hidden_act": "silu",
        "max_position_embeddings": decoder.max_position_embeddings,
        "qk_norm_type": _QK_NORM[decoder.qk_norm],
        schema.norm_eps: decoder.norm_eps,
        "norm_after": decoder.norm_placement == "output",
        "use_cache": True,
        **run,
        **_rope_fields(decoder, schema),
    }
    vision: dict[str, Any] = {
        "model_type": "molmo2_vision" if schema.is_native else "molmo2",
        "hidden_size": encoder.width,
        "intermediate_size": encoder.mlp_width,
        "num_hidden_layers": declared,
        "num_attention_heads": encoder.num_heads,
        "num_key_value_heads": encoder.num_heads,
        "head_dim": encoder.head_dim,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": encoder.norm_eps,
        schema.crop_size: [geometry.crop_size, geometry.crop_size],
        schema.patch_size: geometry.patch_size,
        schema.positions: geometry.num_patches,
        **run,
    }
    adapter: dict[str, Any] = {
        "model_type": "molmo2_adapter" if schema.is_native else "molmo2",
        schema.feature_layers: [layer - offset for layer in encoder.feature_layers],
        "hidden_size": connector.width,
        "num_attention_heads": connector.num_heads,
        "num_key_value_heads": connector.num_heads,
        "head_dim": connector.head_dim,
        "hidden_act": "silu",
        "intermediate_size": connector.mlp_width,
        "text_hidden_size": decoder.width,
        **run,
    }
    top: dict[str, Any] = {
        "model_type": "molmo2",
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        **{name: token_ids[token] for name, token in tokens.items()},
    }
    if schema.is_native:
        text["tie_word_embeddings"] = False
        vision |= {"attention_bias": True, "num_channels": 3}
        adapter |= {"attention_bias": True, "mlp_bias": False}
    else:
        top |= {"use_cache": True, "use_frame_special_tokens": False}
        text |= {"use_qk_norm": True, "embedding_dropout": 0.0, **released_run}
        vision |= {"float32_attention": True, **released_run}
        adapter |= {
            "pooling_attention_mask": True, "float32_attention": True, "image_feature_dropout": 0.0, **released_run,
        }  # fmt: skip
    return top | {"text_config": text, schema.vision: vision, "adapter_config": adapter}


def _rope_fields(decoder: DecoderConfig, schema: Schema) -> dict[str, Any]:
    yarn, layers = decoder.rope_scaling, decoder.rope_scaling_layers
    scaling = None if yarn is None else {"rope_type": "yarn", **dataclasses.asdict(yarn)}
    if not schema.is_native:
        return {
            "rope_theta": decoder.rope_theta,
            "rope_scaling": scaling,
            "rope_scaling_layers": None if layers is None else list(layers),
        }
    return {
        "rope_parameters": {"rope_theta": decoder.rope_theta, **(scaling or {"rope_type": "default"})},
        "rope_scaling_layers": list(range(decoder.num_layers) if layers is None else layers),
    }


def _geometry(vision: Fields, image: Fields, video: Fields, schema: Schema) -> VisualGeometry:
    height, width = vision.values(schema.crop_size, int, 2)
    if height != width:
        raise vision.wrong(schema.crop_size, "a square")
    try:
        return VisualGeometry(
            crop_size=height,
            patch_size=vision.value(schema.patch_size, int),
            overlap_margins=_pair(image, "overlap_margins"),
            image_pooling=_pair(image, "pooling_size"),
            video_pooling=_pair(video, "pooling_size"),
        )
    except (ValueError, ZeroDivisionError) as error:
        raise CheckpointError(vision.where, found=str(error), expected="a geometry with whole patches") from error


def _feature_layers(adapter: Fields, schema: Schema, declared_layers: int) -> tuple[int, ...]:
    """0-based; negative ones count from the end of the declared blocks."""
    layers = adapter.values(schema.feature_layers, int)
    if not layers or not all(-declared_layers <= layer < declared_layers for layer in layers):
        raise adapter.wrong(schema.feature_layers, f"blocks of {declared_layers}")
    return tuple(layer % declared_layers for layer in layers)


def _decoder(text: Fields, schema: Schema) -> DecoderConfig:
    qk_norms = {released: ours for ours, released in _QK_NORM.items()}
    if text.value("qk_norm_type", str) not in qk_norms:
        raise text.wrong("qk_norm_type", f"one of {', '.join(qk_norms)}")
    num_layers = text.value("num_hidden_layers", int)
    theta, yarn = _rope(text, schema)
    layers = None if text.get("rope_scaling_layers") is None else text.values("rope_scaling_layers", int)
    if layers is not None and not all(0 <= layer < num_layers for layer in layers):
        raise text.wrong("rope_scaling_layers", f"layers of {num_layers}")
    return DecoderConfig(
        width=text.value("hidden_size", int),
        num_layers=num_layers,
        num_heads=text.value("num_attention_heads", int),
        num_kv_heads=text.value("num_key_value_heads", int),
        head_dim=text.value("head_dim", int),
        mlp_width=text.value("intermediate_size", int),
        vocab_size=text.value("vocab_size", int),
        additional_vocab_size=text.value("additional_vocab_size", int),
        max_position_embeddings=text.value("max_position_embeddings", int),
        rope_theta=theta,
        rope_scaling=yarn,
        rope_scaling_layers=None if yarn is None else layers,
        norm_placement="output" if text.value("norm_after", bool) else "input",
        qk_norm="full" if text.value("qk_norm_type", str) == "olmo" else "per_head",
        norm_eps=text.value(schema.norm_eps, float),
    )


def _rope(text: Fields, schema: Schema) -> tuple[float, YarnConfig | None]:
    if schema.is_native:
        parameters = text.section("rope_parameters")
        return parameters.value("rope_theta", float), yarn_config(parameters)
    scaling = None if text.get("rope_scaling") is None else yarn_config(text.section("rope_scaling"))
    return text.value("rope_theta", float), scaling


def yarn_config(scaling: Fields) -> YarnConfig | None:
    """What a `rope_scaling` or `rope_parameters` object says; None for no scaling.

    Raises:
        CheckpointError: another kind of scaling, or with another parameter.
    """
    kind = scaling.value("rope_type", str)
    if kind == "default":
        return None
    if kind != "yarn":
        raise scaling.wrong("rope_type", "'yarn' or 'default'")
    known = {field.name: int if field.type == "int" else float for field in dataclasses.fields(YarnConfig)}
    for name, value in scaling.tree.items():
        says_nothing = value is None or (name, value) == ("truncate", True)
        if name not in {*known, "rope_type", "type", "rope_theta"} and not says_nothing:
            raise scaling.wrong(name, "no such parameter: another scaling is not supported")
    values: dict[str, Any] = {name: scaling.value(name, kind) for name, kind in known.items()}
    return YarnConfig(**values)


def _check_rest(fields: Fields, config: ModelConfig, schema: Schema) -> None:
    """Refuse what `ModelConfig` has no field for and what is not as in every released model."""
    token_ids = {token.strip("<|>"): config.decoder.vocab_size + k for k, token in enumerate(EXTRA_TOKENS)}
    for name, value in _leaves(schema_fields(config, schema, token_ids)):
        last = name.rpartition(".")[2]
        if name in _ANY_VALUE or last in _ANY_VALUE or last in _READ:
            fields.get(name)
        else:
            fields.expect(name, value)


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and key not in _READ:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _pair(fields: Fields, name: str) -> tuple[int, int]:
    first, second = fields.values(name, int, 2)
    return first, second


def _canonical(config: ModelConfig) -> ModelConfig:
    decoder = dataclasses.replace(config.decoder, tie_embeddings=False)
    if decoder.rope_scaling is None or decoder.rope_scaling_layers == tuple(range(decoder.num_layers)):
        decoder = dataclasses.replace(decoder, rope_scaling_layers=None)
    encoder = dataclasses.replace(config.vision_encoder, num_declared_layers=config.vision_encoder.num_layers)
    return dataclasses.replace(config, decoder=decoder, vision_encoder=encoder)
