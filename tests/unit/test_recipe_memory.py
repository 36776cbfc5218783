"""What resolving a recipe says about the memory of GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest

from molmo2core.errors import RecipeError
from molmo2core.recipe.check import check_recipe
from molmo2core.recipe.load import load_recipe
from molmo2core.recipe.memory import main, memory_lines, stage_memory
from molmo2core.stages import resolve

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "workflows" / "recipes"
ONE_NODE = ["train.long_context.num_nodes=1", "train.long_context.context_parallel=1"]


def lines_of(name: str, *overrides: str) -> list[str]:
    return list(memory_lines(load_recipe((RECIPES / f"{name}.yaml").read_text(), overrides)))


def test_a_stage_that_gpus_cannot_hold_is_told_at_resolve_time(capsys: pytest.CaptureFixture[str]) -> None:
    """8B's long videos on one GPU each: not with 80 GB, with 141."""
    resolve.run((RECIPES / "molmo2_8b.yaml").read_text(), overrides=ONE_NODE)
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in told] == ["memory", "memory", "memory", "warning"]
    assert "train.long_context: more than resources.train.gpu_gigabytes 80" in told[-1]
    assert not any("warning" in line for line in lines_of("molmo2_8b", *ONE_NODE, "resources.train.gpu_gigabytes=141"))
    assert not any("warning" in line for line in lines_of("molmo2_8b", *ONE_NODE, "resources.train.gpu_gigabytes=0"))


@pytest.mark.parametrize("name", ["molmo2_4b", "molmo2_8b", "molmo2_o_7b", "molmo2_4b_lora", "molmo2_4b_frozen_vision"])
def test_recipes_fit_the_gpus_that_they_name(name: str) -> None:
    told = lines_of(name)
    assert told and all(line.startswith("memory ") for line in told)


def test_a_recipe_without_gpus_is_told_nothing() -> None:
    assert lines_of("tiny") == []


def test_sharing_a_sequence_divides_activations() -> None:
    """Of eight ranks on one node: state is the same, activations fall to an eighth but for the loss and the mask."""
    recipe = load_recipe((RECIPES / "molmo2_8b.yaml").read_text())
    alone, shared = (stage_memory(recipe, "long_context", ranks=8, context_parallel=size) for size in (1, 8))
    assert shared.state == alone.state
    assert alone.kept / 8 <= shared.kept < 1.01 * alone.kept / 8
    assert alone.decoder_block / 8 <= shared.decoder_block < 1.2 * alone.decoder_block / 8


def test_memory_below_nothing_is_an_error() -> None:
    recipe = load_recipe((RECIPES / "molmo2_4b.yaml").read_text(), ["resources.train.gpu_gigabytes=-1"])
    with pytest.raises(RecipeError, match=r"gpu_gigabytes -1"):
        check_recipe(recipe)


def test_ranks_that_cannot_share_are_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(RECIPES / "molmo2_4b.yaml"), "--ranks", "8", "--context-parallel", "3"]) == 2
    assert "3 ranks per sequence with 8 ranks" in capsys.readouterr().err


def test_the_page_has_the_table_that_is_computed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers in prose rot: this is the command that the page names."""
    monkeypatch.chdir(RECIPES)
    sizes = ["molmo2_4b.yaml", "molmo2_8b.yaml", "molmo2_o_7b.yaml"]
    assert main([*sizes, "--ranks", "8", "--context-parallel", "1", "2", "4", "8"]) == 0
    assert main(sizes) == 0
    page = (ROOT / "docs" / "long_context.md").read_text()
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 17
    assert all(f"    {line.rstrip()}\n" in page for line in shown), "\n".join(shown)
