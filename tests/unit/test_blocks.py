"""Blocks that are computed twice, and blocks that are compiled: the same gradients, less memory, few programs."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._inductor.utils import fresh_inductor_cache

from molmo2core.model.attention import AttentionMask
from molmo2core.model.config import ModelConfig
from molmo2core.model.dropout import TokenDropout
from molmo2core.model.molmo2 import Molmo2
from molmo2core.parallel.blocks import checkpoint_activations, compile_blocks
from molmo2core.testing.memory import LiveBytes
from molmo2core.testing.tiny_model import random_model, tiny_config
from molmo2core.testing.training import random_pack
from molmo2core.training.config import DropoutConfig
from molmo2core.training.microbatch import Microbatch, MicrobatchMaker

EVERYTHING: dict[str, Any] = {"vision_encoder": 1, "connector": True, "decoder": 1}
DROPOUT = DropoutConfig(residual=0.2, response_residual=0.1)


def model_with_layers(layers: int) -> ModelConfig:
    config = tiny_config()
    return replace(config, decoder=replace(config.decoder, num_layers=layers))


def fresh_model(config: ModelConfig | None = None) -> Molmo2:
    return random_model(config or tiny_config(), seed=0).train()


def microbatch(model: Molmo2, *, seed: int = 0, tokens: int = 64, images: int = 1) -> Microbatch:
    pack = random_pack(model.config, seed, tokens=tokens, images=images)
    return MicrobatchMaker(im_patch_id=model.im_patch_id, dropout=DROPOUT).make([pack])


def loss(model: Molmo2, batch: Microbatch) -> torch.Tensor:
    assert batch["token_dropout"] is not None and batch["dropout_keys"] is not None
    hidden = model(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        mask=AttentionMask(batch["subsegment_ids"], batch["is_visual"]),
        crops=batch["crops"],
        pooling=batch["pooling"],
        token_dropout=TokenDropout(probabilities=batch["token_dropout"], keys=batch["dropout_keys"]),
    )
    return (hidden.float() * torch.linspace(-1, 1, hidden.shape[-1])).square().sum()


def gradients(model: Molmo2, batch: Microbatch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss(model, batch).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Of all gradients together, relative: that of a key's bias is rounding alone."""
    a, b = (torch.cat([values[name].flatten() for name in expected]) for values in (found, expected))
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("chosen", [EVERYTHING, {"decoder": 2}, {"vision_encoder": 3, "connector": True}])
def test_recomputed_gradients_are_the_same_bit_by_bit(chosen: dict[str, Any]) -> None:
    """With dropout.  Would catch other masks in the second pass, and names that a checkpoint would not find again."""
    plain, checkpointed = fresh_model(), fresh_model()
    checkpoint_activations(checkpointed, **chosen)
    batch = microbatch(plain)
    expected, found = gradients(plain, batch), gradients(checkpointed, batch)
    assert found.keys() == expected.keys()
    assert len(expected) == len(list(plain.parameters())) - 1  # the head, which the loss uses
    assert [name for name in expected if not found[name].equal(expected[name])] == []
    assert checkpointed.state_dict().keys() == plain.state_dict().keys()


def kept_for_backward(**chosen: Any) -> int:
    """Bytes of one forward pass that wait for the backward pass."""
    model = fresh_model(model_with_layers(6))
    checkpoint_activations(model, **chosen)
    batch = microbatch(model, tokens=512, images=6)
    with LiveBytes() as memory:
        waiting = loss(model, batch)
        del batch
        return memory.now if waiting.requires_grad else 0


def test_memory() -> None:
    """Would catch a wrapper that is not called, or a part that is left out.  Measured, of 28.5 MB for six blocks of
    each kind and 512 tokens: decoder 23.6 MB, half of its blocks 11.8, vision encoder 1.8, connector 0.2."""
    all_kept = kept_for_backward()
    decoder, half = all_kept - kept_for_backward(decoder=1), all_kept - kept_for_backward(decoder=2)
    vision, connector = (all_kept - kept_for_backward(**{part: 1}) for part in ("vision_encoder", "connector"))
    assert decoder > 0.7 * all_kept
    assert half == decoder / 2
    assert vision > 0.05 * all_kept and connector > 100_000
    assert kept_for_backward(**EVERYTHING) == all_kept - decoder - vision - connector
    assert kept_for_backward(**EVERYTHING) < all_kept / 8


@pytest.mark.parametrize("guarded", [True, False])
def test_autocast_would_keep_a_copy_of_every_weight(guarded: bool) -> None:
    """The fault behind the hook: in bfloat16, all blocks' weights at the end of a forward pass, whatever is sharded."""
    model = fresh_model()
    checkpoint_activations(model, **EVERYTHING)
    if not guarded:
        model._forward_pre_hooks.clear()
    batch = microbatch(model, tokens=64)
    blocks = [*model.decoder.stack.blocks.parameters(), *model.vision_encoder.blocks.parameters()]
    weights = sum(2 * weight.numel() for weight in blocks if weight.dim() == 2)
    with torch.autocast("cpu", torch.bfloat16), LiveBytes() as memory:
        waiting = loss(model, batch)
        assert waiting.requires_grad
        assert (memory.now < weights / 2) is guarded, (memory.now, weights)
    assert torch.is_autocast_cache_enabled()


def test_without_gradients_blocks_run_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation and generation: nothing to compute twice, and no program for each length of an answer."""
    model, called = fresh_model(), []
    monkeypatch.setattr(torch, "compile", lambda forward: lambda *arguments: called.append(1) or forward(*arguments))
    compile_blocks(model)
    batch = microbatch(model)
    with torch.no_grad():
        loss(model, batch)
    assert not called
    loss(model, batch)
    assert len(called) == 6


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Compiling as far as autograd's graphs: what inductor would turn into code, without the minutes that takes."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def test_compiled_blocks(programs: Any) -> None:
    """Ten layers, which is more than the eight programs after which torch gives up; packs of many lengths, with
    dropout, computed twice.

    Would catch programs that hold for one layer or one length alone: the first length makes 6 (before and after
    attention, in both kinds of block), the second those for any length, and further ones none.
    Tolerance: products in float32 summed in another order; measured 1e-6.
    """
    config = model_with_layers(10)
    plain, compiled = fresh_model(config), fresh_model(config)
    compile_blocks(compiled)
    checkpoint_activations(compiled, **EVERYTHING)
    counts = []
    for seed, (tokens, images) in enumerate([(64, 1), (64, 1), (70, 2), (96, 3), (101, 0), (77, 2), (120, 5)]):
        batch = microbatch(plain, seed=seed, tokens=tokens, images=images)
        assert distance(gradients(compiled, batch), gradients(plain, batch)) < 1e-5
        counts.append(programs())
    assert counts[0] == counts[1] and counts[2] == counts[-1] <= 16


def test_a_function_for_each_block_would_be_compiled_for_each(programs: Any) -> None:
    """The fault that one attention function for all blocks avoids: ten layers make a program each, up to the limit."""
    model = fresh_model(model_with_layers(10))
    compile_blocks(model)
    for block in model.decoder.stack.blocks:
        block.attention.attend = torch.compiler.disable(functools.partial(block.attention.attend))
    loss(model, microbatch(model))
    assert programs() > 12


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compiled_code() -> None:
    """What aot_eager leaves out: inductor's own code, for one block of the decoder (each of its programs costs 3 s of
    g++), in one length, with dropout.

    Would catch a hash whose overflow compiled code computes otherwise: other masks.  Tolerance: measured 9e-7.
    """
    config = model_with_layers(1)
    plain, compiled = fresh_model(config), fresh_model(config)
    batch = microbatch(plain)
    torch._dynamo.reset()
    with fresh_inductor_cache(), torch._inductor.config.patch(compile_threads=1):
        compile_blocks(compiled)
        for block in compiled.vision_encoder.blocks:
            del block.forward
        checkpoint_activations(compiled, **EVERYTHING)
        assert distance(gradients(compiled, batch), gradients(plain, batch)) < 1e-5
    torch._dynamo.reset()
