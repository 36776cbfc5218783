"""Ranks that share a sequence compute the loss and gradients of one rank with all of it."""

from __future__ import annotations

import pytest
import torch

from molmo2core.model.initialization import build_model
from molmo2core.testing.distributed import run_distributed
from molmo2core.testing.shared_sequence import (
    context_parallel_gradients,
    key_heads,
    loss_and_gradients,
    parameters_of,
)
from molmo2core.testing.tiny_model import tiny_model
from molmo2core.testing.training import random_pack
from molmo2core.training.config import DropoutConfig
from molmo2core.training.microbatch import MicrobatchMaker


def test_context_parallel_gradients() -> None:
    """One sequence of odd length (a tree with an image, a text) on two ranks, for as many key heads as ranks and for
    fewer, which are repeated before the exchange.

    Would catch heads dealt out in another order, gradients that stay with the wrong rank, positions that restart on
    the second rank, and a border inside a branch.  Tolerance: float32; measured 3e-6 on gradients up to 14.
    """
    configs = [key_heads(2), key_heads(1)]
    models = [tiny_model(), build_model(configs[1], seed=3)]
    pack = random_pack(models[0].config, 11, tokens=61)
    variants = [(config, parameters_of(model)) for config, model in zip(configs, models, strict=True)]
    found = run_distributed(context_parallel_gradients, 2, pack, variants)
    maker = MicrobatchMaker(im_patch_id=models[0].im_patch_id, dropout=DropoutConfig())
    for index, model in enumerate(models):
        loss, gradients = loss_and_gradients(model, maker, pack)
        assert sum(bool(gradient.any()) for gradient in gradients.values()) > 80
        for rank in range(2):
            assert found[rank][index][0] == pytest.approx(float(loss), rel=1e-6)
            for name, gradient in gradients.items():
                torch.testing.assert_close(found[rank][index][1][name], gradient, rtol=1e-4, atol=2e-5, msg=name)
