"""What a training stage looks at on held-out examples: packs for losses, and questions that are answered and drawn.

Beside the metrics lie `validation.jsonl` (training/callbacks/validation_file.py), `answers.jsonl` (a line for each
question and step) and `answers/step-<n>.html` (the same with pictures).
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from molmo2core import storage
from molmo2core.evaluation.held_out_answers import ChosenQuestion, answer_few, answers_page, choose_few
from molmo2core.evaluation.inference import InferenceModel
from molmo2core.loading.deviations import keep_lines_up_to
from molmo2core.loading.held_out import HeldOutPacks
from molmo2core.preprocessing.preprocessor import Preprocessor
from molmo2core.recipe.sections import TrainSection
from molmo2core.references import PackPlanRef, ShardsRef
from molmo2core.shards.reader import ExampleReader
from molmo2core.training.config import COLLECTIVE_SECONDS
from molmo2core.training.validation_files import ANSWERS, PAGES

if TYPE_CHECKING:
    from molmo2core.model.molmo2 import Molmo2


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Of one stage, for trainer.train."""

    packs: HeldOutPacks
    reader: ExampleReader


def open_held_out(
    section: TrainSection, plan: PackPlanRef, preprocessor: Preprocessor, cache: Path, *, speaks: bool
) -> HeldOut | None:
    """The held-out examples of the datasets that the plan draws from; None where none are wanted or there are none.

    Called by all ranks.

    Args:
        cache: for shards that lie in an object store.
        speaks: whether this rank says what is left out.

    Raises:
        DataError: shards are missing or damaged.
    """
    config, stage = section.training.validation, section.stage
    if not config.interval_steps or not section.training.steps:
        return None
    refs = held_out_shards(plan)
    if not any(ref.num_samples.get(config.split) for ref in refs):
        if speaks:
            print(f"{stage}: no validation: no dataset has examples in split {config.split!r}", flush=True)
        return None
    reader = ExampleReader(refs, config.split, cache)
    packs = HeldOutPacks(
        reader,
        refs,
        config.split,
        preprocessor=preprocessor,
        packing=section.packing,
        examples_per_dataset=config.examples_per_dataset,
    )
    if packs.left_out and speaks:
        print(
            f"{stage}: {len(packs.left_out)} held-out examples fit in no sequence, e.g. {packs.left_out[0]}", flush=True
        )
    if not len(packs):
        if speaks:
            print(f"{stage}: no validation: no held-out example fits in a sequence", flush=True)
        return None
    return HeldOut(packs=packs, reader=reader)


def held_out_shards(plan: PackPlanRef) -> list[ShardsRef]:
    """Of the datasets that the plan draws from, in the plan's order: its parents are all datasets of the recipe."""
    drawn = plan.facts["draws"]
    shards = [parent for parent in plan.parents if isinstance(parent, ShardsRef)]
    return [ref for ref in shards if drawn.get(ref.dataset, {}).get("draws")]


class HeldOutQuestions:
    """Answers the same few questions at each step, and writes them down (training.callbacks.held_out_answers.Answerer).

    Args:
        folder: of the metrics.
        section: of the stage.
        held_out: where the questions come from.
        preprocessor: of the stage.
    """

    def __init__(self, folder: Path, section: TrainSection, held_out: HeldOut, preprocessor: Preprocessor) -> None:
        self.folder, self.stage, self.config = folder, section.stage, section.training.validation
        self.reader, self.preprocessor = held_out.reader, preprocessor
        self._questions: Sequence[ChosenQuestion] | None = None

    def keep_up_to(self, step: int) -> None:
        """Remove what was written at later steps."""
        keep_lines_up_to(self.folder / ANSWERS, step)
        for page in (self.folder / PAGES).glob("step-*.html"):
            if int(page.stem.removeprefix("step-")) > step:
                page.unlink()

    def answer(self, model: Molmo2, step: int) -> None:
        """Answer, draw, write."""
        started = time.monotonic()
        if self._questions is None:
            self._questions = choose_few(self.reader, self.reader.ranges, self.config.generations_per_task)
        answers = answer_few(
            InferenceModel(model=model, preprocessor=self.preprocessor),
            self.reader,
            self._questions,
            max_new_tokens=self.config.max_new_tokens,
            seconds=COLLECTIVE_SECONDS / 2,
            say=lambda line: print(f"{self.stage}: {line}", flush=True),
        )
        page = self.folder / PAGES / f"step-{step}.html"
        storage.write_bytes(str(page), answers_page(f"{self.stage}, step {step}", answers).encode())
        lines = [json.dumps({"step": step} | answer.to_json()) + "\n" for answer in answers]
        storage.append_text(self.folder / ANSWERS, "".join(lines))
        seconds = time.monotonic() - started
        print(f"{self.stage}: step {step}: {len(answers)} held-out answers in {page}, {seconds:.1f} s", flush=True)
