"""errors: what a user reads first, and what crosses a process boundary."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from molmo2core.errors import (
    CheckpointError,
    DataError,
    Molmo2Error,
    PlatformError,
    RecipeError,
    exit_with_message,
)

KINDS = [RecipeError, DataError, CheckpointError, PlatformError]


@pytest.mark.parametrize("kind", KINDS)
def test_errors_survive_pickling_with_every_part(kind: type[Molmo2Error]) -> None:
    """A plain Exception with keyword arguments pickles, and fails to unpickle on the other rank."""
    error = kind("a.jsonl:3", found="points: 7", expected="at most 5", mend="drop two")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == str(error)
    assert (copy.where, copy.found, copy.expected, copy.mend) == ("a.jsonl:3", "points: 7", "at most 5", "drop two")


def test_the_message_names_place_found_expected_and_mend() -> None:
    error = DataError("a.jsonl:3", found="points: 7", expected="at most 5", mend="drop two")
    assert str(error) == "a.jsonl:3: points: 7; expected at most 5; to mend it: drop two"
    assert str(DataError("a.jsonl", found="empty")) == "a.jsonl: empty", "parts that are not there leave no trace"


def test_the_first_line_is_the_message_and_the_exit_code_says_who_can_mend(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert exit_with_message(RecipeError("r.yaml:2", found="unknown key 'sead'", expected="'seed'")) == 2
    assert capsys.readouterr().err == "RecipeError: r.yaml:2: unknown key 'sead'; expected 'seed'\n"
    assert exit_with_message(PlatformError("s3://b", found="timeout")) == 75
    assert "Traceback" not in capsys.readouterr().err


def test_an_unforeseen_error_keeps_its_stack_below_the_first_line(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        Path("there/is/no/such").read_text()
    except FileNotFoundError as error:
        code = exit_with_message(error)
    lines = capsys.readouterr().err.splitlines()
    assert code == 1
    assert lines[0].startswith("internal error: FileNotFoundError")
    assert any("test_errors.py" in line for line in lines[1:]), "without the place, nobody can report the fault"
