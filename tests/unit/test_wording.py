"""From tasks to styles, families and replies: the published routing and probabilities (data.md 5.2-5.5, 6.3-6.5)."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest

from molmo2core.annotations import (
    Annotation,
    Caption,
    Conversation,
    CountForm,
    Point,
    Pointing,
    QuestionAnswer,
    Track,
    TrackForm,
    Tracking,
    TrackPosition,
    Turn,
)
from molmo2core.checkpoints.chat_template import UNPREFIXED_STYLES
from molmo2core.errors import DataError
from molmo2core.preprocessing import styles, templates
from molmo2core.preprocessing.chat import inference_dialogue, reply_of, training_dialogue
from molmo2core.preprocessing.config import STYLES
from molmo2core.preprocessing.count_questions import asks_for_count
from molmo2core.preprocessing.styles import STYLES_WITHOUT_TAG, inference_style, style_of, trained_style
from molmo2core.preprocessing.templates import Family
from molmo2core.preprocessing.tracking import answered_tracks
from molmo2core.preprocessing.wording import Selection, draw_selection, reply, wordings

DEMO = "demo_or_style_v2"
NUM_DRAWS = 4000


def caption(**fields: object) -> Caption:
    return Caption(**({"task": "video_caption", "text": "x"} | fields))  # type: ignore[arg-type]


def question(task: str = "image_qa", **fields: object) -> QuestionAnswer:
    return QuestionAnswer(**({"task": task, "question": "Q?", "answer": "a"} | fields))  # type: ignore[arg-type]


def counting(kind: str, form: CountForm = "point_then_count", **fields: object) -> Pointing:
    task = f"{kind}_counting"
    return Pointing(**({"task": task, "label": "cat", "count_form": form} | fields))  # type: ignore[arg-type]


def track(form: TrackForm = "track", fps: float = 2.0) -> Tracking:
    positions = tuple(TrackPosition(time=n / 4, x=n / 20, y=0.5, visible=n != 4) for n in range(12))
    tracks = (Track(object_id=1, positions=positions),)
    return Tracking(task="tracking", label="dog", sampling_fps=fps, tracks=tracks, form=form)


ROUTES: list[tuple[Annotation, str, str, Family]] = [
    (Caption(task="image_caption", text="x"), "long_caption", "", templates.LONG_CAPTION),
    (Caption(task="image_caption", text="x", kind="short"), "short_caption", "", templates.SHORT_CAPTION),
    (Caption(task="image_caption", text="x", kind="transcript"), "transcript", "transcript:", templates.TRANSCRIPT),
    (caption(), "video_long_caption", "", templates.VIDEO_LONG_CAPTION),
    (caption(kind="short"), "video_short_caption", "", templates.VIDEO_SHORT_CAPTION),
    (caption(kind="transcript"), "video_transcript", "", templates.VIDEO_TRANSCRIPT),
    (caption(kind="merged"), "video_merged_caption", "video_merged_caption:", templates.NOTHING),
    (caption(kind="motion"), "video_motion_caption", "video_motion_caption:", templates.MOTION_CAPTION),
    (caption(kind="object", label="cat"), "video_object_caption", "video_object_caption:", templates.OBJECT_CAPTION),
    (caption(start=1.0, end=2.0), "video_clip_caption_start_end", "", templates.CLIP_CAPTION),
    (caption(start=1.0, end=2.0, kind="transcript"), "video_clip_transcript_start_end", "", templates.CLIP_TRANSCRIPT),
    (caption(start=1.0), "video_frame_caption_timestamp", "", templates.FRAME_CAPTION),
    (question(), "vqa2", "vqa2:", templates.QUESTION),
    (question(style="chart_qa"), "chart_qa", "chart_qa:", templates.QUESTION),
    (question(style="user_qa"), "user_qa", "", templates.QUESTION),
    (question(style="eval_short_answer"), "vqa2", "vqa2:", templates.QUESTION),
    (question(explanation="why"), "vqa2_exp", "vqa2_exp:", templates.REASONING),
    (question(explanation="why", style="cosyn_chart_exp"), "cosyn_chart_exp", "cosyn_chart_exp:", templates.REASONING),
    (question(options=("a", "b")), "a_okvqa_mc", "", templates.QUESTION),
    (question("multi_image_qa"), "correction_qa", "", templates.QUESTION),
    (question("multi_image_qa", options=("a", "b")), "multi_image_mc", "", templates.QUESTION),
    (question("multi_image_qa", options=("a", "b"), explanation="e"), "multi_image_mc_exp", "", templates.REASONING),
    (question("multi_image_qa", question="How many cats?"), "correction_qa", "", templates.WITHOUT_POINTING),
    (question(question="How many cats?", style="user_qa"), "user_qa", "", templates.WITHOUT_POINTING),
    (question(question="How many cats?"), "vqa2", "vqa2:", templates.QUESTION),
    (question("video_qa"), "video_short_answer", "video_short_answer:", templates.SHORT_ANSWER),
    (question("video_qa", question="How many cats?", style="user_qa"), "user_qa", "", templates.QUESTION),
    (question("video_qa", options=("a", "b")), "video_multiple_choice", "", templates.QUESTION),
    (question("subtitle_qa", options=("a", "b")), "video_multiple_choice_w_subtitle", "", templates.QUESTION),
    (Pointing(task="image_pointing", label="cat"), "pointing", "", templates.POINTING),
    (Pointing(task="image_pointing", label="cat", question="Where?"), "cosyn_point", "", templates.QUESTION),
    (counting("image"), "point_count", "", templates.POINT_COUNT),
    (counting("image", question="How many?"), "point_count", "", templates.QUESTION),
    (counting("image", "count_then_point"), "count_then_point", "count_then_point:", templates.COUNT_THEN_POINT),
    (counting("image", "count", count=3), "count", "count:", templates.COUNT),
    (Pointing(task="multi_image_pointing", label="cat"), "multi_image_pointing", "", templates.MULTI_POINTING),
    (counting("multi_image"), "multi_image_point_then_count", "", templates.MULTI_POINT_COUNT),
    (counting("multi_image", "count_then_point"), "multi_image_count_then_point", "",
     templates.MULTI_COUNT_THEN_POINT),
    (counting("multi_image", "count"), "multi_image_counting", "", templates.MULTI_COUNT),
    (Pointing(task="video_pointing", label="cat"), "video_point", "", templates.VIDEO_POINTING),
    (counting("video"), "video_point_count", "", templates.VIDEO_POINT_COUNT),
    (counting("video", "count_then_point"), "video_count_point", "", templates.VIDEO_COUNT_THEN_POINT),
    (counting("video", "count"), "video_count", "", templates.VIDEO_COUNT),
    (track(), "video_point_track_per_frame", "", templates.TRACK),
    (track("ground"), "video_point_ground_start_end", "video_point_ground_start_end:", templates.GROUND),
    (track("single_point"), "video_single_point_track_per_frame", "video_single_point_track_per_frame:",
     templates.SINGLE_POINT_TRACK),
    (Conversation(task="text", turns=(Turn(role="user", text="u"), Turn(role="assistant", text="a"))), "text_sft", "",
     templates.QUESTION),
]  # fmt: skip


@pytest.mark.parametrize(("annotation", "style", "prefix", "family"), ROUTES)
def test_routes(annotation: Annotation, style: str, prefix: str, family: Family) -> None:
    """Style, its prefix in stages 2 and 3, and the family of the first wording."""
    assert style_of(annotation) == style
    assert "".join(styles.style_prefix(style, DEMO, None)) == prefix
    assert wordings(annotation, DEMO)[0].family == family
    assert sum(way.share for way in wordings(annotation, DEMO)) == pytest.approx(1)
    text = inference_dialogue(annotation, DEMO).texts[0]
    assert text.startswith(prefix) and "{" not in text


def test_every_family_is_used() -> None:
    families = {value for name, value in vars(templates).items() if name.isupper() and isinstance(value, tuple)}
    used = {way.family for annotation, *_ in ROUTES for style in STYLES for way in wordings(annotation, style)}
    assert families <= used


@pytest.mark.parametrize("annotation", [route[0] for route in ROUTES])
def test_a_training_prompt_is_of_its_families(annotation: Annotation) -> None:
    """Every draw is one of the templates filled in, and what it says follows from the annotation."""
    rng = np.random.default_rng(0)
    for style in STYLES:
        for _ in range(20):
            prompt, *_, said = training_dialogue(annotation, style, rng, 3).texts
            assert "{" not in prompt + said and "  " not in prompt and said


def test_few_phrasings_are_the_first_ones() -> None:
    for annotation, *_ in ROUTES:
        few, many = wordings(annotation, "few_phrasings"), wordings(annotation, DEMO)
        for one in few:
            assert len(one.family) <= 3
        assert few[0].family[0] == many[0].family[0] or many[0].family[0] in templates.WITHOUT_POINTING
        rng = np.random.default_rng(0)
        prompts = {training_dialogue(annotation, "few_phrasings", rng, 4).texts[0] for _ in range(60)}
        assert len(prompts) <= 6, "three templates, of two families at most"


def test_styles_without_a_tag_are_those_of_the_exported_template() -> None:
    """The template knows two more, which training never writes; `demo:` is written out in training (data.md 5.2)."""
    assert set(UNPREFIXED_STYLES) - STYLES_WITHOUT_TAG == {"demo", "video_point_track_all_frames"}
    assert set(UNPREFIXED_STYLES) >= STYLES_WITHOUT_TAG


@pytest.mark.parametrize(
    ("asked", "trained"),
    [
        ("eval_short_answer", "vqa2"),
        ("eval_multiple_choice", "a_okvqa_mc"),
        ("video_eval_short_answer", "video_short_answer"),
        ("video_eval_multiple_choice", "video_multiple_choice"),
        ("video_eval_multiple_choice_w_subtitle", "video_multiple_choice_w_subtitle"),
        ("eval_multi_image_mc", "multi_image_mc"),
        ("eval_multi_image_pointing", "multi_image_pointing"),
        ("chart_qa", "chart_qa"),
    ],
)
def test_names_of_evaluations(asked: str, trained: str) -> None:
    assert trained_style(asked) == inference_style(asked) == trained


def test_variants_collapse_at_inference_only() -> None:
    name = "video_multiple_choice_count_without_pointing"
    assert (trained_style(name), inference_style(name)) == (name, "video_multiple_choice")


def shares(annotation: Annotation, num_images: int = 1) -> Counter[str]:
    rng = np.random.default_rng(0)
    return Counter(training_dialogue(annotation, DEMO, rng, num_images).texts[0] for _ in range(NUM_DRAWS))


def near(count: float, expected: float) -> bool:
    return abs(count / NUM_DRAWS - expected) < 4 * (expected * (1 - expected) / NUM_DRAWS) ** 0.5


def test_times_are_seconds_or_clock_times_in_halves() -> None:
    drawn = shares(caption(start=3661.25, end=3723.0))
    assert near(sum(n for text, n in drawn.items() if "3661.2 seconds" in text and "3723.0 seconds" in text), 0.5)
    assert near(sum(n for text, n in drawn.items() if "01:01:01.2" in text and "01:02:03.0" in text), 0.5)


def test_two_frames_per_second_are_said_in_halves() -> None:
    assert near(sum(n for text, n in shares(track()).items() if "2" in text), 0.5)
    assert all("1.5" in text for text in shares(track(fps=1.5)))


def test_image_sets_are_asked_for_as_a_whole_or_in_part() -> None:
    """Half all images; of these, for pointing, half as for one image; else 1..n of n, in any order (data.md 6.3)."""
    points = tuple(Point(x=n / 10, y=0.5, image=n) for n in (1, 3))
    drawn = shares(Pointing(task="multi_image_pointing", label="cat", points=points), 3)
    assert near(sum(n for text, n in drawn.items() if "all images" in text), 0.25)
    parts = Counter[str]()
    for text, n in drawn.items():
        if "image_" in text:
            parts[" ".join(word.strip(".?,") for word in text.split() if word.startswith("image_"))] += n
    assert near(parts.total(), 0.5)
    assert len(parts) == 3 + 6 + 6, "every order of every part"
    by_size = Counter[int]()
    for names, n in parts.items():
        by_size[len(names.split())] += n
    assert all(near(by_size[size], 0.5 / 3) for size in (1, 2, 3))


def test_the_reply_follows_the_images_of_the_prompt() -> None:
    """Only those, in their order, numbers running on; none of them: the sentence."""
    points = tuple(Point(x=n / 10, y=0.5, image=n) for n in (1, 3))
    cats = Pointing(task="multi_image_pointing", label="Cat", points=points)
    assert reply(cats) == ('<points coords="1 1 100 500;3 2 300 500">Cat</points>',)
    assert reply(cats, Selection(images=(3, 2, 1))) == ('<points coords="3 1 300 500;1 2 100 500">Cat</points>',)
    assert reply(cats, Selection(images=(3,))) == ('<points coords="3 1 300 500">Cat</points>',)
    assert reply(cats, Selection(images=(2,))) == ("There are none.",)
    counted = dataclasses.replace(cats, task="multi_image_counting")
    assert reply(counted, Selection(images=(3, 2))) == (
        'Counting the <points coords="3 1 300 500">Cat</points> shows a total of 1.',
    )
    number = dataclasses.replace(counted, count_form="count")
    assert [reply(number, Selection(images=images)) for images in ((), (3,), (2,))] == [("2",), ("1",), ("0",)]


def test_whose_words_are_not_ours_is_asked_as_a_whole() -> None:
    rng = np.random.default_rng(0)
    own = Pointing(task="multi_image_pointing", label="cat", question="Where are the cats?")
    unknown = counting("multi_image", "count", count=4)
    for annotation in (own, unknown):
        assert {draw_selection(annotation, DEMO, 5, rng) for _ in range(50)} == {Selection()}
    assert reply_of(unknown) == "4"


def test_labels_are_lower_case_in_prompts_about_images_alone() -> None:
    """data.md 10.1: not for videos; and never in the tag."""
    for task, shown in (
        ("image_pointing", "red cat"),
        ("multi_image_pointing", "Red Cat"),
        ("video_pointing", "Red Cat"),
    ):
        label = Pointing(task=task, label="Red Cat", points=(Point(x=0, y=0, time=0.0),))  # type: ignore[arg-type]
        assert shown in inference_dialogue(label, DEMO).texts[0]
        assert ">Red Cat</points>" in reply_of(label)


def test_explanations_come_before_the_answer() -> None:
    choice = question(options=("a", "b"), explanation="Because.")
    assert reply_of(question(explanation="Because.")) == "Because. Answer: a"
    assert reply_of(choice) == "Because. Answer: A. a"
    prompt = inference_dialogue(choice, DEMO).texts[0]
    assert "\nA. a\nB. b\n" in prompt and prompt.endswith("finish with your answer.")


def test_an_answer_that_is_no_option_is_a_data_error() -> None:
    with pytest.raises(DataError, match="'pink'"):
        training_dialogue(question(answer="pink", options=("a", "b")), DEMO, np.random.default_rng(0))


# --- tracks -----------------------------------------------------------------------------------------------------------


def test_a_track_is_answered_on_its_grid() -> None:
    """Positions every quarter second, two asked for per second; the one at 1.0 s is hidden (data.md 6.5)."""
    assert [p.time for p in answered_tracks(track())[0].positions] == [0.0, 0.5, 1.5, 2.0, 2.5]
    assert [p.time for p in answered_tracks(track(fps=1.0))[0].positions] == [0.0, 2.0]
    assert reply_of(dataclasses.replace(track(), tracks=())) == "There are none."


def test_grounding_is_the_first_and_the_last_sight() -> None:
    assert [p.time for p in answered_tracks(track("ground"))[0].positions] == [0.0, 2.75]
    once = Track(object_id=1, positions=(TrackPosition(time=1.0, x=0, y=0),))
    assert len(answered_tracks(dataclasses.replace(track("ground"), tracks=(once,)))[0].positions) == 1


def test_a_single_point_is_followed_from_where_it_is_shown() -> None:
    """First sight in 0.8, else another one but the last; the reply has strictly later times only."""
    single = track("single_point")
    asked = inference_dialogue(single, DEMO).texts[0]
    assert '<points coords="0.0 1 000 500">dog</points>' in asked
    assert [p.time for p in answered_tracks(single)[0].positions] == [0.5, 1.5, 2.0, 2.5]
    assert [p.time for p in answered_tracks(single, 8)[0].positions] == [2.5]
    rng = np.random.default_rng(0)
    drawn = Counter(draw_selection(single, DEMO, 1, rng).query for _ in range(NUM_DRAWS))
    assert set(drawn) == set(range(9)), "eleven are seen; after 2.5 s the grid has nothing to follow"
    assert near(drawn[0], 0.8 + 0.2 / 9)
    assert all(reply(single, Selection(query=query)) != ("There are none.",) for query in drawn)


# --- counting questions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("How many cats are there?", True),
        ("how  MANY cats", True),
        ("Please count all chairs.", True),
        ("What is the number of windows?", True),
        ("There are ____ dogs in the image.", True),
        ("How many minutes does it take?", False),
        ("How many miles per hour?", False),
        ("Approximately how many people are there?", False),
        ("Does the count matter?", False),
        ("What colour is it?", False),
    ],
)
def test_questions_that_ask_for_a_count(text: str, counts: bool) -> None:
    assert asks_for_count(text) == counts
