"""Reads the plan: one pack after the other, in an order that no number of ranks or workers changes.

    plan entry -> ExampleReader -> Preprocessor.tokenize -> pack_examples -> PackedExample

Global batch b is packs [b * G, (b + 1) * G); data-parallel rank r owns slots [r * G/R, (r + 1) * G/R) of it, and
worker w of W the batches b0 + w, b0 + w + W, ... after the position b0 that training starts from.  Ranks of one
context-parallel group pass the same data-parallel rank and get equal packs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch.utils.data import IterableDataset, get_worker_info

from molmo2core.errors import DataError, Molmo2Error
from molmo2core.examples import PackedExample, TokenizedExample
from molmo2core.loading.fitting import drop_last_branch
from molmo2core.packing.concat import pack_examples
from molmo2core.packing.plan import PackPlan

if TYPE_CHECKING:
    from molmo2core.preprocessing.preprocessor import Preprocessor
    from molmo2core.shards.reader import ExampleReader

MAX_BROKEN_FRACTION = 0.01
"""More media that cannot be decoded than this share of what one worker has read end the training."""
MIN_BROKEN = 10
"""So many broken media are always borne."""
SUBSTITUTE_SEARCH = 64
"""Entries of the following packs among which a substitute is looked for."""


class PackDataset(IterableDataset[PackedExample | Molmo2Error]):
    """Packs of a plan from a position on.  Without length: for Composer one endless epoch.

    A medium that cannot be decoded is replaced by the first of the plan's next entries that fits, so that packs keep
    their number and stay a function of the plan.  A real length above the plan's bound (a fault of ours) is an error
    when `strict`, else branches are dropped from the end until the pack fits; both are counted and printed.

    Args:
        plan: the packs.
        fingerprint: digest of the plan's folder; a state of another plan is refused.
        reader: examples that the plan's sample ids index.
        preprocessor: makes tokens.
        global_batch_packs: G above.
        data_parallel_rank: r above.
        data_parallel_size: R above.
        strict: see above.

    Raises:
        DataError: the plan does not index this reader, or G is no multiple of R.
    """

    def __init__(
        self,
        plan: PackPlan,
        *,
        fingerprint: str,
        reader: ExampleReader,
        preprocessor: Preprocessor,
        global_batch_packs: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        strict: bool,
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
        self._plan, self._fingerprint = plan, fingerprint
        self._reader, self._preprocessor = reader, preprocessor
        self._global_batch_packs = global_batch_packs
        self.packs_per_rank = global_batch_packs // data_parallel_size
        self._first_slot = data_parallel_rank * self.packs_per_rank
        self._strict = strict
        self._position = 0
        self._num_read = 0
        self._broken: set[tuple[str, str]] = set()

    def __iter__(self) -> Iterator[PackedExample | Molmo2Error]:
        """Packs from the position on; an error is the last element (torch would lose its type and fields)."""
        try:
            yield from self._packs()
        except Molmo2Error as error:
            yield error

    def _packs(self) -> Iterator[PackedExample]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        batch = self._position // self._global_batch_packs + first
        num_batches = len(self._plan) // self._global_batch_packs
        while batch < num_batches:
            start = batch * self._global_batch_packs + self._first_slot
            ahead = start + step * self._global_batch_packs
            self._prefetch(range(ahead, min(ahead + self.packs_per_rank, len(self._plan))))
            for index in range(start, start + self.packs_per_rank):
                yield self.pack(index)
            batch += step
        raise DataError(
            "plan",
            found=f"all {num_batches} global batches are used",
            expected="training that ends with the plan",
            mend="plan as many packs as steps times global batch",
        )

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """Position in the plan, as Composer 0.32.1 asks for it when it saves.

        The keys are always the same: sharded checkpoints silently drop others.

        Args:
            num_samples: packs of all ranks that were trained on, in this epoch.
            from_beginning: whether they count from the start of the plan (Composer) or of this run.

        Raises:
            DataError: the number is inside a global batch.
        """
        packs = num_samples if from_beginning else self._position + num_samples
        if packs % self._global_batch_packs:
            raise DataError(
                "training position",
                found=f"{packs} packs",
                expected=f"a multiple of the global batch of {self._global_batch_packs}",
            )
        return {
            "packs": packs,
            "global_batch_packs": self._global_batch_packs,
            "plan": self._fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position.  Call before iteration, on every rank.

        Raises:
            DataError: the state belongs to another plan or global batch.
        """
        mine = self.state_dict(0, True)
        changed = [
            f"{name} {state.get(name)!r}" for name in ("plan", "global_batch_packs") if state.get(name) != mine[name]
        ]
        if changed or not isinstance(state.get("packs"), int):
            raise DataError(
                "checkpoint to resume from",
                found=f"position in another plan: {', '.join(changed) or state}",
                expected=", ".join(f"{name} {mine[name]!r}" for name in ("plan", "global_batch_packs")),
                mend="resume with the recipe that the checkpoint was made with, or start anew under another name",
            )
        self._position = state["packs"]

    def pack(self, index: int) -> PackedExample:
        """One pack of the plan.

        Raises:
            DataError: too many media are broken; or, when strict, the pack is larger than planned.
        """
        limits = self._plan.packing
        examples: list[TokenizedExample] = []
        broken = 0
        for entry in self._plan.pack(index):
            example = self._tokenize(entry)
            if example is None:
                broken += 1
            else:
                examples.append(example)
        if broken:
            examples += self._substitutes(index, examples, broken)
        while (tokens := sum(len(e.input_ids) for e in examples)) > limits.sequence_tokens or (
            sum(len(e.crops) for e in examples) > limits.crop_budget
        ):
            found = f"{tokens} tokens, {sum(len(e.crops) for e in examples)} crops"
            expected = f"at most {limits.sequence_tokens} and {limits.crop_budget}"
            if self._strict:
                raise DataError(f"pack {index} ({[e.uid for e in examples]})", found=found, expected=expected)
            examples, dropped = drop_last_branch(examples, too_many_crops=tokens <= limits.sequence_tokens)
            _say(f"pack {index}: {found}, {expected}: left out {dropped}")
        return pack_examples(examples, self._preprocessor.geometry.max_pool)

    def _tokenize(self, entry: Any) -> TokenizedExample | None:
        """The example of one plan entry, or nothing if its medium cannot be decoded."""
        example = self._reader.example(int(entry["sample"]))
        branches = int(entry["first_branch"]), int(entry["stop_branch"])
        self._num_read += 1
        try:
            return self._preprocessor.tokenize(
                example,
                epoch=int(entry["epoch"]),
                branches=None if branches == (0, len(example.annotations)) else branches,
            )
        except DataError as error:
            self._broken.add((example.dataset, example.uid))
            _say(f"broken: {example.dataset}/{example.uid}: {error}")
            if len(self._broken) > max(MIN_BROKEN, MAX_BROKEN_FRACTION * self._num_read):
                raise DataError(
                    f"{example.dataset}/{example.uid}",
                    found=f"{len(self._broken)} media cannot be decoded, of {self._num_read} reads; here: {error}",
                    expected=f"at most {MAX_BROKEN_FRACTION:.0%}, or {MIN_BROKEN}",
                    mend="validate the manifests again",
                ) from error
            return None

    def _substitutes(self, index: int, examples: list[TokenizedExample], wanted: int) -> list[TokenizedExample]:
        """Up to `wanted` of the entries after pack `index` (round the end of the plan) that still fit in it."""
        limits = self._plan.packing
        tokens = limits.sequence_tokens - sum(len(e.input_ids) for e in examples)
        crops = limits.crop_budget - sum(len(e.crops) for e in examples)
        found: list[TokenizedExample] = []
        after = int(self._plan.pack_offsets[index + 1])
        for position in range(after, after + SUBSTITUTE_SEARCH):
            entry = self._plan.entries[position % len(self._plan.entries)]
            candidate = self._tokenize(entry)
            if candidate is not None and len(candidate.input_ids) <= tokens and len(candidate.crops) <= crops:
                found.append(candidate)
                tokens, crops = tokens - len(candidate.input_ids), crops - len(candidate.crops)
                _say(f"pack {index}: {candidate.uid} stands in")
                if len(found) == wanted:
                    return found
        if not found and not examples:
            raise DataError(f"pack {index}", found="every medium is broken, and no substitute fits")
        return found

    def _prefetch(self, packs: range) -> None:
        for index in packs:
            self._reader.prefetch(self._plan.pack(index)["sample"].tolist())


def _say(line: str) -> None:
    print(f"loader: {line}", file=sys.stderr, flush=True)
