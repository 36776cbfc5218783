"""What the model will see: packs of a plan, or single samples, as text and as one HTML page.

    python -m molmo2core.loading inspect PLAN --recipe R --stage sft              the first packs of a plan
    python -m molmo2core.loading inspect PLAN --recipe R --stage sft --pack 3     pack 3
    python -m molmo2core.loading inspect SHARDS ... --recipe R --stage sft        packs planned from these shards now
    python -m molmo2core.loading inspect SHARDS                                   packs of these, as the released models
    python -m molmo2core.loading inspect SHARDS --uid ID                          one sample, as the released models
    python -m molmo2core.loading inspect --recipe R --stage sft                   what lies in the recipe's workspace

PLAN is the reference file of a plan, or its folder, then with the shards that it was made from; SHARDS the reference
file of a dataset's shards, or their folder.  A recipe supplies tokenizer, geometry, limits, wordings, weights, seed and
the mixture; it should be the one that the plan was made with.  Nothing is written but the page.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from molmo2core import storage
from molmo2core.checkpoints.fetch import TOKENIZER_FILES, fetched_folder
from molmo2core.errors import DataError, RecipeError, exit_with_message
from molmo2core.examples import SPLITS, Split
from molmo2core.message_tree.config import Weighting
from molmo2core.packing.config import PackingConfig
from molmo2core.packing.plan import ENTRY, PackPlan, plan_packs
from molmo2core.packing.plan_files import read_plan
from molmo2core.preprocessing.config import PreprocessingConfig, VisualGeometry
from molmo2core.recipe.check import check_recipe
from molmo2core.recipe.load import from_json, load_recipe, read_recipe
from molmo2core.recipe.sections import STAGE_NAMES, PlanSection, TrainSection
from molmo2core.references import PackPlanRef, Reference, ShardsRef, read_reference
from molmo2core.shards.lengths import read_table
from molmo2core.shards.mixture import MixtureGroup, resolve_proportions
from molmo2core.special_tokens import TextTokenizer, load_tokenizer, tokenizer_digest
from molmo2core.stages.plan import dataset_lengths
from molmo2core.stages.resolve import cut_sections

if TYPE_CHECKING:
    from molmo2core.loading.dataset import PackDataset
    from molmo2core.preprocessing.preprocessor import Preprocessor
    from molmo2core.shards.reader import ExampleReader

PLAN_FILE = "plan.json"
PACKS_SHOWN = 4
PAGE = "inspect.html"
_LISTED = 20
_RELEASED = PackingConfig(sequence_tokens=16_384, crop_budget=128)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Of one training stage, from a recipe or by default."""

    plan: PlanSection
    tokenizer: str
    weighting: Weighting
    recipe: str
    """Which recipe, in words."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Shards in the order of sample ids, and the plan over them, if there is one."""

    shards: tuple[ShardsRef, ...]
    plan: PackPlanRef | None


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A pack to show."""

    title: str
    plan: PackPlan
    index: int


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; the exit code says who can mend a failure (errors.py)."""
    try:
        inspect(_parser().parse_args(arguments))
    except BrokenPipeError:  # the reader of the text, `head` say, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or closing it at exit fails again
    except Exception as error:
        return exit_with_message(error)
    return 0


def inspect(options: argparse.Namespace) -> None:
    """Print the packs and write the page.

    Raises:
        DataError: inputs are missing, do not belong together or do not hold what is asked for.
        RecipeError: the recipe is wrong, or something that it would supply is missing.
    """
    from molmo2core.loading.inspection import view_pack
    from molmo2core.loading.inspection_page import build_page
    from molmo2core.loading.inspection_text import describe
    from molmo2core.preprocessing.preprocessor import Preprocessor
    from molmo2core.shards.reader import ExampleReader

    settings = read_settings(options)
    inputs = find_inputs(options.data, settings)
    with tempfile.TemporaryDirectory() as cache, _tokenizer(settings, inputs) as tokenizer:
        reader = ExampleReader(inputs.shards, options.split, Path(cache))
        preprocessor = Preprocessor(
            geometry=settings.plan.geometry,
            config=settings.plan.preprocessing,
            tokenizer=tokenizer,
            weighting=settings.weighting,
            seed=settings.plan.seed,
        )
        views = []
        for shown in choose_packs(options, settings, inputs, reader, Path(cache)):
            dataset = _dataset(shown.plan, inputs, reader, preprocessor)
            view = view_pack(
                dataset.load(shown.index),
                shown.title,
                packing=settings.plan.packing if inputs.plan is None else shown.plan.packing,
                reader=reader,
                preprocessor=preprocessor,
            )
            print(describe(view), flush=True)
            views.append(view)
    page = build_page("Packs as the model sees them", _facts(settings, inputs), views)
    storage.write_bytes(options.html, page.encode())
    print(f"page: {options.html}")


def read_settings(options: argparse.Namespace) -> Settings:
    """From the recipe's stage; without a recipe those of the released models in stage 2."""
    # As typed, a folder is one below the current folder; in a recipe, one below the workspace.
    tokenizer: str = options.tokenizer
    if tokenizer and "://" not in tokenizer:
        tokenizer = os.path.abspath(tokenizer)
    if options.recipe is None:
        if not options.data:
            raise RecipeError("inspect", found="neither data nor a recipe", mend="name a plan or shards, or a recipe")
        plan = PlanSection(
            workspace="",
            stage="sft",
            seed=0,
            mixture={},
            packing=_RELEASED,
            preprocessing=PreprocessingConfig(),
            geometry=VisualGeometry(),
            num_packs=0,
        )
        return Settings(plan=plan, tokenizer=tokenizer, weighting="described", recipe="the released defaults")
    if options.stage is None:
        raise RecipeError("inspect", found="a recipe without a stage", expected=f"--stage {'|'.join(STAGE_NAMES)}")
    where = str(options.recipe)
    recipe = load_recipe(read_recipe(options.recipe), options.overrides, where=where)
    check_recipe(recipe, where=where)
    sections = cut_sections(recipe)
    train = from_json(sections[f"train_{options.stage}"], TrainSection)
    return Settings(
        plan=from_json(sections[f"plan_{options.stage}"], PlanSection),
        tokenizer=tokenizer or train.tokenizer,
        weighting=train.training.weighting,
        recipe=f"{where}, stage {options.stage}",
    )


def find_inputs(data: Sequence[str], settings: Settings) -> Inputs:
    """The plan and shards that `data` names, or that lie in the workspace of the recipe.

    Raises:
        DataError: something is neither, shards of a plan's folder are missing, or the workspace holds several.
    """
    found = [_reference(name) for name in data] if data else _in_workspace(settings)
    plans = [reference for reference in found if isinstance(reference, PackPlanRef)]
    shards = sorted((reference for reference in found if isinstance(reference, ShardsRef)), key=lambda ref: ref.dataset)
    if len(plans) > 1:
        raise DataError("inspect", found=f"{len(plans)} plans", expected="one", mend="name one")
    if not plans:
        return Inputs(shards=tuple(shards), plan=None)
    plan = plans[0]
    named = tuple(parent for parent in plan.parents if isinstance(parent, ShardsRef))
    if named:  # a reference, which carries them
        return Inputs(shards=named, plan=plan)
    missing = plan.facts.get("draws", {}).keys() - {ref.dataset for ref in shards}
    if missing or not shards:
        raise DataError(
            plan.uri,
            found=f"a plan's folder without the shards of {', '.join(sorted(missing)) or 'any dataset'}",
            mend="name the shards of all its datasets too, or the plan's reference file",
        )
    return Inputs(shards=tuple(shards), plan=dataclasses.replace(plan, parents=tuple(shards)))


def choose_packs(
    options: argparse.Namespace, settings: Settings, inputs: Inputs, reader: ExampleReader, cache: Path
) -> list[Shown]:
    """The packs to show, as the options name them.

    Raises:
        DataError: there is no such pack or sample, or the plan belongs to other shards.
    """
    if inputs.plan is None and options.pack:
        raise DataError("--pack", found="shards without a plan", mend="name a plan, or ask for --uid or --count")
    if inputs.plan is not None:
        if options.split != "train":
            raise DataError("--split", found=options.split, expected="train, of which plans are made")
        plan = read_plan(storage.fetch_committed(inputs.plan.uri, cache / "plan"))
        if plan.packing != settings.plan.packing:
            raise DataError(
                inputs.plan.uri,
                found=f"a plan with {plan.packing}",
                expected=f"{settings.plan.packing}, by {settings.recipe}",
                mend="give the recipe and stage that the plan was made with",
            )
        if options.uid:
            sample = _sample_of(options.uid, inputs, options.split)
            entries = np.flatnonzero(plan.entries["sample"] == sample)
            packs = np.unique(np.searchsorted(plan.pack_offsets, entries, side="right") - 1).tolist()
            if not packs:
                raise DataError(options.uid, found="in no pack of this plan", mend="leave the plan out to see it alone")
            print(f"{options.uid}: in {len(packs)} packs: {', '.join(map(str, packs[:_LISTED]))}")
            packs = packs[: options.count or 1]
        else:
            packs = options.pack or range(min(options.count or PACKS_SHOWN, len(plan)))
        for index in packs:
            if not 0 <= index < len(plan):
                raise DataError("--pack", found=str(index), expected=f"0 to {len(plan) - 1}")
        return [Shown(title=f"pack {index} of {len(plan)}", plan=plan, index=index) for index in packs]
    if options.uid or options.split != "train":
        first = _sample_of(options.uid, inputs, options.split) if options.uid else 0
        count = options.count or (1 if options.uid else PACKS_SHOWN)
        samples = range(first, min(first + count, len(reader)))
        plan = _alone([(sample, len(reader.lengths(sample).branch_tokens)) for sample in samples], options.epoch)
        return [Shown(title=f"sample {sample}, alone", plan=plan, index=index) for index, sample in enumerate(samples)]
    count = options.count or PACKS_SHOWN
    plan = _planned_now(settings.plan, inputs.shards, count)
    return [Shown(title=f"pack {index}, planned just now", plan=plan, index=index) for index in range(count)]


def _planned_now(section: PlanSection, shards: Sequence[ShardsRef], count: int) -> PackPlan:
    """A few packs in the proportions of the recipe, or of equal rates, over the datasets that are here."""
    names = {ref.dataset for ref in shards}
    groups = {
        name: dataclasses.replace(group, datasets=tuple(dataset for dataset in group.datasets if dataset in names))
        for name, group in section.mixture.items()
    }
    mixture = {name: group for name, group in groups.items() if group.datasets}
    if not mixture:
        mixture = {"all": MixtureGroup(rate=1.0, datasets=tuple(sorted(names)))}
    proportions = resolve_proportions(mixture, {ref.dataset: ref.num_samples.get("train", 0) for ref in shards})
    lengths = [dataset_lengths(ref, proportions[ref.dataset], section) for ref in shards]
    return plan_packs(lengths, packing=section.packing, num_packs=count, seed=section.seed).plan


def _alone(samples: Sequence[tuple[int, int]], epoch: int) -> PackPlan:
    """A pack for each (sample, number of branches), however long."""
    entries = np.zeros(len(samples), ENTRY)
    for row, (sample, branches) in enumerate(samples):
        entries[row] = (sample, 0, branches, epoch)
    unlimited = PackingConfig(sequence_tokens=1 << 30, crop_budget=1 << 30)
    return PackPlan(entries=entries, pack_offsets=np.arange(len(samples) + 1), packing=unlimited)


def _dataset(plan: PackPlan, inputs: Inputs, reader: ExampleReader, preprocessor: Preprocessor) -> PackDataset:
    from molmo2core.loading.dataset import PackDataset

    reference = inputs.plan or PackPlanRef(
        uri="", digest="", stage="", num_packs=len(plan), parents=tuple(inputs.shards)
    )
    return PackDataset(
        plan,
        reference=reference,
        reader=reader,
        preprocessor=preprocessor,
        global_batch_packs=1,
        data_parallel_rank=0,
        data_parallel_size=1,
        strict=False,
        accept_changed_data=False,
    )


def _reference(name: str) -> Reference:
    """What a reference file or a committed folder names."""
    if not storage.is_remote(name) and Path(name).is_file():
        reference = read_reference(Path(name), Reference)
        if isinstance(reference, PackPlanRef | ShardsRef):
            return reference
        raise DataError(name, found=type(reference).__name__, expected="a PackPlanRef or a ShardsRef")
    folder = storage.open_committed(name)
    if "dataset" in folder.meta:
        return ShardsRef(
            uri=folder.uri,
            digest=folder.digest,
            dataset=folder.meta["dataset"],
            tokenizer_digest=folder.meta["tokenizer_digest"],
            num_samples=folder.meta["num_samples"],
        )
    if PLAN_FILE in folder.files:
        facts = folder.meta.get("statistics", {})
        return PackPlanRef(uri=folder.uri, digest=folder.digest, stage="", num_packs=facts.get("packs", 0), facts=facts)
    raise DataError(name, found="a folder of something else", expected="shards of a dataset, or a plan")


def _in_workspace(settings: Settings) -> list[Reference]:
    """The shards of the mixture's datasets, and the plan of the stage if there is exactly one."""
    workspace, section = settings.plan.workspace, settings.plan
    found: list[Reference] = []
    for dataset in sorted({dataset for group in section.mixture.values() for dataset in group.datasets}):
        folders = _committed_below(storage.join(workspace, "shards", dataset))
        if len(folders) != 1:
            raise DataError(
                storage.join(workspace, "shards", dataset),
                found=f"{len(folders)} committed folders",
                expected="one",
                mend="name the right ones: " + " ".join(folders) if folders else "build the shards first",
            )
        found.append(_reference(folders[0]))
    plans = _committed_below(storage.join(workspace, "plans", section.stage))
    if len(plans) > 1:
        raise DataError(
            storage.join(workspace, "plans", section.stage),
            found=f"{len(plans)} plans",
            expected="one",
            mend=f"name one, and the shards: {' '.join([*plans, *(ref.uri for ref in found)])}",
        )
    return found + [_reference(plan) for plan in plans]


def _committed_below(uri: str) -> list[str]:
    names = (name for name in storage.list_files(uri) if name.endswith(f"/{storage.MARKER}") and name.count("/") == 1)
    return [storage.join(uri, name.removesuffix(f"/{storage.MARKER}")) for name in names]


def _sample_of(uid: str, inputs: Inputs, split: Split) -> int:
    """Global id of the sample called `uid` or `dataset/uid`."""
    first = 0
    for ref in inputs.shards:
        size = ref.num_samples.get(split, 0)
        if size:
            uids = read_table(storage.open_committed(ref.uri), split).uids
            for name in (uid, uid.removeprefix(f"{ref.dataset}/")):
                if name in uids:
                    return first + uids.index(name)
        first += size
    raise DataError(
        uid,
        found=f"no such sample in split {split}",
        expected=f"a uid of {', '.join(ref.dataset for ref in inputs.shards)}",
    )


@contextmanager
def _tokenizer(settings: Settings, inputs: Inputs) -> Iterator[TextTokenizer]:
    """That of the options or the recipe; else the one with which the first shards were built, if it is still there."""
    name, workspace = settings.tokenizer, settings.plan.workspace
    if not name:
        first = inputs.shards[0]
        name = storage.open_committed(first.uri).meta.get("tokenizer", "")
        workspace = first.uri.rpartition(f"/shards/{first.dataset}/")[0]
    if not name:
        raise RecipeError("inspect", found="no tokenizer", mend="give --tokenizer, or --recipe and --stage")
    with fetched_folder(name, workspace, TOKENIZER_FILES) as folder:
        digest = tokenizer_digest(folder)
        for ref in inputs.shards:
            if ref.tokenizer_digest != digest:
                raise DataError(
                    name,
                    found=f"a tokenizer with digest {digest}",
                    expected=f"{ref.tokenizer_digest}, with which {ref.dataset} was measured",
                    mend="give the tokenizer that the shards were built with",
                )
        yield load_tokenizer(folder)


def _facts(settings: Settings, inputs: Inputs) -> list[tuple[str, str]]:
    limits = settings.plan.preprocessing
    return [
        ("recipe", settings.recipe),
        ("plan", f"{inputs.plan.uri} ({inputs.plan.digest[:12]})" if inputs.plan else "none"),
        ("shards", ", ".join(f"{ref.dataset} ({ref.digest[:12]})" for ref in inputs.shards)),
        ("wordings", limits.style),
        ("loss weights", settings.weighting),
        ("seed", str(settings.plan.seed)),
        ("limits", f"{limits.max_crops} crops, {limits.max_frames} frames, {limits.max_fps:g} fps"),
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m molmo2core.loading", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command = parser.add_subparsers(dest="command", required=True).add_parser(
        "inspect", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command.add_argument("data", nargs="*", metavar="PLAN|SHARDS", help="reference files or committed folders")
    command.add_argument("--recipe", type=Path)
    command.add_argument("--stage", choices=STAGE_NAMES)
    command.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    command.add_argument("--tokenizer", default="", help="folder or address; default the recipe's, or the shards'")
    command.add_argument("--pack", type=int, action="append", default=[], help="number of a pack of the plan")
    command.add_argument("--uid", default="", help="a sample: `uid` or `dataset/uid`")
    command.add_argument("--count", type=int, default=0, help=f"how many packs or samples; default {PACKS_SHOWN}, or 1")
    command.add_argument("--split", choices=SPLITS, default="train")
    command.add_argument("--epoch", type=int, default=0, help="draw samples as in this epoch, without a plan")
    command.add_argument("--html", default=PAGE, help=f"the page, a file or an address; default {PAGE}")
    return parser
