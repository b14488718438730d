"""The ``tidali`` command. Imports neither torch nor DALI: each command brings in what it needs."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from tidali import __version__, cli_bench, cli_data, cli_train
from tidali.errors import TidaliError

app = typer.Typer(
    name="tidali",
    help="From a folder of labelled images to a trained, measured ResNet-18.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

DATA = "Data"
MODEL = "Model"
MEASURE = "Measure"

app.command(rich_help_panel=DATA)(cli_data.shard)
app.command(rich_help_panel=DATA)(cli_data.demo)
app.command(rich_help_panel=MODEL)(cli_train.train)
app.command("eval", rich_help_panel=MODEL)(cli_train.eval_)
app.command(rich_help_panel=MEASURE)(cli_bench.bench)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"tidali {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """The console script: what a user can cause ends as one line and an exit code, 2 for wrong use and 1 for failed work."""
    # OpenMP's threads spin while they wait, which starves DALI's: a training step beside other work on two cores gave 19 img/s
    # spinning and 39 sleeping. Must be set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        app()
    except TidaliError as error:
        print(f"tidali: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
