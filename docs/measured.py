"""What the documents show of the recorded measurements in bench/results: tables, and the bar chart of loaders as SVG."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from bench.report import label, markdown_table, number, parts, ratio
from tidali.report.drawing import COLOURS
from tidali.study.explain import explain

ROOT = Path(__file__).parents[1]
RESULTS = "bench/results"
_MACHINE = "epyc-zen1-2-cores_2026-11-26"
PEERS = f"{RESULTS}/peers_{_MACHINE}.json"
STUDIES = (
    f"{RESULTS}/study_photos-12_h100-16-cores_2026-11-26.json",
    f"{RESULTS}/study_photos-24_epyc-avx512-bf16-2-cores_2026-11-25.json",
)

Row = Mapping[str, Any]


def recorded(file: str, benchmark: str) -> dict[str, Any]:
    """One benchmark of a recorded file.

    Args:
        file: its path below the repository's root.
    """
    document = json.loads((ROOT / file).read_text(encoding="utf-8"))
    (part,) = (part for part in parts(document) if part["benchmark"] == benchmark)
    return part


def benchmark_tables(page: str) -> dict[str, str]:
    """The tables that a page has places for: the name of each place, ``FILE, BENCHMARK``, and the table."""
    places = re.findall(r"<!-- begin: (bench/results/\S+\.json), (.+?) -->", page)
    return {f"{file}, {benchmark}": f"\n{markdown_table(recorded(file, benchmark))}\n" for file, benchmark in places}


# ------------------------------------------------------------------------------------------------------------- README's results


class Claim(NamedTuple):
    """A row of README's table: one case of a recorded benchmark, beside the fastest case of another project."""

    what: str
    file: str
    benchmark: str
    case: str
    ratio_to: str
    """What the recorded ``times_...`` ratio is a multiple of; empty where the file has none."""


CLAIMS = (
    Claim("loading, decoded images in memory", PEERS, "peers", "tidali cached", "torchvision"),
    Claim("loading, streamed from the shards", PEERS, "peers", "tidali streaming", "torchvision"),
    Claim("training step on data in memory", f"{RESULTS}/step_epyc-avx2-2-cores_2026-11-25.json", "step", "tidali", "original"),
    Claim("packing", f"{RESULTS}/pack_{_MACHINE}.json", "pack", "tidali", ""),
)


def results_in_short() -> str:
    """README's table: images/s at 64 and 224 px with the ratios to other projects, a link to the record in each row."""
    lines = ["| images/s | 64 px | 224 px | record |", "|---|---|---|---|"]
    for claim in CLAIMS:
        rows = recorded(claim.file, claim.benchmark)["rows"]
        cells = [_claim_cell(claim, [row for row in rows if _is_at(row, res)]) for res in (64, 224)]
        lines.append(f"| {claim.what} | {' | '.join(cells)} | [{claim.benchmark}]({claim.file}) |")
    return "\n".join(lines)


def _is_at(row: Row, res: int) -> bool:
    """Packing has no resolution: its images have 64 px."""
    return row.get("res", 64) == res and row.get("stem", "imagenet") == "imagenet"


def _claim_cell(claim: Claim, rows: Sequence[Row]) -> str:
    measured = [row for row in rows if "images_per_s" in row]
    ours = [row for row in measured if row["case"] == claim.case]
    if not ours:
        return ""
    rate = ours[0]["images_per_s"]["median"]
    compared = []
    if claim.ratio_to:
        whose = {"original": "the original study's loop"}.get(claim.ratio_to, claim.ratio_to)
        compared.append(f"{ratio(ours[0][f'times_{claim.ratio_to}'])} x {whose}")
    others = [row for row in measured if not row["case"].startswith("tidali")]
    fastest = max(others, key=lambda row: row["images_per_s"]["median"])
    if claim.ratio_to != "original":  # there is no other case in that record
        compared.append(f"{ratio(rate / fastest['images_per_s']['median'])} x {fastest['case']}")
    return f"**{number(rate)}**: {', '.join(compared)}"


# ------------------------------------------------------------------------------------------------------------------- the study


def study_table(file: str) -> str:
    """The rows of a recorded study, the last weights at other resolutions, and why row 5 is above row 4 or is not."""
    study = json.loads((ROOT / file).read_text(encoding="utf-8"))
    lines = ["", "| row | starts from, how | published, Tiny-ImageNet | last | best | GMACs |", "|---|---|---|---|---|---|"]
    for row in study["rows"]:
        published, found = row["published_top1_percent"], row["top1_percent"]
        cells = [row["row"], f"{row['title']} ({row['setting']})", "" if published is None else f"{published:.1f}"]
        cells += [_with_deviation(found[which]) for which in ("last", "best")]
        lines.append(f"| {' | '.join([*cells, format(row['gmacs'], '.3f')])} |")
    measured = [row for row in study["rows"] if len(row["at_resolution"]) > 1]
    sizes = [one["res"] for one in measured[0]["at_resolution"]]
    lines += ["", f"| last weights, top-1 % | {' | '.join(f'{size} px' for size in sizes)} |", f"|---|{'---|' * len(sizes)}"]
    for row in measured:
        accuracies = [f"{one['top1_percent']:.1f}" for one in row["at_resolution"]]
        lines.append(f"| row {row['row']} | {' | '.join(accuracies)} |")
    explanation = explain(study)
    if explanation is not None:
        lines += ["", "### Row 5 against row 4", "", *explanation.markdown()]
    return "\n".join([*lines, ""])


def study_in_short() -> str:
    """README's table of the study: its rows, published and as recorded at full epochs."""
    study = json.loads((ROOT / STUDIES[0]).read_text(encoding="utf-8"))
    lines = ["", "| row | starts from | published | here |", "|---|---|---|---|"]
    for row in study["rows"]:
        published = row["published_top1_percent"]
        here = _with_deviation(row["top1_percent"]["last"])
        lines.append(f"| {row['row']} | {row['title']} | {'' if published is None else f'{published:.1f}'} | {here} |")
    return "\n".join([*lines, ""])


def _with_deviation(found: Mapping[str, Any]) -> str:
    deviation = "" if found["deviation"] is None else f" ± {found['deviation']:.1f}"
    return f"{found['mean']:.1f}{deviation}"


# --------------------------------------------------------------------------------------------------------------------- picture

# In SVG's pixels. A phone shows it 360 wide: its smallest letters are then 11 pixels high.
_WIDTH, _NAMES, _BARS, _PITCH, _HEAD = 392, 158, 158, 18, 34
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', Helvetica, Arial, sans-serif"


def loaders_chart(*, dark: bool) -> str:
    """A panel of bars for each resolution, the fastest loader first, tidali's highlighted. The background is transparent.

    It is written by hand and not by matplotlib, whose coordinates differ from version to version: equal records give equal
    bytes everywhere, and the file is small enough to be kept in the repository.

    Args:
        dark: in the colours for a dark page.
    """
    document = recorded(PEERS, "peers")
    colour = {name: pair[dark] for name, pair in COLOURS.items()}
    elements, y = [], 0
    for place in dict.fromkeys(label(row) for row in document["rows"]):
        rows = [row for row in document["rows"] if label(row) == place]
        measured = sorted((row for row in rows if "images_per_s" in row), key=lambda row: -row["images_per_s"]["median"])
        per_pixel = max(row["images_per_s"]["max"] for row in measured) / _BARS
        elements.append(_text(0, y + 20, f"Loaders at {place}, images/s", colour["ink"], size=14, weight=600))
        y += _HEAD
        for row in measured:
            elements += _bar(row, y, per_pixel, colour)
            y += _PITCH
        for row in rows:
            if "not_run" in row:
                elements += [_name(row["case"], y, colour), _text(_NAMES + 8, y + 13, "not run", colour["muted"])]
                y += _PITCH
        y += 10
    for line in _about(document):
        elements.append(_text(0, y + 13, line, colour["muted"], size=12))
        y += 16
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {y + 4}" width="{_WIDTH}" height="{y + 4}"'
    return "\n".join(
        [f'{head} role="img" font-family="{_FONT}">', "<title>Loaders, images per second</title>", *elements, "</svg>\n"]
    )


def _bar(row: Row, y: int, per_pixel: float, colour: Mapping[str, str]) -> list[str]:
    """Name, bar, a line from the lowest to the highest repeat, number."""
    rate, left, middle = row["images_per_s"], _NAMES + 8, y + 9
    ends = [left + rate[name] / per_pixel for name in ("median", "min", "max")]
    fill = colour["series-0" if _is_ours(row) else "pale"]
    return [
        _name(row["case"], y, colour, weight=600 if _is_ours(row) else 400),
        f'<rect x="{left}" y="{y + 3}" width="{ends[0] - left:.1f}" height="12" fill="{fill}"/>',
        f'<path d="M{ends[1]:.1f} {middle}H{ends[2]:.1f}" stroke="{colour["ink"]}" stroke-width="1.2"/>',
        _text(ends[2] + 6, y + 13, number(rate["median"]), colour["ink"], weight=600 if _is_ours(row) else 400),
    ]


def _is_ours(row: Row) -> bool:
    return row["case"].startswith("tidali")


def _name(case: str, y: int, colour: Mapping[str, str], *, weight: int = 400) -> str:
    return _text(_NAMES, y + 13, case, colour["ink"], weight=weight, anchor="end")


def _text(x: float, y: float, text: str, fill: str, *, size: int = 13, weight: int = 400, anchor: str = "start") -> str:
    style = f'font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" fill="{fill}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>'


def _about(document: Mapping[str, Any]) -> list[str]:
    machine = document["machine"]
    where = machine["gpu"] or f"{machine['cpu']}, no GPU"
    return [
        f"Median of {document['repeats']} repeats; the line: lowest to highest.",
        f"{where}, {document['cores']} cores,",
        f"batches of {document['batch_size']}, {document['date']}.",
    ]
