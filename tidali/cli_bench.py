"""``tidali bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from tidali.cli_train import AmpOption, CacheOption, DeviceOption, demo_data, parse_resolutions
from tidali.errors import UsageError


def bench(
    case: Annotated[
        Literal["stages", "loader", "pack"],
        typer.Argument(help="stages: where a training step's time goes; loader and pack: beside the tools people use today."),
    ] = "stages",
    res: Annotated[str, typer.Option(help="Input sides in pixels, such as 64,224.")] = "64,224",
    data: Annotated[str | None, typer.Option(help="A packed data set.", show_default="the built-in demo data")] = None,
    stem: Annotated[Literal["imagenet", "small"], typer.Option(help="The model's stem.")] = "imagenet",
    batch_size: Annotated[
        int | None, typer.Option(help="Images a step.", min=2, show_default="256 on CUDA, 32 on a CPU")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Measurements of each row, interleaved.", min=1)] = 5,
    device: DeviceOption = "auto",
    amp: AmpOption = "auto",
    cache: CacheOption = "auto",
    ffcv_python: Annotated[
        str | None, typer.Option(metavar="PYTHON", help="loader, pack: a Python that has FFCV, to measure it too.")
    ] = None,
    json_: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Also write one JSON document; '-' prints it.")
    ] = None,
) -> None:
    """Measure images/s.

    stages: decoding, loading, the training step on synthetic data, and training end to end. loader: batches from tidali,
    torchvision, DALI as documented, and FFCV. pack: packing 110,000 images by tidali, webdataset and FFCV.
    """
    resolutions = parse_resolutions(res)
    if json_ is not None and not Path(json_).parent.is_dir():
        raise UsageError(f"--json {json_}: there is no folder {Path(json_).parent}")
    if ffcv_python is not None and not Path(ffcv_python).is_file():
        raise UsageError(f"--ffcv-python {ffcv_python}: no such file")

    from bench.report import show, write_json

    if case == "pack":
        from bench import pack

        document = pack.run(repeats=repeats, ffcv_python=ffcv_python)
    else:
        from tidali.source import open_data

        dataset = open_data(data if data is not None else str(demo_data()))
        if case == "loader":
            from bench.loaders import bench_loaders

            document = bench_loaders(
                dataset, resolutions=resolutions, batch_size=batch_size or 256, repeats=repeats, ffcv_python=ffcv_python
            )
        else:
            from bench.stages import bench_stages

            document = bench_stages(
                dataset,
                resolutions=resolutions,
                stem=stem,
                batch_size=batch_size,
                repeats=repeats,
                device=device,
                amp=amp,
                cache=cache,
            )
    if json_ != "-":
        show(document)
    if json_ is not None:
        write_json(document, json_)
