"""Step 0: recipe text -> one JSON string per section, or a clear error within seconds and before any GPU."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from molmo2core.errors import exit_with_message
from molmo2core.model.config import named_config
from molmo2core.preprocessing.config import PreprocessingConfig
from molmo2core.recipe.check import check_recipe
from molmo2core.recipe.fingerprint import recipe_fingerprint
from molmo2core.recipe.load import load_recipe, read_recipe, to_json
from molmo2core.recipe.memory import memory_lines
from molmo2core.recipe.schema import Recipe, StageRecipe, StepName, StepResources
from molmo2core.recipe.sections import (
    STAGE_NAMES,
    EvaluateSection,
    ExportSection,
    PlanSection,
    RegisterSection,
    ShardSection,
    StageName,
    TrainSection,
    ValidateSection,
)
from molmo2core.storage import write_bytes

SIZED_STEPS: tuple[StepName, ...] = ("validate_data", "plan_packs", "train", "export_checkpoint", "evaluate")


def run(recipe_text: str, *, overrides: Sequence[str] = ()) -> dict[str, str]:
    """Resolve a recipe.

    Returns:
        Section name -> JSON (`validate`, `shard`, `plan_<stage>`, `train_<stage>`, `export`, `evaluate`, `register`),
        and what Kubernetes needs as plain strings: `<step>_cpus`, `<step>_memory`, and `train_gpus`, `evaluate_gpus`.

    Raises:
        RecipeError: the recipe is wrong.
    """
    recipe = load_recipe(recipe_text, overrides)
    check_recipe(recipe)
    for line in memory_lines(recipe):
        print(line)
    return cut_sections(recipe)


def cut_sections(recipe: Recipe) -> dict[str, str]:
    """The sections of a checked recipe, as JSON, and the resources of its steps."""
    workspace, tokenizer, fingerprint = recipe.workspace, recipe.model.tokenizer, recipe_fingerprint(recipe)
    run_name = f"{recipe.name}-{fingerprint[:8]}"
    sections: dict[str, object] = {
        "validate": ValidateSection(
            workspace=workspace,
            data=recipe.data,
            preprocessing_limits=_widest_limits(recipe),
            evaluation_limits=recipe.evaluate.preprocessing,
        ),
        "shard": ShardSection(workspace=workspace, shards=recipe.shards, tokenizer=tokenizer),
        "export": ExportSection(
            workspace=workspace,
            tokenizer=tokenizer,
            export=recipe.export,
            preprocessing=recipe.evaluate.preprocessing,
            initial_weights=recipe.model.initialize_from,
        ),
        "evaluate": EvaluateSection(workspace=workspace, evaluation=recipe.evaluate),
        "register": RegisterSection(
            workspace=workspace,
            run_name=run_name,
            recipe_fingerprint=fingerprint,
            recipe_yaml=yaml.safe_dump(json.loads(to_json(recipe)), sort_keys=False),
            tracking=recipe.register,
        ),
    }
    for name in STAGE_NAMES:
        sections[f"plan_{name}"] = _plan_section(recipe, name)
        sections[f"train_{name}"] = _train_section(recipe, name, run_name, fingerprint)
    resources = {step: recipe.resources.get(step, StepResources()) for step in SIZED_STEPS}
    return (
        {name: to_json(section) for name, section in sections.items()}
        | {f"{step}_cpus": str(resources[step].cpus) for step in SIZED_STEPS}
        | {f"{step}_memory": resources[step].memory for step in SIZED_STEPS}
        | {f"{step}_gpus": str(resources[step].gpus) for step in ("train", "evaluate")}
    )


def _plan_section(recipe: Recipe, name: StageName) -> PlanSection:
    stage = _stage(recipe, name)
    return PlanSection(
        workspace=recipe.workspace,
        stage=name,
        seed=recipe.seed,
        mixture=stage.mixture,
        packing=stage.packing,
        preprocessing=stage.preprocessing,
        geometry=named_config(recipe.model.size).geometry,
        num_packs=stage.steps * stage.global_batch_packs,
    )


def _train_section(recipe: Recipe, name: StageName, run_name: str, fingerprint: str) -> TrainSection:
    stage = _stage(recipe, name)
    return TrainSection(
        workspace=recipe.workspace,
        stage=name,
        run_name=run_name,
        seed=recipe.seed,
        recipe_fingerprint=fingerprint,
        model=named_config(recipe.model.size),
        tokenizer=recipe.model.tokenizer,
        initial_weights=recipe.model.initialize_from,
        packing=stage.packing,
        preprocessing=stage.preprocessing,
        training=stage.training,
        tracking=recipe.register,
    )


def _stage(recipe: Recipe, name: StageName) -> StageRecipe:
    stage: StageRecipe = getattr(recipe.train, name)
    return stage


def _widest_limits(recipe: Recipe) -> PreprocessingConfig:
    """The largest of every limit over the training stages: a row that does not fit could never be trained on."""
    stages = [_stage(recipe, name).preprocessing for name in STAGE_NAMES]
    limits = [field.name for field in dataclasses.fields(PreprocessingConfig) if field.name.startswith("max_")]
    return dataclasses.replace(
        recipe.train.sft.preprocessing, **{name: max(getattr(stage, name) for stage in stages) for name in limits}
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m molmo2core.stages.resolve --recipe R --output FOLDER`: one file per section."""
    parser = argparse.ArgumentParser(prog="python -m molmo2core.stages.resolve", description=__doc__)
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--output", type=Path, required=True, help="folder for <section>.json")
    options = parser.parse_args(arguments)
    try:
        recipe = load_recipe(read_recipe(options.recipe), options.overrides, where=str(options.recipe))
        check_recipe(recipe, where=str(options.recipe))
        for line in memory_lines(recipe):
            print(line)
        for name, text in cut_sections(recipe).items():
            write_bytes(str(options.output / f"{name}.json"), text.encode())
    except Exception as error:
        return exit_with_message(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
