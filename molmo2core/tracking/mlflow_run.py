"""MLflow runs: where the tracking store is, and one run per stage that a retry finds again.

Only this package imports mlflow, inside functions: the import takes seconds.  Facts and traps:
mlflow_gx_mds_s3.md 1.2-1.5.

Tags that this module gives meaning to: `molmo2core.key` (what the run is about; a retry with the same key reopens the
run) and `molmo2core.attempt` (how often that happened).
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shlex
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import time
from typing import TYPE_CHECKING

from molmo2core.errors import PlatformError, RecipeError
from molmo2core.storage import is_remote
from molmo2core.tracking.config import TrackingConfig

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

KEY_TAG = "molmo2core.key"
ATTEMPT_TAG = "molmo2core.attempt"
_URI_VARIABLE = "MLFLOW_TRACKING_URI"
_SQLITE = "sqlite:///"
_DATASET_DIGEST_LENGTH = 32  # MLflow's column holds 36; the whole sha256 goes into a tag
_METRICS_PER_REQUEST = 1000
_DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_TRUNCATE_LONG_VALUES": "false",  # else long parameters are cut without a word
    "MLFLOW_UV_AUTO_DETECT": "false",  # else a model's requirements come from whatever lock file lies around
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",  # a bar per kilobyte
}


def tracking_uri(config: TrackingConfig, workspace: str) -> str:
    """The tracking store: `config.uri`, else `MLFLOW_TRACKING_URI`, else sqlite in `<workspace>/mlflow`.

    Raises:
        RecipeError: nothing is set and the workspace is an object store, on which sqlite cannot live.
    """
    found = config.uri or os.environ.get(_URI_VARIABLE, "")
    if found:
        return found
    if is_remote(workspace):
        raise RecipeError(
            "tracking.uri",
            found="not set, and the workspace is an object store",
            expected="the address of an MLflow server",
            mend="set tracking.uri or MLFLOW_TRACKING_URI",
        )
    return f"{_SQLITE}{Path(workspace).resolve()}/mlflow/mlflow.db"


def sqlite_path(uri: str) -> Path | None:
    """The database file of a sqlite store; None for a server."""
    return Path(uri.removeprefix(_SQLITE)).resolve() if uri.startswith(_SQLITE) else None


def ui_command(uri: str) -> str:
    """What a person types, or where a person looks, to see the runs."""
    return f"mlflow ui --backend-store-uri {shlex.quote(uri)}" if sqlite_path(uri) else uri


def connect(uri: str) -> MlflowClient:
    """A client of the store at `uri`; a sqlite store is created first, once and whole.

    MLflow's own creation takes seconds and no lock: several processes break each other's, and a killed one leaves a
    broken file.  So the file is made beside its place, under a lock, and renamed.
    """
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    from mlflow.tracking import MlflowClient

    database = sqlite_path(uri)
    if database is not None:
        _create_sqlite(database)
    # Without registry_uri, the registry is wherever MLFLOW_REGISTRY_URI or an earlier set_registry_uri points.
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


@contextmanager
def tracking_errors(uri: str) -> Iterator[None]:
    """Whatever MLflow raises, as a PlatformError that names the store."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        raise PlatformError(uri, found=f"MLflow: {error}", mend="check that the tracking store is up") from error
    except OSError as error:  # from copying an artifact: MLflow wraps the errors of its database only
        mend = "check that the tracking store is up and its artifact store has space"
        raise PlatformError(uri, found=f"MLflow: {error}", mend=mend) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without MLflow's advice on things that are as they are on purpose; its errors are still seen."""
    logger = logging.getLogger("mlflow")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def as_default(uri: str) -> Iterator[None]:
    """Make `uri` MLflow's process-wide store, for the few calls that ask no client; then undo it.

    Setting it also writes MLFLOW_TRACKING_URI, which would later look like the user's choice.
    """
    import mlflow

    before = os.environ.get(_URI_VARIABLE)
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(None)
        if before is not None:
            os.environ[_URI_VARIABLE] = before


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """An open MLflow run."""

    client: MlflowClient
    uri: str
    run_id: str
    experiment_id: str

    def log_params(self, params: Mapping[str, object]) -> None:
        """Log parameters.  They are immutable: a retry may log the same again, another value is an error."""
        from mlflow.entities import Param

        with tracking_errors(self.uri):
            self.client.log_batch(self.run_id, params=[Param(name, _text(value)) for name, value in params.items()])

    def log_metrics(
        self,
        metrics: Mapping[str, float],
        step: int = 0,
        timestamp_ms: int | None = None,
        model_id: str | None = None,
    ) -> None:
        """Log metrics of one step.

        Args:
            metrics: name -> value; names may hold letters, digits, `_ - . / :` and spaces.
            step: global training step.
            timestamp_ms: when it was measured.  Give it when metrics are replayed from a file: MLflow keeps only one
                of points with equal name, step, time and value.
            model_id: the logged model that they describe, if any.
        """
        from mlflow.entities import Metric

        moment = int(time() * 1000) if timestamp_ms is None else timestamp_ms
        points = [Metric(name, float(value), moment, step, model_id=model_id) for name, value in metrics.items()]
        with tracking_errors(self.uri):
            for start in range(0, len(points), _METRICS_PER_REQUEST):
                self.client.log_batch(self.run_id, metrics=points[start : start + _METRICS_PER_REQUEST])

    def log_dataset(
        self, name: str, digest: str, uri: str, context: str, tags: Mapping[str, str] | None = None
    ) -> None:
        """Log that the run read the dataset of content `digest`.

        Args:
            name: the dataset's name.
            digest: hex sha256 of its content; MLflow's field keeps the first 32 digits, tag `sha256` all.
            uri: where it lies; MLflow keeps the first address that it was told for a digest.
            context: `training`, `evaluation`, ...; a dataset has one context per run.
            tags: further facts, each at most 500 characters.
        """
        from mlflow.data.dataset_source_registry import resolve_dataset_source
        from mlflow.data.meta_dataset import MetaDataset
        from mlflow.entities import DatasetInput, InputTag

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a local path fits two of MLflow's classes, alike for us
            source = resolve_dataset_source(uri)
        dataset = MetaDataset(source, name=name, digest=digest[:_DATASET_DIGEST_LENGTH])
        values = {"mlflow.data.context": context, "sha256": digest, "uri": uri} | dict(tags or {})
        entry = DatasetInput(dataset._to_mlflow_entity(), [InputTag(key, value) for key, value in values.items()])
        with tracking_errors(self.uri):
            self.client.log_inputs(self.run_id, datasets=[entry])

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Copy a small local file into the run's artifacts."""
        with tracking_errors(self.uri):
            self.client.log_artifact(self.run_id, str(path), folder or None)

    def log_text(self, text: str, name: str) -> None:
        """Write `text` as artifact `name`."""
        with tracking_errors(self.uri):
            self.client.log_text(self.run_id, text, name)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags, replacing those of the same names."""
        from mlflow.entities import RunTag

        with tracking_errors(self.uri):
            self.client.log_batch(self.run_id, tags=[RunTag(name, value) for name, value in tags.items()])


@contextmanager
def open_run(
    uri: str, experiment: str, name: str, key: str, tags: Mapping[str, str] | None = None
) -> Iterator[TrackedRun]:
    """A run that ends as FINISHED, FAILED (an exception) or KILLED (interrupted), never as RUNNING.

    Inside a KFP task whose MLflow plugin set `MLFLOW_RUN_ID`, that run is used, and KFP ends it.  Else a run with the
    same `key` is reopened, so that a retry does not make a second one; else one is made.

    Args:
        uri: tracking store, from `tracking_uri`.
        experiment: created if missing; of a sqlite store the artifacts lie beside the database.
        name: shown to people.
        key: what the run is about, e.g. stage name and content key.
        tags: set on the run.
    """
    client = connect(uri)
    with tracking_errors(uri):
        adopted = os.environ.get("MLFLOW_RUN_ID", "")
        if adopted:
            run_id, experiment_id = adopted, client.get_run(adopted).info.experiment_id
        else:
            experiment_id = _experiment_id(client, uri, experiment)
            run_id = _find_or_create_run(client, experiment_id, name, key)
    run = TrackedRun(client=client, uri=uri, run_id=run_id, experiment_id=experiment_id)
    run.set_tags({KEY_TAG: key} | dict(tags or {}))
    status = "FAILED"
    try:
        yield run
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    finally:
        if not adopted:
            with tracking_errors(uri):
                client.set_terminated(run_id, status)


def _find_or_create_run(client: MlflowClient, experiment_id: str, name: str, key: str) -> str:
    found = client.search_runs([experiment_id], f"tags.`{KEY_TAG}` = '{key}'", max_results=1)
    if not found:
        tags = {KEY_TAG: key, ATTEMPT_TAG: "1"}
        return str(client.create_run(experiment_id, tags=tags, run_name=name).info.run_id)
    run = found[0]
    client.update_run(run.info.run_id, status="RUNNING")
    client.set_tag(run.info.run_id, ATTEMPT_TAG, str(int(run.data.tags.get(ATTEMPT_TAG, "0")) + 1))
    return str(run.info.run_id)


def _experiment_id(client: MlflowClient, uri: str, name: str) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    try:
        return str(client.create_experiment(name, artifact_location=_artifact_location(uri, name)))
    except MlflowException:  # somebody else made it meanwhile
        found = client.get_experiment_by_name(name)
        if found is None:
            raise
        return str(found.experiment_id)


def _artifact_location(uri: str, experiment: str) -> str | None:
    """Without it, MLflow on sqlite writes artifacts into the current directory; a server knows its own place."""
    database = sqlite_path(uri)
    return None if database is None else (database.parent / "artifacts" / experiment).as_uri()


def _create_sqlite(database: Path) -> None:
    if database.exists():
        return
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        with database.with_name(f"{database.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not database.exists():
                _create_sqlite_under_lock(database)
    except OSError as error:
        raise PlatformError(
            str(database), found=f"cannot write: {error.strerror}", mend="free space or choose another workspace"
        ) from error


def _create_sqlite_under_lock(database: Path) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    unfinished = database.with_name(f"{database.name}.unfinished")
    unfinished.unlink(missing_ok=True)
    with quiet():
        SqlAlchemyStore(f"{_SQLITE}{unfinished}", (database.parent / "artifacts").as_uri()).engine.dispose()
    os.replace(unfinished, database)


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
