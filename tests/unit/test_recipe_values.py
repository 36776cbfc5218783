"""The three large recipes hold the described values (DECISIONS D4; training_and_evaluation.md 1.1, 1.2; data.md 7)."""

from pathlib import Path

import pytest

from molmo2core.model.config import named_config
from molmo2core.recipe.load import flatten, load_recipe
from molmo2core.recipe.schema import Recipe

RECIPES = Path(__file__).parents[2] / "workflows" / "recipes"
LARGE = {size: load_recipe((RECIPES / f"molmo2_{size}.yaml").read_text()) for size in ("4b", "8b", "o_7b")}

COMMON = {  # each stage: steps, batch, tokens, crops of a pack, frames, crops, images, fps, context parallel
    "pretrain": (32_000, 128, 2_560, 16, 16, 8, 1, 2.0, 1),
    "sft": (30_000, 128, 16_384, 128, 128, 8, 5, 2.0, 1),
    "long_context": (2_000, 128, 36_864, 384, 384, 8, 5, 2.0, 8),
}
LEARNING_RATES = {  # vision encoder, connector, decoder; then warm-up steps in the same order
    "pretrain": ((6e-6, 2e-4, 2e-5), (2000, 200, 2000)),
    "sft": ((5e-6, 5e-6, 1e-5), (200, 200, 200)),
    "long_context": ((5e-6, 5e-6, 1e-5), (200, 200, 200)),
}
SHARES = {
    "pretrain": {"captions": 60, "image_pointing": 30, "text": 10},
    "sft": {
        "image_qa": 22.7, "video_qa": 18.2, "video_pointing": 13.6, "tracking": 13.6, "captions": 13.6,
        "image_pointing": 9.1, "text": 9.1,
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
DROPOUT = {"pretrain": (0.0, 0.1), "sft": (0.1, 0.0), "long_context": (0.1, 0.0)}  # elsewhere, on response tokens


@pytest.fixture(params=LARGE)
def recipe(request: pytest.FixtureRequest) -> Recipe:
    return LARGE[request.param]


@pytest.mark.parametrize("stage", COMMON)
def test_stage_has_the_described_values(recipe: Recipe, stage: str) -> None:
    found = getattr(recipe.train, stage)
    limits = found.preprocessing
    assert COMMON[stage] == (
        found.steps, found.global_batch_packs, found.packing.sequence_tokens, found.packing.crop_budget,
        limits.max_frames, limits.max_crops, limits.max_images, limits.max_fps, found.context_parallel,
    )  # fmt: skip
    groups = (found.optimizer.vision_encoder, found.optimizer.connector, found.optimizer.decoder)
    assert tuple(g.learning_rate for g in groups) == LEARNING_RATES[stage][0]
    assert tuple(g.warmup_steps for g in groups) == LEARNING_RATES[stage][1]
    assert {name: group.rate for name, group in found.mixture.items()} == SHARES[stage]
    assert (found.dropout.residual, found.dropout.response_residual) == DROPOUT[stage]
    assert (found.optimizer.betas, found.optimizer.eps, found.optimizer.weight_decay) == ((0.9, 0.95), 1e-6, 0.0)
    assert (found.optimizer.final_fraction, found.optimizer.clip_norm, found.z_loss) == (0.1, 1.0, 1e-4)
    assert found.weighting == ("none" if stage == "pretrain" else "described")
    assert limits.style == ("style_and_length_v2" if stage == "pretrain" else "demo_or_style_v2")


def test_groups_have_as_many_datasets_as_published(recipe: Recipe) -> None:
    assert {name: len(group.datasets) for name, group in recipe.train.sft.mixture.items()} == MEMBERS
    assert recipe.train.long_context.mixture == recipe.train.sft.mixture
    used = {
        d for stage in ("pretrain", "sft") for g in getattr(recipe.train, stage).mixture.values() for d in g.datasets
    }
    assert used == set(recipe.data.manifests)


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
        "train.pretrain.num_nodes", "register.experiment", "register.model_name", "not_reproduced.frozen embedding",
    }  # fmt: skip
    assert [recipe.model.size for recipe in LARGE.values()] == ["4b", "8b", "o-7b"]
    assert all(named_config(recipe.model.size).decoder.max_position_embeddings >= 36_864 for recipe in LARGE.values())


def test_every_known_disagreement_is_recorded(recipe: Recipe) -> None:
    alternatives = {path: (a.described, a.released_code) for path, a in recipe.alternatives.items()}
    assert alternatives["train.pretrain.steps"] == (32_000, 31_000)
    assert alternatives["train.pretrain.packing.sequence_tokens"] == (2_560, 2_536)
    assert alternatives["train.sft.steps"] == (30_000, 300_000)
    assert alternatives["train.sft.weighting"] == ("described", "released_code")
    assert alternatives["train.sft.dropout.response_residual"] == (0.0, 0.1)
    assert recipe.alternatives["train.pretrain.optimizer.decoder.learning_rate"].paper == 2e-4
    assert "frozen embedding" in recipe.not_reproduced
    marks = (RECIPES / f"molmo2_{recipe.model.size.replace('-', '_')}.yaml").read_text().count("# (*)")
    assert marks >= 8
