"""Names, shapes and numbers of released tensors, and what of ours they hold."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import get_args

import pytest
import torch

from molmo2core.checkpoints.hf_config import released_config
from molmo2core.checkpoints.hf_mapping import num_tensors, our_shapes, released_shapes, to_released
from molmo2core.checkpoints.tensor_table import Layout, pairs
from molmo2core.model.config import ModelConfig, Size, named_config
from molmo2core.model.molmo2 import Molmo2
from molmo2core.testing.tiny_model import Variant, tiny_config, tiny_model
from molmo2core.testing.tiny_tokenizer import tiny_tokenizer

VARIANTS: list[tuple[Variant, bool]] = [("qwen", False), ("qwen", True), ("olmo", False), ("olmo", True)]


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
    assert released_shapes(config) == expected_shapes(config)
    assert num_tensors(config) == len(expected_shapes(config))


@pytest.mark.parametrize(
    ("size", "tensors", "vision", "connector", "decoder", "total"),
    [
        ("4b", 706, 382_505_936, 56_611_328, 4_411_751_936, 4_850_869_200),
        ("8b", 706, 382_505_936, 87_937_536, 8_191_259_648, 8_661_703_120),
        ("o-7b", 674, 382_505_936, 79_745_536, 7_298_535_424, 7_760_786_896),
    ],
)
def test_models_of_released_sizes_have_the_published_numbers(
    size: Size, tensors: int, vision: int, connector: int, decoder: int, total: int
) -> None:
    """model.md 1.5, counted on the modules themselves, on the meta device.  A tied head is stored as a copy, so the 4B
    has one matrix less in memory than in its files.  Would catch any wrong width, and a table that agrees with itself
    but not with the model."""
    config = named_config(size)
    with torch.device("meta"):
        model = Molmo2(config)
    assert all(parameter.is_meta for parameter in model.parameters()) and not list(model.buffers())

    def count(module: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    text = config.decoder
    head = text.vocab_size * text.width if text.tie_embeddings else 0
    assert (head > 0) == (size == "4b")
    assert count(model.vision_encoder) == vision
    assert count(model.connector) == connector
    assert count(model.decoder) + head == decoder
    assert count(model) + head == total
    stored = dict(to_released(model.state_dict(), config))
    assert len(stored) == tensors
    assert sum(tensor.numel() for tensor in stored.values()) == total
    assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == released_shapes(config)
    assert math.prod(stored["lm_head.weight"].shape) == text.vocab_size * text.width


@pytest.mark.parametrize("layout", ["released", "native", "qwen3", "olmo3", "siglip2"])
@pytest.mark.parametrize(("variant", "tied"), VARIANTS)
def test_each_layout_names_each_part_once(layout: Layout, variant: Variant, tied: bool) -> None:
    """Would catch a parameter that no line names, one that two lines name, and one name for two parameters."""
    config = tiny_config(variant, tied=tied)
    parts = {"released": "", "native": "", "siglip2": "vision_encoder.", "qwen3": "decoder.", "olmo3": "decoder."}
    wanted = {name for name in our_shapes(config) if name.startswith(parts[layout])}
    if parts[layout] == "decoder.":
        wanted.remove("decoder.embedding.new")
    ours = [name for _, names in pairs(config, layout) for name in names]
    theirs = [name for names, _ in pairs(config, layout) for name in names]
    assert sorted(ours) == sorted(wanted)
    assert len(set(theirs)) == len(theirs)


@pytest.mark.parametrize(("variant", "tied"), VARIANTS)
def test_every_parameter_goes_out_once_and_unchanged(variant: Variant, tied: bool) -> None:
    """Would catch a copy, which doubles the memory of an export, and a head that is left out because it is tied."""
    model = tiny_model(1, variant, tied=tied)
    state = model.state_dict()
    released = dict(to_released(state, model.config))
    addresses = [tensor.data_ptr() for tensor in released.values()]
    assert set(addresses) == {tensor.data_ptr() for tensor in state.values()}
    assert len(addresses) - len(set(addresses)) == (1 if tied else 0)
    assert torch.equal(released["lm_head.weight"], model.decoder.head_weight)


@torch.no_grad()
def test_fused_matrices_hold_up_before_gate_and_query_key_value() -> None:
    """model.md 3.3: the MLP is linear in its up branch only, and the released halves are ours.  Would catch a gate
    that comes first, which every shape allows."""
    model = tiny_model(1)
    released = dict(to_released(model.state_dict(), model.config))
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


def transformers_state(layout: Layout, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of transformers' own model of that size, on the meta device."""
    import transformers

    text, vision = config.decoder, config.vision_encoder
    sizes = {
        "vocab_size": text.vocab_size,
        "hidden_size": text.width,
        "intermediate_size": text.mlp_width,
        "num_hidden_layers": text.num_layers,
        "num_attention_heads": text.num_heads,
        "num_key_value_heads": text.num_kv_heads,
        "tie_word_embeddings": False,
    }
    with torch.device("meta"):
        if layout == "native":
            special = tiny_tokenizer().special
            model = transformers.Molmo2ForConditionalGeneration(
                transformers.Molmo2Config(**released_config(config, special, dtype="float32"))
            )
        elif layout == "siglip2":
            model = transformers.SiglipModel(
                transformers.SiglipConfig(
                    text_config={"num_hidden_layers": 1},
                    vision_config={
                        "hidden_size": vision.width,
                        "intermediate_size": vision.mlp_width,
                        "num_hidden_layers": vision.num_declared_layers,
                        "num_attention_heads": vision.num_heads,
                        "image_size": 384,
                        "patch_size": config.geometry.patch_size,
                    },
                )
            )
        elif layout == "qwen3":
            model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(head_dim=text.head_dim, **sizes))
        else:
            model = transformers.Olmo3ForCausalLM(transformers.Olmo3Config(**sizes))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    ("size", "layout"),
    [(size, "native") for size in get_args(Size)]
    + [("4b", "qwen3"), ("8b", "qwen3"), ("o-7b", "olmo3"), ("8b", "siglip2"), ("tiny", "qwen3")],
)
def test_transformers_own_models_have_these_names_and_shapes(size: Size, layout: Layout) -> None:
    """At published sizes: the right column of model.md 3.3 and the base models of 3.4.  Would catch a name that only a
    tiny model's round trip agrees with, a 26th block of 27, and a position table that is not 729 rows."""
    config = named_config(size)
    config = replace(config, decoder=replace(config.decoder, tie_embeddings=False))
    theirs, ours = transformers_state(layout, config), our_shapes(config)
    named = {name for names, _ in pairs(config, layout) for name in names}
    assert named <= set(theirs)
    if layout == "siglip2":
        unused = ("text_model.", "logit_", *(f"vision_model.{part}." for part in ("post_layernorm", "head")))
        rest = {name for name in set(theirs) - named if not name.startswith(unused)}
        assert len(rest) == 2 * 16 and all(".layers.25." in name or ".layers.26." in name for name in rest)
    else:
        assert named == set(theirs)
    for names, our_names in pairs(config, layout):
        if our_names == ("vision_encoder.patch_embedding.weight",) and layout == "siglip2":
            assert theirs[names[0]] == (1152, 3, 14, 14)
            continue
        rows = sum(theirs[name][0] for name in names)
        assert rows == sum(ours[name][0] for name in our_names), names
        assert {theirs[name][1:] for name in names} == {ours[name][1:] for name in our_names}, names
