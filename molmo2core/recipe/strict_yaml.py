"""YAML as recipes use it: the core schema of YAML 1.2, every key once, and the line of every key kept."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml

from molmo2core.errors import RecipeError

Path = tuple[str | int, ...]
"""Keys and list indices from the root to a value."""


@dataclass(frozen=True)
class YamlTree:
    """A parsed document."""

    root: Any
    lines: dict[Path, int]
    """1-based line of each key and list element."""

    def line(self, path: Path) -> int:
        """Line of `path`, or of the nearest part of it that is written in the file (merged keys are not)."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)


class _Loader(yaml.SafeLoader):
    """Resolves scalars as YAML 1.2 does: `1e-4` is a number; `on`, `12:30` and dates are strings."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (as PyYAML has it)


for _tag, _pattern, _first in (
    ("bool", r"true|false", "tf"),
    ("int", r"[-+]?[0-9]+(?:_[0-9]+)*", "-+0123456789"),
    ("float", r"[-+]?(?:[0-9][0-9_]*\.[0-9]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)",
     "-+.0123456789"),
    ("null", r"null|~|", "n~"),
    ("merge", r"<<", "<"),
):  # fmt: skip
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("^$"), [""])


def parse_yaml(text: str, where: str) -> YamlTree:
    """Parse one document.

    Raises:
        RecipeError: no YAML, a key twice, a key that is no string, an anchor inside itself; names file and line.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        lines: dict[Path, int] = {}
        if node is None:
            return YamlTree(None, lines)
        _walk(node, (), (), lines, where)
        return YamlTree(loader.construct_document(node), lines)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        found = " ".join(filter(None, (error.context, error.problem)))
        raise RecipeError(f"{where}:{line}", found=found, expected="YAML") from error
    except yaml.YAMLError as error:
        raise RecipeError(where, found=str(error), expected="YAML") from error
    finally:
        loader.dispose()


def _walk(node: yaml.Node, path: Path, parents: tuple[yaml.Node, ...], lines: dict[Path, int], where: str) -> None:
    """Record lines and refuse what must not be, before any value is built."""
    if node in parents:
        raise RecipeError(f"{where}:{node.start_mark.line + 1}", found="an anchor that contains itself")
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[*path, index] = item.start_mark.line + 1
            _walk(item, (*path, index), (*parents, node), lines, where)
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.tag == "tag:yaml.org,2002:merge":
                _walk(value, path, (*parents, node), {}, where)
                continue
            if key.tag != "tag:yaml.org,2002:str":
                raise RecipeError(f"{where}:{line}", found=f"key {key.value!r}", expected="a string as key")
            if key.value in seen:
                raise RecipeError(
                    f"{where}:{line}",
                    found=f"key '{key.value}' again (first in line {seen[key.value]})",
                    expected="each key once",
                    mend="delete one of the two",
                )
            seen[key.value] = lines[*path, key.value] = line
            _walk(value, (*path, key.value), (*parents, node), lines, where)
