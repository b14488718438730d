"""What a benchmark prints and writes: a table for people, one JSON document for machines."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tidali.console import print_table, results
from tidali.files import write_atomically

WHERE = ("res", "stem", "batch_size", "threads", "samples", "ranks")
"""A row's fields that tell it from others of the same case."""

_CEILING_UNITS = {"images": ("images/s", 1.0), "bytes": ("GB/s", 1e9), "flop": ("TFLOP/s", 1e12)}


def number(value: float) -> str:
    """Three figures at least: 8.8, 67.8, 9,596."""
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def ratio(value: float) -> str:
    """0.85, 1.96, 12.3, 1,090."""
    return f"{value:.2f}" if value < 10 else number(value)


_FORMATS: dict[str, Callable[[float], str]] = {
    "gmacs": lambda value: f"{value:.3f}",
    "times_original": ratio,
    "times_torchvision": ratio,
    "first_step_s": lambda value: f"{value:.1f}",
}


def parts(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The documents in one of ``tidali bench all``; another is its own only part."""
    return list(document["parts"]) if document["benchmark"] == "all" else [dict(document)]


def label(row: Mapping[str, Any]) -> str:
    """Where a row was measured, for people: '64 px, small stem'."""
    words = {"res": "{} px", "stem": "{} stem", "batch_size": "batch {}", "threads": "{} threads", "samples": "{:,} samples"}
    words["ranks"] = "{} ranks"
    return ", ".join(words[name].format(row[name]) for name in WHERE if row.get(name) is not None)


def show(document: Mapping[str, Any]) -> None:
    """The tables, on standard output."""
    for part in parts(document):
        _show_rows(part)
        _show_ceilings(part)
        _show_growth(part)
        _show_memory(part)
        if part.get("times_the_fastest_peer"):
            results.print(f"tidali to the fastest of the others: {ratio(part['times_the_fastest_peer'])}")
        results.print(made_of(part), markup=False)


def made_of(document: Mapping[str, Any]) -> str:
    """The software and the day, in a line."""
    versions = {**document["versions"], **document.get("peer_versions", {})}
    shown = [f"{name} {versions[name]}" for name in ("tidali", "torch", "nvidia-dali-cuda120") if name in versions]
    shown += [f"commit {document['commit']}"] if document["commit"] else []
    return f"{', '.join(shown)}, {document['date']}"


def _show_rows(document: Mapping[str, Any]) -> None:
    about = [f"median of {document['repeats']} (lowest to highest)", document["device"]["name"], f"{document['cores']} cores"]
    about += conditions(document)
    rows = document["rows"]
    ratios = sorted({name for row in rows for name in row if name.startswith("times_")})
    extra = [*ratios, *(name for name in ("gmacs", "peak_rss_mib") if any(name in row for row in rows))]
    if document["compile"]:  # the first step's seconds are the compiler's, nearly all
        rows = [{**row, "first_step_s": row.get("measured", {}).get("first_step_s")} for row in rows]
        extra.append("first_step_s")
    bound = any("ceiling" in row for row in rows)
    columns = ["case", "where", "images/s", "spread", *(name.replace("_", " ") for name in extra)]
    columns += ["of the ceiling", "which is"] if bound else []
    print_table(f"{document['benchmark']}: images/s, {', '.join(about)}", columns, [_cells(row, extra, bound) for row in rows])
    for row in rows:
        if "not_run" in row:  # below the table: a reason is a sentence, and would make a column of it
            where = f" ({label(row)})" if label(row) else ""
            results.print(f"not run: {row['case']}{where}: {row['not_run']}", markup=False)


def _cells(row: Mapping[str, Any], extra: list[str], bound: bool) -> list[str]:
    cells = [row["case"], label(row)]
    if "not_run" in row:
        return [*cells, "not run", *([""] * (1 + len(extra) + 2 * bound))]
    rate, ceiling = row["images_per_s"], row.get("ceiling")
    cells += [number(rate["median"]), spread(rate)]
    cells += [_FORMATS.get(name, number)(row[name]) if row.get(name) is not None else "" for name in extra]
    if bound:
        cells += [f"{100 * ceiling['share']:.0f} %", ceiling["name"]] if ceiling else ["", ""]
    return cells


def conditions(document: Mapping[str, Any]) -> list[str]:
    """What all rows of it have in common."""
    found = [document["dtype"]] if document["benchmark"] in ("train", "step") else []
    return found + ([f"batch {document['batch_size']}"] if "batch_size" in document else [])


def spread(rate: Mapping[str, float]) -> str:
    return f"{number(rate['min'])} to {number(rate['max'])}"


def _show_ceilings(document: Mapping[str, Any]) -> None:
    rows = []
    for row in document.get("ceilings", ()):
        unit, scale = _CEILING_UNITS[row["unit"]]
        median, low, high = (row["per_s"][name] / scale for name in ("median", "min", "max"))
        digits = 0 if scale == 1 else 3 if scale == 1e12 else 1
        rows.append((row["ceiling"], label(row), f"{median:,.{digits}f}", unit, f"{low:,.{digits}f} to {high:,.{digits}f}"))
    if rows:
        print_table("this machine's ceilings, measured in between", ("ceiling", "beside", "rate", "", "spread"), rows)


def against(varied: str) -> str:
    """What was varied, for people."""
    return {"res": "side in pixels", "batch_size": "batch size"}.get(varied, varied)


def _show_growth(document: Mapping[str, Any]) -> None:
    rows = [
        (row["case"], against(row["varied"]), f"{row[row['varied']]:,}", number(rate["median"]), spread(rate))
        for row in document.get("growth", ())
        for rate in (row["images_per_s"],)
    ]
    if rows:
        print_table("how it grows, one thing varied at a time", ("case", "against", "value", "images/s", "spread"), rows)


def _show_memory(document: Mapping[str, Any]) -> None:
    if "memory" not in document:
        return
    print_table(
        "memory of a process that takes batches from the cache, MiB",
        ("res", "cached pixels", "imports alone", "peak", "(peak - imports) / pixels"),
        [
            (
                row["res"],
                *(f"{row[name]:,.0f}" for name in ("pixels_mib", "idle_rss_mib", "peak_rss_mib")),
                f"{row['times_pixels']:.2f}",
            )
            for row in document["memory"]
        ],
    )


def write_json(document: Mapping[str, Any], target: str) -> None:
    """Write the document to a file, or to standard output where the target is '-'.

    Raises:
        TidaliError: the file cannot be written.
    """
    text = json.dumps(document, indent=1 if target != "-" else None)
    if target == "-":
        print(text)
    else:
        write_atomically(Path(target), f"{text}\n".encode())
