"""Tensors in safetensors files, one file or several with an index, read and written one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from molmo2core.checkpoints.hf_config import read_json
from molmo2core.errors import CheckpointError, PlatformError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class WeightFiles:
    """Names and tensors of a folder; a context manager, because files stay open and are mapped, not read.

    Raises:
        CheckpointError: no weights, a file that the index names is missing, or a file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = ExitStack()
        self._file_of: dict[str, Any] = {}

    def __enter__(self) -> WeightFiles:
        with ExitStack() as opened:
            for name in self._file_names():
                file = opened.enter_context(_open(self.folder / name))
                self._file_of |= dict.fromkeys(file.keys(), file)
            self._files = opened.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._files.close()

    def names(self) -> set[str]:
        """All tensor names."""
        return set(self._file_of)

    def read(self, name: str) -> Tensor:
        """One tensor.

        Raises:
            CheckpointError: there is no such tensor.
        """
        if name not in self._file_of:
            raise CheckpointError(
                f"{self.folder}: {name}",
                found="no such tensor",
                expected=f"one of {len(self._file_of)} in the files",
                mend="choose the recipe's model that these weights belong to",
            )
        tensor: Tensor = self._file_of[name].get_tensor(name)
        return tensor

    def _file_names(self) -> list[str]:
        if (self.folder / INDEX).is_file():
            weight_map = read_json(self.folder / INDEX).get("weight_map")
            if not isinstance(weight_map, dict):
                raise CheckpointError(str(self.folder / INDEX), found="no weight_map", expected="a safetensors index")
            return sorted(set(weight_map.values()))
        return [SINGLE]


def write_weights(folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> None:
    """Write `tensors` into files of at most `shard_bytes` (one tensor may exceed it alone), with an index if several.

    A file's number of shards is in its name, so shards are written under their number and renamed at the end.

    Raises:
        PlatformError: the disk takes no more.
    """
    written: list[tuple[Path, list[str]]] = []
    total = 0
    for shard in _shards(tensors, shard_bytes):
        path = folder / f"{len(written) + 1}.part"
        try:
            save_file(shard, path, metadata={"format": "pt"})
        except SafetensorError as error:  # no OSError, whatever the disk said
            raise PlatformError(
                str(folder), found=f"cannot write weights: {error}", mend="free space or choose another workspace"
            ) from error
        written.append((path, list(shard)))
        total += sum(_bytes(tensor) for tensor in shard.values())
    if len(written) == 1:
        written[0][0].rename(folder / SINGLE)
        return
    weight_map: dict[str, str] = {}
    for number, (path, names) in enumerate(written, start=1):
        file_name = f"model-{number:05d}-of-{len(written):05d}.safetensors"
        path.rename(folder / file_name)
        weight_map |= dict.fromkeys(names, file_name)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")


def _shards(tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + _bytes(tensor) > shard_bytes:
            yield shard
            shard, size = {}, 0
        # A copy: safetensors refuses tensors that share memory, as a tied head and its embedding do.
        shard[name] = tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format)
        size += _bytes(tensor)
    if shard:
        yield shard


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise CheckpointError(str(path), found="no such file", expected="safetensors weights") from error
    except SafetensorError as error:
        raise CheckpointError(str(path), found=f"a damaged file ({error})", expected="safetensors weights") from error
