"""What the state of a training takes on each GPU, computed from shapes: nothing is loaded, no GPU is needed.

    python benchmarks/trained_state.py [RECIPE ...] [--stage sft]

    weights      of the whole model, float32, sharded over the ranks of the stage
    gradients    of trained parameters, float32, sharded
    AdamW        two moments of trained parameters, float32, sharded
    gathered     what FSDP2 holds whole on several ranks: the root unit (head, norms) and two decoder blocks, with the
                 gradients of the root unit and of one block; float32, half of it with `sharding.precision` mixed
    inputs       of decoder blocks, all that activation checkpointing keeps of one pass over a full sequence

Not counted: one block's activations while it is computed again, the logits of one chunk of positions (1.2 GB in float32
for 2,048 positions and 151,936 tokens), and of a frozen or checkpointed vision encoder those of one block.
The last line is how many times more state everything trained would take than the first recipe, on as many ranks.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch
from torch import nn

from molmo2core.model.config import ModelConfig, named_config
from molmo2core.model.molmo2 import Molmo2
from molmo2core.parallel.fsdp import fsdp_units
from molmo2core.recipe.load import load_recipe
from molmo2core.recipe.schema import StageRecipe
from molmo2core.training.config import TrainableParts, TrainingConfig
from molmo2core.training.trainable import select_trained

RECIPES = Path(__file__).parents[1] / "workflows" / "recipes"
DEFAULT = ("molmo2_4b_lora", "molmo2_4b_frozen_vision", "molmo2_4b")
FLOAT32 = 4
GB = 1e9


@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """Parameters in all, and bytes on each rank."""

    parameters: int
    trained: int
    weights: float
    gradients: float
    moments: float
    gathered: float

    @property
    def total(self) -> float:
        """Bytes on each rank."""
        return self.weights + self.gradients + self.moments + self.gathered


def training_state(model_config: ModelConfig, config: TrainingConfig) -> State:
    """State of a stage in float32."""
    with torch.device("meta"):
        model = Molmo2(model_config)
    select_trained(model, config, seed=0)
    parameters, trained = _count(model, trained=False), _count(model, trained=True)
    ranks, gathered = config.world_size, 0
    if ranks > 1:
        is_unit = fsdp_units(model)
        units = [module for module in model.modules() if is_unit(module)]
        whole = [parameters - sum(_count(unit, trained=False) for unit in units)]
        whole += [trained - sum(_count(unit, trained=True) for unit in units)]
        block = model.decoder.stack.blocks[0]
        gathered = sum(whole) + 2 * _count(block, trained=False) + _count(block, trained=True)
    return State(
        parameters=parameters,
        trained=trained,
        weights=parameters * FLOAT32 / ranks,
        gradients=trained * FLOAT32 / ranks,
        moments=2 * trained * FLOAT32 / ranks,
        gathered=gathered * FLOAT32,
    )


def block_inputs(model_config: ModelConfig, stage: StageRecipe) -> int:
    """Bytes of the float32 inputs of all decoder blocks, on one of the ranks that share a sequence."""
    decoder = model_config.decoder
    tokens = stage.packing.sequence_tokens // stage.context_parallel
    return decoder.num_layers * tokens * decoder.width * FLOAT32


def _count(module: nn.Module, *, trained: bool) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad or not trained)


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
        ratios.append(training_state(model_config, everything).total / state.total)
        counts = f"{stage.world_size:>11}{state.parameters / 1e6:>11.0f}{state.trained / 1e6:>11.1f}"
        sizes = (state.weights, state.gradients, state.moments, state.gathered, state.total)
        shown = "".join(f"{size / GB:>11.2f}" for size in (*sizes, block_inputs(model_config, stage)))
        print(f"{path.stem:<26}{counts}{shown}")
    print(f"everything trained, to {options.recipes[0].stem}: {ratios[0]:.2f} x the state")


if __name__ == "__main__":
    main()
