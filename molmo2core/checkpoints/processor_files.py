"""Tokenizer and processor files of an exported folder (model.md 3.6).

The fields are the released ones.  The processor flags must be written: the defaults of the released Python classes
give another token sequence.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from molmo2core.checkpoints.chat_template import CHAT_TEMPLATE
from molmo2core.checkpoints.hf_config import BILINEAR, HALF, HUB_REPOSITORY, PROCESSOR_FLAGS
from molmo2core.preprocessing.config import PreprocessingConfig, VisualGeometry
from molmo2core.special_tokens import EXTRA_TOKENS, TextTokens, load_tokenizer, read_text_tokens

_SLOW_TOKENIZER_FILES = ("vocab.json", "merges.txt")
"""What `tokenizer.json` holds once more, for readers of older formats."""


def write_processor_files(
    folder: Path, tokenizer: Path, geometry: VisualGeometry, preprocessing: PreprocessingConfig
) -> None:
    """Write tokenizer, chat template and the three processor files into an existing folder.

    Args:
        folder: destination.
        tokenizer: folder with `tokenizer.json`, and perhaps `vocab.json` and `merges.txt`, which are copied.
        geometry: what the weights fix.
        preprocessing: limits that users of the export start with.

    Raises:
        DataError: the tokenizer is missing or lacks a special token.
    """
    added = load_tokenizer(tokenizer).backend.get_added_tokens_decoder()
    text = read_text_tokens(tokenizer)
    for file in ("tokenizer.json", *(name for name in _SLOW_TOKENIZER_FILES if (tokenizer / name).is_file())):
        shutil.copyfile(tokenizer / file, folder / file)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    for name, content in (
        ("tokenizer_config.json", _tokenizer_config(text)),
        ("special_tokens_map.json", _special_tokens_map(text)),
        ("added_tokens.json", {token.content: number for number, token in added.items()}),
        ("processor_config.json", _processor_config()),
        ("preprocessor_config.json", _image_config(geometry, preprocessing)),
        ("video_preprocessor_config.json", _video_config(geometry, preprocessing)),
    ):
        write_json(folder / name, content)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object as people and diffs like it."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _special_tokens_map(text: TextTokens) -> dict[str, Any]:
    return {
        "bos_token": text.bos,
        "eos_token": text.eos,
        "pad_token": text.pad,
        "additional_special_tokens": list(EXTRA_TOKENS),
    }


def _tokenizer_config(text: TextTokens) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "processor_class": "Molmo2Processor",
        **_special_tokens_map(text),
    }


def _processor_config() -> dict[str, Any]:
    return {
        "processor_class": "Molmo2Processor",
        "auto_map": {"AutoProcessor": f"{HUB_REPOSITORY}--processing_molmo2.Molmo2Processor"},
        **PROCESSOR_FLAGS,
    }


def _image_config(geometry: VisualGeometry, preprocessing: PreprocessingConfig) -> dict[str, Any]:
    return {
        "image_processor_type": "Molmo2ImageProcessor",
        "processor_class": "Molmo2Processor",
        "auto_map": {
            "AutoProcessor": f"{HUB_REPOSITORY}--processing_molmo2.Molmo2Processor",
            "AutoImageProcessor": f"{HUB_REPOSITORY}--image_processing_molmo2.Molmo2ImageProcessor",
        },
        "do_convert_rgb": True,
        "image_mean": HALF,
        "image_std": HALF,
        "max_crops": preprocessing.max_crops,
        "overlap_margins": list(geometry.overlap_margins),
        "patch_size": geometry.patch_size,
        "pooling_size": list(geometry.image_pooling),
        "resample": BILINEAR,
        "size": {"height": geometry.crop_size, "width": geometry.crop_size},
    }


def _video_config(geometry: VisualGeometry, preprocessing: PreprocessingConfig) -> dict[str, Any]:
    return {
        "video_processor_type": "Molmo2VideoProcessor",
        "processor_class": "Molmo2Processor",
        "auto_map": {
            "AutoProcessor": f"{HUB_REPOSITORY}--processing_molmo2.Molmo2Processor",
            "AutoVideoProcessor": f"{HUB_REPOSITORY}--video_processing_molmo2.Molmo2VideoProcessor",
        },
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "do_sample_frames": True,
        "frame_sample_mode": "uniform_last_frame",
        "image_mean": HALF,
        "image_std": HALF,
        "max_fps": preprocessing.max_fps,
        "num_frames": preprocessing.max_frames,
        "sampling_fps": 2,
        "patch_size": geometry.patch_size,
        "pooling_size": list(geometry.video_pooling),
        "resample": BILINEAR,
        "rescale_factor": 1 / 255,
        "return_metadata": False,
        "size": {"height": geometry.crop_size, "width": geometry.crop_size},
    }
