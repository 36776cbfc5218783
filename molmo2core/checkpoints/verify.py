"""An export is accepted only if transformers' own Molmo2 and processor give what this project's code gives."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from molmo2core.checkpoints.export_hf import check_vocabulary
from molmo2core.checkpoints.fields import Fields, read_json
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

PIXEL_TOLERANCE = 0.01
"""In steps of a byte: both resize to whole bytes, so only the scaling to -1..1 rounds (measured 1e-5)."""
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
    One model at a time is in memory, besides our logits of all probes.

    Args:
        weights: folder that `reference.save_weights` wrote.
        tolerance: largest difference of a logit, relative to the largest logit.

    Raises:
        CheckpointError: transformers does not load it, or something differs; the message gives both numbers.
    """
    tokenizer = load_tokenizer(folder)
    config = read_config(weights)
    check_vocabulary(tokenizer.special, config, str(folder))
    prompts = probe_prompts(folder, config.geometry, _limits(folder))
    batches: dict[str, Sequence[TokenizedExample]] = {kind: [prompt] for kind, prompt in prompts.items()}
    batches[_MIXED] = [prompts["image"], prompts["images"], prompts["text"]]
    dtype = _stored_dtype(folder / "config.json")
    progress(f"computing logits of {weights}")
    ours = _our_logits(weights, dtype, batches, tokenizer.special.pad, progress)
    progress(f"computing logits of {folder} with transformers")
    largest = max(float(logits.abs().max()) for logits in ours.values())
    differences = _differences(folder, ours, batches, tokenizer.special.pad)
    verification = Verification(
        max_difference={kind: difference / largest for kind, difference in differences.items()},
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
def _differences(folder: Path, ours: dict[str, Tensor], batches: Batches, pad_id: int) -> dict[str, float]:
    """By probe, the largest difference of a logit.  Takes what was compared out of `ours`."""
    native = load_native(folder)
    found: dict[str, float] = {}
    for kind, batch in batches.items():
        try:
            theirs = torch.cat(native_logits(native, batch, pad_id=pad_id, video=kind == "video"))
        except (IndexError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"transformers' Molmo2 on the probe '{kind}'", found=f"it fails: {error}") from error
        found[kind] = float(theirs.sub_(ours.pop(kind)).abs_().max())
    return found


def _stored_dtype(path: Path) -> torch.dtype:
    fields = Fields(read_json(path), str(path))
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if fields.value("dtype", str) not in dtypes:
        raise fields.wrong("dtype", f"one of {', '.join(dtypes)}")
    return dtypes[fields.value("dtype", str)]


def _limits(folder: Path) -> PreprocessingConfig:
    """The limits that the export tells its users' processor."""
    names = ("preprocessor_config.json", "video_preprocessor_config.json")
    image, video = (Fields(read_json(folder / name), str(folder / name)) for name in names)
    return PreprocessingConfig(
        max_crops=image.value("max_crops", int),
        max_frames=video.value("num_frames", int),
        max_fps=video.value("max_fps", float),
    )


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
    difference = float((pixels - torch.from_numpy(prompt.crops).float()).abs().max())
    if not difference <= PIXEL_TOLERANCE:
        raise CheckpointError(
            f"{folder}: pixels of transformers' processor on an image prompt",
            found=f"differ by up to {difference:.3g} of a byte step",
            expected=f"at most {PIXEL_TOLERANCE}",
            mend="report this: the export must not be used",
        )
    return difference


def _user_text(prompt: TokenizedExample, tokenizer: TextTokenizer) -> str:
    """What stands in the user's turn of a prompt, style prefix included."""
    text: str = tokenizer.backend.decode(prompt.input_ids.tolist(), skip_special_tokens=False)
    return text.split(f"{CHAT_START}user\n", 1)[1].split(CHAT_END, 1)[0]
