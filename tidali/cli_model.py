"""``tidali predict`` and ``tidali export``."""

from __future__ import annotations

import csv
import json
import sys
import warnings
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from tidali.cli_train import AmpOption, DeviceOption
from tidali.errors import TidaliError, UsageError

if TYPE_CHECKING:
    from tidali.image_files import ImageError

CheckpointArgument = Annotated[
    str, typer.Argument(metavar="CKPT", help="A checkpoint, or a run folder for its best one.", show_default=False)
]


def predict(
    checkpoint: CheckpointArgument,
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGE|FOLDER|GLOB...",
            help="Files of any format that PIL opens; folders are searched through; patterns may be quoted.",
        ),
    ],
    top: Annotated[int, typer.Option(min=1, help="Classes to show for each image.")] = 5,
    device: DeviceOption = "auto",
    amp: AmpOption = "auto",
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of the table.")] = False,
    csv_: Annotated[
        bool, typer.Option("--csv", help="Print CSV instead of the table, a line for each image and class.")
    ] = False,
) -> None:
    """Name what is in images, with probabilities, preprocessed as 'tidali eval' does it.

    An image that cannot be read is named on standard error and skipped. Exits with 0 where every image was read, with 1 where
    any was skipped (the others are printed all the same), with 2 where no image was found.
    """
    if json_ and csv_:
        raise UsageError("--json and --csv: give one of them")
    warnings.filterwarnings("ignore", module=r"PIL\.")  # on damaged metadata, which does not matter here

    from tidali.console import print_table, progress_bar, say
    from tidali.image_files import find_images
    from tidali.predict import load_model

    files = find_images(images)
    model = load_model(checkpoint, device=device, amp=amp)
    skipped: list[ImageError] = []

    def skip(error: ImageError) -> None:
        skipped.append(error)
        say(f"skipped: {error}")

    found = []
    with progress_bar(note=False) as bar:
        task = bar.add_task("predicting", total=len(files))
        for source, scores in model.stream(files, top=top, on_bad=skip):
            found.append((str(source), scores))
            bar.update(task, completed=len(found) + len(skipped))
    if json_:
        document = {
            "checkpoint": checkpoint,
            "res": model.card.res,
            "images": [{"image": name, "classes": [asdict(score) for score in scores]} for name, scores in found],
            "skipped": [{"image": str(error.source), "reason": error.reason} for error in skipped],
        }
        print(json.dumps(document))
    elif csv_:
        lines = csv.writer(sys.stdout, lineterminator="\n")
        lines.writerow(("image", "rank", "label", "id", "name", "probability"))
        for name, scores in found:
            for rank, score in enumerate(scores, start=1):
                lines.writerow((name, rank, score.label, score.id, score.name, f"{score.probability:.6f}"))
    elif found:
        print_table(
            f"{checkpoint} at {model.card.res} px",
            ("image", "class", "%"),
            [
                (name if rank == 0 else "", score.name, f"{100 * score.probability:.1f}")
                for name, scores in found
                for rank, score in enumerate(scores)
            ],
            left=2,
        )
    if skipped:
        raise TidaliError(f"{len(skipped)} of {len(files)} images could not be read")
