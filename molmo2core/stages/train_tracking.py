"""Follows the metrics that rank 0 writes into an MLflow run.

All of it happens in a thread of the launching process: a tracking store that is slow, down or broken costs warnings,
never the training.  Once it answers, the curve is sent from its beginning: MLflow keeps one of equal points.  If it
does not, the committed checkpoint holds every step's metrics anyway.
"""

from __future__ import annotations

import json
import os
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molmo2core.loading.deviations import CHANGED_DATA, DEVIATIONS
from molmo2core.recipe.load import flatten
from molmo2core.recipe.sections import TrainSection
from molmo2core.references import PackPlanRef, Reference, ShardsRef
from molmo2core.stages.train_rank import METRICS
from molmo2core.stages.train_upload import UPLOADS
from molmo2core.training.checkpoint_folders import SAVES
from molmo2core.training.page import PAGE, training_page
from molmo2core.training.refused_steps import REFUSED
from molmo2core.training.validation_files import PAGES, VALIDATION

if TYPE_CHECKING:
    from molmo2core.tracking.mlflow_run import TrackedRun

_POLL_SECONDS = 1.0
_PATIENCE_SECONDS = 60.0
"""How long the end of training waits for the store to take what is left."""
_RETRY_SECONDS = (30.0, 960.0)
"""After a failure of the store, and the longest; each wait is twice the one before."""
_TAG_CHARACTERS = 4000


@contextmanager
def following(
    folder: Path, section: TrainSection, *, key: str, inputs: Sequence[Reference], changeable: Sequence[str] = ()
) -> Iterator[None]:
    """Forward the metrics in `folder` while the body runs; the run ends FINISHED or, if the body raises, FAILED.

    Args:
        key: of the training, by which a retry finds the run.
        inputs: plan and base.
        changeable: fields of TrainingConfig that may be others in a retry.  They are tags: MLflow's parameters are for
            ever.
    """
    follower = _Follower(folder, section, key, inputs, changeable)
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
    def __init__(
        self, folder: Path, section: TrainSection, key: str, inputs: Sequence[Reference], changeable: Sequence[str]
    ) -> None:
        super().__init__(name="metrics", daemon=True)
        self.folder, self.section, self.key, self.inputs = folder, section, key, inputs
        self.changeable = changeable
        self.done = threading.Event()
        self.succeeded = False
        self._start_over()

    def _start_over(self) -> None:
        """Nothing is known to be in the store."""
        folder = self.folder
        self._lines = GrowingLines(folder / METRICS)
        self._saves = {"save": GrowingLines(folder / SAVES), "upload": GrowingLines(folder / UPLOADS)}
        self._drawn: Counter[str] = Counter()
        self._counted_step = self._sent_step = 0
        self._validations = GrowingLines(folder / VALIDATION)
        self._validated_step = 0
        self._sent_pages: set[str] = set()

    def run(self) -> None:
        wait, longest = _RETRY_SECONDS
        while True:
            last = self.done.is_set()
            try:
                self._follow()
            except _BodyFailed:
                return
            except Exception as error:  # whatever it is, it is not the training's
                print(f"warning: training is not tracked in MLflow ({type(error).__name__}: {error})", flush=True)
            else:
                return
            if last:
                return
            self.done.wait(wait)
            wait = min(2 * wait, longest)
            self._start_over()

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
            settings = flatten(section.training)
            changeable = {name for name in settings if name.partition(".")[0] in self.changeable}
            fixed = {name: value for name, value in settings.items() if name not in changeable}
            run.log_params(fixed | {"seed": section.seed, "stage": section.stage})
            run.set_tags({f"training.{name}": json.dumps(settings[name]) for name in changeable})
            for reference in self.inputs:
                if isinstance(reference, PackPlanRef):
                    run.log_metrics(plan_metrics(reference))
                for shards in reference.parents if isinstance(reference, PackPlanRef) else ():
                    if isinstance(shards, ShardsRef):
                        run.log_dataset(shards.dataset, shards.digest, shards.uri, "training")
            finished = False
            while not finished:
                finished = self.done.wait(_POLL_SECONDS)  # then once more, for the last lines
                for line, drawn in self._new_lines():
                    run.log_metrics(flat_metrics(line, drawn), line["step"], line["time_ms"])
                self._send_validations(run)
                self._send_saves(run)
            self._send_deviations(run)
            self._send_page(run)
            if not self.succeeded:
                raise _BodyFailed

    def _new_lines(self) -> list[tuple[dict[str, Any], dict[str, int]]]:
        """Every log interval's line and the last, with the examples drawn since step 0, since the last call.

        Steps that a resumed training does again come with the same step number and the same content, and are neither
        sent nor counted twice.
        """
        interval, last = self.section.training.log_interval_steps, self.section.training.steps
        found = []
        for line in self._lines.new():
            step = line["step"]
            if step > self._counted_step:
                self._counted_step = step
                self._drawn.update(line["drawn"])
            if step > self._sent_step and (step % interval == 0 or step == last):
                self._sent_step = step
                found.append((line, dict(self._drawn)))
        return found

    def _send_validations(self, run: TrackedRun) -> None:
        """Losses on held-out examples, and pages of answers, which appear whole."""
        for line in self._validations.new():
            if line["step"] > self._validated_step:
                self._validated_step = line["step"]
                run.log_metrics(validation_metrics(line), line["step"], line["time_ms"])
        for page in sorted((self.folder / PAGES).glob("step-*.html")):
            if page.name not in self._sent_pages:
                self._sent_pages.add(page.name)
                run.log_artifact(page, PAGES)

    def _send_saves(self, run: TrackedRun) -> None:
        """`save/seconds`, `save/bytes` and `save/failed` (0 or 1), and the same of copies to the store."""
        for name, lines in self._saves.items():
            for line in lines.new():
                numbers = {"seconds": line["seconds"], "bytes": line["bytes"], "failed": float(bool(line["problem"]))}
                run.log_metrics({f"{name}/{key}": number for key, number in numbers.items()}, line["step"])

    def _send_page(self, run: TrackedRun) -> None:
        """Curves of all steps, and the packs of a step that was refused."""
        metrics, validations = (list(GrowingLines(self.folder / name).new()) for name in (METRICS, VALIDATION))
        if metrics:
            title = f"{self.section.run_name}, {self.section.stage}"
            run.log_text(training_page(title, metrics, validations), PAGE)
        for refused in sorted(self.folder.glob(REFUSED.format("*"))):
            run.log_artifact(refused)

    def _send_deviations(self, run: TrackedRun) -> None:
        """The list as an artifact; a resume on other data also as a tag, where people look first."""
        lines = list(GrowingLines(self.folder / DEVIATIONS).new())
        if not lines:
            return
        run.log_artifact(self.folder / DEVIATIONS)
        changed = [
            f"step {line['step']}: {', '.join(line['changes'])}" for line in lines if line["kind"] == CHANGED_DATA
        ]
        if changed:
            run.set_tags({"data_changed": "; ".join(changed)[:_TAG_CHARACTERS]})


def plan_metrics(plan: PackPlanRef) -> dict[str, float]:
    """`plan/examples_per_pack`, `plan/token_fill` and so on, from the report of the stage that made the plan."""
    metrics: dict[str, float] = plan.report.get("metrics", {})
    return {f"plan/{name}": value for name, value in metrics.items()}


def validation_metrics(line: dict[str, Any]) -> dict[str, float]:
    """`validation/loss`, `validation/<dataset>/loss`, `validation/loss_by_task/<task>` and so on.

    Args:
        line: of training.callbacks.validation_file.
    """
    metrics = {f"validation/{name}": line[name] for name in ("loss", "z", "examples", "seconds")}
    metrics |= {f"validation/{dataset}/loss": loss for dataset, loss in line["loss_by_dataset"].items()}
    return metrics | {f"validation/loss_by_task/{task}": loss for task, loss in line["loss_by_task"].items()}


class GrowingLines:
    """The JSON lines of a file that another process appends to, or replaces by a shorter one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._inode, self._offset = 0, 0

    def new(self) -> Iterator[dict[str, Any]]:
        """Whole lines since the last call; all of them after the file was replaced."""
        if not self.path.is_file():
            return
        with self.path.open("rb") as file:
            found = os.fstat(file.fileno())
            if found.st_ino != self._inode or found.st_size < self._offset:
                self._inode, self._offset = found.st_ino, 0
            file.seek(self._offset)
            for text in file:
                if not text.endswith(b"\n"):
                    return  # still being written
                self._offset += len(text)
                yield json.loads(text)


def flat_metrics(line: dict[str, Any], drawn: dict[str, int]) -> dict[str, float]:
    """`learning_rate/decoder` and so on; step and time are the point's place, not its value.

    Args:
        line: of a metrics file.
        drawn: examples by dataset since step 0, of which the proportions really drawn are `drawn/<dataset>`.
    """
    metrics: dict[str, float] = {}
    for name, value in line.items():
        if name == "drawn":
            metrics |= {f"drawn/{dataset}": count / sum(drawn.values()) for dataset, count in drawn.items()}
        elif isinstance(value, dict):
            metrics |= {f"{name}/{group}": number for group, number in value.items()}
        elif name not in ("step", "time_ms"):
            metrics[name] = value
    return metrics | {"examples_per_pack": line["examples"] / line["packs"]}
