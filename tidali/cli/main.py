"""The ``tidali`` command. Imports neither torch nor DALI: each command brings in what it needs."""

from __future__ import annotations

import errno
import inspect
import os
import re
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from tidali import __version__, console
from tidali.cli import bench as cli_bench
from tidali.cli import data as cli_data
from tidali.cli import doctor as cli_doctor
from tidali.cli import model as cli_model
from tidali.cli import report as cli_report
from tidali.cli import study as cli_study
from tidali.cli import train as cli_train
from tidali.cli.examples import CommandWithExamples, ProgramWithExamples
from tidali.errors import Interrupted, TidaliError, UsageError
from tidali.hardware.cpu_threads import wait_briefly

app = typer.Typer(
    name="tidali",
    help="From a folder of labelled images to a trained, measured ResNet-18.",
    cls=ProgramWithExamples,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",  # markdown takes the stars of CLASS/*.jpg for emphasis
    context_settings={"help_option_names": ["-h", "--help"]},
)

DATA = "Data"
MODEL = "Model"
MEASURE = "Measure"


def _add(function: Callable[..., Any], panel: str, name: str | None = None) -> None:
    help_ = re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.getdoc(function) or "")  # a paragraph is as wide as the terminal
    app.command(name, cls=CommandWithExamples, rich_help_panel=panel, help=help_)(function)


_add(cli_data.shard, DATA)
_add(cli_data.demo, DATA)
_add(cli_data.verify, DATA)
_add(cli_data.info, DATA)
_add(cli_data.download, DATA)
_add(cli_train.train, MODEL)
_add(cli_study.study, MODEL)
_add(cli_train.eval_, MODEL, "eval")
_add(cli_model.predict, MODEL)
_add(cli_model.export, MODEL)
_add(cli_report.plot, MODEL)
_add(cli_report.report, MODEL)
_add(cli_bench.bench, MEASURE)
_add(cli_doctor.doctor, MEASURE)


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
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Before a command: results, warnings and errors alone.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Before a command: more messages, when each came, and where an error arose.")
    ] = False,
) -> None:
    if quiet and verbose:
        raise UsageError("--quiet and --verbose: give one of them")
    console.set_verbosity("quiet" if quiet else "verbose" if verbose else "normal")
    if context.invoked_subcommand is None:
        print(context.get_help())
    else:
        console.detail(f"tidali {__version__}, Python {sys.version.partition(' ')[0]}, process {os.getpid()}")


def main() -> None:
    """The console script: what a user can cause ends as one line and an exit code, 2 for wrong use and 1 for failed work."""
    wait_briefly()
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()  # here, where a full disk can be said in a line; at the interpreter's end it cannot
    except TidaliError as error:
        if console.is_verbose():
            _print_traceback(error)
        if isinstance(error, Interrupted) and not console.is_main_rank():
            sys.exit(error.exit_code)  # all ranks stopped alike
        sys.exit(_fail(str(error), error.exit_code))
    except BrokenPipeError:  # the reader of our output has gone, as `tidali info DATA | head` does
        _drop_output()
        sys.exit(1)
    except OSError as error:
        if error.filename is not None or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            raise  # of a file, which its writer should have caught, or of something else
        _drop_output()
        sys.exit(_fail(f"standard output: {error.strerror}", 1))
    except Exception as error:
        # click's own complaints about flags and values, as typer carries them, differ by where typer takes its click from.
        if not hasattr(error, "format_message"):
            raise
        context = getattr(error, "ctx", None)
        command = f"{context.info_name} " if context is not None and context.parent is not None else ""
        sys.exit(_fail(f"{error.format_message()} See 'tidali {command}--help'.", getattr(error, "exit_code", 2)))
    sys.exit(code if isinstance(code, int) else 0)


def _drop_output() -> None:
    """What standard output still holds goes nowhere: the interpreter would try again at its end, and complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print_traceback(error: BaseException) -> None:
    import traceback

    traceback.print_exception(error)


def _fail(message: str, exit_code: int) -> int:
    print(f"tidali: {' '.join(message.split())}", file=sys.stderr)
    return exit_code
