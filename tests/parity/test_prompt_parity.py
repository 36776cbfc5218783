"""Whole prompts against transformers' own Molmo2 processor, loaded from files as we export them.

Tokens, pooling indices, visual flags and pixel bytes are compared as integers, so no tolerance.  The processor samples
other frames, so it is given ours.  Where template and training differ on purpose, a test shows both: past assistant
turns (model.md 6.2, 6.3) and special tokens that a person spells out.
"""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from jinja2.exceptions import TemplateError
from PIL import Image
from transformers.image_utils import load_image
from transformers.models.molmo2.processing_molmo2 import Molmo2Processor
from transformers.video_utils import VideoMetadata

from molmo2core.annotations import Annotation, Caption, Conversation, Pointing, QuestionAnswer, Tracking, Turn
from molmo2core.checkpoints.processor_files import write_processor_files
from molmo2core.examples import Example, Media, Subtitle, TokenizedExample
from molmo2core.preprocessing.chat import inference_dialogue
from molmo2core.preprocessing.config import PreprocessingConfig, VisualGeometry
from molmo2core.preprocessing.preprocessor import Preprocessor
from molmo2core.sources.shapes_tokenizer import save_tokenizer
from molmo2core.testing.pictures import encoded, encoded_pictures, noise
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


def prompt_of(
    geometry: VisualGeometry, media: Media, annotation: Annotation, config: PreprocessingConfig = CONFIG
) -> TokenizedExample:
    preprocessor = Preprocessor(
        geometry=geometry, config=config, tokenizer=tiny_tokenizer(), weighting="described", seed=0
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


@pytest.mark.parametrize("sizes", [[(160, 120)], [(90, 300), (64, 64), (400, 210)], [(50, 40)] * 5])
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


SIZES = [
    (1, 1), (1, 700), (3, 5), (61, 97), (112, 112), (113, 2000), (377, 379), (354, 536), (480, 640), (1500, 200),
    (1080, 1920), (3001, 1999), (80, 6000), (6000, 80),
]  # fmt: skip
"""(height, width)"""
PICTURES = ["PNG, grey", "PNG, RGBA", "PNG, palette", "JPEG, CMYK", "16 bit PNG"]


@pytest.mark.parametrize("max_crops", [8, 24])
def test_one_image_of_any_size_and_kind(tmp_path: Path, max_crops: int) -> None:
    """Ids, crops and pooling of whole prompts at the released geometry; thin images as the oracle tiles them."""
    geometry, folder = GEOMETRIES["released"], tmp_path / "tokenizer"
    config = PreprocessingConfig(max_crops=max_crops, thin_images="as_released_processors")
    save_tokenizer(tiny_tokenizer().backend, folder)
    write_processor_files(tmp_path, folder, geometry, config)
    oracle = Molmo2Processor.from_pretrained(tmp_path)
    files = {str(size): encoded(Image.fromarray(noise(*size)), "PNG") for size in SIZES}
    files |= {name: encoded_pictures()[name] for name in PICTURES}
    lengths = set()
    for data in files.values():
        image = load_image(Image.open(io.BytesIO(data)))
        media = Media(kind="image", files=(data,), sizes=(image.size,))
        ours = prompt_of(geometry, media, Caption(task="image_caption", text="x"), config)
        content = [{"type": "image"}, {"type": "text", "text": "Describe this image."}]
        text = oracle.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        assert_same(ours, oracle(images=[image], text=text, return_tensors="np"), "image")
        lengths.add(len(ours.input_ids))
    assert len(lengths) >= 6, "the sizes exercise several tilings"


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


def text_ids(oracle: Molmo2Processor, messages: list[dict[str, Any]]) -> list[int]:
    text = oracle.apply_chat_template(messages, add_generation_prompt=True)
    return [int(token) for token in oracle(text=text, return_tensors="np")["input_ids"][0]]


def spoken(*texts: str) -> Conversation:
    roles = ("user", "assistant")
    return Conversation(task="text", turns=tuple(Turn(role=roles[n % 2], text=said) for n, said in enumerate(texts)))


def said(*texts: str) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[n % 2], "content": said} for n, said in enumerate(texts)]


@pytest.mark.parametrize("num_images", [0, 1])
def test_past_turns_differ_by_a_doubled_end_and_a_space(
    geometry: VisualGeometry, oracle: Molmo2Processor, num_images: int
) -> None:
    """Training: reply EOS <|im_end|>.  Template: a space before the header of a past reply, one end.

    Both are what the released models saw, there in training and there when served; nothing else differs.
    """
    stream = io.BytesIO()
    Image.new("RGB", (64, 48), (200, 30, 30)).save(stream, "PNG")
    files = (stream.getvalue(),) * num_images
    media = Media(kind="image" if files else "none", files=files, sizes=((64, 48),) * num_images)
    ours = prompt_of(geometry, media, spoken("Hi", "red", "What?", "a b", "And?", "")).input_ids.tolist()
    content = [*({"type": "image"} for _ in files), {"type": "text", "text": "Hi"}]
    messages = [{"role": "user", "content": content}, *said("Hi", "red", "What?", "a b", "And?")[1:]]
    text = oracle.apply_chat_template(messages, add_generation_prompt=True)
    assert text.count(" <|im_start|>assistant\n") == 2 and "<|im_end|><|im_end|>" not in text
    images = {"images": [Image.open(stream)]} if files else {}
    theirs = oracle(text=text, return_tensors="np", **images)["input_ids"][0].tolist()

    tokenizer = tiny_tokenizer()
    end, start = tokenizer.special.eos, tokenizer.token_id("<|im_start|>")
    (space,) = tokenizer.encode_text(" ")
    doubled = [n for n in range(1, len(ours)) if ours[n] == ours[n - 1] == end]
    spaces = [n for n in range(1, len(theirs)) if theirs[n] == start and theirs[n - 1] == space]
    assert len(doubled) == len(spaces) == 2
    assert [token for n, token in enumerate(ours) if n not in doubled] == [
        token for n, token in enumerate(theirs) if n + 1 not in spaces
    ]


STYLES = ["vqa2", "chart_qa", "user_qa", "correction_qa", "cosyn_chart_exp", "a_okvqa_mc", "video_short_answer"]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("question", ["What?", "(a) or\n(b)?", "3 + 4", "  two  spaces"])
def test_styles_are_written_as_the_template_writes_them(
    geometry: VisualGeometry, oracle: Molmo2Processor, style: str, question: str
) -> None:
    """Catches a style that one side writes out and the other does not, and another joint of tag and question."""
    asked = QuestionAnswer(task="image_qa", question=question, answer="x", style=style)
    ours = prompt_of(geometry, Media(kind="none"), asked).input_ids.tolist()
    content = [{"type": "text", "text": question, "style": style}]
    assert ours == text_ids(oracle, [{"role": "user", "content": content}])


@pytest.mark.parametrize(
    "annotation",
    [
        QuestionAnswer(task="image_qa", question="Which?", answer="b?", options=("a.", "b?", "c d")),
        QuestionAnswer(task="multi_image_qa", question="How many cats?", answer="2"),
        QuestionAnswer(task="image_qa", question="Why?", answer="a", explanation="e", options=("a", "b")),
        Pointing(task="image_pointing", label='the "R&D" sign...'),
        Pointing(task="multi_image_counting", label="cats"),
        Pointing(task="video_counting", label="goals", count_form="count_then_point"),
        Tracking(task="tracking", label="dog", sampling_fps=1.5),
        Caption(task="video_caption", text="x", start=1.5, end=3.0),
        Caption(task="video_caption", text="x", kind="merged"),
    ],
)
def test_prompts_in_pieces_are_those_of_the_whole_text(
    geometry: VisualGeometry, oracle: Molmo2Processor, annotation: Annotation
) -> None:
    """Prompts are tokenised in pieces; a user's processor tokenises one string and must arrive at the same ids."""
    ours = prompt_of(geometry, Media(kind="none"), annotation).input_ids.tolist()
    (text,) = inference_dialogue(annotation, CONFIG.style).texts
    assert ours == text_ids(oracle, said(text))


def test_a_system_text_is_a_part_of_the_first_user_text(geometry: VisualGeometry, oracle: Molmo2Processor) -> None:
    """The template refuses the role (model.md 6.2); training writes `System: ` (data.md 5.1)."""
    system = Turn(role="system", text="Be brief.")
    conversation = Conversation(task="text", turns=(system, *spoken("Hi", "").turns))
    ours = prompt_of(geometry, Media(kind="none"), conversation).input_ids.tolist()
    assert ours == text_ids(oracle, said("System: Be brief.\nHi"))
    with pytest.raises(TemplateError, match="alternate"):
        oracle.apply_chat_template([{"role": "system", "content": "Be brief."}, *said("Hi")])


def test_spelled_out_special_tokens_are_text_for_us_alone(geometry: VisualGeometry, oracle: Molmo2Processor) -> None:
    """transformers' processor takes `<|im_end|>` in a question for the token; here nobody can close a turn."""
    ours = prompt_of(geometry, Media(kind="none"), spoken("a<|im_end|>b", "")).input_ids.tolist()
    theirs, end = text_ids(oracle, said("a<|im_end|>b")), tiny_tokenizer().special.eos
    assert theirs.count(end) == ours.count(end) + 1
    assert "a<|im_end|>b" in tiny_tokenizer().backend.decode(ours, skip_special_tokens=False)
