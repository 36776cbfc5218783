"""Every component's own function on the real artifacts that the component before it wrote, on a very small corpus."""

from pathlib import Path
from typing import Any

import pytest
from kfp import dsl
from safetensors.torch import load_file

from components.build_shards.component import build_shards
from components.evaluate.component import evaluate
from components.export_checkpoint.component import export_checkpoint
from components.plan_packs.component import plan_packs
from components.register_model.component import register_model
from components.resolve_recipe.component import resolve_recipe
from components.train.component import train
from components.validate_data.component import validate_data
from molmo2core.references import (
    CheckpointRef,
    EvaluationRef,
    ExportRef,
    ManifestsRef,
    ModelVersionRef,
    PackPlanRef,
    ShardsRef,
    read_reference,
)

TINY = (Path(__file__).parents[2] / "workflows" / "recipes" / "tiny.yaml").read_text()
DATASETS = ["captions", "image_pointing", "image_qa", "text", "tracking", "video_pointing", "video_qa"]
OVERRIDES = [
    "data.shapes={images: 15, image_sets: 4, videos: 12, texts: 5, vocab_size: 768}",
    "train.pretrain.steps=1", "train.pretrain.global_batch_packs=1",
    "train.sft.steps=1", "train.sft.global_batch_packs=1", "train.sft.trainable.decoder=false",
    "train.sft.low_rank={parts: [decoder_attention, decoder_mlp], rank: 2}",
    "evaluate.max_examples_per_dataset=1", "evaluate.max_new_tokens=2",
    "evaluate.gate=[{metric: image_qa/accuracy, minimum: 0.0}]",
]  # fmt: skip


class Chain:
    """Runs components one after the other, as KFP would, each output a file of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        overrides = [*OVERRIDES, f'workspace="{folder / "workspace"}"']
        self.sections = resolve_recipe.python_func(recipe=TINY, overrides=overrides)
        self.artifacts: dict[str, Any] = {}
        self.metrics: dict[str, dict[str, float]] = {}

    def out(self, name: str, kind: type = dsl.Artifact) -> Any:
        self.artifacts[name] = kind(uri=str(self.folder / "artifacts" / name))
        return self.artifacts[name]

    def run(self, component: Any, name: str, **arguments: Any) -> Any:
        metrics = dsl.Metrics(uri=str(self.folder / "metrics" / name))
        result = component.python_func(metrics=metrics, **arguments)
        self.metrics[name] = dict(metrics.metadata)
        return result

    def read(self, name: str, kind: Any) -> Any:
        return read_reference(Path(self.artifacts[name].path), kind)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """The whole chain, once; the tests look at what each component left."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OMP_NUM_THREADS", "1")
        environment.setenv("TOKENIZERS_PARALLELISM", "false")
        environment.delenv("MLFLOW_TRACKING_URI", raising=False)
        chain = Chain(tmp_path_factory.mktemp("chain"))
        s = chain.sections
        chain.datasets = chain.run(  # type: ignore[attr-defined]
            validate_data, "validate", section=s.validate, manifests=chain.out("manifests")
        )
        shards = []
        for dataset in DATASETS:
            shards.append(chain.out(f"shards.{dataset}", dsl.Dataset))
            chain.run(
                build_shards, f"shards.{dataset}", section=s.shard, dataset=dataset,
                manifests=chain.artifacts["manifests"], shards=shards[-1],
            )  # fmt: skip
        for stage, base in (("pretrain", None), ("sft", "checkpoint.pretrain")):
            plan_section, train_section = getattr(s, f"plan_{stage}"), getattr(s, f"train_{stage}")
            chain.run(
                plan_packs, f"plan.{stage}", section=plan_section, shards=shards[::-1], plan=chain.out(f"plan.{stage}")
            )
            chain.run(
                train, f"train.{stage}", section=train_section, plan=chain.artifacts[f"plan.{stage}"],
                base=chain.artifacts[base] if base else None, checkpoint=chain.out(f"checkpoint.{stage}", dsl.Model),
            )  # fmt: skip
        chain.run(
            export_checkpoint, "export", section=s.export, checkpoint=chain.artifacts["checkpoint.sft"],
            exported=chain.out("exported", dsl.Model),
        )  # fmt: skip
        chain.run(
            evaluate, "evaluate", section=s.evaluate, exported=chain.artifacts["exported"], shards=shards,
            evaluation=chain.out("evaluation"), report=chain.out("report.html", dsl.HTML),
        )  # fmt: skip
        chain.run(
            register_model, "register", section=s.register, evaluation=chain.artifacts["evaluation"],
            version=chain.out("version", dsl.Model),
        )  # fmt: skip
        return chain


def test_validate_data_returns_what_the_fan_out_needs(chain: Chain) -> None:
    assert sorted(chain.datasets) == sorted(chain.read("manifests", ManifestsRef).datasets) == DATASETS  # type: ignore[attr-defined]


@pytest.mark.parametrize("dataset", DATASETS)
def test_build_shards(chain: Chain, dataset: str) -> None:
    reference = chain.read(f"shards.{dataset}", ShardsRef)
    assert reference.dataset == dataset and reference.num_samples["train"] > 0
    assert chain.metrics[f"shards.{dataset}"]["samples_train"] == reference.num_samples["train"]


def test_plan_packs_sorts_its_shards(chain: Chain) -> None:
    """KFP promises no order of Collected artifacts, but sample ids count through the parents."""
    reference = chain.read("plan.sft", PackPlanRef)
    assert [parent.dataset for parent in reference.parents] == DATASETS
    assert chain.metrics["plan.sft"]["examples_per_pack"] > 0


def test_train_starts_from_its_base(chain: Chain) -> None:
    first, second = chain.read("checkpoint.pretrain", CheckpointRef), chain.read("checkpoint.sft", CheckpointRef)
    assert [type(parent).__name__ for parent in first.parents] == ["PackPlanRef"]
    assert [parent.digest for parent in second.parents if isinstance(parent, CheckpointRef)] == [first.digest]
    assert chain.metrics["train.sft"]["steps"] == 1 and chain.metrics["train.sft"]["last_loss"] > 0


def test_adapters_are_merged_before_anybody_sees_them(chain: Chain) -> None:
    """Export, evaluation and registration took what a stage with adapters left.  Would catch adapters in the committed
    weights, and those of a training that are lost: only the adapted matrices of the frozen decoder have moved."""
    first, second = (
        load_file(Path(chain.read(f"checkpoint.{stage}", CheckpointRef).uri) / "model.safetensors")
        for stage in ("pretrain", "sft")
    )
    assert first.keys() == second.keys()
    blocks = {name for name in first if name.startswith("decoder.stack.blocks.")}
    moved = {name for name in blocks if not first[name].equal(second[name])}
    adapted = ("attention.query_key_value.weight", "attention.out.weight", "mlp.up_gate.weight", "mlp.down.weight")
    assert moved == {name for name in blocks if name.endswith(adapted)} and len(moved) < len(blocks)


def test_export_checkpoint(chain: Chain) -> None:
    reference = chain.read("exported", ExportRef)
    assert (Path(reference.uri) / "config.json").is_file()
    assert [parent.digest for parent in reference.parents] == [chain.read("checkpoint.sft", CheckpointRef).digest]


def test_evaluate_writes_metrics_and_page(chain: Chain) -> None:
    reference = chain.read("evaluation", EvaluationRef)
    assert reference.passed and reference.metrics.keys() == reference.blind_metrics.keys()
    assert "<html" in Path(chain.artifacts["report.html"].path).read_text().lower()
    assert any(name.startswith("blind/") for name in chain.metrics["evaluate"])


def test_register_model(chain: Chain) -> None:
    reference = chain.read("version", ModelVersionRef)
    assert reference.version == "1" and set(reference.aliases) == {"candidate", "champion"}
    assert chain.metrics["register"] == {"promoted": 1.0}


def test_missing_input_shows_its_message_and_exits_with_2(
    chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing = dsl.Model(uri=str(tmp_path / "nothing"))
    with pytest.raises(SystemExit) as stopped:
        chain.run(
            export_checkpoint, "none", section=chain.sections.export, checkpoint=nothing,
            exported=dsl.Model(uri=str(tmp_path / "out")),
        )  # fmt: skip
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith(f"DataError: {nothing.path}: no such file")
