"""The output of a benchmark: a table on the terminal, a JSON document, and tables in Markdown."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tidali.console import print_table
from tidali.console import show as show_line
from tidali.errors import span
from tidali.files import write_atomically

WHERE = ("res", "stem", "batch_size", "threads", "samples", "ranks")
"""A row's fields that distinguish it from other rows of the same case."""

NOTED_SHARE = 0.1
"""Of the cores' time: what other processes used of it is said from here on."""
_CEILING_UNITS = {"images": ("images/s", 1.0), "bytes": ("GB/s", 1e9), "flop": ("TFLOP/s", 1e12)}


def number(value: float) -> str:
    """With three digits at least: 8.8, 67.8, 9,596."""
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def seconds(value: float) -> str:
    """0.0035, 0.29, 14.3, 176."""
    return f"{value:.2g}" if value < 0.1 else ratio(value)


def ratio(value: float) -> str:
    """0.85, 1.96, 12.3, 1,090."""
    return f"{value:.2f}" if value < 10 else number(value)


_FORMATS: dict[str, Callable[[Any], str]] = {
    "gmacs": lambda value: f"{value:.3f}",
    "times_original": ratio,
    "times_torchvision": ratio,
    "first_step_s": lambda value: f"{value:.1f}",
    "kernel": str,
    "seconds": lambda value: seconds(value["median"]),
    "tf32": lambda value: "yes" if value else "no",
}


_COLUMNS = ("gmacs", "tf32", "seconds", "peak_rss_mib", "kernel", "stored_kib_per_image", "first_step_s")
"""Fields that have a column in the table if any row has them."""
_TITLES = {
    "gmacs": "GMACs",
    "tf32": "TF32",
    "peak_rss_mib": "peak RSS, MiB",
    "stored_kib_per_image": "stored, KiB an image",
    "first_step_s": "first step, s",
}
"""Those whose column is not named as the field."""


def parts(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The documents in a document of ``tidali bench all``; any other document is its own only part."""
    return list(document["parts"]) if document["benchmark"] == "all" else [dict(document)]


def label(row: Mapping[str, Any]) -> str:
    """The conditions of a row in words: '64 px, small stem'."""
    words = {"res": "{} px", "stem": "{} stem", "batch_size": "batch {}", "threads": "{} threads", "samples": "{:,} samples"}
    words["ranks"] = "{} ranks"
    return ", ".join(words[name].format(row[name]) for name in WHERE if row.get(name) is not None)


def spread(measured: Mapping[str, float], text: Callable[[float], str] = number) -> str:
    """Lowest to highest."""
    return span(text(measured["min"]), text(measured["max"]))


def ceiling_share(row: Mapping[str, Any]) -> str:
    """'87 % of JPEG decoding'; empty if the row has no ceiling."""
    ceiling = row.get("ceiling")
    return f"{100 * ceiling['share']:.0f} % of {ceiling['name']}" if ceiling else ""


def axis(varied: str) -> str:
    """The name of what was varied, in words."""
    return {"res": "side in pixels", "batch_size": "batch size"}.get(varied, varied)


def software(document: Mapping[str, Any]) -> str:
    """The software and the date, in one line."""
    versions = {**document["versions"], **document.get("peer_versions", {})}
    shown = [f"{name} {versions[name]}" for name in versions if name in ("tidali", "torch") or "-dali-" in name]
    shown += [f"commit {document['commit']}"] if document["commit"] else []
    return f"{', '.join(shown)}, {document['date']}"


def conditions(document: Mapping[str, Any]) -> list[str]:
    """The conditions that all rows share."""
    found = [document["dtype"]] if document["benchmark"] in ("train", "step") else []
    found += ["cached" if document["cached"] else "streamed"] if "cached" in document else []
    found += [f"--decoder {document['decoder']}"] if "decoder" in document else []
    found += ["random crops"] if document.get("crops") else []
    return found + ([f"batch {document['batch_size']}"] if "batch_size" in document else [])


def show(document: Mapping[str, Any]) -> None:
    """Print the tables on standard output."""
    for part in parts(document):
        _show_rows(part)
        _show_ceilings(part)
        _show_growth(part)
        _show_memory(part)
        if part.get("times_the_fastest_peer"):
            show_line(f"tidali to the fastest of the others: {ratio(part['times_the_fastest_peer'])}")
        show_line(software(part))


def _show_rows(document: Mapping[str, Any]) -> None:
    about = ["measured once"] if document["repeats"] == 1 else [f"median of {document['repeats']} (lowest to highest)"]
    about += [document["device"]["name"], f"{document['cores']} cores", *conditions(document)]
    print_table(f"{document['benchmark']}: images/s, {', '.join(about)}", *rate_table(document))
    for line in notes(document):
        show_line(line)


def rate_table(document: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The titles and the cells of a table of the rows. A column that would be empty, or say a number twice, is left out. What
    growth times as a whole has seconds instead of a rate: opening a data set reads no image."""
    rows, growth = document["rows"], document["benchmark"] == "growth"
    if document["compile"]:  # nearly all of the first step is compilation
        rows = [{**row, "first_step_s": row.get("measured", {}).get("first_step_s")} for row in rows]

    def timed(row: Mapping[str, Any]) -> bool:
        return growth and "seconds" in row

    def rate(row: Mapping[str, Any]) -> str:
        return "not run" if "not_run" in row else "" if timed(row) else number(row["images_per_s"]["median"])

    def extremes(row: Mapping[str, Any]) -> str:
        return "" if "not_run" in row else spread(row["seconds"], seconds) if timed(row) else spread(row["images_per_s"])

    def field(name: str) -> tuple[str, Callable[[Mapping[str, Any]], str]]:
        text = _FORMATS.get(name, number)
        return _TITLES.get(name, name.replace("_", " ")), lambda row: text(row[name]) if row.get(name) is not None else ""

    names = sorted({name for row in rows for name in row if name.startswith("times_")})
    names += [name for name in _COLUMNS if any(name in row for row in rows)]
    columns: list[tuple[str, Callable[[Mapping[str, Any]], str]]] = [("case", lambda row: row["case"])]
    columns += [("where", label)] if any(map(label, rows)) else []
    columns += [field(name) for name in names if growth and name == "seconds"] + [("images/s", rate)]
    columns += [("spread", extremes)] if document["repeats"] > 1 else []
    columns += [field(name) for name in names if not growth or name != "seconds"]
    columns += [("of the ceiling", ceiling_share)] if any("ceiling" in row for row in rows) else []
    return [title for title, _ in columns], [[text(row) for _, text in columns] for row in rows]


def notes(document: Mapping[str, Any]) -> list[str]:
    """Lines below the table: why a case was not run, which would widen a column, and whether other processes took part of the
    machine."""
    lines = []
    for row in document["rows"]:
        if "not_run" in row:
            where = f" ({label(row)})" if label(row) else ""
            lines.append(f"not run: {row['case']}{where}: {row['not_run']}")
    others = max((row.get("others_share") or 0.0 for row in document["rows"]), default=0.0)
    if others > NOTED_SHARE:
        lines.append(
            f"other processes used up to {100 * others:.0f} % of the cores: on a machine that does nothing else it is faster"
        )
    return lines


def ceiling_table(document: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The titles and the cells of a table of the ceilings that were measured."""
    titles = ["ceiling", "measured with", "rate", "unit", "spread"]
    rows = []
    for row in document.get("ceilings", ()):
        unit, scale = _CEILING_UNITS[row["unit"]]
        median, low, high = (row["per_s"][name] / scale for name in ("median", "min", "max"))
        digits = 0 if scale == 1 else 1 if median >= 1 else 3
        extremes = span(f"{low:,.{digits}f}", f"{high:,.{digits}f}")
        rows.append([row["ceiling"], label(row), f"{median:,.{digits}f}", unit, extremes])
    return (titles, rows) if document["repeats"] > 1 else (titles[:-1], [row[:-1] for row in rows])


def _show_ceilings(document: Mapping[str, Any]) -> None:
    columns, rows = ceiling_table(document)
    if rows:
        print_table("ceilings: what this machine reaches at most", columns, rows)


def _show_growth(document: Mapping[str, Any]) -> None:
    rows = [
        (row["case"], axis(row["varied"]), f"{row[row['varied']]:,}", number(rate["median"]), spread(rate))
        for row in document.get("growth", ())
        for rate in (row["images_per_s"],)
    ]
    if rows:
        print_table("throughput while one thing is varied", ("case", "varied", "value", "images/s", "spread"), rows)


def _show_memory(document: Mapping[str, Any]) -> None:
    rows = [
        (
            row["res"],
            *(f"{row[name]:,.0f}" for name in ("pixels_mib", "idle_rss_mib", "peak_rss_mib")),
            f"{row['times_pixels']:.2f}",
        )
        for row in document.get("memory", ())
    ]
    if rows:
        columns = ("res", "cached pixels", "imports alone", "peak", "(peak - imports) / pixels")
        print_table("memory of a process that reads batches from the cache, MiB", columns, rows)


def write_json(document: Mapping[str, Any], target: str) -> None:
    """Write the document to a file, or to standard output if the target is '-'.

    Raises:
        TidaliError: the file cannot be written.
    """
    text = json.dumps(document, indent=1 if target != "-" else None)
    if target == "-":
        print(text)
    else:
        write_atomically(Path(target), f"{text}\n".encode())


def markdown_table(document: Mapping[str, Any]) -> str:
    """The rows as a Markdown table: one line per case, and for each condition the rate and how it compares. The tables in the
    documentation are generated by it from the recorded documents, so that they cannot differ."""
    rows = document["rows"]
    places, cases = (list(dict.fromkeys(found)) for found in ((label(row) for row in rows), (row["case"] for row in rows)))
    by_place = {(row["case"], label(row)): row for row in rows}
    if any("seconds" in row for row in rows):  # of growth
        lines = [["case", *(place or "time, peak memory" for place in places)]]
        lines += [[case, *(_growth_cell(by_place.get((case, place), {})) for place in places)] for case in cases]
    else:
        memory = any("peak_rss_mib" in row for row in rows)
        columns = [cell for place in places for cell in (place or "images/s", "compared")]
        lines = [["case", *columns, *(["peak RSS, MiB"] if memory else [])]]
        for case in cases:
            found = [by_place.get((case, place)) for place in places]
            cells = [cell for row in found for cell in _markdown_cells(row)]
            cells += [number(found[0]["peak_rss_mib"]) if found[0] and "peak_rss_mib" in found[0] else ""] if memory else []
            lines.append([case, *cells])
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _growth_cell(row: Mapping[str, Any]) -> str:
    if not row or "not_run" in row:
        return "not run" if row else ""
    measured = (
        f"{seconds(row['seconds']['median'])} s" if "seconds" in row else f"{number(row['images_per_s']['median'])} images/s"
    )
    return f"{measured}, {row['peak_rss_mib']:,.0f} MiB" if "peak_rss_mib" in row else measured


def _markdown_cells(row: Mapping[str, Any] | None) -> tuple[str, str]:
    if row is None:
        return "", ""
    if "not_run" in row:
        return "not run", row["not_run"].replace("|", "\\|")
    compared = [f"{ratio(row[name])} x {name[6:]}" for name in row if name.startswith("times_") and row[name] is not None]
    compared += [ceiling_share(row)] if "ceiling" in row else []
    return f"{number(row['images_per_s']['median'])} ({spread(row['images_per_s'])})", ", ".join(compared)
