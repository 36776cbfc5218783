"""The loss of packs as anybody would write it, to hold the trainer against: one pack at a time, all logits."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from molmo2core.model.attention import AttentionMask
from molmo2core.model.dropout import TokenDropout
from molmo2core.model.molmo2 import Molmo2
from molmo2core.testing.training import Pack
from molmo2core.training.microbatch import MicrobatchMaker


def plain_loss(
    model: Molmo2, maker: MicrobatchMaker, packs: Iterable[tuple[int, Pack]], z_coefficient: float
) -> tuple[Tensor, Tensor]:
    """Mean CE and mean z-loss, weighted by the targets' weights.

    Args:
        maker: with dropout.
        packs: each with its number in its plan.
    """
    cross_entropy = z = weight = torch.zeros(())
    for number, pack in packs:
        made = maker.make([pack], numbers=[number])
        assert made["token_dropout"] is not None and made["dropout_keys"] is not None
        hidden = model(
            input_ids=made["input_ids"],
            position_ids=made["position_ids"],
            mask=AttentionMask(made["subsegment_ids"], made["is_visual"]),
            crops=made["crops"],
            pooling=made["pooling"],
            token_dropout=TokenDropout(probabilities=made["token_dropout"], keys=made["dropout_keys"]),
        )
        logits = hidden[0] @ model.decoder.head_weight.T
        losses = F.cross_entropy(logits, made["target_ids"], reduction="none")
        cross_entropy = cross_entropy + (made["loss_weights"] * losses).sum()
        z = z + z_coefficient * (made["loss_weights"] * logits.logsumexp(-1).square()).sum()
        weight = weight + made["loss_weights"].sum()
    return cross_entropy / weight, z / weight
