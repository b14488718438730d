"""The study's table, for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tidali.config import Recipe
from tidali.study.rows import IMAGENET, Row

COLUMNS = ("row", "setting", "published %", "last %", "best %", "mirrored too %", "GMACs", "images/s", "minutes")


def describe(row: Row, recipe: Recipe | None, *, stored_px: int | None = None) -> dict[str, Any]:
    """What a row is, as study.json has it.

    Args:
        stored_px: side of the stored images, which a served row takes as they are; None where they are no squares of one size.
    """
    if row.served:
        setting = f"stored pixels in, resized to {row.res} px inside"
    elif recipe is None:
        setting = f"evaluated at {row.res} px"
    else:
        parts = [recipe.name, f"{row.res} px", f"{recipe.epochs} epochs"]
        if recipe.train_sizes:
            parts[1] = f"trained at {min(recipe.train_sizes)} to {max(recipe.train_sizes)} px"
        if recipe.kernel != "pil":
            parts.append(f"{recipe.kernel} kernel")
        if recipe.augment.flip != "none":
            parts.append("mirrored at random" if recipe.augment.flip == "random" else "mirrored every other epoch")
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
    """A row of the table, a cell a column; ``short`` leaves out how it was trained, for a terminal."""

    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    def accuracy(name: str) -> str:
        found = row["top1_percent"] and row["top1_percent"][name]
        if not found:
            return ""
        return f"{found['mean']:.2f}" + (f" ± {found['deviation']:.2f}" if found["deviation"] is not None else "")

    return (
        row["row"],
        row["title"] if short else f"{row['title']} ({row['setting']})",
        number(row["published_top1_percent"], ".1f"),
        *((accuracy("last"), accuracy("best"), accuracy("flip")) if row["status"] == "done" else ("not run", "", "")),
        number(row["gmacs"], ".3f"),
        number(row["images_per_s"], ",.0f"),
        number(row["minutes"], ".1f"),
    )


def notes(study: Mapping[str, Any]) -> list[str]:
    """What the table has to say besides its figures, a sentence or two each."""
    data, weights, device = study["data"], study["initial_weights"], study["device"]
    out = [
        f"{data['name']}: {data['classes']} classes, {data['train_samples']:,} training images, "
        f"measured on the {data['eval_samples']:,} of {data['evaluated_on']}. "
        f"{device['name']}, {device['cores']} cores, {device['dtype']}.",
        "Published: the original study on Tiny-ImageNet, best of epoch"
        + (", which these data are not." if data["classes"] != 200 or data["train_samples"] != 100_000 else "."),
        f"Best is chosen by {data['evaluated_on']}"
        + (", the set that is reported, which flatters it; last is not chosen." if data["evaluated_on"] == "val" else "."),
    ]
    if weights is not None:
        out.append(f"ImageNet weights: {weights['name']} (SHA-256 {weights['sha256'][:16]}).")
    if study["epochs_scale"] != 1:
        out.append(f"All epochs times {study['epochs_scale']:g}: a quick look, not the study.")
    if len(study["seeds"]) > 1:
        out.append(f"Mean ± standard deviation over seeds {', '.join(map(str, study['seeds']))}.")
    out += [f"Row {row['row']} was not run: {row['reason']}." for row in study["rows"] if row["status"] != "done"]
    return out


def markdown(study: Mapping[str, Any]) -> str:
    """study.md."""
    lines = [f"# The study on {study['data']['name']}", "", f"`{study['command']}`, {study['date']}", ""]
    lines += [f"| {' | '.join(COLUMNS)} |", f"|{'|'.join(['---'] * 2 + ['---:'] * (len(COLUMNS) - 2))}|"]
    lines += [f"| {' | '.join(cells(row))} |" for row in study["rows"]]
    measured = [row for row in study["rows"] if row["at_resolution"]]
    if measured:
        sizes = [one["res"] for one in measured[0]["at_resolution"]]
        lines += ["", "Last weights at other resolutions, top-1 %:", ""]
        lines += [f"| row | {' | '.join(f'{size} px' for size in sizes)} |", f"|---|{'|'.join(['---:'] * len(sizes))}|"]
        for row in measured:
            lines.append(f"| {row['row']} | {' | '.join(format(one['top1_percent'], '.2f') for one in row['at_resolution'])} |")
    return "\n".join([*lines, "", *(f"- {note}" for note in notes(study)), ""])
