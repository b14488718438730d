"""``tidali predict`` and ``tidali export``."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tidali.cli.options import AmpOption, CheckpointArgument, DeviceOption, FlipOption, JsonOption, output_file
from tidali.config import ExportFormat
from tidali.errors import TidaliError, UsageError

if TYPE_CHECKING:
    from tidali.model.image_files import ImageError


def predict(
    checkpoint: CheckpointArgument,
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGE|FOLDER|GLOB",
            help="Files of any format that 'tidali shard' reads, folders (searched recursively), or quoted patterns.",
        ),
    ],
    top: Annotated[int, typer.Option(min=1, help="Classes to show for each image.")] = 5,
    device: DeviceOption = "auto",
    amp: AmpOption = "auto",
    flip: FlipOption = False,
    json_: JsonOption = False,
    csv_: Annotated[bool, typer.Option("--csv", help="Print CSV instead of text, a line for each image and class.")] = False,
) -> None:
    """Predict the classes of images, with probabilities. Preprocessing is the same as in 'tidali eval'.

    An image that cannot be read is named on standard error and skipped. Exits with 0 if every image was read, with 1 if any was
    skipped (the predictions of the others are printed), with 2 if no image was found.
    """
    if json_ and csv_:
        raise UsageError("--json and --csv: give one of them")

    from tidali.console import print_table, progress_bar, say, warn
    from tidali.dataset.file_names import describe_left_out, printable_path
    from tidali.model.image_files import find_images
    from tidali.model.predict import load_model

    files, left_out = find_images(images)
    if left_out:
        say(f"left out: {describe_left_out(left_out)}")
    model = load_model(checkpoint, device=device, amp=amp, flip=flip)
    skipped: list[ImageError] = []

    def skip(error: ImageError) -> None:
        skipped.append(error)
        warn(f"skipped: {error}")

    found = []
    with progress_bar() as bar:
        task = bar.add_task("predicting", total=len(files))
        for source, scores in model.stream(files, top=top, on_bad=skip):
            found.append((printable_path(str(source)), scores))
            bar.update(task, completed=len(found) + len(skipped))
    if json_:
        document = {
            "checkpoint": checkpoint,
            "res": model.card.res,
            "images": [{"image": name, "classes": [asdict(score) for score in scores]} for name, scores in found],
            "skipped": [{"image": printable_path(str(error.source)), "reason": error.reason} for error in skipped],
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
        ExportFormat | None,
        typer.Option(
            help="onnx, or pt2: the program that torch.export saves.", show_default="by the suffix of --out, else onnx"
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="File to write.", show_default="beside the checkpoint")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="A packed data set; its image size becomes the input size, and the file is checked on its val images.",
            show_default="the one the checkpoint was trained on, if it is still there",
        ),
    ] = None,
    input_size: Annotated[
        str | None,
        typer.Option(
            metavar="H|HxW",
            help="Size of the input images in pixels.",
            show_default="the size of the data set's images; where they differ, the checkpoint's "
            "resolution divided by its crop_fraction",
        ),
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Export a checkpoint for serving: uint8 pixels in, probabilities out, with the bicubic resize and normalisation inside.

    The input is uint8 (N, H, W, 3) RGB with any N; the output is float32 (N, classes). The file's metadata entry 'tidali' is
    JSON with the class names and the preprocessing. The exported model is compared with the checkpoint's first, and nothing is
    written if their outputs differ.
    """
    fmt: ExportFormat = format or ("pt2" if out is not None and out.suffix == ".pt2" else "onnx")
    size = parse_input_size(input_size) if input_size is not None else None

    from tidali.console import print_table
    from tidali.model.checkpoint import find_checkpoint
    from tidali.model.export import export_model, require_packages
    from tidali.model.export_inputs import choose_inputs
    from tidali.model.predict import load_model

    require_packages(fmt)
    file = find_checkpoint(checkpoint)
    path = output_file(out if out is not None else file.with_suffix(f".{fmt}"), "--out")
    model = load_model(file, device="cpu", amp="off")
    inputs = choose_inputs(model.card, checkpoint, data, size)
    agreement = export_model(model, path, fmt, inputs.size, inputs.images)
    (height, width), size_bytes = inputs.size, path.stat().st_size
    if json_:
        document = {
            "checkpoint": checkpoint,
            "path": str(path),
            "format": fmt,
            "input_height": height,
            "input_width": width,
            "classes": len(model.classes),
            "size_bytes": size_bytes,
            "checked_on": inputs.what,
            **asdict(agreement),
        }
        print(json.dumps(document))
        return
    print_table(
        str(path),
        ("", ""),
        [
            ("input", f"uint8 (N, {height}, {width}, 3) RGB"),
            ("output", f"float32 (N, {len(model.classes)}) probabilities"),
            ("size", f"{size_bytes / 2**20:.1f} MiB"),
            ("checked on", inputs.what),
            ("largest probability difference", f"{agreement.largest_difference:.1e}"),
            ("same top-1", f"{agreement.same_top1} of {agreement.images}"),
        ],
        left=2,
    )


def parse_input_size(text: str) -> tuple[int, int]:
    """'64' -> (64, 64), '48x64' -> (48, 64): height and width in pixels.

    Raises:
        UsageError: anything else.
    """
    parts = text.split("x")
    if len(parts) > 2 or not all(part.isdecimal() and 0 < int(part) <= 1 << 14 for part in parts):
        raise UsageError(f"--input-size {text}: give pixels, such as 64, or height x width such as 48x64")
    return int(parts[0]), int(parts[-1])
