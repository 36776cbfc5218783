"""FlexAttention and flash-attn on CUDA against their CPU twin.  Tolerances in bfloat16 are those of its 8 bits: values
of order one, so 2 ** -7 of the largest, and twice that for gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from molmo2core.examples import PADDING
from molmo2core.model import attention_flash
from molmo2core.model.attention import AttentionMask, attend, attend_within_rows
from molmo2core.model.backends import select_attention
from molmo2core.testing.packs import random_pack
from molmo2core.testing.tiny_model import random_tree, tiny_model

pytestmark = pytest.mark.gpu
needs_flash = pytest.mark.skipif(attention_flash._kernel() is None, reason="needs flash-attn")


def compare(pack: AttentionMask, backend: str, dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    length = pack.subsegment_ids.shape[1]
    inputs = [torch.randn(1, length, heads, 64, generator=generator) for heads in (8, 2, 2)]
    real = (pack.subsegment_ids != PADDING)[..., None, None]
    weights = torch.randn(inputs[0].shape, generator=generator) * real
    cpu = [x.to(dtype).float().requires_grad_() for x in inputs]
    expected = attend(*cpu, pack, "sdpa")
    wanted = torch.autograd.grad((expected * weights).sum(), cpu)
    on_gpu = AttentionMask(pack.subsegment_ids.cuda(), pack.is_visual.cuda())
    gpu = [x.to("cuda", dtype).requires_grad_() for x in inputs]
    found = attend(*gpu, on_gpu, backend)  # type: ignore[arg-type]
    gradients = torch.autograd.grad((found * weights.to("cuda", dtype)).sum(), gpu)
    assert ((found.cpu().float() - expected) * real).abs().max() <= tolerance * expected.abs().max()
    for ours, theirs in zip(gradients, wanted, strict=True):
        assert (ours.cpu().float() - theirs).abs().max() <= 2 * tolerance * theirs.abs().max()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2**-7), (torch.float32, 5e-3)])
def test_flex(seed: int, dtype: torch.dtype, tolerance: float) -> None:
    """The compiled kernel skips and takes whole blocks.  float32 goes through TF32 in its matrix products."""
    compare(random_pack(np.random.default_rng(seed), max_tokens=3000), "flex", dtype, tolerance)


@needs_flash
@pytest.mark.parametrize("seed", range(8))
def test_flash(seed: int) -> None:
    pack = random_pack(np.random.default_rng(seed), max_tokens=3000, plain=True)
    compare(pack, "flash", torch.bfloat16, 2**-7)
    compare(random_pack(np.random.default_rng(seed), max_tokens=3000), "flash", torch.bfloat16, 2**-7)  # goes to flex


@pytest.mark.parametrize("seed", range(3))
def test_sdpa(seed: int) -> None:
    compare(random_pack(np.random.default_rng(seed), max_tokens=3000), "sdpa", torch.bfloat16, 2**-7)


@needs_flash
def test_vision_encoder_heads() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(3, 729, 16, 72, generator=generator) for _ in range(3)]
    expected = attend_within_rows(*(x.bfloat16().float() for x in inputs), "sdpa")
    found = attend_within_rows(*(x.to("cuda", torch.bfloat16) for x in inputs), "flash")
    assert (found.cpu().float() - expected).abs().max() <= 2**-7 * expected.abs().max()


@pytest.mark.parametrize("seed", range(4))
def test_model_in_mixed_precision(seed: int) -> None:
    """`amp_bf16` with the backends that `auto` takes, forward and backward, as one GPU trains: float32 weights under
    autocast.  Would catch a dtype that a kernel refuses.

    Tolerance: against float32, the same on a CPU differs by up to 4 % of the norm of hidden states, and 14 % of that of
    all gradients (8 seeds).
    """
    exact, mixed = (hidden_and_gradients(device, seed) for device in ("cpu", "cuda"))
    for expected, found, tolerance in zip(exact, mixed, (0.08, 0.28), strict=True):
        assert (found - expected).norm() <= tolerance * expected.norm()


def hidden_and_gradients(device: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """In float32 on a CPU, in mixed precision elsewhere."""
    model = tiny_model(seed).to(device)
    select_attention(model, "auto", torch.device(device))
    tree = random_tree(model.config, seed=seed, images=2, branches=(90, 70))
    ids, positions, subsegments, pooling = (
        torch.from_numpy(array).long().to(device)
        for array in (tree.input_ids, tree.position_ids, tree.subsegment_ids, tree.pooling)
    )
    with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
        hidden = model(
            input_ids=ids[None],
            position_ids=positions[None],
            mask=AttentionMask(subsegments[None], torch.from_numpy(tree.is_visual)[None].to(device)),
            crops=torch.from_numpy(tree.crops).to(device),
            pooling=pooling,
        )
    weights = torch.linspace(-1, 1, hidden.shape[-1], device=device)
    (hidden.float().square() * weights).sum().backward()
    gradients = [p.grad.float().flatten() for p in model.parameters() if p.grad is not None]
    return hidden.detach().float().cpu(), torch.cat(gradients).cpu()
