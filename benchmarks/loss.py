"""Time and peak memory of forward and backward of the loss, beside three other ways to write it, on this CPU.

    python benchmarks/loss.py [--positions 2048] [--width 512] [--vocabulary 32768] [--chunk 256]

Each way runs in a process of its own; memory is the process's peak above what it held before.

    all logits      one matrix of all positions
    chunks, kept    a loop over chunks, whose logits wait for backward
    recomputed      the same, under activation checkpointing: logits once more in backward
    with gradients  model/loss.py: gradients with the logits, in forward
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from molmo2core.model import loss

Z = 1e-4


def of_chunk(hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Sum of w * (CE + z)."""
    logits = (hidden @ head.T).float()
    cross_entropy = F.cross_entropy(logits, targets, reduction="none")
    return (weights * (cross_entropy + Z * logits.logsumexp(-1).square())).sum()


def total_loss(way: str, hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, chunk: int) -> Tensor:
    """Of all positions."""
    if way == "with gradients":
        with mock.patch.object(loss, "CHUNK", chunk):
            return loss.weighted_loss(hidden, head, targets, weights, Z).total
    size = len(targets) if way == "all logits" else chunk
    total = hidden.new_zeros(())
    for parts in zip(*(x.split(size) for x in (hidden, targets, weights)), strict=True):
        states, ids, shares = parts
        if way == "recomputed":
            total = total + checkpoint(of_chunk, states, head, ids, shares, use_reentrant=False)
        else:
            total = total + of_chunk(states, head, ids, shares)
    return total


def measure(way: str, options: argparse.Namespace) -> tuple[float, float, float]:
    """(seconds, peak MB, loss) of one forward and backward."""
    torch.manual_seed(0)
    hidden = torch.randn(options.positions, options.width).requires_grad_()
    head = (torch.randn(options.vocabulary, options.width) / options.width**0.5).requires_grad_()
    targets = torch.randint(0, options.vocabulary, (options.positions,))
    weights = torch.rand(options.positions) + 0.1
    total_loss(way, hidden[:8], head[:64], targets[:8] % 64, weights[:8], 8).backward()  # libraries load
    head.grad = None
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    total = total_loss(way, hidden, head, targets, weights, options.chunk)
    total.backward()
    seconds = time.monotonic() - started
    return seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3, float(total.detach())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=2048)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--chunk", type=int, default=256)
    options = parser.parse_args()
    logits = options.positions * options.vocabulary * 4 / 1e6
    print(f"all logits {logits:.0f} MB, the head's gradient {options.vocabulary * options.width * 4 / 1e6:.0f} MB")
    for way in ("all logits", "chunks, kept", "recomputed", "with gradients"):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            seconds, megabytes, total = pool.apply(measure, (way, options))
        print(f"{way:15} {seconds:6.2f} s {megabytes:7.0f} MB   loss {total:.3f}")


if __name__ == "__main__":
    main()
