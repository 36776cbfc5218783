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

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil
from typing import Literal

from molmo2core.model.config import ConnectorConfig, DecoderConfig, ModelConfig, VisionEncoderConfig
from molmo2core.packing.config import PackingConfig
from molmo2core.training.config import LowRankPart, TrainingConfig

FULL = 4
"""Bytes of a float32: master weights, optimizer state, residual streams, losses."""
LOSS_CHUNK = 2048
"""As model/loss.py's CHUNK, which imports torch."""
MASK_BLOCK = 128
"""As model/attention_flex.py's BLOCK."""

_Unit = Literal["root", "embedding", "vision_block", "connector", "decoder_block"]
"""What FSDP2 gathers at a time (parallel/fsdp.py)."""


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


@dataclass(frozen=True, kw_only=True)
class _Weights:
    """Parameters that are trained, adapted and gathered together."""

    part: str
    """Of TrainableParts."""
    unit: _Unit
    copies: int = 1
    matrices: tuple[tuple[int, int], ...] = ()
    """(inputs, outputs) of those that adapters may be added to."""
    others: int = 0
    adapted_as: LowRankPart | None = None

    def count(self, config: TrainingConfig, *, trained: bool) -> int:
        """Parameters of one copy, or the trained ones among them."""
        plain = sum(inputs * outputs for inputs, outputs in self.matrices) + self.others
        low_rank = config.low_rank
        is_adapted = low_rank is not None and self.adapted_as in low_rank.parts
        added = low_rank.rank * sum(map(sum, self.matrices)) if low_rank is not None and is_adapted else 0
        return (plain if not trained or getattr(config.trainable, self.part) else 0) + added


def estimate_memory(model: ModelConfig, config: TrainingConfig, pack: PackShape) -> MemoryEstimate:
    """Of one rank, training on one such pack at a time."""
    ranks, shared = config.world_size, config.context_parallel
    weights = _weights(model)
    parameters, trained = (_count(weights, config, trained=t) for t in (False, True))
    mixed = config.precision == "amp_bf16"
    number = 2 if mixed else FULL
    tokens, crops = ceil(pack.tokens / shared), ceil(pack.crops / shared)
    patches, pools = crops * model.geometry.num_patches, ceil(pack.visual_tokens / shared)
    decoder, vision = model.decoder, model.vision_encoder
    dropped = bool(config.dropout.residual or config.dropout.on_responses)
    # What is gathered in bfloat16 gives a residual stream of that.
    rounds = mixed and ranks > 1 and config.sharding.precision != "full"
    stream = 2 if rounds else FULL
    # Weights that autocast has rounded are saved for a block's backward pass, unless they are gathered like that.
    casts = number if mixed and not rounds else 0
    decoder_saved = _saved_by_decoder_block(decoder, pack.tokens, shared, number=number, dropped=dropped)
    decoder_saved += casts * _count(weights, config, trained=False, unit="decoder_block") / decoder.num_layers
    vision_saved = _saved_by_vision_block(vision, patches, number=number)
    vision_saved += casts * _count(weights, config, trained=False, unit="vision_block") / vision.num_layers
    connector_saved = _saved_by_connector(model.connector, vision, pools, model.geometry.max_pool, number=number)
    chosen = config.activation_checkpointing
    trains_vision = config.trainable.vision_encoder or (
        config.low_rank is not None and "vision_encoder" in config.low_rank.parts
    )
    features = patches * vision.width * len(vision.feature_layers) * stream
    kept_vision = features + (0 if chosen.connector else connector_saved)
    if trains_vision:
        kept_vision += patches * model.geometry.patch_bytes * number
        kept_vision += _kept(
            vision.num_layers,
            chosen.vision_encoder,
            patches * vision.width * FULL,
            vision_saved,
            on_host=chosen.on_host,
        )
    kept_decoder = _kept(
        decoder.num_layers, chosen.decoder, tokens * decoder.width * stream, decoder_saved, on_host=chosen.on_host
    )
    # Output of the last block, its norm and what that keeps, and the loss's gradient of it; rotary tables.
    kept_decoder += tokens * decoder.width * (3 * FULL + number)
    kept_decoder += tokens * decoder.head_dim * 2 * FULL * (2 if decoder.rope_scaling else 1)
    again_decoder, again_vision = (
        (decoder_saved if chosen.decoder else 0),
        (vision_saved if chosen.vision_encoder else 0),
    )
    vision_backward = again_vision + 2 * patches * vision.mlp_width * number + 2 * patches * vision.width * FULL
    width = vision.width * len(vision.feature_layers)
    connector_backward = (
        connector_saved if chosen.connector else 0
    ) + 2 * pools * model.geometry.max_pool * width * FULL
    return MemoryEstimate(
        weights=parameters * FULL / ranks,
        gradients=trained * FULL / ranks + _whole_gradients(trained, config),
        moments=2 * trained * FULL / ranks,
        gathered=_gathered(weights, config) if ranks > 1 else 0,
        pack=_on_device(model, pack, tokens=tokens, patches=patches, pools=pools),
        kept_vision=kept_vision,
        kept_decoder=kept_decoder,
        loss=_loss(decoder, tokens, mixed=mixed, alone=ranks == 1 and config.trainable.output_head),
        # Gradients of up, gate and their product, and of the residual stream.
        decoder_block=again_decoder + tokens * (4 * decoder.mlp_width * number + 2 * decoder.width * FULL),
        vision_block=max(vision_backward if trains_vision else vision_saved, connector_backward + features),
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


def count_parameters(model: ModelConfig, config: TrainingConfig, *, trained: bool = False) -> int:
    """All parameters, adapters included, or the trained ones."""
    return _count(_weights(model), config, trained=trained)


def _weights(model: ModelConfig) -> tuple[_Weights, ...]:
    vision, connector, decoder, geometry = model.vision_encoder, model.connector, model.decoder, model.geometry
    features, inner = vision.width * len(vision.feature_layers), vision.num_heads * vision.head_dim
    pooled = connector.num_heads * connector.head_dim
    queries, keys = decoder.num_heads * decoder.head_dim, decoder.num_kv_heads * decoder.head_dim
    table = decoder.vocab_size * decoder.width
    embedding: _Unit = "root" if decoder.tie_embeddings else "embedding"
    return (
        _Weights(part="input_embedding", unit=embedding, others=table),
        _Weights(part="connector", unit=embedding, others=decoder.additional_vocab_size * decoder.width),
        _Weights(part="output_head", unit="root", others=0 if decoder.tie_embeddings else table),
        _Weights(part="final_norm", unit="root", others=decoder.width),
        _Weights(
            part="vision_encoder",
            unit="root",
            others=(geometry.patch_bytes + 1 + geometry.num_patches) * vision.width,
        ),
        _Weights(
            part="vision_encoder",
            unit="vision_block",
            copies=vision.num_layers,
            adapted_as="vision_encoder",
            matrices=(
                *((vision.width, inner),) * 3,
                (inner, vision.width),
                (vision.width, vision.mlp_width),
                (vision.mlp_width, vision.width),
            ),
            others=3 * inner + vision.mlp_width + 6 * vision.width,
        ),
        _Weights(
            part="connector",
            unit="connector",
            adapted_as="connector",
            matrices=(
                *((features, pooled),) * 3,
                (pooled, connector.width),
                *((connector.width, connector.mlp_width),) * 2,
                (connector.mlp_width, decoder.width),
            ),
            others=3 * pooled + connector.width,
        ),
        _Weights(
            part="decoder",
            unit="decoder_block",
            copies=decoder.num_layers,
            adapted_as="decoder_attention",
            matrices=((decoder.width, queries + 2 * keys), (queries, decoder.width)),
            others=2 * decoder.width + (2 * decoder.head_dim if decoder.qk_norm == "per_head" else queries + keys),
        ),
        _Weights(
            part="decoder",
            unit="decoder_block",
            copies=decoder.num_layers,
            adapted_as="decoder_mlp",
            matrices=((decoder.width, 2 * decoder.mlp_width), (decoder.mlp_width, decoder.width)),
        ),
    )


def _count(weights: Iterable[_Weights], config: TrainingConfig, *, trained: bool, unit: _Unit | None = None) -> int:
    return sum(w.copies * w.count(config, trained=trained) for w in weights if unit in (None, w.unit))


def _gathered(weights: tuple[_Weights, ...], config: TrainingConfig) -> float:
    """The root unit, and two decoder blocks (one is gathered ahead) or, if they are kept, all units."""
    number = FULL if config.sharding.precision == "full" else 2
    root, blocks = (sum(_count(weights, config, trained=t, unit="root") for t in (False, True)), weights[-1].copies)
    block, trained_block = (_count(weights, config, trained=t, unit="decoder_block") / blocks for t in (False, True))
    if config.sharding.reshard_after_forward:
        return number * (root + 2 * block + trained_block)
    others = _count(weights, config, trained=False) - _count(weights, config, trained=False, unit="root")
    return number * (root + others + trained_block)


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
