"""Reads the plan: one pack after the other, in an order that no number of ranks or workers changes.

    plan entry -> ExampleReader -> Preprocessor.tokenize -> pack_examples -> PackedExample -> Batch of one pack

Global batch b is packs [b * G, (b + 1) * G); data-parallel rank r owns slots [r * G/R, (r + 1) * G/R) of it.  Its
packs, in order, go to its workers in turn, from the position that training starts from.  Ranks of one
context-parallel group pass the same data-parallel rank; each loads every P-th of its packs, and the loader hands them
around (dataloader.PackLoader).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.utils.data import IterableDataset, get_worker_info

from molmo2core.errors import DataError, Molmo2Error
from molmo2core.examples import Batch, Deviation, PackedExample, TokenizedExample
from molmo2core.loading import provenance
from molmo2core.loading.collator import collate_packs
from molmo2core.loading.fitting import drop_last_branch
from molmo2core.packing.concat import pack_examples
from molmo2core.packing.plan import PackPlan
from molmo2core.references import PackPlanRef

if TYPE_CHECKING:
    from molmo2core.preprocessing.preprocessor import Preprocessor
    from molmo2core.shards.reader import ExampleReader

SUBSTITUTE_SEARCH = 64
"""Entries of the following packs among which a substitute is looked for."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PlacedExample:
    """One example of a pack and the plan entry that it comes from."""

    sample: int
    """Global id."""
    epoch: int
    branches: tuple[int, int] | None
    """Half-open range of annotations; None: all."""
    dataset: str
    example: TokenizedExample


@dataclass(frozen=True, kw_only=True)
class LoadedPack:
    """A pack and how it came about."""

    pack: PackedExample
    examples: tuple[PlacedExample, ...]
    deviations: tuple[Deviation, ...]


class PackDataset(IterableDataset[Batch | Molmo2Error]):
    """Packs of a plan from a position on.  Without length: for Composer one endless epoch.

    A medium that does not decode is replaced by the first of the plan's next entries that fits, so that packs keep
    their number and stay a function of the plan.  A real length above the plan's bound (a fault of ours) is an error
    when `strict`, else branches are dropped from the end until the pack fits.  Both are printed, and told by the
    batch.

    Args:
        plan: the packs.
        reference: of the plan; its parents are the shards that `reader` reads, in order.
        reader: examples that the plan's sample ids index.
        preprocessor: makes tokens.
        global_batch_packs: G above.
        data_parallel_rank: r above.
        data_parallel_size: R above.
        turn: (place, number) of this rank among those that take turns in loading these packs.
        strict: see above.
        accept_changed_data: take a position that was saved with other data, mixture or limits.

    Raises:
        DataError: the plan does not index this reader, or G is no multiple of R.
    """

    def __init__(
        self,
        plan: PackPlan,
        *,
        reference: PackPlanRef,
        reader: ExampleReader,
        preprocessor: Preprocessor,
        global_batch_packs: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        turn: tuple[int, int] = (0, 1),
        strict: bool,
        accept_changed_data: bool,
    ) -> None:
        if global_batch_packs % data_parallel_size:
            raise DataError(
                "training.global_batch_packs",
                found=str(global_batch_packs),
                expected=f"a multiple of {data_parallel_size}, the number of data-parallel ranks",
            )
        highest = int(plan.entries["sample"].max(initial=0))
        if highest >= len(reader):
            raise DataError("plan", found=f"sample {highest}", expected=f"samples below {len(reader)}, the shards'")
        self.plan, self._reader, self._preprocessor = plan, reader, preprocessor
        self._made_from = provenance.encode(
            provenance.describe_data(reference, plan.packing, preprocessor, global_batch_packs)
        )
        self._global_batch_packs = global_batch_packs
        self.packs_per_rank = global_batch_packs // data_parallel_size
        """Packs of one batch of this rank."""
        self._first_slot = data_parallel_rank * self.packs_per_rank
        self._turn = turn
        self.loaded_per_batch = math.ceil(self.packs_per_rank / turn[1])
        """At most so many of them are loaded by this rank."""
        self._strict, self._accept_changed_data = strict, accept_changed_data
        self._position = 0
        self.changes: tuple[provenance.Change, ...] = ()
        """What differs from the data of the checkpoint that was resumed from; empty unless it was accepted."""

    @property
    def datasets(self) -> tuple[str, ...]:
        """Names that stand in `Batch.datasets`."""
        return tuple(self._reader.ranges)

    def __iter__(self) -> Iterator[Batch | Molmo2Error]:
        """Batches of one pack, from the position on; an error is the last element (torch would lose its type)."""
        try:
            yield from self._packs()
        except Molmo2Error as error:
            yield error

    def _packs(self) -> Iterator[Batch]:
        """The packs of this worker, in order."""
        worker = get_worker_info()
        own, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        place, turns = self._turn
        first, step = place + own * turns, workers * turns
        first_batch = self._position // self._global_batch_packs
        num_batches = len(self.plan) // self._global_batch_packs - first_batch
        idle = 0.0
        for number in range(first, num_batches * self.packs_per_rank, step):
            if number + step < num_batches * self.packs_per_rank:
                self._reader.prefetch(self.plan.pack(self._index(number + step))["sample"].tolist())
            index = self._index(number)
            loaded = self.load(index)
            datasets = tuple(placed.dataset for placed in loaded.examples)
            batch = collate_packs([loaded.pack], numbers=[index], datasets=[datasets], deviations=loaded.deviations)
            # Summed over packs, the mean of all workers that take turns, also those of other ranks.
            batch["loader_idle_seconds"] = idle / step
            given = time.monotonic()
            yield batch
            idle = time.monotonic() - given
        raise DataError(
            "plan",
            found=f"all {len(self.plan) // self._global_batch_packs} global batches are used",
            expected="training that ends with the plan",
            mend="plan as many packs as steps times global batch",
        )

    def _index(self, number: int) -> int:
        """Place in the plan of this rank's pack `number`, from the position on."""
        batch, slot = divmod(number, self.packs_per_rank)
        return self._position + batch * self._global_batch_packs + self._first_slot + slot

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """Position in the plan and what the plan was made from, as Composer 0.32.1 asks for it when it saves.

        The keys are always the same: sharded checkpoints silently drop others.

        Args:
            num_samples: packs of all ranks that were trained on, in this epoch.
            from_beginning: whether they count from the start of the plan (Composer) or of this run.

        Raises:
            DataError: the number is inside a global batch.
        """
        packs = num_samples if from_beginning else self._position + num_samples
        self._check_position(packs)
        return {"packs": packs, "made_from": self._made_from}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position.  Call before iteration, on every rank.

        Through `stages.train` a position of other data can be reached by the recipe's `resume_from` alone, since
        stages name their folders by content; with `accept_changed_data` training then goes on from the same position
        in the new plan.

        Raises:
            DataError: the state is none, or was saved with other data, mixture or limits, which it names.
        """
        if not isinstance(state.get("packs"), int) or not isinstance(state.get("made_from"), str):
            raise DataError("checkpoint to resume from", found=f"no position in a pack plan: {sorted(state)}")
        changes = provenance.changes_between(state["made_from"], self._made_from)
        if changes and not self._accept_changed_data:
            raise DataError(
                "checkpoint to resume from",
                found=f"other data, mixture or limits (then -> now): {provenance.summary(changes)}",
                expected="the same",
                mend="resume with the recipe that it was made with, start anew, or set accept_changed_data",
            )
        self._check_position(state["packs"])
        if changes:
            _say(f"resumed at pack {state['packs']} on changed data: {provenance.summary(changes)}")
        self._position, self.changes = state["packs"], changes

    def load(self, index: int) -> LoadedPack:
        """One pack of the plan.

        Raises:
            DataError: every medium is broken; or, when strict, the pack is larger than planned.
        """
        limits = self.plan.packing
        drawn: list[PlacedExample] = []
        broken: list[Deviation] = []
        for entry in self.plan.pack(index):
            found = self._tokenize(entry, index)
            if isinstance(found, Deviation):
                broken.append(found)
            else:
                drawn.append(found)
        planned = len(drawn)
        drawn += self._substitutes(index, drawn, len(broken)) if broken else []
        deviations = [
            dataclasses.replace(deviation, by=f"{other.dataset}/{other.example.uid}") if other else deviation
            for deviation, other in itertools.zip_longest(broken, drawn[planned:])
        ]
        while (tokens := sum(len(d.example.input_ids) for d in drawn)) > limits.sequence_tokens or (
            sum(len(d.example.crops) for d in drawn) > limits.crop_budget
        ):
            found_size = f"{tokens} tokens, {sum(len(d.example.crops) for d in drawn)} crops"
            allowed = f"at most {limits.sequence_tokens} and {limits.crop_budget}"
            if self._strict:
                uids = [d.example.uid for d in drawn]
                raise DataError(f"pack {index} ({uids})", found=found_size, expected=allowed)
            number, example, what = drop_last_branch(
                [d.example for d in drawn], too_many_crops=tokens <= limits.sequence_tokens
            )
            why = f"{found_size}, {allowed}: left out {what}"
            cut = drawn[number]
            deviations.append(
                Deviation(kind="shortened", pack=index, dataset=cut.dataset, uid=cut.example.uid, why=why)
            )
            drawn[number : number + 1] = [] if example is None else [dataclasses.replace(cut, example=example)]
        for deviation in deviations:
            instead = f"; {deviation.by} stands in" if deviation.by else ""
            _say(f"pack {index}: {deviation.kind}: {deviation.dataset}/{deviation.uid}: {deviation.why}{instead}")
        return LoadedPack(
            pack=pack_examples([d.example for d in drawn], self._preprocessor.geometry.max_pool),
            examples=tuple(drawn),
            deviations=tuple(deviations),
        )

    def _tokenize(self, entry: Any, pack: int) -> PlacedExample | Deviation:
        """The example of one plan entry, or that its medium does not decode."""
        example = self._reader.example(int(entry["sample"]))
        epoch, first, stop = (int(entry[name]) for name in ("epoch", "first_branch", "stop_branch"))
        branches = None if (first, stop) == (0, len(example.annotations)) else (first, stop)
        try:
            tokenized = self._preprocessor.tokenize(example, epoch=epoch, branches=branches)
        except DataError as error:
            return Deviation(kind="replaced", pack=pack, dataset=example.dataset, uid=example.uid, why=str(error))
        return PlacedExample(
            sample=int(entry["sample"]), epoch=epoch, branches=branches, dataset=example.dataset, example=tokenized
        )

    def _substitutes(self, index: int, drawn: Sequence[PlacedExample], wanted: int) -> list[PlacedExample]:
        """Up to `wanted` of the entries after pack `index` (round the end of the plan) that still fit in it."""
        limits = self.plan.packing
        tokens = limits.sequence_tokens - sum(len(d.example.input_ids) for d in drawn)
        crops = limits.crop_budget - sum(len(d.example.crops) for d in drawn)
        found: list[PlacedExample] = []
        after = int(self.plan.pack_offsets[index + 1])
        for position in range(after, after + SUBSTITUTE_SEARCH):
            candidate = self._tokenize(self.plan.entries[position % len(self.plan.entries)], index)
            if isinstance(candidate, Deviation):  # counted where it was planned
                continue
            size = len(candidate.example.input_ids), len(candidate.example.crops)
            if size[0] <= tokens and size[1] <= crops:
                found.append(candidate)
                tokens, crops = tokens - size[0], crops - size[1]
                if len(found) == wanted:
                    return found
        if not found and not drawn:
            raise DataError(
                f"pack {index}", found="every medium is broken, and no substitute fits", mend="validate the data again"
            )
        return found

    def _check_position(self, packs: int) -> None:
        if packs % self._global_batch_packs:
            raise DataError(
                "training position",
                found=f"{packs} packs",
                expected=f"a multiple of the global batch of {self._global_batch_packs}",
            )


def _say(line: str) -> None:
    print(f"loader: {line}", file=sys.stderr, flush=True)
