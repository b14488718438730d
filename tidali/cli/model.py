"""``tidali predict`` and ``tidali export``."""

from __future__ import annotations

import csv
import json
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tidali.cli.train import AmpOption, DeviceOption
from tidali.errors import TidaliError, UsageError
from tidali.files import printable

if TYPE_CHECKING:
    from tidali.model.image_files import ImageError

CheckpointArgument = Annotated[
    str, typer.Argument(metavar="CKPT", help="A checkpoint, or a run folder for its best one.", show_default=False)
]


def predict(
    checkpoint: CheckpointArgument,
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGE|FOLDER|GLOB",
            help="Files of any format that PIL opens; folders are searched through; patterns may be quoted.",
        ),
    ],
    top: Annotated[int, typer.Option(min=1, help="Classes to show for each image.")] = 5,
    device: DeviceOption = "auto",
    amp: AmpOption = "auto",
    flip: Annotated[bool, typer.Option("--flip", help="Average the logits of each image and its mirror image.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of the table.")] = False,
    csv_: Annotated[bool, typer.Option("--csv", help="Print CSV instead, a line for each image and class.")] = False,
) -> None:
    """Name what is in images, with probabilities, preprocessed as 'tidali eval' does it.

    An image that cannot be read is named on standard error and skipped. Exits with 0 where every image was read, with 1 where
    any was skipped (the others are printed all the same), with 2 where no image was found.
    """
    if json_ and csv_:
        raise UsageError("--json and --csv: give one of them")
    warnings.filterwarnings("ignore", module=r"PIL\.")  # on damaged metadata, which does not matter here

    from tidali.console import print_table, progress_bar, warn
    from tidali.model.image_files import find_images
    from tidali.model.predict import load_model

    files = find_images(images)
    model = load_model(checkpoint, device=device, amp=amp, flip=flip)
    skipped: list[ImageError] = []

    def skip(error: ImageError) -> None:
        skipped.append(error)
        warn(f"skipped: {error}")

    found = []
    with progress_bar(note=False) as bar:
        task = bar.add_task("predicting", total=len(files))
        for source, scores in model.stream(files, top=top, on_bad=skip):
            found.append((printable(str(source)), scores))
            bar.update(task, completed=len(found) + len(skipped))
    if json_:
        document = {
            "checkpoint": checkpoint,
            "res": model.card.res,
            "images": [{"image": name, "classes": [asdict(score) for score in scores]} for name, scores in found],
            "skipped": [{"image": printable(str(error.source)), "reason": error.reason} for error in skipped],
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


def export(
    checkpoint: CheckpointArgument,
    format: Annotated[
        Literal["onnx", "pt2"] | None,
        typer.Option(help="onnx, or torch.export's program.", show_default="by the suffix of --out, else onnx"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="The file.", show_default="beside the checkpoint")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="A packed data set: its images' size is the input's, and its val images check the file.",
            show_default="the one it was trained on, where that is still there",
        ),
    ] = None,
    input_size: Annotated[
        str | None,
        typer.Option(
            metavar="H|HxW", help="Of the images that will be given, in pixels.", show_default="what the data set's images are"
        ),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of the table.")] = False,
) -> None:
    """Write a checkpoint as one file to serve: uint8 pixels in, probabilities out, bicubic resize and normalisation inside.

    The input is uint8 (N, H, W, 3) RGB, N any number; the output float32 (N, classes). The file's metadata, under 'tidali', is
    JSON with the class names and the preprocessing. It is run beside the checkpoint's model before it is written, and not
    written where the two differ.
    """
    fmt: Literal["onnx", "pt2"] = format or ("pt2" if out is not None and out.suffix == ".pt2" else "onnx")
    size = parse_input_size(input_size) if input_size is not None else None

    from tidali.console import print_table
    from tidali.model.checkpoint import find_checkpoint
    from tidali.model.export import export_model, refuse_missing_packages
    from tidali.model.export_inputs import choose_inputs
    from tidali.model.predict import load_model

    refuse_missing_packages(fmt)
    file = find_checkpoint(checkpoint)
    path = out if out is not None else file.with_suffix(f".{fmt}")
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(f"--out {path}: {'a folder; name a file' if path.is_dir() else f'there is no folder {path.parent}'}")
    model = load_model(file, device="cpu", amp="off")
    inputs = choose_inputs(model.card, checkpoint, data, size)
    report = export_model(model, path, fmt, inputs.size, inputs.images)
    height, width = inputs.size
    if json_:
        print(
            json.dumps(
                {
                    "checkpoint": checkpoint,
                    "path": str(path),
                    "format": fmt,
                    "input_height": height,
                    "input_width": width,
                    "classes": len(model.classes),
                    "size_bytes": report.size_bytes,
                    "checked_on": inputs.what,
                    **asdict(report.agreement),
                }
            )
        )
        return
    agreement = report.agreement
    print_table(
        str(path),
        ("", ""),
        [
            ("input", f"uint8 (N, {height}, {width}, 3) RGB"),
            ("output", f"float32 (N, {len(model.classes)}) probabilities"),
            ("size", f"{report.size_bytes / 2**20:.1f} MiB"),
            ("checked on", inputs.what),
            ("largest probability difference", f"{agreement.largest_difference:.1e}"),
            ("same top-1", f"{agreement.same_top1} of {agreement.images}"),
        ],
        left=2,
    )


def parse_input_size(text: str) -> tuple[int, int]:
    """'64' -> (64, 64), '48x64' -> (48, 64): height and width in pixels.

    Raises:
        UsageError: neither.
    """
    parts = text.split("x")
    if len(parts) > 2 or not all(part.isdecimal() and 0 < int(part) <= 1 << 14 for part in parts):
        raise UsageError(f"--input-size {text}: give pixels, such as 64, or height x width such as 48x64")
    return int(parts[0]), int(parts[-1])
