"""Step 4: a pack plan and a base checkpoint become trained weights.

    hand on the checkpoint of the stage before, if there are no steps, or
    reuse a committed checkpoint of the same content, or
    start the ranks (train_rank) -> follow their metrics into MLflow -> commit the weights -> delete the resume folder

While it trains, everything to go on from lies beside the destination, in `<key>.resume`; killed at any moment and
run again, training goes on from the last whole checkpoint to bit-identical weights.  For an `s3://` workspace that
folder lies in this machine's cache, and each checkpoint is copied to the store, from where another machine goes on.

Another recipe has another key and starts at step 0.  `resume_from` goes on from another key's unfinished training
instead; if data, mixture or limits differ from that one's, only with `accept_changed_data`, which is recorded.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import time
from pathlib import Path
from statistics import mean
from typing import Any

from molmo2core import storage
from molmo2core.errors import DataError, RecipeError, exit_with_message
from molmo2core.launch.torchrun import run_torchrun
from molmo2core.loading.deviations import CHANGED_DATA, DEVIATIONS
from molmo2core.parallel.ranks import check_ranks
from molmo2core.recipe.load import from_json, to_json
from molmo2core.recipe.sections import TrainSection
from molmo2core.references import CheckpointRef, PackPlanRef, Reference, ShardsRef, read_reference, write_reference
from molmo2core.stages.report import StageReport
from molmo2core.stages.train_progress import section_of_ranks, step_bar
from molmo2core.stages.train_rank import METRICS, WEIGHTS
from molmo2core.stages.train_resume import exclusive, remove_all_but_lasting, resume_place, taken_up
from molmo2core.stages.train_tracking import following
from molmo2core.stages.train_upload import UPLOADS, uploading
from molmo2core.training.checkpoint_folders import SAVES, CheckpointPlace
from molmo2core.training.page import PAGE, training_page
from molmo2core.training.validation_files import ANSWERS, PAGES, VALIDATION

FORMAT = 5
"""Version of what training computes: part of the key."""
_NOT_THE_RESULT = ("workspace", "run_name", "recipe_fingerprint", "tracking")
_NOT_THE_TRAINED_RESULT = (
    "checkpoints_kept",
    "keep_every_steps",
    "failed_saves_allowed",
    "save_interval_steps",
    "loader_workers",
    "log_interval_steps",
    "verify_shared_packs",
    "validation",
    "activation_checkpointing",
    "spike_guard",
    "peak_teraflops",
)
_TIMES = ("seconds", "time_ms", "waits", "speed", "memory")
"""Fields of metrics that are not the same in another run of the same training."""
_EDGE_STEPS = 10
"""First and last loss are means over so many steps: a single step's depends on its packs."""


def run(section: TrainSection, *, plan: Path, base: Path | None, output: Path) -> StageReport:
    """Train, or reuse what was trained from the same inputs.

    A stage of no steps leaves a reference to its base itself: nothing is copied, and the lineage names what trained it.
    Without a base it leaves the initial weights.

    Args:
        plan: PackPlanRef of this stage.
        base: CheckpointRef of the stage before; None starts from `section.initial_weights`.
        output: where the CheckpointRef is written.

    Raises:
        RecipeError: ranks, batch and heads do not divide, or loss or gradients are not finite.
        DataError: the plan is another stage's or too short, inputs are missing, too many media are broken, or there
            is nothing to resume from or it had other data.
        PlatformError: a rank died, or was asked to stop; run again to continue.
    """
    started = time.monotonic()
    plan_ref = read_reference(plan, PackPlanRef)
    base_ref = read_reference(base, CheckpointRef) if base is not None else None
    _check(section, plan_ref, str(plan))
    if base_ref is not None and not section.training.steps:
        return _hand_on(section, base_ref, output)
    key = checkpoint_key(section, plan_ref, base_ref)
    uri = storage.join(section.workspace, "checkpoints", section.stage, key)
    reused = storage.is_committed(uri)
    if not reused:
        place = resume_place(uri)
        with exclusive(place.folder):
            _train(section, plan_ref, base_ref, key=key, uri=uri, place=place)
    found = storage.open_committed(uri)
    seconds = time.monotonic() - started
    numbers = {name: float(value) for name, value in found.meta["facts"].items()}
    report = StageReport(stage=f"train.{section.stage}", seconds=seconds, reused=reused, metrics=numbers)
    reference = CheckpointRef(
        uri=found.uri,
        digest=found.digest,
        facts=found.meta["facts"],
        report=report.to_json(),
        parents=(plan_ref,) if base_ref is None else (plan_ref, base_ref),
        stage=section.stage,
        step=section.training.steps,
        recipe_fingerprint=section.recipe_fingerprint,
    )
    write_reference(reference, output)
    print(f"{report.stage}: {'reused' if reused else 'made'} {found.uri} in {seconds:.1f} s", flush=True)
    return report


def _hand_on(section: TrainSection, base: CheckpointRef, output: Path) -> StageReport:
    storage.open_committed(base.uri)
    report = StageReport(stage=f"train.{section.stage}", seconds=0.0, reused=True, metrics={"steps": 0.0})
    write_reference(dataclasses.replace(base, report=report.to_json()), output)
    print(f"{report.stage}: no steps: hands on {base.uri} of {base.stage}", flush=True)
    return report


def checkpoint_key(section: TrainSection, plan: PackPlanRef, base: CheckpointRef | None) -> str:
    """Names the checkpoint by everything that its weights depend on.

    The number of ranks is part of it, because sums over ranks round differently; names, tracking and how often
    something is saved or logged are not.
    """
    settings = dataclasses.asdict(section)
    for name in _NOT_THE_RESULT:
        del settings[name]
    for name in _NOT_THE_TRAINED_RESULT:
        del settings["training"][name]
    if base is not None:
        del settings["initial_weights"]
    tokenizers = sorted({parent.tokenizer_digest for parent in plan.parents if isinstance(parent, ShardsRef)})
    shards = [parent.digest for parent in plan.parents]
    return storage.content_key(
        "train", FORMAT, settings, plan.digest, shards, tokenizers, base.digest if base is not None else ""
    )


def _check(section: TrainSection, plan: PackPlanRef, where: str) -> None:
    config = section.training
    if plan.stage != section.stage:
        raise DataError(where, found=f"a plan of stage {plan.stage}", expected=section.stage)
    wanted = config.steps * config.global_batch_packs
    if plan.num_packs < wanted:
        raise DataError(
            where, found=f"{plan.num_packs} packs", expected=f"{wanted} (steps x global batch)", mend="plan it again"
        )
    if config.num_nodes != 1:
        raise RecipeError(
            "training.num_nodes", found=str(config.num_nodes), expected="1: several nodes are not launched yet"
        )
    check_ranks(
        config.world_size,
        config.context_parallel,
        config.global_batch_packs,
        section.model.decoder,
        ranks_per_node=config.num_processes,
    )


def _train(
    section: TrainSection,
    plan: PackPlanRef,
    base: CheckpointRef | None,
    *,
    key: str,
    uri: str,
    place: CheckpointPlace,
) -> None:
    if storage.is_committed(uri):  # by whoever held the folder before
        return
    config, folder = section.training, place.folder
    arguments = ["--folder", str(folder), "--store", place.store]
    storage.write_bytes(str(folder / "section.json"), to_json(section_of_ranks(section)).encode())
    arguments += ["--section", str(folder / "section.json")]
    inputs: list[tuple[str, Reference]] = [("plan", plan)] + ([("base", base)] if base is not None else [])
    for name, reference in inputs:
        write_reference(reference, folder / f"{name}.json")
        arguments += [f"--{name}", str(folder / f"{name}.json")]
    started = time.monotonic()
    stage_uri = storage.join(section.workspace, "checkpoints", section.stage)
    with taken_up(section, stage_uri, place) as other:
        arguments += ["--resume-from", str(other.folder), "--resume-store", other.store] if other is not None else []
        with (
            uploading(place, config, section.stage),
            following(
                folder,
                section,
                key=key,
                inputs=[reference for _, reference in inputs],
                changeable=_NOT_THE_TRAINED_RESULT,
            ),
            step_bar(folder, section) as show,
        ):
            run_torchrun("molmo2core.stages.train_rank", arguments, num_processes=config.num_processes, show=show)
    metrics, deviations = read_lines(folder / METRICS), read_lines(folder / DEVIATIONS)
    validations = read_lines(folder / VALIDATION)
    facts = training_facts(metrics, deviations, validations) | {"seconds": round(time.monotonic() - started, 1)}
    for name, log in (("failed_saves", SAVES), ("failed_uploads", UPLOADS)):
        facts[name] = float(sum(bool(line["problem"]) for line in read_lines(folder / log)))

    def fill(destination: Path) -> dict[str, Any]:
        shutil.copytree(folder / WEIGHTS, destination, dirs_exist_ok=True)
        for log, lines in ((METRICS, metrics), (VALIDATION, validations), (ANSWERS, read_lines(folder / ANSWERS))):
            timeless = [_without_times(line) for line in lines]
            if timeless or log == METRICS:
                (destination / log).write_text("".join(json.dumps(line) + "\n" for line in timeless))
        if metrics:
            timeless = [_without_times(line) for line in metrics]
            page = training_page(section.stage, timeless, [_without_times(line) for line in validations])
            (destination / PAGE).write_text(page)
        if (folder / PAGES).is_dir():
            shutil.copytree(folder / PAGES, destination / PAGES)
        if deviations:
            shutil.copyfile(folder / DEVIATIONS, destination / DEVIATIONS)
        return {"stage": section.stage, "key": key, "facts": facts}

    storage.commit_folder(uri, fill)
    for uri in filter(None, (str(folder), place.store)):
        remove_all_but_lasting(uri, config.keep_every_steps)


def _without_times(line: dict[str, Any]) -> dict[str, Any]:
    return {name: line[name] for name in line if name not in _TIMES}


def training_facts(
    metrics: list[dict[str, Any]], deviations: list[dict[str, Any]], validations: list[dict[str, Any]]
) -> dict[str, float]:
    """What the steps of a whole training add up to; losses only if there was a step."""
    totals = {name: float(sum(line[name] for line in metrics)) for name in ("packs", "examples", "tokens")}
    facts = {"steps": float(len(metrics)), **totals}
    if metrics:
        facts |= {
            "examples_per_pack": round(totals["examples"] / totals["packs"], 2),
            "token_fill": round(mean(line["fill"]["tokens"] for line in metrics), 4),
            "crop_fill": round(mean(line["fill"]["crops"] for line in metrics), 4),
            "first_loss": mean(line["loss"] for line in metrics[:_EDGE_STEPS]),
            "last_loss": mean(line["loss"] for line in metrics[-_EDGE_STEPS:]),
            "training_seconds": round(sum(line["seconds"] for line in metrics), 1),
            "waited_for_data_seconds": round(sum(line["waits"]["for_data"] for line in metrics), 1),
            "replaced_examples": float(metrics[-1]["replaced"]),
        }
    if validations:
        facts["validation_loss"] = validations[-1]["loss"]
    changed = [line["step"] for line in deviations if line["kind"] == CHANGED_DATA]
    return facts | ({"data_changed_at_step": float(changed[-1])} if changed else {})


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Lines of JSON that rank 0 wrote; none if there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def main(arguments: list[str] | None = None) -> int:
    """The stage alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--section", type=Path, required=True, help="TrainSection as JSON")
    parser.add_argument("--plan", type=Path, required=True, help="PackPlanRef")
    parser.add_argument("--base", type=Path, help="CheckpointRef of the stage before")
    parser.add_argument("--output", type=Path, required=True, help="CheckpointRef, written")
    options = parser.parse_args(arguments)
    try:
        section = from_json(storage.read_bytes(str(options.section)).decode(), TrainSection)
        run(section, plan=options.plan, base=options.base, output=options.output)
    except Exception as error:
        return exit_with_message(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
