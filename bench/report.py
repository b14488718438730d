"""What a benchmark prints and writes: a table for people, one JSON document for machines."""

from __future__ import annotations

import json
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

from tidali.console import print_table
from tidali.device import DevicePlan, cpu_count
from tidali.environment import versions
from tidali.errors import TidaliError

SCHEMA_VERSION = 1


def environment(plan: DevicePlan) -> dict[str, Any]:
    """What a figure is worth nothing without."""
    return {
        "schema_version": SCHEMA_VERSION,
        "date": date.today().isoformat(),
        "commit": commit(),
        "versions": versions(),
        "device": {"type": plan.device.type, "name": plan.name},
        "cores": cpu_count(),
        "dtype": plan.dtype_name,
        "compile": plan.compile,
    }


def commit() -> str | None:
    """The commit of the checkout that the program runs from, with ``-dirty`` where it was changed; None where installed."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def show(document: dict[str, Any]) -> None:
    """The table, on standard output."""
    about = [f"median of {document['repeats']} (lowest to highest)"]
    if "device" in document:
        about += [
            document["device"]["name"],
            f"{document['cores']} cores",
            document["dtype"],
            f"batch {document['batch_size']}",
        ]
    rows = document["rows"]
    extra = [name for name in ("times_torchvision", "peak_rss_mib") if any(name in row for row in rows)]
    print_table(
        f"images/s, {', '.join(about)}",
        ("case", "res", "images/s", "spread", *(name.replace("_", " ") for name in extra)),
        [
            (
                row["case"],
                row.get("res", ""),
                f"{rate['median']:,.0f}",
                f"{rate['min']:,.0f} to {rate['max']:,.0f}",
                *(f"{row[name]:,.1f}" for name in extra),
            )
            for row in rows
            for rate in (row["images_per_s"],)
        ],
    )
    if "memory" in document:
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


def write_json(document: dict[str, Any], target: str) -> None:
    """Write the document to a file, or to standard output where the target is '-'.

    Raises:
        TidaliError: the file cannot be written.
    """
    text = json.dumps(document, indent=1 if target != "-" else None)
    if target == "-":
        print(text)
        return
    try:
        Path(target).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise TidaliError(f"--json {target}: cannot be written ({error.strerror})") from None
