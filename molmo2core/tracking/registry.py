"""Registered model versions: register, promote, roll back.

    register_version -> alias `candidate` -> promote (ledger, then alias `champion`) or refuse (a tag says why)

Each step finds what an earlier, killed attempt left and completes it: a version is known by its key tag, a promotion
by its key in the ledger, and the alias `champion` follows from the ledger (`reconcile`).

    python -m molmo2core.tracking.registry show|rollback|reconcile --uri URI [--name NAME] ...
"""

from __future__ import annotations

import argparse
import fcntl
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molmo2core import storage
from molmo2core.errors import CheckpointError, DataError, exit_with_message
from molmo2core.tracking.config import TrackingConfig
from molmo2core.tracking.ledger import Decision, Ledger, Record, champions
from molmo2core.tracking.mlflow_run import (
    KEY_TAG,
    TrackedRun,
    as_default,
    connect,
    quiet,
    sqlite_path,
    tracking_errors,
    tracking_uri,
)
from molmo2core.tracking.pyfunc_model import REFERENCE_ARTIFACT, signature

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

CANDIDATE = "candidate"
CHAMPION = "champion"
DECISION_TAG = "promotion.decision"
REASON_TAG = "promotion.reason"
_LEDGER_TAG = "molmo2core.ledger"
_MAX_TAG = 5000  # characters that every backend of MLflow takes


@dataclass(frozen=True, kw_only=True)
class Registry:
    """The versions of one registered model."""

    client: MlflowClient
    uri: str
    name: str
    ledger: Ledger

    def find_version(self, key: str) -> str | None:
        """The version registered under `key`, if any."""
        query = f"name = '{self.name}' and tags.`{KEY_TAG}` = '{key}'"
        with tracking_errors(self.uri):
            found = self.client.search_model_versions(query)
        return min((str(entry.version) for entry in found), key=int, default=None)

    def register_version(
        self,
        run: TrackedRun,
        *,
        key: str,
        code: Path,
        checkpoint: Mapping[str, Any],
        metrics: Mapping[str, float],
        step: int,
        tags: Mapping[str, str],
    ) -> str:
        """The version of `key`, made if there is none.

        Args:
            run: the run that the version comes from.
            key: what is registered.
            code: file that calls pyfunc_model.serve.
            checkpoint: JSON object that names the weights; MLflow keeps it, not the weights.
            metrics: of the model.
            step: training steps behind it.
            tags: of the version, set with it in one transaction.
        """
        with _one_at_a_time(self.uri), tracking_errors(self.uri):
            found = self.find_version(key)
            if found is not None:
                return found
            model_id = self._log_model(run, key, code, checkpoint, step)
            run.log_metrics(metrics, step, model_id=model_id)
            with as_default(self.uri):  # on sqlite the registry looks the logged model up in the default store
                made = self.client.create_model_version(
                    self.name,
                    f"models:/{model_id}",
                    run_id=run.run_id,
                    tags={KEY_TAG: key} | _cut(tags),
                    model_id=model_id,
                )
            return str(made.version)

    def set_candidate(self, version: str) -> None:
        """Point alias `candidate` at `version`."""
        with tracking_errors(self.uri):
            self.client.set_registered_model_alias(self.name, CANDIDATE, version)

    def promote(self, version: str, *, key: str, reason: str) -> bool:
        """Make `version` champion, once per `key`: whether it is champion now.

        A repeated call changes nothing, also if somebody was promoted or rolled back since.
        """

        def decide(records: Sequence[Record]) -> Decision | None:
            if any(record.key == key for record in records):
                return None
            return Decision(action="promote", version=version, key=key, reason=reason)

        self.ledger.append(decide)
        self.reconcile()
        self._tag(version, "promoted", reason)
        return champions(self.ledger.records())[-1:] == [version]

    def refuse(self, version: str, reason: str) -> None:
        """Note on `version` why it does not become champion; the champion stays."""
        self._tag(version, "refused", reason)

    def roll_back(self, reason: str) -> str:
        """Make the champion before the last promotion champion again; returns its version.

        Raises:
            CheckpointError: there is no earlier champion, or its version was deleted.
        """

        def decide(records: Sequence[Record]) -> Decision:
            stack = champions(records)
            if len(stack) < 2:
                raise CheckpointError(self.name, found="no earlier champion", expected="at least two promotions")
            self._check_exists(stack[-2])
            return Decision(action="roll back", version=stack[-2], key="", reason=reason)

        record = self.ledger.append(decide)
        self.reconcile()
        assert record is not None
        return record.version

    def reconcile(self) -> str | None:
        """Point alias `champion` where the ledger says, whatever it pointed at; returns that version, if any."""
        stack = champions(self.ledger.records())
        wanted, found = (stack[-1] if stack else None), self.aliases().get(CHAMPION)
        with tracking_errors(self.uri):
            if wanted is not None and found != wanted:
                self.client.set_registered_model_alias(self.name, CHAMPION, wanted)
            if wanted is None and found is not None:
                self.client.delete_registered_model_alias(self.name, CHAMPION)
        return wanted

    def is_decided(self, version: str) -> bool:
        """Whether `version` was promoted or refused: nothing is left to do for it."""
        with tracking_errors(self.uri):
            return DECISION_TAG in self.client.get_model_version(self.name, version).tags

    def aliases(self) -> dict[str, str]:
        """Alias -> version."""
        with tracking_errors(self.uri):
            found = self.client.get_registered_model(self.name).aliases
        return {alias: str(number) for alias, number in found.items()}

    def aliases_of(self, version: str) -> tuple[str, ...]:
        """Aliases that point at `version`, sorted."""
        return tuple(sorted(alias for alias, number in self.aliases().items() if number == version))

    def _check_exists(self, version: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self.client.get_model_version(self.name, version)
        except MlflowException as error:
            raise CheckpointError(
                f"{self.name} version {version}",
                found="deleted from MLflow",
                expected="the version that was champion before",
                mend="register and promote another one",
            ) from error

    def _tag(self, version: str, decision: str, reason: str) -> None:
        with tracking_errors(self.uri):
            for name, value in _cut({REASON_TAG: reason, DECISION_TAG: decision}).items():
                self.client.set_model_version_tag(self.name, version, name, value)

    def _log_model(self, run: TrackedRun, key: str, code: Path, checkpoint: Mapping[str, Any], step: int) -> str:
        """A READY logged model of `run`: a few kilobytes of code and reference.

        MLflow's client is used instead of `mlflow.pyfunc.log_model`, which needs process-wide state (an active run, the
        tracking address in the environment) and ends the run.
        """
        from mlflow.entities import LoggedModelOutput
        from mlflow.models import Model
        from mlflow.pyfunc import save_model

        outputs = run.client.get_run(run.run_id).outputs
        for earlier in outputs.model_outputs if outputs else []:
            model = run.client.get_logged_model(earlier.model_id)
            if model.tags.get(KEY_TAG) == key and str(model.status) == "READY":
                return str(model.model_id)
        model = run.client.create_logged_model(
            run.experiment_id, name=self.name, source_run_id=run.run_id, tags={KEY_TAG: key}, model_type="vlm"
        )
        with tempfile.TemporaryDirectory() as temporary:
            reference = Path(temporary) / "checkpoint_ref.json"
            reference.write_text(json.dumps(checkpoint, sort_keys=True, indent=1) + "\n")
            folder = Path(temporary) / "model"
            with quiet():
                save_model(
                    str(folder),
                    python_model=str(code),
                    artifacts={REFERENCE_ARTIFACT: str(reference)},
                    signature=signature(),
                    pip_requirements=[_requirement()],
                    mlflow_model=Model(
                        artifact_path=model.artifact_location, run_id=run.run_id, model_id=model.model_id
                    ),
                )
            run.client.log_model_artifacts(model.model_id, str(folder))
        run.client.finalize_logged_model(model.model_id, "READY")
        run.client.log_outputs(run.run_id, [LoggedModelOutput(model.model_id, step)])
        return str(model.model_id)


def open_registry(uri: str, name: str, workspace: str = "") -> Registry:
    """The registered model `name`, made if a workspace is given.

    Its ledger lies beside a sqlite store.  For a server, a tag of the model says where: `<workspace>/promotions/<name>`
    of whoever made it, so that all workspaces that use the server share one.

    Raises:
        DataError: there is no such model, and no workspace is given.
    """
    from mlflow.exceptions import MlflowException

    client, database = connect(uri), sqlite_path(uri)
    folder = storage.join(str(database.parent) if database else workspace, "promotions", name)
    with tracking_errors(uri):
        if not client.search_registered_models(f"name = '{name}'"):
            if not workspace:
                raise DataError(f"model {name}", found="not registered", mend="run the register stage first")
            with suppress(MlflowException):  # somebody else made it meanwhile
                client.create_registered_model(name, tags={_LEDGER_TAG: folder})
        if database is None:
            folder = client.get_registered_model(name).tags.get(_LEDGER_TAG, "")
    if not folder:
        raise DataError(
            f"model {name}",
            found=f"no tag {_LEDGER_TAG}: it was not made by this project",
            mend="choose another tracking.model_name",
        )
    return Registry(client=client, uri=uri, name=name, ledger=Ledger(folder=folder))


def describe(registry: Registry) -> str:
    """Versions, aliases and the ledger, for a person."""
    with tracking_errors(registry.uri):
        found = registry.client.search_model_versions(f"name = '{registry.name}'")
    lines = [f"model {registry.name} at {registry.uri}"]
    for entry in sorted(found, key=lambda entry: int(entry.version)):
        aliases = ", ".join(registry.aliases_of(str(entry.version)))
        decision = " ".join(entry.tags.get(tag, "") for tag in (DECISION_TAG, REASON_TAG))
        lines.append(f"  version {entry.version}  [{aliases}]  {decision}".rstrip())
    lines.append(f"ledger {registry.ledger.folder}")
    lines += [
        f"  {r.number:06d}  {r.time}  {r.action} -> version {r.version}  by {r.actor}: {r.reason}"
        for r in registry.ledger.records()
    ]
    return "\n".join(lines)


@contextmanager
def _one_at_a_time(uri: str) -> Iterator[None]:
    """Of processes on one sqlite store, one registers; a server has one registering task per pipeline run."""
    database = sqlite_path(uri)
    if database is None:
        yield
        return
    with database.with_name(f"{database.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _requirement() -> str:
    try:
        return f"molmo2core[eval]=={version('molmo2core')}"
    except PackageNotFoundError:
        return "molmo2core[eval]"


def _cut(tags: Mapping[str, str]) -> dict[str, str]:
    return {name: value[:_MAX_TAG] for name, value in tags.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Look at a registered model, roll its champion back, or set the alias from the ledger."""
    parser = argparse.ArgumentParser(prog="python -m molmo2core.tracking.registry", description=main.__doc__)
    parser.add_argument("command", choices=("show", "rollback", "reconcile"))
    parser.add_argument("--uri", default="", help="tracking store; default as for the workspace's runs")
    parser.add_argument("--workspace", default=".", help="workspace whose mlflow/ holds the store, if no --uri")
    parser.add_argument("--name", default=TrackingConfig().model_name, help="registered model")
    parser.add_argument("--reason", default="", help="why (rollback)")
    options = parser.parse_args(arguments)
    try:
        uri = tracking_uri(TrackingConfig(uri=options.uri), options.workspace)
        database = sqlite_path(uri)
        if database is not None and not database.exists():
            raise DataError(str(database), found="no such tracking store", mend="give --uri or --workspace")
        registry = open_registry(uri, options.name)
        if options.command == "rollback":
            if not options.reason:
                parser.error("rollback needs --reason")
            print(f"champion is version {registry.roll_back(options.reason)} again")
        elif options.command == "reconcile":
            print(f"champion is version {registry.reconcile() or '(none)'}")
        else:
            print(describe(registry))
    except Exception as error:
        return exit_with_message(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
