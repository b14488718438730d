"""The ``tidali`` command. Imports neither torch nor DALI: each command brings in what it needs."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from tidali import __version__, cli_bench, cli_data, cli_doctor, cli_model, cli_report, cli_study, cli_train
from tidali.errors import TidaliError

app = typer.Typer(
    name="tidali",
    help="From a folder of labelled images to a trained, measured ResNet-18.",
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

DATA = "Data"
MODEL = "Model"
MEASURE = "Measure"

app.command(rich_help_panel=DATA)(cli_data.shard)
app.command(rich_help_panel=DATA)(cli_data.demo)
app.command(rich_help_panel=DATA)(cli_data.verify)
app.command(rich_help_panel=DATA)(cli_data.info)
app.command(rich_help_panel=DATA)(cli_data.download)
app.command(rich_help_panel=MODEL)(cli_train.train)
app.command(rich_help_panel=MODEL)(cli_study.study)
app.command("eval", rich_help_panel=MODEL)(cli_train.eval_)
app.command(rich_help_panel=MODEL)(cli_model.predict)
app.command(rich_help_panel=MODEL)(cli_model.export)
app.command(rich_help_panel=MODEL)(cli_report.plot)
app.command(rich_help_panel=MODEL)(cli_report.report)
app.command(rich_help_panel=MEASURE)(cli_bench.bench)
app.command(rich_help_panel=MEASURE)(cli_doctor.doctor)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"tidali {__version__}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


def main() -> None:
    """The console script: what a user can cause ends as one line and an exit code, 2 for wrong use and 1 for failed work."""
    # OpenMP's threads spin while they wait, which starves every other thread of a small machine: a ResNet-18 step on two
    # cores gave 13 images/s spinning and 46 sleeping beside one busy process; alone 91 and 76. Read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        code = app(standalone_mode=False)
    except TidaliError as error:
        sys.exit(_fail(str(error), error.exit_code))
    except BrokenPipeError:  # the reader of our output has gone, as `tidali info DATA | head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        # click's own complaints about flags and values, as typer carries them, differ by where typer takes its click from.
        if not hasattr(error, "format_message"):
            raise
        sys.exit(_fail(f"{error.format_message()} See 'tidali --help'.", getattr(error, "exit_code", 2)))
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, exit_code: int) -> int:
    print(f"tidali: {' '.join(message.split())}", file=sys.stderr)
    return exit_code
