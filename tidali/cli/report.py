"""``tidali plot`` and ``tidali report``."""

from __future__ import annotations

from typing import Annotated

import typer

RunsArgument = Annotated[list[str], typer.Argument(metavar="RUN...", help="Run folders that 'tidali train' has written.")]


def plot(
    runs: RunsArgument,
    out: Annotated[
        str, typer.Option("--out", "-o", metavar="FILE", help="Picture to write, as PNG or SVG by its suffix.")
    ] = "curves.png",
) -> None:
    """Draw the learning curves of one or several runs into a picture: accuracy and loss by epoch, evaluated and on train.

    Each run is named by its folder and what sets it apart from the others.
    """
    from tidali.report.drawing import check_figure_path

    path = check_figure_path(out, "--out")

    from tidali.training.history import labels, read_runs

    found = read_runs(runs)

    from tidali.console import say
    from tidali.report.drawing import save_figure
    from tidali.report.figures import comparison

    save_figure(comparison(found, labels(found)), path)
    say(f"{path}: the curves of {', '.join(run.name for run in found)}")


def report(
    runs: RunsArgument,
    out: Annotated[str, typer.Option("--out", "-o", metavar="FILE", help="Page to write.")] = "report.html",
    data: Annotated[
        str | None, typer.Option(help="The runs' packed data set.", show_default="the one that each was trained on")
    ] = None,
) -> None:
    """Write one self-contained HTML page for a run, or for several side by side.

    Results, settings that differ, learning curves, throughput, accuracy by class, the most confused classes and the hardest
    samples with their pictures. The page needs neither network nor the run folder.
    """
    from pathlib import Path

    from tidali.report.drawing import check_folder

    path = check_folder(Path(out), "--out")

    from tidali.training.history import read_runs

    found = read_runs(runs)

    from tidali.console import say
    from tidali.report.run_report import write_report

    write_report(found, path, data=data)
    say(f"{path}: report of {', '.join(run.name for run in found)}")
