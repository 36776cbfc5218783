"""How each annotation is asked for and answered: the published routing from tasks to families (data.md 5.3, 6.3-6.5).

style_and_length_v2     nothing for captions, the label for points and tracks, the question for questions
demo_or_style_v2        a family of templates; evaluation takes the first template of the first wording
few_phrasings           the same with at most three templates a family and everything else as in evaluation
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from molmo2core.annotations import (
    Annotation,
    Caption,
    Conversation,
    MediaKind,
    Point,
    Pointing,
    QuestionAnswer,
    Tracking,
)
from molmo2core.errors import DataError
from molmo2core.preprocessing import templates
from molmo2core.preprocessing.choices import standard_choice
from molmo2core.preprocessing.config import Style
from molmo2core.preprocessing.count_questions import asks_for_count
from molmo2core.preprocessing.points import ReplyForm, format_answer, format_points, format_tracks
from molmo2core.preprocessing.styles import style_of
from molmo2core.preprocessing.templates import Family, Fields, Pieces
from molmo2core.preprocessing.tracking import answered_tracks, num_queries, query_position

FEW = 3
ALL_IMAGES_PROBABILITY = 0.5
"""A prompt about an image set means all of it; otherwise a drawn part, in drawn order."""
IMAGE_FAMILY_SHARE = 0.5
"""Of prompts to point in all images: those worded as for one image."""
FIRST_POSITION_PROBABILITY = 0.8
"""A single-point prompt shows the object where it is first seen; otherwise at another time."""
WITHOUT_FPS_SHARE = 0.5
SECONDS_SHARE = 0.5
"""Times in prompts: `3.5 seconds`; otherwise `00:00:03.5`."""
_STYLES_THAT_MAY_POINT = frozenset({"user_qa", "correction_qa"})

_KIND_OF_PREFIX: dict[str, MediaKind] = {"image": "image", "multi": "images", "video": "video"}
_MULTI_FAMILIES = {
    "point_then_count": templates.MULTI_POINT_COUNT,
    "count_then_point": templates.MULTI_COUNT_THEN_POINT,
    "count": templates.MULTI_COUNT,
}
_IMAGE_FAMILIES = {
    "point_then_count": templates.POINT_COUNT,
    "count_then_point": templates.COUNT_THEN_POINT,
    "count": templates.COUNT,
}
_VIDEO_FAMILIES = {
    "point_then_count": templates.VIDEO_POINT_COUNT,
    "count_then_point": templates.VIDEO_COUNT_THEN_POINT,
    "count": templates.VIDEO_COUNT,
}
_CAPTION_FAMILIES = {
    "long_caption": templates.LONG_CAPTION,
    "short_caption": templates.SHORT_CAPTION,
    "transcript": templates.TRANSCRIPT,
    "video_long_caption": templates.VIDEO_LONG_CAPTION,
    "video_short_caption": templates.VIDEO_SHORT_CAPTION,
    "video_transcript": templates.VIDEO_TRANSCRIPT,
    "video_merged_caption": templates.NOTHING,
    "video_motion_caption": templates.MOTION_CAPTION,
    "video_object_caption": templates.OBJECT_CAPTION,
    "video_clip_caption_start_end": templates.CLIP_CAPTION,
    "video_clip_transcript_start_end": templates.CLIP_TRANSCRIPT,
    "video_frame_caption_timestamp": templates.FRAME_CAPTION,
}


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which part of an annotation a prompt is about."""

    images: tuple[int, ...] = ()
    """Of an image set: numbers from 1, in the order in which the prompt names them; empty: all of them."""
    query: int = 0
    """Of a single-point track: the visible position that the prompt shows."""


EVERYTHING = Selection()


@dataclass(frozen=True, kw_only=True)
class Wording:
    """Templates that one annotation may fill, and with what."""

    family: Family
    fields: Fields = field(default_factory=dict)
    share: float = 1.0
    """How often it is drawn among the wordings of the annotation."""


def wordings(annotation: Annotation, style: Style, selection: Selection = EVERYTHING) -> tuple[Wording, ...]:
    """All ways in which training may ask about `selection`; shares sum to 1."""
    if style == "style_and_length_v2":
        return (_bare(annotation),)
    match annotation:
        case Caption():
            found = _caption_wordings(annotation)
        case QuestionAnswer():
            found = (_question_wording(annotation, style),)
        case Pointing():
            found = _pointing_wordings(annotation, selection)
        case Tracking():
            found = _tracking_wordings(annotation, selection)
        case Conversation():
            found = (Wording(family=templates.QUESTION, fields={"question": first_text(annotation)}),)
    if style == "few_phrasings":
        return tuple(dataclasses.replace(wording, family=wording.family[:FEW]) for wording in found)
    return found


def reply(annotation: Annotation, selection: Selection = EVERYTHING) -> Pieces:
    """What the model has to say last about `selection`.

    Raises:
        DataError: a multiple-choice answer is none of its options, or a coordinate is not finite.
    """
    match annotation:
        case Caption():
            return (annotation.text,)
        case QuestionAnswer():
            said = standard_reply(annotation) if annotation.options else (annotation.answer,)
            return (f"{annotation.explanation} Answer:", f" {said[0]}", *said[1:]) if annotation.explanation else said
        case Pointing():
            return (_pointing_reply(annotation, selection),)
        case Tracking():
            return (format_tracks(answered_tracks(annotation, selection.query), annotation.label),)
        case Conversation():
            return (annotation.turns[-1].text,)


def right_option(question: QuestionAnswer) -> int:
    """Number of the option that is the answer.

    Raises:
        DataError: none is.
    """
    if question.answer not in question.options:
        raise DataError(
            f"question {question.question!r}",
            found=f"answer {question.answer!r}",
            expected=f"one of the options {question.options}",
        )
    return question.options.index(question.answer)


def draw_selection(annotation: Annotation, style: Style, num_images: int, rng: np.random.Generator) -> Selection:
    """What a training prompt is about."""
    if style != "demo_or_style_v2":
        return EVERYTHING
    if is_divisible(annotation):
        if num_images < 2 or rng.random() < ALL_IMAGES_PROBABILITY:
            return EVERYTHING
        number = int(rng.integers(1, num_images + 1))
        return Selection(images=tuple((rng.permutation(num_images)[:number] + 1).tolist()))
    if isinstance(annotation, Tracking) and annotation.form == "single_point":
        shown = num_queries(annotation)
        if shown > 1 and rng.random() >= FIRST_POSITION_PROBABILITY:
            return Selection(query=int(rng.integers(shown)))
    return EVERYTHING


def is_divisible(annotation: Annotation) -> bool:
    """Whether a prompt may be about some of the images: the set was not asked about in somebody's own words."""
    return (
        isinstance(annotation, Pointing)
        and annotation.task.startswith("multi_")
        and not annotation.question
        and annotation.count is None
    )


def first_text(conversation: Conversation) -> str:
    """The first user text, a system text in front of it (data.md 5.1)."""
    first, *others = conversation.turns
    return f"System: {first.text}\n{others[0].text}" if first.role == "system" else first.text


def named_images(numbers: Sequence[int]) -> Pieces:
    """`image_3, image_1` in pieces of which any selection takes no more tokens than all of them."""
    named = [piece for number in numbers for piece in (",", f" image_{number}")][1:]
    return (named[0].lstrip(), *named[1:], "")


def query_text(tracking: Tracking, query: int) -> str:
    """The visible position number `query` of a single-point track, as the prompt shows it."""
    shown = query_position(tracking, query)
    points = (Point(x=shown.x, y=shown.y, time=shown.time),) if shown else ()
    return format_points(points, tracking.label, "video")


def standard_reply(question: QuestionAnswer) -> Pieces:
    """The option that is right, as evaluation wants it."""
    return standard_choice(question.question, question.options, right_option(question)).reply


def _bare(annotation: Annotation) -> Wording:
    match annotation:
        case Caption():
            return Wording(family=templates.NOTHING)
        case QuestionAnswer():
            return Wording(family=templates.QUESTION, fields={"question": _question(annotation)})
        case Conversation():
            return Wording(family=templates.QUESTION, fields={"question": first_text(annotation)})
        case Pointing(question=question) if question:
            return Wording(family=templates.QUESTION, fields={"question": question})
        case _:
            return Wording(family=templates.LABEL, fields={"label": _label(annotation)})


def _caption_wordings(caption: Caption) -> tuple[Wording, ...]:
    family = _CAPTION_FAMILIES[style_of(caption)]
    if caption.start is None:
        return (Wording(family=family, fields={"label": caption.label}),)
    start, end = caption.start, caption.start if caption.end is None else caption.end
    seconds = {"start": f"{start:.1f} seconds", "end": f"{end:.1f} seconds"}
    clock = {"start": _clock(start), "end": _clock(end)}
    return (
        Wording(family=family, fields=seconds | {"time": seconds["start"]}, share=SECONDS_SHARE),
        Wording(family=family, fields=clock | {"time": clock["start"]}, share=1 - SECONDS_SHARE),
    )


def _question_wording(annotation: QuestionAnswer, style: Style) -> Wording:
    question, family = _question(annotation), templates.QUESTION
    name, is_video = style_of(annotation), annotation.task in ("video_qa", "subtitle_qa")
    if annotation.explanation:
        family = templates.REASONING
    elif not annotation.options and style != "few_phrasings":
        if name == "video_short_answer":
            family = templates.SHORT_ANSWER
        elif name in _STYLES_THAT_MAY_POINT and not is_video and asks_for_count(annotation.question):
            family = templates.WITHOUT_POINTING
    return Wording(family=family, fields={"question": question})


def _pointing_wordings(pointing: Pointing, selection: Selection) -> tuple[Wording, ...]:
    if pointing.question:
        return (Wording(family=templates.QUESTION, fields={"question": pointing.question}),)
    label, form, is_counted = _label(pointing), pointing.count_form, pointing.task.endswith("counting")
    if pointing.task.startswith("image_"):
        family = _IMAGE_FAMILIES[form] if is_counted else templates.POINTING
        return (Wording(family=family, fields={"label": label}),)
    if pointing.task.startswith("video_"):
        family = _VIDEO_FAMILIES[form] if is_counted else templates.VIDEO_POINTING
        return (Wording(family=family, fields={"label": label}),)
    family = _MULTI_FAMILIES[form] if is_counted else templates.MULTI_POINTING
    if is_counted or selection.images:
        images = named_images(selection.images) if selection.images else templates.ALL_IMAGES
        return (Wording(family=family, fields={"label": label, "images": images}),)
    return (
        Wording(family=family, fields={"label": label, "images": templates.ALL_IMAGES}, share=1 - IMAGE_FAMILY_SHARE),
        Wording(family=templates.POINTING, fields={"label": label}, share=IMAGE_FAMILY_SHARE),
    )


def _tracking_wordings(tracking: Tracking, selection: Selection) -> tuple[Wording, ...]:
    fields = {"label": tracking.label, "fps": f"{tracking.sampling_fps:g}"}
    if tracking.form == "ground":
        return (Wording(family=templates.GROUND, fields=fields),)
    if tracking.form == "single_point" and query_position(tracking, selection.query):
        fields["point"] = query_text(tracking, selection.query)
        return (Wording(family=templates.SINGLE_POINT_TRACK, fields=fields),)
    if tracking.sampling_fps != templates.DEFAULT_FPS:
        return (Wording(family=templates.TRACK, fields=fields),)
    return (
        Wording(family=templates.TRACK, fields=fields, share=1 - WITHOUT_FPS_SHARE),
        Wording(family=templates.TRACK_AT_DEFAULT_FPS, fields=fields, share=WITHOUT_FPS_SHARE),
    )


def _pointing_reply(pointing: Pointing, selection: Selection) -> str:
    form: ReplyForm = pointing.count_form if pointing.task.endswith("counting") else "points"
    if form == "count" and not pointing.points:
        return str(pointing.number)
    points = [point for point in pointing.points if not selection.images or point.image in selection.images]
    kind = _KIND_OF_PREFIX[pointing.task.partition("_")[0]]
    return format_answer(points, pointing.label, kind, form=form, images=selection.images)


def _question(annotation: QuestionAnswer) -> str | Pieces:
    if not annotation.options:
        return annotation.question
    return standard_choice(annotation.question, annotation.options, right_option(annotation)).prompt


def _label(annotation: Pointing | Tracking) -> str:
    """The released models were trained with lower-cased labels on images only (data.md 10.1)."""
    return annotation.label.lower() if annotation.task.startswith("image_") else annotation.label


def _clock(seconds: float) -> str:
    """`00:01:03.5`."""
    minutes, rest = divmod(round(seconds * 10), 600)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{rest // 10:02d}.{rest % 10}"
