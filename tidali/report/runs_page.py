"""A page that lists training runs and links their reports."""

from __future__ import annotations

import os
import shlex
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from tidali import __version__
from tidali.errors import counted
from tidali.files import write_atomically
from tidali.report.page import render
from tidali.training.run_index import Entry


def write_runs_page(
    entries: Sequence[Entry], rows: Sequence[Mapping[str, str]], root: Path, out: Path, *, text_columns: Collection[str]
) -> None:
    """Write the page. It appears whole or not at all.

    Args:
        entries: the runs.
        rows: for each, its cells by the name of the column, the run's name first.
        root: the folder that was looked through.
        text_columns: those that are no figures, which are aligned to the left.

    Raises:
        TidaliError: it cannot be written.
    """
    shown = []
    findings: dict[str, list[str]] = {}  # to the names of the runs that have them
    for entry, row in zip(entries, rows, strict=True):
        report = entry.folder / "report.html"
        command = ["tidali", "report", str(entry.folder), "-o", str(report)]
        shown.append(
            {
                "name": entry.name,
                "cells": list(row.items())[1:],
                "link": quote(os.path.relpath(report, out.absolute().parent)) if entry.report is not None else None,
                "command": shlex.join(command) if entry.report is None and entry.figure("last") is not None else None,
            }
        )
        for finding in entry.findings:
            findings.setdefault(str(finding), []).append(entry.name)
    page = render(
        "runs.html",
        title=f"Training runs in {root}",
        made=f"{counted(len(entries), 'run')}, listed by tidali {__version__}",
        columns=list(rows[0]) if rows else [],
        rows=shown,
        findings=findings,
        text_columns=text_columns,
    )
    write_atomically(out, page)
