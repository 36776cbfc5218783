"""transformers' own Molmo2, as an oracle: loading it strictly and feeding it our tokenized prompts (model.md 3.7).

Shape legend: B prompts, S longest prompt, C crops, P patches, D values of a patch, V visual tokens, K patches per
pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from molmo2core.errors import CheckpointError
from molmo2core.examples import PADDING, TokenizedExample
from molmo2core.model.attention import AttentionMask
from molmo2core.model.molmo2 import Molmo2
from molmo2core.model.prompt_batch import join_visual


def load_native(folder: Path) -> Any:
    """transformers' `Molmo2ForConditionalGeneration` in float32 on CPU, in evaluation mode.

    Raises:
        CheckpointError: transformers cannot load it, or a weight is missing or unexpected, of which it only warns.
    """
    from transformers import Molmo2ForConditionalGeneration

    try:
        model, loading = Molmo2ForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(str(folder), found=f"transformers cannot load it: {error}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if loading.get(kind):
            raise CheckpointError(
                str(folder),
                found=f"{kind} when transformers loads it: {sorted(map(str, loading[kind]))[:3]}",
                expected="every weight in its place",
                mend="report this: hf_mapping.py is wrong",
            )
    return model.eval()


def native_inputs(prompts: Sequence[TokenizedExample], *, pad_id: int, video: bool) -> dict[str, Tensor]:
    """A padded batch as transformers' model takes it: padding left, pooling indices over the whole call.

    Args:
        video: whether the visual input is video; images and videos never share a call.
    """
    longest = max(len(prompt.input_ids) for prompt in prompts)
    batch = (len(prompts), longest)
    input_ids = torch.full(batch, pad_id)
    attention_mask, is_visual = torch.zeros(batch, dtype=torch.int64), torch.zeros(batch, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        start = longest - len(prompt.input_ids)
        input_ids[row, start:] = torch.from_numpy(prompt.input_ids)
        attention_mask[row, start:] = 1
        is_visual[row, start:] = torch.from_numpy(prompt.is_visual).long()
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "mm_token_type_ids": is_visual}
    crops, pooling = join_visual(prompts)
    if not pooling.shape[0]:
        return inputs
    # Grids only tell how many visual tokens belong to which image; as one image, they all belong to it.
    pixels, num_tokens = crops.float() / 127.5 - 1, pooling.shape[0]
    if video:
        grids = torch.tensor([[1, num_tokens, 1]])
        return inputs | {"pixel_values_videos": pixels, "video_token_pooling": pooling, "video_grids": grids}
    grids = torch.tensor([[num_tokens, 1, 0, 0]])
    return inputs | {"pixel_values": pixels, "image_token_pooling": pooling, "image_grids": grids}


def native_logits(native: Any, prompts: Sequence[TokenizedExample], *, pad_id: int, video: bool) -> list[Tensor]:
    """Logits [S, base vocabulary] of each prompt, without padding."""
    inputs = native_inputs(prompts, pad_id=pad_id, video=video)
    position_ids = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    logits = native(**inputs, position_ids=position_ids, use_cache=False).logits
    return [row[-len(prompt.input_ids) :] for row, prompt in zip(logits, prompts, strict=True)]


def our_logits(model: Molmo2, prompts: Sequence[TokenizedExample], *, pad_id: int) -> list[Tensor]:
    """The same of our model, padded right."""
    crops, pooling = join_visual(prompts)

    def padded(name: str, filler: int) -> Tensor:
        rows = [torch.from_numpy(getattr(prompt, name)).long() for prompt in prompts]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=filler)

    hidden = model(
        input_ids=padded("input_ids", pad_id),
        position_ids=padded("position_ids", 0),
        mask=AttentionMask(padded("subsegment_ids", PADDING), padded("is_visual", 0).bool()),
        crops=crops,
        pooling=pooling,
    )
    logits = model.logits(hidden)
    return [row[: len(prompt.input_ids)] for row, prompt in zip(logits, prompts, strict=True)]
