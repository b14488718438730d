"""The command that makes a data set of tars in place."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tidali.cli.data import ClassNamesOption, LabelFieldOption, WorkersOption, pack_progress, which_option
from tidali.cli.data_output import print_pack, suggest_next


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
