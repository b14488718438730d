"""The ``tidali`` command. Imports neither torch nor DALI: each command imports what it needs when it runs."""

from __future__ import annotations

import errno
import inspect
import io
import os
import re
import signal
import sys
import traceback
from typing import Annotated

import typer

from tidali import __version__, console
from tidali.cli.bench import bench
from tidali.cli.data import download, info, verify
from tidali.cli.doctor import doctor
from tidali.cli.evaluate import eval_
from tidali.cli.examples import CommandWithExamples, ProgramWithExamples
from tidali.cli.model import export, predict
from tidali.cli.packing import adopt, demo, shard
from tidali.cli.report import plot, report
from tidali.cli.runs import runs
from tidali.cli.study import study
from tidali.cli.train import train
from tidali.errors import Interrupted, TidaliError, UsageError, explain_out_of_memory
from tidali.hardware.cpu_threads import limit_threads, wait_briefly
from tidali.hardware.limits import raise_open_files_limit

app = typer.Typer(
    name="tidali",
    help="From a folder of labelled images to a trained, measured ResNet.",
    cls=ProgramWithExamples,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",  # markdown takes the stars of CLASS/*.jpg for emphasis
    context_settings={"help_option_names": ["-h", "--help"]},
)

for panel, functions in {
    "Data": (shard, adopt, demo, verify, info, download),
    "Model": (train, study, eval_, predict, export, plot, report, runs),
    "Measure": (bench, doctor),
}.items():
    for function in functions:
        # Joined lines: a paragraph is as wide as the terminal. The items of a list have lines of their own.
        text = re.sub(r"(?<!\n)\n(?!\n|- )", " ", inspect.getdoc(function) or "")
        name = function.__name__.rstrip("_")
        app.command(name, cls=CommandWithExamples, rich_help_panel=panel, help=text)(function)


def _print_version(given: bool) -> None:
    if given:
        print(f"tidali {__version__}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print only results, warnings and errors. It goes before the command.")
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose",
            "-v",
            help="Print more messages, their times, and tracebacks of errors. It goes before the command.",
        ),
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
    """The console script. An error that a user can cause ends as one line and an exit code: 2 for wrong use, 1 for failed
    work."""
    wait_briefly()
    limit_threads()
    raise_open_files_limit()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # where the locale is not UTF-8, class names are printed as escapes
            stream.reconfigure(errors="backslashreplace")
    try:
        with explain_out_of_memory("the data of this command"):
            code = app(standalone_mode=False)
        sys.stdout.flush()  # a full disk is reported here in one line; the interpreter's own flush at exit could not
    except TidaliError as error:
        if console.is_verbose():
            traceback.print_exception(error)
        if isinstance(error, Interrupted) and not console.is_main_rank():
            sys.exit(error.exit_code)  # every rank stopped for the same reason; the main rank prints it
        sys.exit(_fail(str(error), error.exit_code))
    except KeyboardInterrupt:  # before the command began
        sys.exit(_fail("interrupted", 128 + signal.SIGINT))
    except BrokenPipeError:  # the reader of our output has exited, as in `tidali info DATA | head`
        _discard_output()
        sys.exit(1)
    except OSError as error:
        if error.filename is not None or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            raise  # not about standard output: a file, whose writer should have caught it, or something else
        _discard_output()
        sys.exit(_fail(f"standard output: {error.strerror}", 1))
    except Exception as error:
        # click's own errors about flags and values. Their class depends on where typer takes its click from.
        if not hasattr(error, "format_message"):
            raise
        context = getattr(error, "ctx", None)
        command = f"{context.info_name} " if context is not None and context.parent is not None else ""
        sys.exit(_fail(f"{error.format_message()} See 'tidali {command}--help'.", getattr(error, "exit_code", 2)))
    sys.exit(code if isinstance(code, int) else 0)


def _discard_output() -> None:
    """Send what standard output still buffers nowhere: the interpreter would try to write it again at exit, and complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, exit_code: int) -> int:
    console.fail(message)
    return exit_code
