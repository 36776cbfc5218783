"""Rules across sections of a recipe, which no config class can see.  Each error has both numbers and the rule."""

from __future__ import annotations

import math

from molmo2core.errors import RecipeError
from molmo2core.model.config import ModelConfig, named_config
from molmo2core.parallel.ranks import check_ranks
from molmo2core.preprocessing.config import PreprocessingConfig, VisualGeometry
from molmo2core.recipe.schema import Recipe, StageRecipe
from molmo2core.recipe.sections import STAGE_NAMES
from molmo2core.training.config import GroupSchedule, ValidationConfig, check_trained_parts

_FRAME_TEXT_TOKENS = 5
"""Tokens of the time stamp before a frame, "12.5 " with Qwen's one token per digit (data.md 0.1)."""


def check_recipe(recipe: Recipe, *, where: str = "recipe") -> None:
    """Check everything that can be known without data.

    Raises:
        RecipeError: the first rule that is broken.
    """
    model = named_config(recipe.model.size)
    for name in STAGE_NAMES:
        stage: StageRecipe = getattr(recipe.train, name)
        place = f"{where}: train.{name}"
        _check_numbers(stage, place)
        _check_optimizer(stage, place)
        check_trained_parts(stage, tied=model.decoder.tie_embeddings, where=place)
        _check_mixture(stage, recipe, place)
        _check_high_res(stage, place)
        _check_ranks(stage, model, place)
        _check_budgets(stage, model, place)
        _check_resources(stage, recipe, place)
        _check_layout(stage, recipe, place)
    _check_vocabulary(recipe, model, where)
    _check_evaluation(recipe, model, where)


def image_tokens(geometry: VisualGeometry, rows: int, columns: int) -> int:
    """Visual tokens of one image in `rows` x `columns` crops, low-resolution view included (data.md 0.1)."""
    rows_per_token, columns_per_token = geometry.image_pooling
    margin = sum(geometry.overlap_margins)
    window = geometry.grid - margin
    low = math.ceil(geometry.grid / rows_per_token) * math.ceil(geometry.grid / columns_per_token) + 2
    height = math.ceil((window * rows + margin) / rows_per_token)
    width = math.ceil((window * columns + margin) / columns_per_token)
    return low + height * (width + 1) + 2


def largest_image_tokens(geometry: VisualGeometry, max_crops: int) -> int:
    """Visual tokens of the image whose tiling costs most; a column token per row makes that the tallest one."""
    return max(image_tokens(geometry, rows, max_crops // rows) for rows in range(1, max_crops + 1))


def largest_video_tokens(geometry: VisualGeometry, max_frames: int) -> int:
    """Tokens of a video with `max_frames` frames, time stamps included."""
    patches = math.ceil(geometry.grid / geometry.video_pooling[0]) * math.ceil(
        geometry.grid / geometry.video_pooling[1]
    )
    return max_frames * (patches + 2 + _FRAME_TEXT_TOKENS)


def _require(holds: bool, place: str, found: str, expected: str, mend: str = "") -> None:
    if not holds:
        raise RecipeError(place, found=found, expected=expected, mend=mend)


def _check_numbers(stage: StageRecipe, place: str) -> None:
    _require(stage.steps >= 0, place, f"steps {stage.steps}", "0 or more")
    counts = ("global_batch_packs", "num_processes", "num_nodes", "context_parallel")
    saving = ("save_interval_steps", "checkpoints_kept", "failed_saves_allowed")
    for name in (*counts, *saving, "log_interval_steps"):
        value = getattr(stage, name)
        _require(value >= 1, place, f"{name} {value}", "1 or more")
    kept, interval = stage.keep_every_steps, stage.save_interval_steps
    _require(
        kept >= 0 and kept % interval == 0,
        place,
        f"keep_every_steps {kept} with save_interval_steps {interval}",
        "0, or a multiple of save_interval_steps: what was not saved cannot be kept",
    )
    for name in ("loader_workers", "threads_per_process"):
        value = getattr(stage, name)
        _require(value >= 0, place, f"{name} {value}", "0 or more")
    for name in ("sequence_tokens", "crop_budget", "window"):
        value = getattr(stage.packing, name)
        _require(value >= 1, place, f"packing.{name} {value}", "1 or more")
    _check_limits(stage.preprocessing, place)
    _require(stage.precision in ("fp32", "amp_bf16"), place, f"precision {stage.precision!r}", "fp32 or amp_bf16")
    _require(
        stage.attention != "flash" or stage.precision == "amp_bf16",
        place,
        f"attention 'flash' with precision {stage.precision!r}",
        "amp_bf16, since flash-attn takes half precision alone",
        "set precision to amp_bf16, or attention to auto",
    )
    sharding = stage.sharding.precision
    _require(
        sharding == "full" or stage.precision == "amp_bf16",
        place,
        f"sharding.precision {sharding!r} with precision {stage.precision!r}",
        "precision amp_bf16, which says what to round to",
        "set sharding.precision to full, or precision to amp_bf16",
    )
    for name in ("vision_encoder", "decoder"):
        value = getattr(stage.activation_checkpointing, name)
        _require(value >= 0, place, f"activation_checkpointing.{name} {value}", "every n-th block, or 0 for none")
    chosen = stage.activation_checkpointing
    _require(
        not chosen.on_host or bool(chosen.vision_encoder or chosen.connector or chosen.decoder),
        place,
        "activation_checkpointing.on_host without a checkpointed block",
        "blocks whose inputs go to the host",
        "set activation_checkpointing.decoder or vision_encoder to 1",
    )
    _check_validation(stage.validation, place)
    _check_watching(stage, place)
    for name in ("residual", "response_residual"):
        value = getattr(stage.dropout, name)
        _require(0 <= value < 1, place, f"dropout.{name} {value}", "a share, 0 <= p < 1")


def _check_watching(stage: StageRecipe, place: str) -> None:
    guard = stage.spike_guard
    _require(guard.window >= 1, place, f"spike_guard.window {guard.window}", "1 or more steps")
    _require(guard.factor > 1, place, f"spike_guard.factor {guard.factor}", "more than 1: a multiple of the mean loss")
    _require(guard.least_rise >= 0, place, f"spike_guard.least_rise {guard.least_rise}", "0 or more, in nats")
    _require(guard.patience >= 0, place, f"spike_guard.patience {guard.patience}", "0, for no guard, or more")
    _require(stage.peak_teraflops >= 0, place, f"peak_teraflops {stage.peak_teraflops}", "0 or more")


def _check_validation(validation: ValidationConfig, place: str) -> None:
    losses, answers = validation.interval_steps, validation.generation_interval_steps
    for name, least in (
        ("interval_steps", 0),
        ("generation_interval_steps", 0),
        ("examples_per_dataset", 1),
        ("generations_per_task", 1),
        ("max_new_tokens", 1),
    ):
        value = getattr(validation, name)
        _require(value >= least, place, f"validation.{name} {value}", f"{least} or more")
    _require(
        not answers or bool(losses and answers % losses == 0),
        place,
        f"validation.generation_interval_steps {answers} with interval_steps {losses}",
        "a multiple of interval_steps, since answers are given when losses are taken",
        "set both to 0 for no validation at all",
    )
    _require(validation.split != "train", place, "validation.split 'train'", "a split that is held out")


def _check_optimizer(stage: StageRecipe, place: str) -> None:
    optimizer = stage.optimizer
    for group in ("vision_encoder", "connector", "decoder"):
        schedule: GroupSchedule = getattr(optimizer, group)
        rate, warmup = schedule.learning_rate, schedule.warmup_steps
        _require(rate > 0, place, f"optimizer.{group}.learning_rate {rate}", "more than 0", "freeze it with trainable")
        _require(warmup >= 0, place, f"optimizer.{group}.warmup_steps {warmup}", "0 or more")
    for name, holds, expected in (
        ("final_fraction", 0 <= optimizer.final_fraction <= 1, "a share, 0 <= p <= 1"),
        ("betas", all(0 <= beta < 1 for beta in optimizer.betas), "two numbers, 0 <= beta < 1"),
        ("eps", optimizer.eps > 0, "more than 0"),
        ("weight_decay", optimizer.weight_decay >= 0, "0 or more"),
        ("clip_norm", optimizer.clip_norm > 0, "more than 0"),
    ):
        _require(holds, place, f"optimizer.{name} {getattr(optimizer, name)}", expected)
    _require(stage.z_loss >= 0, place, f"z_loss {stage.z_loss}", "0 or more")


def _check_limits(limits: PreprocessingConfig, place: str) -> None:
    for name in ("max_crops", "max_set_crops", "max_images", "max_frames", "max_fps", "max_tracking_fps"):
        value = getattr(limits, name)
        _require(value > 0, place, f"preprocessing.{name} {value}", "more than 0")
    high_res = limits.high_res
    for name, holds, expected in (
        ("probability", 0 <= high_res.probability <= 1, "a share, 0 <= p <= 1"),
        ("max_crops", high_res.max_crops > 0, "more than 0"),
    ):
        _require(holds, place, f"preprocessing.high_res.{name} {getattr(high_res, name)}", expected)


def _check_mixture(stage: StageRecipe, recipe: Recipe, place: str) -> None:
    known = recipe.data.manifests
    group_of: dict[str, str] = {}
    for name, group in stage.mixture.items():
        _require(group.rate >= 0, place, f"mixture.{name}.rate {group.rate}", "0 or more")
        _require(bool(group.datasets), place, f"mixture.{name} without datasets", "at least one")
        for dataset in group.datasets:
            _require(
                dataset in known,
                place,
                f"dataset {dataset!r} of mixture.{name} is not in data.manifests",
                f"one of {', '.join(known)}",
                f"add data.manifests.{dataset} or take it out of the mixture",
            )
            _require(
                dataset not in group_of,
                place,
                f"dataset {dataset!r} in mixture.{group_of.get(dataset)} and mixture.{name}",
                "each dataset in one group, or one of the two rates would be lost",
            )
            group_of[dataset] = name
    total = sum(group.rate for group in stage.mixture.values())
    _require(total > 0, place, f"mixture rates that sum to {total}", "at least one rate above 0")


def _check_ranks(stage: StageRecipe, model: ModelConfig, place: str) -> None:
    check_ranks(
        stage.world_size,
        stage.context_parallel,
        stage.global_batch_packs,
        model.decoder,
        ranks_per_node=stage.num_processes,
        where=place,
    )
    tokens = stage.packing.sequence_tokens
    _require(
        tokens % stage.context_parallel == 0,
        place,
        f"sequence_tokens {tokens} with context_parallel {stage.context_parallel}",
        "a sequence that context_parallel divides",
    )


def _check_budgets(stage: StageRecipe, model: ModelConfig, place: str) -> None:
    packing, limits = stage.packing, stage.preprocessing
    tokens, positions = packing.sequence_tokens, model.decoder.max_position_embeddings
    _require(
        tokens <= positions,
        place,
        f"sequence_tokens {tokens} with max_position_embeddings {positions}",
        "a sequence that the model has positions for",
    )
    _require(
        packing.crop_budget >= limits.max_frames,
        place,
        f"crop_budget {packing.crop_budget} with max_frames {limits.max_frames}",
        "a budget that one whole video fits into",
    )
    for what, images, max_crops in _largest_images(limits):
        crops, taken = images * (max_crops + 1), images * largest_image_tokens(model.geometry, max_crops)
        _require(
            packing.crop_budget >= crops,
            place,
            f"crop_budget {packing.crop_budget} with {images} images x ({max_crops} + 1) crops = {crops}",
            f"a budget that {what} fits into",
        )
        _require(
            tokens > taken,
            place,
            f"sequence_tokens {tokens}, while {images} images of {max_crops} crops take {taken}",
            f"a sequence that {what} and its text fit into",
            "raise packing.sequence_tokens or lower the crops or images of preprocessing",
        )
    video = largest_video_tokens(model.geometry, limits.max_frames)
    _require(
        tokens > images,
        place,
        f"sequence_tokens {tokens}, while {limits.max_images} images of {limits.max_crops} crops take {images}",
        "a sequence that one whole image set and its text fit into",
        "raise packing.sequence_tokens or lower preprocessing.max_crops or max_images",
    )
    _require(
        tokens > video,
        place,
        f"sequence_tokens {tokens}, while {limits.max_frames} frames take about {video}",
        "a sequence that one whole video and its text fit into",
        "raise packing.sequence_tokens or lower preprocessing.max_frames",
    )


def _largest_images(limits: PreprocessingConfig) -> list[tuple[str, int, int]]:
    """What the largest visual inputs are called, their images, and the crops of each image."""
    largest = [("one whole image set", limits.max_images, limits.image_crops("images", high_res=False))]
    largest.append(("one image", 1, limits.image_crops("image", high_res=bool(limits.high_res.datasets))))
    return largest


def _check_high_res(stage: StageRecipe, place: str) -> None:
    drawn = {dataset for group in stage.mixture.values() for dataset in group.datasets}
    for dataset in stage.preprocessing.high_res.datasets:
        _require(
            dataset in drawn,
            place,
            f"dataset {dataset!r} of preprocessing.high_res is not in the mixture",
            f"one of {', '.join(sorted(drawn))}",
        )


def _check_resources(stage: StageRecipe, recipe: Recipe, place: str) -> None:
    if "train" not in recipe.resources:
        return
    gpus = recipe.resources["train"].gpus
    _require(
        gpus in (0, stage.num_processes),
        place,
        f"num_processes {stage.num_processes} with resources.train.gpus {gpus}",
        "one process per GPU of a node, or no GPU at all",
    )
    memory = recipe.resources["train"].gpu_gigabytes
    _require(memory >= 0, place, f"resources.train.gpu_gigabytes {memory:g}", "0, for unknown, or more")


def _check_layout(stage: StageRecipe, recipe: Recipe, place: str) -> None:
    layout = stage.preprocessing.frame_layout
    _require(
        layout == recipe.evaluate.preprocessing.frame_layout,
        place,
        f"preprocessing.frame_layout {layout!r}, in evaluate {recipe.evaluate.preprocessing.frame_layout!r}",
        "one layout in training and evaluation",
    )


def _check_vocabulary(recipe: Recipe, model: ModelConfig, where: str) -> None:
    shapes, vocab_size = recipe.data.shapes, model.decoder.vocab_size
    if shapes is None or not recipe.model.tokenizer.startswith("corpus/"):
        return
    _require(
        shapes.vocab_size == vocab_size,
        where,
        f"data.shapes.vocab_size {shapes.vocab_size} with model size {recipe.model.size!r}, "
        f"whose vocabulary has {vocab_size} rows",
        "the same number, since the extra tokens follow the base vocabulary",
    )


def _check_evaluation(recipe: Recipe, model: ModelConfig, where: str) -> None:
    evaluation, place = recipe.evaluate, f"{where}: evaluate"
    _check_limits(evaluation.preprocessing, place)
    _require(
        bool(evaluation.gate),
        place,
        "a gate without rules",
        "at least one rule, or every model would be promoted",
    )
    for index, rule in enumerate(evaluation.gate):
        _require(
            "/" in rule.metric,
            place,
            f"gate.{index}.metric {rule.metric!r}",
            "<task>/<measure>, e.g. image_qa/accuracy",
        )
    positions = model.decoder.max_position_embeddings
    video = largest_video_tokens(model.geometry, evaluation.preprocessing.max_frames) + evaluation.max_new_tokens
    _require(
        video <= positions,
        place,
        f"{evaluation.preprocessing.max_frames} frames and {evaluation.max_new_tokens} new tokens take about {video} "
        f"tokens with max_position_embeddings {positions}",
        "a prompt that the model has positions for",
    )
    for what, images, max_crops in _largest_images(evaluation.preprocessing):
        taken = images * largest_image_tokens(model.geometry, max_crops) + evaluation.max_new_tokens
        _require(
            taken <= positions,
            place,
            f"{images} images of {max_crops} crops and {evaluation.max_new_tokens} new tokens take {taken} tokens with "
            f"max_position_embeddings {positions}",
            f"a prompt with {what} that the model has positions for",
        )
