"""How tasks are put into words: style names and our own phrasings.  The first phrasing is the one evaluation uses.

Styles are the names that the released models know (data.md 5.2, model.md 6.1); phrasings are ours.
`{label}` and `{fps}` are the only fields.
"""

from __future__ import annotations

from molmo2core.annotations import Annotation, Conversation, QuestionAnswer, Tracking

_STYLE_OF_TASK = {
    "image_caption": "long_caption",
    "video_caption": "video_long_caption",
    "image_qa": "vqa2",
    "multi_image_qa": "correction_qa",
    "video_qa": "video_short_answer",
    "subtitle_qa": "video_short_answer",
    "image_pointing": "pointing",
    "image_counting": "point_count",
    "multi_image_pointing": "multi_image_pointing",
    "video_pointing": "video_point",
    "tracking": "video_point_track_per_frame",
    "text": "text_sft",
}
_STYLE_OF_MULTIPLE_CHOICE = {
    "image_qa": "a_okvqa_mc",
    "multi_image_qa": "multi_image_mc",
    "video_qa": "video_multiple_choice",
    "subtitle_qa": "video_multiple_choice_w_subtitle",
}
STYLES_WITH_TAG = frozenset({"vqa2", "video_short_answer"})
"""Ours among the styles that `demo_or_style_v2` writes out; the others stand without a prefix."""
STYLES_WITHOUT_LENGTH = frozenset({"pointing", "point_count"})
"""Styles whose answer length `style_and_length_v2` does not tell."""

CHOICE_INSTRUCTION = "Reply with one of these options only."

_PHRASINGS = {
    "image_caption": (
        "Describe this image.",
        "What does this image show? Give every detail.",
        "Write a full description of the picture.",
    ),
    "video_caption": (
        "Describe this video.",
        "What happens in this video? Tell it in full.",
        "Write a full description of the clip.",
    ),
    "image_pointing": (
        "Point to {label}.",
        "Where is {label}? Point to each one.",
        "Show me every {label} with points.",
        "Mark {label} in the image.",
    ),
    "image_counting": (
        "How many {label} are there?",
        "Count {label}.",
        "Give the number of {label} in the image.",
    ),
    "multi_image_pointing": (
        "Point to {label} in all images.",
        "Where is {label} in these images?",
        "Mark {label} in each image.",
    ),
    "video_pointing": (
        "Point to {label} in the video.",
        "Where and when is {label} seen?",
        "Mark {label} in the video with times.",
    ),
    "tracking": (
        "Track {label} at {fps} fps.",
        "Follow {label} through the video at {fps} fps.",
        "Where is {label} over time? Use {fps} fps.",
    ),
}
_PHRASINGS_AT_DEFAULT_FPS = ("Track {label}.", "Follow {label} through the video.")
_DEFAULT_FPS = 2.0
"""What a tracking prompt without a number means (data.md 6.5)."""


def style_of(annotation: Annotation) -> str:
    """Name under which the released models know the task."""
    if isinstance(annotation, QuestionAnswer) and annotation.options:
        return _STYLE_OF_MULTIPLE_CHOICE[annotation.task]
    return _STYLE_OF_TASK[annotation.task]


def phrasings(annotation: Annotation) -> tuple[str, ...]:
    """All ways to ask for `annotation`, style prefix left out."""
    if isinstance(annotation, QuestionAnswer):
        if not annotation.options:
            return (annotation.question,)
        return ("\n".join([annotation.question, CHOICE_INSTRUCTION, *labelled_options(annotation.options)]),)
    if isinstance(annotation, Conversation):
        return (annotation.turns[0].text,)
    texts = _PHRASINGS[annotation.task]
    if isinstance(annotation, Tracking) and annotation.sampling_fps == _DEFAULT_FPS:
        texts += _PHRASINGS_AT_DEFAULT_FPS
    return tuple(text.format(**_fields(annotation)) for text in texts)


def bare_phrasing(annotation: Annotation) -> str:
    """The only prompt of stage 1: nothing for captions, the label for pointing, else the question (data.md 5.3)."""
    if isinstance(annotation, (QuestionAnswer, Conversation)):
        return phrasings(annotation)[0]
    return _fields(annotation).get("label", "")


def labelled_options(options: tuple[str, ...]) -> list[str]:
    """`A. text` lines."""
    return [f"{_letter(number)}. {text}" for number, text in enumerate(options)]


def _letter(number: int) -> str:
    """A .. Z, AA, AB, ..."""
    ahead, last = divmod(number, 26)
    return (_letter(ahead - 1) if ahead else "") + chr(ord("A") + last)


def _fields(annotation: Annotation) -> dict[str, str]:
    label = getattr(annotation, "label", None)
    if label is None:
        return {}
    # The released models were trained with lower-cased labels on images only (data.md 10.1).
    fields = {"label": label.lower() if annotation.task.startswith("image_") else label}
    return fields | ({"fps": f"{annotation.sampling_fps:g}"} if isinstance(annotation, Tracking) else {})
