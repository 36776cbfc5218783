"""Ranks are started, shown, stopped and reported; none outlives its launcher."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from molmo2core.errors import DataError, PlatformError
from molmo2core.launch.torchrun import run_torchrun

WORKER = """
import os, signal, sys, time
from pathlib import Path
from molmo2core.errors import DataError

def main(arguments):
    what, folder = arguments
    rank = os.environ.get("RANK", "0")
    print(f"rank {rank} of {os.environ.get('WORLD_SIZE', '1')} node {os.environ['NODE_RANK']}")
    if what == "fail":
        if rank == "0":
            raise DataError("shard 3", found="a hole", expected="bytes", mend="build it again")
        time.sleep(60)
    if what == "memory" and rank == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "memory":
        Path(folder, "pid-" + rank).write_text(str(os.getpid()))
        time.sleep(60)
    if what == "crash":
        print("the last words")
        os._exit(9)
    if what == "wait":
        def stop(number, frame):
            Path(folder, "stopped-" + rank).touch()
            sys.exit(0)
        signal.signal(signal.SIGTERM, stop)
        Path(folder, "pid-" + rank).write_text(str(os.getpid()))
        time.sleep(60)
    return 0
"""
LAUNCHER = """
import sys
from molmo2core.launch.torchrun import run_torchrun
run_torchrun("launched_worker", ["wait", sys.argv[1]], num_processes=int(sys.argv[2]))
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Finds the worker module."""
    (tmp_path / "launched_worker.py").write_text(textwrap.dedent(WORKER))
    return {"PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])}


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_run_and_are_shown(
    tmp_path: Path, environment: dict[str, str], capsys: pytest.CaptureFixture[str], ranks: int
) -> None:
    """NODE_RANK is there, which torchrun forgets and Composer demands."""
    run_torchrun("launched_worker", ["succeed", str(tmp_path)], num_processes=ranks, environment=environment)
    shown = capsys.readouterr().out
    assert all(f"rank {rank} of {ranks} node 0" in shown for rank in range(ranks))


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_first_ranks_error_is_raised(tmp_path: Path, environment: dict[str, str], ranks: int) -> None:
    """Would catch an error that arrives as torchrun's report, and ranks that wait for the failed one forever."""
    with pytest.raises(DataError, match="shard 3: a hole; expected bytes; to mend it: build it again"):
        run_torchrun("launched_worker", ["fail", str(tmp_path)], num_processes=ranks, environment=environment)


def test_a_crash_carries_the_last_lines(tmp_path: Path, environment: dict[str, str]) -> None:
    with pytest.raises(PlatformError, match=r"(?s)exit code 9.*the last words"):
        run_torchrun("launched_worker", ["crash", str(tmp_path)], num_processes=1, environment=environment)


def test_a_rank_that_is_killed_for_memory_ends_the_others(tmp_path: Path, environment: dict[str, str]) -> None:
    """The kernel kills one rank when memory runs out.  Would catch ranks that wait in a collective until its timeout,
    and a failure that does not say that a retry helps."""
    started = time.monotonic()
    with pytest.raises(PlatformError, match=r"(?s)a rank ended with .*memory ran out") as error:
        run_torchrun("launched_worker", ["memory", str(tmp_path)], num_processes=2, environment=environment)
    assert time.monotonic() - started < 50 and error.value.exit_code == 75
    file = tmp_path / "pid-0"
    assert not file.exists() or not is_running(int(file.read_text()))


@pytest.mark.parametrize(
    ("ranks", "how"), [(1, signal.SIGKILL), (2, signal.SIGKILL), (1, signal.SIGTERM), (2, signal.SIGTERM)]
)
def test_no_rank_outlives_its_launcher(
    tmp_path: Path, environment: dict[str, str], ranks: int, how: signal.Signals
) -> None:
    """After SIGKILL of the launcher alone, torchrun's ranks would train on as orphans; SIGTERM reaches each rank, but
    not torchrun's agent, which kills ranks that are not done with their step and checkpoint after 30 s."""
    with (tmp_path / "shown").open("w") as shown:
        launcher = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, str(tmp_path), str(ranks)],
            env=os.environ | environment,
            stdout=shown,
            stderr=subprocess.PIPE,
            text=True,
        )
    files = [tmp_path / f"pid-{rank}" for rank in range(ranks)]
    assert wait_for(lambda: all(file.exists() and file.read_text() for file in files))
    pids = [int(file.read_text()) for file in files]
    assert all(map(is_running, pids))
    launcher.send_signal(how)
    assert wait_for(lambda: not any(map(is_running, pids)), 45)
    _, error = launcher.communicate(timeout=45)
    stopped = [tmp_path / f"stopped-{rank}" for rank in range(ranks)]
    if how == signal.SIGTERM:
        assert all(file.exists() for file in stopped)
        assert "PlatformError" in error and "stopped by SIGTERM" in error
        said = (tmp_path / "shown").read_text()
        assert "rank 0" in said and "closing signal" not in said, "the agent's words when it begins to count"
    else:
        assert not any(file.exists() for file in stopped)
