"""Seconds per training step of the tiny model on this CPU: the trainer, one pack per pass, and a bare torch loop.

    python benchmarks/training_step.py [--steps 40] [--tokens 384] [--packs 4]

The bare loop does forward, loss, backward and AdamW over the same merged packs and nothing else, so the trainer's
distance to it is what Composer, clipping, metrics and the loader of ready-made packs cost.  The last line is the
ratio of packs merged into one pass over one pack per pass.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from unittest import mock

from molmo2core.model.attention import AttentionMask
from molmo2core.model.loss import weighted_loss
from molmo2core.packing.config import PackingConfig
from molmo2core.testing.tiny_model import tiny_model
from molmo2core.testing.training import pack_loader, training_config
from molmo2core.training import batches, trainer
from molmo2core.training.config import TrainingConfig
from molmo2core.training.microbatch import MicrobatchMaker
from molmo2core.training.optimizer import build_optimizer


def trained_seconds(config: TrainingConfig, tokens: int, merged_tokens: int) -> float:
    """Median seconds of a step under Composer, with passes of at most `merged_tokens`."""
    device, _, _ = trainer.start_ranks(config)
    model = tiny_model()
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(batches, "MERGED_TOKENS", merged_tokens):
        metrics = Path(folder) / "metrics.jsonl"
        trainer.train(
            model,
            pack_loader(model.config, config, tokens=tokens, images=2),
            config,
            device=device,
            folder=Path(folder),
            metrics=metrics,
            name="benchmark",
            seed=0,
            packing=PackingConfig(sequence_tokens=tokens, crop_budget=2),
        )
        return median(json.loads(line)["seconds"] for line in metrics.read_text().splitlines()[2:])


def bare_seconds(config: TrainingConfig, tokens: int) -> float:
    """Median seconds of a step of a loop that does only what must be done."""
    model = tiny_model().train()
    optimizer = build_optimizer(model, config.optimizer)
    maker = MicrobatchMaker(im_patch_id=model.im_patch_id, dropout=config.dropout)
    batches = iter(pack_loader(model.config, config, tokens=tokens, images=2))
    seconds = []
    for _ in range(config.steps):
        started = time.monotonic()
        batch = maker.make(next(batches)["packs"])
        hidden = model(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            mask=AttentionMask(batch["subsegment_ids"], batch["is_visual"]),
            crops=batch["crops"],
            pooling=batch["pooling"],
        )
        parts = weighted_loss(
            hidden[0], model.decoder.head_weight, batch["target_ids"], batch["loss_weights"], config.z_loss
        )
        (parts.total / batch["loss_weight"]).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.monotonic() - started)
    return median(seconds[2:])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=384)
    parser.add_argument("--packs", type=int, default=4)
    options = parser.parse_args()
    config = training_config(
        steps=options.steps, global_batch_packs=options.packs, log_interval_steps=1000, threads_per_process=0
    )
    merged = trained_seconds(config, options.tokens, options.tokens * options.packs)
    single = trained_seconds(config, options.tokens, options.tokens)
    bare = bare_seconds(config, options.tokens)
    print(f"step of {options.packs} packs of {options.tokens} tokens, seconds")
    print(f"  trainer, merged packs      {merged:.4f}")
    print(f"  trainer, one pack per pass {single:.4f}")
    print(f"  bare torch loop, merged    {bare:.4f}")
    print(f"trainer over bare loop: {merged / bare:.2f}")
    print(f"merged over one by one: {merged / single:.2f}")


if __name__ == "__main__":
    main()
