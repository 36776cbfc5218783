"""How many parameters a Molmo2 has, by what is trained, adapted and gathered together.  Torch-free.

Compared with the model itself in tests/unit/test_parameter_counts.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from molmo2core.model.config import ModelConfig
from molmo2core.training.config import LowRankPart, TrainingConfig

Unit = Literal["root", "embedding", "vision_block", "connector", "decoder_block"]
"""What FSDP2 gathers at a time (parallel/fsdp.py)."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Parameters that are trained, adapted and gathered together."""

    part: str
    """Of TrainableParts."""
    unit: Unit
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


def count_parameters(model: ModelConfig, config: TrainingConfig, *, trained: bool = False) -> int:
    """All parameters, adapters included, or the trained ones."""
    return count(weights_of(model), config, trained=trained)


def weights_of(model: ModelConfig) -> tuple[Weights, ...]:
    """All of them; the decoder's MLPs are the last."""
    vision, connector, decoder, geometry = model.vision_encoder, model.connector, model.decoder, model.geometry
    features, inner = vision.width * len(vision.feature_layers), vision.num_heads * vision.head_dim
    pooled = connector.num_heads * connector.head_dim
    queries, keys = decoder.num_heads * decoder.head_dim, decoder.num_kv_heads * decoder.head_dim
    table = decoder.vocab_size * decoder.width
    embedding: Unit = "root" if decoder.tie_embeddings else "embedding"
    return (
        Weights(part="input_embedding", unit=embedding, others=table),
        Weights(part="connector", unit=embedding, others=decoder.additional_vocab_size * decoder.width),
        Weights(part="output_head", unit="root", others=0 if decoder.tie_embeddings else table),
        Weights(part="final_norm", unit="root", others=decoder.width),
        Weights(
            part="vision_encoder",
            unit="root",
            others=(geometry.patch_bytes + 1 + geometry.num_patches) * vision.width,
        ),
        Weights(
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
        Weights(
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
        Weights(
            part="decoder",
            unit="decoder_block",
            copies=decoder.num_layers,
            adapted_as="decoder_attention",
            matrices=((decoder.width, queries + 2 * keys), (queries, decoder.width)),
            others=2 * decoder.width + (2 * decoder.head_dim if decoder.qk_norm == "per_head" else queries + keys),
        ),
        Weights(
            part="decoder",
            unit="decoder_block",
            copies=decoder.num_layers,
            adapted_as="decoder_mlp",
            matrices=((decoder.width, 2 * decoder.mlp_width), (decoder.mlp_width, decoder.width)),
        ),
    )


def count(weights: Iterable[Weights], config: TrainingConfig, *, trained: bool, unit: Unit | None = None) -> int:
    """Parameters of all copies, or the trained ones, of everything or of one kind of unit."""
    return sum(w.copies * w.count(config, trained=trained) for w in weights if unit in (None, w.unit))
