"""What batches are made from, in words and numbers small enough for a checkpoint.

A plan's digest alone would not do: pixels, wordings and loss weights can change while all lengths, and so the plan,
stay the same.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from molmo2core.packing.config import PackingConfig
from molmo2core.preprocessing.preprocessor import Preprocessor
from molmo2core.references import PackPlanRef, ShardsRef

DIGEST_DIGITS = 16
_SHOWN = 12
"""Changes that a message lists; a changed mixture changes the share of every dataset."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """One value that differs between a checkpoint's data and ours; None: not there."""

    name: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.name} {json.dumps(self.before)} -> {json.dumps(self.now)}"


def describe_data(
    plan: PackPlanRef, packing: PackingConfig, preprocessor: Preprocessor, global_batch_packs: int
) -> dict[str, Any]:
    """Everything that batches follow from, as a flat dict of JSON values.

    Keys: `plan` and `plan.packs`; `shards.<dataset>` and `tokenizer` (digests); `mixture.<dataset>` (wanted shares);
    `packing.*`, `preprocessing.*`, `geometry.*`, `weighting`, `seed`, `global_batch_packs`.
    """
    shards = [parent for parent in plan.parents if isinstance(parent, ShardsRef)]
    draws = plan.facts.get("draws", {})
    described: dict[str, Any] = {
        "plan": plan.digest[:DIGEST_DIGITS],
        "plan.packs": plan.num_packs,
        "global_batch_packs": global_batch_packs,
        "seed": preprocessor.seed,
        "weighting": preprocessor.weighting,
        "tokenizer": ",".join(sorted({ref.tokenizer_digest[:DIGEST_DIGITS] for ref in shards})),
    }
    described |= {f"shards.{ref.dataset}": ref.digest[:DIGEST_DIGITS] for ref in shards}
    described |= {
        f"mixture.{ref.dataset}": round(draws[ref.dataset]["wanted"], 6) for ref in shards if ref.dataset in draws
    }
    for prefix, config in (
        ("packing", packing),
        ("preprocessing", preprocessor.config),
        ("geometry", preprocessor.geometry),
    ):
        described |= _flat(prefix, dataclasses.asdict(config))
    return described


def encode(described: Mapping[str, Any]) -> str:
    """As one string: a sharded checkpoint silently drops keys that come and go."""
    return json.dumps(described, sort_keys=True)


def changes_between(before: str, now: str) -> tuple[Change, ...]:
    """What differs between two encoded descriptions, by name; an unreadable `before` differs in everything."""
    try:
        old = json.loads(before)
    except ValueError:
        old = {}
    new = json.loads(now)
    names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    return tuple(Change(name=name, before=old.get(name), now=new.get(name)) for name in names)


def summary(changes: Sequence[Change]) -> str:
    """The first changes in one line, those that people made before those that follow from them."""
    ordered = sorted(changes, key=lambda change: change.name in ("plan", "plan.packs"))
    more = f" and {len(changes) - _SHOWN} more" if len(changes) > _SHOWN else ""
    return ", ".join(map(str, ordered[:_SHOWN])) + more


def _flat(prefix: str, value: Any) -> dict[str, Any]:
    """Dotted names of all leaves; lists are leaves."""
    if isinstance(value, dict):
        return {name: leaf for key, item in value.items() for name, leaf in _flat(f"{prefix}.{key}", item).items()}
    return {prefix: list(value) if isinstance(value, tuple) else value}
