"""Starts the ranks of one node, shows their output, stops them with this process, and raises their error."""

from __future__ import annotations

import collections
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO

from molmo2core.errors import PlatformError
from molmo2core.launch import child

LOG_LINES = 30
"""Last lines of output that an error carries when no rank could name its cause."""


def show_line(line: str) -> None:
    """Print a line of the ranks' output, which has its end, at once."""
    sys.stdout.write(line)
    sys.stdout.flush()


def run_torchrun(
    module: str,
    arguments: Sequence[str],
    *,
    num_processes: int,
    environment: Mapping[str, str] | None = None,
    show: Callable[[str], None] = show_line,
) -> None:
    """Run `module`'s `main(arguments) -> int` on `num_processes` ranks of this machine and wait for them.

    One rank runs as a plain process, several under torchrun.  SIGTERM and SIGINT are passed on to the ranks as SIGTERM,
    and their graceful end is awaited, however long it takes: torchrun's agent, were it told, would kill them after
    30 s.  Killed with SIGKILL, this process takes all ranks along.

    Args:
        environment: added to this process's environment.
        show: prints a line of the ranks' output.

    Raises:
        Molmo2Error: the error that the first failing rank raised.
        PlatformError: ranks ended with a failure that none of them could name, or were stopped by a signal.
    """
    command = [sys.executable, "-m", "molmo2core.launch.child"]
    if num_processes > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
        command += ["-m", "molmo2core.launch.child"]
    with tempfile.TemporaryDirectory(prefix="molmo2-ranks-") as folder:
        error_file = os.path.join(folder, "error.json")
        process = subprocess.Popen(
            [*command, module, *arguments],
            env={
                **os.environ,
                **(environment or {}),
                child.PARENT_VARIABLE: str(os.getpid()),
                child.ERROR_VARIABLE: error_file,
                "PYTHONUNBUFFERED": "1",
                # Threads that spin while they wait make a step ten times slower once another process wants the cores.
                "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
                "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),  # torchrun warns; ranks set their own
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C in a terminal reaches this process alone, not the agent or loader workers
        )
        assert process.stdout is not None
        with _passed_on_signals(process, num_processes) as received, process.stdout:
            tail = _echo(process.stdout, show)
            code = process.wait()
        error = child.read_error(error_file)
        if error is not None:
            raise error
        if received:
            raise PlatformError(
                module, found=f"stopped by {signal.Signals(received[0]).name}", mend="run it again to continue"
            )
        if code:
            was_killed = code == -signal.SIGKILL or "exitcode: -9)" in tail  # torchrun's words
            mend = "run it again" + ("; if memory ran out (SIGKILL), give it more" if was_killed else "")
            raise PlatformError(module, found=f"a rank ended with {_name(code)}; its last lines:\n{tail}", mend=mend)


def _echo(stream: IO[str], show: Callable[[str], None]) -> str:
    tail: collections.deque[str] = collections.deque(maxlen=LOG_LINES)
    for line in stream:
        show(line)
        tail.append(line)
    return "".join(tail).rstrip()


def _name(code: int) -> str:
    return f"exit code {code}" if code > 0 else signal.Signals(-code).name


def _children(pid: int) -> list[int]:
    """Processes that the main thread of `pid` has started (Linux; elsewhere none are known)."""
    with suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


@contextmanager
def _passed_on_signals(process: subprocess.Popen[str], num_processes: int) -> Iterator[list[int]]:
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield received
        return

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if process.poll() is not None:
            return
        ranks = _children(process.pid) if num_processes > 1 else []
        for pid in ranks or [process.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    Handler = Callable[[int, FrameType | None], object] | int | None
    before: dict[signal.Signals, Handler] = {
        number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
