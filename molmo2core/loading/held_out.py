"""Held-out examples in packs that are always the same: what losses during training are taken on."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from molmo2core import storage
from molmo2core.errors import DataError
from molmo2core.examples import Batch, PackedExample, Split, TokenizedExample
from molmo2core.loading.collator import collate_packs, join_batches
from molmo2core.packing.concat import pack_examples
from molmo2core.packing.config import PackingConfig
from molmo2core.packing.entries import cut_tree
from molmo2core.packing.window import pack_window
from molmo2core.preprocessing.config import STYLES, VisualGeometry
from molmo2core.preprocessing.lengths import root_bound
from molmo2core.shards.lengths import read_table

if TYPE_CHECKING:
    from molmo2core.preprocessing.preprocessor import Preprocessor
    from molmo2core.references import ShardsRef
    from molmo2core.shards.reader import ExampleReader


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """A whole message tree, or a run of its branches."""

    sample: int
    branches: tuple[int, int]
    tokens: int
    crops: int


class HeldOutPacks:
    """The first examples of each dataset of a split, in packs under a training stage's budgets.

    Packs follow from the tables of lengths alone, so every rank knows all of them and decodes only its own, anew each
    time.  Wordings are those of the first epoch.  What does not decode, or fits in no sequence, is left out and said.

    Args:
        reader: of `split`, over `refs` in their order.
        refs: shards of the datasets that the stage draws from.
        preprocessor: of the stage.
        packing: of the stage.
        examples_per_dataset: how many.
    """

    def __init__(
        self,
        reader: ExampleReader,
        refs: Sequence[ShardsRef],
        split: Split,
        *,
        preprocessor: Preprocessor,
        packing: PackingConfig,
        examples_per_dataset: int,
    ) -> None:
        self.datasets = tuple(ref.dataset for ref in refs)
        self._reader, self._preprocessor = reader, preprocessor
        self._said: set[str] = set()
        entries: list[_Entry] = []
        left_out: list[str] = []
        for ref in refs:
            if not ref.num_samples.get(split):
                continue
            table = read_table(storage.open_committed(ref.uri), split)
            config = preprocessor.config
            for number in range(min(examples_per_dataset, len(table))):
                row = table.row(number)
                root, crops = root_bound(
                    row.kind,
                    row.sizes,
                    row.duration_seconds,
                    row.subtitle_tokens,
                    preprocessor.geometry,
                    config,
                    high_res=ref.dataset in config.high_res.datasets,
                    fps=row.fps,
                    grid_fps=row.grid_fps,
                )
                branches = [tokens[STYLES.index(config.style)] for tokens in row.branch_tokens]
                runs, missing = cut_tree(root, crops, branches, packing)
                left_out += [f"{ref.dataset}/{row.uid}"] * bool(missing)
                sample = reader.ranges[ref.dataset][number]
                entries += [
                    _Entry(sample=sample, branches=(first, stop), tokens=tokens, crops=crops)
                    for first, stop, tokens in runs
                ]
        sizes = np.array([(entry.tokens, entry.crops) for entry in entries], np.int64).reshape(-1, 2)
        numbers = pack_window(sizes[:, 0], sizes[:, 1], packing, np.random.default_rng(0))
        self._packs: list[list[_Entry]] = [[] for _ in range(int(numbers.max(initial=-1)) + 1)]
        for entry, number in zip(entries, numbers.tolist(), strict=True):
            self._packs[number].append(entry)
        self.num_examples = len({entry.sample for entry in entries})
        self.left_out = tuple(left_out)
        """`dataset/uid` of the examples that fit in no sequence, or of whose annotations some do not."""

    def __len__(self) -> int:
        return len(self._packs)

    def batch(self, index: int) -> Batch:
        """Pack number `index` alone; past the last one, a pack without targets."""
        examples: list[TokenizedExample] = []
        datasets: list[str] = []
        for entry in self._packs[index] if index < len(self) else ():
            example = self._reader.example(entry.sample)
            branches = None if entry.branches == (0, len(example.annotations)) else entry.branches
            try:
                examples.append(self._preprocessor.tokenize(example, epoch=0, branches=branches))
                datasets.append(example.dataset)
            except DataError as error:
                self._say(f"held out: left out: {error}")
        if not examples:
            return collate_packs([_no_targets(self._preprocessor.geometry)], numbers=[index], datasets=[("",)])
        pack = pack_examples(examples, self._preprocessor.geometry.max_pool)
        return collate_packs([pack], numbers=[index], datasets=[tuple(datasets)])

    def prefetch(self, indices: Iterable[int]) -> None:
        """Start downloading the shards of these packs."""
        held = (entry for index in indices if index < len(self) for entry in self._packs[index])
        self._reader.prefetch([entry.sample for entry in held])

    def _say(self, line: str) -> None:
        """Once: it will be the same next time."""
        if line not in self._said:
            self._said.add(line)
            print(line, file=sys.stderr, flush=True)


class HeldOutBatches:
    """One data-parallel group's share of `packs`, in batches of at most `size`; every group has equally many batches.

    No DataLoader: making the iterator of one draws from the global random state.
    """

    def __init__(self, packs: HeldOutPacks, *, group: int, groups: int, size: int) -> None:
        self.packs, self.group, self.groups, self.size = packs, group, groups, size

    def __len__(self) -> int:
        return math.ceil(len(self.packs) / (self.groups * self.size))

    def __iter__(self) -> Iterator[Batch]:
        shares = [self._share(number) for number in range(len(self))]
        self.packs.prefetch(index for share in shares for index in share)
        for share in shares:
            yield join_batches([self.packs.batch(index) for index in share])

    def _share(self, number: int) -> range:
        """Packs of batch `number`; when none are left, one past the last."""
        first = (number * self.groups + self.group) * self.size
        return range(first, max(first + 1, min(first + self.size, len(self.packs))))


def _no_targets(geometry: VisualGeometry) -> PackedExample:
    """What a rank computes while others have the last packs: a document of one token that predicts nothing."""
    zero = np.zeros(1, np.int32)
    return PackedExample(
        uids=("",),
        input_ids=zero,
        target_ids=zero,
        loss_weights=np.zeros(1, np.float32),
        position_ids=zero,
        subsegment_ids=zero,
        is_visual=np.zeros(1, bool),
        crops=np.zeros((0, geometry.num_patches, geometry.patch_bytes), np.uint8),
        pooling=np.zeros((0, geometry.max_pool), np.int32),
        tasks=((),),
    )
