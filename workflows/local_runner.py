"""KFP's local runner with our output: stages' own lines as they come, KFP's in a log file, failures by their message.

Two functions of kfp 2.17 are replaced while a pipeline runs (tests/workflows/test_local_runner.py shows why, and
notices when they change): KFP offers no hook for a task's output and loses its exit code; and it puts the loop's item
in the place of every other step's output parameter that enters a loop.
"""

import contextlib
import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import psutil
from kfp import local
from kfp.local import subprocess_task_handler
from kfp.local.orchestrator import task_spec_utils

REPOSITORY = Path(__file__).resolve().parents[1]
_MESSAGE = re.compile(r"(RecipeError|DataError|CheckpointError|PlatformError|internal error): ")
_ENVIRONMENT = {
    "PYTHONUNBUFFERED": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "GX_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
"""For the steps; what the user has set stands."""


class TaskFailed(Exception):
    """A pipeline step exited with an error."""

    def __init__(self, task: str, exit_code: int, message: str) -> None:
        super().__init__(f"{task}: {message}")
        self.task, self.exit_code, self.message = task, exit_code, message


@dataclass
class LocalRun:
    """What a finished local run leaves for the closing table."""

    folder: Path
    """`<pipeline root>/<pipeline>-<time>`, with one folder per task."""
    log: Path
    seconds: float = 0.0
    peak_bytes: int = 0
    """Largest memory of the whole process tree, shared pages counted once per sharer's part (PSS)."""


@dataclass
class _Terminal:
    """Writes whole lines from several tasks at a time, to the user and to the log."""

    screen: TextIO
    log: TextIO
    lock: threading.Lock = field(default_factory=threading.Lock)
    failures: list[TaskFailed] = field(default_factory=list)

    def show(self, line: str) -> None:
        with self.lock:
            self.screen.write(line + "\n")  # not print: KFP patches it to indent
            self.screen.flush()
            self.log.write(line + "\n")
            self.log.flush()

    def note(self, line: str) -> None:
        with self.lock:
            self.log.write(line + "\n")


def run_pipeline(pipeline: Callable[..., Any], arguments: Mapping[str, Any], *, root: Path) -> LocalRun:
    """Run a pipeline with kfp.local in this environment.

    Args:
        pipeline: a `@dsl.pipeline`.
        arguments: its parameters.
        root: where KFP keeps the tasks' outputs; `run.log` beside them has everything.

    Raises:
        TaskFailed: a step failed; the first one whose message is known.
    """
    root.mkdir(parents=True, exist_ok=True)
    before = set(root.iterdir())
    start = time.monotonic()
    with (root / "run.log").open("w") as log, _peak_memory() as peak, _environment():
        terminal = _Terminal(sys.stdout, log)
        with _our_functions(terminal), contextlib.redirect_stdout(log), _root_logger(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # images without "python" in their name, resources that mean nothing here
            local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(root), raise_on_error=True)
            try:
                pipeline(**arguments)
            except RuntimeError:
                if terminal.failures:
                    raise _first_known(terminal.failures) from None
                raise
    made = [path for path in root.iterdir() if path.is_dir() and path not in before]
    return LocalRun(max(made), root / "run.log", time.monotonic() - start, peak[0])


def _first_known(failures: list[TaskFailed]) -> TaskFailed:
    return next((failure for failure in failures if failure.message), failures[0])


@contextlib.contextmanager
def _our_functions(terminal: _Terminal) -> Iterator[None]:
    subprocesses, loops = (
        subprocess_task_handler.run_local_subprocess,
        task_spec_utils.create_parameter_loop_iteration_task_spec,
    )

    def run_local_subprocess(full_command: list[str], env_vars: dict[str, str] | None = None) -> int:
        return _run_task(full_command, env_vars or {}, terminal)

    def create_parameter_loop_iteration_task_spec(original_task_spec: Any, loop_item: Any, loop_task_name: str) -> Any:
        spec = loops(original_task_spec, loop_item, loop_task_name)
        items = original_task_spec.parameter_iterator.items.input_parameter
        for name, given in original_task_spec.inputs.parameters.items():
            if name != items and given.HasField("task_output_parameter"):
                spec.inputs.parameters[name].CopyFrom(given)
        return spec

    subprocess_task_handler.run_local_subprocess = run_local_subprocess
    task_spec_utils.create_parameter_loop_iteration_task_spec = create_parameter_loop_iteration_task_spec
    try:
        yield
    finally:
        subprocess_task_handler.run_local_subprocess = subprocesses
        task_spec_utils.create_parameter_loop_iteration_task_spec = loops


def _run_task(command: list[str], variables: dict[str, str], terminal: _Terminal) -> int:
    """Run one task's process; stream its lines; return its exit code."""
    task, start, message = task_label(command), time.monotonic(), ""
    terminal.show(f"{task}: started")
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        bufsize=1,
        env={**os.environ, **variables},
    ) as process:
        assert process.stdout is not None
        for line, ours in without_executor_noise(line.rstrip("\n") for line in process.stdout):
            (terminal.show if ours and line.strip() else terminal.note)(f"  {task} | {line}")
            if ours and not message and _MESSAGE.match(line):
                message = line
        code = process.wait()
    seconds = time.monotonic() - start
    terminal.show(f"{task}: {'done' if code == 0 else f'failed (exit code {code})'} after {seconds:.1f} s")
    if code != 0:
        terminal.failures.append(TaskFailed(task, code, message))
    return code


def task_label(command: list[str]) -> str:
    """Name of a task for people: its component and what it works on, e.g. `train.sft` or `build_shards.tracking`."""
    name = command[command.index("--function_to_execute") + 1]
    inputs = json.loads(command[command.index("--executor_input") + 1]).get("inputs", {})
    parameters = inputs.get("parameterValues", {})
    suffix = parameters.get("dataset", "")
    with contextlib.suppress(ValueError, AttributeError):
        suffix = suffix or json.loads(parameters.get("section", "")).get("stage", "")
    return f"{name}.{suffix}" if suffix else name


def without_executor_noise(lines: Iterator[str]) -> Iterator[tuple[str, bool]]:
    """Each line, and whether it is a stage's own (False: KFP's executor, which prints its whole input as JSON)."""
    inside_input = False
    for line in lines:
        if inside_input:
            inside_input = line != "}"
            yield line, False
        else:
            executor = line.startswith("[KFP Executor ")
            inside_input = executor and line.endswith("Got executor_input:")
            yield line, not executor


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """The steps find this repository's molmo2core, and libraries neither phone home nor fight over threads."""
    before = dict(os.environ)
    os.environ.update({name: value for name, value in _ENVIRONMENT.items() if name not in before})
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), before.get("PYTHONPATH")]))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _root_logger() -> Iterator[None]:
    """KFP swaps the root logger's handlers from two threads at once and can leave one that writes into our log."""
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    try:
        yield
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers


@contextlib.contextmanager
def _peak_memory(interval_seconds: float = 1.0) -> Iterator[list[int]]:
    """Sample the memory of this process and all below it; the largest sum lands in the list."""
    peak, stop, own = [0], threading.Event(), psutil.Process()

    def sample() -> None:
        while not stop.wait(interval_seconds):
            total = 0
            for process in (own, *own.children(recursive=True)):
                with contextlib.suppress(psutil.Error):
                    info = process.memory_full_info()
                    total += getattr(info, "pss", info.rss)
            peak[0] = max(peak[0], total)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()
