"""``tidali plot`` and ``tidali report``."""

from __future__ import annotations

from typing import Annotated

import typer

from tidali.cli.options import output_file

RunsArgument = Annotated[list[str], typer.Argument(metavar="RUN...", help="Run folders written by 'tidali train'.")]


def plot(
    runs: RunsArgument,
    out: Annotated[
        str, typer.Option("--out", "-o", metavar="FILE", help="Picture to write; ends in .png or .svg.")
    ] = "curves.png",
) -> None:
    """Draw the learning curves of one or several runs into one picture: accuracy and loss by epoch, evaluated and on train.

    The legend names each run by its folder and by the settings that differ from the other runs.
    """
    path = output_file(out, "--out", (".png", ".svg"))

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
        str | None,
        typer.Option(
            metavar="DATA", help="A packed data set to evaluate all runs on.", show_default="the one each run was trained on"
        ),
    ] = None,
) -> None:
    """Write one self-contained HTML page about a run, or about several side by side.

    It shows results, the settings that differ, learning curves, throughput, accuracy by class with its intervals, calibration,
    the most confused classes, and pictures of the most confident mistakes and of other hard samples. To view it, neither the
    network nor the run folder is needed.
    """
    path = output_file(out, "--out")

    from tidali.training.history import read_runs

    found = read_runs(runs)

    from tidali.console import say
    from tidali.hardware.cpu_memory import keep_freed_memory
    from tidali.report.run_report import write_report

    keep_freed_memory()
    write_report(found, path, data=data)
    say(f"{path}: report of {', '.join(run.name for run in found)}")
