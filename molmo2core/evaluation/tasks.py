"""From an answer's text to its score, for each form of annotation; and from scores to named metrics.

| annotation | measures |
| --- | --- |
| Caption | word_f1 (a cheap overlap of words, no judge of quality) |
| Conversation | word_f1 and accuracy of the last reply |
| QuestionAnswer | accuracy: the right option, or exact match after normalisation |
| Pointing | precision, recall, f1 |
| ... of counting | also accuracy (number stated) and points_accuracy (number of points); a number alone: accuracy |
| Tracking | precision, recall, f1, detection, association, hota |

Metrics are means over examples, named `<task>/<measure>` and, for categories of questions,
`<task>.<category>/accuracy`.  `<task>/parse_failures` is the share of answers that did not follow their grammar; they
are wrong, also where there was nothing to point at.
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from molmo2core.annotations import (
    Annotation,
    Caption,
    Conversation,
    Point,
    Pointing,
    QuestionAnswer,
    Track,
    Tracking,
    TrackPosition,
)
from molmo2core.evaluation.metrics.counting import says_none, stated_count
from molmo2core.evaluation.metrics.pointing import score_points
from molmo2core.evaluation.metrics.qa import matches_exactly, select_option, word_f1
from molmo2core.evaluation.metrics.tracking import score_tracks
from molmo2core.preprocessing.chat import reply_of
from molmo2core.preprocessing.points import parse_points, parse_tracks
from molmo2core.preprocessing.tracking import answered_tracks


@dataclass(frozen=True, kw_only=True)
class Score:
    """How good one answer is."""

    task: str
    category: str
    measures: dict[str, float]
    parse_failed: bool | None
    """None where any text is an answer."""


def score_answer(annotation: Annotation, answer: str, sizes: Sequence[tuple[int, int]]) -> Score:
    """Score the text `answer` against `annotation`.

    Args:
        annotation: the truth.
        answer: what the model said.
        sizes: displayed (width, height) in pixels of the medium's files.
    """
    match annotation:
        case Caption():
            return _free_score(annotation.task, {"word_f1": word_f1(answer, annotation.text)})
        case Conversation():
            truth = reply_of(annotation)
            measures = {"accuracy": float(matches_exactly(answer, truth)), "word_f1": word_f1(answer, truth)}
            return _free_score(annotation.task, measures)
        case QuestionAnswer():
            return _question_score(annotation, answer)
        case Pointing():
            return _pointing_score(annotation, answer, sizes)
        case Tracking():
            return _tracking_score(annotation, answer, sizes[0])


def average_scores(scores: Iterable[Score]) -> dict[str, float]:
    """Metrics by name, sorted; a metric that no example yields is absent."""
    values: defaultdict[str, list[float]] = defaultdict(list)
    for score in scores:
        for measure, value in score.measures.items():
            values[f"{score.task}/{measure}"].append(value)
        if score.category:
            values[f"{score.task}.{score.category}/accuracy"].append(score.measures["accuracy"])
        if score.parse_failed is not None:
            values[f"{score.task}/parse_failures"].append(float(score.parse_failed))
    return {name: sum(found) / len(found) for name, found in sorted(values.items())}


def category_of(annotation: Annotation) -> str:
    """The label by which results are broken down, in letters that a metric's name may have."""
    return re.sub(r"\W+", "_", annotation.category) if isinstance(annotation, QuestionAnswer) else ""


def predicted_points(answer: str, annotation: Pointing) -> tuple[Point, ...]:
    """The points of an answer, with image number or time as `annotation`'s task has it."""
    if annotation.task.startswith("video_"):
        return tuple(Point(x=point.x, y=point.y, time=point.index) for point in parse_points(answer))
    return tuple(Point(x=point.x, y=point.y, image=int(point.index)) for point in parse_points(answer))


def predicted_tracks(answer: str) -> tuple[Track, ...]:
    """The tracks of an answer, one per object number."""
    positions: defaultdict[int, list[TrackPosition]] = defaultdict(list)
    for point in parse_tracks(answer):
        positions[point.object_id].append(TrackPosition(time=point.index, x=point.x, y=point.y))
    return tuple(
        Track(object_id=number, positions=tuple(sorted(found, key=lambda position: position.time)))
        for number, found in sorted(positions.items())
    )


def _free_score(task: str, measures: dict[str, float]) -> Score:
    return Score(task=task, category="", measures=measures, parse_failed=None)


def _question_score(annotation: QuestionAnswer, answer: str) -> Score:
    category = category_of(annotation)
    if not annotation.options:
        right = matches_exactly(answer, annotation.answer)
        return Score(task=annotation.task, category=category, measures={"accuracy": float(right)}, parse_failed=None)
    chosen = select_option(answer, annotation.options)
    right = chosen is not None and annotation.options[chosen] == annotation.answer
    return Score(
        task=annotation.task,
        category=category,
        measures={"accuracy": float(right)},
        parse_failed=chosen is None,
    )


def _pointing_score(annotation: Pointing, answer: str, sizes: Sequence[tuple[int, int]]) -> Score:
    points, stated = predicted_points(answer, annotation), stated_count(answer)
    is_counted = annotation.task.endswith("counting")
    accuracy = {"accuracy": float(stated == annotation.number)}
    if is_counted and annotation.count_form == "count":
        return Score(task=annotation.task, category="", measures=accuracy, parse_failed=stated is None)
    failed = not points and stated != 0
    measures = _unless(failed, dataclasses.asdict(score_points(points, annotation.points, sizes)))
    if is_counted:
        measures |= accuracy
        measures["points_accuracy"] = float(len(points) == len(annotation.points) and not failed)
        failed = stated is None
    return Score(task=annotation.task, category="", measures=measures, parse_failed=failed)


def _tracking_score(annotation: Tracking, answer: str, size: tuple[int, int]) -> Score:
    tracks = predicted_tracks(answer)
    failed = not tracks and not says_none(answer)
    measures = _unless(failed, dataclasses.asdict(score_tracks(tracks, answered_tracks(annotation), size)))
    return Score(task=annotation.task, category="", measures=measures, parse_failed=failed)


def _unless(failed: bool, measures: dict[str, float]) -> dict[str, float]:
    return dict.fromkeys(measures, 0.0) if failed else measures
