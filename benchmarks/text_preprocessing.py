"""How fast annotations become token ids, beside transformers' own chat template and processor.

    python benchmarks/text_preprocessing.py [--tokenizer FOLDER] [--seconds 2]

Without FOLDER the tokenizer is the tests' one, trained in a moment; a large vocabulary makes shorter sequences and the
tokenizing of both sides faster.  Everything is one process with one thread, but for the two-core line.  "prompt" is
one user turn without a medium, given to both sides, whose ids are checked to be equal.  "branch" is what training does
for one annotation: draw a wording, write the reply, tokenize both.  "bound" is what the planner's table costs per
annotation, all styles at once.  The last line is the ratio of prompts per second, ours over transformers'.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
from transformers.models.molmo2.processing_molmo2 import Molmo2Processor

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
from molmo2core.checkpoints.processor_files import write_processor_files
from molmo2core.examples import Example, Media
from molmo2core.preprocessing.branch_lengths import annotation_tokens_bounds
from molmo2core.preprocessing.chat import encode_dialogue, training_dialogue
from molmo2core.preprocessing.config import STYLES, PreprocessingConfig, VisualGeometry
from molmo2core.preprocessing.points import format_points, parse_points
from molmo2core.preprocessing.points_strict import parse_answer
from molmo2core.preprocessing.preprocessor import Preprocessor
from molmo2core.preprocessing.randomness import generator
from molmo2core.sources.shapes_tokenizer import save_tokenizer
from molmo2core.special_tokens import TextTokenizer, load_tokenizer
from molmo2core.testing.tiny_tokenizer import tiny_tokenizer

QUESTION = "What colour is the third cup from the left, and is anything standing on the plate behind it?"
SENTENCE = "A red cup with a chipped handle stands on a blue plate beside a folded newspaper. "


def annotations() -> dict[str, Annotation]:
    """One of each usual form and length: captions of 200 and 900 words, five points, two tracks of ten seconds."""
    points = tuple(Point(x=0.1 * n, y=0.9 - 0.15 * n, image=n % 3 + 1) for n in range(5))
    moves = tuple(TrackPosition(time=n / 2, x=0.04 * n, y=0.5) for n in range(20))
    return {
        "image caption, 200 words": Caption(task="image_caption", text=SENTENCE * 14),
        "video caption, 900 words": Caption(task="video_caption", text=SENTENCE * 64),
        "short answer": QuestionAnswer(task="image_qa", question=QUESTION, answer="blue"),
        "multiple choice": QuestionAnswer(
            task="video_qa", question=QUESTION, answer="blue", options=("red", "blue", "dark green", "none of these")
        ),
        "pointing, 5 points": Pointing(task="image_pointing", label="red cup", points=points),
        "counting over images": Pointing(task="multi_image_counting", label="red cup", points=points),
        "tracking, 2 x 20": Tracking(
            task="tracking",
            label="red cup",
            sampling_fps=2.0,
            tracks=tuple(Track(object_id=n, positions=moves) for n in range(2)),
        ),
    }


def rate(work: Callable[[], object], seconds: float) -> float:
    """Calls per second: the best of five rounds."""
    best = 0.0
    for _ in range(5):
        done, started = 0, time.perf_counter()
        while (spent := time.perf_counter() - started) < seconds / 5:
            work()
            done += 1
        best = max(best, done / spent)
    return best


def branch_work(annotation: Annotation, tokenizer: TextTokenizer) -> Callable[[], object]:
    """What training does for one annotation, with other draws each time."""
    epochs = iter(range(10**9))

    def work() -> object:
        rng = generator(0, "dataset", "uid", next(epochs), "phrasing", 0)
        dialogue = training_dialogue(annotation, "demo_or_style_v2", rng, 3)
        return encode_dialogue(dialogue, annotation.task, tokenizer)

    return work


def branches_of_one_process(seconds: float) -> float:
    """Branches per second over one of each form, in turn; 0.2 s of starting are not counted."""
    tokenizer = tiny_tokenizer()
    works = [branch_work(annotation, tokenizer) for annotation in annotations().values()]
    return len(works) * rate(lambda: [work() for work in works], seconds)


def prompts(folder: Path, tokenizer_folder: Path) -> tuple[Callable[[], object], Callable[[], object]]:
    """The same prompt, ours and transformers'."""
    geometry, config = VisualGeometry(), PreprocessingConfig()
    write_processor_files(folder, tokenizer_folder, geometry, config)
    processor = Molmo2Processor.from_pretrained(folder)
    preprocessor = Preprocessor(
        geometry=geometry, config=config, tokenizer=load_tokenizer(tokenizer_folder), weighting="none", seed=0
    )
    turns = (Turn(role="user", text=QUESTION), Turn(role="assistant", text=""))
    conversation = Conversation(task="text", turns=turns)
    example = Example(uid="u", dataset="d", split="test", media=Media(kind="none"), annotations=(conversation,))
    messages = [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}]

    def ours() -> list[int]:
        return preprocessor.tokenize_prompt(example, 0).input_ids.tolist()

    def theirs() -> list[int]:
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        return [int(token) for token in processor(text=text, return_tensors="np")["input_ids"][0]]

    assert ours() == theirs()
    return ours, theirs


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, help="folder with tokenizer.json")
    parser.add_argument("--seconds", type=float, default=2.0, help="per measurement")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.tokenizer or Path(scratch, "tokenizer")
        if options.tokenizer is None:
            save_tokenizer(tiny_tokenizer().backend, folder)
        tokenizer = load_tokenizer(folder)
        print(f"{'annotation':26} {'tokens':>7} {'branches/s':>11} {'bounds/s':>9}")
        for name, annotation in annotations().items():
            branch = branch_work(annotation, tokenizer)
            bounds = annotation_tokens_bounds(annotation, tokenizer, 3)
            per_second = rate(branch, options.seconds)
            bounded = rate(lambda a=annotation: annotation_tokens_bounds(a, tokenizer, 3), options.seconds)
            tokens = bounds[STYLES.index("demo_or_style_v2")]
            print(f"{name:26} {tokens:7d} {per_second:11,.0f} {bounded:9,.0f}")
        one = branches_of_one_process(options.seconds)
        with multiprocessing.Pool(2) as pool:
            two = sum(pool.map(branches_of_one_process, [options.seconds] * 2))
        print(f"one of each in turn: {one:,.0f} branches/s on one core, {two:,.0f} on two")
        rng = np.random.default_rng(0)
        points = [Point(x=x, y=y) for x, y in rng.random((10_000, 2)).tolist()]
        text = format_points(points, "leaf", "image")
        for name, work in (
            ("printed", lambda: format_points(points, "leaf", "image")),
            ("parsed", lambda: parse_points(text)),
            ("parsed strictly", lambda: parse_answer(text)),
        ):
            print(f"an answer of 10,000 points {name} in {1000 / rate(work, options.seconds):.1f} ms")
        ours, theirs = (rate(work, options.seconds) for work in prompts(Path(scratch), folder))
        print(f"prompts/s: ours {ours:,.0f}, transformers' template and processor {theirs:,.0f}")
        print(f"ratio {ours / theirs:.1f}")


if __name__ == "__main__":
    main()
