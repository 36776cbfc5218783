"""Writes what happened at each step, for the process that follows training and for the person who watches."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composer import Callback
from composer.utils import dist

from molmo2core import storage
from molmo2core.training.callbacks.group_clipping import GroupClipping

if TYPE_CHECKING:
    from composer import Logger, State

    from molmo2core.training.callbacks.step_record import StepRecord


class MetricsFile(Callback):  # type: ignore[misc]
    """Rank 0 appends one JSON line per step, and prints a line now and then.

    Fields: `step`, `loss` (cross-entropy), `z`, `learning_rate` and `gradient_norm` by group, those of
    StepRecord.line, and `time_ms` at the step's end.  docs/training.md has a table of all.

    Args:
        record: a callback that comes before this one.
        print_interval: steps between printed lines; 0 prints none.
    """

    def __init__(
        self,
        path: Path,
        *,
        clipping: GroupClipping,
        record: StepRecord,
        steps: int,
        print_interval: int,
        name: str,
    ) -> None:
        self.path, self.clipping, self.steps, self.name = path, clipping, steps, name
        self.record, self.print_interval = record, print_interval
        self._is_writing = False
        self._started = 0.0
        self._first_step = 0

    def fit_start(self, state: State, logger: Logger) -> None:
        """Drop the lines of steps that a killed run did after its last checkpoint; they will be done again."""
        self._started = time.monotonic()
        self._first_step = int(state.timestamp.batch.value)
        if dist.get_global_rank() == 0:
            kept = [line for line in read_metrics(self.path) if line["step"] <= self._first_step]
            content = "".join(json.dumps(line) + "\n" for line in kept)
            storage.write_bytes(str(self.path), content.encode())
            self._is_writing = True

    def batch_end(self, state: State, logger: Logger) -> None:
        """One line.

        Raises:
            PlatformError: the disk is full.
        """
        if not self._is_writing:
            return
        now = time.monotonic()
        step = int(state.timestamp.batch.value)
        line = {
            "step": step,
            "loss": state.total_loss_dict["loss/train/cross_entropy"],
            "z": state.total_loss_dict["loss/train/z"],
            "learning_rate": {group["name"]: group["lr"] for group in state.optimizers[0].param_groups},
            "gradient_norm": dict(self.clipping.norms),
            **self.record.line,
            "time_ms": int(time.time() * 1000),
        }
        storage.append_text(self.path, json.dumps(line) + "\n")
        if self.print_interval and (step % self.print_interval == 0 or step == self.steps):
            pace = (now - self._started) / (step - self._first_step)
            left = int(pace * (self.steps - step))
            print(
                f"{self.name}: step {step}/{self.steps}  loss {line['loss']:.3f}  {pace:.2f} s/step, "
                f"{line['waits']['for_data']:.2f} for data  {line['examples'] / line['packs']:.1f} examples/pack  "
                f"tokens {line['fill']['tokens']:.0%}, crops {line['fill']['crops']:.0%}  "
                f"{left // 60}:{left % 60:02d} left",
                flush=True,
            )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line that a killed run left unfinished is left out."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines
