"""A whole Molmo2 from outside, in every layout that transformers reads or writes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file

from molmo2core import storage
from molmo2core.checkpoints.config import ExportConfig, InitialWeights
from molmo2core.checkpoints.export_hf import export_model
from molmo2core.checkpoints.hf_config import PROCESSOR_FLAGS, read_model_config, same_model
from molmo2core.checkpoints.import_hf import import_released, initial_model
from molmo2core.checkpoints.model_card import Lineage
from molmo2core.checkpoints.native import load_native
from molmo2core.checkpoints.weight_files import INDEX, SINGLE, WeightFiles
from molmo2core.errors import CheckpointError, RecipeError
from molmo2core.model.molmo2 import Molmo2
from molmo2core.preprocessing.config import PreprocessingConfig
from molmo2core.sources.shapes_tokenizer import save_tokenizer
from molmo2core.testing.tiny_model import Variant, tiny_config, tiny_model
from molmo2core.testing.tiny_tokenizer import tiny_tokenizer

VARIANTS: list[tuple[Variant, bool]] = [("qwen", False), ("qwen", True), ("olmo", False), ("olmo", True)]
Form = Literal["released", "native", "saved by transformers"]
"""Released; native configuration and names; native configuration, and the names that `save_pretrained` writes."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(tiny_tokenizer().backend, folder)
    return folder


def exported(folder: Path, model: Molmo2, tokenizer: Path, *, shard_bytes: int = 10**9) -> Path:
    folder.mkdir(parents=True)
    export_model(
        folder,
        model,
        tokenizer,
        export=ExportConfig(shard_bytes=shard_bytes),
        preprocessing=PreprocessingConfig(),
        lineage=Lineage(),
    )
    return folder


def saved_by_transformers(released: Path, folder: Path, *, names: Form) -> Path:
    """Model and processor, loaded by transformers and written again with `save_pretrained`."""
    from transformers import AutoProcessor

    load_native(released).save_pretrained(
        folder, save_original_format=names == "saved by transformers", max_shard_size="300KB"
    )
    AutoProcessor.from_pretrained(released).save_pretrained(folder)
    return folder


def in_form(form: Form, folder: Path, model: Molmo2, tokenizer: Path) -> Path:
    released = exported(folder / "released", model, tokenizer, shard_bytes=300_000)
    return released if form == "released" else saved_by_transformers(released, folder / "saved", names=form)


def equal(model: Molmo2, other: Molmo2) -> bool:
    """Bit by bit, a tied head as a copy."""
    left, right = model.state_dict(), other.state_dict()
    for state, of in ((left, model), (right, other)):
        state["decoder.head"] = of.decoder.head_weight
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("form", ["released", "native", "saved by transformers"])
@pytest.mark.parametrize(("variant", "tied"), VARIANTS)
def test_import_export_import_is_exact(
    variant: Variant, tied: bool, form: Form, tokenizer: Path, tmp_path: Path
) -> None:
    """From several shards, in each form.  Would catch fused parts in another order, new tokens lost where transformers
    cuts its one table into equal halves, and a configuration that means another model after the way there and back."""
    model = tiny_model(5, variant, tied=tied)
    folder = in_form(form, tmp_path, model, tokenizer)
    files = WeightFiles(folder)
    assert (folder / INDEX).is_file() and len(files.files) > 3
    is_native = "vision_config" in json.loads((folder / "config.json").read_text())
    assert is_native == (form != "released")
    assert ("model.language_model.embed_tokens.weight" in files.tensors) == (form == "native")
    if form == "saved by transformers":  # its own way of cutting, which only it and we understand
        assert files.tensors["model.transformer.wte.new_embedding"].shape == (448, 96)

    first = import_released(folder)
    assert same_model(first.config, model.config) and not first.config.decoder.tie_embeddings
    assert equal(first, model)
    second = import_released(exported(tmp_path / "again", first, tokenizer))
    assert same_model(second.config, first.config)
    assert equal(second, first)
    as_recipe_says = initial_model(model.config, InitialWeights(molmo2=str(folder)), seed=0, workspace="")
    assert as_recipe_says.config == model.config and equal(as_recipe_says, model)


def test_import_refuses_another_model(tokenizer: Path, tmp_path: Path) -> None:
    """Would catch YaRN on other layers than the file says, and weights of an untied model in a tied one."""
    folder = exported(tmp_path / "released", tiny_model(5, "olmo"), tokenizer)
    weights = InitialWeights(molmo2=str(folder))
    config = read_model_config(folder)
    inverted = replace(config, decoder=replace(config.decoder, rope_scaling_layers=(1,)))
    with pytest.raises(CheckpointError, match="rope_scaling_layers"):
        initial_model(inverted, weights, seed=0, workspace="")
    tied = replace(config, decoder=replace(config.decoder, tie_embeddings=True))
    with pytest.raises(CheckpointError, match="differs from the embedding"):
        initial_model(tied, weights, seed=0, workspace="")
    with pytest.raises(RecipeError, match="one or the other"):
        initial_model(config, replace(weights, decoder="x"), seed=0, workspace="")


def test_a_tied_model_needs_its_stored_head(tokenizer: Path, tmp_path: Path) -> None:
    """model.md 0.17: released files always hold it."""
    folder = exported(tmp_path / "released", tiny_model(5, tied=True), tokenizer)
    tensors = load_file(folder / SINGLE)
    del tensors["lm_head.weight"]
    save_file(tensors, folder / SINGLE)
    for config in (tiny_config(tied=True), tiny_config()):
        with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
            initial_model(config, InitialWeights(molmo2=str(folder)), seed=0, workspace="")


def test_import_from_object_store(tokenizer: Path, tmp_path: Path, s3_bucket: str) -> None:
    """A plain folder of files, and one that a stage committed, whose files lie below the address."""
    model = tiny_model(5)
    folder = exported(tmp_path / "released", model, tokenizer)
    for file in folder.iterdir():
        storage.write_bytes(storage.join(s3_bucket, "base", file.name), file.read_bytes())

    def copy(destination: Path) -> dict[str, Any]:
        shutil.copytree(folder, destination, dirs_exist_ok=True)
        return {}

    storage.commit_folder(storage.join(s3_bucket, "committed"), copy)
    for uri in ("base", "committed"):
        assert equal(initial_model(tiny_config(), InitialWeights(molmo2=uri), seed=0, workspace=s3_bucket), model)


def without(file: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).unlink()


def with_field(file: str, name: str, value: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        content[name] = value
        (folder / file).write_text(json.dumps(content))

    return change


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        *((without(file), file) for file in ("config.json", "processor_config.json", "preprocessor_config.json")),
        (without("video_preprocessor_config.json"), "video_preprocessor_config.json"),
        (without(SINGLE), SINGLE),
        *((with_field("processor_config.json", name, None), name) for name in PROCESSOR_FLAGS),
        (with_field("preprocessor_config.json", "image_mean", [0.4, 0.5, 0.5]), "image_mean"),
        (with_field("preprocessor_config.json", "overlap_margins", [4, 4]), "overlap_margins"),
        (with_field("preprocessor_config.json", "pooling_size", 2), "pooling_size"),
    ],
)
def test_what_is_missing_or_other_is_named(
    spoil: Callable[[Path], None], message: str, tokenizer: Path, tmp_path: Path
) -> None:
    """Would catch a model whose token layout is another one (e.g. without the low-resolution start token)."""
    folder = exported(tmp_path / "released", tiny_model(5), tokenizer)
    spoil(folder)
    with pytest.raises(CheckpointError, match=message):
        import_released(folder)
