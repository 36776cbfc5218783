"""Annotations as text and as token ids (model.md 6.3, 6.4; data.md 5)."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from molmo2core.annotations import (
    TASKS,
    Annotation,
    Caption,
    Conversation,
    Point,
    Pointing,
    QuestionAnswer,
    Track,
    Tracking,
    TrackPosition,
    Turn,
)
from molmo2core.errors import DataError
from molmo2core.preprocessing import chat
from molmo2core.preprocessing.config import STYLES, Style
from molmo2core.special_tokens import EXTRA_TOKENS
from molmo2core.testing.tiny_tokenizer import tiny_tokenizer

POINTS = (Point(x=0.5, y=0.25), Point(x=0.1, y=0.9))
VIDEO_POINTS = (Point(x=0.5, y=0.25, time=1.5),)
TRACKS = (Track(object_id=4, positions=(TrackPosition(time=0.0, x=0.1, y=0.2),)),)

EXAMPLES: dict[str, Annotation] = {
    "image_caption": Caption(task="image_caption", text="A red circle."),
    "video_caption": Caption(task="video_caption", text="A circle moves."),
    "image_qa": QuestionAnswer(task="image_qa", question="Colour?", answer="red"),
    "multi_image_qa": QuestionAnswer(task="multi_image_qa", question="Which?", answer="image 2"),
    "video_qa": QuestionAnswer(task="video_qa", question="Where?", answer="left"),
    "subtitle_qa": QuestionAnswer(task="subtitle_qa", question="Name?", answer="Ada"),
    "image_pointing": Pointing(task="image_pointing", label="Red circle", points=POINTS),
    "image_counting": Pointing(task="image_counting", label="red circle", points=POINTS),
    "multi_image_pointing": Pointing(task="multi_image_pointing", label="cat", points=(Point(x=0, y=0, image=2),)),
    "multi_image_counting": Pointing(task="multi_image_counting", label="cat", points=(Point(x=0, y=0, image=2),)),
    "video_pointing": Pointing(task="video_pointing", label="Cat", points=VIDEO_POINTS),
    "video_counting": Pointing(task="video_counting", label="Cat", points=VIDEO_POINTS),
    "tracking": Tracking(task="tracking", label="dog", sampling_fps=1.0, tracks=TRACKS),
    "text": Conversation(task="text", turns=(Turn(role="user", text="Hi"), Turn(role="assistant", text="Yo"))),
}
CHOICE = QuestionAnswer(task="image_qa", question="Colour?", answer="blue", options=("red", "blue", "green"))


def rendered(dialogue: chat.Dialogue, *, ids: list[int] | None = None) -> str:
    tokenizer = tiny_tokenizer()
    branch = chat.encode_dialogue(dialogue, "text", tokenizer)
    return tokenizer.backend.decode([i for turn in branch.turns for i in turn.ids], skip_special_tokens=False)


def test_every_task_is_covered() -> None:
    assert set(EXAMPLES) == set(TASKS)


@pytest.mark.parametrize(
    ("task", "prompt", "reply"),
    [
        ("image_caption", "Describe this image.", "A red circle."),
        ("video_caption", "Describe this video.", "A circle moves."),
        ("image_qa", "vqa2: Colour?", "red"),
        ("multi_image_qa", "Which?", "image 2"),
        ("video_qa", "video_short_answer: Where?", "left"),
        ("subtitle_qa", "video_short_answer: Name?", "Ada"),
        ("image_pointing", "Point to red circle.", '<points coords="1 1 100 900 2 500 250">Red circle</points>'),
        (
            "image_counting",
            "How many red circle are there?",
            'Counting the <points coords="1 1 100 900 2 500 250">red circle</points> shows a total of 2.',
        ),
        ("multi_image_pointing", "Point to cat in all images.", '<points coords="2 1 000 000">cat</points>'),
        (
            "multi_image_counting",
            "How many cat are there in all images?",
            'Counting the <points coords="2 1 000 000">cat</points> shows a total of 1.',
        ),
        (
            "video_counting",
            "How many Cat are there?",
            'Counting the <points coords="1.5 1 500 250">Cat</points> shows a total of 1.',
        ),
        ("video_pointing", "Point to Cat in the video.", '<points coords="1.5 1 500 250">Cat</points>'),
        ("tracking", "Track dog at 1 fps.", '<tracks coords="0.0 1 100 200">dog</tracks>'),
        ("text", "Hi", "Yo"),
    ],
)
def test_inference_prompt_and_expected_reply(task: str, prompt: str, reply: str) -> None:
    """Evaluation asks with the first phrasing; a changed wording must be a decision."""
    text = rendered(chat.inference_dialogue(EXAMPLES[task], "demo_or_style_v2"))
    assert text == f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    assert chat.reply_of(EXAMPLES[task]) == reply


@pytest.mark.parametrize("kind", ["image", "multi_image", "video"])
@pytest.mark.parametrize("counted", ["pointing", "counting"])
def test_nothing_there_has_one_answer(kind: str, counted: str) -> None:
    """Where only the number is asked for, it is a number: nought."""
    nothing = Pointing(task=f"{kind}_{counted}", label="x")  # type: ignore[arg-type]
    assert chat.reply_of(nothing) == "There are none."
    if counted == "counting":
        assert chat.reply_of(dataclasses.replace(nothing, count_form="count_then_point")) == "There are none."
        assert chat.reply_of(dataclasses.replace(nothing, count_form="count")) == "0"


def test_multiple_choice() -> None:
    """Letter and text in both question and answer (data.md 5.4)."""
    text = rendered(chat.inference_dialogue(CHOICE, "demo_or_style_v2"))
    assert "user\nColour?\n" in text and "\nA. red\nB. blue\nC. green<|im_end|>" in text
    assert chat.reply_of(CHOICE) == "B. blue"


def test_an_answer_that_is_no_option_is_a_data_error() -> None:
    with pytest.raises(DataError, match="'pink'"):
        chat.reply_of(QuestionAnswer(task="image_qa", question="?", answer="pink", options=("red", "blue")))


def test_stage_one_prefix_tells_the_length_in_nine_of_ten() -> None:
    """`style n:` with n about characters / 15 (model.md 6.4); never negative."""
    caption = Caption(task="image_caption", text="x" * 600)
    rng = np.random.default_rng(0)
    drawn = [chat.training_dialogue(caption, "style_and_length_v2", rng).texts for _ in range(2000)]
    assert {reply for _, reply in drawn} == {caption.text}
    hints = [prompt.removeprefix("long_caption") for prompt, _ in drawn]
    lengths = np.array([int(hint[1:-1]) for hint in hints if hint != ":"])
    assert 0.87 < len(lengths) / len(drawn) < 0.93
    assert abs(lengths.mean() - (600 / 15 - 0.5)) < 0.2
    assert 1.4 < lengths.std() < 1.95  # 25 / 15, and the rounding
    short = [chat.training_dialogue(EXAMPLES["image_qa"], "style_and_length_v2", rng).texts[0] for _ in range(300)]
    assert set(short) <= {f"vqa2{hint} Colour?" for hint in (":", *(f" {n}:" for n in range(8)))}
    assert len(set(short)) > 3


@pytest.mark.parametrize(
    ("task", "text"),
    [
        ("image_caption", "long_caption 65:"),
        ("image_pointing", "pointing: red circle"),
        ("video_pointing", "video_point 65: Cat"),
        ("multi_image_counting", "multi_image_point_then_count 65: cat"),
        ("tracking", "video_point_track_per_frame 65: dog"),
        ("image_counting", "point_count: red circle"),
        ("image_qa", "vqa2 65: Colour?"),
        ("text", "text_sft 65: Hi"),
    ],
)
def test_stage_one_prompts(task: str, text: str) -> None:
    prompt = rendered(chat.inference_dialogue(EXAMPLES[task], "style_and_length_v2"))
    assert prompt == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def test_the_end_is_doubled_between_turns() -> None:
    """EOS of the reply (added when linearizing), then the next prompt's own `<|im_end|>`."""
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    conversation = Conversation(task="text", turns=tuple(Turn(role=role, text=text) for role, text in turns))  # type: ignore[arg-type]
    dialogue = chat.training_dialogue(conversation, "demo_or_style_v2", np.random.default_rng(0))
    branch = chat.encode_dialogue(dialogue, "text", tiny_tokenizer())
    texts = [tiny_tokenizer().backend.decode(list(turn.ids), skip_special_tokens=False) for turn in branch.turns]
    assert texts == [
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n",
        "b",
        "<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n",
        "d",
    ]
    assert [turn.is_reply for turn in branch.turns] == [False, True, False, True]


@pytest.mark.parametrize("name", [*EXTRA_TOKENS, "<|im_end|>", "<|im_start|>", "<|endoftext|>"])
def test_people_cannot_write_special_tokens(name: str) -> None:
    """An `<im_patch>` in a question would demand a visual feature that does not exist."""
    tokenizer = tiny_tokenizer()
    special = tokenizer.token_id(name)
    question = QuestionAnswer(task="image_qa", question=f"a{name}b", answer=f"c{name}")
    dialogue = chat.training_dialogue(question, "demo_or_style_v2", np.random.default_rng(0))
    clean = chat.training_dialogue(
        QuestionAnswer(task="image_qa", question="ab", answer="c"), "demo_or_style_v2", np.random.default_rng(0)
    )
    count, expected = (
        [i for turn in chat.encode_dialogue(d, "image_qa", tokenizer).turns for i in turn.ids].count(special)
        for d in (dialogue, clean)
    )
    assert count == expected
    assert f"a{name}b" in rendered(dialogue) and f"c{name}" in rendered(dialogue), "the text itself is kept"
    assert tokenizer.encode(name) == [special], "ordinary encoding is as before"


def test_system_text_stands_in_the_first_user_text() -> None:
    """There is no system role (data.md 5.1)."""
    turns = (Turn(role="system", text="Be brief."), *EXAMPLES["text"].turns)  # type: ignore[union-attr]
    assert chat.inference_dialogue(Conversation(task="text", turns=turns), "demo_or_style_v2").texts == (
        "System: Be brief.\nHi",
    )


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("task", TASKS)
def test_evaluation_asks_as_training_may(task: str, style: Style) -> None:
    """A prompt that training never drew would be a riddle."""
    asked = chat.inference_dialogue(EXAMPLES[task], style).texts[0]
    rng = np.random.default_rng(0)
    drawn = {chat.training_dialogue(EXAMPLES[task], style, rng).texts[0] for _ in range(400)}
    if style == "style_and_length_v2":
        asked, drawn = asked.partition(":")[2], {text.partition(":")[2] for text in drawn}
    assert asked in drawn


def test_a_seed_settles_every_draw() -> None:
    for annotation in (*EXAMPLES.values(), CHOICE):
        first, second = (
            chat.training_dialogue(annotation, "demo_or_style_v2", np.random.default_rng(3), 4) for _ in range(2)
        )
        assert first == second
