"""Streams and rates of one training stage, and the proportions that they resolve to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from molmo2core.errors import DataError, RecipeError


@dataclass(frozen=True, kw_only=True)
class MixtureGroup:
    """Datasets that share one rate; within the group each is drawn in proportion to the root of its size."""

    rate: float
    """Share of all draws, relative to the other groups' rates."""
    datasets: tuple[str, ...]


def resolve_proportions(mixture: Mapping[str, MixtureGroup], sizes: Mapping[str, int]) -> dict[str, float]:
    """Share of all draws of each dataset in `sizes`; they sum to 1 (data.md 7.1).

    Rates are normalised over the groups; a dataset in two groups gets the sum of both shares; a dataset in no group,
    or in a group of rate 0, gets 0.

    Args:
        mixture: group name -> group.
        sizes: dataset -> number of samples that can be drawn.

    Raises:
        RecipeError: a rate is negative or not finite, or no rate is positive.
        DataError: a group with a positive rate names a dataset that is missing or empty.
    """
    for name, group in mixture.items():
        if not math.isfinite(group.rate) or group.rate < 0:
            raise RecipeError(f"mixture.{name}.rate", found=str(group.rate), expected="a number >= 0")
        missing = [dataset for dataset in group.datasets if not sizes.get(dataset)]
        if group.rate > 0 and (missing or not group.datasets):
            raise DataError(
                f"mixture.{name}",
                found=f"no training samples of {', '.join(missing) or 'any dataset'}",
                expected=f"datasets among {', '.join(sorted(name for name in sizes if sizes[name]))}",
                mend="build the shards of these datasets, or set the group's rate to 0",
            )
    total = sum(group.rate for group in mixture.values())
    if total <= 0:
        raise RecipeError("mixture", found="no group with a positive rate", expected="at least one")
    proportions = dict.fromkeys(sizes, 0.0)
    for group in mixture.values():
        if group.rate > 0:
            roots = {dataset: math.sqrt(sizes[dataset]) for dataset in group.datasets}
            for dataset, root in roots.items():
                proportions[dataset] += group.rate / total * root / sum(roots.values())
    return proportions
