"""Hand-made examples and real shards of them, for tests of everything between shards and batches."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from molmo2core import storage
from molmo2core.annotations import Conversation, QuestionAnswer, Turn
from molmo2core.examples import Example, Media, Split
from molmo2core.manifest.schema import annotations_to_json
from molmo2core.references import ShardsRef
from molmo2core.shards.parts import Part, SizedRow, build_shards, cut_parts
from molmo2core.shards.reader import ExampleReader
from molmo2core.testing.tiny_tokenizer import tiny_tokenizer


def image_examples(dataset: str, count: int, *, split: Split = "train", seed: int = 0) -> list[Example]:
    """Small images of one colour, with one to four questions each."""
    rng = np.random.default_rng([seed, len(dataset), *dataset.encode()])
    examples = []
    for number in range(count):
        width, height = (int(side) for side in rng.integers(20, 140, 2))
        image = Image.new("RGB", (width, height), tuple(int(value) for value in rng.integers(0, 255, 3)))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG")
        examples.append(
            Example(
                uid=f"{dataset}-{split}-{number}",
                dataset=dataset,
                split=split,
                media=Media(kind="image", files=(buffer.getvalue(),), sizes=((width, height),)),
                annotations=tuple(
                    QuestionAnswer(task="image_qa", question="a red circle" + "?" * (n + 1), answer="yes " * (n + 1))
                    for n in range(int(rng.integers(1, 5)))
                ),
            )
        )
    return examples


def text_examples(dataset: str, count: int, *, split: Split = "train") -> list[Example]:
    """Conversations without a medium."""
    return [
        Example(
            uid=f"{dataset}-{split}-{number}",
            dataset=dataset,
            split=split,
            media=Media(kind="none"),
            annotations=(
                Conversation(
                    task="text",
                    turns=(Turn(role="user", text="count " * (1 + number % 7)), Turn(role="assistant", text="one two")),
                ),
            ),
        )
        for number in range(count)
    ]


def example_parts(examples: Sequence[Example], shard_bytes: int) -> Iterator[Part]:
    """Parts for `build_shards` of examples that are held in memory."""

    def size(example: Example) -> int:
        return sum(map(len, example.media.files)) + len(annotations_to_json(example.annotations))

    sized = (SizedRow(uid=e.uid, split=e.split, num_bytes=size(e), row=e) for e in examples)
    for split, held in cut_parts(sized, shard_bytes):
        content = [(e.uid, file_digests(e), annotations_to_json(e.annotations).decode()) for e in held]
        yield Part(split=split, key=storage.content_key(content), examples=tuple(held))


def file_digests(example: Example) -> list[str]:
    """sha256 of each media file."""
    return [hashlib.sha256(file).hexdigest() for file in example.media.files]


def write_tiny_shards(examples: Sequence[Example], workspace: str, *, shard_bytes: int = 20_000) -> ShardsRef:
    """Real, committed shards of one dataset's examples below `workspace` (local or `s3://`)."""
    dataset = examples[0].dataset
    uri = storage.join(workspace, "shards", dataset, storage.content_key(len(examples), shard_bytes))
    folder = build_shards(uri, example_parts(examples, shard_bytes), tokenizer=tiny_tokenizer(), meta={})
    return ShardsRef(
        uri=uri,
        digest=folder.digest,
        dataset=dataset,
        tokenizer_digest="tiny",
        num_samples=folder.meta["num_samples"],
    )


def read_uids_on_rank(refs: Sequence[ShardsRef], cache: Path) -> list[str]:
    """All training uids, read twice through readers that all ranks of a process group build together."""
    readers = [ExampleReader(refs, "train", cache) for _ in range(2)]
    return [reader.example(index).uid for reader in readers for index in range(len(reader))]
