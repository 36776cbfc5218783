"""One sequence on 1, 2 and 4 ranks: time, memory, what is exchanged, and what handing over packs costs.

    python benchmarks/context_parallel.py [--tokens 4096] [--steps 3]
    python benchmarks/context_parallel.py --device cuda [--size 4b]    the longest sequence that one GPU trains on

Here every rank is a process with one thread, connected by gloo.  With more ranks than cores they wait for each other,
so s/step shows what cutting and exchanging cost, not what more GPUs gain; `of CPU` is processor time of one rank, which
other programs disturb less.  Memory is counted on each rank, with checkpointed blocks: `kept` from forward to backward,
`peak` at most, without weights and their gradients; `resident` is what the process's peak rises by.

Exchanged, per layer and pass, of N = S / P tokens: N (H + 2 G') h numbers before attention and N H h after it, with
G' = max(G, P); (P - 1) / P of them leave the rank.  Counted and compared.

Handing over: a pack of one video of 384 frames of 378 x 378 pixels, between 4 processes over gloo, against decoding it
(720p, H.264, 192 s) on every rank; eight ranks are computed with the hand-over of four.

On a GPU: forward and backward of one model of the size with weights and gradients in float32, blocks checkpointed,
longer and longer sequences with 384 frames for 36,864 tokens, until there is no more memory.

The last line is what a rank of four holds and takes, over one rank alone.
"""

from __future__ import annotations

import argparse
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from statistics import median
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from decoding import benchmark_config
from model import peak_memory, peak_memory_from_now
from video_decoding import make_part, repeated

from molmo2core.examples import ROOT
from molmo2core.model.config import ModelConfig, named_config
from molmo2core.model.initialization import build_model
from molmo2core.parallel.blocks import checkpoint_activations
from molmo2core.parallel.context_parallel import apply_context_parallel
from molmo2core.parallel.mesh import host_context_group
from molmo2core.parallel.pack_exchange import CROP_OWNERS, PackExchange
from molmo2core.preprocessing.config import PreprocessingConfig, VisualGeometry
from molmo2core.preprocessing.frame_times import sampled_times
from molmo2core.preprocessing.video import frame_patches
from molmo2core.testing.distributed import run_distributed
from molmo2core.testing.memory import LiveBytes
from molmo2core.testing.memory_ranks import RECOMPUTED, video_pack
from molmo2core.testing.training import Pack, as_batch, training_config
from molmo2core.training.composer_model import TrainedMolmo2
from molmo2core.training.config import DropoutConfig
from molmo2core.training.memory_estimate import PackShape, estimate_memory
from molmo2core.training.microbatch import MicrobatchMaker
from molmo2core.video_decoding import decode_frames
from molmo2core.video_file import open_video

SIZES = (1, 2, 4)
FRAMES, LONG = 384, 36_864
"""Of the long-context stage."""
NO_DROPOUT = DropoutConfig()


@dataclass(frozen=True, kw_only=True)
class Found:
    """One rank."""

    seconds: float
    processor: float
    kept: int
    peak: int
    resident: int
    exchanged: tuple[int, ...]
    """Numbers given to the exchanges of one forward pass: visual tokens, then two per layer."""


def wide_heads() -> ModelConfig:
    """Eight query heads and two key heads, which four ranks repeat."""
    config = benchmark_config()
    return replace(config, decoder=replace(config.decoder, max_position_embeddings=LONG))


def one_step(model: TrainedMolmo2, batch: dict[str, Any]) -> None:
    """Forward and backward."""
    model.loss(model.forward(batch), batch)["total"].backward()


def step_on_ranks(tokens: int, steps: int) -> Found:
    """What one of the ranks of the group takes."""
    torch.set_num_threads(1)
    group, config = host_context_group(dist.get_world_size()), wide_heads()
    model = build_model(config, seed=0).train()
    if group.size() > 1:
        apply_context_parallel(model, group)
    checkpoint_activations(model, vision_encoder=1, connector=True, decoder=1)
    maker = MicrobatchMaker(
        im_patch_id=model.im_patch_id, dropout=NO_DROPOUT, context_rank=group.rank(), context_size=group.size()
    )
    batch = dict(maker.make([video_pack(config, tokens=tokens, crops=tokens * FRAMES // LONG)]))
    trained = TrainedMolmo2(model, z_coefficient=1e-4)
    before = peak_memory_from_now() + sum(parameter.nbytes for parameter in model.parameters())
    one_step(trained, batch)  # gradients are there from now on
    seconds, processor = [], []
    for _ in range(steps):
        dist.barrier()
        start, worked = time.perf_counter(), time.process_time()
        one_step(trained, batch)
        seconds.append(time.perf_counter() - start)
        processor.append(time.process_time() - worked)
    resident = peak_memory() - before
    exchanged, exchange = list[int](), dist.all_to_all_single

    def counting(received: torch.Tensor, sent: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        exchanged.append(sent.numel())
        return exchange(received, sent, *arguments, **named)

    with mock.patch.object(dist, "all_to_all_single", counting), LiveBytes() as live:
        loss = trained.loss(trained.forward(batch), batch)["total"]
        kept, forward = live.now - model.decoder.head_weight.nbytes, tuple(exchanged)  # the head has its gradient
        loss.backward()
    return Found(
        seconds=median(seconds),
        processor=median(processor),
        kept=kept,
        peak=live.peak,
        resident=resident,
        exchanged=forward,
    )


def compare_ranks(tokens: int, steps: int) -> dict[int, Found]:
    """Print a row per number of ranks; the slowest and fullest rank of each."""
    config = wide_heads()
    decoder, width = config.decoder, config.decoder.head_dim
    print(f"{tokens} tokens, {tokens * FRAMES // LONG} frames, {decoder.num_layers} layers of width {decoder.width}")
    names = ("s/step", "of CPU", "kept MB", "peak MB", "resident")
    print(f"{'ranks':>5}" + "".join(f"{name:>9}" for name in names) + f"{'MB sent/layer':>15}{'theory':>9}")
    found = {}
    for size in SIZES:
        ranks = run_distributed(step_on_ranks, size, tokens, steps, timeout_seconds=600)
        worst = Found(
            seconds=max(r.seconds for r in ranks),
            processor=max(r.processor for r in ranks),
            kept=max(r.kept for r in ranks),
            peak=max(r.peak for r in ranks),
            resident=max(r.resident for r in ranks),
            exchanged=ranks[0].exchanged,
        )
        own, heads = tokens // size, decoder.num_heads
        layer = own * (heads + 2 * max(decoder.num_kv_heads, size)) * width + own * heads * width if size > 1 else 0
        leaves = (size - 1) / size * 4 / 1e6
        counted = sum(worst.exchanged[1:]) / decoder.num_layers
        if counted != layer:
            raise SystemExit(f"{size} ranks exchange {counted} numbers a layer, in theory {layer}")
        sizes = "".join(f"{value / 1e6:>9.1f}" for value in (worst.kept, worst.peak, worst.resident))
        times = f"{worst.seconds:>9.2f}{worst.processor:>9.2f}"
        print(f"{size:>5}{times}{sizes}{counted * leaves:>15.2f}{layer * leaves:>9.2f}", flush=True)
        found[size] = worst
    return found


def long_video(seed: int) -> Pack:
    """A pack of the long-context stage: 384 random frames, 81 visual tokens each, and text."""
    generator = torch.Generator().manual_seed(seed)
    geometry = VisualGeometry()
    visual = FRAMES * 81
    pooling = torch.arange(FRAMES * geometry.num_patches).view(-1, geometry.max_pool)
    per_token = torch.randint(0, 1000, (LONG,), generator=generator)
    return {
        "input_ids": per_token,
        "target_ids": per_token,
        "position_ids": torch.arange(LONG),
        "subsegment_ids": torch.where(torch.arange(LONG) < LONG - 512, ROOT, 0),
        "loss_weights": torch.ones(LONG),
        "is_visual": torch.arange(LONG) < visual,
        "pooling": pooling,
        "crops": torch.randint(
            0, 256, (FRAMES, geometry.num_patches, geometry.patch_bytes), dtype=torch.uint8, generator=generator
        ),
    }


def hand_over(repeats: int) -> tuple[float, int]:
    """(seconds for one pack, bytes that its loader sent); ranks take turns."""
    torch.set_num_threads(1)
    exchange = PackExchange(host_context_group(dist.get_world_size()))
    batch = as_batch([long_video(0)]) if dist.get_rank() == 0 else None
    seconds = []
    for _ in range(repeats):
        dist.barrier()
        start = time.perf_counter()
        got = exchange(batch, 0)
        dist.barrier()
        seconds.append(time.perf_counter() - start)
    assert not isinstance(got, Exception)
    pack = got["packs"][0]
    others = sum(value.nbytes for name, value in pack.items() if name not in ("crops", CROP_OWNERS))
    return median(seconds), (exchange.size - 1) * (others + pack["crops"].nbytes)


def decoding() -> tuple[float, float]:
    """Seconds of processor and of the clock for one video of 384 frames."""
    data = repeated(make_part(24, 250), 8)
    config = PreprocessingConfig(max_frames=FRAMES)
    with open_video(data) as video:
        times = sampled_times(video.index.duration_seconds, config, fps=video.index.fps)
    processor, clock = time.process_time(), time.perf_counter()
    frame_patches(decode_frames(data, times), len(times), VisualGeometry())
    return time.process_time() - processor, time.perf_counter() - clock


def compare_feeding(repeats: int) -> None:
    """Print what one pack costs to decode and to hand over, and a step of 8 packs either way."""
    processor, clock = decoding()
    seconds, sent = run_distributed(hand_over, 4, repeats, timeout_seconds=600)[0]
    print(f"decoding {FRAMES} frames: {processor:.2f} s of processor, {clock:.2f} s")
    print(f"handing them over to 3 others: {seconds:.3f} s, {sent / 1e6:.1f} MB, {sent / seconds / 1e6:.0f} MB/s")
    for size in (4, 8):
        alone, turns = 8 * processor, 8 / size * processor + 8 * seconds
        print(f"8 packs on {size} ranks, each decodes all: {alone:.1f} s of each rank; in turns: {turns:.1f} s")


def longest_on_gpu(size: str) -> None:
    """Print peak and estimate for longer and longer sequences."""
    config = named_config(size)  # type: ignore[arg-type]
    model = build_model(config, seed=0).to("cuda").train()
    checkpoint_activations(model, vision_encoder=1, connector=True, decoder=1)
    trained = TrainedMolmo2(model, z_coefficient=1e-4)
    maker = MicrobatchMaker(im_patch_id=model.im_patch_id, dropout=NO_DROPOUT)
    stage = training_config(precision="amp_bf16", activation_checkpointing=RECOMPUTED)
    longest = 0
    for tokens in range(LONG // 4, 64 * LONG, LONG // 4):
        crops = tokens * FRAMES // LONG
        made = maker.make([video_pack(config, tokens=tokens, crops=crops)])
        batch = {name: x.to("cuda") if isinstance(x, torch.Tensor) else x for name, x in made.items()}
        guess = estimate_memory(config, stage, PackShape(tokens=tokens, crops=crops, visual_tokens=4 * crops))
        expected = guess.weights + guess.gradients + guess.activations
        torch.cuda.reset_peak_memory_stats()
        precision: AbstractContextManager[Any] = torch.autocast("cuda", torch.bfloat16)
        try:
            with precision:
                loss = trained.loss(trained.forward(batch), batch)["total"]
            loss.backward()
        except torch.cuda.OutOfMemoryError:
            break
        longest, peak = tokens, torch.cuda.max_memory_allocated()
        print(f"{tokens:>8} tokens{crops:>6} frames: {peak / 1e9:6.1f} GB, estimated {expected / 1e9:6.1f}", flush=True)
    print(f"longest sequence: {longest} tokens")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", default="4b", help="of the model, on a GPU")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    if options.device == "cuda":
        longest_on_gpu(options.size)
        return
    found = compare_ranks(options.tokens, options.steps)
    compare_feeding(options.steps)
    one, four = found[1], found[SIZES[-1]]
    print(f"4 ranks over 1: kept {four.kept / one.kept:.2f}, peak {four.peak / one.peak:.2f}, ", end="")
    print(f"time {four.seconds / one.seconds:.2f}, of processor {four.processor / one.processor:.2f}")


if __name__ == "__main__":
    main()
