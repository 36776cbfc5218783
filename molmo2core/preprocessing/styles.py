"""Styles: the names under which the released models know tasks, and the prefix of the first user turn that tells them.

    demo_or_style_v2        `vqa2: question` for short answers, no prefix for everything a person would type
    style_and_length_v2     `long_caption 37:`, a hint of the reply's length in units of 15 characters

Source: data.md 5.2, model.md 6.1 and 6.4.
"""

from __future__ import annotations

import numpy as np

from molmo2core.annotations import Annotation, Caption, Pointing, QuestionAnswer, Tracking
from molmo2core.preprocessing.config import Style

CHARACTERS_PER_LENGTH_UNIT = 15
LENGTH_NOISE_CHARACTERS = 25.0
MAX_LENGTH_NOISE_CHARACTERS = 250
"""Ten standard deviations: never reached, but it makes the number in a prefix bounded (lengths.py)."""
INFERENCE_LENGTH = 65
"""Length hint when there is no reply to measure."""
NO_HINT_PROBABILITY = 0.1

_MULTIPLE_CHOICE = frozenset({
    "a_okvqa_mc", "ai2_diagram", "ai2_diagram_no_letter", "science_qa", "mantis_instruct_mc", "multi_image_mc",
    "multi_image_mc_exp", "video_multiple_choice", "video_multiple_choice_count_without_pointing",
    "video_multiple_choice_multiple_correct", "video_multiple_choice_w_subtitle",
})  # fmt: skip
STYLES_WITHOUT_TAG = _MULTIPLE_CHOICE | frozenset({
    "point_count", "pointing", "cosyn_point", "user_qa", "long_caption", "short_caption", "video_long_caption",
    "video_short_caption", "video_point_track_per_frame", "video_point_track_start_end",
    "video_single_point_track_start_end", "video_transcript", "video_clip_caption_start_end",
    "video_clip_caption_start_end_in_seconds", "video_clip_transcript_start_end",
    "video_clip_transcript_start_end_in_seconds", "video_frame_caption_timestamp",
    "video_frame_caption_timestamp_in_seconds", "correction_qa", "text_sft", "video_point", "video_point_count",
    "video_count", "video_count_point", "multi_image_pointing", "multi_image_counting", "multi_image_point_then_count",
    "multi_image_count_then_point",
})  # fmt: skip
"""Styles that `demo_or_style_v2` does not write out.  Two of tracking (`video_point_ground_start_end`,
`video_single_point_track_per_frame`) are missing, as in the published list."""
STYLES_WITHOUT_LENGTH = frozenset({"pointing", "point_count", "cosyn_point"})
"""Styles whose answer length `style_and_length_v2` does not tell."""

_OF_QUESTION = {
    "image_qa": "vqa2",
    "multi_image_qa": "correction_qa",
    "video_qa": "video_short_answer",
    "subtitle_qa": "video_short_answer",
}
_OF_MULTIPLE_CHOICE = {
    "image_qa": "a_okvqa_mc",
    "multi_image_qa": "multi_image_mc",
    "video_qa": "video_multiple_choice",
    "subtitle_qa": "video_multiple_choice_w_subtitle",
}
_OF_IMAGE_CAPTION = {"long": "long_caption", "short": "short_caption", "transcript": "transcript"}
_OF_POINTING = {
    "image_pointing": "pointing",
    "multi_image_pointing": "multi_image_pointing",
    "video_pointing": "video_point",
}
_OF_COUNTING = {
    ("image_counting", "point_then_count"): "point_count",
    ("image_counting", "count_then_point"): "count_then_point",
    ("image_counting", "count"): "count",
    ("multi_image_counting", "point_then_count"): "multi_image_point_then_count",
    ("multi_image_counting", "count_then_point"): "multi_image_count_then_point",
    ("multi_image_counting", "count"): "multi_image_counting",
    ("video_counting", "point_then_count"): "video_point_count",
    ("video_counting", "count_then_point"): "video_count_point",
    ("video_counting", "count"): "video_count",
}
_OF_TRACKING = {
    "track": "video_point_track_per_frame",
    "ground": "video_point_ground_start_end",
    "single_point": "video_single_point_track_per_frame",
}
_TRAINED_AS = {
    "eval_short_answer": "vqa2",
    "eval_multiple_choice": "a_okvqa_mc",
    "video_eval_short_answer": "video_short_answer",
    "video_eval_multiple_choice": "video_multiple_choice",
    "video_eval_multiple_choice_w_subtitle": "video_multiple_choice_w_subtitle",
}
_WITHOUT_POINTING = "_count_without_pointing"


def style_of(annotation: Annotation) -> str:
    """Name under which the released models know the task of `annotation`."""
    match annotation:
        case Caption():
            return _style_of_caption(annotation)
        case QuestionAnswer():
            return _style_of_question(annotation)
        case Pointing(task="image_pointing", question=question) if question:
            return "cosyn_point"
        case Pointing(task=task) if task in _OF_POINTING:
            return _OF_POINTING[task]
        case Pointing():
            return _OF_COUNTING[annotation.task, annotation.count_form]
        case Tracking():
            return _OF_TRACKING[annotation.form]
        case _:
            return "text_sft"


def trained_style(style: str) -> str:
    """The style that an evaluation's own name (`eval_short_answer`, ...) was trained as."""
    if style.startswith("eval_multi_image_"):
        return style.removeprefix("eval_")
    return _TRAINED_AS.get(style, style)


def inference_style(style: str) -> str:
    """As `trained_style`; variants that say in training how to count are the plain style."""
    return trained_style(style).removesuffix(_WITHOUT_POINTING)


def style_prefix(name: str, style: Style, length: int | None) -> tuple[str, ...]:
    """Pieces of the prefix of the first user turn, e.g. ("vqa2", ":"); empty: none.

    Args:
        name: from `style_of`.
        style: of the training stage.
        length: counts only where the style tells it.
    """
    if style != "style_and_length_v2":
        return () if name in STYLES_WITHOUT_TAG else (name, ":")
    if length is None or name in STYLES_WITHOUT_LENGTH:
        return (name, ":")
    return (name, f" {length}:")


def draw_length(num_characters: int, rng: np.random.Generator) -> int | None:
    """Length hint for a reply of so many characters; in one of ten none."""
    if rng.random() < NO_HINT_PROBABILITY:
        return None
    return hinted_length(num_characters, round(float(rng.normal(0.0, LENGTH_NOISE_CHARACTERS))))


def hinted_length(num_characters: int, noise: int) -> int:
    """Length hint of a reply; never below 0, as a negative one tells nothing."""
    noise = max(-MAX_LENGTH_NOISE_CHARACTERS, min(MAX_LENGTH_NOISE_CHARACTERS, noise))
    return max(0, (num_characters + noise) // CHARACTERS_PER_LENGTH_UNIT)


def _style_of_caption(caption: Caption) -> str:
    if caption.task == "image_caption":
        return _OF_IMAGE_CAPTION.get(caption.kind, caption.kind)
    told = "transcript" if caption.kind == "transcript" else "caption"
    if caption.end is not None:
        return f"video_clip_{told}_start_end"
    if caption.start is not None:
        return "video_frame_caption_timestamp"
    return "video_transcript" if told == "transcript" else f"video_{caption.kind}_caption"


def _style_of_question(question: QuestionAnswer) -> str:
    if question.style:
        return trained_style(question.style)
    style = (_OF_MULTIPLE_CHOICE if question.options else _OF_QUESTION)[question.task]
    return f"{style}_exp" if question.explanation else style
