"""Options and arguments that several commands share, and the checks of what a user gives for them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from tidali.config import AmpChoice, Arch, CacheChoice, CompileChoice, DecoderChoice, DeviceChoice, check_res
from tidali.errors import UsageError

RecipeName = Literal["seed", "modern", "photos", "finetune"]
"""The names of `tidali.recipes.RECIPES`."""

# One for each group of options in the help. Called as typer.Option.
data_option = partial(typer.Option, rich_help_panel="Data")
model_option = partial(typer.Option, rich_help_panel="Model")
recipe_option = partial(typer.Option, rich_help_panel="Recipe")
machine_option = partial(typer.Option, rich_help_panel="Machine")
run_option = partial(typer.Option, rich_help_panel="Run")
running_option = partial(typer.Option, rich_help_panel="How to run")

CheckpointArgument = Annotated[
    str,
    typer.Argument(metavar="CKPT", help="A checkpoint file, or a run folder for its best checkpoint.", show_default=False),
]
DataOption = Annotated[
    str, data_option(metavar="DATA", help="A packed data set, as 'tidali shard', 'adopt' or 'demo' make it: a folder or a URL.")
]
MaxBadOption = Annotated[
    int | None,
    data_option(min=0, help="How many corrupt images of a split to skip before the run fails.", show_default="0.1 % of it"),
]
ArchOption = Annotated[Arch, model_option(help="The network, one of torchvision's ResNets.")]
DeviceOption = Annotated[DeviceChoice, machine_option(help="Where to run; auto uses a GPU if there is one.")]
AmpOption = Annotated[AmpChoice, machine_option(help="Mixed precision; auto chooses by device and prints why.")]
CompileOption = Annotated[CompileChoice, machine_option(help="torch.compile; auto chooses by device and prints why.")]
CacheOption = Annotated[
    CacheChoice,
    machine_option(
        help="device: decode once into the device's memory; off: stream; auto: cache what takes less than half of what is free."
    ),
]
DecoderOption = Annotated[
    DecoderChoice,
    machine_option(
        help="Where a GPU's images are decoded: cpu, by libjpeg-turbo; mixed, by DALI on the GPU; auto chooses by their size."
    ),
]
FlipOption = Annotated[
    bool,
    typer.Option(
        "--flip",
        help="Flip TTA (test-time augmentation): average the logits of each image and of the image flipped horizontally.",
    ),
]
WorkersOption = Annotated[
    int | None,
    running_option(min=1, help="Number of processes.", show_default="enough for all cores; one for small jobs"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]


def parse_resolutions(text: str) -> list[int]:
    """'64,128,224' -> [64, 128, 224].

    Raises:
        UsageError: not a list of whole numbers, or a resolution that the network cannot take.
    """
    try:
        resolutions = [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--res {text}: give pixels, such as 64 or 64,128,224") from None
    for res in resolutions:
        check_res(res)
    return resolutions


def output_file(given: str | Path, option: str, suffixes: Sequence[str] = ()) -> Path:
    """The path of a file that a command will write, checked before the work starts.

    Args:
        suffixes: the allowed ones, in lower case; any by default.

    Raises:
        UsageError: another suffix, no such folder, or the path is a folder.
    """
    path = Path(given)
    if suffixes and path.suffix.lower() not in suffixes:
        raise UsageError(f"{option} {given}: give a file that ends in {' or '.join(suffixes)}")
    if not path.parent.is_dir():
        raise UsageError(f"{option} {given}: there is no folder {path.parent}")
    if path.is_dir():
        raise UsageError(f"{option} {given}: is a folder; give a file")
    return path


def is_given(context: typer.Context, name: str) -> bool:
    """Whether an option was given on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
