"""The one table of tensor names: ours, released, transformers' own, and those of the base models (model.md 3.3, 3.4).

The cells of a line name, layout by layout, the tensors that hold the same rows of numbers: several are concatenated
along dimension 0 (`+`).  A cell takes the place of `*` in its column's pattern, `{i}` counts blocks.  Two tensors of
SigLIP2 also have another shape; base_models.py brings them into ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from molmo2core.model.config import ModelConfig

Layout = Literal["ours", "released", "native", "qwen3", "olmo3", "siglip2"]
Names = tuple[str, ...]
"""Tensors that are concatenated, in this order."""
Line = dict[Layout, Names]

HEAD = "lm_head.weight"
"""The head in every layout but ours."""
BASE_EMBEDDING = "decoder.embedding.base"
"""Ours; it is the head too in a model that ties them."""


def _lines(patterns: Mapping[Layout, str], *cells: Names) -> tuple[Line, ...]:
    return tuple(
        {
            layout: tuple(pattern.replace("*", name) for name in cell.split("+"))
            for (layout, pattern), cell in zip(patterns.items(), line, strict=True)
        }
        for line in cells
    )


def _weight_and_bias(*cells: Names) -> tuple[Names, ...]:
    return tuple(tuple(f"{cell}.{kind}" for cell in line) for line in cells for kind in ("weight", "bias"))


_VISION = _lines(
    {"ours": "vision_encoder.*", "released": "model.vision_backbone.image_vit.*", "native": "model.vision_tower.*",
     "siglip2": "vision_model.embeddings.*"},
    ("position_embedding", "positional_embedding", "positional_embedding", "position_embedding.weight"),
    *_weight_and_bias(("patch_embedding", "patch_embedding", "patch_embedding", "patch_embedding")),
)  # fmt: skip
_VISION_BLOCK = _lines(
    {"ours": "vision_encoder.blocks.{i}.*", "released": "model.vision_backbone.image_vit.transformer.resblocks.{i}.*",
     "native": "model.vision_tower.layers.{i}.*", "siglip2": "vision_model.encoder.layers.{i}.*"},
    *_weight_and_bias(
        ("attention_norm", "attention_norm", "layer_norm1", "layer_norm1"),
        ("query", "attention.wq", "self_attn.q_proj", "self_attn.q_proj"),
        ("key", "attention.wk", "self_attn.k_proj", "self_attn.k_proj"),
        ("value", "attention.wv", "self_attn.v_proj", "self_attn.v_proj"),
        ("attention_out", "attention.wo", "self_attn.o_proj", "self_attn.out_proj"),
        ("mlp_norm", "ffn_norm", "layer_norm2", "layer_norm2"),
        ("mlp_in", "feed_forward.w1", "mlp.fc1", "mlp.fc1"),
        ("mlp_out", "feed_forward.w2", "mlp.fc2", "mlp.fc2"),
    ),
)  # fmt: skip
_CONNECTOR = _lines(
    {"ours": "connector.*", "released": "model.vision_backbone.*", "native": "model.multi_modal_projector.*"},
    *_weight_and_bias(
        ("query", "image_pooling_2d.wq", "image_pooling_2d.q_proj"),
        ("key", "image_pooling_2d.wk", "image_pooling_2d.k_proj"),
        ("value", "image_pooling_2d.wv", "image_pooling_2d.v_proj"),
        ("pool_out", "image_pooling_2d.wo", "image_pooling_2d.o_proj"),
    ),
    ("gate.weight", "image_projector.w1.weight", "image_projector.gate_proj.weight"),
    ("up.weight", "image_projector.w3.weight", "image_projector.up_proj.weight"),
    ("down.weight", "image_projector.w2.weight", "image_projector.down_proj.weight"),
)
_NEW_EMBEDDING = _lines(
    # One line, because transformers has one table, and saves it under the released names cut into equal halves.
    {"ours": "decoder.embedding.*", "released": "model.transformer.wte.*", "native": "model.language_model.*"},
    ("base+new", "embedding+new_embedding", "embed_tokens.weight"),
)
_BASE_EMBEDDING = _lines(
    {"ours": "*", "qwen3": "model.*", "olmo3": "model.*"}, (BASE_EMBEDDING, *["embed_tokens.weight"] * 2)
)
_DECODER = _lines(
    {"ours": "decoder.*", "released": "model.transformer.*", "native": "model.language_model.*", "qwen3": "model.*",
     "olmo3": "model.*"},
    ("norm.weight", "ln_f.weight", "norm.weight", "norm.weight", "norm.weight"),
)  # fmt: skip
_HEAD = _lines({"ours": "*", "released": "*", "native": "*", "qwen3": "*", "olmo3": "*"}, ("decoder.head", *[HEAD] * 4))
_QKV = "self_attn.q_proj+self_attn.k_proj+self_attn.v_proj"
_UP_GATE = "mlp.up_proj+mlp.gate_proj"
_DECODER_BLOCK = _lines(
    {"ours": "decoder.stack.blocks.{i}.*.weight", "released": "model.transformer.blocks.{i}.*.weight",
     "native": "model.language_model.layers.{i}.*.weight", "qwen3": "model.layers.{i}.*.weight",
     "olmo3": "model.layers.{i}.*.weight"},
    ("attention_norm", "attn_norm", "input_layernorm", "input_layernorm", "post_attention_layernorm"),
    ("mlp_norm", "ff_norm", "post_attention_layernorm", "post_attention_layernorm", "post_feedforward_layernorm"),
    ("attention.query_key_value", "self_attn.att_proj", _QKV, _QKV, _QKV),
    ("attention.out", "self_attn.attn_out", "self_attn.o_proj", "self_attn.o_proj", "self_attn.o_proj"),
    ("attention.query_norm", "self_attn.q_norm", "self_attn.q_norm", "self_attn.q_norm", "self_attn.q_norm"),
    ("attention.key_norm", "self_attn.k_norm", "self_attn.k_norm", "self_attn.k_norm", "self_attn.k_norm"),
    ("mlp.up_gate", "mlp.ff_proj", _UP_GATE, _UP_GATE, _UP_GATE),
    ("mlp.down", "mlp.ff_out", "mlp.down_proj", "mlp.down_proj", "mlp.down_proj"),
)  # fmt: skip


def tensor_table(config: ModelConfig) -> tuple[Line, ...]:
    """All lines of one model: every parameter of ours stands in one line for each layout that has it.

    A tied head is no parameter of ours, so its line is missing; files hold it under `HEAD`, equal to the embedding.
    """
    once = (*_VISION, *_CONNECTOR, *_NEW_EMBEDDING, *_BASE_EMBEDDING, *_DECODER)
    return (
        *once,
        *(() if config.decoder.tie_embeddings else _HEAD),
        *(_numbered(line, i) for i in range(config.vision_encoder.num_layers) for line in _VISION_BLOCK),
        *(_numbered(line, i) for i in range(config.decoder.num_layers) for line in _DECODER_BLOCK),
    )


def pairs(config: ModelConfig, layout: Layout) -> tuple[tuple[Names, Names], ...]:
    """(names in `layout`, our names) of the lines that `layout` has."""
    return tuple((line[layout], line["ours"]) for line in tensor_table(config) if layout in line)


def _numbered(line: Line, i: int) -> Line:
    return {layout: tuple(name.format(i=i) for name in names) for layout, names in line.items()}
