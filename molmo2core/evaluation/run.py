"""Questions of a held-out split, answered by the model with and without its images, and scored.

choose_questions -> ask_questions -> (tasks.average_scores, gate.judge, report.build_report)
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any, Protocol, TypeVar

from molmo2core.evaluation.config import EvaluationConfig
from molmo2core.evaluation.inference import InferenceModel, blanked
from molmo2core.evaluation.tasks import Score, category_of, score_answer
from molmo2core.examples import ROOT, Example, TokenizedExample
from molmo2core.preprocessing.chat import reply_of

_SCANNED_PER_QUESTION = 16
_BATCHES_IN_MEMORY = 4
_SECONDS_BETWEEN_LINES = 2.0

Item = TypeVar("Item")


class Examples(Protocol):
    """What is asked of shards.reader.ExampleReader."""

    def example(self, index: int, /) -> Example:
        """The example of that number."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """One annotation of one example."""

    example_index: int
    annotation_index: int
    task: str
    category: str


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A question, what the model said with and without its images, and the scores."""

    question: Question
    dataset: str
    uid: str
    prompt: str
    truth: str
    answer: str
    blind_answer: str
    score: Score
    blind_score: Score

    def to_json(self) -> dict[str, Any]:
        """A line of predictions.jsonl."""
        return {
            "dataset": self.dataset,
            "uid": self.uid,
            "annotation": self.question.annotation_index,
            "task": self.question.task,
            "category": self.question.category,
            "prompt": self.prompt,
            "truth": self.truth,
            "answer": self.answer,
            "blind_answer": self.blind_answer,
            "measures": self.score.measures,
            "blind_measures": self.blind_score.measures,
            "parse_failed": self.score.parse_failed,
        }


def choose_questions(examples: Examples, indices: Sequence[int], max_questions: int) -> list[Question]:
    """At most `max_questions` of one dataset, the same ones each time.

    Tasks take turns, and within a task its categories, so that each that is present is covered as evenly as can be.
    Of a large dataset only the first `max_questions` * 16 examples are looked at.

    Args:
        examples: the split.
        indices: the dataset's examples.
        max_questions: how many.
    """
    queues: defaultdict[str, defaultdict[str, list[Question]]] = defaultdict(lambda: defaultdict(list))
    for index in indices[: max_questions * _SCANNED_PER_QUESTION]:
        for number, annotation in enumerate(examples.example(index).annotations):
            category = category_of(annotation)
            question = Question(example_index=index, annotation_index=number, task=annotation.task, category=category)
            queues[annotation.task][category].append(question)
    by_task = [_take_turns([queue[c] for c in sorted(queue)]) for _, queue in sorted(queues.items())]
    return _take_turns(by_task)[:max_questions]


def ask_questions(
    model: InferenceModel,
    examples: Examples,
    questions: Sequence[Question],
    config: EvaluationConfig,
    say: Callable[[str], None] = print,
) -> list[Answer]:
    """Answers to `questions`, in order of task.

    A few batches are prepared, answered with and without images, and forgotten: videos do not pile up in memory.
    Batches hold one task, because a batch takes as long as its longest answer.

    Args:
        model: the exported model.
        examples: the split that the questions index.
        questions: from `choose_questions`.
        config: batch size and longest answer.
        say: receives a line of progress every few seconds.
    """
    answers: list[Answer] = []
    by_task: defaultdict[str, list[Question]] = defaultdict(list)
    for question in questions:
        by_task[question.task].append(question)
    last_line = time.monotonic()
    for _, group in sorted(by_task.items()):
        step = config.batch_size * _BATCHES_IN_MEMORY
        for start in range(0, len(group), step):
            answers += _ask(model, examples, group[start : start + step], config)
            if time.monotonic() - last_line > _SECONDS_BETWEEN_LINES:
                last_line = time.monotonic()
                say(f"evaluate: {len(answers)} of {len(questions)} questions answered")
    return answers


def _ask(
    model: InferenceModel, examples: Examples, questions: Sequence[Question], config: EvaluationConfig
) -> list[Answer]:
    asked = [examples.example(question.example_index) for question in questions]
    prompts = [model.prompt(e, q.annotation_index) for e, q in zip(asked, questions, strict=True)]
    seen, blind = (
        model.answer(kind, batch_size=config.batch_size, max_new_tokens=config.max_new_tokens)
        for kind in (prompts, [blanked(prompt) for prompt in prompts])
    )
    answers = []
    for example, question, prompt, text, blind_text in zip(asked, questions, prompts, seen, blind, strict=True):
        annotation = model.preprocessor.seen_annotations(example)[question.annotation_index]
        sizes = example.media.sizes
        answers.append(
            Answer(
                question=question,
                dataset=example.dataset,
                uid=example.uid,
                prompt=prompt_text(model, prompt),
                truth=reply_of(annotation),
                answer=text,
                blind_answer=blind_text,
                score=score_answer(annotation, text, sizes),
                blind_score=score_answer(annotation, blind_text, sizes),
            )
        )
    return answers


def prompt_text(model: InferenceModel, prompt: TokenizedExample) -> str:
    """The question as a person reads it: the branch without the chat's role lines."""
    ids = prompt.input_ids[prompt.subsegment_ids != ROOT].tolist()
    return re.sub(r"\A\s*user\n|\n?assistant\n?\Z", "", model.preprocessor.tokenizer.decode(ids)).strip()


def _take_turns(queues: Sequence[Sequence[Item]]) -> list[Item]:
    nothing = object()
    rounds = zip_longest(*queues, fillvalue=nothing)
    return [item for item in chain.from_iterable(rounds) if item is not nothing]  # type: ignore[misc]
