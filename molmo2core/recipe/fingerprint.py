"""One name for everything that a run's result depends on."""

from __future__ import annotations

import hashlib
import json

from molmo2core.recipe.load import to_json
from molmo2core.recipe.schema import Recipe

_WITHOUT_INFLUENCE = (
    "name", "description", "workspace", "register", "resources", "alternatives", "not_reproduced", "profile",
)  # fmt: skip
"""Sections that change where a run happens or how it is explained, never what it computes."""


def recipe_fingerprint(recipe: Recipe) -> str:
    """16 hex digits: equal for two recipes if and only if they ask for the same computation."""
    values = json.loads(to_json(recipe))
    kept = {key: value for key, value in values.items() if key not in _WITHOUT_INFLUENCE}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]
