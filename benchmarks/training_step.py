"""One optimizer step: ours against a plain PyTorch loop over transformers' own Molmo2 with a dense mask.

    python benchmarks/training_step.py [--tokens 4096] [--steps 6] [--threads 1]        CPU, float32
    python benchmarks/training_step.py --device cuda [--tokens 16384] [--layers 8]      one GPU, bfloat16, 4B's width

Same weights, same packed batch (benchmarks/model.py), forward, weighted loss with its z term, backward and AdamW:

    transformers   a plain loop; packing as a dense mask [1, 1, S, S], made once; logits of all positions
    ours           a plain loop over our model and loss
    Composer       the trainer as stages run it: clipping per group, learning rates, metrics, loader

Ours and Composer also with activation checkpointing, as the large recipes have it, and on CUDA with compiled blocks.
Every line is a process of its own.  On a CPU, seconds are the processor's, of one thread, and so those of the clock on
a quiet machine.  Memory is what its peak rises above the weights: gradients, optimizer state and
activations.  MFU counts what the model needs (training/flops.py), of the bfloat16 peak of the GPU; recomputation is no
gain.  Losses of the first step must agree.  The last line is the ratio of Composer's time to transformers'.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from decoding import benchmark_config
from model import packed_inputs, peak_memory, peak_memory_from_now
from torch.utils.data import DataLoader
from transformers.utils import logging

from molmo2core.checkpoints.native import load_native
from molmo2core.checkpoints.reference import load_weights, save_weights
from molmo2core.examples import ROOT
from molmo2core.message_tree.attention_rule import allowed
from molmo2core.model.attention import AttentionMask
from molmo2core.model.backends import select_attention
from molmo2core.model.config import ModelConfig, named_config
from molmo2core.model.initialization import model_without_weights
from molmo2core.model.loss import weighted_loss
from molmo2core.packing.config import PackingConfig
from molmo2core.parallel.blocks import checkpoint_activations, compile_blocks
from molmo2core.testing.native_twin import native_twin
from molmo2core.testing.tiny_model import random_model
from molmo2core.testing.training import Pack, PackStream, training_config
from molmo2core.training import trainer
from molmo2core.training.config import CheckpointedActivations, TrainingConfig
from molmo2core.training.flops import (
    forward_flops,
    pack_counts,
    peak_flops,
    trained_shares,
    training_flops,
)
from molmo2core.training.microbatch import MicrobatchMaker

RECOMPUTED = CheckpointedActivations(vision_encoder=1, connector=True, decoder=1)
WARM_UP = 2
"""Steps that are not counted: the optimizer makes its state, programs are compiled."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all lines have in common."""

    folder: Path
    device: str
    tokens: int
    steps: int
    threads: int
    model: ModelConfig

    def autocast(self) -> AbstractContextManager[Any]:
        """bfloat16 on a GPU."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda")

    def training(self, *, recomputed: bool, compiled: bool) -> TrainingConfig:
        """The stage that Composer runs, and the optimizer of all."""
        return training_config(
            steps=self.steps,
            global_batch_packs=1,
            log_interval_steps=1000,
            threads_per_process=self.threads,
            precision="amp_bf16" if self.device == "cuda" else "fp32",
            activation_checkpointing=RECOMPUTED if recomputed else CheckpointedActivations(),
            compile=compiled,
        )


@dataclass(frozen=True, kw_only=True)
class Found:
    """One line."""

    seconds: float
    bytes: int
    first_loss: float


@dataclass
class Clock:
    """Called at the end of every step."""

    device: str

    def __post_init__(self) -> None:
        self.before = self._peak_from_now()
        self.ends = [self._time()]
        self.peak = 0

    def tick(self) -> None:
        """One step is done."""
        self.ends.append(self._time())
        self.peak = torch.cuda.max_memory_allocated() if self.device == "cuda" else peak_memory()

    def found(self, first_loss: float) -> Found:
        """Median of the steps after warming up."""
        seconds = [stop - start for start, stop in zip(self.ends, self.ends[1:], strict=False)]
        return Found(seconds=median(seconds[WARM_UP:]), bytes=self.peak - self.before, first_loss=first_loss)

    def _time(self) -> float:
        if self.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.monotonic()

    def _peak_from_now(self) -> int:
        if self.device == "cpu":
            return peak_memory_from_now()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()


def packed_batch(setting: Setting) -> Pack:
    """Four examples with images; half of the text is predicted, with weights of 0.1 to 1.1."""
    pack = packed_inputs(setting.model, setting.tokens)
    generator = torch.Generator().manual_seed(0)
    vocabulary, length = setting.model.decoder.vocab_size, len(pack["input_ids"])
    weights = torch.rand(length, generator=generator) + 0.1
    weights[torch.rand(length, generator=generator) < 0.5] = 0
    weights[pack["subsegment_ids"] % 100_000 == ROOT] = 0
    targets = torch.randint(0, vocabulary, (length,), generator=generator)
    return pack | {"target_ids": targets, "loss_weights": weights}


def plain_loop(setting: Setting, parameters: Iterator[torch.nn.Parameter], loss: Callable[[], torch.Tensor]) -> Found:
    """AdamW over `parameters`."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.0, fused=True)
    clock, losses = Clock(setting.device), []
    for _ in range(setting.steps):
        with setting.autocast():
            value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(value.detach()))
        clock.tick()
    return clock.found(losses[0])


def transformers_step(setting: Setting, recomputed: bool, compiled: bool) -> Found:
    """A plain loop over transformers' class."""
    logging.disable_progress_bar()
    native = load_native(setting.folder / "transformers").to(setting.device).train()
    pack = packed_batch(setting)
    dense = torch.from_numpy(allowed(pack["subsegment_ids"].numpy(), pack["is_visual"].numpy()))
    mask = torch.zeros(dense.shape).masked_fill_(~dense, torch.finfo(torch.float32).min)[None, None]
    num_visual = len(pack["pooling"])
    mask, pack = mask.to(setting.device), {name: value.to(setting.device) for name, value in pack.items()}

    def loss() -> torch.Tensor:
        logits = (
            native(
                input_ids=pack["input_ids"][None],
                position_ids=pack["position_ids"][None],
                attention_mask=mask,
                mm_token_type_ids=pack["is_visual"][None].long(),
                pixel_values=pack["crops"].float() / 127.5 - 1,
                image_token_pooling=pack["pooling"],
                image_grids=torch.tensor([[num_visual, 1, 0, 0]]),
                use_cache=False,
            )
            .logits[0]
            .float()
        )
        cross_entropy = torch.nn.functional.cross_entropy(logits, pack["target_ids"], reduction="none")
        weights = pack["loss_weights"]
        parts = weights * (cross_entropy + 1e-4 * logits.logsumexp(-1).square())
        return parts.sum() / weights.sum()

    return plain_loop(setting, native.parameters(), loss)


def our_step(setting: Setting, recomputed: bool, compiled: bool) -> Found:
    """A plain loop over our model."""
    model = load_weights(setting.folder / "ours").to(setting.device).train()
    select_attention(model, "auto", torch.device(setting.device))
    if compiled:
        compile_blocks(model)
    if recomputed:
        checkpoint_activations(model, vision_encoder=1, connector=True, decoder=1)
    config = setting.training(recomputed=recomputed, compiled=compiled)
    made = MicrobatchMaker(im_patch_id=model.im_patch_id, dropout=config.dropout).make([packed_batch(setting)])
    batch = {
        name: value.to(setting.device) if isinstance(value, torch.Tensor) else value for name, value in made.items()
    }

    def loss() -> torch.Tensor:
        hidden = model(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            mask=AttentionMask(batch["subsegment_ids"], batch["is_visual"]),
            crops=batch["crops"],
            pooling=batch["pooling"],
        )
        parts = weighted_loss(hidden[0], model.decoder.head_weight, batch["target_ids"], batch["loss_weights"], 1e-4)
        return parts.total / batch["loss_weight"]

    return plain_loop(setting, model.parameters(), loss)


def composer_step(setting: Setting, recomputed: bool, compiled: bool) -> Found:
    """The trainer."""
    from composer import Callback, Trainer

    config = setting.training(recomputed=recomputed, compiled=compiled)
    model = load_weights(setting.folder / "ours")
    pack = packed_batch(setting)
    losses: list[float] = []
    clocks: list[Clock] = []

    class Watch(Callback):  # type: ignore[misc]
        def fit_start(self, state: Any, logger: Any) -> None:
            clocks.append(Clock(setting.device))

        def batch_end(self, state: Any, logger: Any) -> None:
            losses.append(float(state.total_loss_dict["loss/train/total"]))
            clocks[0].tick()

    class SamePack(PackStream):
        def _pack(self, index: int) -> Pack:
            return pack

    def watched(**arguments: Any) -> Trainer:
        return Trainer(**arguments | {"callbacks": [*arguments["callbacks"], Watch()]})

    device, _, _ = trainer.start_ranks(config)
    folder = Path(tempfile.mkdtemp(dir=setting.folder))
    with mock.patch.object(trainer, "Trainer", watched):
        trainer.train(
            model,
            DataLoader(SamePack(setting.model, 1, 0, 1), batch_size=None),
            config,
            device=device,
            folder=folder,
            metrics=folder / "metrics.jsonl",
            name="benchmark",
            seed=0,
            packing=PackingConfig(sequence_tokens=len(pack["input_ids"]), crop_budget=len(pack["crops"])),
        )
    return clocks[0].found(losses[0])


LINES: dict[str, tuple[Callable[[Setting, bool, bool], Found], bool, bool]] = {
    "transformers, dense mask": (transformers_step, False, False),
    "ours": (our_step, False, False),
    "ours, recomputed": (our_step, True, False),
    "Composer": (composer_step, False, False),
    "Composer, recomputed": (composer_step, True, False),
    "Composer, recomputed, compiled": (composer_step, True, True),
}


def measure(name: str, setting: Setting) -> Found:
    """Runs in a process of its own."""
    torch.set_num_threads(setting.threads)
    step, recomputed, compiled = LINES[name]
    return step(setting, recomputed, compiled)


def gpu_config(layers: int) -> ModelConfig:
    """4B's widths and vocabulary with fewer layers, whose weights and optimizer state one GPU holds."""
    config = named_config("4b")
    return replace(config, decoder=replace(config.decoder, num_layers=layers))


def step_flops(setting: Setting) -> float:
    """Operations of one step that the model needs."""
    forward = forward_flops(setting.model, pack_counts([packed_batch(setting)]))
    return training_flops(forward, trained_shares(model_without_weights(setting.model)))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layers", type=int, default=8, help="of the decoder, on a GPU")
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        setting = Setting(
            folder=Path(name),
            device=options.device,
            tokens=options.tokens or (16_384 if on_gpu else 4_096),
            steps=options.steps,
            threads=options.threads,
            model=gpu_config(options.layers) if on_gpu else benchmark_config(),
        )
        for part in ("ours", "transformers"):
            (setting.folder / part).mkdir()
        model = random_model(setting.model, seed=0)
        save_weights(setting.folder / "ours", model, setting.model)
        native_twin(model, setting.folder / "transformers")
        del model
        flops = step_flops(setting)
        peak = peak_flops(torch.cuda.get_device_name()) if on_gpu else None
        print(f"{setting.tokens} tokens, {flops / 1e12:.2f} TFLOP a step, {setting.model.decoder.num_layers} layers")
        print(f"{'':32} {'s/step':>8} {'tokens/s':>9} {'MB':>7} {'TFLOP/s':>8} {'MFU':>6}")
        found: dict[str, Found] = {}
        for line, (_, _, compiled) in LINES.items():
            if compiled and not on_gpu:
                continue
            with ProcessPoolExecutor(1, mp_context=spawn) as process:  # memory is a process's peak
                found[line] = now = process.submit(measure, line, setting).result()
            used = f"{flops / now.seconds / peak:6.1%}" if peak else f"{'-':>6}"
            print(
                f"{line:32} {now.seconds:8.3f} {setting.tokens / now.seconds:9.0f} {now.bytes / 1e6:7.0f}"
                f" {flops / now.seconds / 1e12:8.3f} {used}",
                flush=True,
            )
    first = found["transformers, dense mask"].first_loss
    tolerance = 2e-2 if on_gpu else 1e-4
    for line, now in found.items():
        if abs(now.first_loss - first) > tolerance * abs(first):
            raise SystemExit(f"different losses: {first} and {now.first_loss} ({line})")
    for line in ("ours", "Composer, recomputed", "Composer"):
        print(f"{line} over transformers: time {found[line].seconds / found['transformers, dense mask'].seconds:.2f}")


if __name__ == "__main__":
    main()
