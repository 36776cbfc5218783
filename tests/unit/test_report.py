"""The HTML report and its drawings: right places, right frames, nothing executable, nothing remote."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from typing import get_args

import av
import numpy as np
import pytest
from PIL import Image

from molmo2core.annotations import (
    Annotation,
    Caption,
    Conversation,
    Point,
    Pointing,
    QuestionAnswer,
    Track,
    TrackForm,
    Tracking,
    TrackPosition,
    Turn,
)
from molmo2core.drawing import Mark, Picture, draw_marks
from molmo2core.evaluation.drawing import draw_example
from molmo2core.evaluation.gate import Verdict
from molmo2core.evaluation.report import DrawnAnswer, build_report, choose_drawn
from molmo2core.evaluation.run import Answer, Question
from molmo2core.evaluation.tasks import Score, average_scores, score_answer
from molmo2core.examples import Example, Media
from molmo2core.preprocessing.chat import reply_of

GREY = np.full((60, 120, 3), 128, dtype=np.uint8)


def pixels(jpeg: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB")).astype(int)


def is_green(colour: np.ndarray) -> bool:
    return bool(colour[1] > colour[0] + 60 and colour[1] > colour[2] + 40)


def is_red(colour: np.ndarray) -> bool:
    return bool(colour[0] > colour[1] + 80 and colour[0] > colour[2] + 80)


def place(picture: np.ndarray, x: float, y: float) -> np.ndarray:
    height, width, _ = picture.shape
    return picture[round(y * height), round(x * width)]


def test_rings_and_crosses_are_where_they_belong() -> None:
    """Would catch swapped x and y, and radii taken of the longer side."""
    drawn = pixels(draw_marks(GREY, [Mark(x=0.25, y=0.5, radius=0.2), Mark(x=0.75, y=0.25)]))
    height, width, _ = drawn.shape
    assert (width, height) == (288, 144)
    assert is_green(place(drawn, 0.25 + 0.19 * height / width, 0.5))
    assert is_green(place(drawn, 0.25, 0.5 - 0.19))
    assert not is_green(place(drawn, 0.25, 0.5))  # a ring, not a disc
    assert is_red(place(drawn, 0.75, 0.25))
    assert not is_red(place(drawn, 0.25, 0.75))


def as_png(array: np.ndarray) -> bytes:
    written = io.BytesIO()
    Image.fromarray(array).save(written, "PNG")
    return written.getvalue()


def example_of(media: Media, annotation: Annotation) -> Example:
    return Example(uid="u", dataset="d", split="test", media=media, annotations=(annotation,))


def test_points_are_drawn_on_their_own_image() -> None:
    annotation = Pointing(task="multi_image_pointing", label="x", points=(Point(x=0.5, y=0.5, image=2, radius=0.2),))
    media = Media(kind="images", files=(as_png(GREY), as_png(GREY)), sizes=((120, 60), (120, 60)))
    first, second = draw_example(example_of(media, annotation), annotation, '<points coords="1 1 250 250">x</points>')
    assert is_red(place(pixels(first.jpeg), 0.25, 0.25))
    assert is_green(place(pixels(second.jpeg), 0.5, 0.5 - 0.19))
    assert not is_red(place(pixels(second.jpeg), 0.25, 0.25))
    assert (first.caption, second.caption) == ("image 1", "image 2")


@pytest.fixture(scope="module")
def video() -> bytes:
    """Four seconds at 4 frames per second, each second brighter than the last."""
    written = io.BytesIO()
    with av.open(written, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=4)
        stream.width, stream.height, stream.pix_fmt = 120, 60, "yuv420p"
        for n in range(16):
            frame = np.full((60, 120, 3), 40 + 50 * (n // 4), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return written.getvalue()


def test_tracks_are_drawn_on_the_frames_of_their_times(video: bytes) -> None:
    """Would catch drawing on the wrong frame: brightness tells the second."""
    positions = tuple(TrackPosition(time=t, x=0.3, y=0.5) for t in (0.5, 2.5))
    annotation = Tracking(task="tracking", label="x", sampling_fps=2, tracks=(Track(object_id=1, positions=positions),))
    media = Media(kind="video", files=(video,), sizes=((120, 60),), duration_seconds=4.0)
    answer = '<tracks coords="2.5 1 700 500;3.5 1 700 500">x</tracks>'
    pictures = draw_example(example_of(media, annotation), annotation, answer)
    assert [picture.caption for picture in pictures] == ["0.5 s", "2.5 s", "3.5 s"]
    drawn = [pixels(picture.jpeg) for picture in pictures]
    assert [round((place(p, 0.5, 0.1).mean() - 40) / 50) for p in drawn] == [0, 2, 3]
    assert [is_red(place(p, 0.7, 0.5)) for p in drawn] == [False, True, True]
    ring = 0.04 * 60 / 120  # inside the line of a ring of radius 0.05
    assert [is_green(place(p, 0.3 + ring, 0.5)) for p in drawn] == [True, True, False]


def test_a_video_without_points_is_shown_from_start_to_end(video: bytes) -> None:
    annotation = Caption(task="video_caption", text="x")
    media = Media(kind="video", files=(video,), sizes=((120, 60),), duration_seconds=4.0)
    pictures = draw_example(example_of(media, annotation), annotation, "y")
    assert [pictures[0].caption, pictures[-1].caption, len(pictures)] == ["0.0 s", "4.0 s", 6]


NASTY = '<script>alert("x")</script> & </dd> <img src=https://example.com/x.png onerror=1>'


def answer_of(task: str, number: int) -> Answer:
    score = Score(task=task, category="", measures={"accuracy": 1.0}, parse_failed=True)
    return Answer(
        question=Question(example_index=number, annotation_index=0, task=task, category=""),
        dataset=NASTY,
        uid=NASTY,
        prompt=NASTY,
        truth=NASTY,
        answer=NASTY,
        blind_answer=NASTY,
        score=score,
        blind_score=score,
    )


class Tags(HTMLParser):
    """Collects what a browser would act on."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_stands_alone_and_runs_nothing() -> None:
    """Would catch any text that is not escaped, and any link to the outside."""
    page = build_report(
        title=NASTY,
        facts={NASTY: NASTY},
        verdict=Verdict(reasons=(NASTY,)),
        metrics={f"{NASTY}/f1": 0.5},
        blind_metrics={},
        counts={NASTY: 3},
        drawn=[DrawnAnswer(answer=answer_of("t", 0), pictures=[Picture(caption=NASTY, jpeg=b"jpeg bytes")])],
    )
    parser = Tags()
    parser.feed(page)
    names = {tag for tag, _ in parser.tags}
    assert "script" not in names
    images = [attributes for tag, attributes in parser.tags if tag == "img"]
    assert [image["src"] for image in images] == [f"data:image/jpeg;base64,{base64.b64encode(b'jpeg bytes').decode()}"]
    assert not [attributes for _, attributes in parser.tags if "href" in attributes or "onerror" in attributes]
    assert parser.text.count(NASTY) >= 10  # and a reader sees it as it was written
    style = page.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style and "@import" not in style


def test_metrics_stand_beside_the_blind_baseline() -> None:
    page = build_report(
        title="t",
        facts={},
        verdict=Verdict(reasons=()),
        metrics={"image_qa/accuracy": 0.875, "image_qa.colour/accuracy": 0.9},
        blind_metrics={"image_qa/accuracy": 0.25},
        counts={"image_qa": 16, "image_qa.colour": 4},
        drawn=[],
    )
    rows = [re.findall(r"<td[^>]*>([^<]*)</td>", row) for row in page.split("<tr>")[2:]]
    assert rows == [["image_qa/accuracy", "0.875", "0.250", "16"], ["image_qa.colour/accuracy", "0.900", "-", "4"]]
    assert "Passed." in page


def test_every_task_is_drawn_before_any_is_drawn_twice() -> None:
    answers = [answer_of(task, n) for n, task in enumerate(["a"] * 5 + ["b"] * 2 + ["c"])]
    assert [answer.question.task for answer in choose_drawn(answers, 4)] == ["a", "a", "b", "c"]
    assert [answer.question.task for answer in choose_drawn(answers, 6)] == ["a", "a", "a", "b", "b", "c"]


SIZES = [(100, 100)]
COLOUR = QuestionAnswer(task="image_qa", question="?", answer="red", category="the colour")
CHOICE = QuestionAnswer(task="image_qa", question="?", answer="red", options=("blue", "red"), category="form")
COUNTING = Pointing(task="image_counting", label="x", points=(Point(x=0.5, y=0.5),))
VIDEO = Pointing(task="video_pointing", label="x", points=(Point(x=0.5, y=0.5, time=2.0),))
NOTHING = Pointing(task="image_pointing", label="x")
NO_TRACKS = Tracking(task="tracking", label="x", sampling_fps=2)
TALK = Conversation(
    task="text",
    turns=(
        Turn(role="user", text="1"),
        Turn(role="assistant", text="one"),
        Turn(role="user", text="2"),
        Turn(role="assistant", text="two"),
    ),
)


@pytest.mark.parametrize(
    ("annotation", "answer", "measures", "failed"),
    [
        (COLOUR, "Red", {"accuracy": 1.0}, None),
        (CHOICE, "B. red", {"accuracy": 1.0}, False),
        (CHOICE, "A. blue", {"accuracy": 0.0}, False),
        (CHOICE, "", {"accuracy": 0.0}, True),
        (TALK, "two", {"accuracy": 1.0, "word_f1": 1.0}, None),
        (TALK, "one", {"accuracy": 0.0, "word_f1": 0.0}, None),
        (VIDEO, '<points coords="2.0 1 500 500">x</points>', {"f1": 1.0}, False),
        (VIDEO, '<points coords="1.0 1 500 500">x</points>', {"f1": 0.0}, False),
        (VIDEO, "There are none.", {"f1": 0.0}, False),
        (VIDEO, "<points>", {"f1": 0.0}, True),
        (
            COUNTING,
            'Counting the <points coords="1 1 500 500">x</points> shows a total of 1.',
            {"accuracy": 1.0, "points_accuracy": 1.0, "f1": 1.0},
            False,
        ),
        (COUNTING, "There is 1 x.", {"accuracy": 1.0, "points_accuracy": 0.0, "f1": 0.0}, False),
        (NOTHING, "There are none.", {"f1": 1.0}, False),
        (NOTHING, "", {"f1": 0.0}, True),
        (NOTHING, '<points coords="1 1 500">x</points>', {"f1": 0.0}, True),
        (NO_TRACKS, "There are none.", {"f1": 1.0, "hota": 1.0}, False),
        (NO_TRACKS, "", {"f1": 0.0, "hota": 0.0}, True),
        (COUNTING, "x", {"accuracy": 0.0, "points_accuracy": 0.0, "f1": 0.0}, True),
    ],
)
def test_answers_are_scored_by_the_form_of_their_annotation(
    annotation: Annotation, answer: str, measures: dict[str, float], failed: bool | None
) -> None:
    """Would catch full marks for saying nothing understandable where there is nothing to point at."""
    score = score_answer(annotation, answer, SIZES)
    assert {name: score.measures[name] for name in measures} == measures
    assert score.parse_failed is failed


CAT = Point(x=0.25, y=0.5, image=2)
GOAL = Point(x=0.25, y=0.5, time=1.5)
MOVES = tuple(TrackPosition(time=n / 2, x=0.1 + n / 10, y=0.5) for n in range(6))
RIGHTLY_ANSWERED: list[Annotation] = [
    COLOUR,
    CHOICE,
    QuestionAnswer(task="image_qa", question="?", answer="red", explanation="It glows."),
    QuestionAnswer(task="image_qa", question="?", answer="red", options=("blue", "red"), explanation="It glows.\nSo."),
    COUNTING,
    NOTHING,
    VIDEO,
    Pointing(task="multi_image_pointing", label="x", points=(CAT,)),
    Pointing(task="multi_image_counting", label="x", points=(CAT,)),
    Pointing(task="multi_image_counting", label="x", points=(CAT,), count_form="count_then_point"),
    Pointing(task="video_counting", label="x", points=(GOAL,)),
    Pointing(task="video_counting", label="x", points=(GOAL,), count_form="count"),
    Pointing(task="video_counting", label="x"),
    Pointing(task="image_counting", label="x", count=140, count_form="count"),
    Pointing(task="image_counting", label="x", count_form="count"),
    NO_TRACKS,
    *(
        Tracking(task="tracking", label="x", sampling_fps=1, tracks=(Track(object_id=3, positions=MOVES),), form=form)
        for form in get_args(TrackForm)
    ),
    TALK,
]


@pytest.mark.parametrize("annotation", RIGHTLY_ANSWERED)
def test_the_trained_reply_gets_full_marks(annotation: Annotation) -> None:
    """Would catch an evaluation that expects another form of answer than training teaches."""
    score = score_answer(annotation, reply_of(annotation), [(100, 100)] * 2)
    assert score.measures and set(score.measures.values()) == {1.0}, score
    assert not score.parse_failed


@pytest.mark.parametrize(
    ("annotation", "answer", "measures"),
    [
        (RIGHTLY_ANSWERED[13], "141", {"accuracy": 0.0}),
        (RIGHTLY_ANSWERED[13], "There are 140 leaves.", {"accuracy": 1.0}),
        (RIGHTLY_ANSWERED[10], '<points coords="1.5 1 250 500">x</points>', {"accuracy": 0.0, "points_accuracy": 1.0}),
        (RIGHTLY_ANSWERED[10], "Counting the " + "<points" * 9, {"accuracy": 0.0, "f1": 0.0}),
        (RIGHTLY_ANSWERED[10], "9" * 6000, {"accuracy": 0.0}),
        (RIGHTLY_ANSWERED[7], '<points coords="' + "9" * 6000 + ' 1 250 500">', {"f1": 0.0}),
        (RIGHTLY_ANSWERED[7], '<points coords="999999999999999 1 250 500">', {"f1": 0.0}),
    ],
)
def test_counts_and_runaway_numbers(annotation: Annotation, answer: str, measures: dict[str, float]) -> None:
    """A model that repeats one digit for ever must not stop an evaluation."""
    score = score_answer(annotation, answer, [(100, 100)] * 2)
    assert {name: score.measures[name] for name in measures} == measures


def test_averages_are_named_by_task_and_category_and_count_parse_failures() -> None:
    scores = [
        score_answer(COLOUR, "red", SIZES),
        score_answer(COLOUR, "blue", SIZES),
        score_answer(CHOICE, "B. red", SIZES),
        score_answer(VIDEO, "<points>", SIZES),
        score_answer(VIDEO, "There are none.", SIZES),
    ]
    metrics = average_scores(scores)
    assert metrics["image_qa/accuracy"] == pytest.approx(2 / 3)
    assert metrics["image_qa.the_colour/accuracy"] == 0.5
    assert metrics["image_qa.form/accuracy"] == 1.0
    assert metrics["video_pointing/parse_failures"] == 0.5
    assert metrics["video_pointing/f1"] == 0.0
    assert "tracking/f1" not in metrics
