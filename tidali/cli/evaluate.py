"""``tidali eval``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from tidali.cli.options import (
    AmpOption,
    CacheOption,
    CheckpointArgument,
    DataOption,
    DeviceOption,
    FlipOption,
    JsonOption,
    MaxBadOption,
    parse_resolutions,
)
from tidali.cli.train import score_cells


def eval_(
    checkpoint: CheckpointArgument,
    data: DataOption,
    res: Annotated[
        str | None, typer.Option(help="Input sides in pixels, such as 64,128,224.", show_default="as trained")
    ] = None,
    split: Annotated[str, typer.Option(help="Split to evaluate on.")] = "val",
    device: DeviceOption = "auto",
    amp: AmpOption = "auto",
    cache: CacheOption = "auto",
    max_bad: MaxBadOption = None,
    flip: FlipOption = False,
    json_: JsonOption = False,
) -> None:
    """Evaluate a checkpoint on a split at one or several resolutions; every sample is counted exactly once."""
    resolutions = parse_resolutions(res) if res is not None else []

    from tidali.console import is_main_rank, print_table
    from tidali.dataset.source import open_data
    from tidali.hardware.cpu_memory import keep_freed_memory
    from tidali.training.evaluation import evaluate_checkpoint

    keep_freed_memory()
    _, rows = evaluate_checkpoint(
        checkpoint,
        open_data(data),
        split=split,
        resolutions=resolutions,
        device=device,
        amp=amp,
        cache=cache,
        max_bad=max_bad,
        flip=flip,
    )
    if not is_main_rank():
        return
    if json_:
        scores = [{"res": row.res, **row.score.to_dict()} for row in rows]
        print(json.dumps({"checkpoint": checkpoint, "data": data, "split": split, "flip": flip, "scores": scores}))
        return
    print_table(
        f"{checkpoint} on {split} of {data}" + (", with flip TTA" if flip else ""),
        ("res", "top-1 %", "top-5 %", "loss", "samples"),
        [(row.res, *score_cells(row.score), row.score.samples) for row in rows],
    )
