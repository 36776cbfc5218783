"""Export: files, acceptance by transformers, and the stage."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch

from molmo2core import storage
from molmo2core.checkpoints import __main__ as commands
from molmo2core.checkpoints.config import ExportConfig
from molmo2core.checkpoints.export_hf import export_model
from molmo2core.checkpoints.model_card import Lineage
from molmo2core.checkpoints.reference import save_weights
from molmo2core.checkpoints.verify import verify_export
from molmo2core.checkpoints.weight_files import WeightFiles, write_weights
from molmo2core.errors import CheckpointError, DataError
from molmo2core.model.molmo2 import Molmo2
from molmo2core.preprocessing.config import PreprocessingConfig
from molmo2core.recipe.sections import ExportSection
from molmo2core.references import CheckpointRef, ExportRef, PackPlanRef, ShardsRef, read_reference, write_reference
from molmo2core.sources.shapes_tokenizer import save_tokenizer
from molmo2core.stages import export as export_stage
from molmo2core.testing.tiny_model import Variant, tiny_model
from molmo2core.testing.tiny_tokenizer import tiny_tokenizer

TOLERANCE = ExportConfig().logit_tolerance


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(tiny_tokenizer().backend, folder)
    return folder


def saved(folder: Path, model: Molmo2) -> Path:
    folder.mkdir()
    save_weights(folder, model, model.config)
    return folder


def exported(folder: Path, model: Molmo2, tokenizer: Path, export: ExportConfig | None = None) -> Path:
    folder.mkdir()
    lineage = Lineage(recipe_fingerprint="f00d", stage="sft", step=7, datasets=(("captions", "abcd"),))
    limits = PreprocessingConfig(max_crops=6)
    export_model(folder, model, tokenizer, export=export or ExportConfig(), preprocessing=limits, lineage=lineage)
    return folder


def test_folder_has_the_released_files(tokenizer: Path, tmp_path: Path) -> None:
    """model.md 3.6, field by field where a default would be another value."""
    folder = exported(tmp_path / "out", tiny_model(1), tokenizer)
    files = {path.name for path in folder.iterdir()}
    assert files == {
        "README.md", "added_tokens.json", "chat_template.jinja", "config.json", "generation_config.json",
        "model.safetensors", "preprocessor_config.json", "processor_config.json", "special_tokens_map.json",
        "tokenizer.json", "tokenizer_config.json", "video_preprocessor_config.json",
    }  # fmt: skip

    def read(name: str) -> dict[str, object]:
        return json.loads((folder / f"{name}.json").read_text())  # type: ignore[no-any-return]

    flags = {
        "image_use_col_tokens": True,
        "use_single_crop_col_tokens": False,
        "use_single_crop_start_token": True,
        "video_use_col_tokens": False,
        "use_frame_special_tokens": False,
    }
    assert read("processor_config").items() >= flags.items()
    special = tiny_tokenizer().special
    ids = {"bos_token_id": special.bos, "eos_token_id": special.eos, "pad_token_id": special.pad}
    assert read("generation_config") == ids
    assert read("preprocessor_config")["max_crops"] == 6
    assert read("preprocessor_config")["size"] == {"height": 54, "width": 54}
    assert read("video_preprocessor_config")["num_frames"] == 128
    card = (folder / "README.md").read_text()
    assert all(fact in card for fact in ("f00d", "sft, 7", "captions", "abcd"))


@pytest.mark.parametrize(("variant", "tied"), [("qwen", True), ("olmo", False)])
def test_transformers_agrees_with_an_export(variant: Variant, tied: bool, tokenizer: Path, tmp_path: Path) -> None:
    """Text, one image, several images, a video and a padded batch, tokenised by us.  float32: measured at most 1.2e-6
    of the largest logit and 1e-5 of a byte step; the tolerance of recipes is 1e-4."""
    model = tiny_model(3, variant, tied=tied)
    folder = exported(tmp_path / "out", model, tokenizer, ExportConfig(shard_bytes=500_000))
    found = verify_export(folder, saved(tmp_path / "weights", model), tolerance=1e-5)
    assert len(found.max_difference) == 5
    assert found.max_logit > 1
    assert found.max_pixel_difference < 1e-3


def test_bfloat16_is_compared_with_rounded_weights(tokenizer: Path, tmp_path: Path) -> None:
    """Would catch a tolerance that must be widened for the rounding, which would hide mistakes."""
    model = tiny_model(3)
    folder = exported(tmp_path / "out", model, tokenizer, ExportConfig(dtype="bfloat16"))
    assert {stored.dtype for stored in WeightFiles(folder).tensors.values()} == {"BF16"}
    verify_export(folder, saved(tmp_path / "weights", model), tolerance=1e-5)


def change_one_weight(folder: Path) -> None:
    files = WeightFiles(folder)
    tensors = {name: files.read(name).clone() for name in files.tensors}
    tensors["model.transformer.blocks.1.mlp.ff_proj.weight"] *= 1.01
    write_weights(folder, tensors.items(), 10**9)


def drop_one_weight(folder: Path) -> None:
    files = WeightFiles(folder)
    names = set(files.tensors) - {"model.transformer.blocks.1.ff_norm.weight"}
    tensors = {name: files.read(name).clone() for name in names}
    write_weights(folder, tensors.items(), 10**9)


def change_field(name: str, key: str, value: object) -> object:
    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        content[key] = value
        (folder / name).write_text(json.dumps(content))

    return change


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (change_one_weight, r"differ by up to .* expected at most 1e-05"),
        (drop_one_weight, "missing_keys"),
        (change_field("processor_config.json", "use_single_crop_col_tokens", True), "input_ids"),
        (change_field("preprocessor_config.json", "overlap_margins", [2, 2]), "input_ids|token_pooling"),
        (change_field("config.json", "image_patch_id", 768), "probe .* fails"),
    ],
    ids=["a weight changed", "a weight missing", "another token layout", "other crops", "another patch token"],
)
def test_verification_refuses(spoil: object, message: str, tokenizer: Path, tmp_path: Path) -> None:
    """Negative controls: each would pass a check that only loads the folder."""
    model = tiny_model(3)
    folder = exported(tmp_path / "out", model, tokenizer)
    spoil(folder)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=message):
        verify_export(folder, saved(tmp_path / "weights", model), tolerance=1e-5)


def test_refuses_another_models_tokenizer(tmp_path: Path) -> None:
    """Would catch new tokens whose ids point into the base vocabulary."""
    folder = tmp_path / "tokenizer"
    save_tokenizer(tiny_tokenizer(700).backend, folder)
    with pytest.raises(CheckpointError, match="im_patch"):
        exported(tmp_path / "out", tiny_model(1), folder)


def checkpoint_reference(workspace: Path, model: Molmo2, path: Path) -> CheckpointRef:
    folder = storage.commit_folder(
        str(workspace / "checkpoints" / "sft" / "key"),
        lambda attempt: (save_weights(attempt, model, model.config), {})[1],
    )
    shards = ShardsRef(uri="x", digest="5eed", dataset="captions", tokenizer_digest="", num_samples={"train": 1})
    plan = PackPlanRef(uri="y", digest="9a9a", stage="sft", num_packs=1, parents=(shards,))
    reference = CheckpointRef(
        uri=folder.uri, digest=folder.digest, stage="sft", step=7, recipe_fingerprint="f00d", parents=(plan,)
    )
    write_reference(reference, path)
    return reference


def test_stage_exports_once(tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Twice the same gives one folder; another limit gives another; lineage reaches the model card."""
    section = ExportSection(
        workspace=str(tmp_path), tokenizer=str(tokenizer), export=ExportConfig(), preprocessing=PreprocessingConfig()
    )
    checkpoint = tmp_path / "checkpoint.json"
    trained = checkpoint_reference(tmp_path, tiny_model(3), checkpoint)
    first = export_stage.run(section, checkpoint=checkpoint, output=tmp_path / "a.json")
    assert not first.reused
    again = export_stage.run(section, checkpoint=checkpoint, output=tmp_path / "b.json")
    assert again.reused
    assert "export_checkpoint: reused" in capsys.readouterr().out
    reference = read_reference(tmp_path / "a.json", ExportRef)
    assert reference.digest == read_reference(tmp_path / "b.json", ExportRef).digest
    assert reference.step == 7 and reference.parents == (trained,)
    assert 0 < first.metrics["logit_difference"] <= TOLERANCE
    assert storage.open_committed(reference.uri).digest == reference.digest
    card = (Path(reference.uri) / "README.md").read_text()
    assert "5eed" in card and "f00d" in card and trained.digest in card
    other = replace(section, preprocessing=PreprocessingConfig(max_crops=4))
    assert not export_stage.run(other, checkpoint=checkpoint, output=tmp_path / "c.json").reused


def test_stage_leaves_nothing_when_transformers_disagrees(tokenizer: Path, tmp_path: Path) -> None:
    section = ExportSection(
        workspace=str(tmp_path),
        tokenizer=str(tokenizer),
        export=ExportConfig(logit_tolerance=0.0),
        preprocessing=PreprocessingConfig(),
    )
    checkpoint_reference(tmp_path, tiny_model(3), tmp_path / "checkpoint.json")
    with pytest.raises(CheckpointError, match="logits"):
        export_stage.run(section, checkpoint=tmp_path / "checkpoint.json", output=tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()
    assert list((tmp_path / "exports").iterdir()) == []
    with pytest.raises(DataError, match="no such folder"):
        export_stage.run(
            replace(section, tokenizer="nowhere"),
            checkpoint=tmp_path / "checkpoint.json",
            output=tmp_path / "out.json",
        )


@pytest.mark.parametrize("variant", get_args(Variant))
def test_commands_there_and_back(
    variant: Variant, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """export, verify, import from the command line; a wrong folder is a message, not a trace."""
    weights, out, back = tmp_path / "weights", tmp_path / "out", tmp_path / "back"
    weights.mkdir()
    model = tiny_model(3, variant)
    save_weights(weights, model, model.config)
    assert commands.main(["export", str(weights), "--tokenizer", str(tokenizer), "--output", str(out)]) == 0
    assert commands.main(["verify", str(out), "--weights", str(weights)]) == 0
    assert commands.main(["import", str(out), "--output", str(back)]) == 0
    before, after = WeightFiles(weights), WeightFiles(back)
    assert before.tensors.keys() == after.tensors.keys()
    assert all(torch.equal(before.read(name), after.read(name)) for name in before.tensors)
    capsys.readouterr()
    assert commands.main(["import", str(tmp_path / "nowhere"), "--output", str(back / "x")]) == 2
    assert capsys.readouterr().err.startswith("DataError:")
