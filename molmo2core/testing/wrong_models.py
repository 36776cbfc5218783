"""Molmo2 with one thing wrong: the traps of model.md 8.1 that concern the model, and some more.

Each is the reference with one method exchanged (reference_model.py has the right one).  A test whose inputs tell our
model from each of them would see the mistake.
"""

from __future__ import annotations

import math

import numpy as np

from molmo2core.examples import PADDING, ROOT
from molmo2core.testing.reference_model import AnyExample, Array, ReferenceModel, rms_norm, split_heads, without_gain


class GateBeforeUp(ReferenceModel):
    """The fused matrix read in the order of most other checkpoints."""

    def up_and_gate(self, fused: Array) -> tuple[Array, Array]:
        first, second = np.split(fused, 2, axis=-1)
        return second, first


class OtherNormPlacement(ReferenceModel):
    """OLMo3's norms on the inputs of sub-layers, as their released names suggest; Qwen3's on the outputs."""

    @property
    def norm_on_input(self) -> bool:
        return not super().norm_on_input


class NormPerHead(ReferenceModel):
    """OLMo3's q/k norm after the split into heads."""

    def normed_heads(self, x: Array, name: str) -> Array:
        heads = x.shape[-1] // self.config.decoder.head_dim
        weight = self.weights[name].reshape(heads, 1, -1)
        return rms_norm(split_heads(x, heads), weight, self.config.decoder.norm_eps)


class YarnOnOtherLayers(ReferenceModel):
    """The set of layers inverted."""

    def is_scaled(self, layer: int) -> bool:
        return not super().is_scaled(layer)


class YarnOnAllLayers(ReferenceModel):
    """The list ignored."""

    def is_scaled(self, layer: int) -> bool:
        return True


class NoAttentionFactor(ReferenceModel):
    """Frequencies scaled, cosines and sines not."""

    def waves(self, angles: Array, layer: int) -> tuple[Array, Array]:
        return np.cos(angles), np.sin(angles)


class AttentionFactorOnCosines(ReferenceModel):
    """Half of it."""

    def waves(self, angles: Array, layer: int) -> tuple[Array, Array]:
        return super().waves(angles, layer)[0], np.sin(angles)


class SlidingWindow(ReferenceModel):
    """The window of OLMo3's own configuration."""

    def allowed(self, example: AnyExample, q: int, k: int) -> bool:
        return super().allowed(example, q, k) and abs(q - k) < 16


class HeadDimFromWidth(ReferenceModel):
    """Width / heads in the scale of the scores."""

    def scaling_dim(self) -> float:
        return self.config.decoder.width / self.config.decoder.num_heads


class FeaturesInOtherOrder(ReferenceModel):
    """The earlier block first."""

    def feature_layers(self) -> tuple[int, ...]:
        return super().feature_layers()[::-1]


class FeaturesOneBlockEarly(ReferenceModel):
    """Block numbers taken for indices into a list that begins with the embedding."""

    def feature_layers(self) -> tuple[int, ...]:
        return tuple(layer - 1 for layer in super().feature_layers())


class FinalVisionNorm(ReferenceModel):
    """Features through a last layer norm."""

    def features(self, crops: Array) -> Array:
        features = super().features(crops)
        return without_gain(features, self.config.vision_encoder.norm_eps)


class ChannelsFirst(ReferenceModel):
    """Patches flattened as channel, row, column."""

    def features(self, crops: Array) -> Array:
        side = self.config.geometry.patch_size
        pixels = crops.reshape(*crops.shape[:2], side, side, 3)
        return super().features(np.moveaxis(pixels, -1, 2).reshape(crops.shape))


class MeanOverAllSlots(ReferenceModel):
    """The query divided by K."""

    def query(self, patches: Array, valid: Array) -> Array:
        return patches.mean(axis=0)


class NoPoolMask(ReferenceModel):
    """Empty slots zeroed, but attended to: their keys and values are the biases."""

    def pool_mask(self, valid: Array) -> Array:
        return np.ones_like(valid)


class ReplacedEmbedding(ReferenceModel):
    """Features instead of the `<im_patch>` embedding."""

    def merged(self, embedded: Array, visual: Array) -> Array:
        return visual


class BlockPerImage(ReferenceModel):
    """Bidirectional attention within each contiguous run of visual tokens only."""

    def allowed(self, example: AnyExample, q: int, k: int) -> bool:
        one_run = bool(example.is_visual[min(q, k) : max(q, k) + 1].all())
        return super().allowed(example, q, k) and (k <= q or one_run)


class CausalOnly(ReferenceModel):
    """No bidirectional attention, which is what transformers computes without token types."""

    def is_visual(self, example: AnyExample) -> Array:
        return np.zeros_like(example.is_visual)


class TextBetweenIsVisual(ReferenceModel):
    """Time stamps and image numbers taken for visual tokens, as all of the root."""

    def is_visual(self, example: AnyExample) -> Array:
        return np.asarray(example.subsegment_ids % 100_000 == ROOT)


class PoolingPerImage(ReferenceModel):
    """Absolute pooling indices taken as relative to an image of two crops."""

    def pooling(self, example: AnyExample) -> Array:
        patches = 2 * self.config.geometry.num_patches
        return np.where(example.pooling == PADDING, PADDING, example.pooling % patches)


class PositionsGoOn(ReferenceModel):
    """Positions that do not restart at a branch."""

    def positions(self, example: AnyExample) -> Array:
        document_starts = np.nonzero(np.diff(example.subsegment_ids // 100_000, prepend=-1))[0]
        counts = np.diff(document_starts, append=len(example.position_ids))
        return np.arange(len(example.position_ids)) - np.repeat(document_starts, counts)


class EmptySlotsAreFirstPatch(ReferenceModel):
    """Narrow windows widened without masks."""

    def pooling(self, example: AnyExample) -> Array:
        return np.maximum(example.pooling, 0)


class BranchesSeeEachOther(ReferenceModel):
    """The subsegment rule left out."""

    def allowed(self, example: AnyExample, q: int, k: int) -> bool:
        same = example.subsegment_ids[q] // 100_000 == example.subsegment_ids[k] // 100_000
        return super().allowed(example, q, k) or bool(same and k <= q)


class ImagesSeeOtherExamples(ReferenceModel):
    """Bidirectional attention across the examples of a pack: an earlier image sees a later example's."""

    def allowed(self, example: AnyExample, q: int, k: int) -> bool:
        both = example.is_visual[q] and example.is_visual[k] and q < k
        return super().allowed(example, q, k) or bool(both)


class InterleavedKeyHeads(ReferenceModel):
    """Query heads share key heads in turn instead of consecutively."""

    def key_head(self, head: int) -> int:
        return head % self.config.decoder.num_kv_heads


class NeighbouringPairs(ReferenceModel):
    """Rotary pairs (0, 1), (2, 3), ... instead of the two halves."""

    def rotated(self, x: Array, layer: int, positions: Array) -> Array:
        halves = super().rotated(np.concatenate([x[:, ::2], x[:, 1::2]], axis=-1), layer, positions)
        return np.stack(np.split(halves, 2, axis=-1), axis=-1).reshape(x.shape)


class ExactGelu(ReferenceModel):
    """GELU by the error function instead of its tanh approximation."""

    def gelu(self, x: Array) -> Array:
        return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


class ProjectorUpIsGate(ReferenceModel):
    """w1 and w3 of the projector exchanged."""

    def gate_and_up(self, pooled: Array) -> tuple[Array, Array]:
        gate, up = super().gate_and_up(pooled)
        return up, gate


WRONG: tuple[tuple[str, str, type[ReferenceModel]], ...] = (
    ("01", "qwen", GateBeforeUp),
    ("02", "olmo", OtherNormPlacement),
    ("02", "qwen", OtherNormPlacement),
    ("03", "olmo", NormPerHead),
    ("04", "olmo", YarnOnOtherLayers),
    ("04", "olmo", YarnOnAllLayers),
    ("05", "olmo", NoAttentionFactor),
    ("05", "olmo", AttentionFactorOnCosines),
    ("06", "olmo", SlidingWindow),
    ("07", "4b", HeadDimFromWidth),
    ("08", "qwen", FeaturesInOtherOrder),
    ("09", "qwen", FeaturesOneBlockEarly),
    ("09", "qwen", FinalVisionNorm),
    ("10", "qwen", ChannelsFirst),
    ("11", "qwen", MeanOverAllSlots),
    ("12", "qwen", NoPoolMask),
    ("13", "qwen", ReplacedEmbedding),
    ("14", "qwen", BlockPerImage),
    ("14", "qwen", CausalOnly),
    ("15", "qwen", TextBetweenIsVisual),
    ("25", "qwen", PoolingPerImage),
    ("27", "qwen", PositionsGoOn),
    ("28", "qwen", EmptySlotsAreFirstPatch),
    ("2.2", "qwen", ProjectorUpIsGate),
    ("2.1", "qwen", ExactGelu),
    ("2.4", "qwen", InterleavedKeyHeads),
    ("2.4", "qwen", NeighbouringPairs),
    ("2.5", "qwen", BranchesSeeEachOther),
    ("2.5", "qwen", ImagesSeeOtherExamples),
)
"""(Number of the trap, or section of model.md that says what is right; the one of tiny_model.TINY_CONFIGS that shows
the mistake; the mistake)."""
