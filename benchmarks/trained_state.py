"""What the state of a training takes on each GPU, computed from shapes: nothing is loaded, no GPU is needed.

Activations too, and the peak: python -m molmo2core.recipe.memory.

    python benchmarks/trained_state.py [RECIPE ...] [--stage sft]

    weights      of the whole model, float32, sharded over the ranks of the stage
    gradients    of trained parameters, float32, sharded
    AdamW        two moments of trained parameters, float32, sharded
    gathered     what FSDP2 holds whole on several ranks: the root unit (head, norms) and two decoder blocks, with the
                 gradients of the root unit and of one block; float32, half of it with `sharding.precision` mixed
    inputs       of decoder blocks, all that activation checkpointing keeps of one pass over a full sequence

The last line is how many times more state everything trained would take than the first recipe, on as many ranks.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from molmo2core.model.config import ModelConfig, named_config
from molmo2core.recipe.load import load_recipe
from molmo2core.recipe.schema import StageRecipe
from molmo2core.training.config import TrainableParts, TrainingConfig
from molmo2core.training.memory_estimate import (
    MemoryEstimate,
    PackShape,
    estimate_memory,
)
from molmo2core.training.parameter_counts import count_parameters

RECIPES = Path(__file__).parents[1] / "workflows" / "recipes"
DEFAULT = ("molmo2_4b_lora", "molmo2_4b_frozen_vision", "molmo2_4b")
FLOAT32 = 4
GB = 1e9


def block_inputs(model_config: ModelConfig, stage: StageRecipe) -> int:
    """Bytes of the float32 inputs of all decoder blocks, on one of the ranks that share a sequence."""
    decoder = model_config.decoder
    tokens = stage.packing.sequence_tokens // stage.context_parallel
    return decoder.num_layers * tokens * decoder.width * FLOAT32


def training_state(model_config: ModelConfig, config: TrainingConfig) -> MemoryEstimate:
    """Of a stage; the pack does not matter."""
    return estimate_memory(model_config, config, PackShape(tokens=0, crops=0, visual_tokens=0))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", type=Path, default=[RECIPES / f"{name}.yaml" for name in DEFAULT])
    parser.add_argument("--stage", default="sft", choices=("pretrain", "sft", "long_context"))
    options = parser.parse_args()
    head = ("ranks", "million", "trained", "weights", "gradients", "AdamW", "gathered", "state", "inputs")
    print(f"{'GB on each rank':<26}" + "".join(f"{name:>11}" for name in head))
    ratios = []
    for path in options.recipes:
        recipe = load_recipe(path.read_text(), where=str(path))
        model_config, stage = named_config(recipe.model.size), getattr(recipe.train, options.stage)
        state = training_state(model_config, stage.training)
        everything = dataclasses.replace(stage.training, trainable=TrainableParts(), low_rank=None)
        ratios.append(training_state(model_config, everything).state / state.state)
        parameters, trained = (count_parameters(model_config, stage.training, trained=t) for t in (False, True))
        counts = f"{stage.world_size:>11}{parameters / 1e6:>11.0f}{trained / 1e6:>11.1f}"
        sizes = (state.weights, state.gradients, state.moments, state.gathered, state.state)
        shown = "".join(f"{size / GB:>11.2f}" for size in (*sizes, block_inputs(model_config, stage)))
        print(f"{path.stem:<26}{counts}{shown}")
    print(f"everything trained, to {options.recipes[0].stem}: {ratios[0]:.2f} x the state")


if __name__ == "__main__":
    main()
