"""What packing message trees is worth: annotated examples a second of real optimizer steps, and how fast loss falls.

    python benchmarks/training_efficiency.py [--seconds 60]

All sides train the tiny model on questions about rendered images and videos, with the same optimizer and equally many
sequences of equal length in a step:

    packed      whole message trees, planned as in training
    padded      one annotated example in each sequence: no packing, and a medium's questions apart
    in pieces   as padded, its padding in documents as long as a mean tree, so that attention costs as in packed
    cheapest    as in pieces, without black crops: padding that costs as little as it can

Packed and padded have static shapes, as the published collator makes them (data.md 0, step 5): tokens up to the length
of a sequence, crops up to its budget.  All padding is really computed: crops as black ones, tokens as one document of
text, which our attention would leave out if it were marked.  That is less than under the published dense mask, where
attention is computed over all pairs.

A sequence has room for as many trees as one of stage 2: 4.4 mean trees by tokens and 3.95 by crops, which bind
(16,384 / 3,694 and 128 / 32.4, benchmarks/packing.py).  A tree has 3.9 questions, 4 as published: the corpus has no
image sets, which have fewer.  SHARES are such that so many trees have a whole number of crops.  Frames and images have
4 and 18 visual tokens instead of 81 and 392 or more.  The published 15 (4 annotations x 3.8 trees,
training_and_evaluation.md 1.8) counts sequences; here time counts.

The corpus is tokenised before.  Seconds are the processor's, of one thread, and so those of the clock on a quiet
machine; sides take turns in slices of them.  Held-out loss is that of whole trees of the test split.  The last line is
the ratio of annotated examples a second, packed over padded.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from molmo2core.examples import DOCUMENT, TokenizedExample
from molmo2core.loading.collator import collate_packs
from molmo2core.model.attention import AttentionMask
from molmo2core.model.config import named_config
from molmo2core.model.initialization import build_model
from molmo2core.model.loss import weighted_loss
from molmo2core.model.molmo2 import Molmo2
from molmo2core.packing.concat import pack_examples
from molmo2core.packing.config import PackingConfig
from molmo2core.preprocessing.preprocessor import Preprocessor
from molmo2core.recipe.load import from_json
from molmo2core.recipe.sections import PlanSection, ShardSection, ValidateSection
from molmo2core.references import ShardsRef, read_reference
from molmo2core.shards.reader import ExampleReader
from molmo2core.special_tokens import load_tokenizer
from molmo2core.stages import resolve, shard, validate
from molmo2core.testing.tiny_plan import plan_of_refs
from molmo2core.training.config import DropoutConfig
from molmo2core.training.microbatch import MicrobatchMaker

RECIPE = Path(__file__).parents[1] / "workflows/recipes/tiny.yaml"
CORPUS = ("images=900", "image_sets=0", "videos=400", "texts=20")
SHARES = {"image_qa": 0.64, "video_qa": 0.36}
ROOM_BY_TOKENS, ROOM_BY_CROPS = 16_384 / 3_694, 128 / 32.4
"""Mean trees of stage 2 that a sequence has room for."""
SEQUENCES = 4
"""In a step."""
HELD_OUT_TREES = 64
SLICES = 6
"""Turns that each side takes."""
LEARNING_RATE = 1e-3

Pack = dict[str, torch.Tensor]


def make_data(workspace: Path) -> tuple[list[Path], Preprocessor, PlanSection]:
    """Shards of the rendered corpus, made by the real stages, and stage 2's preprocessing of the tiny recipe."""
    overrides = [f"workspace={workspace}", *(f"data.shapes.{size}" for size in CORPUS)]
    sections = resolve.run(RECIPE.read_text(), overrides=overrides)
    manifests = workspace / "manifests.json"
    validate.run(from_json(sections["validate"], ValidateSection), output=manifests)
    section, plan = from_json(sections["shard"], ShardSection), from_json(sections["plan_sft"], PlanSection)
    outputs = [workspace / f"{dataset}.json" for dataset in SHARES]
    for dataset, output in zip(SHARES, outputs, strict=True):
        shard.run(section, manifests=manifests, dataset=dataset, output=output)
    preprocessor = Preprocessor(
        geometry=plan.geometry,
        config=plan.preprocessing,
        tokenizer=load_tokenizer(workspace / section.tokenizer),
        weighting="described",
        seed=0,
    )
    return outputs, preprocessor, plan


def tensors(examples: Sequence[TokenizedExample], max_pool: int) -> Pack:
    """One sequence as training takes it."""
    pack: Pack = collate_packs([pack_examples(list(examples), max_pool)])["packs"][0]
    return pack


def padded(pack: Pack, length: int, document: int, num_crops: int = 0) -> Pack:
    """`pack` up to `length`, the rest documents of `document` tokens without targets, and up to `num_crops` crops."""
    missing = length - len(pack["input_ids"])
    names = ("subsegment_ids", "input_ids", "target_ids", "position_ids", "loss_weights", "is_visual")
    longer = {name: torch.nn.functional.pad(pack[name], (0, missing)) for name in names}
    documents = int(pack["subsegment_ids"].max()) // DOCUMENT + 1 + torch.arange(missing) // document
    longer["subsegment_ids"][length - missing :] = documents * DOCUMENT
    black = pack["crops"].new_zeros(max(num_crops - len(pack["crops"]), 0), *pack["crops"].shape[1:])
    return pack | longer | {"crops": torch.cat([pack["crops"], black])}


class Side:
    """One way of filling sequences: its packs, their annotated examples, its model and what was measured."""

    def __init__(self, name: str, packs: list[tuple[Pack, int]], model: Molmo2) -> None:
        self.name, self.model = name, model
        self.packs: Iterator[tuple[Pack, int]] = itertools.cycle(packs)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
        self.seconds, self.steps, self.examples = 0.0, 0, 0
        self.losses: list[float] = []
        """Held-out, before the first turn and after each."""

    def train(self, seconds: float, loss: Callable[[Molmo2, Sequence[Pack]], torch.Tensor]) -> None:
        """Optimizer steps for about `seconds` of processor time."""
        self.model.train()
        started = time.process_time()
        while time.process_time() - started < seconds:
            drawn = [next(self.packs) for _ in range(SEQUENCES)]
            self.optimizer.zero_grad()
            loss(self.model, [pack for pack, _ in drawn]).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.steps += 1
            self.examples += sum(count for _, count in drawn)
        self.seconds += time.process_time() - started


def mean_loss(model: Molmo2, packs: Sequence[Pack]) -> torch.Tensor:
    """Weighted cross-entropy of one pass over `packs`."""
    made = MicrobatchMaker(im_patch_id=model.im_patch_id, dropout=DropoutConfig()).make(packs)
    hidden = model(
        input_ids=made["input_ids"],
        position_ids=made["position_ids"],
        mask=AttentionMask(made["subsegment_ids"], made["is_visual"]),
        crops=made["crops"],
        pooling=made["pooling"],
    )
    parts = weighted_loss(hidden[0], model.decoder.head_weight, made["target_ids"], made["loss_weights"], 0.0)
    return parts.total / made["loss_weight"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="of training, for each side")
    parser.add_argument("--packs", type=int, default=240, help="different sequences that each side has")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        outputs, preprocessor, section = make_data(Path(folder))
        refs = [read_reference(path, ShardsRef) for path in outputs]
        reader = ExampleReader(refs, "train", Path(folder) / "cache")

        def planned(packing: PackingConfig, num_packs: int) -> list[list[TokenizedExample]]:
            plan = plan_of_refs(
                refs,
                SHARES,
                packing=packing,
                num_packs=num_packs,
                geometry=section.geometry,
                limits=section.preprocessing,
            ).plan
            return [
                [
                    preprocessor.tokenize(reader.example(int(entry["sample"])), epoch=int(entry["epoch"]))
                    for entry in plan.pack(index)
                ]
                for index in range(len(plan))
            ]

        sample = [tree for pack in planned(section.packing, 200) for tree in pack]
        mean_tree = float(np.mean([len(tree.input_ids) for tree in sample]))
        tokens = round(ROOM_BY_TOKENS * mean_tree)
        crops = round(ROOM_BY_CROPS * float(np.mean([len(tree.crops) for tree in sample])))
        budgets = PackingConfig(sequence_tokens=tokens, crop_budget=crops)
        trees = planned(budgets, options.packs)
        pool = section.geometry.max_pool
        single = [
            preprocessor.tokenize(reader.example(index), epoch=0, branches=(branch, branch + 1))
            for index in range(len(reader))
            for branch in range(len(reader.example(index).annotations))
        ]
        tests = ExampleReader(refs, "test", Path(folder) / "cache")
        chosen = np.random.default_rng(0).permutation(len(tests))[:HELD_OUT_TREES].tolist()
        held_out = [tensors([preprocessor.tokenize(tests.example(index), epoch=0)], pool) for index in chosen]
    alone = [tensors([single[index]], pool) for index in np.random.default_rng(1).permutation(len(single)).tolist()]
    fill = partial(padded, length=tokens, document=tokens, num_crops=crops)
    config = named_config("tiny")
    packs = {
        "packed": [(fill(tensors(p, pool)), sum(len(tree.tasks) for tree in p)) for p in trees],
        "padded": [(fill(pack), 1) for pack in alone],
        "in pieces": [(padded(pack, tokens, round(mean_tree), crops), 1) for pack in alone],
        "cheapest": [(padded(pack, tokens, round(mean_tree)), 1) for pack in alone],
    }
    sides = [Side(name, its_packs, build_model(config, seed=0)) for name, its_packs in packs.items()]
    used = np.mean([[len(t.input_ids), len(t.crops)] for p in trees for t in p], axis=0)
    in_sequence = float(np.mean([len(p) for p in trees]))
    print(
        f"{SEQUENCES} sequences of {tokens} tokens and {crops} crops in a step; packed: {in_sequence:.2f} trees, "
        f"{in_sequence * used[0] / tokens:.0%} of tokens and {in_sequence * used[1] / crops:.0%} of crops, "
        f"{np.mean([count for _, count in packs['packed']]):.1f} annotated examples a sequence; else: 1"
    )
    print("held-out loss after   " + "  ".join(f"{side.name:>9}" for side in sides))
    for turn in range(SLICES + 1):
        for side in sides:
            if turn:
                side.train(options.seconds / SLICES, mean_loss)
            with torch.no_grad():
                side.losses.append(float(mean_loss(side.model.eval(), held_out)))
        after = turn * options.seconds / SLICES
        print(f"{after:8.0f} s            " + "  ".join(f"{side.losses[-1]:9.3f}" for side in sides), flush=True)
    for side in sides:
        print(f"{side.name}: {side.steps / side.seconds:.2f} steps/s, {side.examples / side.seconds:.1f} examples/s")
    rates = {side.name: side.examples / side.seconds for side in sides}
    for name in ("cheapest", "in pieces", "padded"):
        print(f"annotated examples a second, packed over {name}: {rates['packed'] / rates[name]:.1f}")


if __name__ == "__main__":
    main()
