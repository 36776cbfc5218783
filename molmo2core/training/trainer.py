"""One training stage under Composer: from a model and a loader to trained weights.

    batch (packs of this rank) -> microbatches -> hidden states -> weighted loss -> backward     per microbatch
    per-group clipping -> AdamW with per-group learning rates -> metrics -> checkpoint           per step

Several ranks shard parameters with FSDP2 over all of them; `context_parallel` neighbours share each sequence.
Everything needed to go on after a kill is in the run's folder.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch
from composer import Time, Trainer
from composer.devices import Device, DeviceCPU, DeviceGPU
from composer.utils import dist
from torch.utils.data import DataLoader

from molmo2core.errors import PlatformError, RecipeError
from molmo2core.examples import Batch
from molmo2core.loading.dataloader import worker_errors
from molmo2core.loading.held_out import HeldOutPacks
from molmo2core.model.molmo2 import Molmo2
from molmo2core.packing.config import PackingConfig
from molmo2core.training.batches import data_spec, packs_per_microbatch
from molmo2core.training.callbacks.checkpoint_writer import CheckpointWriter
from molmo2core.training.callbacks.graceful_stop import GracefulStop
from molmo2core.training.callbacks.group_clipping import GroupClipping
from molmo2core.training.callbacks.group_learning_rates import GroupLearningRates
from molmo2core.training.callbacks.held_out_answers import Answerer
from molmo2core.training.callbacks.late_reduction import LateReduction
from molmo2core.training.checkpoint_folders import CheckpointPlace
from molmo2core.training.checkpointing import check_not_past, checkpoint_to_load, readable, restore_records
from molmo2core.training.composer_guards import (
    average_gradients_on_gloo,
    check_fsdp2,
    name_the_processor_without_probing,
)
from molmo2core.training.composer_model import TrainedMolmo2
from molmo2core.training.config import COLLECTIVE_SECONDS, TrainingConfig
from molmo2core.training.optimizer import build_optimizer
from molmo2core.training.placement import place_model, sharding
from molmo2core.training.trainable import check_same_parts, select_trained
from molmo2core.training.validation import build_validation
from molmo2core.training.watching import watching_callbacks
from molmo2core.training.whole_weights import whole_weights


def start_ranks(config: TrainingConfig) -> tuple[Device, int, int]:
    """Join this node's process group; return the device, this rank's data-parallel group and its place in it.

    The two integers are the coordinates of the (dp, cp) mesh; ranks with equal first coordinate share sequences.

    Raises:
        RecipeError: the precision does not exist on this device.
    """
    device: Device = DeviceGPU() if torch.cuda.is_available() else DeviceCPU()
    if isinstance(device, DeviceCPU) and config.precision != "fp32":
        raise RecipeError(
            "training.precision", found=f"{config.precision!r} on a CPU", expected="'fp32'", mend="train on a GPU"
        )
    # A thread too many is far worse than one too few: every parallel region waits for the one that has no core
    # (measured on two busy cores: 0.35 s per step of the tiny model with one thread, 3.7 s with two).
    share = len(os.sched_getaffinity(0)) // dist.get_local_world_size() - config.loader_workers
    torch.set_num_threads(config.threads_per_process or max(1, share))
    if dist.get_world_size() > 1:
        dist.initialize_dist(device, timeout=COLLECTIVE_SECONDS)
    rank = dist.get_global_rank()
    return device, rank // config.context_parallel, rank % config.context_parallel


def train(
    model: Molmo2,
    loader: DataLoader[Batch],
    config: TrainingConfig,
    *,
    device: Device,
    folder: Path,
    metrics: Path,
    name: str,
    seed: int,
    packing: PackingConfig,
    held_out: HeldOutPacks | None = None,
    answerer: Answerer | None = None,
    store: str = "",
    resume_from: CheckpointPlace | None = None,
) -> dict[str, torch.Tensor] | None:
    """Train `model`, from the newest whole checkpoint in `folder` or `store` if there is one, to the last step.

    Args:
        model: the same weights on every rank, on CPU; or on rank 0 alone, and on the meta device on all others.
        loader: batches of this rank's packs; its dataset has `state_dict(num_samples, from_beginning)` and
            `load_state_dict`, where a sample is a pack of any rank.
        folder: where checkpoints go, the same for all ranks.
        metrics: file that rank 0 appends a line per step to (callbacks/metrics_file.py).
        name: what step lines begin with.
        packing: budgets of a pack.
        held_out: what losses are taken on at `config.validation.interval_steps`.
        answerer: on rank 0, who answers held-out questions at `config.validation.generation_interval_steps`.
        store: `s3://` prefix with copies of its checkpoints, for a machine that has none of them.
        resume_from: another training, whose newest checkpoint is taken if this one has none.

    Returns:
        On rank 0 all parameters on CPU, by Molmo2's names, adapters merged; None on other ranks.

    Raises:
        PlatformError: training was asked to stop; a checkpoint of the last step done is in `folder`.  Or several saves
            failed in a row.
        RecipeError: loss or gradients are not finite, or the checkpoint is of another model, other parts or more steps.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if config.steps == 0:
        return dict(model.state_dict()) if dist.get_global_rank() == 0 else None
    stop = GracefulStop()
    writer = CheckpointWriter(folder, config=config, records=metrics.parent, name=name)
    own = CheckpointPlace(folder=folder, store=store)
    checkpoint = checkpoint_to_load([own, resume_from] if resume_from is not None else [own])
    if checkpoint is not None:
        check_same_parts(checkpoint, model.config, config)
        check_not_past(checkpoint, config.steps)
    trainer = build_trainer(
        model,
        loader,
        config,
        device=device,
        folder=folder,
        metrics=metrics,
        name=name,
        seed=seed,
        packing=packing,
        held_out=held_out,
        answerer=answerer,
        checkpoint=checkpoint,
        writer=writer,
        stop=stop,
    )
    try:
        if trainer.state.timestamp.batch < config.steps:  # killed after the last step: only the weights are wanted
            with worker_errors():
                trainer.fit()
        step = int(trainer.state.timestamp.batch.value)
        stopped = stop.stopped and step < config.steps
        weights = None if stopped else whole_weights(trainer.state.model, config)
    except BaseException:
        # Trainer.close also waits for the other ranks, who may be waiting for what this one was about to do.
        trainer.engine.close()
        raise
    trainer.close()
    if stopped:
        mend = f"run it again to continue from step {writer.saved_step}"
        raise PlatformError(name, found=f"asked to stop after step {step} of {config.steps}", mend=mend)
    return weights


def build_trainer(
    model: Molmo2,
    loader: DataLoader[Batch],
    config: TrainingConfig,
    *,
    device: Device,
    folder: Path,
    metrics: Path,
    name: str,
    seed: int,
    packing: PackingConfig,
    held_out: HeldOutPacks | None,
    answerer: Answerer | None,
    checkpoint: Path | None,
    writer: CheckpointWriter,
    stop: GracefulStop,
) -> Trainer:
    """Composer's Trainer with every seam of DECISIONS D9, gone on from `checkpoint`; see `train`."""
    warnings.filterwarnings("ignore", message="FSDP2 Config/APIs are experimental")
    name_the_processor_without_probing()
    ranks = dist.get_world_size()
    context_rank = dist.get_global_rank() % config.context_parallel
    if ranks > 1 and isinstance(device, DeviceCPU):
        average_gradients_on_gloo()
    select_trained(model, config, seed=seed)
    place_model(model, config, "cuda" if isinstance(device, DeviceGPU) else "cpu")
    clipping = GroupClipping(config.optimizer.clip_norm)
    validation = None
    if held_out is not None:
        validation = build_validation(
            held_out,
            model,
            config,
            device=device,
            packing=packing,
            metrics=metrics,
            name=name,
            answerer=answerer,
        )
    model.train()
    if checkpoint is not None:
        restore_records(checkpoint, metrics.parent)
    with readable(checkpoint, ranks, folder) as load_path:
        trainer = Trainer(
            model=TrainedMolmo2(model, z_coefficient=config.z_loss, metrics=validation.metrics if validation else None),
            train_dataloader=data_spec(
                loader, model, config, context_rank, seed=seed, sequence_tokens=packing.sequence_tokens
            ),
            eval_dataloader=validation.evaluator if validation else None,
            spin_dataloaders=False,  # the loader finds its position itself, and held-out batches have none
            max_duration=Time.from_batch(config.steps),
            optimizers=build_optimizer(model, config.optimizer),
            algorithms=[clipping],
            callbacks=[
                GroupLearningRates(config.optimizer, config.steps),
                *([LateReduction()] if ranks > 1 and not config.sharding.reduce_every_pass else []),
                *watching_callbacks(
                    model,
                    config,
                    metrics=metrics,
                    name=name,
                    loader=loader,
                    packing=packing,
                    clipping=clipping,
                    counts=context_rank == 0,
                ),
                *(validation.callbacks if validation else ()),
                stop,
                writer,
            ],
            device=device,
            precision=config.precision,
            device_train_microbatch_size=packs_per_microbatch(config, device, packing.sequence_tokens),
            accumulate_train_batch_on_tokens=True,
            parallelism_config=sharding(config.sharding, ranks),
            seed=seed,
            dist_timeout=COLLECTIVE_SECONDS,
            run_name=name,
            progress_bar=False,
            load_path=load_path,
            load_progress_bar=False,
        )
    if ranks > 1:
        check_fsdp2(trainer.state)
    return trainer
