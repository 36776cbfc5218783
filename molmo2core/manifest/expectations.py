"""The manifest's contract as a Great Expectations suite over a flat frame: one row per delivered row, scalars only.

The frame has one column per rule, the number of problems that the rule found, and a few plain quantities that state
the same limits independently of the rules.  The rows that the suite flags are quarantined.  Patterns and traps:
mlflow_gx_mds_s3.md 2.  Great Expectations takes seconds to import, so it is imported inside.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molmo2core.manifest.data_docs import make_readable_offline
from molmo2core.manifest.rules import RULES, TIME_TOLERANCE_SECONDS

if TYPE_CHECKING:
    import great_expectations as gx
    import pandas as pd

INDEX = "_row"
"""Position of a row among all delivered rows; an id would flag the innocent first of two duplicates too."""


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """A column with a number from the row itself, empty where it does not apply, and the limits that it must keep."""

    column: str
    rule: str
    """The rule that a row outside the limits breaks."""
    least: float | None = None
    most: float | None = None


QUANTITIES = (
    Quantity(column="smallest_coordinate", rule="point_outside", least=0.0),
    Quantity(column="largest_coordinate", rule="point_outside", most=1.0),
    Quantity(column="earliest_time", rule="time_outside", least=0.0),
    Quantity(column="seconds_beyond_end", rule="time_outside", most=TIME_TOLERANCE_SECONDS),
    Quantity(column="num_annotations", rule="no_annotations", least=1.0),
)
FACT_COLUMNS = ("dataset", "split", "kind", "num_files")
"""Shown for orientation; no expectation is about them."""


def run_suite(rows: Sequence[Mapping[str, Any]], *, run_name: str, docs: Path) -> dict[int, tuple[str, ...]]:
    """Validate the frame and render Data Docs.

    Args:
        rows: one mapping per delivered row: INDEX, the rules' names, the quantities, the facts.
        run_name: shown in the Data Docs.
        docs: folder that receives `index.html` and the pages it links to, readable without a network.

    Returns:
        INDEX of each flagged row -> names of the rules that it breaks.

    Raises:
        RuntimeError: there is no row, about which every expectation would be fulfilled, or an expectation could not
            be evaluated: faults of this program and not of the data.
    """
    import pandas as pd

    if not rows:
        raise RuntimeError("no rows to validate")

    columns = [INDEX, *FACT_COLUMNS, *RULES, *(quantity.column for quantity in QUANTITIES)]
    frame = pd.DataFrame(list(rows), columns=columns)
    frame = frame.astype({quantity.column: "float64" for quantity in QUANTITIES})
    flagged: dict[int, set[str]] = {}
    for result in _validate(frame, run_name, docs):
        if _could_not_run(result):
            raise RuntimeError(f"expectation failed to run: {result['expectation_config']}: {result['exception_info']}")
        rule = result["expectation_config"]["meta"]["rule"]
        if result["success"]:
            continue
        if not rule:
            raise RuntimeError(f"the frame is malformed: {result['expectation_config']}: {result['result']}")
        for index in _flagged_rows(result["result"]):
            flagged.setdefault(index, set()).add(rule)
    order = list(RULES)
    return {index: tuple(sorted(rules, key=order.index)) for index, rules in sorted(flagged.items())}


def build_suite(name: str, num_rows: int) -> gx.ExpectationSuite:
    """The suite; `meta.rule` of each expectation names the rule it stands for, empty for the frame's own shape."""
    import great_expectations as gx
    from great_expectations import expectations as gxe

    expectations: list[gxe.Expectation] = [
        gxe.ExpectTableRowCountToBeBetween(min_value=num_rows, max_value=num_rows, meta={"rule": ""}),
        gxe.ExpectColumnValuesToBeUnique(column=INDEX, meta={"rule": ""}),
    ]
    expectations += [
        gxe.ExpectColumnValuesToBeBetween(column=rule, min_value=0, max_value=0, meta={"rule": rule}, notes=says)
        for rule, says in RULES.items()
    ]
    expectations += [gxe.ExpectColumnValuesToNotBeNull(column=rule, meta={"rule": ""}) for rule in RULES]
    expectations += [
        gxe.ExpectColumnValuesToBeBetween(
            column=quantity.column,
            min_value=quantity.least,
            max_value=quantity.most,
            meta={"rule": quantity.rule},
            notes=RULES[quantity.rule],
        )
        for quantity in QUANTITIES
    ]
    return gx.ExpectationSuite(name, expectations=expectations)


def _validate(frame: pd.DataFrame, run_name: str, docs: Path) -> list[dict[str, Any]]:
    os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")
    import great_expectations as gx
    from great_expectations.checkpoint import UpdateDataDocsAction

    with _logged_errors_raised():
        context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}
    context.add_data_docs_site(
        site_name="local",
        site_config={
            "class_name": "SiteBuilder",
            "store_backend": {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(docs.absolute())},
            "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
        },
    )
    suite = build_suite("manifests", len(frame))
    expected = len(suite.expectations)
    batch = context.data_sources.add_pandas("delivered").add_dataframe_asset("rows")
    checkpoint = gx.Checkpoint(
        name="validate_data",
        validation_definitions=[
            context.validation_definitions.add(
                gx.ValidationDefinition(
                    name="manifests",
                    data=batch.add_batch_definition_whole_dataframe("all"),
                    suite=context.suites.add(suite),
                )
            )
        ],
        result_format={
            "result_format": "COMPLETE",
            "unexpected_index_column_names": [INDEX],
            "exclude_unexpected_values": True,
        },
        actions=[UpdateDataDocsAction(name="docs", site_names=["local"])],
    )
    run_id = gx.RunIdentifier(run_name=run_name, run_time=datetime(2000, 1, 1, tzinfo=UTC))  # same input, same docs
    with _logged_errors_raised():
        run = context.checkpoints.add(checkpoint).run(batch_parameters={"dataframe": frame}, run_id=run_id)
    make_readable_offline(docs)
    (validation,) = run.run_results.values()
    results: list[dict[str, Any]] = validation.to_json_dict()["results"]
    if len(results) != expected:  # an unknown expectation would be dropped in silence
        raise RuntimeError(f"{len(results)} of {expected} expectations were evaluated")
    return results


@contextmanager
def _logged_errors_raised() -> Iterator[None]:
    """Raise what Great Expectations only logs: it goes on when a page of the Data Docs cannot be written.

    Its log goes nowhere else meanwhile: it is long, and under KFP, which shows every message, of several lines.
    """
    errors: list[BaseException] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            errors.append(sys.exc_info()[1] or RuntimeError(record.getMessage()))

    logger, handler = logging.getLogger("great_expectations"), Collect(logging.ERROR)
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
    if errors:
        raise errors[0]


def _could_not_run(result: Mapping[str, Any]) -> bool:
    """Such a result has no counts, and its exception_info is keyed by metric instead of by `raised_exception`."""
    info = result["exception_info"]
    return bool(info.get("raised_exception", True))


def _flagged_rows(result: Mapping[str, Any]) -> list[int]:
    return [int(index) for entry in result["unexpected_index_list"] for index in _as_list(entry[INDEX])]


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
