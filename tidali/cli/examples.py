"""Examples of each command, printed below its help. A test parses every line."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup

from tidali.console import show, show_command
from tidali.console.layout import wrap

EXAMPLES: dict[str, tuple[tuple[str, str], ...]] = {
    "": (
        ("tidali doctor", "is this machine ready?"),
        ("tidali train --res 64 --epochs 5", "the main job, on built-in demo data"),
        ("tidali shard pets data/pets --val-fraction 0.1", "your own images"),
        ("tidali train --data data/pets", "and a model trained on them"),
    ),
    "shard": (
        ("tidali shard tiny-imagenet-200.zip data/tiny", "the zip is read without extracting it"),
        ("tidali shard pets data/pets --val-fraction 0.1", "pets/CLASS/*.jpg; a tenth of each class becomes val"),
        ("tidali shard photos.zip data/small --size 64 --classes 20", "64 x 64, the first 20 classes"),
        ("tidali shard photos data/photos --shorter-side 288", "photographs of many megapixels, for training at 224"),
        ("tidali shard 'wds/{000000..000255}.tar' data/wds --val-fraction 0.1", "tars that people already have"),
        ("tidali shard pets s3://bucket/pets", "straight to an object store"),
    ),
    "adopt": (
        ("tidali adopt data/wds --class-names names.txt", "tars of webdataset or img2dataset become a data set in place"),
        ("tidali adopt data/wds --label-field class_id", "the label is a field of each sample's .json"),
    ),
    "demo": (
        ("tidali demo data/demo", "10 classes of 250 images"),
        ("tidali demo data/hard --classes 200 --per-class 500", "as large as Tiny-ImageNet"),
    ),
    "verify": (
        ("tidali verify data/pets", "every hash, index entry, header, label and count"),
        ("tidali verify data/pets --decode", "and also decode every image"),
    ),
    "info": (
        ("tidali info data/pets", "splits, classes, sizes"),
        ("tidali info data/pets --sheet sheet.png", "look at random samples"),
        ("tidali info data/pets --sheet odd.png --outliers", "find duplicates, broken pictures and wrong labels"),
        ("tidali info data/pets --sheet seen.png --recipe modern --set augment.shift_px=4", "look at what the network sees"),
        ("tidali info data/pets --json | jq .splits", "for a program"),
    ),
    "download": (
        ("tidali download data/", "into data/tiny-imagenet-200.zip"),
        ("tidali shard data/tiny-imagenet-200.zip data/tiny", "and pack it; it need not be extracted"),
    ),
    "train": (
        ("tidali train --data data/pets", "at the images' own size, with the recipe 'modern'"),
        ("tidali train --data data/pets --res 224 --init imagenet --epochs 5", "start from ImageNet weights"),
        ("tidali train --data data/pets --set lr=0.1 --set augment.shift_px=4", "change the recipe"),
        ("tidali train --resume runs/NAME", "resume a stopped run, even in the middle of an epoch"),
        ("torchrun --nproc-per-node 4 -m tidali train --data data/pets", "four GPUs"),
    ),
    "study": (
        ("tidali study --data data/tiny", "every row of the table"),
        ("tidali study --data data/tiny --rows 1,7 --epochs-scale 0.2", "a quick look at two rows"),
        ("tidali study --data data/tiny --seeds 3", "mean and standard deviation of each row"),
    ),
    "predict": (
        ("tidali predict runs/NAME photo.jpg", "the five most probable classes"),
        ("tidali predict runs/NAME holiday/ --top 1 --csv > classes.csv", "a folder, for a spreadsheet"),
        ("tidali predict runs/NAME 'holiday/*.jpg' --json", "a pattern, for a program"),
    ),
    "export": (
        ("tidali export runs/NAME", "best.onnx beside the checkpoint; examples/serve_onnx.py serves it"),
        ("tidali export runs/NAME --format pt2 --out model.pt2", "a program saved by torch.export"),
        ("tidali export runs/NAME --input-size 480x640", "for camera frames of that size"),
    ),
    "plot": (("tidali plot runs/A runs/B --out curves.svg", "the curves of two runs in one picture"),),
    "report": (
        ("tidali report runs/NAME", "learning curves, confusion matrix, calibration and mistakes on one page"),
        ("tidali report runs/A runs/B -o compared.html", "two runs side by side"),
    ),
    "runs": (
        ("tidali runs", "what is below runs/, and how it went"),
        ("tidali runs --watch", "how far the running ones are"),
        ("tidali runs --sort best --html runs/index.html", "a page that links the reports"),
    ),
    "eval": (
        ("tidali eval runs/NAME --data data/pets", "the best epoch's weights on val"),
        ("tidali eval runs/NAME/last --data data/pets --res 64,128,224", "the last epoch's weights at three resolutions"),
        ("tidali eval runs/A --against runs/B --data data/pets", "is one better than the other by more than chance?"),
        ("tidali eval runs/NAME --data data/pets --json", "for a program"),
    ),
    "bench": (
        ("tidali bench", "where the time of a training step goes, and what limits it"),
        ("tidali bench peers --data data/pets --res 224", "tidali's loaders and other projects', on the same images"),
        ("tidali bench step --json new.json --compare old.json", "has it become slower since then?"),
    ),
    "doctor": (
        ("tidali doctor", "what works on this machine, and how to fix what does not"),
        ("tidali doctor --data data/pets --checkpoint runs/NAME", "check these files too"),
        ("tidali doctor --json", "for a program, or to attach to a bug report"),
    ),
}


_VALUES = {"<str>": "TEXT", "<int>": "N", "<int range>": "N", "<float>": "X", "<float range>": "X", "<path>": "PATH"}
"""typer's words for what an option takes, and ours."""
_COLUMN = 17
"""What an option takes is wrapped to so many columns, so that its explanation has room."""


class CommandWithExamples(TyperCommand):
    """Prints the command's examples below its help, in a form that can be copied."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        for parameter in self.get_params(ctx):
            _say_what_it_takes(parameter)
        super().format_help(ctx, formatter)
        _print_examples(self.name or "")


class ProgramWithExamples(TyperGroup):
    """The same for the program itself."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        for parameter in self.get_params(ctx):
            _say_what_it_takes(parameter)
        super().format_help(ctx, formatter)
        _print_examples("")


def _say_what_it_takes(parameter: Any) -> None:
    """Have the help say what an option takes: nothing for a flag or an argument, whose name says it; choices with spaces
    between them, so that the column is wrapped there and not inside one."""
    usual = getattr(parameter, "display_type_rich", None)  # of typer's newer versions
    if usual is None:
        return
    is_argument = parameter.param_type_name == "argument"
    if is_argument and parameter.metavar is None:
        parameter.metavar = parameter.name.upper()

    def shown(*args: Any, **kwargs: Any) -> str | None:
        if is_argument or getattr(parameter, "is_flag", False):
            return None
        text = usual(*args, **kwargs)
        if text is not None and "|" in text and text.startswith("<"):
            text = text.strip("<>").replace("|", " | ")
        text = _VALUES.get(text, text)
        least, most = getattr(parameter, "min", None), getattr(parameter, "max", None)
        if least is not None:
            text = f"{text}, {least} or more" if most is None else f"{text}, {least} to {most}"
        return "\n".join(wrap(text, _COLUMN, hang=0)) if text else text

    parameter.display_type_rich = shown
    if isinstance(parameter.show_default, str):  # typer puts such a text into brackets of its own
        parameter._get_default_string = lambda **_: parameter.show_default
    parameter._get_number_range_help_str = lambda: None


def _print_examples(command: str) -> None:
    examples = EXAMPLES.get(command)
    if examples:
        show(" Examples", style="bold")
        for line, what in examples:
            show(f"\n   # {what}", hang=5, style="dim")
            show_command(line, indent=3)
        show("")
