"""The commands that make, check and show data sets."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tidali.cli.data_output import info_document, print_info, print_pack, suggest_next
from tidali.cli.options import JsonOption, RecipeName, output_file
from tidali.config import Kernel, check_res
from tidali.console import progress_bar, say, show, warn
from tidali.dataset.file_names import visible_name
from tidali.errors import TidaliError, UsageError, counted
from tidali.recipes import change, make_recipe

if TYPE_CHECKING:
    from shards.check_image import SecondDecoder
    from shards.pack import Progress

_SIZE_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}

# One for each group of options in the help. Called as typer.Option.
which_option = partial(typer.Option, rich_help_panel="Which images")
stored_option = partial(typer.Option, rich_help_panel="How they are stored")
sheet_option = partial(typer.Option, rich_help_panel="Contact sheet")
running_option = partial(typer.Option, rich_help_panel="How to run")

DestArgument = Annotated[str, typer.Argument(help="Folder to make the data set in, or a URL such as s3://bucket/data.")]
DataArgument = Annotated[str, typer.Argument(help="A packed data set: a folder or a URL.")]
WorkersOption = Annotated[
    int | None,
    running_option(min=1, help="Number of processes.", show_default="enough for all cores; one for small jobs"),
]
LabelFieldOption = Annotated[
    str | None,
    which_option(
        metavar="NAME",
        help="Field of each sample's .json in a tar that is its label.",
        show_default="the .cls member; where there is none, the field 'label'",
    ),
]
ClassNamesOption = Annotated[
    Path | None,
    which_option(
        metavar="FILE",
        help="The classes' names of tars, one a line, in the order of the labels, which count from 0.",
        show_default="the labels themselves",
    ),
]
OverwriteOption = Annotated[
    bool, running_option("--overwrite", help="Replace the data set in DEST if it was made from another source or settings.")
]


def shard(
    source: Annotated[
        Path,
        typer.Argument(
            help="Tiny-ImageNet, SPLIT/CLASS/*.jpg or CLASS/*.jpg: a folder, or a zip of one. Or WebDataset tars: a folder, "
            "a tar, or a quoted pattern such as 'wds/{000000..000255}.tar'."
        ),
    ],
    dest: DestArgument,
    layout: Annotated[
        Literal["auto", "tiny-imagenet", "folder", "webdataset"],
        which_option(
            help="Layout of SOURCE; auto takes it for Tiny-ImageNet if it has a wnids.txt, for WebDataset if it has tars and "
            "no images, and refuses folders that may be splits or classes; folder takes these for classes."
        ),
    ] = "auto",
    label_field: LabelFieldOption = None,
    class_names: ClassNamesOption = None,
    seed: Annotated[
        int, stored_option(min=0, help="Random seed of the order of train and of the choice of held-out images.")
    ] = 0,
    shard_samples: Annotated[int | None, stored_option(help="Samples per shard.", show_default="1000")] = None,
    shard_size: Annotated[
        str | None,
        stored_option(metavar="SIZE", help="Largest size of a shard, such as 64MB or 256MiB, instead of --shard-samples."),
    ] = None,
    val_fraction: Annotated[
        float,
        which_option(
            help="Fraction of each class of train to hold out, such as 0.1: as val, or as heldout if SOURCE has a val split."
        ),
    ] = 0.0,
    classes: Annotated[
        str | None,
        which_option(metavar="N|FILE", help="Only the first N classes, or those in a FILE with one class id per line."),
    ] = None,
    size: Annotated[int | None, stored_option(help="Resize to PX x PX (bicubic) and encode as JPEG.", metavar="PX")] = None,
    shorter_side: Annotated[
        int | None,
        stored_option(
            help="Shrink larger images to this shorter side (bicubic, antialiased) and encode them as JPEG; 288 is enough for "
            "training at 224. Smaller ones keep their bytes.",
            metavar="PX",
        ),
    ] = None,
    quality: Annotated[
        int | None, stored_option(help="JPEG quality, 1 to 100, of images that --shorter-side shrinks.", show_default="92")
    ] = None,
    kernel: Annotated[
        Kernel, stored_option(help="Bicubic kernel of --size. pil: a = -0.5, antialiased; opencv: a = -0.75, not antialiased.")
    ] = "pil",
    max_pixels: Annotated[
        int,
        which_option(
            help="Images that declare more pixels than this are quarantined without being decoded.",
            show_default="67108864, which is 8192 x 8192",
        ),
    ] = 1 << 26,
    strict: Annotated[bool, running_option("--strict", help="Exit with 1 if any file was quarantined.")] = False,
    workers: WorkersOption = None,
    executor: Annotated[Literal["local", "ray"], running_option(help="Where to pack; ray needs the extra 'ray'.")] = "local",
    overwrite: OverwriteOption = False,
) -> None:
    """Pack labelled images into shards: WebDataset tars with DALI indexes and a manifest.

    The same source, seed and settings give the same bytes. When run again, it keeps every intact shard and rewrites the rest.
    Files that are not usable images are copied to DEST/quarantine instead.
    """
    from shards.pack import pack
    from shards.plan import PackSettings
    from shards.tar_files import read_class_names
    from shards.tar_source import open_source

    settings = PackSettings(
        seed=seed,
        shard_samples=1000 if shard_samples is None and shard_size is None else shard_samples,
        shard_size_bytes=None if shard_size is None else parse_size(shard_size),
        val_fraction=val_fraction,
        classes=None if classes is None else _parse_classes(classes),
        size_px=size,
        kernel=kernel,
        shorter_side_px=shorter_side,
        quality=quality,
        max_pixels=max_pixels,
    )
    with pack_progress("packing") as progress:
        report = pack(
            open_source(
                source,
                layout,
                label_field=label_field,
                class_names=None if class_names is None else read_class_names(class_names),
            ),
            dest,
            settings,
            workers=workers,
            executor=executor,
            overwrite=overwrite,
            progress=progress,
        )
    print_pack(report)
    suggest_next(dest, report, "tidali", *sys.argv[1:], "--overwrite")
    if strict and report.manifest.quarantine:
        raise TidaliError(f"{dest}: --strict allows no quarantined file, and there are {len(report.manifest.quarantine):,}")


def demo(
    dest: DestArgument,
    classes: Annotated[int, typer.Option(help="Number of classes, 2 to 200.")] = 10,
    per_class: Annotated[int, typer.Option(help="Training images per class; val gets a fifth as many, but at least 5.")] = 250,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the drawings and of their order.")] = 0,
    workers: WorkersOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Make the built-in data set: drawn figures, 64 x 64, already packed. Needs no network."""
    from shards.demo import pack_demo

    with pack_progress("drawing") as progress:
        report = pack_demo(
            dest, classes=classes, per_class=per_class, seed=seed, workers=workers, overwrite=overwrite, progress=progress
        )
    print_pack(report)
    suggest_next(dest, report)


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


# --------------------------------------------------------------------------------------------------------------------- input


def parse_size(text: str) -> int:
    """'64MB' -> 64,000,000; '1GiB' -> 1,073,741,824; a bare number is bytes.

    Raises:
        UsageError: the text is not a size.
    """
    number = text.strip().lower().rstrip("abcdefghijklmnopqrstuvwxyz")
    unit = text.strip().lower()[len(number) :]
    try:
        return int(float(number) * _SIZE_UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        raise UsageError(f"--shard-size {text}: give a size such as 64MB or 256MiB") from None


def _parse_classes(text: str) -> int | tuple[str, ...]:
    if text.isdecimal():
        return int(text)
    try:
        lines = Path(text).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--classes {text}: neither a number nor a readable file of class ids ({error})") from None
    return tuple(dict.fromkeys(name for line in lines if (name := visible_name(line))))


@contextmanager
def pack_progress(what: str) -> Iterator[Progress]:
    with progress_bar() as bar:
        task = bar.add_task(what, total=None)
        try:
            yield lambda done, total: bar.update(task, completed=done, total=total)
        except KeyboardInterrupt:
            say("stopped; run the same command again to continue from here")
            raise
