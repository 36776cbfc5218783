"""Videos from files against transformers' own Molmo2 processor, which reads, samples, resizes and writes the prompt.

Everything is compared as integers, so no tolerance.  `frame_sampling: as_native_processor` takes its frames; the
default takes those of training, and the difference is shown.  Without torchcodec, transformers reads with torchvision;
its PyAV reader gives the same.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers.models.molmo2.processing_molmo2 import Molmo2Processor
from transformers.models.molmo2.video_processing_molmo2 import Molmo2VideoProcessor
from transformers.video_utils import VideoMetadata, load_video

from molmo2core.annotations import QuestionAnswer
from molmo2core.checkpoints.processor_files import write_processor_files
from molmo2core.examples import Example, Media, TokenizedExample
from molmo2core.preprocessing.config import FrameLayout, PreprocessingConfig, VisualGeometry
from molmo2core.preprocessing.frame_times import native_frame_times
from molmo2core.preprocessing.preprocessor import Preprocessor
from molmo2core.sources.shapes_tokenizer import save_tokenizer
from molmo2core.testing.tiny_tokenizer import tiny_tokenizer
from molmo2core.testing.video_files import encode_video, textured_frame
from molmo2core.video_file import open_video

GEOMETRY = VisualGeometry(crop_size=54, patch_size=6, overlap_margins=(1, 1))
CONFIG = PreprocessingConfig(max_frames=16, frame_sampling="as_native_processor")
QUESTION = QuestionAnswer(task="video_qa", question="What?", answer="x", style="user_qa")
MESSAGES = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What?"}]}]
VIDEOS: dict[str, dict[str, Any]] = {
    "30 per second": {"count": 70},
    "25 per second, one group": {"count": 90, "rate": 25, "options": {"g": "250"}},
    "more than the limit": {"count": 120, "rate": 10},
    "one frame": {"count": 1},
    "slow": {"count": 9, "rate": 1},
    "MKV": {"count": 70, "container": "matroska"},
    "odd size": {"count": 40, "height": 36, "width": 50},
    "10 bit": {"count": 40, "pixel_format": "yuv420p10le"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processor")
    (folder / "tokenizer").mkdir()
    save_tokenizer(tiny_tokenizer().backend, folder / "tokenizer")
    write_processor_files(folder, folder / "tokenizer", GEOMETRY, CONFIG)
    return folder


def made_video(folder: Path, kind: str) -> tuple[Path, Media]:
    options = dict(VIDEOS[kind])
    size = options.pop("height", 48), options.pop("width", 64)
    path = folder / f"{kind}.video"
    path.write_bytes(encode_video([textured_frame(number, *size) for number in range(options.pop("count"))], **options))
    with open_video(path.read_bytes()) as video:
        duration, fps = video.index.duration_seconds, video.index.fps
    media = Media(kind="video", files=(path.read_bytes(),), sizes=(size,), duration_seconds=duration, fps=fps)
    return path, media


def ours(media: Media, config: PreprocessingConfig) -> TokenizedExample:
    preprocessor = Preprocessor(
        geometry=GEOMETRY, config=config, tokenizer=tiny_tokenizer(), weighting="described", seed=0
    )
    example = Example(uid="u", dataset="d", split="test", media=media, annotations=(QUESTION,))
    return preprocessor.tokenize_prompt(example, 0)


def assert_same(found: TokenizedExample, expected: Any) -> None:
    assert found.input_ids.tolist() == expected["input_ids"][0].tolist()
    assert found.is_visual.tolist() == (expected["mm_token_type_ids"][0] > 0).tolist()
    np.testing.assert_array_equal(found.pooling, expected["video_token_pooling"])
    np.testing.assert_array_equal(found.crops, np.rint((expected["pixel_values_videos"] * 0.5 + 0.5) * 255))


@pytest.mark.filterwarnings("ignore:.*deprecated.*:UserWarning", "ignore:.*torchcodec.*:UserWarning")
@pytest.mark.parametrize("kind", VIDEOS)
def test_native_sampling_is_the_native_processor(folder: Path, kind: str) -> None:
    """From a file to tokens and pixels, nothing of it ours.  Catches an index off by one and another rounding."""
    path, media = made_video(folder, kind)
    oracle = Molmo2Processor.from_pretrained(folder)
    text = oracle.apply_chat_template(MESSAGES, add_generation_prompt=True)
    assert_same(ours(media, CONFIG), oracle(videos=[str(path)], text=text, return_tensors="np"))


def test_the_difference_to_training(folder: Path) -> None:
    """Training looks at the last instant too, at exact times; the native processor does not (model.md 5.2)."""
    _, media = made_video(folder, "30 per second")  # 2.33 s
    tokenizer = tiny_tokenizer()
    trained = ours(media, dataclasses.replace(CONFIG, frame_sampling="as_trained"))
    native = ours(media, CONFIG)
    said = [tokenizer.decode([t for t in e.input_ids if t < tokenizer.special.im_start]) for e in (trained, native)]
    assert "0.0  0.5  1.0  1.5  2.0  2.3 " in said[0]
    assert "0.0  0.6  1.2  1.7 " in said[1]
    assert (len(trained.crops), len(native.crops)) == (6, 4)


@pytest.mark.parametrize(
    ("duration", "fps", "max_frames"),
    [(10, 30, 64), (10, 30, 384), (2.5, 29.97, 384), (600, 30, 384), (7, 1, 5), (0.04, 25, 8), (0.08, 25, 8)]
    + [(n / 24, 24, 384) for n in range(100, 160, 7)]
    + [(n / 30, 30, 13) for n in range(40, 300, 13)],
)
def test_native_frame_numbers(duration: float, fps: float, max_frames: int) -> None:
    """Without files: the processor's own choice for many lengths, with its float steps (model.md 5.2)."""
    processor = Molmo2VideoProcessor(num_frames=max_frames, max_fps=2.0)
    total = round(duration * fps)
    metadata = VideoMetadata(total_num_frames=total, fps=fps, duration=total / fps, width=8, height=8)
    expected = processor.sample_frames(metadata).tolist()
    times = native_frame_times(duration, fps, max_frames, 2.0)
    assert [round(time * fps) for time in times] == expected


@pytest.mark.parametrize(("layout", "special"), [("image_tokens", False), ("frame_tokens", True)])
def test_layouts(folder: Path, layout: FrameLayout, special: bool) -> None:
    """The two layouts that processors know, by their own switch."""
    path, media = made_video(folder, "30 per second")
    oracle = Molmo2Processor.from_pretrained(folder, use_frame_special_tokens=special)
    text = oracle.apply_chat_template(MESSAGES, add_generation_prompt=True)
    frames, metadata = load_video(
        str(path), backend="pyav", sample_indices_fn=lambda metadata: np.array([0, 17, 35, 52])
    )
    expected = oracle(
        videos=[frames], text=text, video_metadata=[metadata], do_sample_frames=False, return_tensors="np"
    )
    assert_same(ours(media, dataclasses.replace(CONFIG, frame_layout=layout)), expected)


def test_the_layout_of_the_published_script(folder: Path) -> None:
    """No processor writes it: one start before the first time, one end after the last frame (data.md 0.2)."""
    _, media = made_video(folder, "30 per second")
    special = tiny_tokenizer().special
    per_frame = ours(media, dataclasses.replace(CONFIG, frame_layout="frame_tokens")).input_ids.tolist()
    around = ours(media, dataclasses.replace(CONFIG, frame_layout="frame_tokens_around_video")).input_ids.tolist()
    marks = special.frame_start, special.frame_end
    assert [t for t in around if t not in marks] == [t for t in per_frame if t not in marks]
    assert [around.count(mark) for mark in marks] == [1, 1] and [per_frame.count(mark) for mark in marks] == [4, 4]
    assert around[1] == special.frame_start
    last_patch = len(around) - 1 - around[::-1].index(special.im_patch)
    assert around[last_patch + 1] == special.frame_end
