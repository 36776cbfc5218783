"""Inputs of checkpointed blocks that wait for the backward pass in the host's memory (on a CPU: a copy)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.autograd.graph import save_on_cpu

from molmo2core.model.molmo2 import Molmo2
from molmo2core.parallel import blocks
from molmo2core.testing.shared_sequence import DROPOUT, loss_and_gradients
from molmo2core.testing.tiny_model import random_model, tiny_config
from molmo2core.testing.training import random_pack
from molmo2core.training.microbatch import MicrobatchMaker


def gradients(model: Molmo2) -> dict[str, torch.Tensor]:
    maker = MicrobatchMaker(im_patch_id=model.im_patch_id, dropout=DROPOUT)
    return loss_and_gradients(model, maker, random_pack(model.config, 0, tokens=64, images=2))[1]


def test_inputs_of_chosen_blocks_go_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """With gradients that are the same bit by bit.  Would catch what a block computes going too (slower than keeping
    it), rotary tables or masks that all blocks share going once each, and blocks that were not asked for."""
    sent: list[tuple[int, ...]] = []

    class Noting(save_on_cpu):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            pack = self.pack_hook

            def noting(tensor: torch.Tensor) -> Any:
                sent.append(tuple(tensor.shape))
                return pack(tensor)

            self.pack_hook = noting

    monkeypatch.setattr(blocks, "save_on_cpu", Noting)
    plain, changed = (random_model(tiny_config(), seed=0).train() for _ in range(2))
    blocks.checkpoint_activations(changed, vision_encoder=2, decoder=1, on_host=True)
    expected, found = gradients(plain), gradients(changed)
    assert [name for name, value in expected.items() if not found[name].equal(value)] == []
    # torch saves an empty tensor beside the arguments.
    assert [shape for shape in sent if shape != (0,)] == [(2, 36, 64)] * 2 + [(1, 64, 96)] * 3
