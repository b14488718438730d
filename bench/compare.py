"""A new document compared with an old one of the same benchmark: the ratio of each case, and whether any became slower."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.document import SCHEMA_VERSION
from bench.report import WHERE, label, number, parts
from tidali.errors import UsageError
from tidali.hardware.cpu_threads import WAITING

_HARDWARE = ("cpu", "cpu_flags", "cores", "gpu")
_CONDITIONS = ("device", "dtype", "compile", "stem", "batch_size", "data", "cached", "crops", "images", "workers")


@dataclass(frozen=True, kw_only=True)
class Change:
    """A case that both documents have."""

    benchmark: str
    case: str
    where: str
    old: float
    new: float
    spread: str
    """Lowest to highest of the old and of the new measurements, as fractions of the old median."""

    @property
    def ratio(self) -> float:
        """Above 1: faster now."""
        return self.new / self.old


@dataclass(frozen=True, kw_only=True)
class Comparison:
    changes: tuple[Change, ...]
    warnings: tuple[str, ...]
    """What else differs between the two, besides the rates."""
    tolerance_percent: float
    stopped: tuple[str, ...] = ()
    """Cases that have a rate in the old document and did not run now."""

    def verdict(self, change: Change) -> str:
        if change.ratio < 1 - self.tolerance_percent / 100:
            return "SLOWER"
        return "faster" if change.ratio > 1 + self.tolerance_percent / 100 else ""

    @property
    def slower(self) -> tuple[Change, ...]:
        return tuple(change for change in self.changes if self.verdict(change) == "SLOWER")

    def table(self) -> tuple[str, tuple[str, ...], list[tuple[str, ...]]]:
        """Title, columns and rows."""
        columns: tuple[str, ...] = ("case", "where", "old", "new", "new/old", "spread of old, of new (old median = 1)", "")
        rows: list[tuple[str, ...]] = [
            (
                f"{change.benchmark}: {change.case}",
                change.where,
                number(change.old),
                number(change.new),
                f"{change.ratio:.2f}",
                change.spread,
                self.verdict(change),
            )
            for change in self.changes
        ]
        return f"images/s compared with the old document, tolerance {self.tolerance_percent:g} %", columns, rows


def load(path: Path, benchmark: str) -> dict[str, Any]:
    """An old document to compare with.

    Raises:
        UsageError: it cannot be read, or is not a document of this benchmark and schema version.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--compare {path}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise UsageError(f"--compare {path}: is not a JSON document") from None
    if not isinstance(document, dict) or "benchmark" not in document:
        raise UsageError(f"--compare {path}: is not a document of 'tidali bench --json'")
    if document["benchmark"] != benchmark:
        raise UsageError(f"--compare {path}: is of 'tidali bench {document['benchmark']}', this is 'tidali bench {benchmark}'")
    if document.get("schema_version") != SCHEMA_VERSION:
        found = document.get("schema_version")
        raise UsageError(f"--compare {path}: has schema version {found}, this tidali writes {SCHEMA_VERSION}; measure it again")
    if not all("rows" in part for part in parts({"parts": [], **document})):
        raise UsageError(f"--compare {path}: has no rows; measure it again")
    return document


def compare(new: Mapping[str, Any], old: Mapping[str, Any], tolerance_percent: float) -> Comparison:
    """
    Raises:
        UsageError: the two have no case in common.
    """
    before, now = dict(_rows(old, "images_per_s")), dict(_rows(new, "images_per_s"))
    changes = [
        Change(
            benchmark=key[0],
            case=key[1],
            where=label(row),
            old=before[key]["images_per_s"]["median"],
            new=row["images_per_s"]["median"],
            spread=_spreads(before[key]["images_per_s"], row["images_per_s"]),
        )
        for key, row in now.items()
        if key in before
    ]
    if not changes:
        raise UsageError("--compare: the old document has no case in common with this one; measure the same --res and cases")
    warnings = list(_differences(new, old))
    only = {"now": now.keys() - before.keys(), "in the old document": before.keys() - now.keys()}
    for where, keys in only.items():
        warnings += [f"only {where}: {key[0]}: {key[1]} {label((now | before)[key])}".rstrip() for key in sorted(keys, key=str)]
    stopped = [f"{row['case']} {label(row)}".rstrip() for key, row in _rows(new, "not_run") if key in before]
    return Comparison(
        changes=tuple(changes), warnings=tuple(warnings), tolerance_percent=tolerance_percent, stopped=tuple(stopped)
    )


def _rows(document: Mapping[str, Any], field: str) -> Iterator[tuple[tuple[Any, ...], Mapping[str, Any]]]:
    """The rows that have a field, each with what distinguishes it from all others."""
    for part in parts(document):
        for row in [*part["rows"], *part.get("growth", ())]:
            if field in row:
                yield (part["benchmark"], row["case"], *(row.get(name) for name in (*WHERE, "varied"))), row


def _spreads(old: Mapping[str, float], new: Mapping[str, float]) -> str:
    low, high = (f"{rate['min'] / old['median']:.2f}-{rate['max'] / old['median']:.2f}" for rate in (old, new))
    return f"{low}, {high}"


def _differences(new: Mapping[str, Any], old: Mapping[str, Any]) -> Iterator[str]:
    earlier = {part["benchmark"]: part for part in parts(old)}
    for part in parts(new):
        other = earlier.get(part["benchmark"])
        if other is None:
            continue
        for room, names in (("machine", _HARDWARE), ("", _CONDITIONS), ("settings", (*WAITING, "torch_threads"))):
            was, is_ = (document[room] if room else document for document in (other, part))
            for name in names:
                if was.get(name) != is_.get(name):
                    what = "other hardware" if room == "machine" else "other conditions"
                    yield f"{part['benchmark']}: {what}: {name} was {_plain(was.get(name))}, is {_plain(is_.get(name))}"
        was, is_ = ({**document["versions"], **document.get("peer_versions", {})} for document in (other, part))
        for package in is_:
            if was.get(package) != is_[package]:
                yield f"{part['benchmark']}: {package} was {was.get(package, 'not installed')}, is {is_[package]}"


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(str(part) for part in value.values())
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
