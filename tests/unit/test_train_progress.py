"""A bar in a terminal and lines elsewhere, never both."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest

from molmo2core.recipe.load import to_json
from molmo2core.testing.training import train_section, training_config
from molmo2core.testing.training_ranks import train_tiny

RANK = """
import json, time
from pathlib import Path

def main(arguments):
    interval = json.loads(Path(arguments[0], "section.json").read_text())["training"]["log_interval_steps"]
    print(f"a rank that prints every {interval} steps")
    with Path(arguments[0], "metrics.jsonl").open("a") as file:
        for step in (3, 4, 5):
            line = {"step": step, "loss": 7.0 / step, "waits": {"for_data": 0.5}, "time_ms": int(time.time() * 1000)}
            file.write(json.dumps(line) + chr(10))
            file.flush()
            print(f"said in step {step}")
            time.sleep(1.5 if step == 4 else 0.4)  # for a frame of that step also where cores are busy
    return 0
"""
LAUNCHER = """
import sys
from pathlib import Path
from molmo2core.launch.torchrun import run_torchrun
from molmo2core.recipe.load import from_json, to_json
from molmo2core.recipe.sections import TrainSection
from molmo2core.stages.train_progress import section_of_ranks, step_bar

folder = Path(sys.argv[1])
section = from_json((folder / "section.json").read_text(), TrainSection)
(folder / "section.json").write_text(to_json(section_of_ranks(section)))
with step_bar(folder, section) as show:
    run_torchrun("told_worker", sys.argv[1:], num_processes=1, show=show)
"""


def launched(folder: Path, *, terminal: bool) -> str:
    """What is seen of a training that goes on at step 3."""
    section = train_section(folder, training_config(steps=5))
    (folder / "section.json").write_text(to_json(section))
    old = {"step": 2, "loss": 9.0, "waits": {"for_data": 0.5}, "time_ms": int(time.time() * 1000) - 10**6}
    (folder / "metrics.jsonl").write_text(json.dumps(old) + "\n")
    (folder / "told_worker.py").write_text(RANK)
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")]), os.getcwd()]
    named = {"args": [sys.executable, "-c", LAUNCHER, str(folder)]}
    named["env"] = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    if not terminal:
        return subprocess.run(**named, capture_output=True, text=True, check=True).stdout
    ours, theirs = pty.openpty()
    process = subprocess.Popen(**named, stdout=theirs, stderr=theirs)
    os.close(theirs)
    seen = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # nobody has the other end any more
            break
        seen += part
    os.close(ours)
    assert process.wait() == 0, seen.decode()
    return seen.decode()


def test_a_terminal_gets_a_bar_and_ranks_print_no_steps(tmp_path: Path) -> None:
    """Would catch a bar that ranks draw into their pipe, lines beside it or inside of it, steps before a resume that
    count as done in no time, and a bar that ends before the last step."""
    seen = launched(tmp_path, terminal=True)
    assert "a rank that prints every 0 steps" in seen
    frames = seen.split("\r")
    assert any("sft:" in frame and "5/5" in frame and "loss 1.400, 0.50 s for data" in frame for frame in frames)
    rates = [frame for frame in frames if "4/5" in frame]
    assert any("<00:0" in frame for frame in rates), "the time left"
    for step in (3, 4, 5):
        assert any(frame.startswith(f"said in step {step}") for frame in frames)


def test_a_pipe_gets_lines_alone(tmp_path: Path) -> None:
    seen = launched(tmp_path, terminal=False)
    lines = ["a rank that prints every 10 steps", "said in step 3", "said in step 4", "said in step 5"]
    assert seen.splitlines() == lines


def test_an_interval_of_none_prints_no_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What ranks are told where there is a bar; the metrics file has every step all the same."""
    _, lines = train_tiny(tmp_path, training_config(steps=2, log_interval_steps=0))
    assert [line["step"] for line in lines] == [1, 2]
    assert "step" not in capsys.readouterr().out
