"""Fields of JSON files by dotted name: what is missing, or of another kind, is an error that names file and field."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from molmo2core.errors import CheckpointError

Value = TypeVar("Value", int, float, str, bool)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a checkpoint folder.

    Raises:
        CheckpointError: no such file, or no JSON object.
    """
    if not path.is_file():
        raise CheckpointError(str(path), found="no such file", mend="check the folder of the checkpoint")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(str(path), found=f"no JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(str(path), found=type(content).__name__, expected="a JSON object")
    return content


class Fields:
    """One JSON object.

    Args:
        tree: the object.
        where: its file, for messages.
    """

    def __init__(self, tree: Mapping[str, Any], where: str) -> None:
        self.tree, self.where = tree, where

    def get(self, dotted: str) -> Any:
        """The value of a field.

        Raises:
            CheckpointError: there is no such field.
        """
        node: Any = self.tree
        for name in dotted.split("."):
            if not isinstance(node, Mapping) or name not in node:
                raise CheckpointError(
                    self.where,
                    found=f"no field {dotted}",
                    expected="every field of the schema",
                    mend="a default would silently be another model; take the value from where the weights come from",
                )
            node = node[name]
        return node

    def value(self, dotted: str, kind: type[Value]) -> Value:
        """A number, text or flag.

        Raises:
            CheckpointError: no such field, or it is of another kind.
        """
        return self._checked(dotted, self.get(dotted), kind)

    def values(self, dotted: str, kind: type[Value], length: int | None = None) -> tuple[Value, ...]:
        """A list of numbers, texts or flags; of one `length` if given.

        Raises:
            CheckpointError: no such field, or it is of another kind.
        """
        found = self.get(dotted)
        if not isinstance(found, list | tuple) or (length is not None and len(found) != length):
            raise self.wrong(dotted, f"a list of {'' if length is None else length} {kind.__name__} values")
        return tuple(self._checked(dotted, value, kind) for value in found)

    def section(self, dotted: str) -> Fields:
        """The object in a field.

        Raises:
            CheckpointError: no such field, or no object.
        """
        found = self.get(dotted)
        if not isinstance(found, Mapping):
            raise self.wrong(dotted, "an object")
        return Fields(found, f"{self.where}: {dotted}")

    def expect(self, dotted: str, value: object) -> None:
        """Refuse a field that differs from `value`.

        Raises:
            CheckpointError: no such field, or it differs.
        """
        if self.get(dotted) != value:
            raise self.wrong(dotted, f"{value!r}: another model is not supported")

    def wrong(self, dotted: str, expected: str) -> CheckpointError:
        """The error that a field is not what is expected."""
        return CheckpointError(f"{self.where}: {dotted}", found=repr(self.get(dotted)), expected=expected)

    def _checked(self, dotted: str, found: object, kind: type[Value]) -> Value:
        if kind is float and type(found) is int:
            found = float(found)
        if type(found) is not kind:
            raise self.wrong(dotted, f"{kind.__name__} values" if isinstance(found, list) else kind.__name__)
        return found
