"""What packing message trees is worth: annotated examples a second of real optimizer steps, and how fast loss falls.

    python benchmarks/training_efficiency.py [--seconds 60]

Both sides train the tiny model on questions about rendered images and videos, with the same optimizer and equally many
sequences of equal length in a step.  `packed` holds whole message trees, planned as in training; `padded` holds one
annotated example in each sequence: no packing, and a medium's questions apart.  Padding is computed like text, as
in ordinary padded batches.  A tree of this corpus has 3.9 questions on average and a sequence room for 3.8 average
trees, as published (4 and 3.8: about 15 times fewer sequences, training_and_evaluation.md 1); frames and images have 4
and 18 visual tokens instead of 81 and 392 or more.  The corpus is tokenised before; sides take turns in slices of time;
held-out loss is that of the same trees for both.  The last line is the ratio of annotated examples a second.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
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
CORPUS = ("images=600", "image_sets=20", "videos=200", "texts=20")
SHARES = {"image_qa": 0.6, "video_qa": 0.4}
TREES_PER_SEQUENCE = 3.8
SEQUENCES = 4
"""In a step."""
HELD_OUT_PACKS = 16
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


def padded(pack: Pack, length: int) -> Pack:
    """`pack` up to `length`, the rest a document without targets: our attention would leave PADDING out."""
    missing = length - len(pack["input_ids"])
    rest = (int(pack["subsegment_ids"].max()) // DOCUMENT + 1) * DOCUMENT
    fillers = {"subsegment_ids": rest, "input_ids": 0, "target_ids": 0, "position_ids": 0, "loss_weights": 0}
    fillers["is_visual"] = 0
    longer = {name: torch.nn.functional.pad(pack[name], (0, missing), value=filler) for name, filler in fillers.items()}
    return pack | longer


class Side:
    """One way of filling sequences: its packs, their annotated examples, its model and what was measured."""

    def __init__(self, name: str, packs: list[tuple[Pack, int]], model: Molmo2) -> None:
        self.name, self.model = name, model
        self.packs: Iterator[tuple[Pack, int]] = itertools.cycle(packs)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
        self.seconds, self.steps, self.examples = 0.0, 0, 0

    def train(self, seconds: float, loss: Callable[[Molmo2, Sequence[Pack]], torch.Tensor]) -> None:
        """Optimizer steps for about `seconds`."""
        self.model.train()
        started = time.perf_counter()
        while time.perf_counter() - started < seconds:
            drawn = [next(self.packs) for _ in range(SEQUENCES)]
            self.optimizer.zero_grad()
            loss(self.model, [pack for pack, _ in drawn]).backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.steps += 1
            self.examples += sum(count for _, count in drawn)
        self.seconds += time.perf_counter() - started


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

        sample = [tree for pack in planned(section.packing, 100) for tree in pack]
        lengths = [len(tree.input_ids) for tree in sample]
        tokens = max(*lengths, round(TREES_PER_SEQUENCE * float(np.mean(lengths))))
        budgets = replace(section.packing, sequence_tokens=tokens, crop_budget=tokens)
        trees = planned(budgets, options.packs + HELD_OUT_PACKS)
        pool = section.geometry.max_pool
        single = [
            preprocessor.tokenize(reader.example(index), epoch=0, branches=(branch, branch + 1))
            for index in np.random.default_rng(0).permutation(len(reader)).tolist()[: options.packs]
            for branch in range(len(reader.example(index).annotations))
        ]
    held_out = [tensors(pack, pool) for pack in trees[-HELD_OUT_PACKS:]]
    packed = [(padded(tensors(p, pool), tokens), sum(len(t.tasks) for t in p)) for p in trees[:-HELD_OUT_PACKS]]
    np.random.default_rng(1).shuffle(single)  # type: ignore[arg-type]
    alone = [(padded(tensors([tree], pool), tokens), 1) for tree in single]
    config = named_config("tiny")
    sides = [Side("packed", packed, build_model(config, seed=0)), Side("padded", alone, build_model(config, seed=0))]
    print(
        f"{SEQUENCES} sequences of {tokens} tokens in a step; packed: {np.mean([len(p) for p in trees]):.1f} trees and "
        f"{np.mean([count for _, count in packed]):.1f} annotated examples a sequence; padded: 1"
    )
    print("held-out loss after   " + "  ".join(f"{side.name:>9}" for side in sides))
    for turn in range(SLICES + 1):
        losses = []
        for side in sides:
            if turn:
                side.train(options.seconds / SLICES, mean_loss)
            with torch.no_grad():
                losses.append(float(mean_loss(side.model.eval(), held_out)))
        print(
            f"{turn * options.seconds / SLICES:8.0f} s            " + "  ".join(f"{x:9.3f}" for x in losses), flush=True
        )
    for side in sides:
        print(f"{side.name}: {side.steps / side.seconds:.2f} steps/s, {side.examples / side.seconds:.1f} examples/s")
    ratio = (sides[0].examples / sides[0].seconds) / (sides[1].examples / sides[1].seconds)
    print(f"annotated examples a second, packed over padded: {ratio:.1f}")


if __name__ == "__main__":
    main()
