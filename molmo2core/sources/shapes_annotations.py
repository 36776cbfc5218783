"""Questions, answers, captions, points and tracks of a scene, exactly as the scene has them.

Texts come from few fixed wordings; about one in twenty takes one of the others, so that a model meets both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, TypeVar

import numpy as np

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
from molmo2core.examples import Subtitle
from molmo2core.sources.shapes_scene import COLOURS, FORMS, MovingScene, MovingShape, Scene, Shape

WORDINGS: dict[str, tuple[str, ...]] = {
    "colour": ("What colour is the {form}?", "Which colour does the {form} have?", "Name the colour of the {form}."),
    "form": ("What shape is {colour}?", "Which shape is {colour}?", "Name the {colour} shape."),
    "number": ("How many shapes are there?", "What is the number of shapes?"),
    "presence": ("Is there a {name}?", "Can you see a {name}?"),
    "which_image": ("Which image shows a {name}?", "In which image is there a {name}?"),
    "images_with": ("How many images show a {form}?", "What is the number of images with a {form}?"),
    "colour_in_image": (
        "What colour is the {form} in image {number}?",
        "Which colour has the {form} of image {number}?",
    ),
    "motion": ("Which way does the {name} move?", "In which direction does the {name} go?"),
    "leaves": ("Does the {name} leave the picture?", "Is the {name} gone at the end?"),
    "bar": ("Is there a grey bar?", "Can you see a grey bar?"),
    "called": ("What is the {name} called?", "Which name has the {name}?"),
    "colour_of_called": ("What colour is the shape called {called}?", "Which colour does {called} have?"),
    "plus": ("What is {a} plus {b}?", "Add {a} and {b}."),
    "minus": ("What is {a} minus {b}?", "Take {b} from {a}."),
    "mix": ("What do {a} and {b} make?", "Mix {a} and {b}."),
    "copy": ("Repeat: {words}", "Say again: {words}"),
}
USUAL_WORDING_SHARE = 0.95
_COUNTED_SHARE = 0.2
"""Of labels pointed at in image sets and videos: those that are also counted."""
_ALL_AT_ONCE_SHARE = 0.5
"""Of videos with several shapes: how many ask for all of them at once."""
AnyShape = TypeVar("AnyShape", Shape, MovingShape)
Item = TypeVar("Item")
_MIXTURES = {("red", "blue"): "purple", ("blue", "yellow"): "green", ("red", "yellow"): "orange"}
_NAMES = ("Ada", "Bo", "Cleo", "Dan", "Eva", "Finn")
_ANSWERED_POSITIONS = 12
"""Positions of one tracking answer at most; longer ones are sampled at 1 instead of 2 per second."""


def image_captions(scene: Scene, rng: np.random.Generator) -> list[Annotation]:
    """A full caption, sometimes also a short one."""
    shapes = sorted(scene.shapes, key=lambda shape: shape.x)
    full = _listed([f"a {shape.name} {_place(shape, scene)}" for shape in shapes])
    captions: list[Annotation] = [Caption(task="image_caption", text=_sentence(full))]
    if rng.random() < 0.15:
        captions.append(Caption(task="image_caption", text=_sentence(_listed([f"a {s.name}" for s in shapes]))))
    return captions


def image_questions(scene: Scene, rng: np.random.Generator) -> list[Annotation]:
    """Three to five questions, colour questions first among them."""
    colour = [_colour_question(shape, rng) for shape in _alone_in(scene.shapes, "form")]
    if len(scene.shapes) == 1:
        only = scene.shapes[0]
        colour.append(_qa(rng, "image_qa", "colour", only.colour, "colour", form="shape"))
    other = [
        _qa(rng, "image_qa", "form", shape.form, "shape", colour=shape.colour)
        for shape in _alone_in(scene.shapes, "colour")
    ]
    other.append(_qa(rng, "image_qa", "number", str(len(scene.shapes)), "count"))
    other.append(_presence_question(scene.shapes, rng))
    if colour:
        asked = colour[rng.integers(len(colour))]
        other.append(_multiple_choice(asked, tuple(COLOURS), rng))
    wanted = int(rng.integers(3, 6))
    chosen = _some(colour, 2, rng)
    return [*chosen, *_some(other, wanted - len(chosen), rng)]


def image_points(scene: Scene, rng: np.random.Generator) -> list[Annotation]:
    """Two to four labels: pointing or counting, about every fifth at something that is not there."""
    annotations: list[Annotation] = []
    for label, shapes in _labels(scene.shapes, rng, int(rng.integers(2, 5))):
        task: Literal["image_pointing", "image_counting"] = "image_pointing" if rng.random() < 0.7 else "image_counting"
        points = tuple(_point(shape, scene) for shape in shapes)
        annotations.append(Pointing(task=task, label=label, points=points))
    return annotations


def image_set_questions(scenes: Sequence[Scene], rng: np.random.Generator) -> list[Annotation]:
    """Two or three questions about a set of images."""
    shapes = [shape for scene in scenes for shape in scene.shapes]
    questions = [
        _qa(rng, "multi_image_qa", "which_image", str(number), "which_image", name=shape.name)
        for number, scene in enumerate(scenes, 1)
        for shape in scene.shapes
        if [other.name for other in shapes].count(shape.name) == 1
    ]
    colour = [
        _qa(rng, "multi_image_qa", "colour_in_image", shape.colour, "colour", form=shape.form, number=number)
        for number, scene in enumerate(scenes, 1)
        for shape in _alone_in(scene.shapes, "form")
    ]
    form = FORMS[rng.integers(len(FORMS))]
    having = sum(any(shape.form == form for shape in scene.shapes) for scene in scenes)
    count = _qa(rng, "multi_image_qa", "images_with", str(having), "count", form=form)
    return [*_some(colour, 1, rng), *_some([*questions, count], 2, rng)]


def image_set_points(scenes: Sequence[Scene], rng: np.random.Generator) -> list[Annotation]:
    """Two labels pointed at, or now and then counted, over a set of images."""
    shapes = [shape for scene in scenes for shape in scene.shapes]
    labels = [label for label, _ in _labels(shapes, rng, 2)]
    return [
        Pointing(
            task="multi_image_counting" if rng.random() < _COUNTED_SHARE else "multi_image_pointing",
            label=label,
            points=tuple(
                _point(shape, scene, image=number)
                for number, scene in enumerate(scenes, 1)
                for shape in scene.shapes
                if _has_label(shape, label)
            ),
        )
        for label in labels
    ]


def video_captions(scene: MovingScene) -> list[Annotation]:
    """What moves where, and when it is hidden or gone."""
    sentences = []
    for index, shape in enumerate(scene.shapes):
        way = _way(shape)
        sentences.append(_sentence(f"a {shape.name} moves {way}" if way else f"a {shape.name} rests"))
        seen = [scene.seen(index, time) is not None for time in scene.grid_times]
        for time, before, now in zip(scene.grid_times[1:], seen, seen[1:], strict=False):
            if before != now:
                event = "appears again" if now else "leaves" if _leaves(shape, scene) and not any(
                    seen[scene.grid_times.index(time) :]
                ) else "is hidden"  # fmt: skip
                sentences.append(f"At {time} seconds it {event}.")
    if scene.bar:
        sentences.append("A grey bar stands in the middle.")
    return [Caption(task="video_caption", text=" ".join(sentences))]


def video_questions(scene: MovingScene, rng: np.random.Generator) -> list[Annotation]:
    """Two to four questions about a video."""
    questions = [
        _qa(rng, "video_qa", "colour", shape.colour, "colour", form=shape.form)
        for shape in _alone_in(scene.shapes, "form")
    ]
    moving = [shape for shape in scene.shapes if _way(shape)]
    motion = [_qa(rng, "video_qa", "motion", _way(shape), "motion", name=shape.name) for shape in moving]
    leaving = [
        _qa(rng, "video_qa", "leaves", "yes" if _leaves(shape, scene) else "no", "leaves", name=shape.name)
        for shape in scene.shapes
    ]
    bar = _qa(rng, "video_qa", "bar", "yes" if scene.bar else "no", "presence")
    if motion and rng.random() < 0.5:
        motion[0] = _multiple_choice(motion[0], ("left", "right", "up", "down"), rng)
    return [*_some(questions, 1, rng), *_some([*motion, *leaving, bar], int(rng.integers(1, 4)), rng)]


def subtitles_and_questions(
    scene: MovingScene, rng: np.random.Generator
) -> tuple[tuple[Subtitle, ...], list[Annotation]]:
    """Subtitles that give shapes a name, and questions that cannot be answered without them."""
    shapes = _alone_in(scene.shapes, "form") or list(scene.shapes[:1])
    names = [_NAMES[i] for i in rng.permutation(len(_NAMES))[: len(shapes)]]
    length = scene.duration / len(shapes)
    subtitles = tuple(
        Subtitle(
            start=round(n * length, 2), end=round((n + 0.9) * length, 2), text=f"The {shape.form} is called {name}."
        )
        for n, (shape, name) in enumerate(zip(shapes, names, strict=True))
    )
    questions: list[Annotation] = []
    for shape, name in zip(shapes, names, strict=True):
        questions.append(_qa(rng, "subtitle_qa", "called", name, "name", name=shape.name))
        questions.append(_qa(rng, "subtitle_qa", "colour_of_called", shape.colour, "colour", called=name))
    return subtitles, questions


def video_points(scene: MovingScene, rng: np.random.Generator) -> list[Annotation]:
    """Two or three labels, now and then counted; things are pointed at when first seen at a multiple of 0.5 s."""
    annotations: list[Annotation] = []
    for label, shapes in _labels(scene.shapes, rng, int(rng.integers(2, 4)), everything=_ALL_AT_ONCE_SHARE):
        points = []
        for shape in shapes:
            index = scene.shapes.index(shape)
            first = next(((t, s) for t in scene.grid_times if (s := scene.seen(index, t))), None)
            if first:
                points.append(_point(first[1], scene, time=first[0]))
        points.sort(key=lambda point: (point.time, point.x, point.y))
        task: Literal["video_pointing", "video_counting"] = "video_pointing"
        if rng.random() < _COUNTED_SHARE:
            task = "video_counting"
        annotations.append(Pointing(task=task, label=label, points=tuple(points)))
    return annotations


def video_tracks(scene: MovingScene, rng: np.random.Generator) -> list[Annotation]:
    """Two labels followed through time; numbers go by first appearance, then from left to right."""
    annotations: list[Annotation] = []
    for label, shapes in _labels(scene.shapes, rng, 2, everything=_ALL_AT_ONCE_SHARE):
        sampling_fps = 2.0 if len(shapes) * len(scene.grid_times) <= _ANSWERED_POSITIONS else 1.0
        followed = [(positions, shape) for shape in shapes if (positions := _positions(scene, shape, sampling_fps))]
        followed.sort(key=lambda track: next((p.time, p.x, p.y) for p in track[0] if p.visible))
        tracks = tuple(
            Track(object_id=number, positions=positions, radius=_fraction(shape.radius, _shorter_side(scene)))
            for number, (positions, shape) in enumerate(followed, 1)
        )
        annotations.append(Tracking(task="tracking", label=label, sampling_fps=sampling_fps, tracks=tracks))
    return annotations


def conversation(rng: np.random.Generator) -> list[Annotation]:
    """Small sums, colour mixing or copying, in one to three rounds."""
    turns: list[Turn] = []
    for _ in range(int(rng.choice([1, 1, 2, 3]))):
        kind = rng.choice(["plus", "minus", "mix", "copy"])
        a, b = sorted((int(v) for v in rng.integers(0, 10, 2)), reverse=True)
        if kind == "mix":
            pair = list(_MIXTURES)[rng.integers(len(_MIXTURES))]
            question, answer = _say(rng, "mix", a=pair[0], b=pair[1]), _MIXTURES[pair]
        elif kind == "copy":
            words = [*COLOURS, *FORMS]
            answer = " ".join(words[i] for i in rng.integers(0, len(words), int(rng.integers(1, 4))))
            question = _say(rng, "copy", words=answer)
        else:
            question, answer = _say(rng, kind, a=a, b=b), str(a + b if kind == "plus" else a - b)
        turns += [Turn(role="user", text=question), Turn(role="assistant", text=answer)]
    return [Conversation(task="text", turns=tuple(turns))]


def _say(rng: np.random.Generator, wording: str, **values: object) -> str:
    usual, *others = WORDINGS[wording]
    text = usual if rng.random() < USUAL_WORDING_SHARE else others[rng.integers(len(others))]
    return text.format(**values)


def _qa(
    rng: np.random.Generator,
    task: Literal["image_qa", "multi_image_qa", "video_qa", "subtitle_qa"],
    wording: str,
    answer: str,
    category: str,
    **values: object,
) -> QuestionAnswer:
    return QuestionAnswer(task=task, question=_say(rng, wording, **values), answer=answer, category=category)


def _colour_question(shape: Shape, rng: np.random.Generator) -> QuestionAnswer:
    return _qa(rng, "image_qa", "colour", shape.colour, "colour", form=shape.form)


def _presence_question(shapes: Sequence[Shape], rng: np.random.Generator) -> QuestionAnswer:
    names = [shape.name for shape in shapes]
    present = rng.random() < 0.5
    name = names[rng.integers(len(names))] if present else _absent_name(shapes, rng)
    return _qa(rng, "image_qa", "presence", "yes" if present else "no", "presence", name=name)


def _multiple_choice(asked: QuestionAnswer, answers: Sequence[str], rng: np.random.Generator) -> QuestionAnswer:
    wrong = [answer for answer in answers if answer != asked.answer]
    options = [asked.answer, *(wrong[i] for i in rng.permutation(len(wrong))[:3])]
    return QuestionAnswer(
        task=asked.task,
        question=asked.question,
        answer=asked.answer,
        options=tuple(options[i] for i in rng.permutation(len(options))),
        category="choice",
    )


def _labels(
    shapes: Sequence[AnyShape], rng: np.random.Generator, number: int, *, everything: float = 0.0
) -> list[tuple[str, list[AnyShape]]]:
    """Different labels with the shapes they fit; the first fits something, later ones may be absent.

    Where there are several shapes, the first label is the one that fits all, with probability `everything`.
    """
    names = sorted({shape.name for shape in shapes})
    wide = [*sorted({shape.form for shape in shapes} | {f"{shape.colour} shape" for shape in shapes}), "shape"]
    labels = ["shape"] if everything and len(shapes) > 1 and rng.random() < everything else []
    while len(labels) < number:
        draw = rng.random()
        if draw < 0.12 and labels:
            label = _absent_name(shapes, rng)
        else:
            among = names if draw < 0.7 else wide
            label = among[rng.integers(len(among))]
        if label not in labels:
            labels.append(label)
    return [(label, [shape for shape in shapes if _has_label(shape, label)]) for label in labels]


def _has_label(shape: Shape | MovingShape, label: str) -> bool:
    return label in (shape.name, shape.form, f"{shape.colour} shape", "shape")


def _absent_name(shapes: Sequence[AnyShape], rng: np.random.Generator) -> str:
    """A shape that is not there, of a colour that is not there while some colour is missing."""
    colours = [colour for colour in COLOURS if colour not in {shape.colour for shape in shapes}] or list(COLOURS)
    absent = sorted({f"{colour} {form}" for colour in colours for form in FORMS} - {shape.name for shape in shapes})
    return absent[rng.integers(len(absent))]


def _alone_in(shapes: Sequence[AnyShape], attribute: Literal["form", "colour"]) -> list[AnyShape]:
    """The shapes that no other shape shares `attribute` with."""
    values = [getattr(shape, attribute) for shape in shapes]
    return [shape for shape, value in zip(shapes, values, strict=True) if values.count(value) == 1]


def _some(items: Sequence[Item], number: int, rng: np.random.Generator) -> list[Item]:
    return [items[i] for i in rng.permutation(len(items))[:number]]


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _place(shape: Shape, scene: Scene) -> str:
    across = ("left", "", "right")[min(int(3 * shape.x / scene.width), 2)]
    down = ("top", "", "bottom")[min(int(3 * shape.y / scene.height), 2)]
    return f"at the {down} {across}".replace("  ", " ").rstrip() if across or down else "in the middle"


def _fraction(value: float, whole: float) -> float:
    return round(value / whole, 4)


def _shorter_side(scene: Scene | MovingScene) -> int:
    return min(scene.width, scene.height)


def _point(shape: Shape, scene: Scene | MovingScene, *, image: int = 1, time: float | None = None) -> Point:
    return Point(
        x=_fraction(shape.x, scene.width),
        y=_fraction(shape.y, scene.height),
        image=image,
        time=time,
        radius=_fraction(shape.radius, _shorter_side(scene)),
    )


def _way(shape: MovingShape) -> str:
    """`left`, `right`, `up` or `down`; empty when it rests."""
    (_, x0, y0), (_, x1, y1) = shape.path[0], shape.path[-1]
    if math.dist((x0, y0), (x1, y1)) < 1:
        return ""
    if abs(x1 - x0) > abs(y1 - y0):
        return "right" if x1 > x0 else "left"
    return "down" if y1 > y0 else "up"


def _leaves(shape: MovingShape, scene: MovingScene) -> bool:
    _, x, y = shape.path[-1]
    return not (0 <= x <= scene.width and 0 <= y <= scene.height)


def _positions(scene: MovingScene, shape: MovingShape, sampling_fps: float) -> tuple[TrackPosition, ...]:
    """Where `shape` is: hidden positions are kept with `visible` false, those outside the picture are left out.

    Empty when it can never be seen.
    """
    index = scene.shapes.index(shape)
    positions = []
    for step in range(math.ceil(scene.duration * sampling_fps - 1e-6)):
        time = step / sampling_fps
        there = shape.at(scene.displayed_time(time))
        if there is None or not (0 <= there.x <= scene.width and 0 <= there.y <= scene.height):
            continue
        x, y = _fraction(there.x, scene.width), _fraction(there.y, scene.height)
        positions.append(TrackPosition(time=time, x=x, y=y, visible=scene.seen(index, time) is not None))
    return tuple(positions) if any(position.visible for position in positions) else ()
