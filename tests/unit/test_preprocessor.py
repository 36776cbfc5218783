"""Whole examples, from encoded media to tokens, crops and pooling."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import pickle
import random
import subprocess
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from molmo2core.annotations import Annotation, Caption, Conversation, Point, Pointing, QuestionAnswer, Turn
from molmo2core.errors import DataError
from molmo2core.examples import ROOT, Example, Media, Subtitle, TokenizedExample
from molmo2core.preprocessing.config import HighRes, PreprocessingConfig, VisualGeometry
from molmo2core.preprocessing.lengths import root_bound, subtitle_tokens
from molmo2core.preprocessing.preprocessor import Preprocessor
from molmo2core.preprocessing.randomness import generator
from molmo2core.testing.tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
SPECIAL = TOKENIZER.special
PREPROCESSOR = Preprocessor(
    geometry=VisualGeometry(crop_size=54, patch_size=6, overlap_margins=(1, 1)),
    config=PreprocessingConfig(max_crops=4, max_frames=6),
    tokenizer=TOKENIZER,
    weighting="described",
    seed=3,
)
ANNOTATIONS: tuple[Annotation, ...] = (
    Caption(task="image_caption", text="a red circle"),
    QuestionAnswer(task="image_qa", question="Colour?", answer="red"),
    Pointing(task="image_pointing", label="circle", points=(Point(x=0.5, y=0.5),)),
    QuestionAnswer(task="image_qa", question="Form?", answer="circle"),
)


def jpeg(width: int, height: int) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "JPEG")
    return stream.getvalue()


def mp4(frames: int, fps: int) -> bytes:
    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=fps)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 40 * number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, fps)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
    return stream.getvalue()


def example(media: Media, *annotations: Annotation, uid: str = "7") -> Example:
    return Example(uid=uid, dataset="d", split="train", media=media, annotations=annotations)


def image_example() -> Example:
    return example(Media(kind="image", files=(jpeg(160, 120),), sizes=((160, 120),)), *ANNOTATIONS)


def images_example(count: int = 3) -> Example:
    sizes = tuple((100 + 30 * n, 80) for n in range(count))
    question = QuestionAnswer(task="multi_image_qa", question="Which?", answer="2")
    return example(Media(kind="images", files=tuple(jpeg(*size) for size in sizes), sizes=sizes), question)


def video_example(subtitles: tuple[Subtitle, ...] = ()) -> Example:
    media = Media(kind="video", files=(mp4(6, 4),), sizes=((64, 48),), duration_seconds=1.5, subtitles=subtitles)
    return example(media, QuestionAnswer(task="video_qa", question="What?", answer="x"))


def text_example() -> Example:
    turns = (Turn(role="user", text="Hi"), Turn(role="assistant", text="Yo"))
    return example(Media(kind="none"), Conversation(task="text", turns=turns), Conversation(task="text", turns=turns))


def root_text(tokenized: TokenizedExample) -> str:
    """Root tokens with runs of patches written as their number."""
    ids = tokenized.input_ids[tokenized.subsegment_ids == ROOT].tolist()
    words, run = [], 0
    for token in [*ids, None]:
        if token == SPECIAL.im_patch:
            run += 1
            continue
        words += [f"[{run}]"] if run else []
        run = 0
        words += [TOKENIZER.backend.decode([token], skip_special_tokens=False)] if token is not None else []
    return "".join(words)


def arrays(tokenized: TokenizedExample) -> list[np.ndarray]:
    return [value for value in dataclasses.astuple(tokenized) if isinstance(value, np.ndarray)]


@pytest.mark.parametrize("made", [image_example(), images_example(), video_example(), text_example()])
def test_invariants_of_every_kind(made: Example) -> None:
    """One pooling row per `<im_patch>`, in the shapes and types of the contract; crops are bounded exactly."""
    tokenized = PREPROCESSOR.tokenize(made, epoch=0)
    length, geometry = len(tokenized.input_ids), PREPROCESSOR.geometry
    assert {len(array) for array in arrays(tokenized)[:6]} == {length}
    assert (tokenized.input_ids == SPECIAL.im_patch).sum() == len(tokenized.pooling)
    assert tokenized.crops.shape[1:] == (geometry.num_patches, geometry.patch_bytes)
    assert tokenized.crops.dtype == np.uint8 and tokenized.pooling.dtype == np.int32
    assert tokenized.pooling.shape[1] == geometry.max_pool
    assert tokenized.pooling.max(initial=-1) < len(tokenized.crops) * geometry.num_patches
    assert (tokenized.pooling >= 0).any(axis=1).all(), "no visual token without a patch"
    used = tokenized.pooling[tokenized.pooling >= 0]
    assert len(np.unique(used)) == len(used), "no patch is shown twice"
    assert (np.isin(tokenized.input_ids, SPECIAL.visual) == tokenized.is_visual).all()
    assert not np.isin(tokenized.target_ids[tokenized.loss_weights > 0], SPECIAL.visual).any()
    assert tokenized.tasks and len(tokenized.tasks) == tokenized.subsegment_ids[-1] + 1
    media = made.media
    tokens, crops = root_bound(
        media.kind,
        media.sizes,
        media.duration_seconds,
        subtitle_tokens(media, TOKENIZER),
        geometry,
        PREPROCESSOR.config,
    )
    assert crops == len(tokenized.crops)
    assert tokens >= (tokenized.subsegment_ids == ROOT).sum()


def test_layout_of_an_image() -> None:
    """160x120 in 54 px crops: 2x2 tiling, 16x16 canvas patches, 8x8 visual tokens, 5x5 of the low-resolution view."""
    expected = "<|im_end|><low_res_im_start>[25]<im_end><im_start>" + "[8]<im_col>" * 8 + "<im_end>"
    assert root_text(PREPROCESSOR.tokenize(image_example(), epoch=0)) == expected


def test_layout_of_an_image_set() -> None:
    text = root_text(PREPROCESSOR.tokenize(images_example(), epoch=0))
    assert [text.count(f"Image {n}<low_res_im_start>") for n in (1, 2, 3, 4)] == [1, 1, 1, 0]
    assert "Image" not in root_text(PREPROCESSOR.tokenize(images_example(1), epoch=0)), "one image needs no number"


def test_pooling_of_later_images_counts_on() -> None:
    """Each image's rows must point at its own crops."""
    tokenized = PREPROCESSOR.tokenize(images_example(), epoch=0)
    alone = PREPROCESSOR.tokenize(images_example(1), epoch=0)
    shift = len(alone.crops) * PREPROCESSOR.geometry.num_patches
    assert tokenized.pooling[: len(alone.pooling)].max() < shift
    assert tokenized.pooling[len(alone.pooling) :][0, 0] == shift
    assert (tokenized.crops[: len(alone.crops)] == alone.crops).all()


def test_layout_of_a_video_with_subtitles() -> None:
    """Frame times are text; `<im_start>` and not `<frame_start>`; far-away and overlong lines are left out whole."""
    frames = "<|im_end|>0.0 <im_start>[9]<im_end>" + "".join(f" {t} <im_start>[9]<im_end>" for t in (0.5, 1.0, 1.5))
    assert root_text(PREPROCESSOR.tokenize(video_example(), epoch=0)) == frames
    lines = (
        Subtitle(start=0.0, end=0.5, text="one <im_patch>"),
        Subtitle(start=9.0, end=9.5, text="after the end"),
        Subtitle(start=1.0, end=1.5, text="two"),
        Subtitle(start=1.0, end=1.5, text="x " * 60),
        Subtitle(start=1.2, end=1.5, text="y"),
    )
    config = dataclasses.replace(PREPROCESSOR.config, max_subtitle_tokens=100)
    tokenized = dataclasses.replace(PREPROCESSOR, config=config).tokenize(video_example(lines), epoch=0)
    assert root_text(tokenized) == frames + "subtitle\n0.0 - 0.5 one <im_patch>\n1.0 - 1.5 two\n"
    assert len(tokenized.pooling) == 4 * 9, "a spelled-out patch is no visual token"


def test_frames_show_their_times() -> None:
    """Frame k has grey 40 k and is on screen from k / 4 s: at 0, 0.5, 1, and the last instant 1.5 shows frame 5."""
    levels = PREPROCESSOR.tokenize(video_example(), epoch=0).crops.mean(axis=(1, 2)) / 40
    assert np.abs(levels - [0, 2, 4, 5]).max() < 0.1


def test_text_has_a_root_of_bos_alone() -> None:
    tokenized = PREPROCESSOR.tokenize(text_example(), epoch=0)
    assert tokenized.input_ids[0] == SPECIAL.bos
    assert (tokenized.subsegment_ids == ROOT).sum() == 1
    assert tokenized.position_ids[tokenized.subsegment_ids == 1][0] == 1, "not 0, as in the published code"
    assert tokenized.crops.shape == (0, 81, 108) and tokenized.pooling.shape == (0, 9)


def test_same_draw_same_bytes() -> None:
    """Also after pickling, as loader workers get it, and independent of what was tokenised before."""
    first = PREPROCESSOR.tokenize(image_example(), epoch=1)
    PREPROCESSOR.tokenize(images_example(), epoch=5)
    again = pickle.loads(pickle.dumps(PREPROCESSOR)).tokenize(image_example(), epoch=1)
    assert all((a == b).all() for a, b in zip(arrays(first), arrays(again), strict=True))


def fingerprints() -> list[str]:
    """Of what training sees of each kind of example, with every draw of stages 2 and 3."""
    high_res = HighRes(datasets=("d",), probability=0.5, max_crops=9)
    config = dataclasses.replace(PREPROCESSOR.config, style="demo_or_style_v2", high_res=high_res)
    preprocessor = dataclasses.replace(PREPROCESSOR, config=config)
    made = [image_example(), images_example(), video_example(), text_example()]
    tokenized = [preprocessor.tokenize(one, epoch=epoch) for one in made for epoch in range(3)]
    return [hashlib.sha256(b"".join(array.tobytes() for array in arrays(one))).hexdigest() for one in tokenized]


def test_same_bytes_in_another_process() -> None:
    """Catches draws from global generators, from hashes of strings, and from the order of sets."""
    code = f"import runpy; print(*runpy.run_path({__file__!r})['fingerprints']())"
    environment = os.environ | {"PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"}
    told = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    random.seed(1)
    np.random.seed(1)
    assert told.stdout.split() == fingerprints()


def test_numbers_of_numpy_are_the_same_key() -> None:
    """Plans are arrays: an epoch read from one must not be another epoch (`np.int64(3)` is not printed as `3`)."""
    assert generator(1, "d", "u", np.int64(3)).random() == generator(1, "d", "u", 3).random()
    assert generator(1, "d", "u", 3).random() != generator(1, "d", "u", "3").random()


def test_draws_depend_on_seed_dataset_uid_and_epoch() -> None:
    """The published loader ignores seed and dataset (data.md 10.2)."""
    made = image_example()
    drawn = {
        (preprocessor.tokenize(varied, epoch=epoch).input_ids.tobytes())
        for preprocessor in (PREPROCESSOR, dataclasses.replace(PREPROCESSOR, seed=4))
        for varied in (made, dataclasses.replace(made, uid="8"), dataclasses.replace(made, dataset="e"))
        for epoch in range(4)
    }
    assert len(drawn) > 18  # of 24: two may draw the same order and phrasings


def test_a_split_tree_keeps_its_texts() -> None:
    """Two halves of a tree say together what the whole says."""
    made = image_example()

    def texts(tokenized: TokenizedExample) -> set[str]:
        return {
            TOKENIZER.decode(tokenized.input_ids[tokenized.subsegment_ids == number].tolist())
            for number in range(len(tokenized.tasks))
        }

    whole = PREPROCESSOR.tokenize(made, epoch=2)
    halves = [PREPROCESSOR.tokenize(made, epoch=2, branches=part) for part in ((0, 1), (1, 4))]
    assert [len(half.tasks) for half in halves] == [1, 3]
    assert texts(whole) == texts(halves[0]) | texts(halves[1]) and len(texts(whole)) == 4


@pytest.mark.parametrize("branches", [(0, 5), (2, 2), (-1, 2), (3, 1)])
def test_impossible_branches_are_data_errors(branches: tuple[int, int]) -> None:
    with pytest.raises(DataError, match=r"^d/7: .*4 annotations"):
        PREPROCESSOR.tokenize(image_example(), epoch=0, branches=branches)


def test_a_prompt_is_the_beginning_of_its_training_form() -> None:
    """Prompt + reply must be what was trained, token by token."""
    made = dataclasses.replace(image_example(), annotations=ANNOTATIONS[1:2])
    prompt, trained = PREPROCESSOR.tokenize_prompt(made, 0), PREPROCESSOR.tokenize(made, epoch=0)
    length = len(prompt.input_ids)
    assert (trained.input_ids[:length] == prompt.input_ids).all()
    assert (trained.position_ids[:length] == prompt.position_ids).all()
    assert TOKENIZER.decode(trained.input_ids[length:].tolist()) == "red"
    assert not prompt.loss_weights.any() and prompt.tasks == ("image_qa",)
    assert np.flatnonzero(trained.loss_weights)[0] == length - 1


def test_too_many_images_are_an_error() -> None:
    with pytest.raises(DataError, match="6 images"):
        PREPROCESSOR.tokenize(images_example(6), epoch=0)


def test_broken_media_name_the_example() -> None:
    broken = example(Media(kind="image", files=(b"x",), sizes=((9, 9),)), ANNOTATIONS[0])
    with pytest.raises(DataError, match=r"^d/7 image 1: "):
        PREPROCESSOR.tokenize(broken, epoch=0)
