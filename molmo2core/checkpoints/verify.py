"""An export is accepted only if transformers' own Molmo2 and processor give what this project's code gives."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from molmo2core.checkpoints.fields import read_json
from molmo2core.checkpoints.native import load_native, native_logits, our_logits
from molmo2core.checkpoints.probes import probe_examples, probe_prompts
from molmo2core.checkpoints.reference import load_weights, read_config
from molmo2core.checkpoints.weight_files import Progress, silent
from molmo2core.errors import CheckpointError
from molmo2core.examples import TokenizedExample
from molmo2core.preprocessing.config import PreprocessingConfig
from molmo2core.special_tokens import CHAT_END, CHAT_START, TextTokenizer, load_tokenizer

Batches = Mapping[str, Sequence[TokenizedExample]]
"""Prompts that are one call, by name of the probe."""

_MIXED = "image, images and text in one padded batch"


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What was compared and how close it was."""

    max_difference: dict[str, float]
    """By probe: largest difference of any logit, relative to the largest logit of all probes."""
    max_logit: float
    max_pixel_difference: float
    """Between transformers' image processor and ours, in units of one byte step."""

    @property
    def worst(self) -> float:
        """Largest of `max_difference`."""
        return max(self.max_difference.values())


def verify_export(folder: Path, weights: Path, *, tolerance: float, progress: Progress = silent) -> Verification:
    """Compare the exported `folder` with the `weights` it was made from.

    Loads the folder with transformers' own classes in float32 on CPU and compares all logits on the probes (text,
    image, several images, video, a padded batch), and its processor's ids, pooling and pixels on an image prompt.
    One model at a time is in memory, besides all logits of the probes.

    Args:
        weights: folder that `reference.save_weights` wrote.
        tolerance: largest difference of a logit, relative to the largest logit.

    Raises:
        CheckpointError: transformers does not load it, or something differs; the message gives both numbers.
    """
    tokenizer = load_tokenizer(folder)
    prompts = probe_prompts(folder, read_config(weights).geometry, _limits(folder))
    batches: dict[str, Sequence[TokenizedExample]] = {kind: [prompt] for kind, prompt in prompts.items()}
    batches[_MIXED] = [prompts["image"], prompts["images"], prompts["text"]]
    dtype = getattr(torch, read_json(folder / "config.json")["dtype"])
    progress(f"computing logits of {weights}")
    ours = _our_logits(weights, dtype, batches, tokenizer.special.pad, progress)
    progress(f"computing logits of {folder} with transformers")
    theirs = _their_logits(folder, batches, tokenizer.special.pad)
    largest = max(float(logits.abs().max()) for logits in ours.values())
    verification = Verification(
        max_difference={kind: float((ours[kind] - theirs[kind]).abs().max()) / largest for kind in batches},
        max_logit=largest,
        max_pixel_difference=_compare_processor(folder, prompts["image"], tokenizer),
    )
    for kind, difference in verification.max_difference.items():
        if not difference <= tolerance:  # NaN is no agreement
            raise CheckpointError(
                f"{folder}: logits of transformers' Molmo2 on the probe '{kind}'",
                found=f"differ by up to {difference:.3g} of the largest logit ({largest:.3g})",
                expected=f"at most {tolerance:.3g}",
                mend="report this: the export must not be used",
            )
    return verification


@torch.inference_mode()
def _our_logits(
    weights: Path, dtype: torch.dtype, batches: Batches, pad_id: int, progress: Progress
) -> dict[str, Tensor]:
    """By probe, with the rounding that the export's dtype brings."""
    model = load_weights(weights, progress).eval()
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))
    return {kind: torch.cat(our_logits(model, batch, pad_id=pad_id)) for kind, batch in batches.items()}


@torch.inference_mode()
def _their_logits(folder: Path, batches: Batches, pad_id: int) -> dict[str, Tensor]:
    native = load_native(folder)
    found: dict[str, Tensor] = {}
    for kind, batch in batches.items():
        try:
            found[kind] = torch.cat(native_logits(native, batch, pad_id=pad_id, video=kind == "video"))
        except (IndexError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"transformers' Molmo2 on the probe '{kind}'", found=f"it fails: {error}") from error
    return found


def _limits(folder: Path) -> PreprocessingConfig:
    """The limits that the export tells its users' processor."""
    image, video = (read_json(folder / name) for name in ("preprocessor_config.json", "video_preprocessor_config.json"))
    return PreprocessingConfig(max_crops=image["max_crops"], max_frames=video["num_frames"], max_fps=video["max_fps"])


def _compare_processor(folder: Path, prompt: TokenizedExample, tokenizer: TextTokenizer) -> float:
    """Largest difference of a pixel in byte steps, after ids and pooling were found equal."""
    from PIL import Image
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(str(folder), found=f"transformers cannot load its processor: {error}") from error
    image = Image.open(io.BytesIO(probe_examples()["image"].media.files[0]))
    content = [{"type": "image", "image": image}, {"type": "text", "text": _user_text(prompt, tokenizer)}]
    theirs: Mapping[str, Tensor] = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    pooling = theirs["image_token_pooling"].numpy()
    padded = np.pad(pooling, ((0, 0), (0, prompt.pooling.shape[1] - pooling.shape[1])), constant_values=-1)
    for name, found, expected in (
        ("input_ids", theirs["input_ids"][0].numpy(), prompt.input_ids),
        ("mm_token_type_ids", theirs["mm_token_type_ids"][0].numpy().astype(bool), prompt.is_visual),
        ("image_token_pooling", padded, prompt.pooling),
    ):
        if not np.array_equal(found, expected):
            raise CheckpointError(
                f"{folder}: {name} of transformers' processor on an image prompt",
                found=f"shape {found.shape}, begins with {found.reshape(-1)[:8].tolist()}",
                expected=f"shape {expected.shape}, begins with {expected.reshape(-1)[:8].tolist()}",
                mend="report this: the export must not be used",
            )
    pixels = (theirs["pixel_values"] + 1) * 127.5
    return float((pixels - torch.from_numpy(prompt.crops).float()).abs().max())


def _user_text(prompt: TokenizedExample, tokenizer: TextTokenizer) -> str:
    """What stands in the user's turn of a prompt, style prefix included."""
    text: str = tokenizer.backend.decode(prompt.input_ids.tolist(), skip_special_tokens=False)
    return text.split(f"{CHAT_START}user\n", 1)[1].split(CHAT_END, 1)[0]
