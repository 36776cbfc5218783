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
    ],
)
def test_renders_the_goldens_to_the_character(messages: list[dict[str, object]], expected: str) -> None:
    """Would catch a lost newline, a space too many, placeholders left in place, a missing style prefix."""
    assert render(messages) == expected


def test_asks_only_when_asked_to() -> None:
    assert render([text("user", "hi")], ask=False) == "<|im_start|>user\nhi<|im_end|>\n"


@pytest.mark.parametrize("roles", [["system", "user"], ["user", "user"], ["assistant"]])
def test_refuses_roles_that_do_not_alternate(roles: list[str]) -> None:
    """Would catch a template that quietly trains on a system prompt it has never seen."""
    with pytest.raises(TemplateError, match="alternate"):
        render([text(role, "x") for role in roles])


def test_no_style_is_named_twice() -> None:
    assert len(set(UNPREFIXED_STYLES)) == len(UNPREFIXED_STYLES)
