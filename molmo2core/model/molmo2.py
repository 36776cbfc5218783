"""Molmo2: vision encoder -> connector -> decoder, on one device (paper, figure 2; model.md 2).

Shape legend: B batch, S sequence, W decoder width, C crops, P patches, D bytes of a patch, V visual tokens,
K patches per pool.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from torch import Tensor, nn

from molmo2core.errors import DataError
from molmo2core.model.attention import AttentionMask
from molmo2core.model.cache import KeyValueCache
from molmo2core.model.config import ModelConfig
from molmo2core.model.connector import Connector, no_visual_tokens
from molmo2core.model.decoder import Decoder
from molmo2core.model.dropout import TokenDropout
from molmo2core.model.vision_encoder import VisionEncoder
from molmo2core.special_tokens import EXTRA_TOKENS, IM_PATCH

ParameterGroup = Literal["vision_encoder", "connector", "decoder"]


class VisualRoute(NamedTuple):
    """How visual features travel among ranks that share a sequence (parallel/visual_sharding.py)."""

    sent: tuple[int, ...]
    """How many of its tokens, in order, a rank sends to each rank."""
    received: tuple[int, ...]
    """How many it gets from each rank."""
    order: Tensor
    """int64 [tokens received]: which of them stands at each visual place of its part of the sequence."""


def _stay(visual: Tensor, route: VisualRoute) -> Tensor:
    return visual[route.order]


class Molmo2(nn.Module):
    """The whole model.  `im_patch_id` is the token whose embedding visual features are added to."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.exchange: Callable[[Tensor, VisualRoute], Tensor] = _stay
        """Replaced by parallel/context_parallel.py."""
        feature_width = config.vision_encoder.width * len(config.vision_encoder.feature_layers)
        self.vision_encoder = VisionEncoder(config.vision_encoder, config.geometry)
        self.connector = Connector(config.connector, feature_width, config.decoder.width)
        self.decoder = Decoder(config.decoder)

    @property
    def im_patch_id(self) -> int:
        """Third of the new tokens (special_tokens.EXTRA_TOKENS)."""
        return self.config.decoder.vocab_size + EXTRA_TOKENS.index(IM_PATCH)

    def forward(
        self,
        *,
        input_ids: Tensor,
        position_ids: Tensor,
        mask: AttentionMask,
        crops: Tensor,
        pooling: Tensor,
        token_dropout: TokenDropout | None = None,
        cache: KeyValueCache | None = None,
        route: VisualRoute | None = None,
    ) -> Tensor:
        """Hidden states after the final norm, [B, S, W].

        Ranks that share a sequence each pass their part of it, the mask of the whole, and their crops and pools
        (parallel/visual_sharding.py).

        Args:
            input_ids, position_ids: int64 [B, S].
            crops: uint8 [C, P, D] of all rows, in order; C may be 0.
            pooling: int64 [V, K], row v for the v-th <im_patch> of the batch in row-major order.
            token_dropout: see DecoderStack.
            cache: filled by a first call with the whole prompts, used by calls with one token per row.
            route: of this rank's visual features, some of which belong to other ranks' parts of the sequence.

        Raises:
            DataError: the number of <im_patch> tokens is not that of their features.
        """
        embedded = self.decoder.embedding(input_ids)
        if pooling.shape[0]:
            visual = self.encode_visual(crops, pooling)
            embedded = self._add_visual(embedded, input_ids, visual if route is None else self.exchange(visual, route))
        hidden = self.decoder.stack(embedded, position_ids, mask, token_dropout, cache)
        normed: Tensor = self.decoder.norm(hidden)
        return normed

    def encode_visual(self, crops: Tensor, pooling: Tensor) -> Tensor:
        """uint8 [C, P, D], int64 [V, K] -> [V, W]"""
        if not pooling.shape[0]:
            return no_visual_tokens(self.config.decoder.width, self.decoder.embedding.new)
        features: Tensor = self.vision_encoder(crops)
        projected: Tensor = self.connector(features.flatten(0, 1), pooling)
        return projected

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., W] -> [..., base vocabulary]"""
        return hidden @ self.decoder.head_weight.T

    def _add_visual(self, embedded: Tensor, input_ids: Tensor, visual: Tensor) -> Tensor:
        places = (input_ids == self.im_patch_id).flatten().nonzero()[:, 0]
        if places.shape[0] != visual.shape[0]:
            raise visual_mismatch(places.shape[0], visual.shape[0])
        flat = embedded.flatten(0, 1).index_add(0, places, visual.to(embedded.dtype))
        return flat.view_as(embedded)


def visual_mismatch(places: int, features: int) -> DataError:
    """A batch with so many <im_patch> tokens, and so many rows of pooling."""
    return DataError(
        "batch",
        found=f"{places} <im_patch> tokens",
        expected=f"{features}, one for each row of pooling",
        mend="tokenise with this model's geometry and tokenizer",
    )


def group_of_parameter(name: str) -> ParameterGroup:
    """Which optimizer group a parameter of Molmo2 belongs to; new tokens learn with the connector (model.md 3.4)."""
    if name.startswith("vision_encoder."):
        return "vision_encoder"
    return "connector" if name.startswith("connector.") or name == "decoder.embedding.new" else "decoder"
