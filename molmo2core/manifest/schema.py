"""The JSONL contract of a manifest, parsed strictly (docs/manifest.md).

    line of text -> ManifestRow (JSON object) -> ParsedRow (typed) -> Example (with media bytes)

Parsing settles structure: known keys, right types, known tasks.  What the values must fulfil is settled by the
rules in expectations.py.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import posixpath
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Annotated, Any, get_args, get_type_hints

from pydantic import Field, TypeAdapter, ValidationError

from molmo2core.annotations import (
    MEDIA_OF_TASK,
    STRICT,
    Annotation,
    Caption,
    Conversation,
    MediaKind,
    Point,
    Pointing,
    QuestionAnswer,
    Track,
    Tracking,
    TrackPosition,
    Turn,
)
from molmo2core.errors import DataError
from molmo2core.examples import Example, ManifestRow, Media, Split, Subtitle
from molmo2core.storage import opened

_SHOWN_CHARACTERS = 80


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A part of a video, in seconds of the file."""

    __pydantic_config__ = STRICT

    start: float
    end: float


@dataclass(frozen=True, kw_only=True)
class MediaFiles:
    """The medium of a row: addresses, not bytes."""

    __pydantic_config__ = STRICT

    kind: MediaKind
    files: tuple[str, ...] = ()
    clip: Clip | None = None
    """Only this part of the video is the medium; all other times count from its start."""
    subtitles: tuple[Subtitle, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was found in the media files of a validated row."""

    __pydantic_config__ = STRICT

    sizes: tuple[tuple[int, int], ...] = ()
    """Displayed (width, height) of each file."""
    sha256: tuple[str, ...] = ()
    """Checksum of each file."""
    duration_seconds: float = 0.0
    """Of a video, or of the clip of it, else 0."""
    fps: float = 0.0
    """Frames per second of a video on average, else 0."""


@dataclass(frozen=True, kw_only=True)
class ParsedRow:
    """A row whose structure is right.  The fields are the keys of a line, in the order of docs/manifest.md."""

    __pydantic_config__ = STRICT

    id: str
    """Unique in its dataset."""
    split: Split
    media: MediaFiles
    annotations: tuple[Annotated[Annotation, Field(discriminator="task")], ...]
    license: str
    source: str
    generator: str = ""
    """The model that wrote the texts; empty for people and programs."""
    measured: Measured | None = None
    """Only in validated manifests."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One reason why a row is refused."""

    rule: str
    """Name of the broken rule."""
    place: str
    """Field in the row, e.g. `annotations[2].points[0].x`."""
    found: str
    expected: str = ""
    mend: str = ""

    def __str__(self) -> str:
        parts = [f"{self.place}: {self.found}" if self.place else self.found]
        parts += [f"expected {self.expected}"] if self.expected else []
        parts += [self.mend] if self.mend else []
        return "; ".join(parts)


_ROW: TypeAdapter[ParsedRow] = TypeAdapter(ParsedRow)
_ANNOTATIONS: TypeAdapter[tuple[Annotation, ...]] = TypeAdapter(
    tuple[Annotated[Annotation, Field(discriminator="task")], ...]
)
_KINDS_BY_KEY: dict[str, type[Any]] = {
    "media": MediaFiles,
    "clip": Clip,
    "measured": Measured,
    "subtitles": Subtitle,
    "points": Point,
    "tracks": Track,
    "positions": TrackPosition,
    "turns": Turn,
}


def read_manifest(uri: str) -> Iterator[ManifestRow]:
    """Rows of the manifest at `uri`; relative addresses of media become absolute (they are relative to its folder).

    Raises:
        DataError: there is no such file, or a line is no JSON object.
    """
    for number, line in read_lines(uri):
        row = row_from_line(uri, number, line)
        if isinstance(row, Problem):
            raise DataError(f"{uri}:{number}", found=str(row), expected="one JSON object per line")
        yield row


def read_lines(uri: str) -> Iterator[tuple[int, bytes]]:
    """(1-based number, content) of every line that is not blank, without holding them all.

    Raises:
        DataError: there is no such file.
    """
    with opened(uri) as file:
        for number, line in enumerate(file, 1):
            content = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if content.strip():
                yield number, content.removesuffix(b"\n")


def row_from_line(uri: str, number: int, line: bytes) -> ManifestRow | Problem:
    """The JSON object in `line`, media addresses made absolute; a Problem when it is none."""
    try:
        content = json.loads(line.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        # Its own words say "line 1", which is wrong for all lines of the manifest but the first.
        details = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        return Problem(rule="json", place="", found=f"not JSON ({details})", mend="write one JSON object per line")
    if not isinstance(content, dict):
        found = f"a JSON {type(content).__name__} instead of an object"
        return Problem(rule="json", place="", found=found, mend="write one JSON object per line")
    media = content.get("media")
    if isinstance(media, dict) and isinstance(media.get("files"), list):
        files = [media_address(uri, name) if isinstance(name, str) else name for name in media["files"]]
        content = content | {"media": media | {"files": files}}
    return ManifestRow(dataset=PurePosixPath(uri).stem, line=number, content=content)


def media_address(manifest: str, name: str) -> str:
    """Address of the file that a manifest names: as written when absolute or remote, else beside the manifest."""
    if "://" in name or os.path.isabs(name) or not name:
        return name
    scheme, separator, path = manifest.rpartition("://")
    return scheme + separator + posixpath.normpath(posixpath.join(posixpath.dirname(path), name))


def parse_row(row: ManifestRow) -> ParsedRow:
    """The row with its types.

    Raises:
        DataError: a key is unknown or missing, a value has another type, or the task is unknown; names all of them.
    """
    parsed = inspect_row(row)
    if isinstance(parsed, ParsedRow):
        return parsed
    raise DataError(
        f"{row.dataset}:{row.line}",
        found=" | ".join(map(str, parsed)),
        expected="a row as in docs/manifest.md",
        mend="correct the line",
    )


def inspect_row(row: ManifestRow) -> ParsedRow | tuple[Problem, ...]:
    """The row with its types, or everything that is wrong with its structure."""
    try:
        return _ROW.validate_json(json.dumps(row.content))
    except ValidationError as error:
        return tuple(_problem(details) for details in error.errors(include_url=False))


def example_from_row(row: ManifestRow, read: Callable[[str], bytes]) -> Example:
    """The example of a row of a *validated* manifest.

    Args:
        row: as `read_manifest` gives it.
        read: gives the bytes at a media address (storage.read_bytes).

    Raises:
        DataError: the row was never validated, or a media file is gone.
    """
    parsed = parse_row(row)
    if parsed.measured is None:
        raise DataError(
            f"{row.dataset}:{row.line}", found="a row without `measured`", expected="a manifest made by validate_data"
        )
    media = Media(
        kind=parsed.media.kind,
        files=tuple(read(name) for name in parsed.media.files),
        sizes=parsed.measured.sizes,
        duration_seconds=parsed.measured.duration_seconds,
        fps=parsed.measured.fps,
        clip_start_seconds=parsed.media.clip.start if parsed.media.clip else 0.0,
        subtitles=parsed.media.subtitles,
    )
    return Example(uid=parsed.id, dataset=row.dataset, split=parsed.split, media=media, annotations=parsed.annotations)


def row_to_json(row: ParsedRow) -> bytes:
    """One line of a validated manifest, without the line break."""
    return _ROW.dump_json(row, exclude_defaults=True)


def annotations_to_json(annotations: tuple[Annotation, ...]) -> bytes:
    """Annotations as JSON, as in a manifest row; fields that have their default are left out."""
    return _ANNOTATIONS.dump_json(annotations, exclude_defaults=True)


def annotations_from_json(content: bytes) -> tuple[Annotation, ...]:
    """Inverse of `annotations_to_json`.

    Raises:
        DataError: `content` holds no annotations.
    """
    try:
        return _ANNOTATIONS.validate_json(content)
    except ValidationError as error:
        problem = _problem(error.errors(include_url=False)[0])
        raise DataError("annotations", found=str(problem), expected="what annotations_to_json wrote") from error


def shown(value: object) -> str:
    """`value` as JSON, cut to a readable length."""
    text = json.dumps(value, default=str)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 3]}..."


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _problem(details: Mapping[str, Any]) -> Problem:
    kind, loc = details["type"], tuple(details["loc"])
    place, found = _place(loc), shown(details["input"])
    match kind:
        case "unexpected_keyword_argument":
            nearest = difflib.get_close_matches(str(loc[-1]), _known_keys(loc), n=1)
            mend = f"did you mean {nearest[0]!r}?" if nearest else "remove it"
            expected = f"one of {', '.join(_known_keys(loc))}"
            return Problem(rule="unknown_key", place=place, found="unknown key", expected=expected, mend=mend)
        case "missing":
            return Problem(rule="missing_key", place=place, found="missing", expected="a value")
        case "union_tag_invalid":
            tag = str(details["ctx"]["tag"])
            nearest = difflib.get_close_matches(tag, MEDIA_OF_TASK, n=1)
            return Problem(
                rule="unknown_task",
                place=f"{place}.task",
                found=shown(tag),
                expected=f"one of {', '.join(MEDIA_OF_TASK)}",
                mend=f"did you mean {nearest[0]!r}?" if nearest else "",
            )
        case "union_tag_not_found":
            return Problem(rule="missing_key", place=f"{place}.task", found="missing", expected="the name of a task")
        case _:
            expected = details["msg"].removeprefix("Input should be ")
            return Problem(rule="wrong_value", place=place, found=found, expected=expected)


def _place(loc: tuple[str | int, ...]) -> str:
    """`annotations[2].points[0].x`."""
    text = ""
    for position, part in enumerate(loc):
        if isinstance(part, int):
            text += f"[{part}]"
        elif not _is_tag(loc, position):
            text += f".{part}" if text else part
    return text


def _is_tag(loc: tuple[str | int, ...], position: int) -> bool:
    """Whether the part at `position` is the task that pydantic inserts behind the number of an annotation."""
    behind_number = position >= 1 and isinstance(loc[position - 1], int)
    return behind_number and (position == 1 or loc[position - 2] == "annotations") and loc[position] in MEDIA_OF_TASK


def _known_keys(loc: tuple[str | int, ...]) -> list[str]:
    """Keys that are known where `loc` names an unknown one."""
    owner = next((part for part in reversed(loc[:-1]) if isinstance(part, str)), "")
    kind = _KINDS_BY_KEY.get(owner) or _kind_of_task(owner) or ParsedRow
    return [field.name for field in dataclasses.fields(kind) if field.name != "measured"]


def _kind_of_task(task: str) -> type[Any] | None:
    kinds = (Caption, QuestionAnswer, Pointing, Tracking, Conversation)
    return next((kind for kind in kinds if task in get_args(get_type_hints(kind)["task"])), None)
