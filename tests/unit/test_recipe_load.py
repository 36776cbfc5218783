"""Strict recipes: each test is a mistake that a loose loader would let through."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molmo2core.errors import RecipeError
from molmo2core.packing.config import PackingConfig
from molmo2core.recipe.difference import difference_lines
from molmo2core.recipe.fingerprint import recipe_fingerprint
from molmo2core.recipe.load import flatten, from_json, load_recipe, read_recipe, to_json
from molmo2core.recipe.schema import Recipe
from molmo2core.training.config import OptimizerConfig

RECIPES = Path(__file__).parents[2] / "workflows" / "recipes"
TINY = (
    RECIPES.parents[1] / "tests" / "golden" / "small_recipe.yaml"
).read_text()  # not tiny.yaml: its numbers are tuned
LARGE = (RECIPES / "molmo2_4b.yaml").read_text()


def line_of(text: str, part: str) -> int:
    return next(number for number, line in enumerate(text.splitlines(), 1) if part in line)


def refused(text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as error:
        load_recipe(text, overrides, where="my.yaml")
    return str(error.value)


def test_unknown_key_names_line_and_nearest_key() -> None:
    text = TINY.replace("    global_batch_packs: 4\n", "    global_batch_pakcs: 4\n", 1)
    message = refused(text)
    assert f"my.yaml:{line_of(text, 'pakcs')}: unknown key 'train.pretrain.global_batch_pakcs'" in message
    assert "did you mean 'global_batch_packs'?" in message


def test_unknown_key_inside_a_tuple_of_rules_is_found() -> None:
    message = refused(TINY.replace("margin_over_blind: 0.2", "margin_over_blnd: 0.2"))
    assert "evaluate.gate.0.margin_over_blnd" in message and "did you mean 'margin_over_blind'?" in message


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("seed: 0\n", "seed: zero\n", ['seed is "zero"', "a valid integer"]),
        ("seed: 0\n", "seed: 4.0\n", ["seed is 4.0", "a valid integer"]),
        ("seed: 0\n", "seed: true\n", ["seed is true", "a valid integer"]),
        ("seed: 0\n", "seed: '4'\n", ['seed is "4"', "a valid integer"]),
        ("size: tiny", "size: 5b", ['model.size is "5b"', "'tiny'"]),
        ("name: tiny\n", "name: 7\n", ["name is 7", "a valid string"]),
        ("workspace: runs/tiny\n", "", ["no key 'workspace'", "add 'workspace'"]),
        ("datasets: [captions]", "datasets: captions", ["mixture.captions.datasets", "a valid array"]),
    ],
)
def test_wrong_values_are_named_never_converted(old: str, new: str, words: list[str]) -> None:
    assert old in TINY
    message = refused(TINY.replace(old, new, 1))
    assert all(word in message for word in ["my.yaml", *words]), message


def test_wrong_type_names_its_line() -> None:
    text = TINY.replace("steps: 300", "steps: many", 1)
    assert f"my.yaml:{line_of(text, 'steps: many')}: train.pretrain.steps" in refused(text)


def test_duplicate_key_is_refused_with_both_lines() -> None:
    text = TINY + "\nseed: 1\n"
    message = refused(text)
    assert f"my.yaml:{line_of(text, 'seed: 1')}" in message and f"line {line_of(text, 'seed: 0')}" in message


@pytest.mark.parametrize("text", ["", "- a", "a: [1", "a: &a [*a]", "? [1]\n: 2", "1: 2", "just words"])
def test_text_that_is_no_recipe_is_a_recipe_error(text: str) -> None:
    assert refused(text).startswith("my.yaml")


def test_numbers_read_as_yaml_1_2() -> None:
    """PyYAML alone reads 1e-3 as a string and would refuse every learning rate written so."""
    recipe = load_recipe(TINY)
    assert recipe.train.pretrain.optimizer.vision_encoder.learning_rate == 0.001
    assert recipe.shards.shard_bytes == 4_194_304
    assert load_recipe(TINY, ["name=on"]).name == "on"
    assert load_recipe(TINY, ["name=12:30"]).name == "12:30"


def test_override_of_an_aliased_mapping_changes_one_stage_only() -> None:
    """sft and long_context share one anchor: setting one must not silently set the other."""
    recipe = load_recipe(TINY, ["train.sft.mixture.text.rate=50"])
    assert recipe.train.sft.mixture["text"].rate == 50
    assert recipe.train.long_context.mixture["text"].rate == 9.1


def test_merge_keys_work_and_point_at_the_merging_place() -> None:
    text = TINY.replace("    optimizer: *tiny_optimizer", "    optimizer: {<<: *tiny_optimizer, clip_norm: 2.0}", 1)
    assert load_recipe(text).train.sft.optimizer.clip_norm == 2.0
    assert load_recipe(text).train.sft.optimizer.decoder == load_recipe(TINY).train.sft.optimizer.decoder


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.sft.stepz=5", ["--set train.sft.stepz=5", "did you mean 'steps'?"]),
        ("train.sft.steps", ["path.to.key=value"]),
        ("train.sft.steps=5.5", ["--set train.sft.steps=5.5", "valid integer"]),
        ("train.sft.steps.more=5", ["is a single value"]),
        ("evaluate.gate.7.minimum=1", ["evaluate.gate.7"]),
        ("evaluate.gate.7=1", ["index 7"]),
        ("=5", ["path.to.key=value"]),
        ("train.sft.steps=[", ["--set train.sft.steps", "YAML"]),
        ("data.manifests={text: 5}", ["--set data.manifests=", "data.manifests.text is 5"]),  # not a line of the file
    ],
)
def test_wrong_override_names_itself(override: str, words: list[str]) -> None:
    message = refused(TINY, override)
    assert all(word in message for word in words), message


def test_overrides_are_typed_and_the_difference_is_printed() -> None:
    old = load_recipe(TINY)
    new = load_recipe(
        TINY, ["train.sft.steps=5", "evaluate.gate.0.minimum=0.9", "data.shapes.images=50", "train.sft.steps=6"]
    )
    assert difference_lines(old, new) == [
        "data.shapes.images: 1000 -> 50",
        "train.sft.steps: 300 -> 6",
        "evaluate.gate.0.minimum: 0.5 -> 0.9",
    ]
    assert difference_lines(old, load_recipe(TINY, ["data.shapes=null"]))[-1] == "data.shapes: (not set) -> null"


def test_profile_released_code_puts_the_codes_values_in_place() -> None:
    described, code = load_recipe(LARGE), load_recipe(LARGE, ["profile=released_code"])
    assert (described.train.pretrain.steps, code.train.pretrain.steps) == (32_000, 31_000)
    assert (described.train.sft.weighting, code.train.sft.weighting) == ("described", "released_code")
    assert (described.train.sft.dropout.on_responses, code.train.sft.dropout.on_responses) == (0.0, 0.1)
    changed = {line.split(":")[0] for line in difference_lines(described, code)}
    differing = {path for path, a in described.alternatives.items() if a.described != a.released_code}
    assert changed == differing | {"profile"}


def test_override_wins_over_the_profile_whatever_the_order() -> None:
    for overrides in (
        ["profile=released_code", "train.pretrain.steps=7"],
        ["train.pretrain.steps=7", "profile=released_code"],
    ):
        assert load_recipe(LARGE, overrides).train.pretrain.steps == 7


def test_tree_that_left_its_described_value_is_refused() -> None:
    """Otherwise `alternatives` would claim sources for a value that is no longer there."""
    message = refused(LARGE.replace("    steps: 32_000", "    steps: 5", 1))
    assert "train.pretrain.steps is described as 32000" in message and "has 5" in message


def test_alternative_of_a_key_that_does_not_exist_is_refused() -> None:
    assert "no key 'train.sft.stepz'" in refused(LARGE.replace("  train.sft.steps:", "  train.sft.stepz:"))


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_json_round_trip_is_the_identity(path: Path) -> None:
    recipe = load_recipe(path.read_text())
    assert from_json(to_json(recipe), Recipe) == recipe


@given(
    st.builds(
        PackingConfig,
        sequence_tokens=st.integers(1, 10**6),
        crop_budget=st.integers(1, 10**4),
        window=st.integers(1, 10**6),
    )
)
def test_sections_survive_json_exactly(config: PackingConfig) -> None:
    back = from_json(to_json(config), PackingConfig)
    assert back == config and all(type(value) is int for value in dataclasses.astuple(back))


def test_integer_that_came_back_as_float_is_refused_in_a_section() -> None:
    """A KFP dict parameter turns 4 into 4.0; a section must never be read from one."""
    values = json.loads(to_json(PackingConfig(sequence_tokens=4, crop_budget=4)))
    with pytest.raises(RecipeError, match=r"PackingConfig\.crop_budget: crop_budget is 4\.0"):
        from_json(json.dumps(values | {"crop_budget": 4.0}), PackingConfig)
    with pytest.raises(RecipeError, match="unknown key 'crops'"):
        from_json(json.dumps(values | {"crops": 4}), PackingConfig)
    with pytest.raises(RecipeError, match="no JSON"):
        from_json("{", PackingConfig)


def test_tuples_come_back_as_tuples() -> None:
    optimizer = load_recipe(TINY).train.sft.optimizer
    assert from_json(to_json(optimizer), OptimizerConfig).betas == (0.9, 0.95)


def test_fingerprint_sees_every_computed_value_and_nothing_else() -> None:
    plain = load_recipe(TINY)
    base = recipe_fingerprint(plain)
    for override in ("workspace=/elsewhere", "description=words", "register.experiment=other", "name=other"):
        assert recipe_fingerprint(load_recipe(TINY, [override])) == base
    for override in ("seed=1", "train.sft.z_loss=0", "data.shapes.images=999", "evaluate.gate.0.minimum=0.51"):
        assert recipe_fingerprint(load_recipe(TINY, [override])) != base, override
    assert len({recipe_fingerprint(load_recipe(TINY, [f"seed={seed}"])) for seed in range(20)}) == 20


def test_flatten_reaches_every_leaf() -> None:
    leaves = flatten(load_recipe(TINY))
    assert leaves["train.sft.optimizer.betas.1"] == 0.95 and leaves["resources"] == {}


def test_unreadable_recipe_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="No such file"):
        read_recipe(tmp_path / "none.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="no text"):
        read_recipe(tmp_path / "bytes.yaml")


def test_importing_recipes_imports_no_torch() -> None:
    """resolve_recipe runs in a small image without torch, and must answer within seconds."""
    program = (
        "import sys, molmo2core.recipe.load, molmo2core.recipe.check, molmo2core.stages.resolve;"
        "print([name for name in ('torch', 'streaming', 'composer', 'transformers', 'mlflow') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"
