"""``tidali bench``."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tidali.cli.options import AmpOption, CacheOption, DeviceOption, is_given, machine_option, output_file, parse_resolutions
from tidali.cli.packing import demo_data
from tidali.config import CompileChoice, Stem
from tidali.errors import TidaliError, UsageError

if TYPE_CHECKING:
    from bench.compare import Comparison
    from tidali.dataset.contract import Dataset

what_option = partial(typer.Option, rich_help_panel="What to measure")
result_option = partial(typer.Option, rich_help_panel="What to do with the results")

Case = Literal["train", "step", "loader", "pack", "growth", "peers", "all"]
LOADER_BATCH_SIZE = 256
TRAINING_BATCH_SIZE = 32
"""For the training loops of ``peers --training``: a CPU takes ten seconds a step for 256 images of 224 px, and there are eight
loops."""

USED_BY: dict[str, tuple[Case, ...]] = {
    "res": ("train", "step", "loader", "peers"),
    "data": ("train", "loader", "pack", "peers"),
    "stem": ("train",),
    "batch_size": ("train", "step", "loader", "growth", "peers"),
    "samples": ("growth",),
    "device": ("train", "step"),
    "amp": ("train", "step"),
    "compile": ("train", "step"),
    "cache": ("train",),
    "peers": ("peers",),
    "training": ("peers",),
    "crops": ("peers",),
    "profile": ("train", "step"),
}
"""Each option and the cases that use it. All cases use the options that are not listed."""


def bench(
    context: typer.Context,
    case: Annotated[Case, typer.Argument(help="What to measure, as explained above.")] = "train",
    res: Annotated[str, what_option(metavar="PX,PX", help="Input sides in pixels.")] = "64,224",
    data: Annotated[
        str | None, what_option(metavar="DATA", help="A packed data set.", show_default="built-in demo data, in data/demo")
    ] = None,
    samples: Annotated[str, what_option(metavar="N,N", help="growth: numbers of images.")] = "1000,10000,100000",
    stem: Annotated[Stem, what_option(help="train: the stem of the model.")] = "imagenet",
    batch_size: Annotated[
        int | None,
        what_option(
            help="Images per step.",
            min=2,
            show_default="train: 256 on CUDA, 32 on a CPU; step: 100; loader, growth, peers: 256, --training: 32",
        ),
    ] = None,
    repeats: Annotated[int, what_option(help="Measurements of each row; the rows take turns.", min=1)] = 5,
    device: DeviceOption = "auto",
    amp: AmpOption = "auto",
    compile: Annotated[CompileChoice, machine_option(help="torch.compile; auto chooses by device.")] = "auto",
    cache: CacheOption = "auto",
    peers: Annotated[
        str | None,
        what_option(metavar="NAMES", help="peers: only these, such as tidali,torchvision,ffcv.", show_default="all"),
    ] = None,
    training: Annotated[
        bool, what_option("--training", help="peers: measure whole training loops instead of loaders.")
    ] = False,
    crops: Annotated[
        bool,
        what_option(
            "--crops", help="peers: every loader returns random resized crops of 0.08 to 1 of the area, not centre squares."
        ),
    ] = False,
    json_: Annotated[
        str | None, result_option("--json", metavar="FILE", help="Also write the results as one JSON document; '-' prints it.")
    ] = None,
    plot: Annotated[str | None, result_option(metavar="FILE", help="Draw the results as .png, .svg or .html.")] = None,
    compare: Annotated[
        str | None,
        result_option(metavar="OLD.json", help="Print new/old for each case; exits with 1 if a case became slower."),
    ] = None,
    tolerance: Annotated[
        float, result_option(metavar="PERCENT", min=0, help="With --compare: by how much a case must be slower to count.")
    ] = 10.0,
    profile: Annotated[
        bool,
        result_option(
            "--profile", help="train, step: also write a torch profiler trace beside the --json file, and print its summary."
        ),
    ] = False,
) -> None:
    """Measure images/s, and name what limits this machine.

    These are the cases. An option that does not go with the chosen one is refused.

    - train: decoding, loading, the step on synthetic data, training end to end
    - step: tidali's training step beside the original study's loop
    - loader: tidali's ways from shards to batches, and how they scale
    - pack: packing 110,000 images, or DATA's, with tidali, webdataset and FFCV
    - growth: time and memory of packing and reading, by the number of images
    - peers: other projects' loaders beside tidali's, on the same images
    - all: every case but growth, in turn
    """
    resolutions = parse_resolutions(res)
    if json_ is not None:
        output_file(json_, "--json")
    if plot is not None:
        output_file(plot, "--plot", (".png", ".svg", ".html"))
    _refuse_unused(context, case)
    if crops and training:
        raise UsageError("--crops: measures loaders; it does not go with --training")

    from bench.compare import load
    from bench.report import show, write_json
    from tidali.console import say, suggest

    if case == "all" or case in USED_BY["device"]:
        from tidali.hardware.device import plan_device

        plan_device(device, amp, compile)  # refused before the demo data are written
    old = load(Path(compare), "training peers" if training else case) if compare is not None else None
    shared: dict[str, Any] = {"resolutions": resolutions, "repeats": repeats}
    on_device: dict[str, Any] = {
        **shared,
        "device": device,
        "amp": amp,
        "compile": compile,
        "profile": _trace_path(json_) if profile else None,
    }

    def dataset() -> Dataset:
        from tidali.dataset.source import open_data

        return open_data(data if data is not None else str(demo_data()))

    def run_train() -> dict[str, Any]:
        from bench.train import bench_train

        return bench_train(dataset(), stem=stem, batch_size=batch_size, cache=cache, **on_device)

    def run_step() -> dict[str, Any]:
        from bench.step import BATCH_SIZE, bench_step

        return bench_step(batch_size=batch_size or BATCH_SIZE, **on_device)

    def run_loader() -> dict[str, Any]:
        from bench.loading import bench_loader

        return bench_loader(dataset(), batch_size=batch_size or LOADER_BATCH_SIZE, **shared)

    def run_pack() -> dict[str, Any]:
        from bench.pack import bench_pack

        return bench_pack(dataset() if data is not None else None, repeats=repeats)

    def run_peers() -> dict[str, Any]:
        from bench.peers import bench_peers

        names = peers.split(",") if peers is not None else None
        size = batch_size or (TRAINING_BATCH_SIZE if training else LOADER_BATCH_SIZE)
        return bench_peers(dataset(), batch_size=size, peers=names, training=training, crops=crops, **shared)

    def run_growth() -> dict[str, Any]:
        from bench.growth import bench_growth

        return bench_growth(samples=_counts(samples), batch_size=batch_size or LOADER_BATCH_SIZE, repeats=repeats)

    benchmarks = {"train": run_train, "step": run_step, "loader": run_loader, "pack": run_pack, "peers": run_peers}
    if case == "all":
        from bench.document import bench_all

        def keep(so_far: dict[str, Any]) -> None:
            if json_ is not None and json_ != "-":
                write_json(so_far, json_)

        document = bench_all(benchmarks, keep)
    else:
        document = run_growth() if case == "growth" else benchmarks[case]()

    if json_ != "-":
        show(document)
    if json_ is not None:
        write_json(document, json_)
    else:
        again = ("tidali", *sys.argv[1:], "--json", "bench.json")
        suggest("keep the figures of another run, for 'tidali bench --compare bench.json' later", *again)
    if plot is not None:
        from bench.plot import write_plot

        write_plot(document, Path(plot))
        say(f"plot: {plot}")
    if old is not None:
        from bench.compare import compare as compare_documents

        _print_comparison(compare_documents(document, old, tolerance), on_stdout=json_ != "-")


def _counts(text: str) -> list[int]:
    """'1000,10000' -> [1000, 10000]."""
    counts = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if min(counts) < 1:
        raise UsageError(f"--samples {text}: give whole numbers, such as 1000 or 1000,10000")
    return counts


def _refuse_unused(context: typer.Context, case: Case) -> None:
    """Refuse an option that the case does not use: the user would believe that it was measured.

    Raises:
        UsageError: names the option, and the cases that use it.
    """
    for name, cases in USED_BY.items():
        if case != "all" and case not in cases and is_given(context, name):
            fitting = ", ".join(f"'bench {one}'" for one in cases)
            raise UsageError(f"--{name.replace('_', '-')}: goes with {fitting}, not with 'bench {case}'")


def _trace_path(json_: str | None) -> Path:
    """How the names of the traces begin."""
    if json_ is None or json_ == "-":
        return Path("bench-profile.json")
    return Path(json_).with_name(f"{Path(json_).stem}-profile.json")


def _print_comparison(comparison: Comparison, *, on_stdout: bool) -> None:
    """
    Raises:
        TidaliError: a case became slower, or was not measured again.
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
        raise TidaliError(f"measured in the old document, but not now: {'; '.join(comparison.stopped)}")
    if comparison.slower:
        names = "; ".join(f"{change.case} {change.where}".strip() for change in comparison.slower)
        raise TidaliError(f"slower than in the old document by more than {comparison.tolerance_percent:g} %: {names}")
