"""``tidali bench``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tidali.cli.train import MACHINE, AmpOption, CacheOption, DeviceOption, demo_data, parse_resolutions
from tidali.errors import TidaliError, UsageError

if TYPE_CHECKING:
    from bench.compare import Comparison
    from tidali.dataset.contract import Dataset

# Groups of options in the help.
WHAT = "What to measure"
RESULT = "What becomes of it"

PLOT_SUFFIXES = (".png", ".svg", ".html")
TRAINING_BATCH_SIZE = 32
"""Of whole loops beside each other: 256 images of 224 px are ten seconds a step on a CPU, and there are eight loops."""


USED_BY = {
    "res": ("train", "step", "loader", "peers"),
    "data": ("train", "loader", "pack", "peers"),
    "stem": ("train",),
    "batch_size": ("train", "step", "loader", "peers"),
    "device": ("train", "step"),
    "amp": ("train", "step"),
    "compile": ("train", "step"),
    "cache": ("train",),
    "peers": ("peers",),
    "training": ("peers",),
    "profile": ("train", "step"),
}
"""Options and the cases that they change; those that are not here change all."""


def bench(
    context: typer.Context,
    case: Annotated[
        Literal["train", "step", "loader", "pack", "peers", "all"],
        typer.Argument(help="What to measure; all: one after the other."),
    ] = "train",
    res: Annotated[str, typer.Option(help="Input sides in pixels, such as 64,224.", rich_help_panel=WHAT)] = "64,224",
    data: Annotated[
        str | None, typer.Option(help="A packed data set.", show_default="built-in demo data", rich_help_panel=WHAT)
    ] = None,
    stem: Annotated[
        Literal["imagenet", "small"], typer.Option(help="train: the model's stem.", rich_help_panel=WHAT)
    ] = "imagenet",
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Images a step.",
            min=2,
            show_default="train: 256 on CUDA, 32 on a CPU; step: 100; loader, peers: 256, --training: 32",
            rich_help_panel=WHAT,
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(help="Measurements of each row, interleaved.", min=1, rich_help_panel=WHAT)] = 5,
    device: DeviceOption = "auto",
    amp: AmpOption = "auto",
    compile: Annotated[
        Literal["auto", "on", "max-autotune", "off"],
        typer.Option(help="train, step: torch.compile; auto decides by device.", rich_help_panel=MACHINE),
    ] = "auto",
    cache: CacheOption = "auto",
    peers: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES", help="peers: these alone, such as torchvision,ffcv.", show_default="all", rich_help_panel=WHAT
        ),
    ] = None,
    training: Annotated[
        bool, typer.Option("--training", help="peers: whole training loops instead of loaders.", rich_help_panel=WHAT)
    ] = False,
    json_: Annotated[
        str | None,
        typer.Option("--json", metavar="FILE", help="Also write one JSON document; '-' prints it.", rich_help_panel=RESULT),
    ] = None,
    plot: Annotated[
        str | None, typer.Option(metavar="FILE", help="Draw it, as .png, .svg or .html.", rich_help_panel=RESULT)
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(
            metavar="OLD.json", help="Print new/old of each case; exits 1 where one became slower.", rich_help_panel=RESULT
        ),
    ] = None,
    tolerance: Annotated[
        float, typer.Option(metavar="PERCENT", min=0, help="compare: what counts as slower.", rich_help_panel=RESULT)
    ] = 10.0,
    profile: Annotated[
        bool,
        typer.Option(
            "--profile",
            help="train, step: also a torch profiler trace, beside --json, and its summary.",
            rich_help_panel=RESULT,
        ),
    ] = False,
) -> None:
    """Measure images/s, and say what holds this machine back.

    train: decoding, loading, the training step on synthetic data, and training end to end. step: tidali's training step beside
    the original study's loop. loader: tidali's routes from shards to batches, and how they grow. pack: packing 110,000 images
    by tidali, webdataset and FFCV. peers: the loaders that people use today, on the same images to the same batches.
    """
    resolutions = parse_resolutions(res)
    for flag, name in (("--json", json_), ("--plot", plot)):
        if name is not None and not Path(name).parent.is_dir():
            raise UsageError(f"{flag} {name}: there is no folder {Path(name).parent}")
    if plot is not None and Path(plot).suffix not in PLOT_SUFFIXES:
        raise UsageError(f"--plot {plot}: end its name in {', '.join(PLOT_SUFFIXES)}")
    _refuse_unused(context, case)

    from bench.compare import load
    from bench.report import show, write_json
    from tidali.console import say

    old = load(Path(compare), "training peers" if training else case) if compare is not None else None
    trace = _trace_path(json_) if profile else None

    def dataset() -> Dataset:
        from tidali.dataset.source import open_data

        return open_data(data if data is not None else str(demo_data()))

    def run_train() -> dict[str, Any]:
        from bench.train import bench_train

        return bench_train(
            dataset(),
            resolutions=resolutions,
            stem=stem,
            batch_size=batch_size,
            repeats=repeats,
            device=device,
            amp=amp,
            compile=compile,
            cache=cache,
            profile=trace,
        )

    def run_step() -> dict[str, Any]:
        from bench.step import BATCH_SIZE, bench_step

        return bench_step(
            resolutions=resolutions,
            batch_size=batch_size or BATCH_SIZE,
            repeats=repeats,
            device=device,
            amp=amp,
            compile=compile,
            profile=trace,
        )

    def run_loader() -> dict[str, Any]:
        from bench.loading import bench_loader

        return bench_loader(dataset(), resolutions=resolutions, batch_size=batch_size or 256, repeats=repeats)

    def run_pack() -> dict[str, Any]:
        from bench.pack import bench_pack

        return bench_pack(dataset() if data is not None else None, repeats=repeats)

    def run_peers() -> dict[str, Any]:
        from bench.peers import bench_peers, bench_training_peers

        return (bench_training_peers if training else bench_peers)(
            dataset(),
            resolutions=resolutions,
            batch_size=batch_size or (TRAINING_BATCH_SIZE if training else 256),
            repeats=repeats,
            peers=peers.split(",") if peers is not None else None,
        )

    benchmarks = {"train": run_train, "step": run_step, "loader": run_loader, "pack": run_pack, "peers": run_peers}
    if case == "all":
        from bench.all import bench_all

        def keep(so_far: dict[str, Any]) -> None:
            if json_ is not None and json_ != "-":
                write_json(so_far, json_)

        document = bench_all(benchmarks, keep)
    else:
        document = benchmarks[case]()

    if json_ != "-":
        show(document)
    if json_ is not None:
        write_json(document, json_)
    if plot is not None:
        from bench.plot import write_plot

        write_plot(document, Path(plot))
        say(f"plot: {plot}")
    if old is not None:
        from bench.compare import compare as compare_documents

        _tell(compare_documents(document, old, tolerance), on_stdout=json_ != "-")


def _refuse_unused(context: typer.Context, case: str) -> None:
    """An option that a case has no use for would be taken for measured.

    Raises:
        UsageError: names the option, and the cases that it goes with.
    """
    if case == "all":
        return
    for name, cases in USED_BY.items():
        source = context.get_parameter_source(name)
        if case not in cases and source is not None and source.name == "COMMANDLINE":
            fitting = ", ".join(f"'bench {one}'" for one in cases)
            raise UsageError(f"--{name.replace('_', '-')}: goes with {fitting}, not with 'bench {case}'")


def _trace_path(json_: str | None) -> Path:
    """What the traces' names begin with."""
    if json_ is None or json_ == "-":
        return Path("bench-profile.json")
    return Path(json_).with_name(f"{Path(json_).stem}-profile.json")


def _tell(comparison: Comparison, *, on_stdout: bool) -> None:
    """Print a comparison.

    Raises:
        TidaliError: something became slower.
    """
    from tidali.console import print_table, say, warn

    for line in comparison.warnings:
        warn(line)
    if on_stdout:
        print_table(*comparison.table())
    else:
        for row in comparison.table()[2]:
            say("  ".join(row))
    if comparison.stopped:
        raise TidaliError(f"measured in the old document, and not run now: {'; '.join(comparison.stopped)}")
    if comparison.slower:
        names = "; ".join(f"{change.case} {change.where}".strip() for change in comparison.slower)
        raise TidaliError(f"slower than the old document by more than {comparison.tolerance_percent:g} %: {names}")
