"""What the loader hands to training: loss weights as the table says, and losses as those of the conversations alone.

tests/property/test_packs_equal_examples.py has the same about the model on random trees; here everything in between is
real: shards, plan, preprocessing, packing, collating, microbatches and the trained loss.
"""

from __future__ import annotations

from math import sqrt
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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
from molmo2core.examples import DOCUMENT, ROOT, Batch, Example, Media, TokenizedExample
from molmo2core.loading.collator import collate_packs
from molmo2core.message_tree.config import Weighting
from molmo2core.packing.concat import pack_examples
from molmo2core.preprocessing.preprocessor import Preprocessor
from molmo2core.testing.loading import (
    GEOMETRY,
    LIMITS,
    PACKS,
    LoadingData,
    open_loading_data,
    tiny_loader,
    write_loading_data,
)
from molmo2core.testing.tiny_model import branch_alone, random_model, tiny_config
from molmo2core.testing.tiny_tokenizer import tiny_tokenizer
from molmo2core.training.composer_model import TrainedMolmo2
from molmo2core.training.config import DropoutConfig
from molmo2core.training.microbatch import MicrobatchMaker

WORDS = st.lists(st.sampled_from(["red", "circle", "two blue bars", "<|im_end|>", "ü"]), min_size=1, max_size=6)
TEXTS = WORDS.map(" ".join)
PARTS = st.floats(0, 1).map(lambda value: round(value, 3))
POINTS = st.lists(st.builds(Point, x=PARTS, y=PARTS), max_size=3).map(tuple)

# data.md 4.1 and 4.2, written out: weight of each target of a branch with n targets, its last end included, in a tree
# of B branches.  The published code counts the last end only where there is a single branch.
FIXED = {
    "described": {"video_caption": 0.1, "image_caption": 0.2, "pointing": 0.2},
    "released_code": {"video_caption": 0.1, "pointing": 0.2},
    "none": dict.fromkeys(("video_caption", "image_caption", "pointing", "other"), 1.0),
}


def table_weight(weighting: Weighting, family: str, n: int, branches: int) -> float:
    if family in FIXED[weighting]:
        return FIXED[weighting][family]
    if weighting == "described":
        return 4 / sqrt(n)
    return 2 / sqrt(n) if branches == 1 else 2 / sqrt(n - 1) / sqrt(branches)


def family_of(annotation: Annotation) -> str:
    match annotation:
        case Caption(task=task):
            return task
        case Pointing() | Tracking():
            return "pointing"
    return "other"


@st.composite
def annotations(draw: st.DrawFn) -> Annotation:
    kind = draw(st.integers(0, 5))
    if kind == 0:
        return Caption(task=draw(st.sampled_from(["image_caption", "video_caption"])), text=draw(TEXTS))
    if kind == 1:
        return QuestionAnswer(task="image_qa", question=draw(TEXTS), answer=draw(TEXTS))
    if kind == 2:
        return Pointing(task="image_pointing", label=draw(TEXTS), points=draw(POINTS))
    if kind == 3:
        return Pointing(task="image_counting", label=draw(TEXTS), points=draw(POINTS))
    if kind == 4:
        position = TrackPosition(time=0.5, x=draw(PARTS), y=draw(PARTS))
        return Tracking(
            task="tracking", label=draw(TEXTS), sampling_fps=2.0, tracks=(Track(object_id=1, positions=(position,)),)
        )
    turns = [
        Turn(role=role, text=draw(TEXTS)) for _ in range(draw(st.integers(1, 3))) for role in ("user", "assistant")
    ]
    return Conversation(task="text", turns=tuple(turns))


def is_reply(ids: list[int]) -> list[bool]:
    """Which tokens of a branch the model has to say, read off the text: from behind an assistant's header to the next
    end, that included.  Ends that people's text spells out are other tokens."""
    tokenizer = tiny_tokenizer()
    header = [tokenizer.token_id("<|im_start|>"), *tokenizer.encode_text("assistant\n")]
    end = tokenizer.token_id("<|im_end|>")
    said: list[bool] = []
    inside = False
    for place, token in enumerate(ids):
        said.append(inside)
        if inside and token == end:
            inside = False
        elif not inside and ids[place + 1 - len(header) : place + 1] == header:
            inside = True
    return said


@settings(max_examples=150, deadline=None)
@given(
    trees=st.lists(st.lists(annotations(), min_size=1, max_size=4), min_size=1, max_size=3),
    weighting=st.sampled_from(["described", "released_code", "none"]),
)
def test_loss_weights_are_the_table(trees: list[list[Annotation]], weighting: Weighting) -> None:
    """Of every token of a packed batch.  Catches a weight on a prompt, on a header or a root, one place off, missing on
    an end, or of another branch's length; and a table that changes unnoticed."""
    preprocessor = Preprocessor(
        geometry=GEOMETRY, config=LIMITS, tokenizer=tiny_tokenizer(), weighting=weighting, seed=1
    )
    examples = [
        Example(uid=str(n), dataset="d", split="train", media=Media(kind="none"), annotations=tuple(tree))
        for n, tree in enumerate(trees)
    ]
    order = [[branch.number for branch in preprocessor.draw(example, epoch=0).branches] for example in examples]
    packed = pack_examples([preprocessor.tokenize(example, epoch=0) for example in examples], GEOMETRY.max_pool)
    (pack,) = collate_packs([packed])["packs"]
    subsegments, eos = pack["subsegment_ids"], tiny_tokenizer().special.eos
    for document, example in enumerate(examples):
        assert not pack["loss_weights"][subsegments == document * DOCUMENT + ROOT].any()
        for branch, number in enumerate(order[document]):
            own = subsegments == document * DOCUMENT + branch
            ids = [*pack["input_ids"][own].tolist(), eos]
            assert pack["target_ids"][own].tolist() == ids[1:]
            said = np.array(is_reply(ids))
            assert said.any() and said[-1]
            family = family_of(example.annotations[number])
            weight = table_weight(weighting, family, int(said.sum()), len(example.annotations))
            np.testing.assert_allclose(pack["loss_weights"][own], weight * said[1:], rtol=1e-6)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> LoadingData:
    folder = tmp_path_factory.mktemp("data")
    write_loading_data(folder)
    return open_loading_data(folder)


def losses(model: TrainedMolmo2, batch: Batch, packs_per_microbatch: int) -> dict[str, float]:
    """Of a batch as training computes them: means over the weights of microbatches, weighted by theirs."""
    maker = MicrobatchMaker(im_patch_id=model.model.im_patch_id, dropout=DropoutConfig())
    total: dict[str, Any] = {}
    for microbatch in maker.split(batch, packs_per_microbatch):
        for name, value in model.loss(model(microbatch), microbatch).items():
            total[name] = total.get(name, 0.0) + value.double() * microbatch["loss_weight"] / batch["loss_weight"]
    return {name: float(value) for name, value in total.items()}


@torch.no_grad()
def test_losses_are_those_of_the_conversations_alone(data: LoadingData) -> None:
    """Every batch of an epoch: pack by pack, packs merged into one pass, every example by itself, and every branch as a
    conversation of its own.  Catches whatever stands between a tree and its loss: a root's or a branch's weight counted
    twice, targets across examples, merged packs that see each other, a mean over packs instead of over weights.

    Tolerance: float32 sums in another order; measured 1.9e-7 relative over the epoch.
    """
    model = TrainedMolmo2(random_model(tiny_config(), seed=1).eval(), z_coefficient=1e-4)
    trees, branches = 0, 0
    for step, batch in zip(range(PACKS // 4), tiny_loader(data), strict=False):
        loaded = [tiny_loader(data).dataset.load(4 * step + slot) for slot in range(4)]
        examples: list[TokenizedExample] = [placed.example for pack in loaded for placed in pack.examples]
        conversations = [branch_alone(example, n) for example in examples for n in range(len(example.tasks))]
        trees, branches = trees + len(examples), branches + len(conversations)
        expected = losses(model, batch, 1)
        ways = {
            "merged": losses(model, batch, 4),
            "examples": losses(model, one_by_one(examples), 1),
            "conversations": losses(model, one_by_one(conversations), 1),
        }
        assert expected["total"] > 1
        for name, found in ways.items():
            assert found == pytest.approx(expected, rel=1e-6), (step, name)
    assert branches > 2 * trees


def one_by_one(examples: list[TokenizedExample]) -> Batch:
    return collate_packs([pack_examples([example], GEOMETRY.max_pool) for example in examples])
