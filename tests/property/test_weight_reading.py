"""Reading weights, for every way of cutting rows and for damaged headers."""

from __future__ import annotations

import struct
import tempfile
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from molmo2core.checkpoints.tensor_loading import load_tensors
from molmo2core.checkpoints.weight_files import SINGLE, WeightFiles, write_weights
from molmo2core.errors import CheckpointError

ROWS = 12


def pieces(total: Tensor, cuts: list[int]) -> list[Tensor]:
    bounds = [0, *sorted(set(cuts)), len(total)]
    return [total[start:stop] for start, stop in pairwise(bounds)]


cut_points = st.lists(st.integers(1, ROWS - 1), max_size=5)


@settings(max_examples=60, deadline=None)
@given(stored=cut_points, ours=cut_points, width=st.integers(1, 3), shard_bytes=st.sampled_from([8, 40, 10**6]))
def test_rows_arrive_in_order_however_they_are_cut(
    stored: list[int], ours: list[int], width: int, shard_bytes: int
) -> None:
    """Any number of stored tensors, spread over any number of files, fills any number of parameters.  Would catch a row
    too many at a border, which only differently cut files show (transformers' equal halves of the embedding)."""
    total = torch.arange(float(ROWS * width)).reshape(ROWS, width)
    targets = {f"ours{n}": nn.Parameter(torch.full_like(part, -1)) for n, part in enumerate(pieces(total, ours))}
    model = nn.ParameterDict(targets)
    tensors = {f"stored{n}": part.contiguous() for n, part in enumerate(pieces(total, stored))}
    with tempfile.TemporaryDirectory() as folder:
        write_weights(Path(folder), reversed(tensors.items()), shard_bytes)
        files = WeightFiles(Path(folder))
        loaded = load_tensors(files, [(tuple(tensors), tuple(targets))], model)  # type: ignore[arg-type]
        assert torch.equal(torch.cat([parameter.detach() for parameter in targets.values()]), total)
        assert loaded == set(targets)
        with pytest.raises(CheckpointError, match=r"shape .* expected"):
            wrong = nn.ParameterDict(targets | {"more": nn.Parameter(torch.zeros(1, width))})
            load_tensors(files, [(tuple(tensors), (*targets, "more"))], wrong)  # type: ignore[arg-type]


def whole_file() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        save_file({"a": torch.ones(3, 2), "b": torch.ones(4)}, Path(folder) / SINGLE)
        return (Path(folder) / SINGLE).read_bytes()


WHOLE = whole_file()
HEADER = 8 + struct.unpack("<Q", WHOLE[:8])[0]


@settings(max_examples=2000, deadline=None)
@given(
    place=st.integers(0, HEADER - 1),
    byte=st.integers(0, 255),
    length=st.one_of(st.just(len(WHOLE)), st.integers(0, 200)),
)
def test_a_damaged_header_is_a_message_or_harmless(place: int, byte: int, length: int) -> None:
    """Any byte of the header changed, the file cut anywhere: read as whole tensors, or a CheckpointError; never another
    exception, a crash or a hang.  2,000 files of some 150 bytes take a second or two."""
    damaged = bytearray(WHOLE)
    damaged[place] = byte
    parameters = {"a": nn.Parameter(torch.zeros(3, 2)), "b": nn.Parameter(torch.zeros(4))}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / SINGLE).write_bytes(bytes(damaged[:length]))
        try:
            lines = [((name,), (name,)) for name in parameters]
            load_tensors(WeightFiles(Path(folder)), lines, nn.ParameterDict(parameters))  # type: ignore[arg-type]
        except CheckpointError as error:
            assert SINGLE in str(error) or folder in str(error)
        else:
            assert all(bool((parameter == 1).all()) for parameter in parameters.values())
