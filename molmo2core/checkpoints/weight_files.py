"""Tensors in safetensors files, one file or several with an index (the Hugging Face layout).

Reading looks at headers first; then one file at a time is mapped into memory, and unmapped before the next, so that of
all files together never more than one is resident.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from molmo2core.checkpoints.fields import read_json
from molmo2core.errors import CheckpointError, PlatformError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

Progress = Callable[[str], None]
"""Takes a line for a person who waits."""


def silent(line: str) -> None:
    """No progress."""


def to_stderr(line: str) -> None:
    """Progress of a command."""
    print(line, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class StoredTensor:
    """What a header says about one tensor."""

    file: str
    shape: tuple[int, ...]
    dtype: str
    """safetensors' name: F32, BF16, ..."""


class WeightFiles:
    """The tensors of a folder.

    Raises:
        CheckpointError: no weights; a file is damaged; the index names a file that is missing, or does not agree with
            the files about which tensor is where.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = {}
        self.files, weight_map = _files_and_map(folder)
        for file in self.files:
            found = _header(folder / file)
            if weight_map is not None:
                _check_index(
                    folder / INDEX, file, set(found), {name for name in weight_map if weight_map[name] == file}
                )
            self.tensors |= {name: StoredTensor(file, *facts) for name, facts in found.items()}

    def read(self, name: str) -> Tensor:
        """One tensor, mapped, not copied.

        Raises:
            CheckpointError: there is no such tensor.
        """
        if name not in self.tensors:
            raise CheckpointError(
                f"{self.folder}: {name}",
                found="no such tensor",
                expected=f"one of {len(self.tensors)} in the files",
                mend="choose the recipe's model that these weights belong to",
            )
        with _open(self.folder / self.tensors[name].file) as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    def read_all(self, names: Iterable[str], progress: Progress = silent) -> Iterator[tuple[str, Tensor]]:
        """The tensors `names`, file by file.  Keep none of them: it would keep its whole file in memory."""
        wanted = set(names)
        files = [file for file in self.files if any(self.tensors[name].file == file for name in wanted)]
        for number, file in enumerate(files, start=1):
            size = (self.folder / file).stat().st_size
            progress(f"reading {self.folder / file}, {_readable(size)}, file {number} of {len(files)}")
            with _open(self.folder / file) as opened:
                for name in opened.keys():  # noqa: SIM118  no dict
                    if name in wanted:
                        yield name, opened.get_tensor(name)


def write_weights(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int, progress: Progress = silent
) -> None:
    """Write `tensors` into files of at most `shard_bytes` (one tensor may exceed it alone), with an index if several.

    Weights on the CPU are written from where they are.  A file has its name only when it is whole, and the index comes
    last; the name holds the number of files, so all are renamed at the end.

    Raises:
        PlatformError: the disk takes no more.
    """
    written: list[tuple[Path, list[str]]] = []
    total = 0
    for shard in _shards(tensors, shard_bytes):
        path = folder / f"{len(written) + 1}.part"
        size = sum(_bytes(tensor) for tensor in shard.values())
        progress(f"writing file {len(written) + 1}, {_readable(size)}")
        try:
            save_file(shard, path, metadata={"format": "pt"})
        except SafetensorError as error:  # no OSError, whatever the disk said
            raise PlatformError(
                str(folder), found=f"cannot write weights: {error}", mend="free space or choose another workspace"
            ) from error
        path.chmod(0o644)  # safetensors' 0600 would hide it from another user's pod
        written.append((path, list(shard)))
        total += size
        del shard  # else it would stay while the next is made
    if len(written) == 1:
        written[0][0].rename(folder / SINGLE)
        return
    weight_map: dict[str, str] = {}
    for number, (path, names) in enumerate(written, start=1):
        file_name = f"model-{number:05d}-of-{len(written):05d}.safetensors"
        path.rename(folder / file_name)
        weight_map |= dict.fromkeys(names, file_name)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    partial = folder / f"{INDEX}.part"
    partial.write_text(json.dumps(index, indent=1) + "\n")
    partial.rename(folder / INDEX)


def _shards(tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + _bytes(tensor) > shard_bytes:
            yield shard
            shard, size = {}, 0
        plain = tensor.detach().to("cpu").contiguous()
        # safetensors refuses tensors that share memory, as a tied head and its embedding do.
        shares = any(
            plain.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() for other in shard.values()
        )
        shard[name] = plain.clone() if shares else plain
        size += _bytes(tensor)
    if shard:
        yield shard


def _readable(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _files_and_map(folder: Path) -> tuple[list[str], dict[str, str] | None]:
    """File names, and which tensor is where if there is an index."""
    if not (folder / INDEX).is_file():
        return [SINGLE], None
    if (folder / SINGLE).is_file():
        raise CheckpointError(
            str(folder), found=f"both {SINGLE} and {INDEX}", expected="one of them", mend="remove the one that is old"
        )
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(_is_file_name(value) for value in weight_map.values()):
        raise CheckpointError(
            str(folder / INDEX), found="no weight_map of file names", expected="an index as safetensors has it"
        )
    return sorted(set(weight_map.values())), weight_map


def _is_file_name(value: object) -> bool:
    return isinstance(value, str) and Path(value).name == value


def _header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    with _open(path) as file:
        slices = ((name, file.get_slice(name)) for name in file.keys())  # noqa: SIM118  no dict
        return {name: (tuple(part.get_shape()), str(part.get_dtype())) for name, part in slices}


def _check_index(index: Path, file: str, found: set[str], named: set[str]) -> None:
    for kind, names in (("has no tensor", named - found), ("has also", found - named)):
        if names:
            raise CheckpointError(
                str(index),
                found=f"{file} {kind} {min(names)} ({len(names)} such)",
                expected="exactly the tensors that the index puts there",
                mend="fetch the folder again",
            )


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise CheckpointError(
            str(path), found="no such file", expected="safetensors weights", mend="fetch the folder again"
        ) from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            str(path), found=f"a damaged file ({error})", expected="safetensors weights", mend="fetch it again"
        ) from error
