"""The table of the study as text, and the notes below it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tidali.config import Recipe
from tidali.errors import counted
from tidali.model.pretrained import IMAGENET_NAME
from tidali.model.resnet import ARCHITECTURES, title_of
from tidali.report.page import BEST_IS_BIASED
from tidali.study.explain import explain
from tidali.study.rows import IMAGENET, Row

COLUMNS = ("row", "setting", "published %", "last %", "best %", "flip TTA %", "GMACs", "images/s", "minutes")


def describe(row: Row, recipe: Recipe | None, *, stored_px: int | None = None) -> dict[str, Any]:
    """The description of a row in study.json.

    Args:
        stored_px: side of the stored images, which are the input of a served row; None if they are not squares of one size.
    """
    if row.served:
        setting = f"stored pixels in, resized to {row.res} px inside"
    elif recipe is None:
        setting = f"evaluated at {row.res} px"
    else:
        parts = [recipe.name, f"{row.res} px", counted(recipe.epochs, "epoch")]
        if recipe.train_sizes:
            parts[1] = f"trained at {min(recipe.train_sizes)} to {max(recipe.train_sizes)} px"
        if recipe.kernel != "pil":
            parts.append(f"{recipe.kernel} kernel")
        if recipe.augment.flip != "none":
            parts.append(f"{recipe.augment.flip} flips")
        if recipe.augment.shift_px:
            parts.append(f"shifted by up to {recipe.augment.shift_px} px")
        setting = ", ".join(parts)
    starts = {"none": "random weights", IMAGENET: "ImageNet weights"}
    return {
        "row": row.name,
        "title": row.title,
        "setting": setting,
        "stem": row.stem,
        "from": starts.get(row.start, f"row {row.start}"),
        "input_px": stored_px if row.served else row.res,
        "network_px": row.res,
        "published_top1_percent": row.published_top1_percent,
    }


def cells(row: Mapping[str, Any], *, short: bool = False) -> tuple[str, ...]:
    """The cells of a row, one for each of `COLUMNS`; ``short`` omits how it was trained, for a terminal."""

    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    def accuracy(name: str) -> str:
        found = row["top1_percent"] and row["top1_percent"][name]
        if not found:
            return ""
        return f"{found['mean']:.1f}" + (f" ± {found['deviation']:.1f}" if found["deviation"] is not None else "")

    return (
        row["row"],
        row["title"] if short else f"{row['title']} ({row['setting']})",
        number(row["published_top1_percent"], ".1f"),
        *((accuracy("last"), accuracy("best"), accuracy("flip")) if row["status"] == "done" else (row["status"], "", "")),
        number(row["gmacs"], ".3f"),
        number(row["images_per_s"], ",.0f"),
        number(row["minutes"], ".1f"),
    )


def measured_on(study: Mapping[str, Any]) -> str:
    data, device, seeds = study["data"], study["device"], study["seeds"]
    images = f"{counted(data['train_samples'], 'training image')}, evaluated on the {data['eval_samples']:,} of"
    machine = f"{device['name']}, {counted(device['cores'], 'core')}, {device['dtype']}"
    runs = f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}"
    return f"{data['name']}: {counted(data['classes'], 'class')}, {images} {data['evaluated_on']}. {machine}, {runs}."


def notes(study: Mapping[str, Any]) -> list[str]:
    """What a reader must know to understand the table, in a sentence or two each."""
    data, weights = study["data"], study["initial_weights"]
    arch = study.get("arch", "resnet18")  # studies before there was a choice
    out = ["Published: the original study of ResNet-18 on Tiny-ImageNet, best epoch."]
    if arch != "resnet18":
        out[0] += f" These rows are a {title_of(arch)}'s."
    if data["classes"] != 200 or data["train_samples"] != 100_000:
        out[0] += " These are other data: compare the order of the rows, not the values."
    out.append(BEST_IS_BIASED if data["evaluated_on"] == "val" else f"“Best” is the best epoch on {data['evaluated_on']}.")
    if weights is not None:
        name = f"{weights['name']} (SHA-256 {weights['sha256'][:16]}…)"
        if weights["name"] == IMAGENET_NAME or weights["sha256"].startswith(ARCHITECTURES[arch].weights_sha256):
            out.append(
                f"“ImageNet” is {name}. If the classes are among ImageNet's, as Tiny-ImageNet's are, the accuracy says little "
                f"about other data."
            )
        else:
            out.append(f"“ImageNet” is not ImageNet here: {name} was used instead of its weights.")
    if study["epochs_scale"] != 1:
        out.append(f"Each row had {study['epochs_scale']:g} times the study's epochs: a quick look.")
    if len(study["seeds"]) > 1:
        out.append(f"Figures are means over {len(study['seeds'])} seeds ± their standard deviation.")
    return out


def findings(study: Mapping[str, Any]) -> list[str]:
    """What is wrong with the results of rows, and what to try."""
    found = [f"Row {row['row']}: {text}" for row in study["rows"] for text in row.get("findings", ())]
    advice = "A row's run with other settings: 'tidali train --config RUN/config.json --set FIELD=VALUE --out OTHER'."
    return [*found, advice] if found else []


def rows_without_result(study: Mapping[str, Any]) -> list[str]:
    """Why rows have no result."""
    became = {"not run": "was not run", "diverged": "diverged"}
    return [f"Row {row['row']} {became[row['status']]}: {row['reason']}." for row in study["rows"] if row["status"] != "done"]


def markdown(study: Mapping[str, Any]) -> str:
    """The content of study.md."""
    lines = [f"# The study on {study['data']['name']}", "", f"`{study['command']}`, {study['date']}", ""]
    lines += [f"| {' | '.join(COLUMNS)} |", f"|{'|'.join(['---'] * 2 + ['---:'] * (len(COLUMNS) - 2))}|"]
    lines += [f"| {' | '.join(cells(row))} |" for row in study["rows"]]
    remarks = [measured_on(study), *notes(study), *findings(study), *rows_without_result(study)]
    measured = [row for row in study["rows"] if row["at_resolution"]]
    if measured:
        sizes = [one["res"] for one in measured[0]["at_resolution"]]
        lines += ["", "Last weights at other resolutions, top-1 %:", ""]
        lines += [f"| row | {' | '.join(f'{size} px' for size in sizes)} |", f"|---|{'|'.join(['---:'] * len(sizes))}|"]
        for row in measured:
            lines.append(f"| {row['row']} | {' | '.join(format(one['top1_percent'], '.1f') for one in row['at_resolution'])} |")
    explanation = explain(study)
    if explanation is not None:
        lines += ["", "## Row 5 against row 4", "", *explanation.markdown()]
    return "\n".join([*lines, "", *(f"- {note}" for note in remarks), ""])
