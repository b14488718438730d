"""Figures show the numbers they are given, and become valid files and parts of pages."""

from __future__ import annotations

import itertools
import logging
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

from tidali.cli.options import output_file
from tidali.errors import TidaliError, UsageError
from tidali.report import class_figures, figures
from tidali.report.drawing import COLOURS, inline_svg, legend_entries, save_figure, series_colour, theme_css
from tidali.report.figures import Evaluated
from tidali.report.run_report import notes_of, why_far_off
from tidali.training.history import Run
from tidali.training.judgement import Finding
from tidali.training.predictions import ClassAccuracy

NASTY = '_<b>&"$x^$'


def make_run(name: str, top1: list[float]) -> Run:
    epochs = tuple(
        {
            "epoch": place + 1,
            "val_top1_percent": value,
            "train_top1_percent": value + 5,
            "val_loss": 3 - value / 50,
            "train_loss": 2.5 - value / 50,
            "images_per_s": 100.0 + place,
            "data_wait_share": 0.25,
        }
        for place, value in enumerate(top1)
    )
    return Run(folder=Path(name), name=name, settings={}, epochs=epochs, summary=None)


def test_matplotlib_keeps_what_it_says_of_its_cache_to_itself() -> None:
    """Where its folder cannot be written, it says so on standard error when it is imported."""
    assert not logging.getLogger("matplotlib.font_manager").isEnabledFor(logging.WARNING)


RUNS = [make_run("a", [10, 30, 45]), make_run(NASTY, [20, 25, 50])]
MODELS = [
    Evaluated(label="1", gmacs=0.148, top1_percent=30, series=0),
    Evaluated(label="2", gmacs=1.814, top1_percent=74, series=8, at=[(224, 1.814, 74), (64, 0.148, 17)]),
]
DRAWN = {
    "accuracy": lambda: figures.by_epoch(figures.accuracy, RUNS),
    "one epoch": lambda: figures.by_epoch(figures.accuracy, [make_run("a", [10])]),
    "loss": lambda: figures.by_epoch(figures.loss, RUNS),
    "throughput": lambda: figures.by_epoch(figures.throughput, RUNS),
    "waiting": lambda: figures.by_epoch(figures.waiting, RUNS),
    "one among": lambda: figures.runs_among_others(RUNS[1:], RUNS[:1], 3),
    "comparison": lambda: figures.comparison(RUNS, ["a", NASTY]),
    "gmacs": lambda: figures.accuracy_against_gmacs(MODELS),
    "one point": lambda: figures.accuracy_against_gmacs(MODELS[:1]),
    "resolution": lambda: figures.accuracy_against_resolution(MODELS[1:]),
    "classes": lambda: class_figures.class_accuracy([NASTY, "中文", "c"], counts((1, 2), (0, 3), (0, 0))),
    "differences": lambda: class_figures.class_differences([NASTY, "b"], [50.0, 0.0], [20.0, None]),
    "matrix": lambda: class_figures.confusion_matrix([NASTY, "b"], [[3, 1], [0, 4]]),
}


@pytest.mark.parametrize("name", DRAWN)
def test_pages_get_well_formed_svg_in_their_own_colours(name: str, recwarn) -> None:
    svg = inline_svg(DRAWN[name](), "a & b")
    root = ElementTree.fromstring(svg)
    assert root.tag == "svg"
    assert (root.get("role"), root.get("aria-label")) == ("img", "a & b")
    assert not re.search(r"https?://(?!www\.w3\.org/1999/xlink)", svg)
    left = set(re.findall(r"#[0-9a-f]{6}", svg)) - {"#ffffff", "#000000"}  # matplotlib's own colours, of invisible parts
    assert left == set()
    assert {one for one in re.findall(r"var\(--([a-z0-9-]+)\)", svg)} <= COLOURS.keys()
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.parametrize("suffix", [".png", ".svg", ".PNG"])
def test_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"curves{suffix}"
    save_figure(DRAWN["comparison"](), path)
    if suffix == ".svg":
        assert ElementTree.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    else:
        with Image.open(path) as image:
            image.load()
            assert image.format == "PNG"
            assert image.width > 1200
            assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    first = path.read_bytes()
    save_figure(DRAWN["comparison"](), path)
    assert path.read_bytes() == first  # equal figures are equal files


def test_text_is_plain(tmp_path: Path) -> None:
    text = "".join(ElementTree.fromstring(inline_svg(DRAWN["classes"](), "x")).itertext())
    assert NASTY in text
    assert "中文" in text
    legend = DRAWN["comparison"]().legends[0]
    assert [entry.get_text() for entry in legend.get_texts()][:2] == ["a", NASTY]


def test_curves_hold_the_runs_numbers() -> None:
    (axes,) = DRAWN["accuracy"]().axes
    drawn = [tuple(line.get_ydata()) for line in axes.lines]
    assert drawn == [(15, 35, 50), (10, 30, 45), (25, 30, 55), (20, 25, 50)]
    assert len(axes.collections) == 12  # an area around each point, for the mouse
    assert tuple(axes.lines[1].get_xdata()) == (1, 2, 3)
    assert [line.get_color() for line in axes.lines] == [series_colour(0)] * 2 + [series_colour(1)] * 2
    (axes,) = DRAWN["waiting"]().axes
    assert tuple(axes.lines[0].get_ydata()) == (25, 25, 25)


def test_cost_and_resolution_hold_the_rows_numbers() -> None:
    (axes,) = DRAWN["gmacs"]().axes
    assert [tuple(line.get_xydata()[0]) for line in axes.lines[1:]] == [(0.148, 30), (1.814, 74)]
    assert [text.get_text() for text in axes.texts] == ["1", "2"]
    (axes,) = DRAWN["resolution"]().axes
    assert axes.lines[0].get_xydata().tolist() == [[64, 17], [224, 74]]


def test_models_at_one_place_share_a_label() -> None:
    models = [Evaluated(label=label, gmacs=0.148, top1_percent=top1, series=0) for label, top1 in (("1", 30.01), ("4", 29.99))]
    (axes,) = figures.accuracy_against_gmacs(models).axes
    assert [text.get_text() for text in axes.texts] == ["1, 4"]
    assert len(axes.lines) == 1


def test_labels_of_close_points_do_not_overlap() -> None:
    points = [Evaluated(label=str(place), gmacs=0.148, top1_percent=50 + place / 10, series=place) for place in range(5)]
    points.append(Evaluated(label="far", gmacs=0.148, top1_percent=10, series=5))
    figure = figures.accuracy_against_gmacs(points)
    figure.draw_without_rendering()
    boxes = sorted(Text.get_window_extent(text).intervaly.tolist() for text in figure.axes[0].texts)  # without the joining line
    assert len(boxes) == 6  # each is one pixel higher than its letters
    assert all(above[0] >= below[1] - 1 for below, above in itertools.pairwise(boxes))


def test_one_high_loss_does_not_flatten_the_others() -> None:
    run = make_run("a", [10, 30, 45, 50])
    high = replace(run, epochs=({**run.epochs[0], "val_loss": 80.0}, *run.epochs[1:]))
    assert figures.by_epoch(figures.loss, [run]).axes[0].get_yscale() == "linear"
    assert figures.by_epoch(figures.loss, [high]).axes[0].get_yscale() == "log"
    diverged = replace(
        run, epochs=tuple({**epoch, "val_loss": float("nan"), "train_loss": float("inf")} for epoch in run.epochs)
    )
    assert inline_svg(figures.by_epoch(figures.loss, [diverged]), "x")


def test_the_line_of_chance_is_inside_the_figure() -> None:
    (axes,) = figures.by_epoch(partial(figures.accuracy, chance_percent=[2.0]), RUNS).axes
    assert axes.lines[-1].get_ydata()[0] == 2
    assert axes.get_ylim()[0] < 2


def test_the_label_of_chance_is_where_the_curve_is_not() -> None:
    for curve, place in ([20.0, 80.0], (1, "right")), ([60.0, 20.0], (0, "left")):
        (axes,) = figures.by_epoch(partial(figures.accuracy, chance_percent=[20.0]), [make_run("a", curve)]).axes
        (label,) = axes.texts
        assert (label.get_position()[0], label.get_ha()) == place


def test_the_highest_throughput_is_below_the_top_of_its_figure() -> None:
    (axes,) = figures.by_epoch(figures.throughput, RUNS).axes
    assert axes.get_ylim()[0] == 0
    assert axes.get_ylim()[1] > 1.04 * 102  # a marker is 3 % of the height


def test_points_show_their_values_under_the_mouse() -> None:
    svg = inline_svg(DRAWN["accuracy"](), "x")
    titles = [title.text for title in ElementTree.fromstring(svg).iter("title")]
    assert "a, epoch 2: 30" in titles
    assert f"{NASTY}, epoch 3, train: 55" in titles


def test_letters_are_readable_on_a_narrow_page() -> None:
    """A page of 400 pixels has room for 374. Each letter is then of eleven pixels or more, or the figure is scrolled."""
    for name, draw in DRAWN.items():
        if name == "comparison":  # for files, not for pages
            continue
        svg = inline_svg(draw(), "x")
        width = float(re.search(r'viewBox="0 0 ([0-9.]+)', svg)[1])
        shown = max(float(re.search(r"min-width:([0-9]+)px", svg)[1]), min(374, 1.5 * width))
        sizes = [float(size) for size in re.findall(r"font(?:-size)?: ([0-9.]+)px", svg)]
        assert sizes
        assert min(sizes) * shown / width >= 11, name


def test_class_differences_are_sorted() -> None:
    (axes,) = class_figures.class_differences(["a", "b", "c", "d"], [50, 50, 50, None], [40, 90, 60, 10]).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["b", "c", "a"]


def counts(*pairs: tuple[int, int]) -> list[ClassAccuracy]:
    """Correct and all samples of each class."""
    return [ClassAccuracy(correct=correct, samples=samples) for correct, samples in pairs]


def test_bars_are_sorted_and_classes_without_samples_left_out() -> None:
    (axes,) = class_figures.class_accuracy(["a", "b", "c", "d"], counts((1, 5), (0, 0), (9, 10), (1, 2))).axes
    assert [bar.get_width() for bar in axes.patches] == [90, 50, 20]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["c", "d", "a"]
    # Wilson's interval of one of two: 0.5 -+ z / (2 sqrt(2 + z^2)).
    assert axes.lines[1].get_xdata() == pytest.approx([9.45, 90.55], abs=0.005)


def test_of_many_classes_the_ends_are_shown() -> None:
    (axes,) = class_figures.class_accuracy(
        [f"class {one}" for one in range(200)], counts(*((one, 200) for one in range(200)))
    ).axes
    widths = [bar.get_width() for bar in axes.patches]
    assert widths == [one / 2 for one in range(199, 179, -1)] + [one / 2 for one in range(19, -1, -1)]
    assert "… 160 more …" in [text.get_text() for text in axes.texts]


def test_matrix_cells() -> None:
    (axes,) = class_figures.confusion_matrix(["a", "b"], [[3, 1], [0, 4]]).axes
    cells = np.asarray(axes.images[0].get_array())
    assert cells[..., 3].tolist() == [[0.75**0.5, 0.5], [0, 1]]
    assert cells[0, 0, :3].tolist() == cells[1, 1, :3].tolist() != cells[0, 1, :3].tolist()
    assert sorted(text.get_text() for text in axes.texts) == ["1", "3", "4"]


def test_a_matrix_of_200_classes_names_no_cell() -> None:
    (axes,) = class_figures.confusion_matrix([f"class {one}" for one in range(200)], np.eye(200, dtype=int).tolist()).axes
    assert len(axes.texts) == 0


def test_series_differ_in_colour_or_marker() -> None:
    entries = legend_entries([str(one) for one in range(42)])
    assert len({(entry["mark"], entry["colour"]) for entry in entries}) == 42
    assert len({light for light, _ in COLOURS.values()}) == len(COLOURS)  # each colour is replaced by its own variable
    assert theme_css().count("--series-0:") == 2


@pytest.mark.parametrize("given", ["curves.pdf", "curves", "nowhere/curves.png", "{folder}.png"])
def test_paths_that_cannot_be_written_are_refused_before_work(given: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UsageError, match="--out"):
        output_file(given.replace("{folder}", "folder"), "--out", (".png", ".svg"))


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(TidaliError, match="cannot be written"):
        save_figure(DRAWN["waiting"](), tmp_path / "gone" / "x.png")


def test_what_is_said_of_every_run_is_said_once(monkeypatch) -> None:
    few, high = Finding("few images", "48 of val", "Hold out more."), Finding("high loss", "of 80", "Try --lr 4.")
    found = {"a": [few], "b": [few, high]}
    monkeypatch.setattr(Run, "findings", property(lambda run: found[run.name]))
    notes = notes_of([make_run("a", [10]), make_run("b", [20])])
    assert [note for note in notes if "images: " in note or "loss: " in note] == [
        "few images: 48 of val. Hold out more.",
        "b: high loss: of 80. Try --lr 4.",
    ]


@pytest.mark.parametrize(
    ("settings", "findings", "said"),
    [
        (
            {"norm_images": "256", "ema_decay": "0.999"},
            [],
            "Evaluation uses the moving average of the weights (ema_decay). Averages",
        ),
        ({"norm_images": "0", "ema_decay": "0"}, [], "Evaluation uses batch norm's running statistics. Averages"),
        ({"norm_images": "256", "ema_decay": "0"}, [], ""),  # nothing in it lags
        ({"norm_images": "0", "ema_decay": "0"}, [Finding("diverging", "from 1 to 80", "Try --lr 4.")], ""),
    ],
)
def test_an_evaluated_loss_far_above_that_of_training_is_explained_by_what_lags(
    settings: dict[str, str], findings: list[Finding], said: str, monkeypatch
) -> None:
    run = make_run("a", [10, 30])
    run = replace(run, settings=settings, epochs=({**run.epochs[0], "val_loss": 80.0}, run.epochs[1]))
    monkeypatch.setattr(Run, "findings", findings)
    assert said in why_far_off([run])
    assert bool(said) == bool(why_far_off([run]))
