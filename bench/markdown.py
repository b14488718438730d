"""A document's tables as Markdown. docs/generate.py makes docs/results.md's with it from the records."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.report import label, number, ratio, spread


def table(document: Mapping[str, Any]) -> str:
    """A line a case, and for each place that it was measured at its rate and what that is a multiple or a share of."""
    rows = document["rows"]
    places, cases = (list(dict.fromkeys(found)) for found in ((label(row) for row in rows), (row["case"] for row in rows)))
    by_place = {(row["case"], label(row)): row for row in rows}
    memory = any("peak_rss_mib" in row for row in rows)
    head = ["", *(cell for place in places for cell in (place or "images/s", ""))] + (["peak RSS, MiB"] if memory else [])
    lines = [head, ["---"] * len(head)]
    for case in cases:
        found = [by_place.get((case, place)) for place in places]
        cells = [cell for row in found for cell in _cells(row)]
        cells += [number(found[0]["peak_rss_mib"]) if found[0] and "peak_rss_mib" in found[0] else ""] if memory else []
        lines.append([case, *cells])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cells(row: Mapping[str, Any] | None) -> tuple[str, str]:
    if row is None:
        return "", ""
    if "not_run" in row:
        return "not run", row["not_run"].replace("|", "\\|")
    compared = [f"{ratio(row[name])} x {name[6:]}" for name in row if name.startswith("times_") and row[name] is not None]
    ceiling = row.get("ceiling")
    compared += [f"{100 * ceiling['share']:.0f} % of {ceiling['name']}"] if ceiling else []
    return f"{number(row['images_per_s']['median'])} ({spread(row['images_per_s'])})", ", ".join(compared)
