"""safetensors files on disk: whole, damaged, and as an index describes them."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from molmo2core.checkpoints.reference import load_weights, model_config_from_json, model_config_to_json, save_weights
from molmo2core.checkpoints.weight_files import INDEX, SINGLE, WeightFiles, write_weights
from molmo2core.errors import CheckpointError
from molmo2core.testing.tiny_model import Variant, tiny_config, tiny_model

VARIANTS: list[tuple[Variant, bool]] = [("qwen", False), ("qwen", True), ("olmo", False), ("olmo", True)]


@pytest.mark.parametrize(("variant", "tied"), VARIANTS)
def test_weights_between_stages_are_exact(variant: Variant, tied: bool, tmp_path: Path) -> None:
    model = tiny_model(2, variant, tied=tied)
    save_weights(tmp_path, model, model.config)
    loaded = load_weights(tmp_path)
    assert loaded.config == model.config
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in loaded.parameters())
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    with torch.no_grad():  # what is loaded is a copy: training must not write into the committed file
        next(loaded.parameters()).zero_()
    assert torch.equal(load_weights(tmp_path).state_dict()["decoder.norm.weight"], model.decoder.norm.weight)


def test_loading_weights_is_strict(tmp_path: Path) -> None:
    """Would catch `strict=False`: a parameter left at its random values."""
    model = tiny_model(2)
    config = model.config
    save_weights(tmp_path, model, config)
    state = dict(model.state_dict())

    def broken(tensors: dict[str, torch.Tensor]) -> str:
        write_weights(tmp_path, tensors.items(), 10**9)
        with pytest.raises(CheckpointError) as error:
            load_weights(tmp_path)
        return str(error.value)

    missing = broken({name: tensor for name, tensor in state.items() if name != "decoder.norm.weight"})
    assert "decoder.norm.weight" in missing and "missing" in missing
    assert "decoder.extra" in broken(state | {"decoder.extra": torch.zeros(1)})
    shape = broken(state | {"decoder.norm.weight": torch.zeros(7)})
    assert "decoder.norm.weight" in shape and "(7,)" in shape and "(96,)" in shape
    integer = broken(state | {"decoder.norm.weight": torch.ones(96, dtype=torch.int8)})
    assert "decoder.norm.weight" in integer and "I8" in integer and "F32" in integer
    for value in (float("nan"), float("inf"), -float("inf")):
        spoiled = state["decoder.head"].clone()
        spoiled[700, 3] = value
        infinite = broken(state | {"decoder.head": spoiled})
        assert "decoder.head" in infinite and str(value) in infinite and SINGLE in infinite


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_exactly_into_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model(2)
    save_weights(tmp_path, model, model.config)
    halved = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    write_weights(tmp_path, halved.items(), 10**9)
    found = load_weights(tmp_path).state_dict()
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in halved.items())


def test_our_configuration_is_read_strictly() -> None:
    content = model_config_to_json(tiny_config("olmo"))
    assert model_config_from_json(json.loads(json.dumps(content)), "x") == tiny_config("olmo")
    content["decoder"]["colour"] = 1
    with pytest.raises(CheckpointError, match="colour"):
        model_config_from_json(content, "x")
    del content["decoder"]["colour"], content["decoder"]["rope_theta"]
    with pytest.raises(CheckpointError, match="rope_theta"):
        model_config_from_json(content, "x")


def test_shards_hold_every_tensor_once_within_their_limit(tmp_path: Path) -> None:
    """Would catch a lost tensor at a shard's end, and an index that names the wrong file."""
    tensors = {f"t{n}": torch.full((10,), float(n)) for n in range(7)}  # 40 bytes each
    lines: list[str] = []
    write_weights(tmp_path, tensors.items(), 100, lines.append)
    assert len(lines) == 4
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 280
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{n:05d}-of-00004.safetensors" for n in (1, 2, 3, 4)]
    assert {path.name for path in tmp_path.iterdir()} == {INDEX, *files}
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in tmp_path.iterdir())  # another user's pod reads them
    assert all(list(index["weight_map"].values()).count(file) <= 2 for file in files)
    weights = WeightFiles(tmp_path)
    assert set(weights.tensors) == set(tensors)
    assert all(torch.equal(weights.read(name), tensor) for name, tensor in tensors.items())
    lines.clear()
    found = dict(weights.read_all(["t6", "t0", "t1"], lines.append))
    assert set(found) == {"t0", "t1", "t6"}
    assert len(lines) == 2 and "file 1 of 2" in lines[0] and files[3] in lines[1]


def test_tensors_that_share_memory_are_all_written(tmp_path: Path) -> None:
    """safetensors refuses them; a tied head and views of one matrix share."""
    matrix = torch.arange(12.0).reshape(4, 3)
    tensors = {"a": matrix, "b": matrix, "c": matrix[1:3], "d": matrix.T}
    write_weights(tmp_path, tensors.items(), 10**6)
    weights = WeightFiles(tmp_path)
    assert all(torch.equal(weights.read(name), tensor) for name, tensor in tensors.items())


def two_shards(folder: Path) -> None:
    write_weights(folder, [(f"t{n}", torch.full((10,), float(n))) for n in range(4)], 80)


SECOND = "model-00002-of-00002.safetensors"


def cut(folder: Path) -> None:
    (folder / SECOND).write_bytes((folder / SECOND).read_bytes()[:-4])


def empty(folder: Path) -> None:
    (folder / SECOND).write_bytes(b"")


def no_safetensors(folder: Path) -> None:
    (folder / SECOND).write_bytes(b"<html>404</html> and some more bytes")


def header_beyond_the_file(folder: Path) -> None:
    (folder / SECOND).write_bytes(struct.pack("<Q", 1 << 60) + b"{}")


def twice_in_one_file(folder: Path) -> None:
    one = '"t2":{"dtype":"F32","shape":[1],"data_offsets":[%d,%d]}'
    header = ("{" + one % (0, 4) + "," + one % (4, 8) + "}").encode()
    (folder / SECOND).write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))


def absent(folder: Path) -> None:
    (folder / SECOND).unlink()


def a_folder(folder: Path) -> None:
    absent(folder)
    (folder / SECOND).mkdir()


def twice_in_two_files(folder: Path) -> None:
    save_file({f"t{n}": torch.zeros(10) for n in (1, 2, 3)}, folder / SECOND)


def not_in_its_file(folder: Path) -> None:
    save_file({"t3": torch.zeros(10)}, folder / SECOND)


def rename_in_index(folder: Path, change: Callable[[dict[str, str]], None]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def index_with_unknown_tensor(folder: Path) -> None:
    rename_in_index(folder, lambda names: names.update(t9=SECOND))


def index_without_a_tensor(folder: Path) -> None:
    rename_in_index(folder, lambda names: names.pop("t3") and None)


def index_that_leaves_the_folder(folder: Path) -> None:
    rename_in_index(folder, lambda names: names.update(t3="../outside.safetensors"))


def index_without_map(folder: Path) -> None:
    (folder / INDEX).write_text("{}")


def no_index_json(folder: Path) -> None:
    (folder / INDEX).write_text("{")


def old_single_file(folder: Path) -> None:
    save_file({"t0": torch.zeros(10)}, folder / SINGLE)


def nothing(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (cut, f"{SECOND}.*damaged"),
        (empty, f"{SECOND}.*damaged"),
        (no_safetensors, f"{SECOND}.*damaged"),
        (header_beyond_the_file, f"{SECOND}.*damaged"),
        (twice_in_one_file, f"{SECOND}.*damaged.*t2"),
        (a_folder, f"{SECOND}.*damaged"),
        (absent, f"{SECOND}.*no such file"),
        (twice_in_two_files, rf"index.*{SECOND} has also t1"),
        (not_in_its_file, rf"index.*{SECOND} has no tensor t2"),
        (index_with_unknown_tensor, rf"index.*{SECOND} has no tensor t9"),
        (index_without_a_tensor, rf"index.*{SECOND} has also t3"),
        (index_that_leaves_the_folder, r"index.*no weight_map of file names"),
        (index_without_map, r"index.*no weight_map"),
        (no_index_json, r"index.*no JSON"),
        (old_single_file, f"both {SINGLE} and {INDEX}"),
        (nothing, f"{SINGLE}.*no such file"),
    ],
)
def test_damaged_folders_are_named(spoil: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    """Before a single number is read.  Would catch the one tensor of two that happens to be read last."""
    two_shards(tmp_path)
    WeightFiles(tmp_path)
    spoil(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        WeightFiles(tmp_path)
