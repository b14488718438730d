"""``tidali doctor``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from tidali.cli_train import DeviceOption
from tidali.errors import TidaliError

_MARKS = {"ok": "ok      ", "warning": "warning ", "failure": "FAILURE "}


def doctor(
    data: Annotated[str | None, typer.Option(help="A packed data set to look at too.")] = None,
    out: Annotated[Path, typer.Option(help="Where run folders will be made.")] = Path("runs"),
    device: DeviceOption = "auto",
    parity: Annotated[
        bool, typer.Option("--parity", help="Also print how far the routes to a network's input differ, in grey levels.")
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of lines.")] = False,
) -> None:
    """Look at what this machine can do, and say what to mend. Exits with 1 on any failure."""
    from tidali.console import print_table, results
    from tidali.doctor import examine, parity_rows

    findings = []
    for finding in examine(device, data, out):
        findings.append(finding)
        if not json_:
            mend = f"; {finding.mend}" if finding.mend else ""
            results.print(f"{_MARKS[finding.status]}{finding.name}: {finding.text}{mend}", markup=False)
    rows = parity_rows() if parity else []
    if json_:
        document = {"findings": [asdict(finding) for finding in findings]}
        if parity:
            document["parity"] = [
                {**asdict(row.comparison), "res": row.res, "largest": row.largest, "mean": row.mean} for row in rows
            ]
        print(json.dumps(document))
    elif rows:
        print_table(
            "differences from 64 px, in grey levels of 0..255",
            ("route", "against", "res", "largest", "allowed", "mean", "why that much"),
            [
                (
                    row.comparison.route,
                    row.comparison.against,
                    row.res,
                    f"{row.largest:.2f}",
                    f"{row.comparison.largest_allowed:g}",
                    f"{row.mean:.3f}",
                    row.comparison.reason,
                )
                for row in rows
            ],
        )
    failed = [finding.name for finding in findings if finding.status == "failure"]
    if failed:
        raise TidaliError(f"{len(failed)} failure{'s' if len(failed) > 1 else ''}: {', '.join(failed)}")
