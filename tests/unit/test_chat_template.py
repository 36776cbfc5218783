"""The exported chat template, rendered as transformers renders it, against model.md 6.2."""

from __future__ import annotations

import pytest
from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from molmo2core.checkpoints.chat_template import CHAT_TEMPLATE, UNPREFIXED_STYLES

IMAGE = {"type": "image"}
VIDEO = {"type": "video"}
ASK = "<|im_start|>assistant\n"


def render(messages: list[dict[str, object]], *, ask: bool = True) -> str:
    rendered, _ = render_jinja_template([messages], chat_template=CHAT_TEMPLATE, add_generation_prompt=ask)
    return str(rendered[0])


def user(*content: object) -> dict[str, object]:
    return {"role": "user", "content": [{"type": "text", "text": c} if isinstance(c, str) else c for c in content]}


def text(role: str, content: str) -> dict[str, object]:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        (
            [user("Describe this image.", IMAGE)],
            f"<|image|><|im_start|>user\nDescribe this image.<|im_end|>\n{ASK}",
        ),
        (
            [user(IMAGE, {"image_url": "x"}, "Compare.")],
            f"Image 1<|image|>Image 2<|image|><|im_start|>user\nCompare.<|im_end|>\n{ASK}",
        ),
        ([user("What?", VIDEO)], f"<|video|><|im_start|>user\nWhat?<|im_end|>\n{ASK}"),
        (
            [text("user", "hi"), text("assistant", "yo"), text("user", "more")],
            "<|im_start|>user\nhi<|im_end|>\n <|im_start|>assistant\nyo<|im_end|>\n"
            f"<|im_start|>user\nmore<|im_end|>\n{ASK}",
        ),
        (
            [text("Subtitle", "subtitle\n0.0 - 1.5 hello\n"), user("What?", VIDEO)],
            f"<|video|>subtitle\n0.0 - 1.5 hello\n<|im_start|>user\nWhat?<|im_end|>\n{ASK}",
        ),
        (
            [user({"type": "text", "text": "What color?", "style": "vqa2"}, IMAGE)],
            f"<|image|><|im_start|>user\nvqa2: What color?<|im_end|>\n{ASK}",
        ),
        (
            [user({"type": "text", "text": "Describe.", "style": "long_caption"}, IMAGE)],
            f"<|image|><|im_start|>user\nDescribe.<|im_end|>\n{ASK}",
        ),
        ([user("A", "B")], f"<|im_start|>user\nA B<|im_end|>\n{ASK}"),
        (
            [text("user", "hi"), text("assistant", "yo")],
            f"<|im_start|>user\nhi<|im_end|>\n <|im_start|>assistant\nyo{ASK}",
        ),
        # Not rendered in model.md 6.2, but said in 6.1.
        (  # an image of a later turn stands first too, parts need no type, videos follow images
            [user("a"), {"role": "ASSISTANT", "content": [{"type": "text", "text": "b"}]}, user(VIDEO, IMAGE, "c")],
            "<|image|><|video|><|im_start|>user\na<|im_end|>\n <|im_start|>assistant\nb<|im_end|>\n"
            f"<|im_start|>user\nc<|im_end|>\n{ASK}",
        ),
        (  # each part has a style of its own
            [user({"type": "text", "text": "A", "style": "vqa2"}, {"type": "text", "text": "B", "style": "demo"}, "C")],
            f"<|im_start|>user\nvqa2: A B C<|im_end|>\n{ASK}",
        ),
        (
            [user({"image": "a.png"}, {"image": "b.png"}, IMAGE, "?")],
            f"Image 1<|image|>Image 2<|image|>Image 3<|image|><|im_start|>user\n?<|im_end|>\n{ASK}",
        ),
        ([user(VIDEO)], f"<|video|><|im_start|>user\n<|im_end|>\n{ASK}"),
    ],
)
def test_renders_the_goldens_to_the_character(messages: list[dict[str, object]], expected: str) -> None:
    """Would catch a lost newline, a space too many, placeholders left in place, a missing style prefix."""
    assert render(messages) == expected


def test_asks_only_when_asked_to() -> None:
    assert render([text("user", "hi")], ask=False) == "<|im_start|>user\nhi<|im_end|>\n"


@pytest.mark.parametrize(
    "roles",
    [
        ["system", "user"],
        ["user", "user"],
        ["assistant"],
        ["user", "assistant", "assistant"],
        ["subtitle", "assistant"],
        ["user", "subtitle"],
    ],
)
def test_refuses_roles_that_do_not_alternate(roles: list[str]) -> None:
    """Would catch a template that quietly trains on a system prompt it has never seen."""
    with pytest.raises(TemplateError, match="alternate"):
        render([text(role, "x") for role in roles])


DEMO_STYLES = """
point_count pointing cosyn_point user_qa long_caption short_caption video_long_caption video_short_caption
video_point_track_per_frame video_point_track_start_end video_single_point_track_start_end video_transcript
video_clip_caption_start_end video_clip_caption_start_end_in_seconds video_clip_transcript_start_end
video_clip_transcript_start_end_in_seconds video_frame_caption_timestamp video_frame_caption_timestamp_in_seconds
correction_qa text_sft video_point video_point_count video_count video_count_point multi_image_pointing
multi_image_counting multi_image_point_then_count multi_image_count_then_point video_point_track_all_frames demo
a_okvqa_mc ai2_diagram_no_letter ai2_diagram science_qa multi_image_mc multi_image_mc_exp mantis_instruct_mc
video_multiple_choice video_multiple_choice_count_without_pointing video_multiple_choice_multiple_correct
video_multiple_choice_w_subtitle
"""
"""model.md 6.1, end."""


@pytest.mark.parametrize("style", [*DEMO_STYLES.split(), "vqa2", "video_short_answer", "text_vqa", "Demo", "demo_"])
def test_only_these_styles_have_no_prefix(style: str) -> None:
    """Would catch a style lost from the list, and a list that is matched by parts of names."""
    prefix = "" if style in DEMO_STYLES.split() else f"{style}: "
    part = {"type": "text", "text": "Go.", "style": style}
    assert render([user(part)]) == f"<|im_start|>user\n{prefix}Go.<|im_end|>\n{ASK}"


def test_no_style_is_named_twice() -> None:
    assert sorted(UNPREFIXED_STYLES) == sorted(DEMO_STYLES.split())
