"""From the packs of a batch to what one forward pass takes: merged, padded, and cut to this rank's share.

Packs merge by concatenation.  Documents never see each other, so one pass over several packs is exactly as several
passes, and on a CPU, where a pass over a small pack costs mostly overhead, much faster.

Of a sequence that several ranks share, each gets a part of the tokens, and the crops and pools that it computes
(parallel/visual_sharding.py); the mask alone is of the whole.

Shape legend: S sequence of all merged packs, N this rank's part of it, C crops, P patches, D bytes of a patch,
V visual tokens, K patches per pool, u visual places in this rank's part.
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
from molmo2core.parallel.pack_exchange import CROP_OWNERS
from molmo2core.parallel.visual_sharding import crop_owners, visual_share
from molmo2core.training.config import DropoutConfig

Pack = dict[str, torch.Tensor]
Tasks = Sequence[Sequence[str]]
"""[example][branch] of a pack."""


class Route(TypedDict):
    """A VisualRoute as a dictionary, which Composer moves to a device."""

    sent: tuple[int, ...]
    received: tuple[int, ...]
    order: torch.Tensor
    """[u]"""


class Microbatch(TypedDict):
    """One forward and backward pass of one rank."""

    input_ids: torch.Tensor
    """[1, N]"""
    position_ids: torch.Tensor
    """[1, N]"""
    subsegment_ids: torch.Tensor
    """[1, S]"""
    is_visual: torch.Tensor
    """[1, S]"""
    token_dropout: torch.Tensor | None
    """[1, N] drop probability, or None where all are 0."""
    dropout_keys: torch.Tensor | None
    """[1, N] of model/dropout.py, or None without dropout."""
    crops: torch.Tensor
    """[C, P, D]"""
    pooling: torch.Tensor
    """[V, K]"""
    route: Route | None
    """Of this rank's visual features; None where it has the whole sequence."""
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
        packs = [{CROP_OWNERS: crop_owners(len(pack["crops"]), self.context_size)} | pack for pack in packs]
        merged = with_visual_input(merge_packs(packs), self.im_patch_id)
        pack = pad_pack(merged, self.context_size, at_least=len(packs) * self.tokens_per_pack)
        branches = [names for pack_tasks in tasks for names in pack_tasks]
        dropout = self._token_dropout(packs, range(len(packs)) if numbers is None else numbers, pack["loss_weights"])
        weights = self._part(pack["loss_weights"])
        crops, pooling, route = self._visual_share(pack)
        return Microbatch(
            input_ids=self._part(pack["input_ids"])[None],
            position_ids=self._part(pack["position_ids"])[None],
            subsegment_ids=pack["subsegment_ids"][None],
            is_visual=pack["is_visual"][None],
            token_dropout=None if dropout is None else self._part(dropout.probabilities[0])[None],
            dropout_keys=None if dropout is None else self._part(dropout.keys[0])[None],
            crops=crops,
            pooling=pooling,
            route=route,
            target_ids=self._part(pack["target_ids"]),
            loss_weights=weights,
            task_ids=self._part(tasks_of_tokens(pack["subsegment_ids"], branches)),
            loss_weight=float(weights.sum(dtype=torch.float64)),
            num_packs=len(packs),
        )

    def _part(self, values: torch.Tensor) -> torch.Tensor:
        return shard_of(values, self.context_rank, self.context_size)

    def _visual_share(self, pack: Pack) -> tuple[torch.Tensor, torch.Tensor, Route | None]:
        """Crops, pooling and route of this rank.  One with nothing to do encodes an empty crop, so that all ranks run
        the same modules."""
        crops, pooling = pack["crops"], pack["pooling"]
        if self.context_size == 1:
            return crops, pooling, None
        places = (pack["input_ids"] == self.im_patch_id).reshape(self.context_size, -1).sum(dim=1)
        share = visual_share(
            pooling, pack[CROP_OWNERS], tuple(places.tolist()), self.context_rank, num_patches=crops.shape[1]
        )
        route = Route(sent=share.route.sent, received=share.route.received, order=share.route.order)
        if not len(share.crops):
            return _empty_crop(crops), _first_patch(pooling), route
        # Packs that were handed over have no other crops; those that were not have all of them.
        is_whole = len(crops) == len(pack[CROP_OWNERS])
        return crops[share.crops] if is_whole else crops, share.pooling, route

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
        patches += len(pack.get(CROP_OWNERS, pack["crops"])) * pack["crops"].shape[1]
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
    visual = {"crops": _empty_crop(crops), "pooling": _first_patch(pooling), CROP_OWNERS: torch.zeros(1).long()}
    return pack | longer | visual


def _empty_crop(crops: torch.Tensor) -> torch.Tensor:
    """[1, P, D]"""
    return crops.new_zeros(1, *crops.shape[1:])


def _first_patch(pooling: torch.Tensor) -> torch.Tensor:
    """[1, K]: a pool of one patch, the first."""
    pool = torch.full((1, pooling.shape[1]), PADDING, dtype=pooling.dtype)
    pool[0, 0] = 0
    return pool
