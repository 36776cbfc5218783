"""Whole prompts against transformers' own Molmo2 processor, loaded from files as we export them.

Tokens, pooling indices, visual flags and pixel bytes are compared as integers, so no tolerance.  Two known
differences are left out on purpose: the processor samples other frames (it is given ours), and its template writes a
past assistant turn in another way than training (model.md 6.2, 6.3).
"""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from transformers.models.molmo2.processing_molmo2 import Molmo2Processor
from transformers.video_utils import VideoMetadata

from molmo2core.annotations import Annotation, Caption, Conversation, QuestionAnswer, Turn
from molmo2core.checkpoints.processor_files import write_processor_files
from molmo2core.examples import Example, Media, Subtitle, TokenizedExample
from molmo2core.preprocessing.config import PreprocessingConfig, VisualGeometry
from molmo2core.preprocessing.preprocessor import Preprocessor
from molmo2core.sources.shapes_tokenizer import save_tokenizer
from molmo2core.testing.tiny_tokenizer import tiny_tokenizer
from molmo2core.video_decoding import decode_frames

GEOMETRIES = {"released": VisualGeometry(), "tiny": VisualGeometry(crop_size=54, patch_size=6, overlap_margins=(1, 1))}
CONFIG = PreprocessingConfig(max_crops=4, max_frames=8)


@pytest.fixture(params=GEOMETRIES)
def geometry(request: pytest.FixtureRequest) -> VisualGeometry:
    return GEOMETRIES[request.param]


@pytest.fixture
def oracle(tmp_path: Path, geometry: VisualGeometry) -> Molmo2Processor:
    tokenizer = tmp_path / "tokenizer"
    save_tokenizer(tiny_tokenizer().backend, tokenizer)
    write_processor_files(tmp_path, tokenizer, geometry, CONFIG)
    return Molmo2Processor.from_pretrained(tmp_path)


def prompt_of(geometry: VisualGeometry, media: Media, annotation: Annotation) -> TokenizedExample:
    preprocessor = Preprocessor(
        geometry=geometry, config=CONFIG, tokenizer=tiny_tokenizer(), weighting="described", seed=0
    )
    example = Example(uid="u", dataset="d", split="test", media=media, annotations=(annotation,))
    return preprocessor.tokenize_prompt(example, 0)


def assert_same(ours: TokenizedExample, theirs: Any, visual: str) -> None:
    """`visual` is how the processor's keys begin: image or video."""
    assert ours.input_ids.tolist() == theirs["input_ids"][0].tolist()
    assert ours.is_visual.tolist() == (theirs["mm_token_type_ids"][0] > 0).tolist()
    pooling = theirs[f"{visual}_token_pooling"]
    np.testing.assert_array_equal(ours.pooling[:, : pooling.shape[1]], pooling)
    assert (ours.pooling[:, pooling.shape[1] :] == -1).all()
    pixels = theirs["pixel_values" if visual == "image" else "pixel_values_videos"]
    np.testing.assert_array_equal(ours.crops, np.rint((pixels * 0.5 + 0.5) * 255).astype(np.uint8))


@pytest.mark.parametrize("sizes", [[(160, 120)], [(90, 300), (64, 64), (400, 210)]])
def test_images(geometry: VisualGeometry, oracle: Molmo2Processor, sizes: list[tuple[int, int]]) -> None:
    """Catches another order of views, column tokens in the wrong view, and misnumbered or misplaced images."""
    images, files = [], []
    for width, height in sizes:
        pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG")
        images.append(Image.fromarray(pixels))
        files.append(stream.getvalue())
    annotation: Annotation = (
        QuestionAnswer(task="multi_image_qa", question="Which?\nSay it.", answer="1")
        if len(sizes) > 1
        else Caption(task="image_caption", text="x")
    )
    question = "Which?\nSay it." if len(sizes) > 1 else "Describe this image."
    ours = prompt_of(
        geometry,
        Media(kind="images" if len(sizes) > 1 else "image", files=tuple(files), sizes=tuple(sizes)),
        annotation,
    )
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
    text = oracle.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert_same(ours, oracle(images=images, text=text, return_tensors="np"), "image")


def test_a_video_with_subtitles(geometry: VisualGeometry, oracle: Molmo2Processor) -> None:
    """Catches frame tokens instead of image tokens, other time stamps, and subtitles that merge into other tokens."""
    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=2)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        for number in range(5):
            pixels = np.random.default_rng(number).integers(0, 256, (48, 64, 3), dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 2)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
    lines = (Subtitle(start=0.0, end=1.5, text="hello"), Subtitle(start=1.5, end=2.0, text="a red  circle"))
    media = Media(kind="video", files=(stream.getvalue(),), sizes=((64, 48),), duration_seconds=2.0, subtitles=lines)
    ours = prompt_of(geometry, media, QuestionAnswer(task="video_qa", question="What?", answer="x"))
    messages = [
        {"role": "subtitle", "content": "subtitle\n0.0 - 1.5 hello\n1.5 - 2.0 a red  circle\n"},
        {
            "role": "user",
            "content": [{"type": "video"}, {"type": "text", "style": "video_short_answer", "text": "What?"}],
        },
    ]
    text = oracle.apply_chat_template(messages, add_generation_prompt=True)
    frames = np.stack(list(decode_frames(media.files[0], [0.0, 0.5, 1.0, 1.5, 2.0])))
    metadata = VideoMetadata(total_num_frames=5, fps=2, duration=2.5, width=64, height=48, frames_indices=[*range(5)])
    theirs = oracle(videos=[frames], text=text, video_metadata=[metadata], do_sample_frames=False, return_tensors="np")
    assert_same(ours, theirs, "video")


def test_text_alone(oracle: Molmo2Processor, geometry: VisualGeometry) -> None:
    turns = (Turn(role="user", text="Repeat: red"), Turn(role="assistant", text="red"))
    ours = prompt_of(geometry, Media(kind="none"), Conversation(task="text", turns=turns))
    text = oracle.apply_chat_template(
        [{"role": "user", "content": [{"type": "text", "text": "Repeat: red"}]}], add_generation_prompt=True
    )
    assert ours.input_ids.tolist() == oracle(text=text, return_tensors="np")["input_ids"][0].tolist()
