"""Rules across sections: each case breaks one rule of a good recipe and must be told both numbers."""

from dataclasses import fields
from pathlib import Path

import pytest

from molmo2core.errors import RecipeError
from molmo2core.preprocessing.config import VisualGeometry
from molmo2core.recipe.check import check_recipe, image_tokens, largest_image_tokens, largest_video_tokens
from molmo2core.recipe.load import from_json, load_recipe
from molmo2core.recipe.sections import (
    EvaluateSection,
    ExportSection,
    PlanSection,
    RegisterSection,
    ShardSection,
    TrainSection,
    ValidateSection,
)
from molmo2core.stages import resolve
from molmo2core.training.config import TrainableParts

RECIPES = Path(__file__).parents[2] / "workflows" / "recipes"
TINY = (RECIPES / "tiny.yaml").read_text()
PARTS = [field.name for field in fields(TrainableParts)]
ADAPTED = ["train.sft.trainable.decoder=false"]


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
@pytest.mark.parametrize("profile", ["described", "released_code"])
def test_every_recipe_keeps_the_rules_in_both_profiles(path: Path, profile: str) -> None:
    check_recipe(load_recipe(path.read_text(), [f"profile={profile}"]))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.long_context.context_parallel=3"], ["long_context", "3 ranks per sequence with 2 ranks"]),
        (
            ["train.long_context.num_processes=4", "train.long_context.context_parallel=4"],
            ["4 ranks for 6 query heads"],
        ),
        (
            ["train.long_context.num_processes=3", "train.long_context.context_parallel=3"],
            ["3 ranks for", "2 key/value heads"],
        ),
        (["train.long_context.packing.sequence_tokens=1023"], ["sequence_tokens 1023", "context_parallel 2"]),
        (
            ["train.sft.num_processes=2", "train.sft.global_batch_packs=5"],
            ["5 packs over 2 data-parallel groups"],
        ),
        (["train.sft.validation.interval_steps=-1"], ["validation.interval_steps -1", "0 or more"]),
        (
            ["train.sft.validation.interval_steps=4", "train.sft.validation.generation_interval_steps=6"],
            ["generation_interval_steps 6 with interval_steps 4", "a multiple of interval_steps"],
        ),
        (["train.sft.validation.interval_steps=0"], ["generation_interval_steps 420 with interval_steps 0"]),
        (["train.sft.validation.examples_per_dataset=0"], ["validation.examples_per_dataset 0", "1 or more"]),
        (["train.sft.validation.split=train"], ["validation.split 'train'", "held out"]),
        (["train.sft.packing.crop_budget=7"], ["crop_budget 7", "max_frames 8"]),
        (["train.sft.packing.crop_budget=9"], ["crop_budget 9", "5 images x (1 + 1) crops = 10"]),
        (["train.sft.packing.sequence_tokens=8192"], ["sequence_tokens 8192", "max_position_embeddings 4096"]),
        (["train.sft.packing.sequence_tokens=125"], ["sequence_tokens 125", "5 images of 1 crops take 125"]),
        (
            ["train.sft.packing.sequence_tokens=220", "train.sft.preprocessing.max_frames=20"],
            ["sequence_tokens 220", "20 frames take about 220"],
        ),
        (["train.sft.mixture.text.datasets=[txt]"], ["'txt' of mixture.text", "not in data.manifests"]),
        (["train.sft.mixture.text.datasets=[captions]"], ["mixture.captions and mixture.text"]),
        (["train.sft.mixture.text.datasets=[]"], ["mixture.text without datasets"]),
        (["train.sft.mixture.text.rate=-1"], ["rate -1"]),
        (["train.sft.mixture={}"], ["rates that sum to 0"]),
        (["data.shapes.vocab_size=1000"], ["vocab_size 1000", "768 rows"]),
        (["evaluate.gate=[]"], ["a gate without rules"]),
        (["evaluate.gate.0.metric=f1"], ["'f1'", "<task>/<measure>"]),
        (["evaluate.preprocessing.max_frames=400"], ["400 frames", "max_position_embeddings 4096"]),
        (["train.sft.steps=-1"], ["steps -1"]),
        (["train.sft.num_processes=0"], ["num_processes 0"]),
        (["train.sft.precision=fp16"], ["'fp16'", "amp_bf16"]),
        (["train.sft.attention=flash"], ["attention 'flash' with precision 'fp32'", "amp_bf16"]),
        (["train.sft.sharding.precision=pure"], ["sharding.precision 'pure'", "precision 'fp32'", "amp_bf16"]),
        (["train.sft.activation_checkpointing.decoder=-1"], ["activation_checkpointing.decoder -1"]),
        (["train.sft.activation_checkpointing.on_host=true"], ["on_host without a checkpointed block"]),
        (["resources.train.gpu_gigabytes=-1"], ["resources.train.gpu_gigabytes -1"]),
        (["train.sft.dropout.residual=1.0"], ["dropout.residual 1.0"]),
        (["train.sft.spike_guard.window=0"], ["spike_guard.window 0"]),
        (["train.sft.spike_guard.factor=1.0"], ["spike_guard.factor 1.0"]),
        (["train.sft.spike_guard.least_rise=-0.5"], ["spike_guard.least_rise -0.5"]),
        (["train.sft.spike_guard.patience=-1"], ["spike_guard.patience -1"]),
        (["train.sft.peak_teraflops=-1.0"], ["peak_teraflops -1.0"]),
        (["resources.train.gpus=4"], ["num_processes 1", "resources.train.gpus 4"]),
        (["train.sft.preprocessing.max_fps=0"], ["max_fps 0"]),
        (["train.sft.preprocessing.max_tracking_fps=0"], ["max_tracking_fps 0"]),
        (["train.sft.preprocessing.frame_layout=frame_tokens"], ["'frame_tokens'", "'image_tokens'", "one layout"]),
        (["train.sft.preprocessing.max_set_crops=0"], ["max_set_crops 0"]),
        (["train.sft.preprocessing.high_res.probability=1.5"], ["high_res.probability 1.5"]),
        (["train.sft.preprocessing.high_res.datasets=[txt]"], ["'txt' of preprocessing.high_res", "mixture"]),
        (
            [
                "train.sft.preprocessing.high_res.datasets=[image_pointing]",
                "train.sft.preprocessing.high_res.max_crops=90",
            ],
            ["crop_budget", "1 images x (90 + 1) crops = 91"],
        ),
        (["evaluate.preprocessing.max_images=900"], ["900 images of 1 crops", "max_position_embeddings 4096"]),
        (["train.sft.optimizer.decoder.learning_rate=0.0"], ["optimizer.decoder.learning_rate 0.0", "freeze"]),
        (["train.sft.optimizer.connector.warmup_steps=-1"], ["optimizer.connector.warmup_steps -1"]),
        (["train.sft.optimizer.final_fraction=1.1"], ["final_fraction 1.1"]),
        (["train.sft.optimizer.betas=[0.9, 1.0]"], ["betas (0.9, 1.0)"]),
        (["train.sft.optimizer.eps=0.0"], ["eps 0.0"]),
        (["train.sft.optimizer.weight_decay=-0.1"], ["weight_decay -0.1"]),
        (["train.sft.optimizer.clip_norm=0.0"], ["clip_norm 0.0"]),
        (["train.sft.z_loss=-1e-4"], ["z_loss -0.0001"]),
        (["train.sft.log_interval_steps=0"], ["log_interval_steps 0"]),
        (["train.sft.loader_workers=-1"], ["loader_workers -1"]),
        (["train.sft.checkpoints_kept=0"], ["checkpoints_kept 0", "1 or more"]),
        (["train.sft.failed_saves_allowed=0"], ["failed_saves_allowed 0", "1 or more"]),
        (["train.sft.keep_every_steps=7"], ["keep_every_steps 7 with save_interval_steps", "multiple"]),
        ([f"train.sft.trainable.{part}=false" for part in PARTS], ["train.sft.trainable: every part is frozen"]),
        (["train.sft.low_rank.rank=4"], ["decoder_attention with trainable.decoder true", "either adapted or trained"]),
        ([*ADAPTED, "train.sft.low_rank.rank=0"], ["train.sft.low_rank.rank: 0", "1 or more"]),
        ([*ADAPTED, "train.sft.low_rank.alpha=0.0"], ["train.sft.low_rank.alpha: 0.0"]),
        ([*ADAPTED, "train.sft.low_rank.parts=[]"], ["train.sft.low_rank.parts: []", "at least one"]),
        ([*ADAPTED, "train.sft.low_rank.parts=[decoder_mlp, decoder_mlp]"], ["decoder_mlp", "each once"]),
        ([*ADAPTED, "train.sft.low_rank.parts=[connector]"], ["connector with trainable.connector true"]),
    ],
)  # fmt: skip
def test_broken_rule_is_told_with_both_numbers(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(RecipeError) as error:
        check_recipe(load_recipe(TINY, overrides))
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("changed", ["input_embedding", "output_head"])
def test_a_tied_matrix_cannot_be_frozen_and_trained(changed: str) -> None:
    """4B has one matrix for both; 8B has two, and may freeze either."""
    override = f"train.sft.trainable.{changed}=false"
    with pytest.raises(RecipeError, match=r"input_embedding (true|false) with output_head (true|false)"):
        check_recipe(load_recipe((RECIPES / "molmo2_4b.yaml").read_text(), [override]))
    check_recipe(load_recipe((RECIPES / "molmo2_8b.yaml").read_text(), [override]))


def test_zero_steps_are_allowed_here() -> None:
    """A recipe without training is refused by the gate with its reason, not before."""
    check_recipe(load_recipe(TINY, [f"train.{stage}.steps=0" for stage in ("pretrain", "sft", "long_context")]))


@pytest.mark.parametrize(
    ("rows", "columns", "tokens"), [(1, 1, 410), (2, 4, 1189), (1, 8, 1334), (4, 6, 2804), (1, 24, 3462)]
)
def test_image_tokens_are_the_fact_sheets(rows: int, columns: int, tokens: int) -> None:
    """data.md 0.1."""
    assert image_tokens(VisualGeometry(), rows, columns) == tokens


def test_largest_media() -> None:
    """No tiling within the limit may cost more; 128 frames take about 11.1-11.4k tokens, 384 just fit (model.md 5)."""
    geometry = VisualGeometry()
    all_tilings = [(rows, columns) for rows in range(1, 9) for columns in range(1, 9) if rows * columns <= 8]
    assert largest_image_tokens(geometry, 8) == max(image_tokens(geometry, *tiling) for tiling in all_tilings) == 1400
    assert 11_100 <= largest_video_tokens(geometry, 128) <= 11_400
    assert largest_video_tokens(geometry, 384) < 36_864


KINDS = {
    "validate": ValidateSection,
    "shard": ShardSection,
    "export": ExportSection,
    "evaluate": EvaluateSection,
    "register": RegisterSection,
    **{f"plan_{stage}": PlanSection for stage in ("pretrain", "sft", "long_context")},
    **{f"train_{stage}": TrainSection for stage in ("pretrain", "sft", "long_context")},
}


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_resolves_into_every_section(path: Path) -> None:
    resolved = resolve.run(path.read_text())
    sections = {name: from_json(resolved[name], kind) for name, kind in KINDS.items()}
    sizes = {name for name in resolved if name not in KINDS}
    assert sizes == {f"{step}_{what}" for step in resolve.SIZED_STEPS for what in ("cpus", "memory")} | {
        "train_gpus",
        "evaluate_gpus",
    }
    plan, train = sections["plan_sft"], sections["train_sft"]
    assert isinstance(plan, PlanSection) and isinstance(train, TrainSection)
    assert (plan.stage, train.stage) == ("sft", "sft")
    assert plan.num_packs == train.training.steps * train.training.global_batch_packs > 0


def test_validation_limits_are_the_widest_of_all_training_stages() -> None:
    section = from_json(
        resolve.run(TINY, overrides=["train.pretrain.preprocessing.max_images=2"])["validate"], ValidateSection
    )
    assert section.preprocessing_limits.max_frames == 16  # long_context
    assert section.preprocessing_limits.max_images == 5  # sft


def test_resolve_runs_alone_and_fails_with_a_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(RECIPES / "tiny.yaml")
    assert resolve.main(["--recipe", recipe, "--set", "seed=3", "--output", str(tmp_path)]) == 0
    assert from_json((tmp_path / "train_sft.json").read_text(), TrainSection).seed == 3
    assert resolve.main(["--recipe", recipe, "--set", "sead=3", "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("RecipeError: --set sead=3: unknown key 'sead'")
