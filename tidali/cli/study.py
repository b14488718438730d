"""``tidali study``."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from tidali.cli.train import AmpOption, CacheOption, CompileOption, DataOption, DeviceOption
from tidali.errors import UsageError


def study(
    data: DataOption,
    rows: Annotated[
        str | None,
        typer.Option(help="Rows to run, such as 1,7; those they start from are added.", show_default="all"),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each row, for a mean and a deviation.")] = 1,
    epochs_scale: Annotated[float, typer.Option(help="All epochs times this: 0.2 is a quick look.")] = 1.0,
    imagenet_weights: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Weights in the place of torchvision's ImageNet ones: .pth, .safetensors or a run folder.",
            show_default="torchvision's, downloaded once",
        ),
    ] = None,
    device: DeviceOption = "auto",
    amp: AmpOption = "auto",
    compile: CompileOption = "auto",
    cache: CacheOption = "auto",
    out: Annotated[str | None, typer.Option(help="Folder of the study.", show_default="runs/study-DATA")] = None,
) -> None:
    """Train and measure the rows of the transfer-learning study, and put them into one table.

    Writes study.json, study.md and study.html, and a run folder for each row. Run again, it keeps the rows that are finished.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("tidali study is one process; under torchrun give a row's config.json to 'tidali train --config'")

    from tidali.console import print_table, say
    from tidali.dataset.source import open_data
    from tidali.study.run import StudySettings, run_study
    from tidali.study.table import COLUMNS, cells, notes

    settings = StudySettings(
        data=data,
        out=out if out is not None else str(Path("runs") / f"study-{Path(data).name}"),
        rows=tuple(name.strip() for name in rows.split(",") if name.strip()) if rows is not None else (),
        seeds=seeds,
        epochs_scale=epochs_scale,
        imagenet_weights=imagenet_weights,
        device=device,
        amp=amp,
        compile=compile,
        cache=cache,
    )
    document = run_study(settings, open_data(data), command=shlex.join(["tidali", *sys.argv[1:]]))
    print_table(f"{settings.out}", COLUMNS, [cells(row, short=True) for row in document["rows"]])
    for note in notes(document):
        say(note)
    say(f"{Path(settings.out) / 'study.html'} has the curves and pictures")
