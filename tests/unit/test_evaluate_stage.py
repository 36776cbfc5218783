"""The evaluate stage on a real small corpus, its shards and an exported model, and the choice of questions."""

from __future__ import annotations

import dataclasses
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from molmo2core import storage
from molmo2core.annotations import Annotation, Caption, QuestionAnswer
from molmo2core.checkpoints.config import ExportConfig
from molmo2core.checkpoints.export_hf import export_model
from molmo2core.checkpoints.model_card import Lineage
from molmo2core.errors import DataError, RecipeError
from molmo2core.evaluation.config import EvaluationConfig, GateRule
from molmo2core.evaluation.inference import InferenceModel, blanked, load_inference_model
from molmo2core.evaluation.run import Answer, ask_questions, choose_questions
from molmo2core.examples import Example, Media
from molmo2core.preprocessing.chat import reply_of
from molmo2core.preprocessing.config import PreprocessingConfig
from molmo2core.recipe.sections import EvaluateSection, ShardSection, ValidateSection
from molmo2core.references import CheckpointRef, EvaluationRef, ExportRef, ShardsRef, read_reference, write_reference
from molmo2core.shards.config import ShardsConfig
from molmo2core.shards.reader import ExampleReader
from molmo2core.stages import evaluate, shard, validate
from molmo2core.testing.tiny_corpus import tiny_corpus
from molmo2core.testing.tiny_model import tiny_model

DATASETS = ("image_qa", "image_pointing", "tracking", "text")
PREPROCESSING = PreprocessingConfig(max_crops=1, max_images=5, max_frames=6, max_subtitle_tokens=64)
CONFIG = EvaluationConfig(
    max_examples_per_dataset=4,
    batch_size=3,
    max_new_tokens=6,
    preprocessing=PREPROCESSING,
    gate=(GateRule(metric="image_qa/accuracy", minimum=0.0),),
    drawn_examples=6,
)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of four datasets and a committed export, with their references as `<name>.json`."""
    folder = tmp_path_factory.mktemp("workspace")
    data = tiny_corpus(folder / "corpus")
    data = dataclasses.replace(data, manifests={name: data.manifests[name] for name in DATASETS})
    limits = dataclasses.replace(PREPROCESSING, max_frames=16)
    validate.run(
        ValidateSection(workspace=str(folder), data=data, preprocessing_limits=limits, evaluation_limits=limits),
        output=folder / "manifests.json",
    )
    section = ShardSection(workspace=str(folder), shards=ShardsConfig(), tokenizer="corpus/tokenizer")
    for name in DATASETS:
        shard.run(section, manifests=folder / "manifests.json", dataset=name, output=folder / f"{name}.json")

    def export(path: Path) -> dict[str, Any]:
        tokenizer = folder / "corpus" / "tokenizer"
        model = tiny_model(1)
        export_model(path, model, tokenizer, export=ExportConfig(), preprocessing=PREPROCESSING, lineage=Lineage())
        return {}

    exported = storage.commit_folder(str(folder / "exports" / "one"), export)
    for name, step in (("export", 5), ("untrained", 0)):
        checkpoint = CheckpointRef(uri="/c", digest="c" * 64, stage="sft", step=step, recipe_fingerprint="f")
        reference = ExportRef(uri=exported.uri, digest=exported.digest, step=step, parents=(checkpoint,))
        write_reference(reference, folder / f"{name}.json")
    return folder


def run(workspace: Path, config: EvaluationConfig, exported: str = "export", html: Path | None = None) -> EvaluationRef:
    output = workspace / "evaluation.json"
    evaluate.run(
        EvaluateSection(workspace=str(workspace), evaluation=config),
        exported=workspace / f"{exported}.json",
        shards=[workspace / f"{name}.json" for name in DATASETS],
        output=output,
        html=html,
    )
    return read_reference(output, EvaluationRef)


@pytest.fixture(scope="module")
def reader(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> ExampleReader:
    refs = [read_reference(workspace / f"{name}.json", ShardsRef) for name in DATASETS]
    return ExampleReader(refs, "test", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def model(workspace: Path) -> InferenceModel:
    return load_inference_model(workspace / "exports" / "one", PREPROCESSING)


def test_the_stage_writes_predictions_report_and_page_and_is_reused(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    html = tmp_path / "copy.html"
    first = run(workspace, CONFIG, html=html)
    assert first.passed
    assert first.reasons == ()
    folder = Path(first.uri)
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    asked = Counter(line["dataset"] for line in lines)
    assert set(asked) == set(DATASETS)
    assert asked["image_qa"] == asked["image_pointing"] == max(asked.values()) == 4
    assert {"image_qa", "multi_image_qa", "image_pointing", "tracking", "text"} <= {line["task"] for line in lines}
    assert all(line["prompt"] and line["truth"] for line in lines)
    assert not [line for line in lines if "assistant" in line["prompt"] or line["prompt"].startswith("user")]
    report = json.loads((folder / "report.json").read_text())
    assert report["metrics"] == first.metrics
    assert report["trained_steps"] == {"sft": 5}
    assert report["evaluation"]["preprocessing"]["max_frames"] == 6
    page = html.read_text()
    assert page == (folder / "report.html").read_text()
    assert page.count('<section class="example">') == 6
    assert page.count("<img ") >= 6
    assert set(first.metrics) == set(first.blind_metrics)
    assert {"image_qa/accuracy", "image_pointing/f1", "tracking/hota", "text/word_f1"} <= set(first.metrics)
    assert [type(parent) for parent in first.parents] == [ExportRef] + [ShardsRef] * len(DATASETS)
    second = run(workspace, CONFIG)
    assert second.report["reused"]
    assert not first.report["reused"]
    assert dataclasses.replace(second, report={}) == dataclasses.replace(first, report={})
    assert f"evaluate: reused {first.uri}" in capsys.readouterr().out


def test_zero_steps_and_hard_rules_are_refused_with_reasons(workspace: Path) -> None:
    untrained = run(workspace, CONFIG, exported="untrained")
    assert (untrained.passed, untrained.reasons) == (False, ("trained 0 steps: nothing was learnt",))
    hard = dataclasses.replace(CONFIG, gate=(GateRule(metric="image_qa/accuracy", minimum=2.0),))
    refused = run(workspace, hard)
    assert not refused.passed
    assert "below the minimum" in refused.reasons[0]
    assert refused.reasons[0] in (Path(refused.uri) / "report.html").read_text()


def test_an_empty_split_is_a_clear_error_and_leaves_nothing(workspace: Path) -> None:
    before = sorted((workspace / "evaluations").iterdir())
    ref = read_reference(workspace / "text.json", ShardsRef)
    write_reference(dataclasses.replace(ref, num_samples={"train": 4}), workspace / "empty.json")
    with pytest.raises(DataError, match="split test"):
        evaluate.run(
            EvaluateSection(workspace=str(workspace), evaluation=CONFIG),
            exported=workspace / "export.json",
            shards=[workspace / "empty.json"],
            output=workspace / "none.json",
            html=None,
        )
    assert sorted((workspace / "evaluations").iterdir()) == before
    assert not (workspace / "none.json").exists()


def answers_by_question(answers: list[Answer]) -> dict[tuple[int, int], tuple[str, str]]:
    return {
        (answer.question.example_index, answer.question.annotation_index): (answer.answer, answer.blind_answer)
        for answer in answers
    }


def test_answers_do_not_depend_on_batching_or_order(model: InferenceModel, reader: ExampleReader) -> None:
    """Would catch answers given back in the order of lengths, and padding that leaks into attention."""
    questions = [q for indices in reader.ranges.values() for q in choose_questions(reader, indices, 5)]
    alone = ask_questions(model, reader, questions, dataclasses.replace(CONFIG, batch_size=1), say=lambda line: None)
    together = ask_questions(model, reader, questions[::-1], dataclasses.replace(CONFIG, batch_size=7))
    assert answers_by_question(alone) == answers_by_question(together)
    assert len(alone) == len(questions)
    assert len({answer.answer for answer in alone}) > 3  # else order could not be told


def test_the_blind_baseline_sees_grey_and_only_that(model: InferenceModel, reader: ExampleReader) -> None:
    example = reader.example(reader.ranges["image_qa"][0])
    prompt = model.prompt(example, 0)
    blind = blanked(prompt)
    assert prompt.crops.std() > 0
    assert set(np.unique(blind.crops)) == {127}
    assert blind.crops.shape == prompt.crops.shape
    assert np.array_equal(blind.input_ids, prompt.input_ids)


def test_the_blind_model_cannot_tell_images_apart(model: InferenceModel, reader: ExampleReader) -> None:
    """Equal prompts on different images give one blind answer; would catch pixels that leak past the blanking."""
    example = reader.example(reader.ranges["image_pointing"][0])
    with Image.open(io.BytesIO(example.media.files[0])) as image:
        inverted = io.BytesIO()
        ImageOps.invert(image.convert("RGB")).save(inverted, "PNG")
    other = dataclasses.replace(example, media=dataclasses.replace(example.media, files=(inverted.getvalue(),)))
    prompts = [model.prompt(one, 0) for one in (example, other)]
    seen = model.answer(prompts, batch_size=2, max_new_tokens=8)
    blind = model.answer([blanked(prompt) for prompt in prompts], batch_size=2, max_new_tokens=8)
    assert seen[0] != seen[1]
    assert blind[0] == blind[1]


def test_a_perfect_answerer_scores_1(
    model: InferenceModel, reader: ExampleReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The truth as the model would write it gets full marks in every task: parser, units and formats agree."""
    questions = [q for indices in reader.ranges.values() for q in choose_questions(reader, indices, 30)]
    truth = iter(
        text
        for task in sorted({q.task for q in questions})
        for group in [[q for q in questions if q.task == task]]
        for start in range(0, len(group), CONFIG.batch_size * 4)
        for batch in [group[start : start + CONFIG.batch_size * 4]]
        for blind in (False, True)
        for text in [
            ["" if blind else reply_of(reader.example(q.example_index).annotations[q.annotation_index]) for q in batch]
        ]
    )
    monkeypatch.setattr(InferenceModel, "answer", lambda self, prompts, **options: next(truth))
    answers = ask_questions(model, reader, questions, CONFIG)
    worst = {(a.question.task, name): v for a in answers for name, v in a.score.measures.items() if v < 1}
    assert worst == {}
    assert not [a for a in answers if a.score.parse_failed]
    assert {a.question.task for a in answers} >= {"image_counting", "multi_image_pointing", "tracking", "image_qa"}


def test_a_prompt_longer_than_the_model_is_a_clear_error(model: InferenceModel, reader: ExampleReader) -> None:
    short = dataclasses.replace(model.model.config.decoder, max_position_embeddings=16)
    config = dataclasses.replace(model.model.config, decoder=short)
    small = tiny_model(0)
    small.config = config
    with pytest.raises(RecipeError, match="fewer than the model's 16"):
        dataclasses.replace(model, model=small).prompt(reader.example(0), 0)


class Listed:
    """Examples in memory."""

    def __init__(self, *annotations: tuple[Annotation, ...]) -> None:
        self.examples = [
            Example(uid=str(n), dataset="d", split="test", media=Media(kind="image"), annotations=found)
            for n, found in enumerate(annotations)
        ]
        self.read: list[int] = []

    def example(self, index: int) -> Example:
        self.read.append(index)
        return self.examples[index]


def qa(category: str) -> QuestionAnswer:
    return QuestionAnswer(task="image_qa", question="?", answer="a", category=category)


CAPTION = Caption(task="image_caption", text="x")


def test_tasks_and_categories_take_turns() -> None:
    """Would catch taking the first questions: a rare task at the end of the split would never be measured."""
    examples = Listed(*[(qa("colour"),)] * 20, *[(qa("form"),)] * 3, (CAPTION,))
    chosen = choose_questions(examples, range(24), 6)
    assert Counter((q.task, q.category) for q in chosen) == {
        ("image_caption", ""): 1,
        ("image_qa", "colour"): 3,
        ("image_qa", "form"): 2,
    }
    assert chosen == choose_questions(examples, range(24), 6)
    assert len(choose_questions(examples, range(24), 100)) == 24


def test_a_large_dataset_is_not_read_whole() -> None:
    examples = Listed(*[(CAPTION,)] * 1000)
    assert len(choose_questions(examples, range(1000), 2)) == 2
    assert len(examples.read) == 32
