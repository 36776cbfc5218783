"""Generation on CUDA, where rows attend together in one call, against the CPU, where they attend one by one."""

from __future__ import annotations

import pytest
import torch

from molmo2core.model.generate import GenerationOptions, generate
from molmo2core.testing.tiny_model import random_prompt, random_tree, tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_gpu_gives_the_answers_of_a_cpu(temperature: float) -> None:
    """float32, the same random numbers, limits that let rows leave.  Would catch a bias of the wrong rows, an index on
    the wrong device, and keys that a dropped row leaves behind."""
    model = tiny_model(3)
    prompts = [
        random_prompt(model.config, seed=5, images=2),
        random_prompt(model.config, seed=6, words=30),
        random_prompt(model.config, seed=7, frames=3, words=3),
        random_tree(model.config, seed=8, images=1, branches=(9, 5)),
    ]
    options = [
        GenerationOptions(max_new_tokens=limit, stop_tokens=frozenset(), temperature=temperature)
        for limit in (12, 3, 7, 12)
    ]
    expected = generate(model, prompts, options)
    assert generate(model.to("cuda"), prompts, options) == expected
