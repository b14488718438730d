"""``tidali doctor``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tidali.cli.options import DeviceOption, JsonOption
from tidali.errors import TidaliError, counted, first_line

if TYPE_CHECKING:
    from tidali.dataset.contract import Dataset
    from tidali.doctor.findings import Finding
    from tidali.doctor.parity import Row

_MARKS = {"ok": "ok      ", "warning": "warning ", "failure": "FAILURE "}


def doctor(
    data: Annotated[
        str | None, typer.Option(metavar="DATA", help="A packed data set to check too, with all its hashes.")
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(metavar="CKPT", help="A checkpoint to check too; with --data, also whether its classes match the data's."),
    ] = None,
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Where 'tidali train' is to make run folders: can it write there?")
    ] = Path("runs"),
    device: DeviceOption = "auto",
    parity: Annotated[
        bool,
        typer.Option("--parity", help="Also print how far the ways of resizing an image differ, in grey levels of 0..255."),
    ] = False,
    json_: JsonOption = False,
) -> None:
    """Check what works on this machine, and say what is wrong and how to fix it. Exits with 1 on any failure.

    It decodes, resizes, trains and evaluates small samples on the device, in every precision that the device has, with the same
    checks as the project's tests. This takes about 20 s on two cores, and longer on a GPU, where the model is also compiled.
    """
    from tidali.console import show

    try:
        import shards.demo
        import shards.store
        import shards.verify  # noqa: F401  as make_samples and verify do later
        from tidali.doctor.machine import examine
    except (ImportError, OSError) as error:  # a missing shared library is an OSError
        text = f"this installation cannot be imported ({type(error).__name__}: {first_line(error)})"
        raise TidaliError(f"{text}; install tidali again in a new virtual environment") from None

    findings = []
    for finding in examine(make_samples, verify, device=device, out=out, data=data, checkpoint=checkpoint):
        findings.append(finding)
        if not json_:
            fix = f"; {finding.fix}" if finding.fix else ""
            show(f"{_MARKS[finding.status]}{finding.name}: {finding.text}{fix}", hang=8)
    rows = [row for finding in findings for row in finding.rows] if parity else []
    if json_:
        print(json.dumps(_document(findings, rows)))
    elif rows:
        _print_parity(rows)
    failed = [finding.name for finding in findings if finding.status == "failure"]
    if failed:
        raise TidaliError(f"{counted(len(failed), 'failure')}: {', '.join(failed)}")


def make_samples(folder: Path) -> Dataset:
    from shards.demo import pack_demo
    from tidali.dataset.contract import open_dataset

    pack_demo(folder, classes=4, per_class=20, workers=1)
    return open_dataset(folder)


def verify(location: str) -> list[str]:
    from shards.store import local_copy
    from shards.verify import verify as verify_folder

    with local_copy(location) as folder:  # the copy for training lacks quarantined files
        return [str(fault) for fault in verify_folder(folder).faults]


def _document(findings: list[Finding], rows: list[Row]) -> dict[str, Any]:
    from tidali.hardware.versions import versions

    entries = [{name: value for name, value in asdict(finding).items() if name != "rows"} for finding in findings]
    document: dict[str, Any] = {"versions": versions(), "findings": entries}
    if rows:
        document["parity"] = [
            {**asdict(row.comparison), "res": row.res, "largest": row.largest, "mean": row.mean} for row in rows
        ]
    return document


def _print_parity(rows: list[Row]) -> None:
    from tidali.console import print_table, show

    print_table(
        "resizing images of 64 px: differences in grey levels of 0..255",
        ("route", "against", "res", "largest", "allowed", "mean"),
        [
            (
                row.comparison.route,
                row.comparison.against,
                row.res,
                f"{row.largest:.2f}",
                f"{row.comparison.largest_allowed:g}",
                f"{row.mean:.3f}",
            )
            for row in rows
        ],
        left=2,
    )
    show("why so much is allowed:")
    for one in dict.fromkeys(row.comparison for row in rows):
        show(f"{one.route} against {one.against}: {one.reason}")
