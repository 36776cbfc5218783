"""Greedy decoding of a batch of unequal prompts: our `generate` against transformers' own Molmo2 with the same weights.

    python benchmarks/decoding.py [--prompts 8] [--shortest 1024] [--longest 2048] [--new-tokens 64] [--repeats 3]

float32 on a CPU.  The two take turns token by token, so that other work on the machine disturbs them alike; medians
over all tokens are printed.  The answers must be equal.  The last line is transformers' time over ours for a step, the
line before it that for the prefill.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from molmo2core.checkpoints.native import native_inputs
from molmo2core.examples import TokenizedExample
from molmo2core.model.config import ModelConfig
from molmo2core.model.generate import GenerationOptions, generate
from molmo2core.model.molmo2 import Molmo2
from molmo2core.testing.native_twin import native_twin
from molmo2core.testing.tiny_model import random_model, random_prompt, tiny_config

PAD = 0
Tick = Callable[[], None]


def benchmark_config() -> ModelConfig:
    """Wide enough that matrix products count, few enough layers that a CPU can do it."""
    tiny = tiny_config()
    decoder = replace(
        tiny.decoder,
        width=512,
        num_layers=4,
        num_heads=8,
        num_kv_heads=2,
        head_dim=64,
        mlp_width=1536,
        vocab_size=8192,
        max_position_embeddings=16384,
    )
    return replace(tiny, decoder=decoder)


def unequal_prompts(config: ModelConfig, number: int, shortest: int, longest: int) -> list[TokenizedExample]:
    """Lengths spread evenly; every other prompt has four images."""
    prompts = []
    for seed, length in enumerate(np.linspace(shortest, longest, number).astype(int).tolist()):
        images = 4 * (seed % 2)
        rest = len(random_prompt(config, seed=seed, images=images, words=0).input_ids)
        prompts.append(random_prompt(config, seed=seed, images=images, words=length - rest))
    return prompts


def ours(model: Molmo2, prompts: list[TokenizedExample], new_tokens: int, tick: Tick) -> list[list[int]]:
    """Answers of exactly `new_tokens`; `tick` is called at each step."""
    options = GenerationOptions(max_new_tokens=new_tokens, stop_tokens=frozenset())

    def on_token(request: int, token: int) -> None:
        if request == 0:
            tick()

    return [list(answer.token_ids) for answer in generate(model, prompts, options, on_token)]


def transformers(native: Any, prompts: list[TokenizedExample], new_tokens: int, tick: Tick) -> list[list[int]]:
    """The same, padded on the left; no id of the base vocabulary ends an answer."""
    inputs = native_inputs(prompts, pad_id=PAD, video=False)

    def on_logits(input_ids: Tensor, logits: Tensor) -> Tensor:
        tick()
        return logits

    with torch.inference_mode():
        out = native.generate(
            **inputs,
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=native.config.text_config.vocab_size + 100,
            pad_token_id=PAD,
            logits_processor=[on_logits],
        )
    answers: list[list[int]] = out[:, inputs["input_ids"].shape[1] :].tolist()
    return answers


class Side:
    """A call in a thread of its own, which at each token waits for its next turn."""

    def __init__(self, call: Callable[[Tick], list[list[int]]]) -> None:
        self.seconds: list[float] = []
        """Of each turn: to the first token, and from there from token to token."""
        self.answers: list[list[int]] = []
        self._call = call
        self._error: Exception | None = None
        self._go, self._came = threading.Semaphore(0), threading.Semaphore(0)
        threading.Thread(target=self._run, daemon=True).start()

    def turn(self) -> None:
        """Go on to the next token."""
        started = time.perf_counter()
        self._go.release()
        self._came.acquire()
        self.seconds.append(time.perf_counter() - started)
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        self._go.acquire()
        try:
            self.answers = self._call(self._tick)
        except Exception as error:
            self._error = error
        self._came.release()

    def _tick(self) -> None:
        self._came.release()
        self._go.acquire()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--shortest", type=int, default=1024)
    parser.add_argument("--longest", type=int, default=2048)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="0: as torch decides")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    model = random_model(benchmark_config(), seed=0)
    prompts = unequal_prompts(model.config, options.prompts, options.shortest, options.longest)
    with tempfile.TemporaryDirectory() as folder:
        native = native_twin(model, Path(folder))
    calls: dict[str, Callable[[Tick], list[list[int]]]] = {
        "ours": lambda tick: ours(model, prompts, options.new_tokens, tick),
        "transformers": lambda tick: transformers(native, prompts, options.new_tokens, tick),
    }
    prefill: dict[str, list[float]] = {name: [] for name in calls}
    steps: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(options.repeats):
        sides = {name: Side(call) for name, call in calls.items()}
        for _ in range(options.new_tokens + 1):  # the last turn ends the call
            for side in sides.values():
                side.turn()
        if sides["ours"].answers != sides["transformers"].answers:
            raise SystemExit("the answers differ")
        for name, side in sides.items():
            prefill[name].append(side.seconds[0])
            steps[name] += side.seconds[1:-1]
    print(
        f"{options.prompts} prompts of {options.shortest} to {options.longest} tokens, {options.new_tokens} new tokens "
        f"each, {torch.get_num_threads()} threads"
    )
    for name in calls:
        step = median(steps[name])
        print(
            f"  {name:13s} prefill {median(prefill[name]):.3f} s, step {1000 * step:.2f} ms, "
            f"{options.prompts / step:.0f} tokens/s"
        )
    print(f"transformers over ours, prefill: {median(prefill['transformers']) / median(prefill['ours']):.2f}")
    print(f"transformers over ours, step: {median(steps['transformers']) / median(steps['ours']):.2f}")


if __name__ == "__main__":
    main()
