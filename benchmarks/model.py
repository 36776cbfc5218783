"""A step of our model against transformers' own Molmo2: same weights, same packed examples, one device.

    python benchmarks/model.py [--tokens 2048 4096 8192] [--threads 2]      CPU, float32
    python benchmarks/model.py --device cuda                                 16,384 and 36,864 tokens, bfloat16

Each row packs several examples (images, a branch or two, text) into one sequence.  transformers' class has no packing:
it gets the same rule as a dense mask [1, 1, S, S], made once before its time is taken.  Every measurement is a process
of its own; memory is what its peak rises above weights and inputs, masks included.  On CUDA our attention is measured
alone against a dense-mask SDPA, at 4B's width and heads.  On a CPU, decoding.py then decodes greedily on both sides.
"""

from __future__ import annotations

import argparse
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from decoding import benchmark_config
from transformers.utils import logging

from molmo2core.checkpoints.native import load_native
from molmo2core.checkpoints.reference import load_weights, save_weights
from molmo2core.message_tree.attention_rule import allowed
from molmo2core.model.attention import AttentionMask, attend
from molmo2core.model.config import ModelConfig
from molmo2core.packing.concat import pack_examples
from molmo2core.testing.native_twin import native_twin
from molmo2core.testing.packs import random_pack
from molmo2core.testing.tiny_model import random_model, random_prompt

EXAMPLES = 4
REPEATS = 3


def packed_inputs(config: ModelConfig, tokens: int) -> dict[str, torch.Tensor]:
    """One sequence of EXAMPLES examples of unequal length with images."""
    shares = np.array([1, 2, 3, 4]) / 10 * tokens
    examples = [
        random_prompt(config, seed=seed, images=2 + 2 * seed, words=int(share) - 26 * (2 + 2 * seed))
        for seed, share in enumerate(shares)
    ]
    pack = pack_examples(examples, config.geometry.max_pool)
    names = ("input_ids", "position_ids", "subsegment_ids", "pooling")
    inputs = {name: torch.from_numpy(getattr(pack, name)).long() for name in names}
    return inputs | {"is_visual": torch.from_numpy(pack.is_visual), "crops": torch.from_numpy(pack.crops)}


def our_step(folder: Path, inputs: dict[str, torch.Tensor]) -> Callable[[], torch.Tensor]:
    """Forward of our model to a scalar."""
    model = load_weights(folder / "ours")

    def step() -> torch.Tensor:
        mask = AttentionMask(inputs["subsegment_ids"][None], inputs["is_visual"][None])
        hidden = model(
            input_ids=inputs["input_ids"][None],
            position_ids=inputs["position_ids"][None],
            mask=mask,
            crops=inputs["crops"],
            pooling=inputs["pooling"],
        )
        return model.logits(hidden).square().mean()

    return step


def native_step(folder: Path, inputs: dict[str, torch.Tensor]) -> Callable[[], torch.Tensor]:
    """The same of transformers' class."""
    logging.disable_progress_bar()
    native = load_native(folder / "transformers")
    num_tokens = inputs["pooling"].shape[0]

    @cache
    def dense_mask() -> torch.Tensor:
        dense = torch.from_numpy(allowed(inputs["subsegment_ids"].numpy(), inputs["is_visual"].numpy()))
        lowest = torch.finfo(torch.float32).min
        return torch.zeros(dense.shape).masked_fill_(~dense, lowest)[None, None]

    def step() -> torch.Tensor:
        logits: torch.Tensor = native(
            input_ids=inputs["input_ids"][None],
            position_ids=inputs["position_ids"][None],
            attention_mask=dense_mask(),
            mm_token_type_ids=inputs["is_visual"][None].long(),
            pixel_values=inputs["crops"].float() / 127.5 - 1,
            image_token_pooling=inputs["pooling"],
            image_grids=torch.tensor([[num_tokens, 1, 0, 0]]),
            use_cache=False,
        ).logits
        return logits.square().mean()

    return step


def measure(which: str, folder: Path, tokens: int, backward: bool, threads: int) -> tuple[float, int, float]:
    """Seconds, bytes of growth and the result's value; runs in a process of its own."""
    torch.set_num_threads(threads)
    config = benchmark_config()
    inputs = packed_inputs(config, tokens)
    step = (our_step if which == "ours" else native_step)(folder, inputs)
    before = peak_memory_from_now()
    seconds, value = [], 0.0
    with torch.set_grad_enabled(backward):
        for _ in range(1 + REPEATS):
            started = time.monotonic()
            loss = step()
            if backward:
                loss.backward()  # type: ignore[no-untyped-call]
            seconds.append(time.monotonic() - started)
            value = float(loss.detach())
    return median(seconds[1:]), peak_memory() - before, value


def peak_memory_from_now() -> int:
    """Forget the process's peak; bytes held now."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_memory()


def peak_memory() -> int:
    """Most bytes held since the last `peak_memory_from_now`."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def compare_on_cpu(lengths: list[int], threads: int) -> float:
    """Print a row per length and direction; the worst ratio of ours to transformers' time."""
    config = benchmark_config()
    spawn = multiprocessing.get_context("spawn")
    worst = 0.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("ours", "transformers"):
            (folder / part).mkdir()
        model = random_model(config, seed=0)
        save_weights(folder / "ours", model, config)
        native_twin(model, folder / "transformers")
        print(f"{'tokens':>7} {'':9} {'ours s':>8} {'native s':>9} {'ratio':>6} {'ours MB':>8} {'native MB':>10}")
        for tokens in lengths:
            for backward in (False, True):
                found = {}
                for which in ("ours", "native"):
                    with ProcessPoolExecutor(1, mp_context=spawn) as process:  # memory is a process's peak
                        found[which] = process.submit(measure, which, folder, tokens, backward, threads).result()
                ours, native = found["ours"], found["native"]
                if abs(ours[2] - native[2]) > 1e-4 * abs(native[2]):
                    raise SystemExit(f"different results: {ours[2]} and {native[2]}")
                ratio = ours[0] / native[0]
                worst = max(worst, ratio)
                kind = "fwd + bwd" if backward else "forward"
                print(
                    f"{tokens:7} {kind:9} {ours[0]:8.3f} {native[0]:9.3f} {ratio:6.2f}"
                    f" {ours[1] / 1e6:8.0f} {native[1] / 1e6:10.0f}",
                    flush=True,
                )
    return worst


def compare_on_cuda(lengths: list[int]) -> float:
    """Our attention against SDPA with a dense mask: 32 query heads on 8 of 128, one layer, forward and backward."""
    worst = 0.0
    print(f"{'tokens':>7} {'flex ms':>9} {'dense ms':>9} {'ratio':>6} {'flex MB':>8} {'dense MB':>9} {'mask MB':>8}")
    for tokens in lengths:
        pack = random_pack(np.random.default_rng(0), max_tokens=tokens, padding=False)
        short = tokens - pack.subsegment_ids.shape[1]
        ids = F.pad(pack.subsegment_ids, (0, short), value=int(pack.subsegment_ids[0, -1])).cuda()
        visual = F.pad(pack.is_visual, (0, short), value=False).cuda()
        shapes = ((1, tokens, 32, 128), (1, tokens, 8, 128), (1, tokens, 8, 128))
        inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for shape in shapes]

        def flex(inputs: Any = inputs, ids: Any = ids, visual: Any = visual) -> torch.Tensor:
            return attend(*inputs, AttentionMask(ids, visual), "flex")

        def dense(inputs: Any = inputs, ids: Any = ids, visual: Any = visual) -> torch.Tensor:
            position = torch.arange(ids.shape[1], device="cuda")
            both = visual[0, :, None] & visual[0, None, :]
            same = ids[0, :, None] // 100_000 == ids[0, None, :] // 100_000
            rule = (ids[0, :, None] <= ids[0, None, :]) & same & ((position[None, :] <= position[:, None]) | both)
            bias = torch.zeros(rule.shape, device="cuda", dtype=torch.bfloat16).masked_fill_(~rule, float("-inf"))
            query, key, value = (x.transpose(1, 2) for x in inputs)
            key, value = (x.repeat_interleave(4, dim=1) for x in (key, value))
            return F.scaled_dot_product_attention(query, key, value, attn_mask=bias).transpose(1, 2)

        (flex_ms, flex_mb), (dense_ms, dense_mb) = (cuda_step(run) for run in (flex, dense))
        made = AttentionMask(ids, visual).block_mask
        mask_mb = sum(x.numel() * x.element_size() for x in vars(made).values() if isinstance(x, torch.Tensor)) / 1e6
        worst = max(worst, flex_ms / dense_ms)
        print(
            f"{tokens:7} {flex_ms:9.2f} {dense_ms:9.2f} {flex_ms / dense_ms:6.2f}"
            f" {flex_mb:8.0f} {dense_mb:9.0f} {mask_mb:8.1f}"
        )
    return worst


def cuda_step(run: Callable[[], torch.Tensor]) -> tuple[float, float]:
    """Median milliseconds of forward and backward, and peak megabytes above what was held before."""
    for _ in range(3):
        run().sum().backward()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, times = torch.cuda.memory_allocated(), []
    for _ in range(10):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()  # type: ignore[no-untyped-call]
        run().sum().backward()  # type: ignore[no-untyped-call]
        stop.record()  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return median(times), (torch.cuda.max_memory_allocated() - before) / 1e6


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if options.device == "cuda":
        worst = compare_on_cuda(options.tokens or [16384, 36864])
        print(f"FlexAttention over dense mask, worst: {worst:.2f}")
    else:
        worst = compare_on_cpu(options.tokens or [2048, 4096, 8192], options.threads)
        print(f"ours over transformers', worst: {worst:.2f}", flush=True)
        decoding = Path(__file__).with_name("decoding.py")
        subprocess.run([sys.executable, str(decoding), "--threads", str(options.threads)], check=True)


if __name__ == "__main__":
    main()
