"""From the packs of a batch to what one forward pass takes: merged, padded, and with this rank's share of targets.

Packs merge by concatenation.  Documents never see each other, so one pass over several packs is exactly as several
passes, and on a CPU, where a pass over a small pack costs mostly overhead, much faster.

Shape legend: S sequence of all merged packs, N this rank's share of it, C crops, P patches, D bytes of a patch,
V visual tokens, K patches per pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self, TypedDict

import torch
import torch.nn.functional as F

from molmo2core.annotations import TASKS
from molmo2core.examples import DOCUMENT, PADDING, Batch
from molmo2core.model.dropout import TokenDropout, dropout_keys
from molmo2core.parallel.batch_sharding import pad_pack, shard_of
from molmo2core.training.config import DropoutConfig

Pack = dict[str, torch.Tensor]
Tasks = Sequence[Sequence[str]]
"""[example][branch] of a pack."""


class Microbatch(TypedDict):
    """One forward and backward pass of one rank."""

    input_ids: torch.Tensor
    """[1, S]"""
    position_ids: torch.Tensor
    """[1, S]"""
    subsegment_ids: torch.Tensor
    """[1, S]"""
    is_visual: torch.Tensor
    """[1, S]"""
    token_dropout: torch.Tensor | None
    """[1, S] drop probability, or None where all are 0."""
    dropout_keys: torch.Tensor | None
    """[1, S] of model/dropout.py, or None without dropout."""
    crops: torch.Tensor
    """[C, P, D]"""
    pooling: torch.Tensor
    """[V, K]"""
    target_ids: torch.Tensor
    """[N]"""
    loss_weights: torch.Tensor
    """[N]"""
    task_ids: torch.Tensor
    """[N] place in annotations.TASKS of the task that a target belongs to; PADDING where there is none."""
    loss_weight: float
    """Sum of this rank's loss weights."""
    num_packs: int


class NoCopy(dict[str, Any]):
    """A microbatch that Composer's deep copy leaves alone: it copies each one, pixels and all, for train metrics."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


@dataclass(frozen=True, kw_only=True)
class MicrobatchMaker:
    """Splits a rank's batch into microbatches."""

    im_patch_id: int
    dropout: DropoutConfig
    seed: int = 0
    """Of dropout."""
    context_rank: int = 0
    context_size: int = 1
    tokens_per_pack: int = 0
    """What packs are padded to; 0: they are not."""

    def split(self, batch: Batch, packs_per_microbatch: int | float) -> list[Microbatch]:
        """Microbatches of `packs_per_microbatch` packs each, in order."""
        size = int(packs_per_microbatch)
        cuts = [slice(start, start + size) for start in range(0, len(batch["packs"]), size)]
        packs, tasks, numbers = batch["packs"], batch["tasks"], batch["pack_numbers"]
        return [self.make(packs[cut], tasks[cut], numbers[cut]) for cut in cuts]

    def make(
        self, packs: Sequence[Pack], tasks: Sequence[Tasks] = (), numbers: Sequence[int] | None = None
    ) -> Microbatch:
        """One microbatch of `packs`.

        Args:
            tasks: of each pack, task names [example][branch]; none: unknown.
            numbers: of each pack in its plan, from which its dropout follows; None: 0, 1, ...
        """
        merged = with_visual_input(merge_packs(packs), self.im_patch_id)
        pack = pad_pack(merged, self.context_size, at_least=len(packs) * self.tokens_per_pack)
        targets, weights = (
            shard_of(pack[name], self.context_rank, self.context_size) for name in ("target_ids", "loss_weights")
        )
        branches = [names for pack_tasks in tasks for names in pack_tasks]
        task_ids = shard_of(tasks_of_tokens(pack["subsegment_ids"], branches), self.context_rank, self.context_size)
        dropout = self._token_dropout(packs, range(len(packs)) if numbers is None else numbers, pack["loss_weights"])
        return Microbatch(
            input_ids=pack["input_ids"][None],
            position_ids=pack["position_ids"][None],
            subsegment_ids=pack["subsegment_ids"][None],
            is_visual=pack["is_visual"][None],
            token_dropout=None if dropout is None else dropout.probabilities,
            dropout_keys=None if dropout is None else dropout.keys,
            crops=pack["crops"],
            pooling=pack["pooling"],
            target_ids=targets,
            loss_weights=weights,
            task_ids=task_ids,
            loss_weight=float(weights.sum(dtype=torch.float64)),
            num_packs=len(packs),
        )

    def _token_dropout(
        self, packs: Sequence[Pack], numbers: Sequence[int], loss_weights: torch.Tensor
    ) -> TokenDropout | None:
        """Of merged packs, of which `loss_weights` are; what is added to them is dropped with keys of 0."""
        config = self.dropout
        if not config.residual and not config.on_responses:
            return None
        keys = [
            dropout_keys(self.seed, number, len(pack["input_ids"])) for pack, number in zip(packs, numbers, strict=True)
        ]
        added = len(loss_weights) - sum(map(len, keys))
        return TokenDropout(
            probabilities=torch.where(loss_weights > 0, config.on_responses, config.residual)[None],
            keys=F.pad(torch.cat(keys), (0, added))[None],
        )


def tasks_of_tokens(subsegment_ids: torch.Tensor, tasks: Sequence[Sequence[str]]) -> torch.Tensor:
    """int64 [S] place in TASKS of each token's task; PADDING in roots, in padding and where no task is known.

    Args:
        subsegment_ids: [S] of documents 0, 1, ...
        tasks: [document][branch] names; further documents have none.
    """
    widest = max(map(len, tasks), default=0)
    table = torch.full((len(tasks) + 1, widest + 1), PADDING)  # the last row and column are for everything else
    for document, names in enumerate(tasks):
        table[document, : len(names)] = torch.tensor([TASKS.index(name) for name in names])
    documents, branches = subsegment_ids // DOCUMENT, subsegment_ids % DOCUMENT
    found: torch.Tensor = table[documents.clamp(max=len(tasks)), branches.clamp(max=widest)]
    return torch.where(subsegment_ids == PADDING, PADDING, found)


def merge_packs(packs: Sequence[Pack]) -> Pack:
    """One pack with the documents of all `packs`, numbered on, and pooling indices moved to the joint crops."""
    if len(packs) == 1:
        return packs[0]
    documents, patches = 0, 0
    subsegments: list[torch.Tensor] = []
    pooling: list[torch.Tensor] = []
    for pack in packs:
        ids, pools = pack["subsegment_ids"], pack["pooling"]
        subsegments.append(torch.where(ids == PADDING, PADDING, ids + documents * DOCUMENT))
        pooling.append(torch.where(pools == PADDING, PADDING, pools + patches))
        documents += int(ids.max()) // DOCUMENT + 1
        patches += pack["crops"].shape[0] * pack["crops"].shape[1]
    merged = {name: torch.cat([pack[name] for pack in packs]) for name in packs[0]}
    return merged | {"subsegment_ids": torch.cat(subsegments), "pooling": torch.cat(pooling)}


def with_visual_input(pack: Pack, im_patch_id: int) -> Pack:
    """`pack` as it is, or with one more document of one visual token without a target, if it has no visual input.

    Every rank then runs the vision encoder in every microbatch.  Otherwise ranks disagree about what FSDP gathers,
    and hang; and an encoder that a batch leaves out would be without a gradient on one rank and with one on two.
    """
    if pack["pooling"].shape[0]:
        return pack
    document = (int(pack["subsegment_ids"].max()) // DOCUMENT + 1) * DOCUMENT
    added = {"input_ids": im_patch_id, "target_ids": 0, "position_ids": 0, "subsegment_ids": document}
    added |= {"loss_weights": 0, "is_visual": True}
    longer = {
        name: torch.cat([pack[name], torch.tensor([value], dtype=pack[name].dtype)]) for name, value in added.items()
    }
    crops, pooling = pack["crops"], pack["pooling"]
    first_patch = torch.full((1, pooling.shape[1]), PADDING, dtype=pooling.dtype)
    first_patch[0, 0] = 0
    return pack | longer | {"crops": crops.new_zeros(1, *crops.shape[1:]), "pooling": first_patch}
