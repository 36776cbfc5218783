"""Recipe text -> one JSON string per section.  See README.md."""

from typing import List, NamedTuple  # noqa: UP035  (the annotations are part of the component's interface)

from kfp import dsl

from components.images import IMAGES


# fmt: off
@dsl.component(base_image=IMAGES["core"], install_kfp_package=False)
def resolve_recipe(recipe: str, overrides: List[str]) -> NamedTuple("Resolved", [  # noqa: UP006
    ("validate", str), ("shard", str),
    ("plan_pretrain", str), ("plan_sft", str), ("plan_long_context", str),
    ("train_pretrain", str), ("train_sft", str), ("train_long_context", str),
    ("export", str), ("evaluate", str), ("register", str),
    ("validate_data_cpus", str), ("validate_data_memory", str),
    ("plan_packs_cpus", str), ("plan_packs_memory", str),
    ("train_cpus", str), ("train_memory", str), ("train_gpus", str),
    ("export_checkpoint_cpus", str), ("export_checkpoint_memory", str),
    ("evaluate_cpus", str), ("evaluate_memory", str), ("evaluate_gpus", str),
]):
    # fmt: on
    """Check the whole recipe and cut it into sections, before any other pod starts."""
    from collections import namedtuple

    from molmo2core.errors import message_first
    from molmo2core.stages import resolve

    with message_first():
        resolved = resolve.run(recipe, overrides=overrides)
    return namedtuple("Resolved", resolved)(**resolved)
