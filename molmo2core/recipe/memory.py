"""Memory that each stage of a recipe asks of each GPU, estimated from shapes (training/memory_estimate.py).

    python -m molmo2core.recipe.memory RECIPE ... [--stage STAGE ...] [--ranks 8] [--context-parallel 1 2 4 8]

GB of 1e9 bytes on one GPU, for the largest pack that the stage's budgets allow:

    state         float32 shards of weights, gradients and AdamW's moments, and what FSDP2 holds whole at a time
    pack          ids, mask, pixels
    kept          what forward leaves for backward, with the stage's activation checkpointing: vision, decoder
    loss, block   what comes on top: logits of a chunk of positions; a decoder block; a vision block or the connector
    peak          state, pack, and the worst moment of the rest

CUDA and NCCL take 1 to 2 GB more, an allocator some fragments.  The last columns say whether 80 and 141 GB hold it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from molmo2core.errors import exit_with_message
from molmo2core.model.config import named_config
from molmo2core.parallel.ranks import check_ranks
from molmo2core.recipe.load import load_recipe, read_recipe
from molmo2core.recipe.schema import Recipe, StageRecipe
from molmo2core.recipe.sections import STAGE_NAMES, StageName
from molmo2core.training.memory_estimate import MemoryEstimate, estimate_memory, largest_pack

GB = 1e9
GPUS = (80, 141)
"""GB of the two that are tabulated: A100 and H100, H200."""
RESERVED = 3.0
"""GB that are left to CUDA, NCCL and fragments before an estimate counts as fitting."""


def stage_memory(recipe: Recipe, name: StageName, *, ranks: int = 0, context_parallel: int = 0) -> MemoryEstimate:
    """Of one GPU in stage `name`.

    Args:
        ranks: of one node, instead of the recipe's.
        context_parallel: instead of the recipe's.

    Raises:
        RecipeError: as many ranks cannot share a sequence.
    """
    stage: StageRecipe = getattr(recipe.train, name)
    config, model = stage.training, named_config(recipe.model.size)
    if ranks:
        config = replace(config, num_processes=ranks, num_nodes=1)
    if context_parallel:
        config = replace(config, context_parallel=context_parallel)
    check_ranks(
        config.world_size,
        config.context_parallel,
        config.global_batch_packs,
        model.decoder,
        ranks_per_node=config.num_processes,
        where=f"train.{name}",
    )
    return estimate_memory(model, config, largest_pack(model, stage.packing))


def memory_lines(recipe: Recipe) -> Iterator[str]:
    """A line for each stage that trains on GPUs, and one more where their memory is known and too small."""
    resources = recipe.resources.get("train")
    if resources is None or not resources.gpus:
        return
    for name in STAGE_NAMES:
        stage: StageRecipe = getattr(recipe.train, name)
        if not stage.steps:
            continue
        found = stage_memory(recipe, name)
        parts = f"state {found.state / GB:.1f}, activations {found.activations / GB:.1f}"
        yield f"memory  train.{name}: about {found.total / GB:.1f} GB on each GPU ({parts})"
        room = resources.gpu_gigabytes
        if room and not _fits(found, room):
            mend = "raise num_nodes or context_parallel, checkpoint activations, or lower the budgets of packing"
            yield f"warning  train.{name}: more than resources.train.gpu_gigabytes {room:g} - {RESERVED:g} hold; {mend}"


def _fits(found: MemoryEstimate, gigabytes: float) -> bool:
    return found.total / GB <= gigabytes - RESERVED


def _row(found: MemoryEstimate) -> str:
    kept = (found.kept_vision, found.kept_decoder)
    sizes = (found.state, found.pack, *kept, found.loss, found.decoder_block, found.vision_block, found.total)
    fits = "".join(f"{'yes' if _fits(found, room) else 'no':>6}" for room in GPUS)
    return "".join(f"{size / GB:>8.1f}" for size in sizes) + fits


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m molmo2core.recipe.memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipes", nargs="+", type=Path)
    parser.add_argument("--stage", nargs="+", choices=STAGE_NAMES, default=["long_context"])
    parser.add_argument("--ranks", type=int, default=0, help="GPUs, on one node; else as the recipe has it")
    parser.add_argument("--context-parallel", type=int, nargs="+", default=[0], help="else as the recipe has it")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args(arguments)
    try:
        names = ("state", "pack", "vision", "decoder", "loss", "block", "v.block", "peak")
        head = "".join(f"{name:>8}" for name in names) + "".join(f"{room:>6}" for room in GPUS)
        print(f"{'GB on each GPU':<28}{'GPUs':>5}{'cp':>4}{head}")
        for path in options.recipes:
            recipe = load_recipe(read_recipe(path), options.overrides, where=str(path))
            for name in options.stage:
                training: StageRecipe = getattr(recipe.train, name)
                for shared in options.context_parallel:
                    found = stage_memory(recipe, name, ranks=options.ranks, context_parallel=shared)
                    ranks = options.ranks or training.world_size
                    shown = f"{f'{path.stem} {name}':<28}{ranks:>5}{shared or training.context_parallel:>4}"
                    print(shown + _row(found))
    except Exception as error:
        return exit_with_message(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
