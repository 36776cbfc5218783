"""A progress bar for a person at a terminal; anywhere else ranks print lines of steps (callbacks/metrics_file.py).

Only this process, which starts the ranks, has the terminal: they write into a pipe.  So it draws the bar, from the
metrics that they write, and prints what they say above it.
"""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from molmo2core.launch.torchrun import show_line
from molmo2core.recipe.sections import TrainSection
from molmo2core.stages.train_rank import METRICS
from molmo2core.stages.train_tracking import GrowingLines

_POLL_SECONDS = 0.25


def section_of_ranks(section: TrainSection) -> TrainSection:
    """What ranks are given: where there is a bar, they print no lines of steps."""
    if not sys.stdout.isatty():
        return section
    return replace(section, training=replace(section.training, log_interval_steps=0))


@contextmanager
def step_bar(folder: Path, section: TrainSection) -> Iterator[Callable[[str], None]]:
    """Draw a bar while the body runs, if standard output is a terminal; yields what prints a line above it."""
    if not sys.stdout.isatty():
        yield show_line
        return
    columns, rows = shutil.get_terminal_size()  # 80 x 24 for one of 0 x 0, as in containers, where tqdm shows nothing
    steps, name = section.training.steps, section.stage
    bar = tqdm(total=steps, desc=name, unit="step", file=sys.stdout, ncols=columns, nrows=rows)
    painter = _Painter(bar, GrowingLines(folder / METRICS))
    painter.start()
    try:
        yield lambda line: tqdm.write(line, file=sys.stdout, end="")
    finally:
        painter.done.set()
        painter.join()
        bar.close()


class _Painter(threading.Thread):
    def __init__(self, bar: tqdm, lines: GrowingLines) -> None:
        super().__init__(name="progress bar", daemon=True)
        self.done = threading.Event()
        self._bar, self._lines = bar, lines
        self._started_ms = int(time.time() * 1000)
        self._is_measured = False
        """Whether a step of this run is done.  The first one pays for the start, and those before a resume are no
        measure: the time left follows from the steps after it."""

    def run(self) -> None:
        finished = False
        while not finished:
            finished = self.done.wait(_POLL_SECONDS)  # then once more, for the last lines
            for line in self._lines.new():
                self._bar.set_postfix_str(
                    f"loss {line['loss']:.3f}, {line['waits']['for_data']:.2f} s for data", refresh=False
                )
                if self._is_measured:
                    self._bar.update(line["step"] - self._bar.n)
                    continue
                self._bar.initial = self._bar.n = line["step"]
                self._bar.unpause()
                self._bar.refresh()
                self._is_measured = line["time_ms"] >= self._started_ms
