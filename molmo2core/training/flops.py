"""Floating-point operations of packs: what the model needs, whatever a kernel, padding or a merge computes besides.

A multiplication and an addition are two operations; norms, rotary positions, softmax and the optimizer are left out, as
usual (PaLM, arXiv 2204.02311, appendix B).  Counted are:

    vision encoder   every patch of every crop; each crop attends to itself, P^2 pairs
    connector        valid patches of each pooling window as keys and values; their mean as the one query
    decoder          every token; attention over the pairs that the rule allows (message_tree/attention_rule.py):
                     documents, branches and visual tokens as they are, never S^2
    head             targets of positive weight only (model/loss.py)

Backward costs a product as often as it has arguments that need a gradient: twice for a trained matrix, once for a
frozen one through which gradients flow, twice for attention, never below the first part that is trained.

Example, worked out by hand: 4B, one plain text of 16,384 tokens, 4,096 of them targets.

    matrices of a block  2,560 x (4,096 + 2 x 1,024) + 4,096 x 2,560 + 3 x 2,560 x 9,728 = 100,925,440 weights
    decoder, dense       2 x 36 x 100,925,440 x 16,384                                 = 119.06 TFLOP
    attended pairs       16,384 x 16,385 / 2                                           = 134,225,920
    attention            4 x 36 x 4,096 x 134,225,920                                  =  79.17 TFLOP
    head                 2 x 2,560 x 151,936 x 4,096                                   =   3.19 TFLOP
    forward              201.41 TFLOP, and training it three times that                = 604.24 TFLOP

A crop adds 617.15 GFLOP in the vision encoder: 128 of them 79.00 TFLOP.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

import torch

from molmo2core.examples import DOCUMENT, PADDING, ROOT
from molmo2core.model.config import ModelConfig
from molmo2core.model.molmo2 import Molmo2
from molmo2core.parallel.pack_exchange import CROP_OWNERS
from molmo2core.training.config import CheckpointedActivations

PARTS = ("vision_encoder", "connector", "embedding", "decoder", "head")
"""In the order of the forward pass.  An embedding costs nothing, but gradients may have to reach it."""
PEAK_TERAFLOPS = {
    "A100": 312.0,
    "A10G": 70.0,
    "A10": 125.0,
    "L4": 121.0,
    "L40S": 362.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "H200": 989.4,
    "GH200": 989.4,
    "B200": 2250.0,
    "GB200": 2500.0,
}
"""Words of a GPU's name -> its makers' peak in bfloat16 with float32 sums, without sparsity."""


@dataclass(frozen=True, kw_only=True)
class PackCounts:
    """What the operations of some packs depend on."""

    tokens: int = 0
    attended_pairs: int = 0
    """Pairs of query and key that the rule allows."""
    targets: int = 0
    """Of positive weight."""
    crops: int = 0
    visual_tokens: int = 0
    pooled_patches: int = 0
    """Valid entries of pooling rows."""

    def __add__(self, other: PackCounts) -> PackCounts:
        return PackCounts(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


@dataclass(frozen=True, kw_only=True)
class PartFlops:
    """Of one forward pass through one part."""

    dense: float
    """Products with weights."""
    attention: float = 0.0
    first: float = 0.0
    """Share of `dense` whose input has a gradient only if an earlier part is trained."""

    @property
    def total(self) -> float:
        """All."""
        return self.dense + self.attention


def pack_counts(packs: Iterable[Mapping[str, torch.Tensor]]) -> PackCounts:
    """Counts of packs as a Batch holds them (on the CPU, before padding)."""
    counts = PackCounts()
    for pack in packs:
        counts += PackCounts(
            tokens=int((pack["subsegment_ids"] != PADDING).sum()),
            attended_pairs=attended_pairs(pack["subsegment_ids"], pack["is_visual"]),
            targets=int((pack["loss_weights"] > 0).sum()),
            crops=len(pack.get(CROP_OWNERS, pack["crops"])),
            visual_tokens=len(pack["pooling"]),
            pooled_patches=int((pack["pooling"] != PADDING).sum()),
        )
    return counts


def attended_pairs(subsegment_ids: torch.Tensor, is_visual: torch.Tensor) -> int:
    """How many pairs the attention rule allows, padding left out, from the lengths of roots and branches alone.

    Args:
        subsegment_ids: int64 [S], the root of a document before its branches, branches ascending.
        is_visual: bool [S].
    """
    ids, run_of_token, lengths = torch.unique_consecutive(subsegment_ids, return_inverse=True, return_counts=True)
    visual = torch.zeros_like(lengths).index_add_(0, run_of_token, is_visual.long())
    documents, real, is_root = ids // DOCUMENT, ids != PADDING, ids % DOCUMENT == ROOT
    of_document = torch.zeros(int(documents.max()) + 1, 2, 2, dtype=torch.int64)
    numbers = torch.stack([lengths, visual], dim=1)
    for kind, chosen in enumerate((real & is_root, real & ~is_root)):  # [document, root or branches, tokens or visual]
        of_document[:, kind].index_add_(0, documents[chosen], numbers[chosen])
    own_past = (lengths * (lengths + 1) // 2)[real].sum()
    roots_of_branches = (of_document[:, 0, 0] * of_document[:, 1, 0]).sum()
    # Ahead, a visual token sees visual tokens of its own subsegment and, from a branch, of later branches.
    visual_ahead = (of_document[..., 1] * (of_document[..., 1] - 1) // 2).sum()
    return int(own_past + roots_of_branches + visual_ahead)


def forward_flops(config: ModelConfig, counts: PackCounts) -> dict[str, PartFlops]:
    """Operations of one forward pass over packs with these counts, by part."""
    vision, connector, decoder = config.vision_encoder, config.connector, config.decoder
    patches = counts.crops * config.geometry.num_patches
    inner = vision.num_heads * vision.head_dim
    embedding = config.geometry.patch_bytes * vision.width
    vision_block = 4 * vision.width * inner + 2 * vision.width * vision.mlp_width
    pooled = connector.num_heads * connector.head_dim
    feature_width = vision.width * len(vision.feature_layers)
    projector = connector.mlp_width * (2 * connector.width + decoder.width)
    pooling_inputs = feature_width * pooled * (counts.visual_tokens + 2 * counts.pooled_patches)
    queries, keys = decoder.num_heads * decoder.head_dim, decoder.num_kv_heads * decoder.head_dim
    block = decoder.width * (2 * queries + 2 * keys + 3 * decoder.mlp_width)
    return {
        "vision_encoder": PartFlops(
            dense=2.0 * patches * (embedding + vision.num_layers * vision_block),
            attention=4.0 * vision.num_layers * inner * patches * config.geometry.num_patches,
            first=2.0 * patches * embedding,
        ),
        "connector": PartFlops(
            dense=2.0 * (pooling_inputs + counts.visual_tokens * (pooled * connector.width + projector)),
            attention=4.0 * pooled * counts.pooled_patches,
            first=2.0 * pooling_inputs,
        ),
        "embedding": PartFlops(dense=0.0),
        "decoder": PartFlops(
            dense=2.0 * counts.tokens * decoder.num_layers * block,
            attention=4.0 * decoder.num_layers * queries * counts.attended_pairs,
        ),
        "head": PartFlops(dense=2.0 * counts.targets * decoder.width * decoder.vocab_size),
    }


def training_flops(forward: Mapping[str, PartFlops], trained: Mapping[str, float]) -> float:
    """Operations of forward and backward.

    Args:
        forward: by part, from `forward_flops`.
        trained: share of each part's weights that are trained, from `trained_shares`.
    """
    total, flows = 0.0, False
    for name in PARTS:
        part = forward[name]
        total += part.total + part.dense * trained[name]
        if flows or trained[name]:
            total += part.dense + 2 * part.attention - (0.0 if flows else part.first)
            flows = True
    return total


def recomputed_flops(forward: Mapping[str, PartFlops], recomputed: Mapping[str, float]) -> float:
    """Operations that activation checkpointing does a second time.

    Args:
        recomputed: share of each part whose activations are not kept.
    """
    return sum(share * forward[name].total for name, share in recomputed.items())


def trained_shares(model: Molmo2) -> dict[str, float]:
    """Share of the elements of each part's matrices that need a gradient.  Call before parameters are sharded.

    Adapters of low rank count as a part's matrices; what they add to its forward pass is left out.
    """
    decoder = model.decoder
    matrices: dict[str, Iterable[torch.Tensor]] = {
        "vision_encoder": model.vision_encoder.parameters(),
        "connector": model.connector.parameters(),
        "embedding": decoder.embedding.parameters(),
        "decoder": decoder.stack.parameters(),
        "head": [decoder.head_weight],
    }
    return {name: _trained_share(parameters) for name, parameters in matrices.items()}


def recomputed_shares(config: ModelConfig, chosen: CheckpointedActivations) -> dict[str, float]:
    """Share of each part whose activations are not kept (parallel/blocks.py)."""
    layers = {"vision_encoder": config.vision_encoder.num_layers, "decoder": config.decoder.num_layers}
    intervals = {"vision_encoder": chosen.vision_encoder, "decoder": chosen.decoder}
    shares = {
        name: len(range(0, count, intervals[name])) / count if intervals[name] else 0.0
        for name, count in layers.items()
    }
    return shares | {"connector": float(chosen.connector)}


def peak_flops(device_name: str) -> float | None:
    """Operations per second at most, by the longest name in PEAK_TERAFLOPS whose words `device_name` has."""
    words = set(device_name.replace("-", " ").split())
    known = [name for name in PEAK_TERAFLOPS if set(name.split()) <= words]
    return PEAK_TERAFLOPS[max(known, key=len)] * 1e12 if known else None


def _trained_share(parameters: Iterable[torch.Tensor]) -> float:
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    return sum(matrix.numel() for matrix in matrices if matrix.requires_grad) / sum(map(torch.numel, matrices))
