"""What overrides changed."""

from __future__ import annotations

import json

from molmo2core.recipe.load import flatten
from molmo2core.recipe.schema import Recipe

_ABSENT = object()


def difference_lines(old: Recipe, new: Recipe) -> list[str]:
    """`key: old -> new` for every value that differs, in the recipe's order."""
    before, after = flatten(old), flatten(new)
    return [
        f"{key}: {_shown(before.get(key, _ABSENT))} -> {_shown(after.get(key, _ABSENT))}"
        for key in before | after
        if before.get(key, _ABSENT) != after.get(key, _ABSENT)
    ]


def _shown(value: object) -> str:
    return "(not set)" if value is _ABSENT else json.dumps(value)
