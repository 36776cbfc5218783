"""Memory of each GPU in one training stage, from shapes alone.  Torch-free: a recipe is checked where no torch is.

    state     shards of float32 weights, of gradients and of AdamW's two moments; what FSDP2 holds whole at a time: the
              root unit (head, norms) and two blocks, with the gradients of the root unit and of one block
    kept      what forward leaves for backward: inputs of checkpointed blocks, all saved tensors of others
    working   what comes on top: the loss with its logits, or one block that is computed again

Ranks that share a sequence hold S/P tokens and C/P crops of everything but attention, which holds all S tokens of H/P
heads.  The mask is two numbers per token, and for FlexAttention four lists of (S / 128)^2 blocks, 1.3 MB for 36,864
tokens: nothing else grows with S^2.

Tensors are counted as autograd saves them, operation by operation, uncompiled (a compiled block holds less).  Compared
with measured bytes in tests/distributed/test_memory_estimate.py.  Not counted: CUDA's context and NCCL's buffers (1 to
2 GB), and what an allocator loses to fragments.

Shape legend: S tokens of a sequence, P ranks that share it, N = S/P, W width, H query heads, G key heads, h head
dimension, M width of the MLP, C crops, V visual tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from molmo2core.model.config import ConnectorConfig, DecoderConfig, ModelConfig, VisionEncoderConfig
from molmo2core.packing.config import PackingConfig
from molmo2core.training.config import TrainingConfig
from molmo2core.training.parameter_counts import Weights, count, weights_of

FULL = 4
"""Bytes of a float32: master weights, optimizer state, residual streams, losses."""
LOSS_CHUNK = 2048
"""As model/loss.py's CHUNK, which imports torch."""
MASK_BLOCK = 128
"""As model/attention_flex.py's BLOCK."""


@dataclass(frozen=True, kw_only=True)
class PackShape:
    """Sizes of a packed sequence."""

    tokens: int
    crops: int
    visual_tokens: int


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes on one rank."""

    weights: float
    gradients: float
    moments: float
    gathered: float
    pack: float
    kept_vision: float
    """Until the vision encoder's backward pass is done."""
    kept_decoder: float
    loss: float
    """Most that the loss takes while it has logits."""
    decoder_block: float
    """Most that one decoder block takes in its backward pass."""
    vision_block: float
    """The same of a vision block or the connector."""

    @property
    def state(self) -> float:
        """What does not depend on the length of a sequence."""
        return self.weights + self.gradients + self.moments + self.gathered

    @property
    def kept(self) -> float:
        """At the end of the forward pass."""
        return self.kept_vision + self.kept_decoder

    @property
    def activations(self) -> float:
        """At the worst moment: in the loss, in a decoder block, or, with the decoder's gone, in a vision block."""
        decoder = self.kept + max(self.loss, self.decoder_block)
        return self.pack + max(decoder, self.kept_vision + self.vision_block)

    @property
    def total(self) -> float:
        """The peak."""
        return self.state + self.activations


def estimate_memory(model: ModelConfig, config: TrainingConfig, pack: PackShape) -> MemoryEstimate:
    """Of one rank, training on one such pack at a time."""
    ranks, shared = config.world_size, config.context_parallel
    weights = weights_of(model)
    parameters, trained = (count(weights, config, trained=t) for t in (False, True))
    mixed = config.precision == "amp_bf16"
    tokens, crops, pools = (ceil(n / shared) for n in (pack.tokens, pack.crops, pack.visual_tokens))
    kept_decoder, decoder_block = _decoder(model.decoder, config, weights, pack.tokens)
    kept_vision, vision_block = _vision(model, config, weights, crops, pools)
    return MemoryEstimate(
        weights=parameters * FULL / ranks,
        gradients=trained * FULL / ranks + _whole_gradients(trained, config),
        moments=2 * trained * FULL / ranks,
        gathered=_gathered(weights, config) if ranks > 1 else 0,
        pack=_on_device(model, pack, tokens=tokens, patches=crops * model.geometry.num_patches, pools=pools),
        kept_vision=kept_vision,
        kept_decoder=kept_decoder,
        loss=_loss(model.decoder, tokens, mixed=mixed, alone=ranks == 1 and config.trainable.output_head),
        decoder_block=decoder_block,
        vision_block=vision_block,
    )


def largest_pack(model: ModelConfig, packing: PackingConfig) -> PackShape:
    """A pack that uses both budgets.  A crop of an image has more visual tokens than a frame."""
    rows, columns = model.geometry.image_pooling
    per_crop = ceil(model.geometry.grid / rows) * ceil(model.geometry.grid / columns)
    return PackShape(
        tokens=packing.sequence_tokens,
        crops=packing.crop_budget,
        visual_tokens=min(packing.sequence_tokens, packing.crop_budget * per_crop),
    )


def _gathered(weights: tuple[Weights, ...], config: TrainingConfig) -> float:
    """The root unit, and two decoder blocks (one is gathered ahead) or, if they are kept, all units."""
    number = FULL if config.sharding.precision == "full" else 2
    root, blocks = (sum(count(weights, config, trained=t, unit="root") for t in (False, True)), weights[-1].copies)
    block, trained_block = (count(weights, config, trained=t, unit="decoder_block") / blocks for t in (False, True))
    if config.sharding.reshard_after_forward:
        return number * (root + 2 * block + trained_block)
    others = count(weights, config, trained=False) - count(weights, config, trained=False, unit="root")
    return number * (root + others + trained_block)


def _decoder(
    decoder: DecoderConfig, config: TrainingConfig, weights: tuple[Weights, ...], length: int
) -> tuple[float, float]:
    """(kept, most in the backward pass of one block)."""
    number, stream, casts = _bytes_of_numbers(config)
    tokens, shared, chosen = (
        ceil(length / config.context_parallel),
        config.context_parallel,
        config.activation_checkpointing,
    )
    dropped = bool(config.dropout.residual or config.dropout.on_responses)
    saved = _saved_by_decoder_block(decoder, length, shared, number=number, dropped=dropped)
    saved += casts * count(weights, config, trained=False, unit="decoder_block") / decoder.num_layers
    inputs = tokens * decoder.width * stream
    kept = _kept(decoder.num_layers, chosen.decoder, inputs, saved, on_host=chosen.on_host)
    # Output of the last block, its norm and what that keeps, and the loss's gradient of it; rotary tables.
    kept += tokens * decoder.width * (3 * FULL + number)
    kept += tokens * decoder.head_dim * 2 * FULL * (2 if decoder.rope_scaling else 1)
    # Gradients of up, gate and their product, and of the residual stream.
    gradients = tokens * (4 * decoder.mlp_width * number + 2 * decoder.width * FULL)
    return kept, gradients + (saved if chosen.decoder else 0)


def _vision(
    model: ModelConfig, config: TrainingConfig, weights: tuple[Weights, ...], crops: int, pools: int
) -> tuple[float, float]:
    """(kept, most in the backward pass of a block or the connector)."""
    number, stream, casts = _bytes_of_numbers(config)
    vision, geometry, chosen, low_rank = (
        model.vision_encoder,
        model.geometry,
        config.activation_checkpointing,
        config.low_rank,
    )
    patches, width = crops * geometry.num_patches, vision.width * len(vision.feature_layers)
    connector_saved = _saved_by_connector(model.connector, vision, pools, geometry.max_pool, number=number)
    features = patches * width * stream
    kept = features + (0 if chosen.connector else connector_saved)
    # Gradients of gathered patches, and of the features that they were gathered from.
    connector = 2 * pools * geometry.max_pool * width * FULL + features + (connector_saved if chosen.connector else 0)
    saved = _saved_by_vision_block(vision, patches, number=number)
    saved += casts * count(weights, config, trained=False, unit="vision_block") / vision.num_layers
    if not config.trainable.vision_encoder and (low_rank is None or "vision_encoder" not in low_rank.parts):
        return kept, max(connector, saved)
    inputs = patches * vision.width * stream
    kept += patches * geometry.patch_bytes * number
    kept += _kept(vision.num_layers, chosen.vision_encoder, inputs, saved, on_host=chosen.on_host)
    gradients = 2 * patches * vision.mlp_width * number + 2 * patches * vision.width * FULL
    return kept, max(connector, gradients + (saved if chosen.vision_encoder else 0))


def _bytes_of_numbers(config: TrainingConfig) -> tuple[int, int, int]:
    """(in products, in residual streams, of each weight that autocast rounds and autograd saves for a block)."""
    if config.precision != "amp_bf16":
        return FULL, FULL, 0
    rounded = config.world_size > 1 and config.sharding.precision != "full"
    # Weights that are gathered in bfloat16 are not rounded once more, and give residual streams of that.
    return (2, 2, 0) if rounded else (2, FULL, 2)


def _whole_gradients(trained: int, config: TrainingConfig) -> float:
    """Of gradients that ranks do not add up before the last pass of a step."""
    if config.sharding.reduce_every_pass or config.world_size == 1:
        return 0
    return trained * (2 if config.sharding.precision == "pure" else FULL)


def _kept(blocks: int, interval: int, inputs: float, saved: float, *, on_host: bool) -> float:
    """Of so many blocks, every `interval`-th of which keeps its inputs alone, here or on the host."""
    checkpointed = ceil(blocks / interval) if interval else 0
    return (blocks - checkpointed) * (inputs + saved) + (0 if on_host else checkpointed * inputs)


def _saved_by_decoder_block(decoder: DecoderConfig, length: int, ranks: int, *, number: int, dropped: bool) -> float:
    """Bytes beside the block's input; `number` is of a number in products."""
    tokens, mixed = ceil(length / ranks), number < FULL
    heads, keys, width = decoder.num_heads, decoder.num_kv_heads, decoder.width
    # A norm of float32 numbers saves them rescaled; of others two float32 copies as well.  Linear layers save inputs.
    on_rounded = 2 * FULL + number if mixed else FULL
    norm = FULL + number if decoder.norm_placement == "input" or not mixed else number + on_rounded
    residual = width * (FULL + 2 * norm + (2 if dropped else 0))
    projected = decoder.head_dim * ((heads + 2 * keys) * number + (heads + keys) * on_rounded + heads * number)
    # Without an exchange values are where they were projected.
    exchanged = heads + keys if ranks == 1 else (heads + 2 * max(keys, ranks)) / ranks
    whole = length * decoder.head_dim * exchanged * number
    attended = length * heads / ranks * (decoder.head_dim * number + FULL)
    return tokens * (residual + projected + 4 * decoder.mlp_width * number) + whole + attended


def _saved_by_vision_block(vision: VisionEncoderConfig, patches: int, *, number: int) -> float:
    """Bytes beside the block's input."""
    inner = vision.num_heads * vision.head_dim
    # Three layers read the first norm: three rounded copies, or the one float32 output.
    norms = vision.width * (3 * number if number < FULL else FULL) + vision.width * number
    saved = vision.width * FULL + norms + 4 * inner * number + 2 * vision.mlp_width * number
    return patches * (saved + vision.num_heads * FULL)


def _saved_by_connector(
    connector: ConnectorConfig, vision: VisionEncoderConfig, pools: int, max_pool: int, *, number: int
) -> float:
    """Bytes beside the features."""
    features, inner = vision.width * len(vision.feature_layers), connector.num_heads * connector.head_dim
    copies = 2 if number < FULL else 1  # of what two layers read
    per_patch = features * copies + 2 * inner
    per_pool = features + 2 * inner + connector.width * copies + 4 * connector.mlp_width
    return pools * number * (max_pool * per_patch + per_pool)


def _loss(decoder: DecoderConfig, tokens: int, *, mixed: bool, alone: bool) -> float:
    """Logits of a chunk and a copy; of the head's size what is rounded, a product, and, `alone`, a gradient beside that
    of earlier microbatches (else it is the root unit's)."""
    logits = 2 * FULL * min(LOSS_CHUNK, tokens) * decoder.vocab_size
    return logits + decoder.vocab_size * decoder.width * ((2 * 2 if mixed else 0) + (FULL if alone else 0))


def _on_device(model: ModelConfig, pack: PackShape, *, tokens: int, patches: int, pools: int) -> float:
    """Ids, positions, targets, weights, tasks and dropout of own tokens; the mask of all; own pixels and pools."""
    blocks = ceil(pack.tokens / MASK_BLOCK) ** 2
    own = tokens * 44 + patches * model.geometry.patch_bytes + pools * model.geometry.max_pool * 8
    return own + pack.tokens * 9 + 4 * FULL * blocks
