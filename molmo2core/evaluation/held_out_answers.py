"""Answers to a few held-out questions beside what was expected, for a person who watches a training."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from molmo2core.drawing import Picture, figure
from molmo2core.errors import Molmo2Error
from molmo2core.evaluation.drawing import draw_example
from molmo2core.evaluation.inference import InferenceModel
from molmo2core.evaluation.report import STYLE, definitions
from molmo2core.evaluation.run import Examples, prompt_text
from molmo2core.evaluation.tasks import Score, score_answer
from molmo2core.preprocessing.chat import reply_of

_BATCH_SIZE = 16


@dataclass(frozen=True, kw_only=True)
class ChosenQuestion:
    """One annotation of one example."""

    example_index: int
    annotation_index: int


@dataclass(frozen=True, kw_only=True)
class DrawnAnswer:
    """What was asked, expected and said."""

    dataset: str
    uid: str
    annotation: int
    prompt: str
    expected: str
    answer: str
    score: Score
    pictures: Sequence[Picture]

    def to_json(self) -> dict[str, Any]:
        """All but the pictures."""
        return {
            "dataset": self.dataset,
            "uid": self.uid,
            "annotation": self.annotation,
            "task": self.score.task,
            "prompt": self.prompt,
            "expected": self.expected,
            "answer": self.answer,
            "measures": self.score.measures,
            "parse_failed": self.score.parse_failed,
        }


def choose_few(examples: Examples, indices: Mapping[str, range], per_task: int) -> list[ChosenQuestion]:
    """`per_task` questions of each task among the first `per_task` examples of each dataset: the same ones each time.

    Datasets take turns, and an example gives one question of a task, so that media differ.

    Args:
        examples: the split.
        indices: of each dataset.
        per_task: how many.
    """
    chosen: list[tuple[str, ChosenQuestion]] = []
    counts: Counter[str] = Counter()
    for place in range(per_task):
        for numbers in indices.values():
            if place >= len(numbers):
                continue
            asked: set[str] = set()
            for position, annotation in enumerate(examples.example(numbers[place]).annotations):
                if annotation.task in asked or counts[annotation.task] >= per_task:
                    continue
                asked.add(annotation.task)
                counts[annotation.task] += 1
                question = ChosenQuestion(example_index=numbers[place], annotation_index=position)
                chosen.append((annotation.task, question))
    return [question for _, question in sorted(chosen, key=lambda pair: pair[0])]


def answer_few(
    model: InferenceModel,
    examples: Examples,
    questions: Sequence[ChosenQuestion],
    *,
    max_new_tokens: int,
    seconds: float = math.inf,
    say: Callable[[str], None] = print,
) -> list[DrawnAnswer]:
    """Greedy answers, with points and tracks drawn on the media.

    Args:
        seconds: once they are over, no further batch of questions is asked: other ranks wait, and not for ever.
        say: receives a line for a question that cannot be asked: its medium is broken, or larger than the limits of a
            training stage; and one if time was short.
    """
    started = time.monotonic()
    answers: list[DrawnAnswer] = []
    for first in range(0, len(questions), _BATCH_SIZE):
        if first and time.monotonic() - started >= seconds:
            say(f"{len(questions) - first} of {len(questions)} questions not asked: {seconds:.0f} s are over")
            break
        batch = questions[first : first + _BATCH_SIZE]
        answers += _answer_batch(model, examples, batch, max_new_tokens=max_new_tokens, say=say)
    return answers


def _answer_batch(
    model: InferenceModel,
    examples: Examples,
    questions: Sequence[ChosenQuestion],
    *,
    max_new_tokens: int,
    say: Callable[[str], None],
) -> list[DrawnAnswer]:
    asked = []
    for question in questions:
        example = examples.example(question.example_index)
        try:
            asked.append((example, question.annotation_index, model.prompt(example, question.annotation_index)))
        except Molmo2Error as error:
            say(f"not asked: {error}")
    prompts = [prompt for _, _, prompt in asked]
    texts = model.answer(prompts, batch_size=_BATCH_SIZE, max_new_tokens=max_new_tokens)
    answers = []
    for (example, number, prompt), text in zip(asked, texts, strict=True):
        annotation = model.preprocessor.seen_annotations(example)[number]
        answers.append(
            DrawnAnswer(
                dataset=example.dataset,
                uid=example.uid,
                annotation=number,
                prompt=prompt_text(model, prompt),
                expected=reply_of(annotation),
                answer=text,
                score=score_answer(annotation, text, example.media.sizes),
                pictures=draw_example(example, annotation, text),
            )
        )
    return answers


def answers_page(title: str, answers: Sequence[DrawnAnswer]) -> str:
    """One HTML file without links to anywhere; what models and data wrote is escaped."""
    return "\n".join(
        [
            "<!doctype html>",
            f'<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>',
            f"<style>{STYLE}</style></head><body>",
            f"<h1>{escape(title)}</h1>",
            '<p><span class="ring">&#9711;</span> true, as wide as an answer may miss; '
            '<span class="cross">&#10005;</span> predicted. Numbers are objects of a track.</p>',
            *(_section(answer) for answer in answers),
            "</body></html>",
        ]
    )


def _section(answer: DrawnAnswer) -> str:
    measures = ", ".join(f"{name} {value:.3f}" for name, value in answer.score.measures.items())
    text = {
        "prompt": answer.prompt,
        "expected": answer.expected,
        "answer": answer.answer,
        "scores": measures + (" (answer not understood)" if answer.score.parse_failed else ""),
    }
    pictures = "".join(map(figure, answer.pictures))
    return (
        f'<section class="example"><strong>{escape(f"{answer.score.task}: {answer.dataset}/{answer.uid}")}</strong>'
        f'<div class="strip">{pictures}</div>{definitions(text)}</section>'
    )
