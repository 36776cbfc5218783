"""Step 3: shards of all datasets -> the packs of one training stage, in order."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from molmo2core import storage
from molmo2core.errors import DataError, exit_with_message
from molmo2core.packing.entries import DatasetLengths
from molmo2core.packing.plan import PLANNER, plan_windows
from molmo2core.packing.plan_files import write_plan
from molmo2core.preprocessing.config import STYLES
from molmo2core.preprocessing.lengths import root_bound
from molmo2core.recipe.load import from_json
from molmo2core.recipe.sections import PlanSection
from molmo2core.references import PackPlanRef, ShardsRef, read_reference, write_reference
from molmo2core.shards.lengths import LengthsTable, SampleLengths, build_table, read_table
from molmo2core.shards.mixture import resolve_proportions
from molmo2core.stages.report import StageReport


def run(section: PlanSection, *, shards: Sequence[Path], output: Path) -> StageReport:
    """Plan the packs of `section.stage`, or find them planned, and write their PackPlanRef to `output`.

    The plan's sample ids count through the training splits of all `shards`, sorted by dataset: the reference's
    parents, in order.

    Raises:
        DataError: a dataset of the mixture has no training samples, two references name one dataset, shards were
            built with different tokenizers, or too many samples fit in no sequence.
        RecipeError: the mixture has no positive rate.
        PlatformError: the disk is full or the object store failed; nothing is visible then.
    """
    started = time.monotonic()
    parents = sorted((read_reference(path, ShardsRef) for path in shards), key=lambda ref: ref.dataset)
    _check_together(parents)
    described = dataclasses.asdict(section)
    del described["workspace"]  # the same content in another place is the same plan
    key = storage.content_key("plan_packs", PLANNER, described, [(ref.dataset, ref.digest) for ref in parents])
    uri = storage.join(section.workspace, "plans", section.stage, key)
    reused = storage.is_committed(uri)
    sizes = {ref.dataset: ref.num_samples.get("train", 0) for ref in parents}
    proportions = resolve_proportions(section.mixture, sizes)

    def fill(folder: Path) -> dict[str, Any]:
        datasets = [dataset_lengths(ref, proportions[ref.dataset], section) for ref in parents]
        windows = plan_windows(datasets, packing=section.packing, num_packs=section.num_packs, seed=section.seed)
        return {"statistics": write_plan(windows, proportions, folder)}

    folder = storage.commit_folder(uri, fill)
    statistics = folder.meta["statistics"]
    lines = _lines(section, statistics)
    seconds = time.monotonic() - started
    report = StageReport(
        stage=f"plan_packs.{section.stage}",
        seconds=seconds,
        reused=reused,
        metrics=_metrics(statistics),
        lines=lines,
    )
    write_reference(
        PackPlanRef(
            uri=folder.uri,
            digest=folder.digest,
            stage=section.stage,
            num_packs=section.num_packs,
            facts=statistics,
            report=report.to_json(),
            parents=tuple(parents),
        ),
        output,
    )
    print("\n".join(lines))
    print(f"{report.stage}: {'reused' if reused else 'made'} {folder.uri} in {seconds:.1f} s", flush=True)
    return report


def dataset_lengths(ref: ShardsRef, proportion: float, section: PlanSection) -> DatasetLengths:
    """Bounds of a dataset's training samples under the limits of `section`."""
    table = _train_table(ref)
    bound = functools.cache(
        lambda row: root_bound(
            row.kind,
            row.sizes,
            row.duration_seconds,
            row.subtitle_tokens,
            section.geometry,
            section.preprocessing,
            high_res=ref.dataset in section.preprocessing.high_res.datasets,
            fps=row.fps,
            grid_fps=row.grid_fps,
        )
    )
    # uid and branches blanked, so that samples with equal media share one computation
    rows = (dataclasses.replace(table.row(index), uid="", branch_tokens=()) for index in range(len(table)))
    roots = np.array([bound(row) for row in rows], np.int64).reshape(-1, 2)
    return DatasetLengths(
        dataset=ref.dataset,
        proportion=proportion,
        root_tokens=roots[:, 0],
        crops=roots[:, 1],
        branch_tokens=table.branch_tokens[:, STYLES.index(section.preprocessing.style)].astype(np.int64),
        branch_offsets=table.branch_offsets,
        shard_samples=table.shard_samples,
        uids=table.uids,
    )


def _train_table(ref: ShardsRef) -> LengthsTable:
    folder = storage.open_committed(ref.uri)
    if folder.digest != ref.digest:
        raise DataError(ref.uri, found=f"digest {folder.digest}", expected=ref.digest, mend="build the shards again")
    if not ref.num_samples.get("train"):
        no_rows: list[SampleLengths] = []
        return build_table(no_rows, [])
    return read_table(folder, "train")


def _check_together(parents: Sequence[ShardsRef]) -> None:
    names = [ref.dataset for ref in parents]
    if len(set(names)) != len(names):
        raise DataError("shards", found=f"datasets {', '.join(names)}", expected="each dataset once")
    tokenizers = {ref.tokenizer_digest for ref in parents}
    if len(tokenizers) > 1:
        raise DataError(
            "shards",
            found=f"lengths measured with {len(tokenizers)} different tokenizers",
            expected="one tokenizer",
            mend="build the shards again with the recipe's tokenizer",
        )


def _metrics(statistics: dict[str, Any]) -> dict[str, float]:
    """Scalars: totals and means, then `tokens_per_pack_p5` and so on."""
    totals = {name: float(value) for name, value in statistics.items() if isinstance(value, int | float)}
    return totals | {
        f"{quantity}_per_pack_{name}": float(value)
        for quantity, values in statistics["per_pack"].items()
        for name, value in values.items()
        if name != "mean"
    }


def _lines(section: PlanSection, statistics: dict[str, Any]) -> tuple[str, ...]:
    draws = ", ".join(
        f"{name} {facts['share']:.1%} ({facts['draws']} draws, {facts['epochs']:.2f} epochs)"
        for name, facts in statistics["draws"].items()
        if facts["draws"]
    )
    lines = [
        f"{section.stage}: {statistics['packs']} packs of {section.packing.sequence_tokens} tokens and "
        f"{section.packing.crop_budget} crops, {statistics['examples_per_pack']:.2f} examples and "
        f"{statistics['branches_per_pack']:.1f} branches each, {statistics['token_fill']:.1%} of tokens and "
        f"{statistics['crop_fill']:.1%} of crops used, {statistics['bound_reached']:.1%} of the bound",
        f"{section.stage}: {draws}",
    ]
    if statistics["num_left_out"]:
        lines.append(
            f"{section.stage}: {statistics['num_left_out']} branches fit in no sequence (left_out.jsonl names them)"
        )
    return tuple(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m molmo2core.stages.plan --section S --shards REF [--shards REF ...] --output REF`."""
    parser = argparse.ArgumentParser(prog="python -m molmo2core.stages.plan", description=__doc__)
    parser.add_argument("--section", type=Path, required=True, help="JSON file of a PlanSection")
    parser.add_argument("--shards", type=Path, action="append", required=True, help="JSON file of a ShardsRef")
    parser.add_argument("--output", type=Path, required=True, help="where the PackPlanRef is written")
    options = parser.parse_args(arguments)
    try:
        section = from_json(storage.read_bytes(str(options.section)).decode(), PlanSection)
        run(section, shards=options.shards, output=options.output)
    except Exception as error:
        return exit_with_message(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
