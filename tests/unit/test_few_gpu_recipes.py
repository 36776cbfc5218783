"""The recipes for one and two GPUs: what they train, and that the page says what it takes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from molmo2core.recipe.load import flatten, load_recipe
from molmo2core.recipe.schema import Recipe
from molmo2core.training.config import LowRankConfig, TrainableParts

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "workflows" / "recipes"


def recipe_of(name: str) -> Recipe:
    return load_recipe((RECIPES / f"{name}.yaml").read_text())


@pytest.mark.parametrize("name", ["molmo2_4b_lora", "molmo2_4b_frozen_vision"])
def test_stage_2_alone_is_trained_from_released_weights(name: str) -> None:
    recipe, large = recipe_of(name), recipe_of("molmo2_4b")
    train = recipe.train
    assert train.sft.steps > 0 == train.pretrain.steps == train.long_context.steps
    assert recipe.model.initialize_from.molmo2 == recipe.model.tokenizer == large.model.tokenizer
    assert train.sft.packing == large.train.sft.packing
    assert train.sft.num_processes == recipe.resources["train"].gpus


def test_what_they_train() -> None:
    lora, frozen = recipe_of("molmo2_4b_lora").train.sft, recipe_of("molmo2_4b_frozen_vision").train.sft
    assert frozen.trainable == TrainableParts(vision_encoder=False)
    assert frozen.low_rank is None
    assert [part for part, trained in vars(lora.trainable).items() if trained] == ["connector"]
    assert lora.low_rank == LowRankConfig(parts=("decoder_attention", "decoder_mlp"), rank=32, alpha=64.0)


def test_they_differ_in_what_is_trained_only() -> None:
    """A limit mended in one and forgotten in the other would show here."""
    one, other = (flatten(recipe_of(name)) for name in ("molmo2_4b_lora", "molmo2_4b_frozen_vision"))
    differing = {key for key in one | other if one.get(key) != other.get(key)}
    stage = "train.sft."
    of_stage = {key.removeprefix(stage) for key in differing if key.startswith(stage)}
    assert {name.split(".")[0] for name in of_stage} == {"trainable", "low_rank", "optimizer", "num_processes"}
    assert {name for name in of_stage if name.startswith("optimizer")} == {"optimizer.decoder.learning_rate"}
    assert {key for key in differing if not key.startswith("train.")} == {
        "name", "description", "workspace", "register.experiment", "register.model_name",
        "resources.train.cpus", "resources.train.memory", "resources.train.gpus",
    }  # fmt: skip


def test_the_page_has_the_memory_that_is_computed() -> None:
    """Numbers in prose rot: this is the command that the page names, in a process of its own (3 s)."""
    command = [sys.executable, str(ROOT / "benchmarks" / "trained_state.py")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    shown = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    page = (ROOT / "docs" / "training.md").read_text()
    table = shown.splitlines()[:-1]
    assert len(table) == 4
    assert all(f"    {line.rstrip()}\n" in page for line in table), shown
