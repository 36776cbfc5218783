"""The model as Composer sees it: a microbatch in, a weighted loss out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from composer.models import ComposerModel
from torch import Tensor
from torchmetrics import Metric

from molmo2core.model.attention import AttentionMask
from molmo2core.model.dropout import TokenDropout
from molmo2core.model.loss import LossParts, weighted_loss
from molmo2core.model.molmo2 import Molmo2, VisualRoute
from molmo2core.parallel.fsdp import fsdp_units

_SMALLEST_WEIGHT = 1e-9


class TrainedMolmo2(ComposerModel):  # type: ignore[misc]
    """One child, so that FSDP2 has one root.

    `loss` returns the mean over the microbatch's loss weights.  Composer multiplies it by this microbatch's share of
    the weights of all ranks and microbatches (`accumulate_train_batch_on_tokens`), so that the gradient is that of
    sum(w * loss) / sum(w) over the global batch, however it is cut (composer_streaming.md 2).
    """

    def __init__(self, model: Molmo2, *, z_coefficient: float, metrics: Mapping[str, Metric] | None = None) -> None:
        super().__init__()
        self.model = model
        self.model.fsdp_wrap_fn = fsdp_units(model)  # type: ignore[assignment]
        self.z_coefficient = z_coefficient
        self.held_out_metrics = dict(metrics or {})
        """By name; each has `update(LossParts, microbatch)`."""
        self.parts: LossParts | None = None
        """Of the last microbatch, all detached: what callbacks log after the event AFTER_LOSS."""

    def forward(self, batch: dict[str, Any]) -> Tensor:
        """Hidden states [1, N, W] of this rank's share of the sequence."""
        dropout = None
        if batch["token_dropout"] is not None:
            dropout = TokenDropout(probabilities=batch["token_dropout"], keys=batch["dropout_keys"])
        hidden: Tensor = self.model(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            mask=AttentionMask(batch["subsegment_ids"], batch["is_visual"]),
            crops=batch["crops"],
            pooling=batch["pooling"],
            token_dropout=dropout,
            route=VisualRoute(**batch["route"]) if batch["route"] is not None else None,
        )
        return hidden

    def loss(self, outputs: Tensor, batch: dict[str, Any]) -> dict[str, Tensor]:
        """`total` is differentiated; the others are logged."""
        parts = weighted_loss(
            outputs[0],
            self.model.decoder.head_weight,
            batch["target_ids"],
            batch["loss_weights"],
            self.z_coefficient,
        )
        self.parts = LossParts(*(part.detach() for part in parts))
        weight = max(batch["loss_weight"], _SMALLEST_WEIGHT)
        return {"total": parts.total / weight, "cross_entropy": parts.cross_entropy / weight, "z": parts.z / weight}

    def get_metrics(self, is_train: bool) -> dict[str, Metric]:
        """None of training: callbacks have what they need in `parts`."""
        return {} if is_train else self.held_out_metrics

    def update_metric(self, batch: dict[str, Any], outputs: Tensor, metric: Metric) -> None:
        """Add the losses of a held-out microbatch, of which `outputs` are the hidden states."""
        self.loss(outputs, batch)
        metric.update(self.parts, batch)
