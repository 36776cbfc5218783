"""Molmo2 in plain numpy, float64, one sequence at a time: written from the description (model.md 1.2, 2) and the names
of released tensors (model.md 3.3), with nothing of the torch model in it.

Slow and short on purpose.  Each choice that implementations typically get wrong (model.md 8.1) is a method of its own,
so that molmo2core/testing/wrong_models.py can get it wrong.

Shape legend: S tokens, C crops, P patches of a crop, D values of a patch, N patches of all crops, V visual tokens,
K patches per pool, W width, H heads, h head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from molmo2core.examples import PackedExample, TokenizedExample
from molmo2core.model.config import ModelConfig
from molmo2core.special_tokens import EXTRA_TOKENS, IM_PATCH

Array = npt.NDArray[Any]
AnyExample = TokenizedExample | PackedExample

VIT = "model.vision_backbone.image_vit"
POOL = "model.vision_backbone.image_pooling_2d"
PROJECTOR = "model.vision_backbone.image_projector"
TEXT = "model.transformer"


class ReferenceModel:
    """Args:
    weights: released name -> values.
    """

    def __init__(self, weights: Mapping[str, Array], config: ModelConfig) -> None:
        self.weights = {name: np.asarray(value, dtype=np.float64) for name, value in weights.items()}
        self.config = config

    def logits(self, example: AnyExample) -> Array:
        """[S, base vocabulary]"""
        x = self.embedded(example)
        mask = self.mask(example)
        for layer in range(self.config.decoder.num_layers):
            x = self.block(x, layer, self.positions(example), mask)
        return rms_norm(x, self.weights[f"{TEXT}.ln_f.weight"], self.config.decoder.norm_eps) @ self.head().T

    # 2.1 vision encoder

    def features(self, crops: Array) -> Array:
        """uint8 [C, P, D] -> [N, F]"""
        vision = self.config.vision_encoder
        z = (
            self.linear((crops / 255 - 0.5) / 0.5, f"{VIT}.patch_embedding")
            + self.weights[f"{VIT}.positional_embedding"]
        )
        after = []
        for layer in range(max(vision.feature_layers) + 1):
            z = self.vision_block(z, f"{VIT}.transformer.resblocks.{layer}")
            after.append(z)
        chosen = np.concatenate([after[layer] for layer in self.feature_layers()], axis=-1)
        return chosen.reshape(-1, chosen.shape[-1])

    def feature_layers(self) -> tuple[int, ...]:
        return self.config.vision_encoder.feature_layers

    def vision_block(self, z: Array, name: str) -> Array:
        vision = self.config.vision_encoder
        normed = self.layer_norm(z, f"{name}.attention_norm")
        query, key, value = (self.linear(normed, f"{name}.attention.w{part}") for part in "qkv")
        everything = np.ones((z.shape[1], z.shape[1]), dtype=bool)
        attended = []
        for crop in range(len(z)):
            q, k, v = (split_heads(part[crop], vision.num_heads) for part in (query, key, value))
            attended.append(attention(q, k, v, everything, vision.head_dim))
        z = z + self.linear(np.stack(attended), f"{name}.attention.wo")
        hidden = self.gelu(self.linear(self.layer_norm(z, f"{name}.ffn_norm"), f"{name}.feed_forward.w1"))
        return z + self.linear(hidden, f"{name}.feed_forward.w2")

    def gelu(self, x: Array) -> Array:
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    # 2.2 connector

    def visual(self, example: AnyExample) -> Array:
        """[V, decoder width]"""
        features, pooling = self.features(example.crops), self.pooling(example)
        return np.stack([self.project(self.pool(features, window)) for window in pooling])

    def pooling(self, example: AnyExample) -> Array:
        return example.pooling

    def pool(self, features: Array, window: Array) -> Array:
        """[N, F] and the [K] patches of one token -> [connector width]"""
        connector, valid = self.config.connector, window >= 0
        patches = np.where(valid[:, None], features[np.maximum(window, 0)], 0.0)
        query = self.linear(self.query(patches, valid)[None], f"{POOL}.wq")
        key, value = self.linear(patches, f"{POOL}.wk"), self.linear(patches, f"{POOL}.wv")
        q, k, v = (split_heads(part, connector.num_heads) for part in (query, key, value))
        pooled = attention(q, k, v, self.pool_mask(valid)[None], connector.head_dim)
        return self.linear(pooled, f"{POOL}.wo")[0]

    def query(self, patches: Array, valid: Array) -> Array:
        return patches.sum(axis=0) / max(1, valid.sum())

    def pool_mask(self, valid: Array) -> Array:
        return valid

    def project(self, pooled: Array) -> Array:
        gate, up = self.gate_and_up(pooled)
        return self.weights[f"{PROJECTOR}.w2.weight"] @ (silu(gate) * up)

    def gate_and_up(self, pooled: Array) -> tuple[Array, Array]:
        return self.weights[f"{PROJECTOR}.w1.weight"] @ pooled, self.weights[f"{PROJECTOR}.w3.weight"] @ pooled

    # 2.3 merge

    def embedded(self, example: AnyExample) -> Array:
        """[S, W]"""
        table = np.concatenate([self.weights[f"{TEXT}.wte.embedding"], self.weights[f"{TEXT}.wte.new_embedding"]])
        x = table[example.input_ids]
        im_patch = self.config.decoder.vocab_size + EXTRA_TOKENS.index(IM_PATCH)
        (places,) = np.nonzero(example.input_ids == im_patch)
        assert len(places) == len(example.pooling)
        if len(places):
            x[places] = self.merged(x[places], self.visual(example))
        return x

    def merged(self, embedded: Array, visual: Array) -> Array:
        return embedded + visual

    # 2.4 decoder

    def block(self, x: Array, layer: int, positions: Array, mask: Array) -> Array:
        name = f"{TEXT}.blocks.{layer}"
        for norm, sub_layer in (
            ("attn_norm", lambda y: self.attention(y, layer, positions, mask)),
            ("ff_norm", lambda y: self.mlp(y, name)),
        ):
            x = x + self.normed_sub_layer(x, self.weights[f"{name}.{norm}.weight"], sub_layer)
        return x

    def normed_sub_layer(self, x: Array, weight: Array, sub_layer: Callable[[Array], Array]) -> Array:
        eps = self.config.decoder.norm_eps
        if self.norm_on_input:
            return sub_layer(rms_norm(x, weight, eps))
        return rms_norm(sub_layer(x), weight, eps)

    @property
    def norm_on_input(self) -> bool:
        return self.config.decoder.norm_placement == "input"

    def attention(self, x: Array, layer: int, positions: Array, mask: Array) -> Array:
        decoder, name = self.config.decoder, f"{TEXT}.blocks.{layer}.self_attn"
        rows = [decoder.num_heads * decoder.head_dim] + [decoder.num_kv_heads * decoder.head_dim] * 2
        query, key, value = np.split(self.linear(x, f"{name}.att_proj"), np.cumsum(rows)[:-1], axis=-1)
        query, key = (
            np.stack(
                [self.rotated(head, layer, positions) for head in self.normed_heads(part, f"{name}.{norm}.weight")]
            )
            for part, norm in ((query, "q_norm"), (key, "k_norm"))
        )
        shared = [self.key_head(head) for head in range(decoder.num_heads)]
        values = split_heads(value, decoder.num_kv_heads)
        return self.linear(attention(query, key[shared], values[shared], mask, self.scaling_dim()), f"{name}.attn_out")

    def normed_heads(self, x: Array, name: str) -> Array:
        """[S, H * h] -> [H, S, h]; the norm is of each head (Qwen3) or of the whole projection (OLMo3)."""
        decoder, weight = self.config.decoder, self.weights[name]
        heads = x.shape[-1] // decoder.head_dim
        if decoder.qk_norm == "per_head":
            return rms_norm(split_heads(x, heads), weight, decoder.norm_eps)
        return split_heads(rms_norm(x, weight, decoder.norm_eps), heads)

    def key_head(self, head: int) -> int:
        """Consecutive query heads share a key head."""
        return head // (self.config.decoder.num_heads // self.config.decoder.num_kv_heads)

    def scaling_dim(self) -> float:
        """Scores are divided by the square root of this."""
        return self.config.decoder.head_dim

    def rotated(self, x: Array, layer: int, positions: Array) -> Array:
        """[S, h] of one head, by the angles of its positions: the halves are the pairs."""
        angles = positions[:, None] * self.frequencies(layer)
        cosines, sines = self.waves(angles, layer)
        first, second = np.split(x, 2, axis=-1)
        return np.concatenate([first * cosines - second * sines, second * cosines + first * sines], axis=-1)

    def waves(self, angles: Array, layer: int) -> tuple[Array, Array]:
        """Cosines and sines; YaRN's attention factor is on both."""
        yarn = self.config.decoder.rope_scaling
        factor = yarn.attention_factor if yarn and self.is_scaled(layer) else 1.0
        return factor * np.cos(angles), factor * np.sin(angles)

    def frequencies(self, layer: int) -> Array:
        """[h / 2] (model.md 1.2)"""
        decoder = self.config.decoder
        plain = decoder.rope_theta ** (-2 * np.arange(decoder.head_dim // 2) / decoder.head_dim)
        yarn = decoder.rope_scaling
        if yarn is None or not self.is_scaled(layer):
            return plain
        turns = yarn.original_max_position_embeddings * plain / (2 * math.pi)  # of each pair in the original context
        # The pair that turns beta times, from a straight line through the logarithms of two pairs.
        slope = math.log(turns[1] / turns[0])
        low, high = (math.log(beta / turns[0]) / slope for beta in (yarn.beta_fast, yarn.beta_slow))
        low, high = max(math.floor(low), 0), min(math.ceil(high), decoder.head_dim - 1)
        ramp = np.clip((np.arange(len(plain)) - low) / max(high - low, 0.001), 0, 1)
        return ramp * plain / yarn.factor + (1 - ramp) * plain

    def is_scaled(self, layer: int) -> bool:
        layers = self.config.decoder.rope_scaling_layers
        return layers is None or layer in layers

    def mlp(self, x: Array, name: str) -> Array:
        up, gate = self.up_and_gate(self.linear(x, f"{name}.mlp.ff_proj"))
        return self.linear(silu(gate) * up, f"{name}.mlp.ff_out")

    def up_and_gate(self, fused: Array) -> tuple[Array, Array]:
        first, second = np.split(fused, 2, axis=-1)
        return first, second

    # 2.5 mask, 2.6 positions, 2.7 head

    def mask(self, example: AnyExample) -> Array:
        """bool [S, S]: the rule of model.md 2.5 for each pair."""
        length = len(example.input_ids)
        return np.array([[self.allowed(example, q, k) for k in range(length)] for q in range(length)])

    def allowed(self, example: AnyExample, q: int, k: int) -> bool:
        """Whether token q may attend to token k."""
        of_query, of_key = example.subsegment_ids[q], example.subsegment_ids[k]
        visual = self.is_visual(example)
        ahead = visual[q] and visual[k] and of_query // 100_000 == of_key // 100_000
        return bool(of_query <= of_key and (k <= q or ahead))

    def is_visual(self, example: AnyExample) -> Array:
        return example.is_visual

    def positions(self, example: AnyExample) -> Array:
        return example.position_ids

    def head(self) -> Array:
        return self.weights["lm_head.weight"]

    def linear(self, x: Array, name: str) -> Array:
        return x @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", 0.0)

    def layer_norm(self, x: Array, name: str) -> Array:
        normed = without_gain(x, self.config.vision_encoder.norm_eps)
        return normed * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]


def without_gain(x: Array, eps: float) -> Array:
    """Layer norm without weight and bias."""
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + eps)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """[..., W]"""
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * weight


def silu(x: Array) -> Array:
    """x * sigmoid(x)"""
    return x / (1 + np.exp(-x))


def split_heads(x: Array, heads: int) -> Array:
    """[S, H * h] -> [H, S, h]"""
    return x.reshape(len(x), heads, -1).swapaxes(0, 1)


def attention(query: Array, key: Array, value: Array, mask: Array, dim: float) -> Array:
    """[H, Q, h], [H, K, h], [H, K, h], bool [Q, K] -> [Q, H * h]"""
    scores = np.where(mask, query @ key.swapaxes(1, 2) / math.sqrt(dim), -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    attended = weights / weights.sum(axis=-1, keepdims=True) @ value
    return attended.swapaxes(0, 1).reshape(attended.shape[1], -1)
