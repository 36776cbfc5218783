"""Where what is trained on departs from the plan, and when there is too much of it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from molmo2core import storage
from molmo2core.errors import DataError
from molmo2core.examples import Deviation

DEVIATIONS = "deviations.jsonl"
"""File beside a training's metrics: a line with the step and the fields of each Deviation."""
CHANGED_DATA = "changed data"
"""`kind` of the line that a resume on accepted other data leaves there, with its `changes` in words."""
MAX_BROKEN_FRACTION = 0.01
"""More examples than this share of all that were drawn may not be replaced, on all ranks and since step 0."""
MIN_BROKEN = 10
"""So many different broken media are always borne."""


@dataclass
class DeviationRecord:
    """All deviations of a run so far.  Ranks that add the same ones agree on everything."""

    num_drawn: int = 0
    """Examples of all steps."""
    num_replaced: int = 0
    broken: set[tuple[str, str]] = field(default_factory=set)
    """Different media, (dataset, uid)."""

    def add(self, deviations: Iterable[Deviation], num_drawn: int) -> None:
        """Count one step."""
        self.num_drawn += num_drawn
        for deviation in deviations:
            if deviation.kind == "replaced":
                self.num_replaced += 1
                self.broken.add((deviation.dataset, deviation.uid))

    def check(self, where: str) -> None:
        """Raise if too many media are broken.

        Raises:
            DataError: more than MIN_BROKEN, and more than MAX_BROKEN_FRACTION of what was drawn.
        """
        if len(self.broken) <= MIN_BROKEN or self.num_replaced <= MAX_BROKEN_FRACTION * self.num_drawn:
            return
        some = ", ".join("/".join(medium) for medium in sorted(self.broken)[:5])
        raise DataError(
            where,
            found=f"{self.num_replaced} of {self.num_drawn} examples had to be replaced; {len(self.broken)} media do "
            f"not decode, among them {some}",
            expected=f"at most {MAX_BROKEN_FRACTION:.0%} of the examples, or {MIN_BROKEN} media",
            mend=f"see {DEVIATIONS} beside the checkpoints for the reasons; validate the manifests again",
        )


def deviation_lines(path: Path) -> list[dict[str, Any]]:
    """Lines of a deviations file; one that a killed run left unfinished is left out."""
    lines = []
    for text in path.read_text().splitlines() if path.is_file() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def keep_lines_up_to(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop the lines of later steps, which will be done again; return the others."""
    kept = [line for line in deviation_lines(path) if line["step"] <= step]
    if path.is_file():
        storage.write_bytes(str(path), "".join(json.dumps(line) + "\n" for line in kept).encode())
    return kept


def append_lines(path: Path, step: int, deviations: Sequence[Deviation]) -> None:
    """One line per deviation."""
    lines = [json.dumps({"step": step} | dataclasses.asdict(deviation)) + "\n" for deviation in deviations]
    storage.append_text(path, "".join(lines))
