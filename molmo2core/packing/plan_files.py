"""A plan as files: raw arrays that every loader worker maps into memory, numbers and a picture for people.

Folder: `entries.npy` (12 bytes an entry), `pack_offsets.npy` (8 bytes a pack), `plan.json` (budgets, statistics),
`left_out.jsonl` (one line for each branch that fits in no sequence), `fill.html`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from molmo2core.errors import DataError
from molmo2core.packing.config import PackingConfig
from molmo2core.packing.page import fill_page
from molmo2core.packing.plan import ENTRY, PackPlan, PlannedPacks
from molmo2core.packing.statistics import PlanTally


def write_plan(pieces: Iterable[PlannedPacks], proportions: Mapping[str, float], folder: Path) -> dict[str, Any]:
    """Write the folder, holding one piece at a time; return its statistics, as in `plan.json`.

    Args:
        pieces: of `plan_windows`, at least one.
        proportions: wanted share of draws of each dataset.
        folder: exists.
    """
    tally = PlanTally()
    num_entries = 0
    with (
        _growing(folder / "entries.npy", ENTRY) as add_entries,
        _growing(folder / "pack_offsets.npy", np.dtype("<i8")) as add_offsets,
    ):
        add_offsets(np.zeros(1, np.int64))
        for piece in pieces:
            add_entries(piece.plan.entries)
            add_offsets(num_entries + piece.plan.pack_offsets[1:])
            num_entries += len(piece.plan.entries)
            tally.add(piece)
    statistics = tally.statistics(proportions)
    content = {"packing": dataclasses.asdict(piece.plan.packing), "statistics": statistics}
    (folder / "plan.json").write_text(json.dumps(content, indent=1, sort_keys=True))
    lines = (json.dumps(dataclasses.asdict(item)) + "\n" for item in piece.left_out)
    (folder / "left_out.jsonl").write_text("".join(lines))
    (folder / "fill.html").write_text(fill_page(tally.counts, statistics, piece.plan.packing))
    return statistics


@contextmanager
def _growing(path: Path, dtype: np.dtype[Any]) -> Iterator[Callable[[npt.NDArray[Any]], None]]:
    """A function that appends arrays to the .npy file `path`.

    Bytes, not `tofile`, because numpy does not say why a disk takes no more.
    """
    rows = 0
    with path.open("wb") as file:

        def append(array: npt.NDArray[Any]) -> None:
            nonlocal rows
            file.write(array.astype(dtype, copy=False).tobytes())
            rows += len(array)

        _write_header(file, dtype, 0)
        yield append
        file.seek(0)
        _write_header(file, dtype, rows)


def _write_header(file: IO[bytes], dtype: np.dtype[Any], rows: int) -> None:
    """numpy leaves room for any number of rows: headers of one dtype are equally long."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (rows,)}  # type: ignore[no-untyped-call]
    np.lib.format.write_array_header_1_0(file, header)  # type: ignore[no-untyped-call]


def read_plan(folder: Path) -> PackPlan:
    """Map a plan's arrays into memory.

    Raises:
        DataError: a file is missing or does not belong to the others.
    """
    try:
        entries = np.load(folder / "entries.npy", mmap_mode="r", allow_pickle=False)
        pack_offsets = np.load(folder / "pack_offsets.npy", mmap_mode="r", allow_pickle=False)
        packing = PackingConfig(**json.loads((folder / "plan.json").read_text())["packing"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(str(folder), found=f"no pack plan ({error})", mend="plan again") from error
    if entries.dtype != ENTRY or pack_offsets[-1] != len(entries):
        raise DataError(str(folder), found=f"{entries.dtype}, {pack_offsets[-1]} entries of {len(entries)}")
    return PackPlan(entries=entries, pack_offsets=pack_offsets, packing=packing)
