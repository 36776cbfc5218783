"""Follows the metrics that rank 0 writes into an MLflow run.

All of it happens in a thread of the launching process: a tracking store that is slow, down or broken costs the
curve in MLflow and a warning, never the training; the committed checkpoint holds every step's metrics anyway.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from molmo2core.recipe.load import flatten
from molmo2core.recipe.sections import TrainSection
from molmo2core.references import PackPlanRef, Reference, ShardsRef

_POLL_SECONDS = 1.0
_PATIENCE_SECONDS = 60.0
"""How long the end of training waits for the store to take what is left."""


@contextmanager
def following(path: Path, section: TrainSection, *, key: str, inputs: Sequence[Reference]) -> Iterator[None]:
    """Forward the lines of `path` while the body runs; the run ends FINISHED or, if the body raises, FAILED."""
    follower = _Follower(path, section, key, inputs)
    follower.start()
    try:
        yield
        follower.succeeded = True
    finally:
        follower.done.set()
        follower.join(_PATIENCE_SECONDS)
        if follower.is_alive():
            print("warning: MLflow does not answer; its curve of this training is incomplete", flush=True)


class _BodyFailed(Exception):
    """Makes open_run end the run as FAILED."""


class _Follower(threading.Thread):
    def __init__(self, path: Path, section: TrainSection, key: str, inputs: Sequence[Reference]) -> None:
        super().__init__(name="metrics", daemon=True)
        self.path, self.section, self.key, self.inputs = path, section, key, inputs
        self.done = threading.Event()
        self.succeeded = False
        self._step = 0

    def run(self) -> None:
        try:
            self._follow()
        except _BodyFailed:
            pass
        except Exception as error:  # whatever it is, it is not the training's
            print(f"warning: training is not tracked in MLflow ({type(error).__name__}: {error})", flush=True)

    def _follow(self) -> None:
        from molmo2core.tracking.mlflow_run import open_run, tracking_uri

        section = self.section
        tags = {"stage": section.stage, "recipe_fingerprint": section.recipe_fingerprint}
        with open_run(
            tracking_uri(section.tracking, section.workspace),
            section.tracking.experiment,
            f"{section.run_name}-{section.stage}",
            f"train-{section.stage}-{self.key}",
            tags,
        ) as run:
            run.log_params(flatten(section.training) | {"seed": section.seed, "stage": section.stage})
            for reference in self.inputs:
                for shards in reference.parents if isinstance(reference, PackPlanRef) else ():
                    if isinstance(shards, ShardsRef):
                        run.log_dataset(shards.dataset, shards.digest, shards.uri, "training")
            finished = False
            while not finished:
                finished = self.done.wait(_POLL_SECONDS)  # then once more, for the last lines
                for line in self._new_lines():
                    run.log_metrics(_flat(line), line["step"], line["time_ms"])
            if not self.succeeded:
                raise _BodyFailed

    def _new_lines(self) -> list[dict[str, Any]]:
        """Every log interval's line and the last, from where the last call ended.

        Steps that a resumed training does again come with the same step number and are not sent twice.
        """
        interval, last = self.section.training.log_interval_steps, self.section.training.steps
        found = []
        for text in self.path.read_text().splitlines() if self.path.is_file() else ():
            try:
                line = json.loads(text)
            except ValueError:
                break  # still being written
            if line["step"] > self._step and (line["step"] % interval == 0 or line["step"] == last):
                found.append(line)
                self._step = line["step"]
        return found


def _flat(line: dict[str, Any]) -> dict[str, float]:
    """`learning_rate/decoder` and so on; step and time are the point's place, not its value."""
    metrics: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, dict):
            metrics |= {f"{name}/{group}": number for group, number in value.items()}
        elif name not in ("step", "time_ms"):
            metrics[name] = value
    return metrics
