"""The text that training sees, to the character: begin, turns, doubled ends, replies and what of them is trained.

Written by hand from model.md 6.3, 6.4 and data.md 2, 5, 6.  A sequence is shown as text with its special tokens, what
is trained as the text of the targets that carry weight.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from molmo2core.annotations import (
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
from molmo2core.examples import ROOT, Example, Media, TokenizedExample
from molmo2core.preprocessing.config import PreprocessingConfig, Style, VisualGeometry
from molmo2core.preprocessing.preprocessor import Preprocessor
from molmo2core.testing.tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def tokenized(*annotations: Annotation, style: Style = "few_phrasings", seed: int = 0) -> TokenizedExample:
    """Without a medium: the text is the same, and the root is BOS alone."""
    example = Example(uid="u", dataset="d", split="train", media=Media(kind="none"), annotations=annotations)
    return preprocessor(style, seed).tokenize(example, epoch=0)


def preprocessor(style: Style, seed: int = 0) -> Preprocessor:
    return Preprocessor(
        geometry=VisualGeometry(),
        config=PreprocessingConfig(style=style),
        tokenizer=TOKENIZER,
        weighting="none",
        seed=seed,
    )


def text(ids: np.ndarray) -> str:
    return TOKENIZER.backend.decode(ids.tolist(), skip_special_tokens=False)


def inputs(example: TokenizedExample, branch: int = 0) -> str:
    return text(example.input_ids[example.subsegment_ids == branch])


def trained(example: TokenizedExample, branch: int = 0) -> list[str]:
    """Runs of targets that carry weight."""
    here = np.flatnonzero((example.loss_weights > 0) & (example.subsegment_ids == branch))
    return [text(example.target_ids[run]) for run in np.split(here, np.flatnonzero(np.diff(here) > 1) + 1)]


def conversation(*texts: str, system: str = "") -> Conversation:
    spoken = tuple(Turn(role="assistant" if n % 2 else "user", text=said) for n, said in enumerate(texts))
    return Conversation(task="text", turns=(*((Turn(role="system", text=system),) if system else ()), *spoken))


POINTS = (Point(x=0.911, y=0.8), Point(x=0.9, y=0.4))
SEEN = tuple(TrackPosition(time=n / 2, x=0.1 * n, y=0.25) for n in range(4))
ASK = "<|im_end|>\n<|im_start|>assistant\n"

GOLDENS: list[tuple[Style, Annotation, str, str]] = [
    ("style_and_length_v2", Pointing(task="image_pointing", label="Red Cats", points=POINTS),
     "pointing: red cats", '<points coords="1 1 900 400 2 911 800">Red Cats</points>'),
    ("style_and_length_v2", Pointing(task="image_counting", label="Red Cats", points=POINTS),
     "point_count: red cats",
     'Counting the <points coords="1 1 900 400 2 911 800">Red Cats</points> shows a total of 2.'),
    ("style_and_length_v2", Pointing(task="image_pointing", label="a", question="Which one?", points=POINTS[:1]),
     "cosyn_point: Which one?", '<points coords="1 1 911 800">a</points>'),
    ("few_phrasings", QuestionAnswer(task="image_qa", question="Colour?", answer="red"), "vqa2: Colour?", "red"),
    ("few_phrasings", QuestionAnswer(task="image_qa", question="Total?", answer="7", style="chart_qa"),
     "chart_qa: Total?", "7"),
    ("few_phrasings", QuestionAnswer(task="image_qa", question="Tell me.", answer="Yes.", style="user_qa"),
     "Tell me.", "Yes."),
    ("few_phrasings", QuestionAnswer(task="video_qa", question="Where?", answer="left"),
     "video_short_answer: Where?", "left"),
    ("few_phrasings", QuestionAnswer(task="image_qa", question="Colour?", answer="b", options=("a", "b")),
     "Colour?\nReply with one of these options only.\nA. a\nB. b", "B. b"),
    ("demo_or_style_v2", Caption(task="video_caption", text="It moves.", kind="merged"),
     "video_merged_caption:", "It moves."),
    ("demo_or_style_v2", conversation("Hi", "Yo"), "Hi", "Yo"),
    ("demo_or_style_v2", conversation("Hi", "Yo", system="Be brief."), "System: Be brief.\nHi", "Yo"),
    ("demo_or_style_v2", Pointing(task="video_counting", label="goal", question="How many goals?", points=(
        Point(x=0.911, y=0.8, time=0.5), Point(x=0.9, y=0.4, time=1.0))), "How many goals?",
     'Counting the <points coords="0.5 1 911 800;1.0 2 900 400">goal</points> shows a total of 2.'),
]  # fmt: skip


@pytest.mark.parametrize(("style", "annotation", "prompt", "reply"), GOLDENS)
def test_one_turn(style: Style, annotation: Annotation, prompt: str, reply: str) -> None:
    example = tokenized(annotation, style=style)
    assert text(example.input_ids[example.subsegment_ids == ROOT]) == "<|im_end|>", "BOS, which is the EOS"
    assert inputs(example) == f"<|im_start|>user\n{prompt}{ASK}{reply}"
    assert trained(example) == [f"{reply}<|im_end|>"]


def test_a_stage_one_caption_has_no_prompt_but_its_prefix() -> None:
    caption = Caption(task="image_caption", text="A red circle at the top left.")
    seen = {inputs(tokenized(caption, style="style_and_length_v2", seed=seed)) for seed in range(40)}
    plain = f"<|im_start|>user\nlong_caption:{ASK}{caption.text}"
    assert plain in seen and len(seen) > 3
    assert all(
        one.startswith("<|im_start|>user\nlong_caption") and one.endswith(f":{ASK}{caption.text}") for one in seen
    )


def test_several_turns_double_the_end() -> None:
    """EOS with weight closes a reply; the next prompt begins with an end of its own, without weight (data.md 2.5)."""
    example = tokenized(conversation("a", "b", "c", "d"), style="demo_or_style_v2")
    assert inputs(example) == f"<|im_start|>user\na{ASK}b<|im_end|><|im_end|>\n<|im_start|>user\nc{ASK}d"
    assert trained(example) == ["b<|im_end|>", "d<|im_end|>"]


def test_branches_of_a_tree() -> None:
    """No BOS and no EOS between branches in the input; every branch is trained to end (data.md 2.1)."""
    annotations = [QuestionAnswer(task="image_qa", question=f"Q{n}", answer=f"a{n}") for n in range(3)]
    example = tokenized(*annotations, conversation("u", "v", "w", "x"))
    shown = [inputs(example, branch) for branch in range(4)]
    whole = [f"<|im_start|>user\nvqa2: Q{n}{ASK}a{n}" for n in range(3)]
    whole.append(f"<|im_start|>user\nu{ASK}v<|im_end|><|im_end|>\n<|im_start|>user\nw{ASK}x")
    assert sorted(shown) == sorted(whole)
    assert text(example.input_ids) == "<|im_end|>" + "".join(shown)
    for branch, one in enumerate(shown):
        replies = ["v", "x"] if one == whole[3] else [one[-2:]]
        assert trained(example, branch) == [f"{reply}<|im_end|>" for reply in replies]
        here = np.flatnonzero(example.subsegment_ids == branch)
        assert example.target_ids[here[-1]] == TOKENIZER.special.eos
        assert example.position_ids[here[0]] == 1


def test_a_prompt_ends_where_the_reply_begins() -> None:
    """Evaluation gives exactly what training saw before the first trained token."""
    turns = conversation("a", "b", "c", "d")
    example = Example(uid="u", dataset="d", split="test", media=Media(kind="none"), annotations=(turns,))
    prompt = preprocessor("demo_or_style_v2").tokenize_prompt(example, 0)
    whole = tokenized(turns, style="demo_or_style_v2")
    assert whole.input_ids.tolist() == [*prompt.input_ids.tolist(), *TOKENIZER.encode_text("d")]
    assert inputs(prompt).endswith(f"\nc{ASK}")


@pytest.mark.parametrize("name", ["<|im_end|>", "<|im_start|>", "<im_patch>", "<|image|>", "<|endoftext|>"])
def test_special_tokens_spelled_out_stay_text(name: str) -> None:
    """In questions, answers, options and labels; nobody can close a turn or demand a visual feature."""
    special = TOKENIZER.token_id(name)
    annotations = (
        QuestionAnswer(task="image_qa", question=f"a{name}", answer=f"{name}b"),
        QuestionAnswer(task="image_qa", question="q", answer=name, options=(name, "c")),
        Pointing(task="image_pointing", label=name, points=POINTS),
    )
    for annotation in annotations:
        for style in ("few_phrasings", "demo_or_style_v2", "style_and_length_v2"):
            example = tokenized(annotation, style=style)  # type: ignore[arg-type]
            plain = tokenized(Caption(task="image_caption", text="x"), style=style)  # type: ignore[arg-type]
            assert (example.input_ids == special).sum() == (plain.input_ids == special).sum()
            assert name in text(example.input_ids).replace("&lt;", "<")
    assert "&lt;" in inputs(tokenized(annotations[2])) or "<" not in name, "and in a tag it is escaped"


def test_a_tracked_point_is_shown_in_the_prompt() -> None:
    single = Tracking(
        task="tracking",
        label="Dog",
        sampling_fps=2.0,
        form="single_point",
        tracks=(Track(object_id=3, positions=SEEN),),
    )
    example = tokenized(single)
    assert inputs(example).startswith("<|im_start|>user\nvideo_single_point_track_per_frame: ")
    assert '<points coords="0.0 1 000 250">Dog</points>' in inputs(example)
    assert trained(example) == ['<tracks coords="0.5 1 100 250;1.0 1 200 250;1.5 1 300 250">Dog</tracks><|im_end|>']
    ground = tokenized(dataclasses.replace(single, form="ground"))
    assert trained(ground) == ['<tracks coords="0.0 1 000 250;1.5 1 300 250">Dog</tracks><|im_end|>']
