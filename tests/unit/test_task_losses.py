"""Losses by task: which target belongs to which task, and the means."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from molmo2core.annotations import TASKS
from molmo2core.examples import DOCUMENT, PADDING, ROOT
from molmo2core.model.attention import AttentionMask
from molmo2core.testing.packs import random_pack as random_mask
from molmo2core.testing.tiny_model import tiny_model
from molmo2core.testing.training import pack_loader, training_config
from molmo2core.testing.training_ranks import train_tiny
from molmo2core.training.microbatch import MicrobatchMaker, tasks_of_tokens


@given(seed=st.integers(0, 2**31))
def test_every_token_of_a_branch_has_its_task_and_no_other_has_one(seed: int) -> None:
    """Would catch roots and padding that take the task of the last branch, and documents without known tasks."""
    rng = np.random.default_rng(seed)
    ids = random_mask(rng, max_tokens=120).subsegment_ids[0]
    documents = int(ids.max()) // DOCUMENT + 1
    names = [
        [str(name) for name in rng.choice(TASKS, rng.integers(4, 6))] for _ in range(rng.integers(0, documents + 1))
    ]
    for subsegment, found in zip(ids.tolist(), tasks_of_tokens(ids, names).tolist(), strict=True):
        document, branch = divmod(subsegment, DOCUMENT)
        known = subsegment != PADDING and branch != ROOT and document < len(names)
        assert found == (TASKS.index(names[document][branch]) if known else PADDING)


def test_losses_by_task_are_weighted_means_of_their_targets(tmp_path: Path) -> None:
    """One step, against torch's cross-entropy of every pack alone.  Would catch means of means, tasks of another pack
    after merging, and weights that are left out.  Tolerance: float32 sums in another order.
    """
    config = training_config(steps=1)
    _, (line,) = train_tiny(tmp_path, config)
    model = tiny_model()
    maker = MicrobatchMaker(im_patch_id=model.im_patch_id, dropout=config.dropout)
    batch = next(iter(pack_loader(model.config, config)))
    sums: dict[str, list[float]] = {}
    for pack, tasks in zip(batch["packs"], batch["tasks"], strict=True):
        made = maker.make([pack])
        mask = AttentionMask(made["subsegment_ids"], made["is_visual"])
        named = {name: made[name] for name in ("input_ids", "position_ids", "crops", "pooling")}  # type: ignore[literal-required]
        with torch.no_grad():
            logits = model.logits(model(mask=mask, **named)[0])
        losses = torch.nn.functional.cross_entropy(logits, made["target_ids"], reduction="none")
        for loss, weight, subsegment in zip(losses, made["loss_weights"], made["subsegment_ids"][0], strict=True):
            document, branch = divmod(int(subsegment), DOCUMENT)
            if weight > 0:  # roots of these packs have targets too, which real ones have not: they are of no task
                of_task = sums.setdefault("" if branch == ROOT else tasks[document][branch], [0.0, 0.0])
                of_task[0] += float(weight * loss)
                of_task[1] += float(weight)
    assert sums.keys() >= {"image_qa", "image_caption", "text"}
    means = {task: total / weight for task, (total, weight) in sums.items() if task}
    assert line["loss_by_task"] == pytest.approx(means, rel=1e-5)
    mean = sum(total for total, _ in sums.values()) / sum(weight for _, weight in sums.values())
    assert line["loss"] == pytest.approx(mean, rel=1e-5)
