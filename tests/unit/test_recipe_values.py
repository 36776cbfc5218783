"""The three large recipes hold the described values, and with `profile: released_code` the published code's.

DECISIONS D4.  The tables are written from training_and_evaluation.md 1.1-1.7 and data.md 7, not from recipes.
"""

import operator
from pathlib import Path
from typing import Any

import pytest

from molmo2core.model.config import named_config
from molmo2core.recipe.load import flatten, load_recipe
from molmo2core.recipe.schema import Recipe

RECIPES = Path(__file__).parents[2] / "workflows" / "recipes"
SIZES = ("4b", "8b", "o_7b")
STAGES = ("pretrain", "sft", "long_context")
DESCRIBED, CODE = "described", "released_code"
CASES = [(size, profile, stage) for size in SIZES for profile in (DESCRIBED, CODE) for stage in STAGES]


def resolved(size: str, profile: str) -> Recipe:
    """A large recipe as a user gets it."""
    return load_recipe((RECIPES / f"molmo2_{size}.yaml").read_text(), [f"profile={profile}"])


RESOLVED = {(size, profile): resolved(size, profile) for size in SIZES for profile in (DESCRIBED, CODE)}
LARGE = {size: RESOLVED[size, DESCRIBED] for size in SIZES}

# Each row: stage 1, 2, 3; where profiles differ, a pair (described, released code).
STAGE_TABLE: dict[str, tuple[Any, Any, Any]] = {  # training_and_evaluation.md 1.1
    "steps": ((32_000, 31_000), (30_000, 300_000), 2_000),
    "global_batch_packs": (128, 128, 128),
    "packing.sequence_tokens": ((2_560, 2_536), 16_384, 36_864),
    "packing.crop_budget": (16, 128, 384),
    "preprocessing.max_frames": (16, 128, 384),
    "preprocessing.max_fps": (2.0, 2.0, 2.0),
    "preprocessing.max_crops": (8, 8, 8),
    "preprocessing.max_set_crops": (8, 8, 8),
    "preprocessing.max_images": (1, 5, 5),
    "preprocessing.style": ("style_and_length_v2", "demo_or_style_v2", "demo_or_style_v2"),
    "weighting": ("none", (DESCRIBED, CODE), (DESCRIBED, CODE)),
    "z_loss": (1e-4, 1e-4, 1e-4),
    "context_parallel": (1, 1, 8),
    "loader_workers": (2, 6, 4),
    # 1.1 and 1.3
    "optimizer.vision_encoder.learning_rate": (6e-6, 5e-6, 5e-6),
    "optimizer.connector.learning_rate": (2e-4, 5e-6, 5e-6),
    "optimizer.decoder.learning_rate": (2e-5, 1e-5, 1e-5),
    "optimizer.vision_encoder.warmup_steps": (2_000, 200, 200),
    "optimizer.connector.warmup_steps": (200, 200, 200),
    "optimizer.decoder.warmup_steps": (2_000, 200, 200),
    "optimizer.final_fraction": (0.1, 0.1, 0.1),
    "optimizer.betas": ((0.9, 0.95), (0.9, 0.95), (0.9, 0.95)),
    "optimizer.eps": (1e-6, 1e-6, 1e-6),
    "optimizer.weight_decay": (0.0, 0.0, 0.0),
    "optimizer.clip_norm": (1.0, 1.0, 1.0),
    # 1.4; the head of 4B is its input embedding, and frozen with it (see the test)
    "trainable.input_embedding": ((True, False), (True, False), (True, False)),
    "trainable.final_norm": (True, True, True),
    "trainable.vision_encoder": (True, True, True),
    "trainable.connector": (True, True, True),
    "trainable.decoder": (True, True, True),
    "low_rank": (None, None, None),
    # 1.1 and 1.7
    "precision": ("amp_bf16", "amp_bf16", "amp_bf16"),
    "sharding.precision": ("full", ("full", "pure"), "full"),
    "activation_checkpointing.vision_encoder": (1, 1, 1),
    "activation_checkpointing.connector": (True, True, True),
    "activation_checkpointing.decoder": (1, 1, 1),
    # 1.6: as configured; what it does is in official_compat
    "dropout.residual": (0.0, 0.1, 0.1),
    "dropout.response_residual": (0.1, 0.0, 0.0),
    "dropout.official_compat": (False, (False, True), (False, True)),
    "dropout.on_responses": (0.1, (0.0, 0.1), (0.0, 0.1)),
}
SHARES = {  # 1.2, (described, released code)
    "pretrain": {"captions": (60, 60), "image_pointing": (30, 30), "text": (10, 10)},
    "sft": {
        "image_qa": (22.7, 25), "video_qa": (18.2, 20), "video_pointing": (13.6, 15), "tracking": (13.6, 15),
        "captions": (13.6, 15), "image_pointing": (9.1, 10), "text": (9.1, 9.95),
    },
}  # fmt: skip
SHARES["long_context"] = SHARES["sft"]
MEMBERS = {
    "image_qa": 32,
    "video_qa": 34,
    "video_pointing": 4,
    "tracking": 35,
    "captions": 6,
    "image_pointing": 5,
    "text": 1,
}


@pytest.fixture(params=LARGE)
def recipe(request: pytest.FixtureRequest) -> Recipe:
    return LARGE[request.param]


@pytest.mark.parametrize(("size", "profile", "stage"), CASES)
def test_stage_resolves_to_the_values_of_the_fact_sheet(size: str, profile: str, stage: str) -> None:
    """For every size, stage and profile.  Would catch a value that was mended in one place of four, and an alternative
    that names a key which something else overrides."""
    recipe = RESOLVED[size, profile]
    found = getattr(recipe.train, stage)
    for name, row in STAGE_TABLE.items():
        value = row[STAGES.index(stage)]
        if isinstance(value, tuple) and name != "optimizer.betas":
            value = value[profile == CODE]
        assert operator.attrgetter(name)(found) == value, name
    trains_head = not (profile == CODE and named_config(recipe.model.size).decoder.tie_embeddings)
    assert found.trainable.output_head == trains_head
    assert {name: group.rate for name, group in found.mixture.items()} == {
        name: rates[profile == CODE] for name, rates in SHARES[stage].items()
    }
    assert recipe.seed == 6198


def test_only_4b_is_tied() -> None:
    """What the rule about its head above stands on."""
    assert [named_config(LARGE[size].model.size).decoder.tie_embeddings for size in SIZES] == [True, False, False]


@pytest.mark.parametrize("size", SIZES)
def test_shares_of_the_code_are_the_described_ones_unrounded(size: str) -> None:
    """The description prints tenths of a percent: a rate mistaken by one would show."""
    code = RESOLVED[size, CODE].train.sft.mixture
    total = sum(group.rate for group in code.values())
    for name, group in RESOLVED[size, DESCRIBED].train.sft.mixture.items():
        assert 100 * code[name].rate / total == pytest.approx(group.rate, abs=0.06), name


def test_groups_have_as_many_datasets_as_published(recipe: Recipe) -> None:
    assert {name: len(group.datasets) for name, group in recipe.train.sft.mixture.items()} == MEMBERS
    assert recipe.train.long_context.mixture == recipe.train.sft.mixture
    used = {
        d for stage in ("pretrain", "sft") for g in getattr(recipe.train, stage).mixture.values() for d in g.datasets
    }
    assert used == set(recipe.data.manifests)


def test_the_tiny_recipe_has_every_stage_in_small() -> None:
    """Its third stage shares longer sequences with more frames between two processes, on the mixture of the second, as
    the large recipes do between eight."""
    train = load_recipe((RECIPES / "tiny.yaml").read_text()).train
    for stages in (train, *(recipe.train for recipe in LARGE.values())):
        long, before = stages.long_context, stages.sft
        assert long.context_parallel == long.num_processes > before.context_parallel == 1
        assert long.mixture == before.mixture
        assert 0 < long.steps < before.steps
        assert long.packing.sequence_tokens > before.packing.sequence_tokens
        assert long.preprocessing.max_frames > before.preprocessing.max_frames
    assert train.long_context.context_parallel == 2


def test_inference_limits(recipe: Recipe) -> None:
    limits = recipe.evaluate.preprocessing
    assert (limits.max_crops, limits.max_images, limits.max_frames, limits.max_fps) == (24, 20, 384, 2.0)
    assert (limits.image_crops("image", high_res=False), limits.image_crops("images", high_res=False)) == (24, 8)


@pytest.mark.parametrize("stage", ["sft", "long_context"])
def test_high_resolution_is_drawn_for_single_images_that_are_pointed_at(recipe: Recipe, stage: str) -> None:
    """model.md 4.4; stage 1 has no room for 24 crops."""
    found = getattr(recipe.train, stage)
    high_res, pointing = found.preprocessing.high_res, found.mixture["image_pointing"].datasets
    assert (high_res.probability, high_res.max_crops) == (0.3, 24)
    assert set(high_res.datasets) == set(pointing) - {"pixmo_multi_points"}
    assert not recipe.train.pretrain.preprocessing.high_res.datasets
    assert found.preprocessing.image_crops("images", high_res=True) == 8


def test_world_sizes_divide_the_batch_as_published() -> None:
    """Table 14: 32 or 64 GPUs in stage 1, 128 in stages 2 and 3."""
    assert [LARGE[size].train.pretrain.world_size for size in LARGE] == [32, 64, 64]
    assert all(r.train.sft.world_size == r.train.long_context.world_size == 128 for r in LARGE.values())


def test_recipes_differ_only_in_what_the_size_decides() -> None:
    """A value mended in one file and forgotten in the others would show here."""
    leaves = [flatten(recipe) for recipe in LARGE.values()]
    differing = {key for key in leaves[0] if len({str(leaf.get(key)) for leaf in leaves}) > 1}
    assert differing == {
        "name", "description", "workspace", "model.size", "model.tokenizer", "model.initialize_from.decoder",
        "train.pretrain.num_nodes", "register.experiment", "register.model_name",
    } | {
        f"alternatives.train.{stage}.trainable.output_head.{field}"
        for stage in STAGES for field in ("described", "paper", "released_code", "note")
    }  # fmt: skip
    assert [recipe.model.size for recipe in LARGE.values()] == ["4b", "8b", "o-7b"]
    assert all(named_config(recipe.model.size).decoder.max_position_embeddings >= 36_864 for recipe in LARGE.values())


def test_every_known_disagreement_is_recorded(recipe: Recipe) -> None:
    alternatives = {path: (a.described, a.released_code) for path, a in recipe.alternatives.items()}
    assert alternatives["train.pretrain.steps"] == (32_000, 31_000)
    assert alternatives["train.pretrain.packing.sequence_tokens"] == (2_560, 2_536)
    assert alternatives["train.sft.steps"] == (30_000, 300_000)
    assert alternatives["train.sft.weighting"] == ("described", "released_code")
    assert alternatives["train.sft.dropout.official_compat"] == (False, True)
    assert alternatives["train.sft.trainable.input_embedding"] == (True, False)
    assert recipe.alternatives["train.pretrain.optimizer.decoder.learning_rate"].paper == 2e-4
    assert "frozen embedding" not in recipe.not_reproduced
    marks = (RECIPES / f"molmo2_{recipe.model.size.replace('-', '_')}.yaml").read_text().count("# (*)")
    assert marks >= 8
