"""``tidali train`` and ``tidali eval``."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from tidali.config import TrainSettings, change, check_res, make_recipe
from tidali.errors import UsageError

# Groups of options in the help.
DATA = "Data"
MODEL = "Model"
RECIPE = "Recipe"
MACHINE = "Machine"
RUN = "Run"

DataOption = Annotated[
    str, typer.Option(help="A packed data set (made by 'tidali shard' or 'tidali demo').", rich_help_panel=DATA)
]
DeviceOption = Annotated[
    Literal["auto", "cpu", "cuda"],
    typer.Option(help="Where to run; auto takes a GPU where there is one.", rich_help_panel=MACHINE),
]
CacheOption = Annotated[
    Literal["auto", "device", "off"],
    typer.Option(
        help="Decode once into the device's memory, or stream; auto caches what takes less than half of it.",
        rich_help_panel=MACHINE,
    ),
]
MaxBadOption = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Damaged images of a split that are left out before a run fails.",
        show_default="0.1 % of it",
        rich_help_panel=DATA,
    ),
]
AmpOption = Annotated[
    Literal["auto", "bf16", "fp16", "off"],
    typer.Option(help="Mixed precision; auto decides by device and says why.", rich_help_panel=MACHINE),
]

CompileOption = Annotated[
    Literal["auto", "on", "max-autotune", "off"],
    typer.Option(help="torch.compile; auto decides by device and says why.", rich_help_panel=MACHINE),
]


def parse_resolutions(text: str) -> list[int]:
    """'64,128,224' -> [64, 128, 224].

    Raises:
        UsageError: not a list of whole numbers, or one that the network cannot take.
    """
    try:
        resolutions = [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--res {text}: give pixels, such as 64 or 64,128,224") from None
    for res in resolutions:
        check_res(res)
    return resolutions


def train(
    context: typer.Context,
    data: Annotated[
        str | None,
        typer.Option(
            help="A packed data set (made by 'tidali shard'); without it the built-in demo data is made and used.",
            rich_help_panel=DATA,
        ),
    ] = None,
    res: Annotated[
        int | None,
        typer.Option(
            help="Input side in pixels.", show_default="the images' own where they all agree, else 224", rich_help_panel=DATA
        ),
    ] = None,
    stem: Annotated[
        Literal["imagenet", "small"],
        typer.Option(
            help="imagenet: 7x7/2 and max-pool; small: 3x3/1 without pooling, for small images.", rich_help_panel=MODEL
        ),
    ] = "imagenet",
    init: Annotated[
        str,
        typer.Option(
            help="Starting weights: none, imagenet, or a checkpoint (.safetensors, .pth, or runs/NAME/best).",
            rich_help_panel=MODEL,
        ),
    ] = "none",
    stem_init: Annotated[
        Literal["fresh", "resample"],
        typer.Option(help="7x7 kernels for the small stem: leave it random, or bring them to 3x3.", rich_help_panel=MODEL),
    ] = "fresh",
    recipe: Annotated[
        Literal["seed", "modern"],
        typer.Option(
            help="seed: the original study's; modern: normalised, label smoothing, Nesterov, warm-up and cosine.",
            rich_help_panel=RECIPE,
        ),
    ] = "modern",
    epochs: Annotated[
        int | None, typer.Option(help="Passes over train.", show_default="the recipe's", rich_help_panel=RECIPE)
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Images a step.", show_default="the recipe's", rich_help_panel=RECIPE)
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="Peak learning rate.", show_default="the recipe's", rich_help_panel=RECIPE)
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="FIELD=VALUE",
            help="Change one of the recipe's values, such as augment.shift_px=4; repeatable.",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Replay the config.json of another run; only --set and --out change it.", rich_help_panel=RUN
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Of weights, order and augmentation.", rich_help_panel=RECIPE)
    ] = 0,
    device: DeviceOption = "auto",
    amp: AmpOption = "auto",
    compile: CompileOption = "auto",
    cache: CacheOption = "auto",
    max_bad: MaxBadOption = None,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Two runs give the same weights, to the bit.", rich_help_panel=MACHINE)
    ] = False,
    sync_bn: Annotated[
        bool, typer.Option("--sync-bn", help="Several GPUs: batch norm over the batches of all.", rich_help_panel=MACHINE)
    ] = False,
    tensorboard: Annotated[
        bool,
        typer.Option(
            "--tensorboard", help="Also write TensorBoard events to the run folder (extra 'tensorboard').", rich_help_panel=RUN
        ),
    ] = False,
    out: Annotated[
        str | None, typer.Option(help="Run folder.", show_default="runs/DATA-RES-RECIPE-TIME", rich_help_panel=RUN)
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="RUN",
            help="Go on with a stopped or killed run; takes its settings, so no other option.",
            rich_help_panel=RUN,
        ),
    ] = None,
) -> None:
    """Train a ResNet-18 and measure it after each epoch.

    Writes a run folder: config.json, metrics.jsonl, best.safetensors, last.safetensors (weights with class names inside) and
    summary.json.
    """
    if resume is not None:
        _refuse_other_options(context, "resume")
        settings = _saved_settings(Path(resume) / "config.json", "resume")
        _finish(replace(settings, out=resume), resume=True)
        return
    if config is not None:
        _refuse_other_options(context, "config", "set_", "out")
        settings = _saved_settings(Path(config), "config")
        folder = out if out is not None else _run_folder(Path(settings.data).name, settings.res, settings.recipe.name)
        _finish(replace(settings, out=folder, recipe=change(settings.recipe, set_ or ())))
        return

    chosen = change(make_recipe(recipe, epochs=epochs, batch_size=batch_size, lr=lr), set_ or ())
    if res is not None:
        check_res(res)
    folder = data if data is not None else str(demo_data())

    if res is None:
        from tidali.dataset.source import open_data

        res = open_data(folder).default_res
    settings = TrainSettings(
        data=folder,
        out=out if out is not None else _run_folder(Path(folder).name, res, recipe),
        res=res,
        stem=stem,
        init=init,
        stem_init=stem_init,
        recipe=chosen,
        seed=seed,
        device=device,
        amp=amp,
        compile=compile,
        cache=cache,
        max_bad=max_bad,
        deterministic=deterministic,
        sync_bn=sync_bn,
        tensorboard=tensorboard,
    )
    _finish(settings)


def _finish(settings: TrainSettings, *, resume: bool = False) -> None:
    """Train to the end and print what it came to."""
    from tidali.console import is_main_rank, print_table, say
    from tidali.dataset.source import open_data
    from tidali.training.run import train as run

    result = run(settings, open_data(settings.data), resume=resume)
    if not is_main_rank():
        return
    rows = [
        ("best", result.best_epoch, *_score_cells(result.best)),
        ("last", settings.recipe.epochs, *_score_cells(result.last)),
    ]
    if result.last_flip is not None:
        rows.append(("last, mirrored too", settings.recipe.epochs, *_score_cells(result.last_flip)))
    print_table(f"{result.out}", ("", "epoch", "top-1 %", "top-5 %", "loss"), rows)
    say(f"{result.images_per_s:.0f} images/s in training, {result.minutes:.1f} min in all")


def _saved_settings(path: Path, option: str) -> TrainSettings:
    """
    Raises:
        UsageError: the file holds no run's settings.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--{option}: {path} holds no run's settings ({error})") from None
    return TrainSettings.from_dict(document, str(path))


def _refuse_other_options(context: typer.Context, option: str, *also: str) -> None:
    """
    Raises:
        UsageError: another option was given beside one that settles them all.
    """
    for name in context.params:
        source = context.get_parameter_source(name)
        if name not in (option, *also) and source is not None and source.name == "COMMANDLINE":
            raise UsageError(f"--{name.replace('_', '-')}: not together with --{option}, which takes that run's settings")


def eval_(
    checkpoint: Annotated[str, typer.Argument(metavar="CKPT", help="A checkpoint, or a run folder for its best one.")],
    data: DataOption,
    res: Annotated[
        str | None, typer.Option(help="Input sides in pixels, such as 64,128,224.", show_default="as trained")
    ] = None,
    split: Annotated[str, typer.Option(help="Split to score.")] = "val",
    device: DeviceOption = "auto",
    amp: AmpOption = "auto",
    cache: CacheOption = "auto",
    max_bad: MaxBadOption = None,
    flip: Annotated[bool, typer.Option("--flip", help="Average the logits of each image and its mirror image.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of the table.")] = False,
) -> None:
    """Score a checkpoint on a split at one or several resolutions; every sample counts exactly once."""
    resolutions = parse_resolutions(res) if res is not None else []

    from tidali.console import is_main_rank, print_table
    from tidali.dataset.source import open_data
    from tidali.training.evaluation import evaluate_checkpoint

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
        f"{checkpoint} on {split} of {data}" + (", mirrored too" if flip else ""),
        ("res", "top-1 %", "top-5 %", "loss", "samples"),
        [(row.res, *_score_cells(row.score), row.score.samples) for row in rows],
    )


def _score_cells(score: Any) -> tuple[str, str, str]:
    return f"{score.top1_percent:.2f}", f"{score.top5_percent:.2f}", f"{score.loss:.4f}"


def _run_folder(data_name: str, res: int, recipe: str) -> str:
    from datetime import datetime

    return str(Path("runs") / f"{data_name}-{res}-{recipe}-{datetime.now():%Y%m%d-%H%M%S}")


def demo_data() -> Path:
    """The demo data set under data/demo, packed on first use. Of torchrun's ranks, who all come here, one packs it.

    Raises:
        UsageError: the folder cannot be made.
    """
    from tidali.dataset.contract import MANIFEST_NAME
    from tidali.files import locked

    folder = Path("data") / "demo"
    manifest = folder / MANIFEST_NAME
    if manifest.exists():
        return folder
    try:
        folder.parent.mkdir(exist_ok=True)
        with locked(folder.parent):
            if not manifest.exists():
                from shards.demo import pack_demo
                from tidali.console import say

                say(f"making the built-in demo data set in {folder}")
                pack_demo(folder)
    except OSError as error:
        where = f"{folder}: the demo data cannot be made here ({error.strerror})"
        raise UsageError(f"{where}; go to a folder of yours, or give --data") from None
    return folder
