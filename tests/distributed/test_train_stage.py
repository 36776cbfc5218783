"""The train stage on real shards and plans: bases, reuse, kills, tracking."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from molmo2core import storage
from molmo2core.annotations import Conversation, Point, Pointing, QuestionAnswer, Turn
from molmo2core.checkpoints.config import InitialWeights
from molmo2core.drawing import TRUE_COLOUR
from molmo2core.errors import DataError, PlatformError, RecipeError
from molmo2core.examples import Example, Media
from molmo2core.model.config import named_config
from molmo2core.packing.config import PackingConfig
from molmo2core.preprocessing.config import PreprocessingConfig
from molmo2core.recipe.load import to_json
from molmo2core.recipe.sections import PlanSection, TrainSection
from molmo2core.references import CheckpointRef, PackPlanRef, read_reference, write_reference
from molmo2core.shards.mixture import MixtureGroup
from molmo2core.sources.shapes_tokenizer import save_tokenizer
from molmo2core.special_tokens import tokenizer_digest
from molmo2core.stages import inspect_data, plan, train
from molmo2core.testing.distributed import run_distributed
from molmo2core.testing.fault_runs import Kill, stage_rank_or_die
from molmo2core.testing.tiny_examples import write_tiny_shards
from molmo2core.testing.tiny_tokenizer import tiny_tokenizer
from molmo2core.testing.training import training_config
from molmo2core.tracking.config import TrackingConfig
from molmo2core.tracking.lineage import lineage_text
from molmo2core.training.checkpoint_folders import saved_steps
from molmo2core.training.config import GroupSchedule, OptimizerConfig, ValidationConfig

STEPS = 12
PACKING = PackingConfig(sequence_tokens=384, crop_budget=6, window=16)
PREPROCESSING = PreprocessingConfig(max_crops=2)
VALIDATION_CONFIG = ValidationConfig(
    interval_steps=4, generation_interval_steps=8, generations_per_task=1, max_new_tokens=8
)


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def examples() -> list[Example]:
    question = QuestionAnswer(task="image_qa", question="What colour?", answer="red")
    talk = Conversation(task="text", turns=(Turn(role="user", text="a red"), Turn(role="assistant", text="circle")))
    seen = [
        Example(
            uid=f"seen-{seed}",
            dataset="mixed",
            split="train",
            media=Media(kind="image", files=(picture(seed),), sizes=((80, 60),)),
            annotations=(question, replace(question, answer="blue")),
        )
        for seed in range(4)
    ]
    said = [
        Example(uid=f"said-{n}", dataset="mixed", split="train", media=Media(kind="none"), annotations=(talk,))
        for n in range(4)
    ]
    points = Pointing(task="image_pointing", label="dots", points=(Point(x=0.25, y=0.5), Point(x=0.75, y=0.5)))
    held_out = [
        Example(
            uid=f"held-out-{seed}",
            dataset="mixed",
            split="validation",
            media=Media(kind="image", files=(picture(10 + seed),), sizes=((80, 60),)),
            annotations=(question, points),
        )
        for seed in range(3)
    ]
    return seen + said + held_out


def new_workspace(workspace: Path) -> None:
    """Tokenizer, shards and a plan for STEPS steps of two packs."""
    tokenizer = tiny_tokenizer()
    save_tokenizer(tokenizer.backend, workspace / "tokenizer")
    shards = replace(
        write_tiny_shards(examples(), str(workspace), shard_bytes=1 << 20),
        tokenizer_digest=tokenizer_digest(workspace / "tokenizer"),
    )
    write_reference(shards, workspace / "shards.json")
    plan_packs(workspace, workspace / "plan.json")


def plan_packs(workspace: Path, output: Path, packing: PackingConfig = PACKING) -> None:
    section = PlanSection(
        workspace=str(workspace),
        stage="pretrain",
        seed=1,
        mixture={"all": MixtureGroup(rate=1.0, datasets=("mixed",))},
        packing=packing,
        preprocessing=PREPROCESSING,
        geometry=named_config("tiny").geometry,
        num_packs=2 * STEPS,
    )
    plan.run(section, shards=[workspace / "shards.json"], output=output)


def section_in(workspace: Path, **training: Any) -> TrainSection:
    return TrainSection(
        workspace=str(workspace),
        stage="pretrain",
        run_name="test",
        seed=1,
        recipe_fingerprint="f",
        model=named_config("tiny"),
        tokenizer="tokenizer",
        initial_weights=InitialWeights(),
        packing=PACKING,
        preprocessing=PREPROCESSING,
        training=training_config(
            **{
                "steps": STEPS,
                "global_batch_packs": 2,
                "save_interval_steps": 3,
                "log_interval_steps": 4,
                "validation": VALIDATION_CONFIG,
            }
            | training
        ),
        tracking=TrackingConfig(),
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CheckpointRef]:
    """A workspace with an undisturbed training on top of an untrained checkpoint."""
    workspace = tmp_path_factory.mktemp("workspace")
    new_workspace(workspace)
    untrained = section_in(workspace, steps=0)
    report = train.run(untrained, plan=workspace / "plan.json", base=None, output=workspace / "base.json")
    assert (report.metrics["steps"], "last_loss" in report.metrics) == (0.0, False)
    train.run(
        section_in(workspace),
        plan=workspace / "plan.json",
        base=workspace / "base.json",
        output=workspace / "checkpoint.json",
    )
    return workspace, read_reference(workspace / "checkpoint.json", CheckpointRef)


def test_what_training_leaves(trained: tuple[Path, CheckpointRef]) -> None:
    """Would catch a resume folder left behind, times in the content that names the next stage, and lost lineage."""
    workspace, checkpoint = trained
    assert [type(parent) for parent in checkpoint.parents] == [PackPlanRef, CheckpointRef]
    folder = storage.open_committed(checkpoint.uri)
    pages = ["answers/step-12.html", "answers/step-8.html"]
    weights = ["metrics.jsonl", "model.safetensors", "model_config.json"]
    assert sorted(folder.files) == ["answers.jsonl", *pages, *weights, "training.html", "validation.jsonl"]
    page = (Path(checkpoint.uri) / "training.html").read_text()
    assert "Loss by task" in page and "image_qa" in page and "Learning rate" in page
    assert "Seconds" not in page and "Memory" not in page
    lines = [json.loads(line) for line in (Path(checkpoint.uri) / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert not any(name in line for line in lines for name in ("seconds", "time_ms", "waits", "speed", "memory"))
    assert checkpoint.facts["packs"] == 2 * STEPS
    assert checkpoint.facts["examples_per_pack"] > 1
    assert checkpoint.facts["tokens"] == sum(line["tokens"] for line in lines) > 0
    assert checkpoint.digest != read_reference(workspace / "base.json", CheckpointRef).digest
    assert list((workspace / "checkpoints").rglob("*.resume")) == []


def test_what_validation_leaves(trained: tuple[Path, CheckpointRef]) -> None:
    """Beside the metrics, and in MLflow.  Would catch held-out examples that are not found, or not drawn."""
    from molmo2core.tracking.mlflow_run import connect, tracking_uri

    workspace, checkpoint = trained
    folder = Path(checkpoint.uri)
    losses, answers = (
        [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for name in ("validation.jsonl", "answers.jsonl")
    )
    assert [line["step"] for line in losses] == [4, 8, 12]
    assert not any(name in line for line in losses for name in ("seconds", "time_ms"))
    assert losses[-1]["loss_by_task"].keys() == {"image_qa", "image_pointing"} and losses[-1]["examples"] == 3
    assert checkpoint.facts["validation_loss"] == losses[-1]["loss"] != losses[0]["loss"]
    assert [(line["step"], line["task"]) for line in answers] == [
        (step, task) for step in (8, 12) for task in ("image_pointing", "image_qa")
    ]
    assert 'coords="1 1 250 500 2 750 500"' in answers[0]["expected"]
    page = (folder / "answers" / "step-12.html").read_text()
    (first, _) = re.findall(r"base64,([^\"]+)", page)
    drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(first))).convert("RGB")).astype(int)
    green = (abs(drawn - TRUE_COLOUR).sum(axis=2) < 60).nonzero()[1] / drawn.shape[1]
    assert {round(float(share), 1) for share in green} >= {0.2, 0.3, 0.7, 0.8}  # rings around 0.25 and 0.75
    client = connect(tracking_uri(TrackingConfig(), str(workspace)))
    experiment = client.get_experiment_by_name("molmo2")
    assert experiment is not None
    key = Path(checkpoint.uri).name
    (run,) = client.search_runs([experiment.experiment_id], f"tags.`molmo2core.key` = 'train-pretrain-{key}'")
    assert [point.step for point in client.get_metric_history(run.info.run_id, "validation/loss")] == [4, 8, 12]
    for name in ("mixed/loss", "loss_by_task/image_pointing", "loss_by_task/image_qa"):
        assert 0 < run.data.metrics[f"validation/{name}"] < 20, name
    sent = [item.path for item in client.list_artifacts(run.info.run_id, "answers")]
    assert sent == ["answers/step-12.html", "answers/step-8.html"]


def test_the_same_training_is_reused(trained: tuple[Path, CheckpointRef]) -> None:
    """Also when only how often something is saved differs; another seed or another base is another training."""
    workspace, checkpoint = trained
    section = section_in(workspace, save_interval_steps=5, log_interval_steps=1, validation=ValidationConfig())
    output = workspace / "again.json"
    report = train.run(section, plan=workspace / "plan.json", base=workspace / "base.json", output=output)
    assert report.reused and read_reference(output, CheckpointRef).uri == checkpoint.uri
    plan_ref = read_reference(workspace / "plan.json", PackPlanRef)
    keys = {
        train.checkpoint_key(section, plan_ref, checkpoint),
        train.checkpoint_key(section, plan_ref, None),
        train.checkpoint_key(replace(section, seed=2), plan_ref, None),
        train.checkpoint_key(replace(section, initial_weights=InitialWeights(decoder="x")), plan_ref, None),
        train.checkpoint_key(section_in(workspace, global_batch_packs=1), plan_ref, None),
    }
    assert len(keys) == 5


def test_a_stage_of_no_steps_hands_its_base_on(
    trained: tuple[Path, CheckpointRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch ranks that are started and gigabytes that are copied for nothing, and a model whose card and gate
    name a stage that trained nothing."""
    workspace, checkpoint = trained
    monkeypatch.setattr(train, "run_torchrun", lambda *_, **__: pytest.fail("ranks were started"))
    before, output = sorted((workspace / "checkpoints").rglob("*")), workspace / "handed-on.json"
    section = replace(section_in(workspace, steps=0), run_name="other", seed=7)
    report = train.run(section, plan=workspace / "plan.json", base=workspace / "checkpoint.json", output=output)
    found = read_reference(output, CheckpointRef)
    assert replace(found, report={}) == replace(checkpoint, report={}) and found.step == STEPS
    assert (found.report["stage"], report.reused, report.metrics) == ("train.pretrain", True, {"steps": 0.0})
    assert sorted((workspace / "checkpoints").rglob("*")) == before
    gone = replace(checkpoint, uri=f"{checkpoint.uri}-gone")
    write_reference(gone, workspace / "gone.json")
    with pytest.raises(DataError, match="-gone"):
        train.run(section, plan=workspace / "plan.json", base=workspace / "gone.json", output=workspace / "none.json")
    assert not (workspace / "none.json").exists()


DOCS = Path(__file__).parents[2] / "docs"
RECIPES = Path(__file__).parents[2] / "workflows" / "recipes"
ELSEWHERE = {"speed/mfu", "speed/hfu", "memory/allocated", "memory/reserved"} | {
    "save/<number>",
    "upload/<number>",
    "validation/<number>",
    "validation/<number>/<of>",
}
"""Metrics that a run on a CPU, in a folder, without held-out examples or a checkpoint does not have."""


def named_in(page: Path, section: str) -> set[str]:
    """Names in the first column of the first table of a section."""
    (text,) = re.findall(rf"^## {section}$(.*?)(?=^## |\Z)", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall("`(.*?)`", row)}


def mlflow_artifact(client: Any, run: Any, name: str) -> str:
    return Path(client.download_artifacts(run.info.run_id, name)).read_text()


def test_the_curve_is_in_mlflow(trained: tuple[Path, CheckpointRef]) -> None:
    from molmo2core.tracking.mlflow_run import connect, tracking_uri

    workspace, checkpoint = trained
    client = connect(tracking_uri(TrackingConfig(), str(workspace)))
    experiment = client.get_experiment_by_name("molmo2")
    assert experiment is not None
    key = Path(checkpoint.uri).name
    (run,) = client.search_runs([experiment.experiment_id], f"tags.`molmo2core.key` = 'train-pretrain-{key}'")
    assert run.info.status == "FINISHED"
    assert [point.step for point in client.get_metric_history(run.info.run_id, "loss")] == [4, 8, 12]
    assert "gradient_norm/decoder" in run.data.metrics
    patterns = named_in(DOCS / "training.md", "Watching a run")
    found = {
        name: [pattern for pattern in patterns if re.fullmatch(re.sub("<.*?>", "[^/]+", pattern), name)]
        for name in run.data.metrics
    }
    assert {name: fits for name, fits in found.items() if len(fits) != 1} == {}, "not in the page's table, or twice"
    assert patterns - {pattern for fits in found.values() for pattern in fits} <= ELSEWHERE
    assert set(run.data.metrics) >= {"loss_by_task/image_qa", "loss_by_task/text", "memory/host", "flops/model"}
    page = mlflow_artifact(client, run, "training.html")
    assert "Seconds" in page and "Memory" in page and "Loss by task" in page
    assert 0.3 < run.data.metrics["fill/tokens"] <= 1
    assert run.data.metrics["drawn/mixed"] == 1.0
    planned = read_reference(workspace / "plan.json", PackPlanRef).facts
    for name in ("packs", "examples_per_pack", "branches_per_pack", "token_fill", "crop_fill", "bound_reached"):
        assert run.data.metrics[f"plan/{name}"] == pytest.approx(planned[name]), name
    assert run.data.metrics["plan/tokens_per_pack_p50"] == planned["per_pack"]["tokens"]["p50"]
    assert [entry.dataset.name for entry in run.inputs.dataset_inputs] == ["mixed"]


def test_a_refused_step_is_named_kept_and_can_be_looked_at(
    trained: tuple[Path, CheckpointRef], capsys: pytest.CaptureFixture[str]
) -> None:
    """The error's own command is run.  Would catch a command for another plan or stage, packs that are numbered from
    the rank's or the step's start, and a run in MLflow that ends without a trace of what happened."""
    from molmo2core.tracking.mlflow_run import connect, tracking_uri

    workspace, _ = trained
    far_too_high = GroupSchedule(learning_rate=1e30, warmup_steps=0)
    optimizer = OptimizerConfig(vision_encoder=far_too_high, connector=far_too_high, decoder=far_too_high)
    section = section_in(workspace, optimizer=optimizer, validation=ValidationConfig())
    with pytest.raises(RecipeError, match="training step 2") as error:
        train.run(section, plan=workspace / "plan.json", base=None, output=workspace / "none.json")
    command = re.findall("`python -m molmo2core.loading (.*?)`", error.value.mend)[0]
    assert command.endswith("--stage pretrain --pack 2 --pack 3"), "two packs are a step"
    (file,) = (workspace / "checkpoints" / "pretrain").glob("*.resume/refused-step-2.json")
    names = [name for pack in json.loads(file.read_text())["suspects"][0]["packs"] for name in pack["examples"]]
    limits = [f"packing.sequence_tokens={PACKING.sequence_tokens}", f"packing.crop_budget={PACKING.crop_budget}"]
    limits += ["packing.window=16", "preprocessing.max_crops=2"]
    limits += ["preprocessing.max_frames=6", "preprocessing.max_images=2"]  # one of each fits into a pack
    arguments = command.replace("RECIPE", str(RECIPES / "tiny.yaml")).split()
    arguments += [part for limit in limits for part in ("--set", f"train.pretrain.{limit}")]
    arguments += ["--tokenizer", str(workspace / "tokenizer"), "--html", str(workspace / "inspect.html")]
    capsys.readouterr()
    assert inspect_data.main(arguments) == 0
    shown = capsys.readouterr().out
    assert len(names) > 2 and all(name in shown for name in names)
    client = connect(tracking_uri(TrackingConfig(), str(workspace)))
    experiment = client.get_experiment_by_name("molmo2")
    assert experiment is not None
    key = file.parent.name.removesuffix(".resume")
    (run,) = client.search_runs([experiment.experiment_id], f"tags.`molmo2core.key` = 'train-pretrain-{key}'")
    assert run.info.status == "FAILED"
    assert [item.path for item in client.list_artifacts(run.info.run_id)] == [file.name, "training.html"]


COPY = "copy"
"""Key of a copy of the killed training below, which other trainings go on from."""


@pytest.fixture(scope="module")
def killed(trained: tuple[Path, CheckpointRef], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """kill -9 of the launcher alone after a checkpoint and past it, with a tracking store that does not work.

    Returns:
        The workspace, and the command to run again.
    """
    workspace = tmp_path_factory.mktemp("killed")
    new_workspace(workspace)
    (workspace / "base.json").write_text((trained[0] / "base.json").read_text())
    blocker = workspace / "a-file"
    blocker.touch()
    section = replace(section_in(workspace), tracking=TrackingConfig(uri=f"sqlite:///{blocker}/mlflow.db"))
    (workspace / "section.json").write_text(to_json(section))
    command = [sys.executable, "-m", "molmo2core.stages.train", "--section", str(workspace / "section.json")]
    command += ["--plan", str(workspace / "plan.json"), "--base", str(workspace / "base.json")]
    command += ["--output", str(workspace / "checkpoint.json")]
    stages = workspace / "checkpoints" / "pretrain"
    with (workspace / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        # 4 or more lines: past the checkpoint of step 3
        deadline = time.monotonic() + 120
        while sum(len(path.read_text().splitlines()) for path in stages.glob("*.resume/metrics.jsonl")) < 4:
            assert process.poll() is None and time.monotonic() < deadline, (workspace / "log").read_text()
            time.sleep(0.01)
        ranks = children_of(process.pid)
        process.kill()
        process.wait()
    assert ranks
    gone = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in ranks) and time.monotonic() < gone:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    assert not (workspace / "checkpoint.json").exists()
    (folder,) = stages.iterdir()
    assert folder.suffix == ".resume"
    shutil.copytree(folder, stages / f"{COPY}.resume")
    return workspace, command


def test_a_killed_training_goes_on_to_identical_weights(
    trained: tuple[Path, CheckpointRef], killed: tuple[Path, list[str]]
) -> None:
    """The same command again.  Would catch an orphan rank, a checkpoint folder that exists before it is whole, batches
    repeated or left out on resume, and tracking that stops training.
    """
    workspace, command = killed
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "warning: training is not tracked" in again.stdout
    assert f"step {STEPS}/{STEPS}" in again.stdout
    found = read_reference(workspace / "checkpoint.json", CheckpointRef)
    assert found.digest == trained[1].digest


def continued(workspace: Path, section: TrainSection, plan_file: Path) -> CheckpointRef:
    """The checkpoint of a training that goes on from the killed one."""
    output = workspace / "continued.json"
    train.run(section, plan=plan_file, base=workspace / "base.json", output=output)
    return read_reference(output, CheckpointRef)


@pytest.mark.parametrize(
    "sharing",
    [{}, {"context_parallel": 2, "loader_workers": 1, "verify_shared_packs": True}],
    ids=["packs", "sequences"],
)
def test_a_killed_training_goes_on_on_two_ranks(
    trained: tuple[Path, CheckpointRef], killed: tuple[Path, list[str]], sharing: dict[str, Any]
) -> None:
    """Another number of processes is another key: without `resume_from` the work would be lost.  Would catch steps done
    twice, a checkpoint form that the other number of ranks cannot read, a record that begins in the middle, and ranks
    of a real launcher that see different packs where they should share each, or the other way round.

    Tolerances: sums over ranks round differently; measured 3.5e-7 on weights that move by 6.5e-3, losses 2e-7.
    """
    workspace, _ = killed
    section = section_in(workspace, num_processes=2, resume_from=COPY, **sharing)
    found = continued(workspace, section, workspace / "plan.json")
    lines = [json.loads(line) for line in (Path(found.uri) / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    alone = [json.loads(line) for line in (Path(trained[1].uri) / "metrics.jsonl").read_text().splitlines()]
    for name in ("packs", "examples", "tokens", "crops", "drawn", "fill"):
        assert [line[name] for line in lines] == [line[name] for line in alone], name
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in alone], rel=2e-6)
    weights, expected = (load_file(Path(ref.uri) / "model.safetensors") for ref in (found, trained[1]))
    assert max(float(abs(weights[name] - expected[name]).max()) for name in expected) < 3e-6
    assert "data_changed_at_step" not in found.facts


def test_a_resume_on_other_data_is_refused_or_recorded(killed: tuple[Path, list[str]]) -> None:
    """Would catch a training that goes on with other data in silence, a refusal that does not say what changed, and a
    forced one of which nothing remains."""
    from molmo2core.tracking.mlflow_run import connect, tracking_uri

    workspace, _ = killed
    packing = replace(PACKING, sequence_tokens=400)
    plan_packs(workspace, workspace / "other.json", packing=packing)
    section = replace(section_in(workspace, resume_from=COPY), packing=packing)
    with pytest.raises(DataError) as error:
        continued(workspace, section, workspace / "other.json")
    assert "packing.sequence_tokens 384 -> 400, plan" in str(error.value)
    assert "accept_changed_data" in error.value.mend
    section = replace(section, training=replace(section.training, accept_changed_data=True))
    found = continued(workspace, section, workspace / "other.json")
    step = found.facts["data_changed_at_step"]
    assert step >= 3 and step % 3 == 0
    (line,) = [json.loads(line) for line in (Path(found.uri) / "deviations.jsonl").read_text().splitlines()]
    assert (line["step"], line["kind"]) == (step, "changed data")
    assert "packing.sequence_tokens 384 -> 400" in line["changes"]
    assert f"data changed at step {step:.0f}" in lineage_text(found)
    client = connect(tracking_uri(TrackingConfig(), str(workspace)))
    experiment = client.get_experiment_by_name("molmo2")
    key = Path(found.uri).name
    (run,) = client.search_runs([experiment.experiment_id], f"tags.`molmo2core.key` = 'train-pretrain-{key}'")
    assert "sequence_tokens 384 -> 400" in run.data.tags["data_changed"]
    artifacts = [item.path for item in client.list_artifacts(run.info.run_id)]
    assert artifacts == ["answers", "deviations.jsonl", "training.html"]


def test_another_machine_goes_on_from_the_object_store(
    trained: tuple[Path, CheckpointRef],
    s3_bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """kill -9 on a machine that then is gone with its disk.  Would catch checkpoints that exist in one machine's cache
    only, metrics and pages of answers that begin in the middle, other weights, and copies that stay for ever.

    Ranks are forked, not started by torchrun (tests/unit/test_launch.py): importing the trainer takes 8 s."""
    workspace, checkpoint = trained
    section = section_in(workspace)
    section = replace(section, workspace=s3_bucket, tokenizer=str(workspace / "tokenizer"))
    section = replace(section, tracking=TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db"))
    kills = [Kill(phase="step", number=11), None]

    def run_forked(module: str, arguments: list[str], *, num_processes: int, **_: object) -> None:
        run_distributed(stage_rank_or_die, num_processes, arguments, kills.pop(0))

    monkeypatch.setattr(train, "run_torchrun", run_forked)

    def run_on(machine: str) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / machine))
        train.run(section, plan=workspace / "plan.json", base=workspace / "base.json", output=tmp_path / "output.json")

    with pytest.raises(PlatformError, match="the process died"):
        run_on("first")
    (folder,) = storage.list_folders(f"{s3_bucket}/checkpoints/pretrain")
    assert saved_steps(f"{s3_bucket}/checkpoints/pretrain/{folder}")[0] == 9
    shutil.rmtree(tmp_path / "first")
    capsys.readouterr()
    run_on("second")
    assert f"{folder}/" not in str(storage.list_files(f"{s3_bucket}/checkpoints/pretrain"))
    found = read_reference(tmp_path / "output.json", CheckpointRef)
    assert found.digest == checkpoint.digest
    assert (found.facts["failed_saves"], found.facts["failed_uploads"]) == (0.0, 0.0)
    assert list((tmp_path / "second" / "molmo2core" / "training").iterdir()) == []


def test_resuming_from_nothing_names_what_there_is(killed: tuple[Path, list[str]]) -> None:
    """Would catch a wrong key that silently starts at step 0."""
    workspace, _ = killed
    with pytest.raises(DataError, match=r"train.pretrain.resume_from: 'nothing'.*expected one of .*copy"):
        continued(workspace, section_in(workspace, resume_from="nothing"), workspace / "plan.json")


def test_starting_anew_beside_an_unfinished_training_is_said(
    killed: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """A changed recipe starts at step 0.  Would catch that somebody finds out after days."""
    workspace, _ = killed
    train.run(section_in(workspace, steps=0), plan=workspace / "plan.json", base=None, output=workspace / "new.json")
    printed = capsys.readouterr().out
    assert "starts at step 0; unfinished trainings of other recipes: " in printed and COPY in printed


def children_of(pid: int) -> list[int]:
    with contextlib.suppress(FileNotFoundError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"steps": 1000}, DataError, r"24 packs; expected 2000"),
        ({"num_processes": 3}, RecipeError, r"2 packs over 3 data-parallel groups"),
        ({"num_processes": 4, "context_parallel": 4}, RecipeError, r"4 ranks for 6 query heads"),
        ({"num_processes": 2, "context_parallel": 4}, RecipeError, r"4 ranks per sequence with 2 ranks"),
        ({"num_nodes": 2}, RecipeError, r"several nodes"),
    ],
)
def test_what_cannot_work_is_refused_before_any_rank_starts(
    trained: tuple[Path, CheckpointRef], change: dict[str, Any], error: type[Exception], message: str
) -> None:
    workspace, _ = trained
    with pytest.raises(error, match=message):
        train.run(
            section_in(workspace, **change), plan=workspace / "plan.json", base=None, output=workspace / "no.json"
        )
    assert not (workspace / "no.json").exists()


@pytest.mark.parametrize(("tokenizer", "message"), [("nowhere", "no such folder"), ("other", "digest")])
def test_a_ranks_error_is_the_stages_error(trained: tuple[Path, CheckpointRef], tokenizer: str, message: str) -> None:
    """An error raised in a rank arrives as itself, and its first line is no stack trace.

    Also catches training with another tokenizer than the one that lengths were measured with.
    """
    workspace, _ = trained
    save_tokenizer(tiny_tokenizer(800).backend, workspace / "other")
    section = replace(section_in(workspace), tokenizer=tokenizer)
    (workspace / "bad.json").write_text(to_json(section))
    command = [sys.executable, "-m", "molmo2core.stages.train", "--section", str(workspace / "bad.json")]
    command += ["--plan", str(workspace / "plan.json"), "--output", str(workspace / "no.json")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"DataError: {workspace / tokenizer}: ") and message in done.stderr
