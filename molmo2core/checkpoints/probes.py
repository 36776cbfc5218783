"""Inputs on which an export is compared with the model it was made from: noise as media, one of every kind."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
from PIL import Image

from molmo2core.annotations import Annotation, Conversation, MediaKind, QuestionAnswer, Turn
from molmo2core.examples import Example, Media, Subtitle, TokenizedExample
from molmo2core.preprocessing.config import PreprocessingConfig, VisualGeometry
from molmo2core.preprocessing.preprocessor import Preprocessor
from molmo2core.special_tokens import load_tokenizer

QUESTION = "What is to be seen?"
_SIZES = ((210, 90), (80, 200), (120, 120))
"""(width, height) of the probe images: several tilings."""
_VIDEO_SIZE = (96, 64)
_VIDEO_FPS = 8
_VIDEO_FRAMES = 12


def probe_examples() -> dict[str, Example]:
    """Text, one image, several images and a video with subtitles, the same each time."""
    rng = np.random.default_rng(0)
    images = tuple(_png(rng, size) for size in _SIZES)
    video = Media(
        kind="video",
        files=(_mp4(rng),),
        sizes=(_VIDEO_SIZE,),
        duration_seconds=_VIDEO_FRAMES / _VIDEO_FPS,
        subtitles=(Subtitle(start=0.0, end=1.0, text="hello there"),),
    )
    talk = Conversation(task="text", turns=(Turn(role="user", text=QUESTION), Turn(role="assistant", text="")))
    return {
        "text": _example("text", Media(kind="none"), talk),
        "image": _example("image", Media(kind="image", files=images[:1], sizes=_SIZES[:1]), _question("image_qa")),
        "images": _example("images", Media(kind="images", files=images, sizes=_SIZES), _question("multi_image_qa")),
        "video": _example("video", video, _question("subtitle_qa")),
    }


def probe_prompts(
    tokenizer: Path, geometry: VisualGeometry, preprocessing: PreprocessingConfig
) -> dict[str, TokenizedExample]:
    """The probe examples as prompts, tokenised by this project's own preprocessing."""
    preprocessor = Preprocessor(
        geometry=geometry,
        config=replace(preprocessing, max_images=len(_SIZES), style="demo_or_style_v2"),
        tokenizer=load_tokenizer(tokenizer),
        weighting="none",
        seed=0,
    )
    return {kind: preprocessor.tokenize_prompt(example, 0) for kind, example in probe_examples().items()}


def _example(uid: MediaKind | str, media: Media, annotation: Annotation) -> Example:
    return Example(uid=uid, dataset="probes", split="test", media=media, annotations=(annotation,))


def _question(task: str) -> QuestionAnswer:
    return QuestionAnswer(task=task, question=QUESTION, answer="noise")  # type: ignore[arg-type]


def _png(rng: np.random.Generator, size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(_noise(rng, size)).save(buffer, format="PNG")
    return buffer.getvalue()


def _mp4(rng: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=_VIDEO_FPS)
        stream.width, stream.height = _VIDEO_SIZE
        stream.pix_fmt = "yuv420p"
        for _ in range(_VIDEO_FRAMES):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(_noise(rng, _VIDEO_SIZE), format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def _noise(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Blocks of 8 x 8 pixels: noise that survives resizing and video compression."""
    columns, rows = -(-size[0] // 8), -(-size[1] // 8)
    blocks = rng.integers(0, 256, (rows, columns, 3), dtype=np.uint8)
    return np.ascontiguousarray(blocks.repeat(8, axis=0).repeat(8, axis=1)[: size[1], : size[0]])
