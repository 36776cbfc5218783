"""Our wordings: enough of them, all of a family with the same fields, and cut only where tokenizers cut anyway."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from molmo2core.preprocessing import choices, templates
from molmo2core.preprocessing.templates import Family, Slot, cut, fill
from molmo2core.testing.tiny_tokenizer import tiny_tokenizer

FAMILIES: dict[str, Family] = {
    name: value for name, value in vars(templates).items() if name.isupper() and isinstance(value, tuple)
}
SIZES = {
    "LONG_CAPTION": 23, "SHORT_CAPTION": 11, "TRANSCRIPT": 5, "MOTION_CAPTION": 10, "OBJECT_CAPTION": 10,
    "CLIP_CAPTION": 20, "FRAME_CAPTION": 12, "CLIP_TRANSCRIPT": 5, "SHORT_ANSWER": 15, "REASONING": 1,
    "WITHOUT_POINTING": 15, "POINTING": 40, "POINT_COUNT": 40, "COUNT_THEN_POINT": 6, "COUNT": 6,
    "MULTI_POINTING": 11, "MULTI_POINT_COUNT": 14, "MULTI_COUNT": 9, "MULTI_COUNT_THEN_POINT": 9, "TRACK": 10,
    "TRACK_AT_DEFAULT_FPS": 8, "GROUND": 7, "SINGLE_POINT_TRACK": 12,
}  # fmt: skip
FIELDS = {
    "OBJECT_CAPTION": {"label"}, "CLIP_CAPTION": {"start", "end"}, "CLIP_TRANSCRIPT": {"start", "end"},
    "FRAME_CAPTION": {"time"}, "SHORT_ANSWER": {"question"}, "REASONING": {"question"}, "QUESTION": {"question"},
    "WITHOUT_POINTING": {"question"}, "LABEL": {"label"}, "GROUND": {"label"}, "TRACK": {"label", "fps"},
    "TRACK_AT_DEFAULT_FPS": {"label"}, "SINGLE_POINT_TRACK": {"point", "fps"},
    **{f"{prefix}{name}": {"label"} for prefix in ("", "VIDEO_")
       for name in ("POINTING", "POINT_COUNT", "COUNT_THEN_POINT", "COUNT")},
    **{f"MULTI_{name}": {"label", "images"} for name in ("POINTING", "POINT_COUNT", "COUNT_THEN_POINT", "COUNT")},
}  # fmt: skip
CHOICE_FAMILIES: dict[str, Family] = {
    name: value for name, value in vars(choices).items() if name.isupper() and isinstance(value, tuple)
}


def fields_of(template: str) -> list[str]:
    return re.findall(r"\{(\w+)\}", template)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_has_one_set_of_fields(name: str) -> None:
    """A template with another field would lose what was asked, or fail at some step of training."""
    for template in FAMILIES[name]:
        assert sorted(fields_of(template)) == sorted(FIELDS.get(name, set())), template


@pytest.mark.parametrize("name", SIZES)
def test_families_are_about_as_large_as_published(name: str) -> None:
    """data.md 5.3; captions, pointing and counting in many ways."""
    assert len(FAMILIES[name]) >= SIZES[name]


@pytest.mark.parametrize("name", [*FAMILIES, *CHOICE_FAMILIES])
def test_wordings_differ_and_are_tidy(name: str) -> None:
    family = (FAMILIES | CHOICE_FAMILIES)[name]
    assert len(set(family)) == len(family)
    for template in family:
        assert "  " not in template and not template.endswith(("\n", " ")), template
        assert name == "SEPARATORS" or not template.startswith(" ")


def test_no_wording_for_videos_speaks_of_an_image() -> None:
    for name in FAMILIES:
        if name.startswith("VIDEO_") or name in ("MOTION_CAPTION", "OBJECT_CAPTION", "CLIP_CAPTION", "TRACK"):
            assert not re.search(r"\b(image|picture|photo)\b", " ".join(FAMILIES[name])), name


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("LONG_CAPTION", "Describe this image."),
        ("VIDEO_LONG_CAPTION", "Describe this video."),
        ("POINTING", "Point to {label}."),
        ("POINT_COUNT", "How many {label} are there?"),
        ("MULTI_POINTING", "Point to {label} in {images}."),
        ("VIDEO_POINTING", "Point to {label} in the video."),
        ("TRACK", "Track {label} at {fps} fps."),
        ("SHORT_ANSWER", "{question}"),
    ],
)
def test_what_evaluation_asks(name: str, first: str) -> None:
    """A changed first wording changes every score: it must be a decision."""
    assert FAMILIES[name][0] == first


def test_cut() -> None:
    assert cut("Where is {label}? Point to each one.") == (
        "Where is",
        Slot(before=" ", name="label", after="?"),
        " Point to each one.",
    )
    assert cut("Q: {question}\n{options}\n\nYour answer") == (
        "Q:",
        Slot(before=" ", name="question", after="\n"),
        Slot(before="", name="options", after="\n\n"),
        "Your answer",
    )
    assert cut("") == ()


def test_values_in_pieces_keep_theirs() -> None:
    assert fill("In {images}, count.", {"images": ("image_3", ",", " image_1", "")}) == (
        "In", " image_3", ",", " image_1", ",", " count.",
    )  # fmt: skip


ALL_TEMPLATES = sorted({t for family in FAMILIES.values() for t in family} | set(choices.choice_templates()))


def test_options_begin_a_line_and_templates_with_a_field_more_than_once_do_not_exist() -> None:
    """What branch_lengths.py takes for granted of multiple choice."""
    for template in choices.choice_templates():
        assert fields_of(template).count("options") == 1 and fields_of(template).count("question") == 1, template
        (slot,) = [part for part in cut(template) if isinstance(part, Slot) and part.name == "options"]
        assert slot.before == "" and cut(template)[0] != slot, template
    for template in ALL_TEMPLATES:
        assert len(set(fields_of(template))) == len(fields_of(template))
        for part in re.split(r"(?= )|(?<=\n)(?!\n)", template):
            assert len(fields_of(part)) <= 1, template


_SPLITTER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITTERS = {"qwen2": _SPLITTER % r"\p{N}", "cl100k": _SPLITTER % r"\p{N}{1,3}"}
"""Of Qwen's and of OLMo's tokenizer: they differ in how many digits stay together."""


def trained_on_templates(splitter: str) -> Tokenizer:
    """A byte-level tokenizer whose merges would show every wrong cut: the templates themselves are its text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(splitter), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=6000, min_frequency=1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(
        [*ALL_TEMPLATES, "image_12, image_3?!\n", "?\n", ".\n\n", "...\n", " \n"] * 2, trainer
    )
    return tokenizer


TOKENIZERS = {name: trained_on_templates(splitter) for name, splitter in SPLITTERS.items()} | {
    "tiny": tiny_tokenizer().backend
}
VALUES = st.one_of(
    st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12),
    st.lists(st.sampled_from(["a red ", "circle", "?", "...", "12", "é", '"', "'s", " ", "R&D"]), min_size=1).map(
        "".join
    ),
)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=400, deadline=None)
@given(template=st.sampled_from([t for t in ALL_TEMPLATES if "{options}" not in t]), value=VALUES)
def test_pieces_are_tokenised_like_the_whole(name: str, template: str, value: str) -> None:
    """Otherwise bounds would not hold for what transformers' processor, which encodes one string, is given."""
    pieces = fill(template, dict.fromkeys(fields_of(template), value))
    encode = TOKENIZERS[name].encode
    whole = encode("".join(pieces), add_special_tokens=False).ids
    assert [i for piece in pieces for i in encode(piece, add_special_tokens=False).ids] == whole
