"""Recipe text -> Recipe, strictly; sections and recipes <-> JSON.

An unknown key, a wrong type or an impossible value is a RecipeError that names file, line and key; an unknown key
also the nearest known one.  Sections cross process borders as JSON strings, because a KFP `dict` turns 4 into 4.0.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import typing
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path as FilePath
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from molmo2core.errors import RecipeError
from molmo2core.recipe.schema import Recipe
from molmo2core.recipe.strict_yaml import Path, YamlTree, parse_yaml

Section = TypeVar("Section")
_OVERRIDE = "--set"


def load_recipe(text: str, overrides: Sequence[str] = (), *, where: str = "recipe") -> Recipe:
    """Parse a recipe.

    Args:
        text: the file's content.
        overrides: `path.to.key=value`, the value in YAML; applied in order, after the profile has chosen between
            `alternatives`.
        where: name of the file, for errors.

    Raises:
        RecipeError: anything that is not exactly a recipe.
    """
    tree = parse_yaml(text, where)
    if not isinstance(tree.root, dict):
        raise RecipeError(where, found=f"{type(tree.root).__name__} at the top", expected="a mapping of recipe keys")
    parsed = [_parse_override(override) for override in overrides]
    values = json.loads(json.dumps(tree.root, default=str))  # unshares aliases: an override changes one place only
    profile = next((value for path, value in reversed(parsed) if path == ("profile",)), values.get("profile"))
    _apply_profile(values, profile or "described", tree, where)
    lines = {path: f"{where}:{line}" for path, line in tree.lines.items()}
    for path, value in parsed:
        _put(values, path, value, place=f"{_OVERRIDE} {_dotted(path)}")
        lines = {known: line for known, line in lines.items() if known[: len(path)] != path}
        lines[path] = f"{_OVERRIDE} {_dotted(path)}={json.dumps(value)}"
    return _validated(values, Recipe, functools.partial(_place, lines, where))


def read_recipe(path: FilePath) -> str:
    """Text of a recipe file.

    Raises:
        RecipeError: there is no such file, or it is no text.
    """
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        found = getattr(error, "strerror", None) or "no text"
        raise RecipeError(str(path), found=found, expected="a recipe file", mend="see workflows/recipes") from error


def to_json(section: object) -> str:
    """A section, config or recipe as JSON text; the same value always gives the same text."""
    return json.dumps(_plain(section), sort_keys=True)


def from_json(text: str, kind: type[Section]) -> Section:
    """Read what `to_json` wrote.

    Raises:
        RecipeError: no JSON, or not exactly a `kind` (also an integer that came back as 4.0).
    """
    try:
        values = json.loads(text)
    except ValueError as error:
        raise RecipeError(kind.__name__, found=f"no JSON ({error})", expected="a section as JSON text") from error
    return _validated(values, kind, lambda path: ".".join([kind.__name__, *map(str, path)]))


def flatten(section: object) -> dict[str, Any]:
    """Dotted path -> scalar, for every leaf; empty containers are leaves."""
    return {_dotted(path): value for path, value in _leaves(json.loads(json.dumps(_plain(section))), ())}


@functools.cache
def _adapter(kind: Hashable) -> TypeAdapter[Any]:
    # Inside a dict, because pydantic takes no config for a dataclass itself; stdlib dataclasses inherit it.
    config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    return TypeAdapter(dict[str, kind], config=config)  # type: ignore[valid-type]


def _validated(values: Any, kind: type[Section], place: Any) -> Section:
    try:
        # JSON mode: lists are accepted for tuples, while numbers, strings and booleans are never converted.
        return typing.cast(
            Section, _adapter(typing.cast(Any, kind)).validate_json(json.dumps({"": values}, default=str))[""]
        )
    except ValidationError as error:
        raise _as_recipe_error(error, values, kind, place) from error


def _as_recipe_error(error: ValidationError, values: Any, kind: type[Any], place: Any) -> RecipeError:
    """The first complaint; unknown keys go before the missing ones that they often cause."""
    first = min(error.errors(), key=lambda item: item["type"] != "unexpected_keyword_argument")
    path: Path = tuple(first["loc"][1:])
    dotted = _dotted(path)
    if first["type"] == "unexpected_keyword_argument":
        known = _known_keys(kind, path[:-1])
        near = difflib.get_close_matches(str(path[-1]), known, n=1, cutoff=0.5)
        return RecipeError(
            place(path),
            found=f"unknown key '{dotted}'",
            expected=f"one of {', '.join(known)}",
            mend=f"did you mean '{near[0]}'?" if near else "delete it",
        )
    if first["type"] == "missing":
        return RecipeError(place(path[:-1]), found=f"no key '{dotted}'", mend=f"add '{path[-1]}'")
    if first["type"] == "value_error":
        return RecipeError(place(path), found=f"{dotted}: {first['ctx']['error']}")
    shown = json.dumps(first["input"], default=str)
    return RecipeError(
        place(path),
        found=f"{dotted or kind.__name__} is {shown if len(shown) < 80 else type(first['input']).__name__}",
        expected=first["msg"].removeprefix("Input should be "),
    )


def _known_keys(kind: Any, path: Path) -> list[str]:
    """Names of the fields of the dataclass that stands at `path`."""
    for key in path:
        kind = _without_none(kind)
        arguments = typing.get_args(kind)
        if dataclasses.is_dataclass(kind):
            kind = typing.get_type_hints(kind)[str(key)]
        elif arguments:
            kind = arguments[0] if typing.get_origin(kind) is tuple else arguments[-1]
    kind = _without_none(kind)
    return [f.name for f in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []


def _without_none(kind: Any) -> Any:
    if type(None) in typing.get_args(kind):
        return next(argument for argument in typing.get_args(kind) if argument is not type(None))
    return kind


def _parse_override(override: str) -> tuple[Path, Any]:
    name, equals, value = override.partition("=")
    if not equals or not all(name.split(".")):
        raise RecipeError(f"{_OVERRIDE} {override}", found=repr(override), expected="path.to.key=value")
    path = tuple(int(key) if key.isdecimal() else key for key in name.strip().split("."))
    return path, parse_yaml(value, f"{_OVERRIDE} {name}").root


def _apply_profile(values: dict[str, Any], profile: Any, tree: YamlTree, where: str) -> None:
    """Check that the tree holds the described values; put the published code's in their place when it is chosen."""
    alternatives = values.get("alternatives") or {}
    for name, alternative in alternatives.items() if isinstance(alternatives, dict) else ():
        if not isinstance(alternative, dict) or not {"described", "released_code"} <= alternative.keys():
            return  # the validation says it better
        path = tuple(int(key) if key.isdecimal() else key for key in name.split("."))
        place = f"{where}:{tree.line(('alternatives', name))}"
        found = _get(values, path, place)
        if found != alternative["described"]:
            raise RecipeError(
                place,
                found=f"alternatives say that {name} is described as {json.dumps(alternative['described'])}, "
                f"but line {tree.line(path)} has {json.dumps(found)}",
                expected="the same value in both places",
                mend=f"use `--set {name}=...` to deviate, or delete this alternative from your copy",
            )
        if profile == "released_code":
            _put(values, path, alternative["released_code"], place)


def _get(values: Any, path: Path, place: str) -> Any:
    for key in path:
        try:
            values = values[key]
        except (KeyError, IndexError, TypeError) as error:
            raise RecipeError(place, found=f"no key '{_dotted(path)}' in the recipe", mend="mend the path") from error
    return values


def _put(values: Any, path: Path, value: Any, place: str) -> None:
    """Set `path` in the tree of dicts and lists; missing dicts on the way are made (their keys are checked later)."""
    for position, key in enumerate(path[:-1]):
        if isinstance(values, dict) and values.get(key) is None:
            values[key] = {}
        values = _get(values, (key,), place) if isinstance(values, dict | list) else None
        if not isinstance(values, dict | list):
            raise RecipeError(place, found=f"'{_dotted(path[: position + 1])}' is a single value, it has no keys")
    if isinstance(values, list) and not (isinstance(path[-1], int) and path[-1] < len(values)):
        raise RecipeError(place, found=f"index {path[-1]}", expected=f"a number below {len(values)}")
    values[path[-1]] = value


def _place(lines: dict[Path, str], where: str, path: Path) -> str:
    """Where the value at `path` was written: the file's line or the override; the nearest known part of the path."""
    while path and path not in lines:
        path = path[:-1]
    return lines.get(path, where)


def _plain(section: object) -> dict[str, Any]:
    return dataclasses.asdict(typing.cast(Any, section))


def _leaves(value: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    items: list[tuple[str | int, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    if not items:
        yield path, value
    for key, item in items:
        yield from _leaves(item, (*path, key))


def _dotted(path: Path) -> str:
    return ".".join(map(str, path))
