"""Whose folder a training goes on from, and who waits for whom."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from molmo2core import storage
from molmo2core.errors import DataError
from molmo2core.stages.train_resume import exclusive, resume_place, taken_up
from molmo2core.testing.training import train_section, training_config


def test_a_second_process_waits_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Would catch two that train in one folder, and one that hangs without a word for as long as the other trains."""
    inside: list[str] = []

    def second() -> None:
        with exclusive(tmp_path / "k.resume"):
            inside.append("second")

    thread = threading.Thread(target=second, daemon=True)
    with exclusive(tmp_path / "k.resume") as folder:
        assert capsys.readouterr().out == ""
        thread.start()
        printed, end = "", time.monotonic() + 30
        while "waiting" not in printed and time.monotonic() < end:
            printed += capsys.readouterr().out
            time.sleep(0.01)
        assert f"waiting for the process that trains in {folder} to end" in printed and not inside
    thread.join(30)
    assert inside == ["second"]


def test_what_was_taken_up_once_is_not_needed_again(tmp_path: Path) -> None:
    """Its folder may be removed then.  Would catch a training that is stopped by the loss of what it has no use for."""
    section = train_section(tmp_path, training_config(resume_from="old"))
    own, old = (resume_place(str(tmp_path / name)) for name in ("own", "old"))
    with pytest.raises(DataError, match="resume_from: 'old', and no checkpoint"), taken_up(section, str(tmp_path), own):
        pass

    def save(folder: Path) -> None:
        storage.commit_folder(str(folder / "ba3"), lambda _: {})

    save(old.folder)
    with taken_up(section, str(tmp_path), own) as found:
        assert found == old
    save(own.folder)
    storage.remove_folder(str(old.folder))
    with taken_up(section, str(tmp_path), own) as found:
        assert found is None
