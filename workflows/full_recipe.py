"""The whole road, from delivered manifests to a registered model version.

    recipe -> resolve_recipe -> validate_data -> build_shards (one per dataset)
           -> plan_packs -> train pretrain -> plan_packs -> train sft -> plan_packs -> train long_context
           -> export_checkpoint -> evaluate -> register_model

Artifacts are small JSON references; what they name lies below the recipe's workspace.  This file also runs as a
script and then does the same as `python -m workflows.run`.
"""

import sys
from pathlib import Path
from typing import List  # noqa: UP035  (kfp reads the annotation)

if __package__ in (None, ""):  # run as a script: find the sibling folders
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kfp import dsl

from components.build_shards.component import build_shards
from components.evaluate.component import evaluate
from components.export_checkpoint.component import export_checkpoint
from components.plan_packs.component import plan_packs
from components.register_model.component import register_model
from components.resolve_recipe.component import resolve_recipe
from components.train.component import train
from components.validate_data.component import validate_data

ACCELERATOR = "nvidia.com/gpu"
SHARD_CPUS, SHARD_MEMORY = "4", "16Gi"
"""Fixed when compiled: the SDK (2.17) passes no parameter into the resources of a task inside a loop."""


@dsl.pipeline(name="molmo2-full-recipe", description="Trains, evaluates and registers a Molmo2 from one recipe.")
def full_recipe(recipe: str, overrides: List[str] = []):  # noqa: B006, UP006  (a KFP default, never mutated)
    """Train, evaluate and register a Molmo2.

    Args:
        recipe: text of a recipe file (workflows/recipes).
        overrides: `path.to.key=value` entries, applied to the recipe in order.
    """
    resolved = resolve_recipe(recipe=recipe, overrides=overrides)

    def sized(task: dsl.PipelineTask, step: str, *, gpus: bool = False) -> dsl.PipelineTask:
        """`task` with the CPUs, memory and GPUs that the recipe's resources give `step`."""
        task.set_cpu_limit(resolved.outputs[f"{step}_cpus"]).set_memory_limit(resolved.outputs[f"{step}_memory"])
        if gpus:
            task.set_accelerator_type(ACCELERATOR).set_accelerator_limit(resolved.outputs[f"{step}_gpus"])
        return task

    validated = sized(validate_data(section=resolved.outputs["validate"]), "validate_data")

    with dsl.ParallelFor(validated.outputs["Output"]) as dataset:
        sharded = build_shards(
            section=resolved.outputs["shard"], dataset=dataset, manifests=validated.outputs["manifests"]
        )
        sharded.set_cpu_limit(SHARD_CPUS).set_memory_limit(SHARD_MEMORY)

    def planned(stage: str) -> dsl.PipelineTask:
        """The pack plan of `stage`; every use of the loop's outputs needs a Collected of its own."""
        shards = dsl.Collected(sharded.outputs["shards"])
        return sized(plan_packs(section=resolved.outputs[f"plan_{stage}"], shards=shards), "plan_packs")

    pretrained = sized(
        train(section=resolved.outputs["train_pretrain"], plan=planned("pretrain").outputs["plan"]),
        "train",
        gpus=True,
    )
    fine_tuned = sized(
        train(
            section=resolved.outputs["train_sft"],
            plan=planned("sft").outputs["plan"],
            base=pretrained.outputs["checkpoint"],
        ),
        "train",
        gpus=True,
    )
    lengthened = sized(
        train(
            section=resolved.outputs["train_long_context"],
            plan=planned("long_context").outputs["plan"],
            base=fine_tuned.outputs["checkpoint"],
        ),
        "train",
        gpus=True,
    )
    exported = sized(
        export_checkpoint(section=resolved.outputs["export"], checkpoint=lengthened.outputs["checkpoint"]),
        "export_checkpoint",
    )
    evaluated = sized(
        evaluate(
            section=resolved.outputs["evaluate"],
            exported=exported.outputs["exported"],
            shards=dsl.Collected(sharded.outputs["shards"]),
        ),
        "evaluate",
        gpus=True,
    )
    registered = register_model(section=resolved.outputs["register"], evaluation=evaluated.outputs["evaluation"])
    registered.set_caching_options(enable_caching=False)  # a promotion must look at the registry as it is now


if __name__ == "__main__":
    from workflows.run import main

    sys.exit(main())
