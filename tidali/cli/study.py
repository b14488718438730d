"""``tidali study``."""

from __future__ import annotations

import inspect
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from tidali.cli.options import AmpOption, ArchOption, CacheOption, CompileOption, DataOption, DeviceOption
from tidali.errors import TidaliError, UsageError, counted
from tidali.study.rows import ROWS


def study(
    data: DataOption,
    rows: Annotated[
        str | None,
        typer.Option(
            metavar="ROW,ROW",
            help="Rows to run, such as 1,7; the rows whose weights they start from are added.",
            show_default="all",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each row, for the mean and the standard deviation.")] = 1,
    epochs_scale: Annotated[
        float, typer.Option(help="Multiply the number of epochs of every row by this; 0.2 gives a quick look.")
    ] = 1.0,
    arch: ArchOption = "resnet18",
    imagenet_weights: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Weights to use instead of torchvision's ImageNet weights: .pth, .safetensors or a run folder.",
            show_default="torchvision's, downloaded once",
        ),
    ] = None,
    device: DeviceOption = "auto",
    amp: AmpOption = "auto",
    compile: CompileOption = "auto",
    cache: CacheOption = "auto",
    out: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Folder of the study.", show_default="runs/study-DATA")
    ] = None,
) -> None:
    """Train and evaluate the rows of the transfer-learning study, and write them as one table.

    Writes study.json, study.md and study.html, and a run folder for each row. When run again, it keeps the finished rows and
    resumes the stopped one. These are the rows:
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            "tidali study runs in one process; under torchrun, use 'tidali train --config' with the config.json of a row"
        )

    from tidali.console import print_table, say, show, suggest
    from tidali.dataset.source import open_data
    from tidali.study.run import run_study
    from tidali.study.settings import StudySettings
    from tidali.study.table import COLUMNS, cells, findings, measured_on, notes, rows_without_result

    settings = StudySettings(
        data=data,
        out=out if out is not None else str(Path("runs") / f"study-{Path(data).name}"),
        rows=tuple(name.strip() for name in rows.split(",") if name.strip()) if rows is not None else (),
        seeds=seeds,
        epochs_scale=epochs_scale,
        arch=arch,
        imagenet_weights=imagenet_weights,
        device=device,
        amp=amp,
        compile=compile,
        cache=cache,
    )
    document = run_study(settings, open_data(data), command=shlex.join(["tidali", *sys.argv[1:]]))
    print_table(settings.out, COLUMNS, [cells(row, short=True) for row in document["rows"]], left=2)
    for finding in findings(document):
        show(finding)
    for note in (measured_on(document), *notes(document), *rows_without_result(document)):
        say(note)
    runs = [Path(settings.out) / row["runs"][0]["folder"] for row in document["rows"] if row["runs"]]
    if runs:
        say(f"{Path(settings.out) / 'study.html'}: learning curves and pictures")
        page = Path(settings.out) / "report.html"
        suggest("the rows side by side, with the accuracy of every class", "tidali", "report", *runs, "-o", page)
    if diverged := [row["row"] for row in document["rows"] if row["status"] == "diverged"]:
        raise TidaliError(f"{counted(len(diverged), 'row')} of the study diverged: {', '.join(diverged)}")


study.__doc__ = "\n".join([inspect.getdoc(study) or "", "", *(f"- {row.name}: {row.title}" for row in ROWS)])
