"""Whatever annotations can be built survive the JSON of manifests and shards unchanged."""

from __future__ import annotations

import json
from typing import get_args

from hypothesis import given, settings
from hypothesis import strategies as st

from molmo2core.annotations import (
    MEDIA_OF_TASK,
    Annotation,
    Caption,
    CaptionKind,
    Conversation,
    CountForm,
    Point,
    Pointing,
    QuestionAnswer,
    Track,
    TrackForm,
    Tracking,
    TrackPosition,
    Turn,
)
from molmo2core.examples import ManifestRow
from molmo2core.manifest.schema import annotations_from_json, annotations_to_json, inspect_row

texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
numbers = st.floats(allow_nan=False, allow_infinity=False)


def task_of(kind: type) -> st.SearchStrategy[str]:
    from typing import get_type_hints

    return st.sampled_from(get_args(get_type_hints(kind)["task"]))


points = st.builds(Point, x=numbers, y=numbers, image=st.integers(), time=st.none() | numbers, radius=numbers)
positions = st.builds(TrackPosition, time=numbers, x=numbers, y=numbers, visible=st.booleans())
tracks = st.builds(Track, object_id=st.integers(), positions=st.lists(positions, max_size=3).map(tuple), radius=numbers)
annotations = st.one_of(
    st.builds(
        Caption,
        task=task_of(Caption),
        text=texts,
        kind=st.sampled_from(get_args(CaptionKind)),
        label=texts,
        start=st.none() | numbers,
        end=st.none() | numbers,
    ),
    st.builds(
        QuestionAnswer,
        task=task_of(QuestionAnswer),
        question=texts,
        answer=texts,
        options=st.lists(texts, max_size=3).map(tuple),
        category=texts,
        explanation=texts,
        style=texts,
    ),
    st.builds(
        Pointing,
        task=task_of(Pointing),
        label=texts,
        points=st.lists(points, max_size=3).map(tuple),
        question=texts,
        count_form=st.sampled_from(get_args(CountForm)),
        count=st.none() | st.integers(),
    ),
    st.builds(
        Tracking,
        task=task_of(Tracking),
        label=texts,
        sampling_fps=numbers,
        tracks=st.lists(tracks, max_size=2).map(tuple),
        form=st.sampled_from(get_args(TrackForm)),
    ),
    st.builds(
        Conversation,
        task=task_of(Conversation),
        turns=st.lists(
            st.builds(Turn, role=st.sampled_from(["system", "user", "assistant"]), text=texts), max_size=3
        ).map(tuple),
    ),
)


def test_all_tasks_are_generated() -> None:
    kinds = (Caption, QuestionAnswer, Pointing, Tracking, Conversation)
    from typing import get_type_hints

    assert {task for kind in kinds for task in get_args(get_type_hints(kind)["task"])} == set(MEDIA_OF_TASK)


@given(st.lists(annotations, max_size=3).map(tuple))
@settings(max_examples=200, deadline=None)
def test_annotations_survive_json(given_annotations: tuple[Annotation, ...]) -> None:
    """Would catch a lost default, a tuple that comes back as a list, a float that comes back as an integer."""
    assert annotations_from_json(annotations_to_json(given_annotations)) == given_annotations


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | numbers | texts,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
        max_leaves=8,
    ),
    st.sampled_from(["id", "split", "media", "annotations", "license", "source", "generator", "measured", "other"]),
)
@settings(max_examples=200, deadline=None)
def test_any_json_in_a_row_is_parsed_or_refused_with_reasons(value: object, key: str) -> None:
    """Nothing that a JSON line can hold makes the parser raise."""
    row = {"id": "a", "split": "train", "media": {"kind": "none"}, "annotations": [], "license": "x", "source": "y"}
    content = json.loads(json.dumps(row | {key: value}))
    outcome = inspect_row(ManifestRow(dataset="d", line=1, content=content))
    assert not isinstance(outcome, tuple) or all(str(problem) and problem.rule for problem in outcome)
