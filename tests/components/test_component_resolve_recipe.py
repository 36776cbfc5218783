"""resolve_recipe, run as KFP runs its function."""

from pathlib import Path

import pytest

from components.resolve_recipe.component import resolve_recipe
from molmo2core.recipe.load import from_json
from molmo2core.recipe.sections import TrainSection
from molmo2core.stages import resolve

TINY = (Path(__file__).parents[2] / "workflows" / "recipes" / "tiny.yaml").read_text()


def test_outputs_are_exactly_what_the_stage_returns() -> None:
    """The output names are written twice (signature and stage); a difference would fail only in a cluster."""
    resolved = resolve_recipe.python_func(recipe=TINY, overrides=["train.sft.steps=7"])
    expected = resolve.run(TINY, overrides=["train.sft.steps=7"])
    assert resolved._asdict() == expected
    assert set(resolve_recipe.component_spec.outputs) == set(expected)
    assert from_json(resolved.train_sft, TrainSection).training.steps == 7


def test_wrong_recipe_shows_its_message_first_and_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        resolve_recipe.python_func(recipe=TINY, overrides=["train.sft.stepz=7"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("RecipeError: --set train.sft.stepz=7: unknown key")
