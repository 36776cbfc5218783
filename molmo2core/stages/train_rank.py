"""What each rank of a training stage runs; started by stages.train through launch.torchrun.

    --section FILE --plan REFERENCE [--base REFERENCE] --folder FOLDER [--store URI]
    [--resume-from FOLDER [--resume-store URI]]

Rank 0 leaves `metrics.jsonl` (and `deviations.jsonl`, if there are any) in FOLDER, while training, and the weights in
FOLDER/weights, at the end.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from molmo2core import storage
from molmo2core.errors import CheckpointError, DataError
from molmo2core.recipe.load import from_json
from molmo2core.recipe.sections import TrainSection
from molmo2core.references import CheckpointRef, PackPlanRef, ShardsRef, read_reference
from molmo2core.training.checkpoint_folders import CheckpointPlace

if TYPE_CHECKING:
    from molmo2core.model.molmo2 import Molmo2

METRICS = "metrics.jsonl"
WEIGHTS = "weights"


def main(arguments: Sequence[str]) -> int:
    """Train on this rank."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--section", type=Path, required=True)
    parser.add_argument("--plan", type=Path, required=True)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--store", default="")
    parser.add_argument("--resume-from", type=Path)
    parser.add_argument("--resume-store", default="")
    options = parser.parse_args(arguments)
    section = from_json(options.section.read_text(), TrainSection)
    base = read_reference(options.base, CheckpointRef) if options.base else None
    place = CheckpointPlace(folder=options.folder, store=options.store)
    other = None
    if options.resume_from is not None:
        other = CheckpointPlace(folder=options.resume_from, store=options.resume_store)
    train_rank(section, read_reference(options.plan, PackPlanRef), base, place, other)
    return 0


def train_rank(
    section: TrainSection,
    plan: PackPlanRef,
    base: CheckpointRef | None,
    place: CheckpointPlace,
    resume_from: CheckpointPlace | None,
) -> None:
    """Build model and loader, train, and let rank 0, the one that reads weights, write them."""
    from molmo2core.checkpoints.fetch import TOKENIZER_FILES, fetched_folder
    from molmo2core.checkpoints.reference import save_weights
    from molmo2core.loading.dataloader import build_dataloader
    from molmo2core.model.initialization import model_without_weights
    from molmo2core.packing.plan_files import read_plan
    from molmo2core.parallel.mesh import host_context_group
    from molmo2core.parallel.pack_exchange import PackExchange
    from molmo2core.preprocessing.preprocessor import Preprocessor
    from molmo2core.shards.reader import ExampleReader
    from molmo2core.special_tokens import load_tokenizer, tokenizer_digest
    from molmo2core.stages.train_validation import HeldOutQuestions, open_held_out
    from molmo2core.training.trainer import start_ranks, train

    config, folder = section.training, place.folder
    cache = folder / "cache"
    device, group, context_rank = start_ranks(config)
    is_first = group == context_rank == 0
    model = _starting_model(section, base, cache) if is_first else model_without_weights(section.model)
    shards = [parent for parent in plan.parents if isinstance(parent, ShardsRef)]
    with fetched_folder(section.tokenizer, section.workspace, TOKENIZER_FILES) as fetched:
        tokenizer = load_tokenizer(fetched)
        _check_tokenizer(tokenizer_digest(fetched), shards, storage.resolve(section.workspace, section.tokenizer))
    preprocessor = Preprocessor(
        geometry=section.model.geometry,
        config=section.preprocessing,
        tokenizer=tokenizer,
        weighting=config.weighting,
        seed=section.seed,
    )
    sharing = None
    if config.context_parallel > 1:
        sharing = PackExchange(host_context_group(config.context_parallel), verify=config.verify_shared_packs)
    loader = build_dataloader(
        read_plan(storage.fetch_committed(plan.uri, cache)),
        plan,
        ExampleReader(shards, "train", cache),
        preprocessor,
        global_batch_packs=config.global_batch_packs,
        data_parallel_rank=group,
        data_parallel_size=config.data_parallel,
        num_workers=config.loader_workers,
        sharing=sharing,
        accept_changed_data=config.accept_changed_data,
    )
    held_out = open_held_out(section, plan, preprocessor, cache, speaks=is_first)
    answerer = HeldOutQuestions(folder, section, held_out, preprocessor) if held_out is not None and is_first else None
    weights = train(
        model,
        loader,
        config,
        device=device,
        folder=folder,
        metrics=folder / METRICS,
        name=section.stage,
        seed=section.seed,
        packing=section.packing,
        held_out=held_out.packs if held_out is not None else None,
        answerer=answerer,
        store=place.store,
        resume_from=resume_from,
    )
    if weights is not None:
        trained = model_without_weights(section.model)
        trained.load_state_dict(weights, assign=True)
        (folder / WEIGHTS).mkdir(exist_ok=True)
        save_weights(folder / WEIGHTS, trained, section.model)


def _starting_model(section: TrainSection, base: CheckpointRef | None, cache: Path) -> Molmo2:
    """float32 on CPU."""
    from molmo2core.checkpoints.import_hf import initial_model
    from molmo2core.checkpoints.reference import load_weights

    if base is None:
        return initial_model(section.model, section.initial_weights, seed=section.seed, workspace=section.workspace)
    model = load_weights(storage.fetch_committed(base.uri, cache))
    if model.config != section.model:
        raise CheckpointError(base.uri, found="weights of another model than the recipe's", expected=str(section.model))
    return model


def _check_tokenizer(digest: str, shards: Sequence[ShardsRef], where: str) -> None:
    """Lengths were planned with one tokenizer: texts of another would fit in no plan, and its ids in no key."""
    for ref in shards:
        if ref.tokenizer_digest != digest:
            raise DataError(
                where,
                found=f"a tokenizer with digest {digest}",
                expected=f"{ref.tokenizer_digest}, with which {ref.dataset} was measured",
                mend="build the shards again",
            )
