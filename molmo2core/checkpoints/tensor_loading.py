"""Copying stored tensors into a model's parameters, row by row of the table, file by file of the folder.

Everything that headers tell (names, shapes, dtypes) is checked before the first number is read.  Each tensor is copied
once, from the mapped file into the parameter, so that the peak is the model and the one file that is mapped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from molmo2core.checkpoints.tensor_table import Names
from molmo2core.checkpoints.weight_files import Progress, StoredTensor, WeightFiles, silent
from molmo2core.errors import CheckpointError
from molmo2core.model.molmo2 import Molmo2

Convert = Callable[[Tensor], Tensor]
"""Brings one stored tensor into our shape."""

_DTYPES = ("F32", "BF16", "F16")
_OTHER_MODEL = "choose the recipe's model that these weights belong to"


@dataclass(frozen=True)
class _Copy:
    """Rows of one stored tensor that are rows of one parameter."""

    parameter: str
    start: int
    """First row in the parameter."""
    from_start: int
    """First row in the stored tensor."""
    rows: int


@torch.no_grad()
def load_tensors(
    files: WeightFiles,
    lines: Sequence[tuple[Names, Names]],
    model: Molmo2,
    *,
    unused: Callable[[str], bool] = lambda name: False,
    convert: Mapping[str, Convert] | None = None,
    progress: Progress = silent,
) -> set[str]:
    """Fill parameters of `model` and return their names.

    Args:
        lines: (stored names, our names): the rows of the former, one after the other, are those of the latter.
        unused: tells which stored tensors, of those that no line names, may be there.
        convert: by our name, for parameters that one stored tensor holds in another shape.

    Raises:
        CheckpointError: a tensor is missing, unknown, of another shape or of no floating-point dtype, or has a value
            that is not finite.
    """
    convert = convert or {}
    parameters = dict(model.named_parameters())
    wanted = {name for stored, _ in lines for name in stored}
    check_names({name for name in files.tensors if name in wanted or not unused(name)}, wanted, str(files.folder))
    for name in wanted:
        _check_dtype(name, files.tensors[name], str(files.folder))
    copies: dict[str, list[_Copy]] = {name: [] for name in wanted}
    for stored, ours in lines:
        if ours[0] in convert:
            copies[stored[0]].append(_Copy(ours[0], 0, 0, parameters[ours[0]].shape[0]))
            continue
        _check_shapes(stored, ours, files, parameters)
        for name, copy in _copies(stored, ours, files, parameters):
            copies[name].append(copy)
    for name, tensor in files.read_all(wanted, progress):
        for copy in copies[name]:
            where = f"{files.folder / files.tensors[name].file}: {name}"
            target = parameters[copy.parameter][copy.start : copy.start + copy.rows]
            if copy.parameter in convert:
                target.copy_(checked_shape(convert[copy.parameter](tensor), tuple(target.shape), where))
            else:
                target.copy_(tensor[copy.from_start : copy.from_start + copy.rows])
            _check_finite(target, where)
    return {name for _, ours in lines for name in ours}


def check_equal(files: WeightFiles, name: str, parameter: Tensor) -> None:
    """Refuse a head that a model ties to its embedding and a file does not.

    Raises:
        CheckpointError: the stored tensor `name` is not equal to `parameter`.
    """
    head = files.read(name)
    _check_dtype(name, files.tensors[name], str(files.folder))
    if not torch.equal(head.to(parameter.dtype), parameter):
        raise CheckpointError(
            f"{files.folder}: {name}",
            found="a head that differs from the embedding",
            expected="the same values, as model.decoder.tie_embeddings says",
            mend="set tie_embeddings: false",
        )


def checked_shape(tensor: Tensor, expected: tuple[int, ...], where: str) -> Tensor:
    """`tensor`, if it has the `expected` shape.

    Raises:
        CheckpointError: it has not.
    """
    if tuple(tensor.shape) != expected:
        raise CheckpointError(where, found=f"shape {tuple(tensor.shape)}", expected=str(expected), mend=_OTHER_MODEL)
    return tensor


def check_names(found: set[str], expected: set[str], where: str) -> None:
    """Refuse missing and unknown tensor names.

    Raises:
        CheckpointError: names the first of them and how many there are.
    """
    for kind, names in (("missing", expected - found), ("unknown", found - expected)):
        if names:
            raise CheckpointError(
                f"{where}: {min(names)}",
                found=f"{kind} tensor ({len(names)} {kind} of {len(expected)})",
                expected="exactly the tensors of this model",
                mend=_OTHER_MODEL,
            )


def _check_dtype(name: str, stored: StoredTensor, where: str) -> None:
    if stored.dtype not in _DTYPES:
        raise CheckpointError(
            f"{where}: {name}",
            found=f"dtype {stored.dtype}",
            expected=f"one of {', '.join(_DTYPES)}: quantised weights are not supported",
            mend="use the weights that it was made from",
        )


def _check_shapes(stored: Names, ours: Names, files: WeightFiles, parameters: Mapping[str, Tensor]) -> None:
    """All rows together must be those of our parameters, of the same width; how they are cut is the file's affair."""
    shapes = [files.tensors[name].shape for name in stored]
    expected = (sum(parameters[name].shape[0] for name in ours), *parameters[ours[0]].shape[1:])
    for shape in shapes:
        if not shape or shape[1:] != expected[1:]:
            break
    else:
        if sum(shape[0] for shape in shapes) == expected[0]:
            return
    raise CheckpointError(
        f"{files.folder}: {' + '.join(stored)}",
        found=f"shape {' + '.join(map(str, shapes))}",
        expected=str(expected),
        mend=_OTHER_MODEL,
    )


def _copies(
    stored: Names, ours: Names, files: WeightFiles, parameters: Mapping[str, Tensor]
) -> Iterable[tuple[str, _Copy]]:
    """Which rows go where, in order; of two sequences of the same total length."""
    targets = iter(ours)
    target, start, left = "", 0, 0
    for name in stored:
        from_start, rows = 0, files.tensors[name].shape[0]
        while from_start < rows:
            if not left:
                target = next(targets)
                start, left = 0, parameters[target].shape[0]
            step = min(left, rows - from_start)
            yield name, _Copy(target, start, from_start, step)
            start, left, from_start = start + step, left - step, from_start + step


def _check_finite(tensor: Tensor, where: str) -> None:
    low, high = tensor.aminmax()  # one pass, no copy
    if not (low.isfinite() and high.isfinite()):
        raise CheckpointError(
            where,
            found=f"values from {float(low)} to {float(high)}",
            expected="finite numbers",
            mend="fetch the file again, or use an earlier checkpoint",
        )
