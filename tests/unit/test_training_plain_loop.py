"""Training under Composer is the loop that anybody would write: 20 steps, parameter by parameter."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from molmo2core.model.molmo2 import Molmo2
from molmo2core.testing.acceptance_ranks import start_model
from molmo2core.testing.plain_loss import plain_loss
from molmo2core.testing.training import pack_loader, training_config
from molmo2core.testing.training_ranks import train_tiny
from molmo2core.training.config import DropoutConfig, GroupSchedule, OptimizerConfig, TrainingConfig
from molmo2core.training.microbatch import MicrobatchMaker

STEPS = 20
Rates = dict[str, tuple[float, int]]
"""Peak and warm-up steps of each group."""
CLIP = 2.5
"""Below the gradients' norms of some groups and steps, above those of others."""


def plain_torch_loop(model: Molmo2, config: TrainingConfig, rates: Rates, eps: float) -> list[dict[str, Any]]:
    """One pack at a time, all logits, sum(w * (CE + z)) / sum(w), clipping and AdamW for each group, rates by formula.

    Returns what each step logs.
    """
    maker = MicrobatchMaker(im_patch_id=model.im_patch_id, dropout=config.dropout)
    groups: dict[str, list[torch.nn.Parameter]] = {name: [] for name in rates}
    for name, parameter in model.named_parameters():
        new = name == "decoder.embedding.new" or name.startswith("connector")
        groups["connector" if new else name.split(".")[0]].append(parameter)
    optimizers = {
        name: torch.optim.AdamW(group, lr=0.0, betas=(0.9, 0.95), eps=eps, weight_decay=0.0, foreach=False)
        for name, group in groups.items()
    }
    logged = []
    batches = iter(pack_loader(model.config, config))
    for step in range(1, STEPS + 1):
        batch = next(batches)
        numbered = zip(batch["pack_numbers"], batch["packs"], strict=True)
        cross_entropy, z = plain_loss(model, maker, numbered, 1e-4)
        model.zero_grad()
        (cross_entropy + z).backward()
        norms, used = {}, {}
        for name, optimizer in optimizers.items():
            norms[name] = float(torch.nn.utils.clip_grad_norm_(groups[name], CLIP))
            peak, warmup = rates[name]
            cosine = (1 + math.cos(math.pi * (step - warmup) / (STEPS - warmup))) / 2
            used[name] = peak * (step / warmup if step < warmup else 0.1 + 0.9 * cosine)
            optimizer.param_groups[0]["lr"] = used[name]
            optimizer.step()
        logged.append({"loss": float(cross_entropy), "z": float(z), "gradient_norm": norms} | {"learning_rate": used})
    return logged


@pytest.mark.parametrize(
    ("rates", "eps", "moves"),
    [
        ({"vision_encoder": (1e-4, 8), "connector": (1e-3, 2), "decoder": (2e-4, 5)}, 1e-3, 1e-3),
        ({"vision_encoder": (5e-6, 8), "connector": (5e-6, 2), "decoder": (1e-5, 5)}, 1e-6, 5e-5),
    ],
    ids=["fast", "recipe"],
)
def test_training_is_the_plain_loop(tmp_path: Path, rates: Rates, eps: float, moves: float) -> None:
    """Would catch a loss that is a mean of means, a step at the wrong learning rate, clipping over all groups at once,
    batches that are skipped or seen twice, dropout of other packs.

    Once with large steps, where an epsilon above float32's noise keeps AdamW from dividing noise by itself (else
    weights with a gradient of 0 differ by 5e-6), and once with epsilon and rates of the recipe's second stage.
    Weights, which move by up to 8e-3 and 1e-4, may differ by 1e-6; measured 1.2e-7 and 2.0e-7.
    """
    schedules = {name: GroupSchedule(learning_rate=peak, warmup_steps=warmup) for name, (peak, warmup) in rates.items()}
    config = training_config(
        steps=STEPS,
        optimizer=OptimizerConfig(**schedules, clip_norm=CLIP, eps=eps),
        dropout=DropoutConfig(residual=0.1, response_residual=0.05),
    )
    start = start_model("qwen").state_dict()
    model = start_model("qwen").train()
    expected = plain_torch_loop(model, config, rates, eps)
    weights, lines = train_tiny(tmp_path, config, model=start_model("qwen"))
    for line, step in zip(lines, expected, strict=True):
        assert line["loss"] == pytest.approx(step["loss"], rel=1e-6)
        assert line["z"] == pytest.approx(step["z"], rel=1e-6)
        assert line["gradient_norm"] == pytest.approx(step["gradient_norm"], rel=1e-5)
        assert line["learning_rate"] == pytest.approx(step["learning_rate"], rel=1e-12)
    norms = [norm for step in expected for norm in step["gradient_norm"].values()]
    assert min(norms) < CLIP < max(norms)
    assert largest_difference(weights, model.state_dict()) <= 1e-6
    assert largest_difference(weights, start) > moves


def largest_difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max((found[name] - value).abs().max().item() for name, value in expected.items())
