"""What the values of a row must fulfil: each rule finds its own offenders and says why they are refused.

A rule's name appears in the quarantine, in the Data Docs and in the table of docs/manifest.md.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from molmo2core.annotations import (
    MEDIA_OF_TASK,
    Caption,
    Conversation,
    Point,
    Pointing,
    QuestionAnswer,
    Tracking,
    on_sampling_grid,
)
from molmo2core.manifest.measure import FileFacts
from molmo2core.manifest.schema import ParsedRow, Problem, shown
from molmo2core.special_tokens import CHAT_END, CHAT_START, EXTRA_TOKENS, TEXT_PAD

TIME_TOLERANCE_SECONDS = 0.001
"""Durations in containers are rounded to about a millisecond."""

RULES: dict[str, str] = {
    "json": "the line is a JSON object",
    "unknown_key": "every key is known",
    "missing_key": "every key that has no default is there",
    "wrong_value": "values have the right type; `split`, `kind` and `role` one of their words",
    "unknown_task": "the task is one of the fourteen",
    "duplicate_id": "ids are unique in a dataset; the first row keeps its id",
    "no_annotations": "there is at least one annotation",
    "task_of_medium": "the task fits the kind of medium",
    "number_of_files": "no file for `none`, one for `image` and `video`, two or more for `images`",
    "too_many_images": "a set has no more images than training takes (held-out sets: evaluation); none is ever cut",
    "missing_file": "every media file exists",
    "empty_file": "no media file has zero bytes",
    "broken_file": "every media file can be decoded to its end",
    "oversized_file": "no image has more than 89 million pixels, no video is beyond its limits",
    "clip": "a clip belongs to a video, starts at 0 or later and ends after that, not after the video",
    "split_leak": "no medium is in two splits; a row of the split nearer to training gives way",
    "empty_text": "ids, texts, questions, answers, options and labels are not blank",
    "special_token": "no text contains a special token of the tokenizer",
    "options": "options are two or more, all different, and the answer is one of them",
    "style": "a style is lower-case letters, digits and underscores",
    "caption_part": "`start`, `end` and the kinds `merged`, `motion`, `object` belong to videos, `label` to `object`",
    "count": "a count is not negative and the number of points, if there are some; it stands with form `count`",
    "turn_order": "a conversation starts with the user, alternates and ends with the assistant",
    "point_outside": "0 <= x, y <= 1: fractions of the displayed width and height",
    "radius": "0 < radius <= 1",
    "image_number": "a point's image is one of the set, counted from 1",
    "point_time": "points of a video have a time, points of images have none",
    "time_outside": "times lie between 0 and the end of the video",
    "track_order": "a track has positions, in ascending time, at most one per time",
    "object_ids": "object ids of one annotation are different and not negative",
    "sampling_fps": "sampling_fps is above 0",
    "sampling_grid": "objects that are seen at all are seen at a multiple of 1 / sampling_fps",
    "single_point": "form `single_point` has one track, seen at least once",
    "subtitles": "subtitles belong to a video, end after they start; `subtitle_qa` has some",
    "license": "the licence is one that the recipe allows",
    "generator": "no text was written by a model that the recipe forbids",
}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the recipe allows."""

    max_images: int
    """Of a set that is trained on."""
    max_images_held_out: int
    """Of a set in another split: what evaluation takes."""
    allowed_licenses: tuple[str, ...] = ()
    forbidden_generators: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class CheckedRow:
    """A parsed row, what its files turned out to be, and the recipe's limits."""

    row: ParsedRow
    files: tuple[FileFacts, ...]
    limits: Limits = field(default_factory=lambda: Limits(max_images=5, max_images_held_out=20))

    @property
    def duration_seconds(self) -> float | None:
        """Of the video or the clip of it; None when there is none that could be opened."""
        is_one_video = self.row.media.kind == "video" and len(self.files) == 1
        return shown_seconds(self.row, self.files[0]) if is_one_video else None


def shown_seconds(row: ParsedRow, file: FileFacts) -> float | None:
    """Length of a row's video: of the whole file, or of the clip; None if the file or the clip is bad."""
    clip, seconds = row.media.clip, file.duration_seconds
    if file.fault or (
        clip and not (0 <= clip.start < min(clip.end, seconds) and clip.end <= seconds + TIME_TOLERANCE_SECONDS)
    ):
        return None
    return round(min(clip.end, seconds) - clip.start, 6) if clip else seconds


def find_problems(checked: CheckedRow) -> list[Problem]:
    """Everything that the rules say about one row by itself (`duplicate_id` and `split_leak` need the others)."""
    return [problem for rule in _ROW_RULES for problem in rule(checked)]


def _files(checked: CheckedRow) -> Iterator[Problem]:
    media = checked.row.media
    allowed = {"none": (0, 0), "image": (1, 1), "video": (1, 1), "images": (2, None)}
    fewest, most = allowed[media.kind]
    if len(media.files) < fewest or (most is not None and len(media.files) > most):
        expected = f"{fewest} for kind {media.kind!r}" if most == fewest else f"{fewest} or more for kind 'images'"
        yield Problem(rule="number_of_files", place="media.files", found=f"{len(media.files)} files", expected=expected)
    is_trained_on, limits = checked.row.split == "train", checked.limits
    max_images = limits.max_images if is_trained_on else limits.max_images_held_out
    if media.kind == "images" and len(media.files) > max_images:
        yield Problem(
            rule="too_many_images",
            place="media.files",
            found=f"{len(media.files)} images",
            expected=f"at most {max_images}",
            mend=f"split the set or raise max_images of {'training' if is_trained_on else 'evaluation'} in the recipe",
        )
    for number, (name, facts) in enumerate(zip(media.files, checked.files, strict=True)):
        if facts.fault:
            found = f"{name}: {facts.details}"
            yield Problem(rule=facts.fault, place=f"media.files[{number}]", found=found, mend="deliver the file again")


def _clip(checked: CheckedRow) -> Iterator[Problem]:
    clip, kind = checked.row.media.clip, checked.row.media.kind
    if clip is None:
        return
    if kind != "video":
        found = f"a clip of media of kind {kind!r}"
        yield Problem(rule="clip", place="media.clip", found=found, expected="a video, or no clip")
    elif not 0 <= clip.start < clip.end:
        found = f"start {clip.start:g}, end {clip.end:g}"
        yield Problem(rule="clip", place="media.clip", found=found, expected="0 <= start < end")
    elif len(checked.files) == 1 and not checked.files[0].fault and checked.duration_seconds is None:
        found = f"start {clip.start:g} s, end {clip.end:g} s"
        expected = f"within {checked.files[0].duration_seconds:g} s, the length of the video"
        yield Problem(rule="clip", place="media.clip", found=found, expected=expected)


def _tasks(checked: CheckedRow) -> Iterator[Problem]:
    row = checked.row
    if not row.annotations:
        yield Problem(rule="no_annotations", place="annotations", found="none", expected="at least one")
    for number, annotation in enumerate(row.annotations):
        if row.media.kind not in MEDIA_OF_TASK[annotation.task]:
            expected = " or ".join(MEDIA_OF_TASK[annotation.task])
            found = f"{annotation.task!r} on media of kind {row.media.kind!r}"
            place = f"annotations[{number}].task"
            yield Problem(rule="task_of_medium", place=place, found=found, expected=f"kind {expected}")


def _texts(checked: CheckedRow) -> Iterator[Problem]:
    for place, text in _all_texts(checked.row):
        if not text.strip():
            yield Problem(rule="empty_text", place=place, found="blank", expected="a text")
        if token := next((token for token in _SPECIAL_TOKENS if token in text), ""):
            yield Problem(
                rule="special_token",
                place=place,
                found=f"the special token {token}",
                expected="plain text",
                mend="write it in another way; as it stands it would become a control token",
            )


def _options(checked: CheckedRow) -> Iterator[Problem]:
    for number, annotation in enumerate(checked.row.annotations):
        if not isinstance(annotation, QuestionAnswer) or not annotation.options:
            continue
        place, options = f"annotations[{number}]", annotation.options
        if len(options) < 2 or len(set(options)) < len(options):
            expected = "two or more different options"
            yield Problem(rule="options", place=f"{place}.options", found=shown(options), expected=expected)
        if annotation.answer not in options:
            expected = f"one of the options {shown(options)}"
            yield Problem(rule="options", place=f"{place}.answer", found=shown(annotation.answer), expected=expected)


def _styles(checked: CheckedRow) -> Iterator[Problem]:
    for number, annotation in enumerate(checked.row.annotations):
        style = annotation.style if isinstance(annotation, QuestionAnswer) else ""
        if style and not _STYLE.fullmatch(style):
            place, expected = f"annotations[{number}].style", "e.g. chart_qa"
            yield Problem(rule="style", place=place, found=shown(style), expected=expected)


def _captions(checked: CheckedRow) -> Iterator[Problem]:
    for number, annotation in enumerate(checked.row.annotations):
        if not isinstance(annotation, Caption):
            continue
        place, start, end = f"annotations[{number}]", annotation.start, annotation.end
        is_part = start is not None or end is not None
        if annotation.task != "video_caption" and (is_part or annotation.kind in ("merged", "motion", "object")):
            found = "a part of an image" if is_part else f"kind {annotation.kind!r} of an image"
            yield Problem(rule="caption_part", place=place, found=found, expected="task 'video_caption'")
        if end is not None and (start is None or end <= start):
            found = f"start {start}, end {end:g}"
            yield Problem(rule="caption_part", place=f"{place}.end", found=found, expected="start < end")
        if is_part and annotation.kind not in ("long", "transcript"):
            found = f"start or end with kind {annotation.kind!r}"
            yield Problem(rule="caption_part", place=f"{place}.kind", found=found, expected="long or transcript")
        if annotation.kind == "transcript" and is_part and end is None:
            yield Problem(rule="caption_part", place=f"{place}.end", found="missing", expected="the end of the words")
        if bool(annotation.label.strip()) != (annotation.kind == "object"):
            found = f"label {shown(annotation.label)} with kind {annotation.kind!r}"
            expected = "a label with kind object, and there alone"
            yield Problem(rule="caption_part", place=f"{place}.label", found=found, expected=expected)


def _counts(checked: CheckedRow) -> Iterator[Problem]:
    for number, annotation in enumerate(checked.row.annotations):
        if not isinstance(annotation, Pointing):
            continue
        place, count, is_number_alone = f"annotations[{number}]", annotation.count, annotation.count_form == "count"
        if annotation.task.endswith("pointing") and (is_number_alone or annotation.count_form == "count_then_point"):
            found = f"{annotation.count_form!r} with task {annotation.task!r}"
            expected = "a task of counting"
            yield Problem(rule="count", place=f"{place}.count_form", found=found, expected=expected)
        if count is not None and not is_number_alone:
            expected = "no count: it is the number of points; or count_form 'count'"
            yield Problem(rule="count", place=f"{place}.count", found=str(count), expected=expected)
        if count is not None and (count < 0 or (annotation.points and count != len(annotation.points))):
            expected = f"{len(annotation.points)}, the number of points" if annotation.points else "0 or more"
            yield Problem(rule="count", place=f"{place}.count", found=str(count), expected=expected)


def _turns(checked: CheckedRow) -> Iterator[Problem]:
    for number, annotation in enumerate(checked.row.annotations):
        if isinstance(annotation, Conversation):
            roles = [turn.role for turn in annotation.turns]
            spoken = roles[1:] if roles[:1] == ["system"] else roles
            place = f"annotations[{number}].turns"
            if not spoken or spoken != ["user", "assistant"] * (len(spoken) // 2):
                expected = "user, assistant, user, ..., assistant"
                yield Problem(rule="turn_order", place=place, found=shown(roles), expected=expected)
            if len(spoken) < len(roles) and len(annotation.turns[0].text.splitlines()) > 1:
                found = "a system text of several lines"
                yield Problem(rule="turn_order", place=f"{place}[0].text", found=found, expected="one line")


def _points(checked: CheckedRow) -> Iterator[Problem]:
    is_video = checked.row.media.kind == "video"
    num_files = len(checked.row.media.files)
    for place, point in _all_points(checked.row):
        if not 1 <= point.image <= max(num_files, 1) or (is_video and point.image != 1):
            expected = f"1 to {num_files}" if checked.row.media.kind == "images" else "1"
            yield Problem(rule="image_number", place=f"{place}.image", found=str(point.image), expected=expected)
        if (point.time is not None) != is_video:
            found = "missing" if point.time is None else f"{point.time} on an image"
            expected = "seconds" if is_video else "no time"
            yield Problem(rule="point_time", place=f"{place}.time", found=found, expected=expected)
    for place, x, y in _all_positions(checked.row):
        if not (0 <= x <= 1 and 0 <= y <= 1):
            yield Problem(
                rule="point_outside",
                place=place,
                found=f"({x:g}, {y:g})",
                expected="0 <= x, y <= 1",
                mend=_unit_hint(checked.row),
            )
    for place, radius in _all_radii(checked.row):
        if not 0 < radius <= 1:
            expected = "above 0, at most 1: a fraction of the shorter side"
            yield Problem(rule="radius", place=place, found=f"{radius:g}", expected=expected)


def _times(checked: CheckedRow) -> Iterator[Problem]:
    duration = checked.duration_seconds
    if duration is None:
        return
    for place, time in _all_times(checked.row):
        if not 0 <= time <= duration + TIME_TOLERANCE_SECONDS:
            expected = f"0 to {duration:g} s, the length of the {'clip' if checked.row.media.clip else 'video'}"
            yield Problem(rule="time_outside", place=place, found=f"{time:g} s", expected=expected)


def _tracks(checked: CheckedRow) -> Iterator[Problem]:
    for number, annotation in enumerate(checked.row.annotations):
        if not isinstance(annotation, Tracking):
            continue
        place = f"annotations[{number}]"
        if annotation.sampling_fps <= 0:
            found = f"{annotation.sampling_fps:g}"
            yield Problem(rule="sampling_fps", place=f"{place}.sampling_fps", found=found, expected="above 0")
        elif annotation.form != "ground" and not _is_sampled(annotation):
            found = f"no visible position at a multiple of 1 / {annotation.sampling_fps:g} s"
            expected = "positions at the times that the answer is to have"
            yield Problem(rule="sampling_grid", place=f"{place}.tracks", found=found, expected=expected)
        num_seen = sum(any(position.visible for position in track.positions) for track in annotation.tracks)
        if annotation.form == "single_point" and (len(annotation.tracks), num_seen) != (1, 1):
            found = f"{len(annotation.tracks)} tracks, {num_seen} of them seen"
            yield Problem(rule="single_point", place=f"{place}.tracks", found=found, expected="one, seen")
        ids = Counter(track.object_id for track in annotation.tracks)
        for object_id, count in ids.items():
            if count > 1 or object_id < 0:
                found = f"object_id {object_id} {count} times"
                expected = "different ids, none negative"
                yield Problem(rule="object_ids", place=f"{place}.tracks", found=found, expected=expected)
        for index, track in enumerate(annotation.tracks):
            times = [position.time for position in track.positions]
            if not times or any(later <= earlier for earlier, later in itertools.pairwise(times)):
                place_of_track = f"{place}.tracks[{index}].positions"
                expected = "at least one, each later than the one before"
                yield Problem(
                    rule="track_order", place=place_of_track, found=f"times {shown(times)}", expected=expected
                )


def _is_sampled(tracking: Tracking) -> bool:
    """Whether an answer at `sampling_fps` has anything to say, if there is anything."""
    times = [position.time for track in tracking.tracks for position in track.positions if position.visible]
    return not times or any(on_sampling_grid(time, tracking.sampling_fps) for time in times)


def _subtitles(checked: CheckedRow) -> Iterator[Problem]:
    media = checked.row.media
    if media.subtitles and media.kind != "video":
        found = f"subtitles on media of kind {media.kind!r}"
        yield Problem(rule="subtitles", place="media.subtitles", found=found, expected="a video")
    for number, line in enumerate(media.subtitles):
        if not line.start < line.end:
            found = f"start {line.start:g}, end {line.end:g}"
            yield Problem(rule="subtitles", place=f"media.subtitles[{number}]", found=found, expected="start < end")
    if not media.subtitles and any(annotation.task == "subtitle_qa" for annotation in checked.row.annotations):
        found = "none, with a question of task 'subtitle_qa'"
        yield Problem(rule="subtitles", place="media.subtitles", found=found, expected="at least one line")


def _provenance(checked: CheckedRow) -> Iterator[Problem]:
    row, limits = checked.row, checked.limits
    if limits.allowed_licenses and row.license not in limits.allowed_licenses:
        expected = f"one of {', '.join(limits.allowed_licenses)}"
        yield Problem(rule="license", place="license", found=shown(row.license), expected=expected)
    forbidden = next((name for name in limits.forbidden_generators if name.lower() in row.generator.lower()), "")
    if forbidden:
        expected = f"no generator whose name contains {forbidden!r}"
        yield Problem(rule="generator", place="generator", found=shown(row.generator), expected=expected)


_ROW_RULES: tuple[Callable[[CheckedRow], Iterator[Problem]], ...] = (
    _files, _clip, _tasks, _texts, _options, _styles, _captions, _counts, _turns, _points, _times, _tracks, _subtitles,
    _provenance,
)  # fmt: skip
_STYLE = re.compile(r"[a-z][a-z0-9_]*[a-z0-9]")
_SPECIAL_TOKENS = (CHAT_START, CHAT_END, TEXT_PAD, *EXTRA_TOKENS)


def _all_texts(row: ParsedRow) -> Iterator[tuple[str, str]]:
    yield "id", row.id
    for number, line in enumerate(row.media.subtitles):
        yield f"media.subtitles[{number}].text", line.text
    for number, annotation in enumerate(row.annotations):
        place = f"annotations[{number}]"
        if isinstance(annotation, Caption):
            yield f"{place}.text", annotation.text
            if annotation.label:
                yield f"{place}.label", annotation.label
        elif isinstance(annotation, QuestionAnswer):
            yield f"{place}.question", annotation.question
            yield f"{place}.answer", annotation.answer
            if annotation.explanation:
                yield f"{place}.explanation", annotation.explanation
            for index, option in enumerate(annotation.options):
                yield f"{place}.options[{index}]", option
        elif isinstance(annotation, Conversation):
            for index, turn in enumerate(annotation.turns):
                yield f"{place}.turns[{index}].text", turn.text
        else:
            yield f"{place}.label", annotation.label
            if isinstance(annotation, Pointing) and annotation.question:
                yield f"{place}.question", annotation.question


def _all_points(row: ParsedRow) -> Iterator[tuple[str, Point]]:
    for number, annotation in enumerate(row.annotations):
        if isinstance(annotation, Pointing):
            for index, point in enumerate(annotation.points):
                yield f"annotations[{number}].points[{index}]", point


def _all_positions(row: ParsedRow) -> Iterator[tuple[str, float, float]]:
    for place, point in _all_points(row):
        yield place, point.x, point.y
    for number, annotation in enumerate(row.annotations):
        if isinstance(annotation, Tracking):
            for index, track in enumerate(annotation.tracks):
                for step, position in enumerate(track.positions):
                    yield f"annotations[{number}].tracks[{index}].positions[{step}]", position.x, position.y


def _all_radii(row: ParsedRow) -> Iterator[tuple[str, float]]:
    for place, point in _all_points(row):
        yield f"{place}.radius", point.radius
    for number, annotation in enumerate(row.annotations):
        if isinstance(annotation, Tracking):
            for index, track in enumerate(annotation.tracks):
                yield f"annotations[{number}].tracks[{index}].radius", track.radius


def _all_times(row: ParsedRow) -> Iterator[tuple[str, float]]:
    for place, point in _all_points(row):
        if point.time is not None:
            yield f"{place}.time", point.time
    for number, annotation in enumerate(row.annotations):
        if isinstance(annotation, Tracking):
            for index, track in enumerate(annotation.tracks):
                for step, position in enumerate(track.positions):
                    yield f"annotations[{number}].tracks[{index}].positions[{step}].time", position.time
        if isinstance(annotation, Caption):
            for name, time in (("start", annotation.start), ("end", annotation.end)):
                if time is not None:
                    yield f"annotations[{number}].{name}", time
    for number, line in enumerate(row.media.subtitles):
        yield f"media.subtitles[{number}].start", line.start


def _unit_hint(row: ParsedRow) -> str:
    """What the unit may have been, judged by the largest value of the row."""
    largest = max(max(x, y) for _, x, y in _all_positions(row))
    if largest <= 1:
        return "negative values lie outside"
    if largest <= 1.05:
        return "clip values that lie just outside"
    return "looks like percent: divide by 100" if largest <= 100 else "looks like pixels: divide by width and height"


def point_range(row: ParsedRow) -> tuple[float, float] | None:
    """Smallest and largest coordinate of the row; None without points."""
    values = [value for _, x, y in _all_positions(row) for value in (x, y)]
    return (min(values), max(values)) if values else None


def time_range(row: ParsedRow) -> tuple[float, float] | None:
    """Earliest and latest time of the row; None without times."""
    values = [time for _, time in _all_times(row)]
    return (min(values), max(values)) if values else None
