"""A real plan over real shards, loaders over it, and what tests compare of their batches."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molmo2core.examples import Batch, Example
from molmo2core.loading.dataloader import PackLoader, build_dataloader
from molmo2core.packing.config import PackingConfig
from molmo2core.packing.plan import PackPlan
from molmo2core.packing.plan_files import read_plan, write_plan
from molmo2core.preprocessing.config import PreprocessingConfig
from molmo2core.preprocessing.preprocessor import Preprocessor
from molmo2core.references import PackPlanRef, ShardsRef, read_reference, write_reference
from molmo2core.shards.reader import ExampleReader
from molmo2core.testing.tiny_examples import image_examples, text_examples, write_tiny_shards
from molmo2core.testing.tiny_model import tiny_config
from molmo2core.testing.tiny_plan import plan_of_refs
from molmo2core.testing.tiny_tokenizer import tiny_tokenizer

GEOMETRY = tiny_config().geometry
LIMITS = PreprocessingConfig(max_crops=2)
PACKING = PackingConfig(sequence_tokens=700, crop_budget=9, window=16)
PREPROCESSOR = Preprocessor(geometry=GEOMETRY, config=LIMITS, tokenizer=tiny_tokenizer(), weighting="described", seed=5)
PACKS, GLOBAL_BATCH = 24, 4
SHARES = {"images": 0.8, "texts": 0.2}
NUM_IMAGES = 14


@dataclass(frozen=True)
class LoadingData:
    """An epoch of six global batches of four packs: images (trees, one of them cut) and text."""

    plan: PackPlan
    reference: PackPlanRef
    reader: ExampleReader


def loading_examples() -> list[Example]:
    """Fourteen images, the first with more questions than a sequence holds, and six texts."""
    examples = [*image_examples("images", NUM_IMAGES), *text_examples("texts", 6)]
    return [dataclasses.replace(examples[0], annotations=examples[2].annotations * 12), *examples[1:]]


def write_loading_data(folder: Path) -> None:
    """Shards, plan and its reference below `folder`."""
    examples = loading_examples()
    refs = [write_tiny_shards(part, str(folder)) for part in (examples[:NUM_IMAGES], examples[NUM_IMAGES:])]
    planned = plan_of_refs(refs, SHARES, packing=PACKING, num_packs=PACKS, geometry=GEOMETRY, limits=LIMITS)
    (folder / "plan").mkdir()
    facts = write_plan([planned], SHARES, folder / "plan")
    reference = PackPlanRef(uri="", digest="f1", stage="sft", num_packs=PACKS, facts=facts, parents=tuple(refs))
    write_reference(reference, folder / "reference.json")


def open_loading_data(folder: Path) -> LoadingData:
    """What `write_loading_data` wrote; the plan is mapped from its files."""
    reference = read_reference(folder / "reference.json", PackPlanRef)
    shards = [parent for parent in reference.parents if isinstance(parent, ShardsRef)]
    reader = ExampleReader(shards, "train", folder / "cache")
    return LoadingData(plan=read_plan(folder / "plan"), reference=reference, reader=reader)


def tiny_loader(data: LoadingData, **changes: Any) -> PackLoader:
    """A loader over `data`; `plan`, `reference` and `preprocessor` may be changed like other arguments."""
    settings = {"global_batch_packs": GLOBAL_BATCH, "strict": True} | changes
    plan, reference = settings.pop("plan", data.plan), settings.pop("reference", data.reference)
    return build_dataloader(plan, reference, data.reader, settings.pop("preprocessor", PREPROCESSOR), **settings)


def pack_hashes(batch: Batch) -> list[str]:
    """One digest per pack, over the bytes, types and shapes of every tensor and over the uids."""
    found = []
    for pack, uids in zip(batch["packs"], batch["uids"], strict=True):
        digest = hashlib.sha256(repr(uids).encode())
        for name in sorted(pack):
            array = pack[name].cpu().numpy()
            digest.update(f"{name} {array.dtype} {array.shape} ".encode() + array.tobytes())
        found.append(digest.hexdigest())
    return found


def hash_epoch(data: LoadingData, *, ranks: int, workers: int, state: dict[str, Any] | None = None) -> list[list[str]]:
    """[step][slot] hashes of all ranks' packs, from `state` on, each rank with its own loader."""
    parts: list[list[list[str]]] = []
    for rank in range(ranks):
        loader = tiny_loader(data, data_parallel_rank=rank, data_parallel_size=ranks, num_workers=workers)
        if state is not None:
            loader.dataset.load_state_dict(state)
        steps = PACKS // GLOBAL_BATCH - (state["packs"] // GLOBAL_BATCH if state else 0)
        parts.append([pack_hashes(batch) for batch in itertools.islice(loader, steps)])
    return [[pack for part in step for pack in part] for step in zip(*parts, strict=True)]
