"""The commands that make data sets: of images, of tars in place, and of drawings."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tidali.cli.data_output import print_pack, suggest_next
from tidali.cli.options import WorkersOption, running_option
from tidali.config import Kernel
from tidali.console import progress_bar, say
from tidali.dataset.file_names import visible_name
from tidali.errors import TidaliError, UsageError

if TYPE_CHECKING:
    from shards.pack import Progress

_SIZE_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}

# One for each group of options in the help. Called as typer.Option.
which_option = partial(typer.Option, rich_help_panel="Which images")
stored_option = partial(typer.Option, rich_help_panel="How they are stored")

DestArgument = Annotated[str, typer.Argument(help="Folder to make the data set in, or a URL such as s3://bucket/data.")]
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


def adopt(
    folder: Annotated[Path, typer.Argument(help="Folder of WebDataset tars, or of folders of them named after splits.")],
    label_field: LabelFieldOption = None,
    class_names: ClassNamesOption = None,
    val_fraction: Annotated[
        float,
        which_option(help="Fraction of the tars, such as 0.1, that become val, whole tars, where none is named after a split."),
    ] = 0.0,
    workers: WorkersOption = None,
) -> None:
    """Make the WebDataset tars of a folder a data set in place: an index and a record beside each tar, and a manifest.

    No byte of the tars is changed. Images that not every decoder reads alike are left out, and copied to FOLDER/quarantine.
    When run again, it reads only what is new or was changed.
    """
    from shards.adopt import AdoptSettings
    from shards.adopt import adopt as adopt_folder
    from shards.tar_files import read_class_names

    with pack_progress("reading") as progress:
        report = adopt_folder(
            folder,
            AdoptSettings(label_field=label_field, val_fraction=val_fraction),
            class_names=None if class_names is None else read_class_names(class_names),
            workers=workers,
            progress=progress,
        )
    print_pack(report)
    options = [word for pair in (("--label-field", label_field), ("--class-names", class_names)) if pair[1] for word in pair]
    several = len(report.manifest.splits["train"].shards) > 1
    command = ("adopt", folder) if several else ("shard", folder, f"{folder}-packed", "--layout", "webdataset")
    suggest_next(folder, report, "tidali", *command, *options)


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


def demo_data() -> Path:
    """The demo data set in data/demo, packed on first use. All ranks of torchrun call this, and one of them packs it.

    Raises:
        UsageError: the folder cannot be created.
    """
    from tidali.dataset.contract import MANIFEST_NAME
    from tidali.files import lock

    folder = Path("data") / "demo"
    manifest = folder / MANIFEST_NAME
    if manifest.exists():
        return folder
    try:
        folder.parent.mkdir(exist_ok=True)
        with lock(folder.parent, wait=True):
            if not manifest.exists():
                from shards.demo import pack_demo

                say(f"packing the built-in demo data set into {folder}")
                pack_demo(folder)
    except OSError as error:
        where = f"{folder}: the demo data set cannot be written here ({error.strerror})"
        raise UsageError(f"{where}; change to a folder that you may write to, or give --data") from None
    return folder


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
