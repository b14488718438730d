"""The commands that check, show and download data sets."""

from __future__ import annotations

import json
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tidali.cli.data_output import info_document, print_info
from tidali.cli.options import JsonOption, RecipeName, WorkersOption, output_file
from tidali.config import check_res
from tidali.console import progress_bar, show, warn
from tidali.errors import TidaliError, UsageError, counted
from tidali.recipes import change, make_recipe

if TYPE_CHECKING:
    from shards.check_image import SecondDecoder

# Called as typer.Option.
sheet_option = partial(typer.Option, rich_help_panel="Contact sheet")

DataArgument = Annotated[str, typer.Argument(help="A packed data set: a folder or a URL.")]


def verify(
    data: DataArgument,
    decode: Annotated[
        bool,
        typer.Option("--decode", help="Also decode every image: as 'tidali shard' does and, where DALI is installed, by DALI."),
    ] = False,
    workers: WorkersOption = None,
) -> None:
    """Check a packed data set: every hash, index entry, tar header, label and count. Exits with 1 if anything is wrong."""
    from shards.store import local_copy
    from shards.verify import verify as verify_folder

    second_decoder: SecondDecoder | None = None
    if decode:
        with suppress(ImportError):  # of DALI
            from tidali.loading.dali_check import dali_fault

            second_decoder = dali_fault
    with local_copy(data) as folder:
        report = verify_folder(folder, decode=decode, second_decoder=second_decoder, workers=workers)
    for fault in report.faults:
        show(str(fault))
    if report.faults:
        raise TidaliError(f"{data}: {counted(len(report.faults), 'fault')}")
    for text in report.repeated:
        show(text)
    if report.repeated:
        warn(f"{data}: in several splits or under several classes, as in the source: {counted(len(report.repeated), 'image')}")
    checked = "every file, header, label and image" if decode else "every file, header and label"
    found = f"{counted(report.samples, 'sample')} in {counted(report.shards, 'shard')}, {report.size_bytes / 1e6:,.1f} MB"
    by_dali = "" if second_decoder is None else ", and DALI reads the same pixels"
    show(f"{data}: {found}: {checked} is right{by_dali}")


def info(
    data: DataArgument,
    json_: JsonOption = False,
    sheet: Annotated[
        Path | None, sheet_option(metavar="FILE.png", help="Write a contact sheet of random samples to this file.")
    ] = None,
    split: Annotated[str, sheet_option(metavar="NAME", help="Split to draw the samples from.")] = "train",
    seed: Annotated[int, sheet_option(min=0, help="Random seed of the choice of samples.")] = 0,
    recipe: Annotated[
        RecipeName | None,
        sheet_option(
            help="Show beside each image how the network sees it in training with this recipe.", show_default="as stored"
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        sheet_option(
            "--set",
            metavar="FIELD=VALUE",
            help="With --recipe: change a field of it, such as augment.erase=0.5; repeatable.",
        ),
    ] = None,
    res: Annotated[
        int | None,
        sheet_option(metavar="PX", help="With --recipe: input side in pixels.", show_default="as in 'tidali train'"),
    ] = None,
    outliers: Annotated[
        bool,
        sheet_option(
            "--outliers",
            help="Instead of random samples: duplicates, also in other splits, and the smallest, largest, darkest and most "
            "unusual images.",
        ),
    ] = False,
) -> None:
    """Show what a packed data set holds."""
    from tidali.dataset.source import open_data, read_manifest

    if sheet is None and (recipe is not None or set_ or res is not None or outliers):
        raise UsageError("--recipe, --set, --res and --outliers apply to the contact sheet; add --sheet FILE.png")
    if outliers and recipe is not None:
        raise UsageError("--outliers shows images as they are stored; leave out --recipe")
    if recipe is None and (set_ or res is not None):
        raise UsageError("--set and --res change what a recipe shows; add --recipe modern")
    if sheet is not None:
        from tidali.cli.sheet import before_and_after, odd_samples, random_samples, write_sheet

        output_file(sheet, "--sheet", (".png",))
        dataset = open_data(data)
        if outliers:
            sections = odd_samples(dataset, split)
        elif recipe is None:
            sections = random_samples(dataset, split, seed)
        else:
            chosen, side = change(make_recipe(recipe), set_ or ()), res if res is not None else dataset.default_res
            check_res(side)
            sections = before_and_after(dataset, split, chosen, side, seed)
        write_sheet(sheet, sections)
    manifest = read_manifest(data)
    if json_:
        print(json.dumps(info_document(data, manifest)))
    else:
        print_info(data, manifest)


def download(
    dest: Annotated[
        str, typer.Argument(help="Folder to download into, created if it does not exist; or a file name, such as tiny.zip.")
    ],
    url: Annotated[
        str | None, typer.Option(metavar="URL", help="Where to download from.", show_default="Tiny-ImageNet's public home")
    ] = None,
    md5: Annotated[
        str | None, typer.Option(metavar="HEX", help="Expected MD5 of the file.", show_default="Tiny-ImageNet's")
    ] = None,
) -> None:
    """Download the real Tiny-ImageNet (237 MB). An interrupted download is resumed, and the file appears once it is checked."""
    from shards import download as fetch

    with progress_bar() as bar:
        task = bar.add_task("downloading, bytes", total=None)
        path = fetch.download(
            dest,
            url=url or fetch.TINY_IMAGENET_URL,
            md5=md5 or fetch.TINY_IMAGENET_MD5,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    print(path)
