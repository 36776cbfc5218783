"""Every backend against the one definition of the mask, message_tree/attention_rule.py, on random packs.

On a CPU, FlexAttention of torch 2.7 runs uncompiled, which evaluates the rule for all pairs and ignores the blocks, so
the blocks are tested apart, and the compiled kernel under newer torch (`make test-torch`).  flash-attn does not run at
all, so its bounds are tested with an attention of our own.  tests/gpu runs both for real.  Tolerances: float64 is
compared at 1e-12 (300 packs: values differ by at most 2.4e-15, gradients by 1.1e-14), FlexAttention in float32 at 1e-5
(100 packs: equal; compiled by torch 2.11 and 2.15: 5e-7).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import TorchDispatchMode

from molmo2core.checkpoints.native import our_logits
from molmo2core.errors import RecipeError
from molmo2core.examples import PADDING
from molmo2core.message_tree.attention_rule import allowed
from molmo2core.model import attention_flash, attention_flex, attention_sdpa
from molmo2core.model.attention import AttentionMask, attend, attend_within_rows
from molmo2core.model.backends import select_attention
from molmo2core.model.config import AttentionBackend
from molmo2core.model.decoder import DecoderAttention
from molmo2core.model.vision_encoder import VisionBlock
from molmo2core.testing.packs import random_pack
from molmo2core.testing.tiny_model import random_prompt, tiny_model

HEADS, GROUPS, WIDTH = 4, 2, 16


def tensors(batch: int, length: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, length, heads, WIDTH) for heads in (HEADS, GROUPS, GROUPS)]
    query, key, value = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    return query, key, value


def by_the_rule(query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask) -> Tensor:
    """Dense attention under the brute-force rule, key heads repeated."""
    rows = [allowed(i.numpy(), v.numpy()) for i, v in zip(mask.subsegment_ids, mask.is_visual, strict=True)]
    dense = torch.from_numpy(np.stack(rows))[:, None]
    key, value = (x.repeat_interleave(HEADS // GROUPS, dim=2).transpose(1, 2) for x in (key, value))
    scores = (query.transpose(1, 2) @ key.transpose(2, 3) / WIDTH**0.5).masked_fill(~dense, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2)


packs = st.integers(0, 2**31).map(lambda seed: random_pack(np.random.default_rng(seed), max_tokens=420))
"""Documents with a root of text and visual tokens, branches, visual tokens in branches, padding anywhere."""


@settings(max_examples=60, deadline=None)
@given(packs=st.lists(packs, min_size=1, max_size=2), short=st.sampled_from([0, 40, 1000]), rows=st.integers(1, 70))
def test_sdpa_values_and_gradients(packs: list[AttentionMask], short: int, rows: int) -> None:
    """Would catch keys beyond a row's reach, a mask kept for another document, heads paired with wrong groups."""
    mask = stacked(packs)
    inputs = [x.requires_grad_() for x in tensors(*mask.subsegment_ids.shape, torch.float64)]
    real = (mask.subsegment_ids != PADDING)[..., None, None]
    weights = torch.randn(inputs[0].shape, dtype=torch.float64) * real
    with pytest.MonkeyPatch.context() as patch:  # both ways of doing a document, at sizes a test can afford
        patch.setattr(attention_sdpa, "SHORT", short)
        patch.setattr(attention_sdpa, "QUERY_ROWS", rows)
        ours = attend(*inputs, mask, "sdpa")
        gradients = torch.autograd.grad((ours * weights).sum(), inputs)
    expected = by_the_rule(*inputs, mask)
    assert ((ours - expected) * real).abs().max() <= 1e-12
    for found, wanted in zip(gradients, torch.autograd.grad((expected * weights).sum(), inputs), strict=True):
        assert (found - wanted).abs().max() <= 1e-12


@settings(max_examples=40, deadline=None)
@given(packs=st.lists(packs, min_size=1, max_size=2))
@torch.no_grad()
def test_flex_values(packs: list[AttentionMask]) -> None:
    """Would catch a block that is skipped or taken whole by mistake."""
    mask = stacked(packs)
    query, key, value = tensors(*mask.subsegment_ids.shape, torch.float32)
    real = (mask.subsegment_ids != PADDING)[..., None, None]
    difference = (attend(query, key, value, mask, "flex") - by_the_rule(query, key, value, mask)) * real
    assert difference.abs().max() <= 1e-5


compiles_on_a_cpu = pytest.mark.skipif(
    TorchVersion(torch.__version__) < "2.11", reason="torch 2.7 generates C++ for this that does not compile"
)


@compiles_on_a_cpu
@torch.no_grad()
def test_compiled_flex_values() -> None:
    """The kernel that walks the lists of blocks, on a CPU, where newer torch can (`make test-torch`)."""
    for seed in range(8):
        mask = random_pack(np.random.default_rng(seed), max_tokens=700)
        inputs = tensors(*mask.subsegment_ids.shape, torch.float32)
        query, key, value = (x.transpose(1, 2) for x in inputs)
        found = attention_flex._compiled()(query, key, value, block_mask=mask.block_mask, enable_gqa=True)
        real = (mask.subsegment_ids != PADDING)[..., None, None]
        assert ((found.transpose(1, 2) - by_the_rule(*inputs, mask)) * real).abs().max() <= 1e-5


@compiles_on_a_cpu
@torch.no_grad()
def test_compiling_too_often_is_an_error() -> None:
    """torch would go on with the unfused kernel and only warn, until a long sequence's scores do not fit."""
    torch.compiler.reset()
    with (
        torch._dynamo.config.patch(recompile_limit=1),
        pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit),
    ):
        for length in (100, 300):
            pack = random_pack(np.random.default_rng(0), max_tokens=length)
            inputs = (x.transpose(1, 2) for x in tensors(1, pack.subsegment_ids.shape[1], torch.float32))
            attention_flex._compiled()(*inputs, block_mask=pack.block_mask, enable_gqa=True)


@settings(max_examples=100, deadline=None)
@given(pack=st.integers(0, 2**31).map(lambda seed: random_pack(np.random.default_rng(seed), max_tokens=1500)))
def test_blocks_are_never_wrong(pack: AttentionMask) -> None:
    """A block of which some pair is allowed is kept; a block taken whole has no pair that is not.  The compiled
    kernel trusts both and never looks at a skipped or whole block again."""
    size = attention_flex.BLOCK
    dense = allowed(pack.subsegment_ids[0].numpy(), pack.is_visual[0].numpy())
    missing = -len(dense) % size
    blocks = np.pad(dense, (0, missing)).reshape(-1, size, (len(dense) + missing) // size, size).transpose(0, 2, 1, 3)
    some, whole = (
        x[0].numpy() for x in attention_flex.classify_blocks(pack.subsegment_ids.to(torch.int32), pack.is_visual)
    )
    assert not (blocks.any((2, 3)) & ~some).any()
    assert not (whole & ~blocks.all((2, 3))).any()
    assert not (whole & ~some).any()


def test_blocks_are_mostly_told_apart() -> None:
    """A classification that keeps every block would pass above and waste everything: on packs of whole documents few
    kept blocks are empty, and of a long video nearly all are whole."""
    kept = wasted = 0
    for seed in range(20):
        pack = random_pack(np.random.default_rng(seed), max_tokens=4000, padding=False)
        dense = allowed(pack.subsegment_ids[0].numpy(), pack.is_visual[0].numpy())
        missing = -len(dense) % 128
        blocks = np.pad(dense, (0, missing)).reshape(-1, 128, (len(dense) + missing) // 128, 128).any((1, 3))
        some = attention_flex.classify_blocks(pack.subsegment_ids.to(torch.int32), pack.is_visual)[0][0].numpy()
        kept, wasted = kept + int(some.sum()), wasted + int((some & ~blocks).sum())
    assert wasted <= 0.1 * kept
    video = torch.full((1, 128 * 30), 10_000)
    _, whole = attention_flex.classify_blocks(video.to(torch.int32), torch.ones_like(video, dtype=torch.bool))
    assert whole.all()


def test_block_mask_is_small() -> None:
    """36,864 tokens: what is kept is under 50 MB (dense float32: 5.4 GB)."""
    rng = np.random.default_rng(0)
    pack = random_pack(rng, max_tokens=36_864, padding=False)
    made = attention_flex.block_mask(pack.subsegment_ids, pack.is_visual)
    some, _ = attention_flex.classify_blocks(pack.subsegment_ids.to(torch.int32), pack.is_visual)
    assert torch.equal(made.to_dense()[:, 0].bool(), some)  # the lists of blocks that the kernel walks
    kept = [value for value in vars(made).values() if isinstance(value, Tensor)]
    assert len(kept) >= 6
    assert sum(x.numel() * x.element_size() for x in kept) < 50e6


def test_sdpa_memory_grows_with_the_length_alone() -> None:
    """One long video document, forward and backward: no tensor of S x S, nor many parts of one, in any operation.
    Would catch a mask of the whole batch, torch's unfused kernel, and masks that autograd keeps."""
    length = 4096
    ids = torch.full((1, length), 10_000)
    ids[:, 3500:] = 0
    visual = torch.zeros(1, length, dtype=torch.bool)
    visual[:, 5:3400:2] = True
    inputs = [x.requires_grad_() for x in tensors(1, length, torch.float32)]
    kept: dict[int, int] = {}

    def note(saved: Tensor) -> Tensor:
        kept[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes() // 4
        return saved

    with LargestTensor() as seen:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
            out = attend(*inputs, AttentionMask(ids, visual))
        out.sum().backward()
    assert seen.largest <= attention_sdpa.QUERY_ROWS * length
    assert sum(kept.values()) <= 5 * length * HEADS * WIDTH


class LargestTensor(TorchDispatchMode):
    """Notes the largest result of any operation."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self.largest = max(self.largest, value.numel())
        return result


@pytest.mark.parametrize("first_mode", [torch.inference_mode, torch.no_grad])
def test_a_mask_serves_evaluation_then_training(first_mode: Callable[[], Any]) -> None:
    """What a mask keeps from its first use must fit the second, another dtype included.  Would catch a kept tensor
    that autograd may not save because inference made it, and one in bfloat16 beside float32 queries."""
    kept, fresh = (random_pack(np.random.default_rng(3), max_tokens=400) for _ in range(2))
    length = kept.subsegment_ids.shape[1]
    with first_mode():
        attend(*tensors(1, length, torch.bfloat16), kept, "sdpa")
        attend(*tensors(1, length, torch.float32), kept, "sdpa")
        attend(*tensors(1, length, torch.float32), kept, "flex")
    results = []
    for mask in (kept, fresh):
        inputs = [x.requires_grad_() for x in tensors(1, length, torch.float32)]
        results.append(torch.autograd.grad(attend(*inputs, mask, "sdpa").square().sum(), inputs))
    assert all(torch.equal(after, alone) for after, alone in zip(*results, strict=True))
    blocks = kept.block_mask  # FlexAttention saves these, and what its rule looks up, for the backward pass
    saved = [*vars(blocks).values(), *inspect.getclosurevars(blocks.mask_mod).nonlocals.values()]
    assert not any(value.is_inference() for value in saved if isinstance(value, Tensor))


def test_flash_bounds_are_the_documents() -> None:
    """flash-attn gets runs of tokens; here an attention of our own gets the same runs.  Would catch runs across rows
    and padding that joins a document."""
    packs = [random_pack(np.random.default_rng(seed), max_tokens=200, plain=True) for seed in (1, 2, 3)]
    mask = stacked(packs)
    assert mask.is_plain_causal
    query, key, value = tensors(*mask.subsegment_ids.shape, torch.float32)
    offsets, longest = mask.variable_lengths
    flat = [x.flatten(0, 1).repeat_interleave(HEADS // x.shape[2], dim=1) for x in (query, key, value)]
    parts = [
        F.scaled_dot_product_attention(*(x[a:b].transpose(0, 1) for x in flat), is_causal=True).transpose(0, 1)
        for a, b in zip(offsets.tolist()[:-1], offsets.tolist()[1:], strict=True)
    ]
    real = (mask.subsegment_ids != PADDING)[..., None, None]
    difference = (torch.cat(parts).view_as(query) - by_the_rule(query, key, value, mask)) * real
    assert difference.abs().max() <= 1e-5
    assert longest == max(len(part) for part in parts)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**31), plain=st.booleans())
def test_plain_documents_are_those_that_the_rule_makes_causal(seed: int, plain: bool) -> None:
    """Both ways: a document with branches that is taken for plain text would be wrong, and a prompt and its answer
    that are not would be slow, without flash-attn or with a mask."""
    pack = random_pack(np.random.default_rng(seed), max_tokens=300, plain=plain)
    for span in pack.spans:
        causal = np.tri(span.length, dtype=bool)
        by_the_rule = allowed(span.subsegment_ids.numpy(), span.is_visual.numpy())
        assert span.is_plain_causal == (span.is_padding or np.array_equal(by_the_rule, causal))


@pytest.mark.parametrize(
    ("ids", "visual", "plain"),
    [
        ([10_000, 0, 0], [], True),  # a prompt and its answer
        ([10_000, 0, 0, 1], [], False),  # two answers
        ([10_000, 10_000, 0], [0], True),  # the one visual token that training adds to a pack without any
        ([10_000, 10_000, 0], [0, 1], False),
        ([-1, 10_000, 0, -1, 110_000, 100_000, -1], [4, 5], True),  # which do not see each other in both directions
    ],
)
def test_plain_packs(ids: list[int], visual: list[int], plain: bool) -> None:
    is_visual = torch.zeros(1, len(ids), dtype=torch.bool)
    is_visual[0, visual] = True
    assert AttentionMask(torch.tensor([ids]), is_visual).is_plain_causal == plain


@torch.no_grad()
def test_backends_give_the_same_model() -> None:
    """The whole model, decoder attention replaced."""
    model = tiny_model(1)
    pack = random_pack(np.random.default_rng(4), max_tokens=300)
    length = pack.subsegment_ids.shape[1]
    inputs = {
        "input_ids": torch.randint(0, 700, (1, length)),
        "position_ids": torch.arange(length)[None],
        "crops": torch.zeros(0, 36, 243, dtype=torch.uint8),
        "pooling": torch.zeros(0, 9, dtype=torch.int64),
    }
    plain = model(**inputs, mask=pack)
    for block in model.decoder.stack.blocks:  # select_attention refuses flex on a CPU
        block.attention.attend = partial(attend, backend="flex")
    flexed = model(**inputs, mask=AttentionMask(pack.subsegment_ids, pack.is_visual))
    real = (pack.subsegment_ids != PADDING)[..., None]
    assert not torch.equal(plain, flexed)
    assert ((plain - flexed) * real).abs().max() <= 1e-5 * plain.abs().max()


@torch.no_grad()
def test_kernels_get_one_half_dtype_under_autocast() -> None:
    """float32 weights under `amp_bf16`.  Would catch queries and keys that their norms' weights made float32 beside
    bfloat16 values: FlexAttention and flash-attn refuse that, and context parallelism would exchange double."""
    model = tiny_model(1)
    prompt = random_prompt(model.config, seed=1, images=1)
    seen: list[torch.dtype] = []
    for module in model.modules():
        if isinstance(module, DecoderAttention):
            module.attend = noting_dtypes(seen, partial(attend, backend="flex"))
        elif isinstance(module, VisionBlock):
            module.attend = noting_dtypes(seen, attend_within_rows)
    with torch.autocast("cpu", torch.bfloat16):
        our_logits(model, [prompt], pad_id=0)
    assert set(seen) == {torch.bfloat16}
    assert len(seen) == 3 * (model.config.decoder.num_layers + model.config.vision_encoder.num_layers)


def noting_dtypes(seen: list[torch.dtype], inner: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def noting(query: Tensor, key: Tensor, value: Tensor, *mask: AttentionMask) -> Tensor:
        seen.extend((query.dtype, key.dtype, value.dtype))
        return inner(query, key, value, *mask)

    return noting


@pytest.mark.parametrize("backend", ["flex", "flash"])
def test_a_gpu_backend_without_a_gpu_is_an_error(backend: AttentionBackend) -> None:
    with pytest.raises(RecipeError, match=f"{backend}: a model on cpu; expected a CUDA device; to mend it: set attent"):
        select_attention(tiny_model(0), backend, torch.device("cpu"))


@pytest.mark.skipif(attention_flash._kernel() is not None, reason="flash-attn is installed")
def test_flash_without_flash_attn_is_an_error() -> None:
    """On a GPU machine whose image lacks it: told at the start, not by an ImportError in the first step."""
    with pytest.raises(RecipeError, match="no importable package flash_attn; expected flash-attn 2"):
        select_attention(tiny_model(0), "flash", torch.device("cuda"))


def test_the_switch_reaches_every_attention() -> None:
    model = tiny_model(0)
    select_attention(model, "sdpa", torch.device("cpu"))
    switched = [m.attend for m in model.modules() if hasattr(m, "attend")]
    assert len(switched) == model.config.decoder.num_layers + model.config.vision_encoder.num_layers
    assert all(attend.keywords == {"backend": "sdpa"} for attend in switched)


def stacked(packs: list[AttentionMask]) -> AttentionMask:
    """One batch, the shorter rows padded."""

    def padded(name: str, filler: int) -> Tensor:
        rows = [getattr(pack, name)[0].long() for pack in packs]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=filler)

    return AttentionMask(padded("subsegment_ids", PADDING), padded("is_visual", 0).bool())
