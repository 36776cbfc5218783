"""Delivered manifests -> clean rows, and quarantined rows with their reasons; nothing is lost between the two."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from molmo2core.annotations import MediaKind
from molmo2core.errors import DataError
from molmo2core.examples import SPLITS, ManifestRow
from molmo2core.manifest.config import DataConfig
from molmo2core.manifest.data_docs import Table, write_front_page
from molmo2core.manifest.expectations import INDEX, run_suite
from molmo2core.manifest.measure import FileFacts, measure_file
from molmo2core.manifest.rules import (
    RULES,
    CheckedRow,
    Limits,
    find_problems,
    point_range,
    shown_seconds,
    time_range,
)
from molmo2core.manifest.schema import (
    Measured,
    ParsedRow,
    Problem,
    inspect_row,
    read_lines,
    row_from_line,
    row_to_json,
)
from molmo2core.storage import read_bytes

_SHOWN_REASONS = 5
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class DeliveredRow:
    """One line of a manifest, as far as it could be understood."""

    dataset: str
    line: int
    raw: bytes
    row: ManifestRow | None
    parsed: ParsedRow | None
    problems: tuple[Problem, ...]


@dataclass(frozen=True, kw_only=True)
class QuarantinedRow:
    """A refused line with its reasons."""

    dataset: str
    line: int
    raw: bytes
    id: str
    rules: tuple[str, ...]
    reasons: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """One line of quarantine.jsonl; `content` is the line as delivered, as text when it is no JSON."""
        try:
            content = json.loads(self.raw)
        except (ValueError, RecursionError):
            content = self.raw.decode(errors="replace")
        values = dataclasses.asdict(self) | {"content": content}
        del values["raw"]
        return values


@dataclass(frozen=True, kw_only=True)
class Validation:
    """What became of every delivered row."""

    clean: dict[str, list[ParsedRow]]
    """By dataset, in order of delivery, with `measured`."""
    quarantined: list[QuarantinedRow]

    def summary(self) -> dict[str, Any]:
        """Counts: over all, by dataset and split, by rule."""
        refused = Counter(row.dataset for row in self.quarantined)
        by_rule = Counter(rule for row in self.quarantined for rule in row.rules)
        clean = sum(len(rows) for rows in self.clean.values())
        return {
            "rows": clean + len(self.quarantined),
            "clean": clean,
            "quarantined": len(self.quarantined),
            "datasets": {
                name: {split: sum(row.split == split for row in rows) for split in SPLITS}
                | {"quarantined": refused[name]}
                for name, rows in self.clean.items()
            },
            "rules": {rule: by_rule[rule] for rule in RULES if by_rule[rule]},
        }


def read_delivered(manifests: Mapping[str, str]) -> list[DeliveredRow]:
    """Every line of every manifest.

    Raises:
        DataError: a manifest is missing or has no line.
    """
    delivered: list[DeliveredRow] = []
    for dataset, uri in sorted(manifests.items()):
        try:
            lines = list(read_lines(uri))
        except DataError as error:
            raise DataError(
                uri,
                found=f"no manifest of dataset {dataset!r} ({error.found})",
                mend="correct data.manifests in the recipe",
            ) from error
        if not lines:
            raise DataError(
                uri,
                found="an empty manifest",
                expected="one JSON object per line",
                mend=f"deliver it again, or remove {dataset!r} from data.manifests in the recipe",
            )
        delivered += [_delivered_row(dataset, uri, number, line) for number, line in lines]
    return delivered


def media_of(delivered: Iterable[DeliveredRow]) -> dict[str, MediaKind]:
    """Address -> kind of every medium that a parsed row names."""
    rows = (row.parsed for row in delivered if row.parsed)
    return {name: row.media.kind for row in rows for name in row.media.files}


def digest_media(addresses: Iterable[str]) -> dict[str, str]:
    """Address -> sha256; empty for a file that cannot be read."""

    def digest(address: str) -> str:
        content, _ = _read(address)
        return "" if content is None else hashlib.sha256(content).hexdigest()

    return _in_parallel(digest, list(addresses), "checksums")


def measure_media(media: Mapping[str, MediaKind]) -> dict[str, FileFacts]:
    """Address -> what the file turned out to be."""

    def measure(address: str) -> FileFacts:
        content, details = _read(address)
        if content is None:
            return FileFacts(fault="missing_file", details=details)
        return measure_file(content, media[address])

    return _in_parallel(measure, list(media), "opening media")


def validate_rows(
    delivered: Sequence[DeliveredRow],
    *,
    facts: Mapping[str, FileFacts],
    digests: Mapping[str, str],
    limits: Limits,
    run_name: str,
    docs: Path,
) -> Validation:
    """Apply all rules through the expectation suite and write Data Docs into `docs`."""
    problems = _all_problems(delivered, facts, digests, limits)
    frame = [_frame_row(index, row, problems[index], facts) for index, row in enumerate(delivered)]
    flagged = run_suite(frame, run_name=run_name, docs=docs)
    if missed := [index for index, found in enumerate(problems) if found and index not in flagged]:
        raise RuntimeError(f"the suite passed rows {missed[:5]} that have problems: {problems[missed[0]]}")
    clean: dict[str, list[ParsedRow]] = {row.dataset: [] for row in delivered}
    quarantined: list[QuarantinedRow] = []
    for index, row in enumerate(delivered):
        if index in flagged:
            quarantined.append(_quarantined_row(row, flagged[index], problems[index]))
        else:
            assert row.parsed is not None
            clean[row.dataset].append(_measured_row(row.parsed, facts, digests))
    validation = Validation(clean=clean, quarantined=quarantined)
    assert validation.summary()["rows"] == len(delivered)
    _write_front_page(docs, validation)
    return validation


def write_validation(validation: Validation, folder: Path, relative_to: Callable[[str], str]) -> None:
    """Write `<dataset>.jsonl`, `quarantine.jsonl` and `summary.json`.

    Args:
        validation: the outcome.
        folder: exists already.
        relative_to: turns a medium's address into the one that is written.
    """
    for dataset, rows in validation.clean.items():
        with (folder / f"{dataset}.jsonl").open("wb") as file:
            for row in rows:
                files = tuple(relative_to(name) for name in row.media.files)
                file.write(row_to_json(dataclasses.replace(row, media=dataclasses.replace(row.media, files=files))))
                file.write(b"\n")
    lines = (json.dumps(row.to_json()) + "\n" for row in validation.quarantined)
    (folder / "quarantine.jsonl").write_text("".join(lines))
    (folder / "summary.json").write_text(json.dumps(validation.summary(), indent=1) + "\n")


def refuse_if_unusable(validation: Validation, data: DataConfig, quarantine: str) -> None:
    """Judge the whole delivery.

    Args:
        validation: the outcome.
        data: how many rows may be bad, which splits must be there.
        quarantine: address of the quarantine file, for the message.

    Raises:
        DataError: too many rows of a dataset are refused, or a required split has no good row.
    """
    summary = validation.summary()
    for dataset, counts in summary["datasets"].items():
        refused, rows = counts["quarantined"], sum(counts.values())
        if refused > data.max_quarantined_fraction * rows:
            reasons = Counter(r for row in validation.quarantined if row.dataset == dataset for r in row.rules)
            often = ", ".join(f"{rule} ({count})" for rule, count in reasons.most_common(_SHOWN_REASONS))
            example = next(row for row in validation.quarantined if row.dataset == dataset)
            raise DataError(
                f"dataset {dataset} ({data.manifests[dataset]})",
                found=f"{refused} of {rows} rows refused, most often: {often}; the first, line {example.line}: "
                f"{example.reasons[0]}",
                expected=f"at most {data.max_quarantined_fraction:.0%} (data.max_quarantined_fraction)",
                mend=f"correct the rows listed in {quarantine}",
            )
    for split in data.required_splits:
        total = sum(counts[split] for counts in summary["datasets"].values())
        empty = [name for name, counts in summary["datasets"].items() if not counts["train"]]
        if not total or (split == "train" and empty):
            where = f"split {split}" if not total else f"split train of dataset {', '.join(empty)}"
            raise DataError(
                where,
                found="no good row",
                expected="at least one (data.required_splits)",
                mend=f"deliver rows with this split; refused rows are in {quarantine}",
            )


def _delivered_row(dataset: str, uri: str, number: int, line: bytes) -> DeliveredRow:
    row = row_from_line(uri, number, line)
    if isinstance(row, Problem):
        return DeliveredRow(dataset=dataset, line=number, raw=line, row=None, parsed=None, problems=(row,))
    parsed = inspect_row(row)
    if isinstance(parsed, ParsedRow):
        return DeliveredRow(dataset=dataset, line=number, raw=line, row=row, parsed=parsed, problems=())
    return DeliveredRow(dataset=dataset, line=number, raw=line, row=row, parsed=None, problems=parsed)


def _all_problems(
    delivered: Sequence[DeliveredRow], facts: Mapping[str, FileFacts], digests: Mapping[str, str], limits: Limits
) -> list[list[Problem]]:
    """Problems of each row.  Rows that already have some neither claim an id nor count as a split's medium."""
    problems = [list(row.problems) for row in delivered]
    for row, found in zip(delivered, problems, strict=True):
        if row.parsed:
            files = tuple(facts[name] for name in row.parsed.media.files)
            found += find_problems(CheckedRow(row=row.parsed, files=files, limits=limits))
    for index, problem in _duplicates(delivered, problems):
        problems[index].append(problem)
    for index, problem in _leaks(delivered, problems, digests):
        problems[index].append(problem)
    return problems


def _duplicates(delivered: Sequence[DeliveredRow], problems: Sequence[list[Problem]]) -> list[tuple[int, Problem]]:
    first: dict[tuple[str, str], int] = {}
    found: list[tuple[int, Problem]] = []
    for index, row in enumerate(delivered):
        if not row.parsed or problems[index]:
            continue
        line = first.setdefault((row.dataset, row.parsed.id), row.line)
        if line != row.line:
            problem = Problem(
                rule="duplicate_id", place="id", found=f"{row.parsed.id!r}, also in line {line}", expected="a new id"
            )
            found.append((index, problem))
    return found


def _leaks(
    delivered: Sequence[DeliveredRow], problems: Sequence[list[Problem]], digests: Mapping[str, str]
) -> list[tuple[int, Problem]]:
    """Rows whose medium also serves a split farther from training, over all datasets, by content."""
    farthest: dict[str, tuple[int, DeliveredRow]] = {}
    good = [(index, row) for index, row in enumerate(delivered) if row.parsed and not problems[index]]
    for _, row in good:
        assert row.parsed is not None
        rank = SPLITS.index(row.parsed.split)
        for name in row.parsed.media.files:
            if rank > farthest.get(digests[name], (-1, row))[0]:
                farthest[digests[name]] = (rank, row)
    found: list[tuple[int, Problem]] = []
    for index, row in good:
        assert row.parsed is not None
        for number, name in enumerate(row.parsed.media.files):
            rank, other = farthest[digests[name]]
            if rank > SPLITS.index(row.parsed.split):
                problem = Problem(
                    rule="split_leak",
                    place=f"media.files[{number}]",
                    found=f"the same content as in {other.dataset} line {other.line}, which is in split {SPLITS[rank]}",
                    expected="media of one split only",
                )
                found.append((index, problem))
    return found


def _frame_row(
    index: int, row: DeliveredRow, problems: Sequence[Problem], facts: Mapping[str, FileFacts]
) -> dict[str, Any]:
    counts = Counter(problem.rule for problem in problems)
    values: dict[str, Any] = {INDEX: index, "dataset": row.dataset} | {rule: counts[rule] for rule in RULES}
    parsed = row.parsed
    if parsed is None:
        return values
    values |= {
        "split": parsed.split,
        "kind": parsed.media.kind,
        "num_files": len(parsed.media.files),
        "num_annotations": len(parsed.annotations),
    }
    if points := point_range(parsed):
        values["smallest_coordinate"], values["largest_coordinate"] = points
    if times := time_range(parsed):
        values["earliest_time"] = times[0]
        if parsed.media.kind == "video" and len(parsed.media.files) == 1:
            file = facts[parsed.media.files[0]]
            seconds = shown_seconds(parsed, file)
            values["seconds_beyond_end"] = None if seconds is None else times[1] - seconds
    return values


def _quarantined_row(row: DeliveredRow, rules: tuple[str, ...], problems: Sequence[Problem]) -> QuarantinedRow:
    reasons = [f"{problem.rule}: {problem}" for problem in problems]
    explained = {problem.rule for problem in problems}
    reasons += [f"{rule}: {RULES[rule]}" for rule in rules if rule not in explained]
    given_id = row.row.content.get("id", "") if row.row else ""
    return QuarantinedRow(
        dataset=row.dataset, line=row.line, raw=row.raw, id=str(given_id), rules=rules, reasons=tuple(reasons)
    )


def _measured_row(row: ParsedRow, facts: Mapping[str, FileFacts], digests: Mapping[str, str]) -> ParsedRow:
    files = [facts[name] for name in row.media.files]
    measured = Measured(
        sizes=tuple(file.size for file in files if file.size),
        sha256=tuple(digests[name] for name in row.media.files),
        duration_seconds=(shown_seconds(row, files[0]) or 0.0) if row.media.kind == "video" else 0.0,
        fps=files[0].fps if row.media.kind == "video" else 0.0,
    )
    return dataclasses.replace(row, measured=measured)


def _write_front_page(docs: Path, validation: Validation) -> None:
    summary = validation.summary()
    names = ["dataset", *SPLITS, "quarantined"]
    datasets = [[name, *counts.values()] for name, counts in summary["datasets"].items()]
    rules = [[rule, count, RULES[rule]] for rule, count in summary["rules"].items()]
    examples = [
        [row.dataset, row.line, row.id, "; ".join(row.reasons)] for row in validation.quarantined[: 10 * _SHOWN_REASONS]
    ]
    title = f"{summary['clean']} of {summary['rows']} rows are good, {summary['quarantined']} are quarantined"
    tables: list[Table] = [
        ("Rows by dataset", names, datasets),
        ("Broken rules", ["rule", "rows", "what the rule demands"], rules),
        ("Quarantined rows (the first of them)", ["dataset", "line", "id", "reasons"], examples),
    ]
    write_front_page(docs, title=title, tables=tables if examples else tables[:1])


def _read(address: str) -> tuple[bytes | None, str]:
    try:
        return read_bytes(address), ""
    except DataError as error:
        return None, error.found
    except OSError as error:
        return None, f"cannot be read: {error.strerror}"


def _in_parallel(work: Callable[[Item], Result], items: list[Item], name: str) -> dict[Item, Result]:
    with ThreadPoolExecutor(max_workers=min(32, 2 * (os.cpu_count() or 1))) as pool:
        results = pool.map(work, items)
        bar = tqdm(results, desc=name, total=len(items), unit="file", mininterval=1.0, delay=2.0, file=sys.stderr)
        return dict(zip(items, bar, strict=True))
