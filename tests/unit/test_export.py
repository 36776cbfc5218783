"""Export: files, acceptance by transformers, and the stage."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from molmo2core import storage
from molmo2core.checkpoints.config import ExportConfig
from molmo2core.checkpoints.export_hf import export_model
from molmo2core.checkpoints.model_card import Lineage, model_card
from molmo2core.checkpoints.probes import probe_prompts
from molmo2core.checkpoints.reference import save_weights
from molmo2core.checkpoints.verify import verify_export
from molmo2core.checkpoints.weight_files import WeightFiles, write_weights
from molmo2core.errors import CheckpointError, DataError
from molmo2core.model.initialization import build_model
from molmo2core.model.molmo2 import Molmo2
from molmo2core.preprocessing.config import PreprocessingConfig
from molmo2core.recipe.sections import ExportSection
from molmo2core.references import CheckpointRef, ExportRef, PackPlanRef, ShardsRef, read_reference, write_reference
from molmo2core.sources.shapes_tokenizer import save_tokenizer
from molmo2core.special_tokens import CHAT_END, TEXT_PAD
from molmo2core.stages import export as export_stage
from molmo2core.testing.tiny_model import Variant, tiny_config, tiny_model
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


def test_slow_tokenizer_files_are_copied_and_added_tokens_listed(tokenizer: Path, tmp_path: Path) -> None:
    """`vocab.json` and `merges.txt` where the base tokenizer has them (model.md 3.6); every added token with its id."""
    backend = tiny_tokenizer().backend
    full = tmp_path / "full"
    save_tokenizer(backend, full)
    backend.model.save(str(full))
    folder = exported(tmp_path / "out", tiny_model(1), full)
    for name in ("vocab.json", "merges.txt", "tokenizer.json"):
        assert (folder / name).read_bytes() == (full / name).read_bytes()
    added = json.loads((folder / "added_tokens.json").read_text())
    assert added["<|video|>"] == tiny_tokenizer().special.video and "|<EXTRA_TOKENS_0>|" in added
    assert len(json.loads((folder / "vocab.json").read_text())) + len(added) == 768 + 10


def test_an_olmo_tokenizer_keeps_its_own_ends(tmp_path: Path) -> None:
    """Molmo2-O-7B begins texts with another token than it ends them with, and pads with a third (model.md 3.5): in
    every exported file, in transformers' processor and in our prompts.  Would catch Qwen's BOS = EOS taken for all."""
    from transformers import AutoTokenizer, GenerationConfig

    backend, folder = tiny_tokenizer().backend, tmp_path / "tokenizer"
    bos, eos, pad = TEXT_PAD, CHAT_END, "|<EXTRA_TOKENS_0>|"
    save_tokenizer(backend, folder)
    named = {"bos_token": bos, "eos_token": {"content": eos, "lstrip": False}, "pad_token": pad}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    model = tiny_model(3, "olmo")
    out = exported(tmp_path / "out", model, folder)
    ids = [backend.token_to_id(name) for name in (bos, eos, pad)]
    assert len(set(ids)) == 3
    generation, theirs = GenerationConfig.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert [generation.bos_token_id, generation.eos_token_id, generation.pad_token_id] == ids
    assert [theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id] == ids
    prompts = probe_prompts(out, model.config.geometry, PreprocessingConfig())
    assert all(prompt.input_ids[0] == ids[0] for prompt in prompts.values())
    verify_export(out, saved(tmp_path / "weights", model), tolerance=1e-5)


VLLM_READS = {
    "config.json": (
        "architectures image_patch_id image_col_id image_start_token_id image_end_token_id "
        "low_res_image_start_token_id frame_start_token_id frame_end_token_id image_low_res_id"
    ),
    "config.json: vit_config": (
        "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim hidden_act "
        "layer_norm_eps image_default_input_size image_patch_size image_num_pos"
    ),
    "config.json: adapter_config": (
        "vit_layers pooling_attention_mask hidden_size num_attention_heads num_key_value_heads head_dim hidden_act "
        "intermediate_size text_hidden_size"
    ),
    "config.json: text_config": (
        "hidden_size num_attention_heads num_key_value_heads head_dim vocab_size additional_vocab_size qkv_bias "
        "num_hidden_layers intermediate_size hidden_act max_position_embeddings rope_theta rope_scaling use_qk_norm "
        "qk_norm_type layer_norm_eps norm_after rope_scaling_layers"
    ),
    "processor_config.json": (
        "auto_map image_use_col_tokens use_single_crop_col_tokens use_single_crop_start_token video_use_col_tokens "
        "use_frame_special_tokens"
    ),
    "preprocessor_config.json": "auto_map max_crops overlap_margins patch_size pooling_size size",
    "video_preprocessor_config.json": (
        "auto_map size patch_size pooling_size num_frames frame_sample_mode max_fps sampling_fps"
    ),
}
"""Attributes that vllm/model_executor/models/molmo2.py (commit 030ea52) takes from configuration and processor."""


@pytest.mark.parametrize("variant", get_args(Variant))
def test_all_that_vllm_reads_is_there(variant: Variant, tokenizer: Path, tmp_path: Path) -> None:
    """vLLM itself has not run; its defaults are another model's, so a field that is missing would be one of those."""
    folder = exported(tmp_path / "out", tiny_model(1, variant), tokenizer)
    for place, names in VLLM_READS.items():
        file, _, section = place.partition(": ")
        content = json.loads((folder / file).read_text())
        missing = set(names.split()) - set(content[section] if section else content)
        assert not missing, place
    config = json.loads((folder / "config.json").read_text())
    # Its classes come from the hub's repository of the released model, since the export carries no Python.
    classes = {}
    for file in ("config.json", "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"):
        classes |= json.loads((folder / file).read_text())["auto_map"]
    modules = {
        "AutoConfig": "configuration_molmo2.Molmo2Config",
        "AutoModelForImageTextToText": "modeling_molmo2.Molmo2ForConditionalGeneration",
        "AutoProcessor": "processing_molmo2.Molmo2Processor",
        "AutoImageProcessor": "image_processing_molmo2.Molmo2ImageProcessor",
        "AutoVideoProcessor": "video_processing_molmo2.Molmo2VideoProcessor",
    }
    assert classes == {auto: f"allenai/Molmo2-8B--{module}" for auto, module in modules.items()}
    text, vision, adapter = config["text_config"], config["vit_config"], config["adapter_config"]
    assert text["hidden_size"] % text["num_attention_heads"] == 0  # asserted there, though no released size breaks it
    for part in (vision, adapter):
        assert part["head_dim"] == part["hidden_size"] // part["num_attention_heads"]


def test_the_card_names_what_the_weights_come_from(tokenizer: Path, tmp_path: Path) -> None:
    lineage = Lineage(
        recipe_fingerprint="f00d",
        stage="sft",
        step=7,
        datasets=(("captions", "abcd"),),
        base_models=(("decoder", "hf://Qwen/Qwen3-4B-Instruct-2507"),),
        metrics=(("sft, last loss", 1.23456),),
    )
    folder = tmp_path / "out"
    folder.mkdir()
    export_model(
        folder, tiny_model(1), tokenizer, export=ExportConfig(), preprocessing=PreprocessingConfig(), lineage=lineage
    )
    card = (folder / "README.md").read_text()
    for fact in ("f00d", "sft, 7", "captions", "abcd", "hf://Qwen/Qwen3-4B-Instruct-2507", "1.235"):
        assert fact in card
    unknown = model_card(tiny_model(1), "float32", Lineage())
    assert unknown.lower().count("not recorded") == 5


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
        (change_field("preprocessor_config.json", "image_mean", [0.4, 0.5, 0.5]), "pixels.*byte step"),
        (change_field("config.json", "image_patch_id", 768), "probe .* fails"),
        (change_field("config.json", "dtype", "int8"), "dtype"),
        (change_field("video_preprocessor_config.json", "max_fps", None), "max_fps"),
    ],
    ids=[
        "a weight changed",
        "a weight missing",
        "another token layout",
        "other crops",
        "other pixels",
        "another patch token",
        "no dtype of weights",
        "no limit",
    ],
)
def test_verification_refuses(spoil: object, message: str, tokenizer: Path, tmp_path: Path) -> None:
    """Negative controls: each would pass a check that only loads the folder."""
    model = tiny_model(3)
    folder = exported(tmp_path / "out", model, tokenizer)
    spoil(folder)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=message):
        verify_export(folder, saved(tmp_path / "weights", model), tolerance=1e-5)


def test_verification_refuses_weights_of_another_size(tokenizer: Path, tmp_path: Path) -> None:
    folder = exported(tmp_path / "out", tiny_model(3), tokenizer)
    config = tiny_config()
    other = build_model(replace(config, decoder=replace(config.decoder, vocab_size=700)), seed=0)
    with pytest.raises(CheckpointError, match=r"<im_patch> has id 770.*702"):
        verify_export(folder, saved(tmp_path / "weights", other), tolerance=1e-5)


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
