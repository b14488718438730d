"""What is made of measured rates: shares of ceilings, the diagnosis, comparisons and plots."""

from __future__ import annotations

import copy
import itertools
import os
import re
import subprocess
import time
import warnings
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

from bench import plot, profile, report
from bench.ceilings import COPY, DECODE, Ceiling, ceiling_rows, lowest_ceiling
from bench.compare import compare
from bench.diagnosis import diagnose
from bench.document import environment
from bench.loader_growth import powers_of_two
from bench.measure import Rates, own_cpu_s
from tidali.errors import UsageError
from tidali.hardware.device import plan_device
from tidali.model.resnet import resnet_gmacs


def rates(value: float, **more: float) -> Rates:
    return Rates(per_s=(value,) * 3, **more)


def test_forward_gmacs_are_the_published_ones() -> None:
    """Of ResNet-18: 1.814 at 224 px (torchvision's table gives 1.81); at 64 px 0.148 with the stock stem and 2.222 with the
    small one, less what the head differs by for another number of classes."""
    found = [resnet_gmacs("resnet18", 200, stem, res) for stem, res in (("imagenet", 224), ("imagenet", 64), ("small", 64))]
    assert found == pytest.approx([1.814, 0.148, 2.222], abs=6e-4)


def test_the_lowest_ceiling_limits() -> None:
    measured = {"case": rates(90.0), DECODE: rates(1000.0), COPY: rates(6000.0)}
    found = lowest_ceiling(measured, {DECODE: 1.0, COPY: 50.0})
    assert found == Ceiling(name=COPY, images_per_s=120.0)
    assert found.share(measured["case"]) == 0.75
    assert lowest_ceiling(measured, {DECODE: 1.0, "not measured": 1e9}) == Ceiling(name=DECODE, images_per_s=1000.0)
    assert lowest_ceiling(measured, {}) is None
    assert [row["ceiling"] for row in ceiling_rows(measured)] == [DECODE, COPY]


def test_growth_is_measured_on_powers_of_two_and_on_all_cores() -> None:
    assert [powers_of_two(cores) for cores in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


# ------------------------------------------------------------------------------------------------------------------ diagnosis


def found(
    *,
    loader: float,
    step: float,
    both: float,
    wait: float,
    idle: float | None = 0.0,
    on_host: bool = True,
    synchronisations: int | None = None,
) -> Any:
    return diagnose(
        64,
        loader=rates(loader),
        step=rates(step, idle_share=idle),
        end_to_end=rates(both, wait_share=wait),
        loader_ceiling=Ceiling(name=DECODE, images_per_s=2000.0),
        step_ceiling=Ceiling(name="bf16 matrix-product", images_per_s=100.0),
        step_on_host=on_host,
        synchronisations=synchronisations,
    )


def test_the_step_is_the_bottleneck() -> None:
    diagnosis = found(loader=5000, step=87, both=86, wait=0.004)
    assert diagnosis.culprit == "the step"
    assert all(fact in diagnosis.line for fact in ("64 px", "waiting for data 0.4 %", "87 %", "bf16 matrix-product"))


@pytest.mark.parametrize(
    ("idle", "on_host", "said"), [(0.9, True, True), (0.1, True, False), (None, True, False), (0.9, False, False)]
)
def test_a_step_that_leaves_its_own_cores_idle_waits(idle: float | None, on_host: bool, said: bool) -> None:
    line = found(loader=5000, step=9, both=9, wait=0.0, idle=idle, on_host=on_host).line
    assert ("the cores are idle for 90 % of it" in line) == said


def test_the_loader_is_the_bottleneck() -> None:
    diagnosis = found(loader=50, step=90, both=40, wait=0.6)
    assert diagnosis.culprit == "the loader"
    facts = ("64 px", "waiting for data 60.0 %", "50 images/s", "90", " 2 % ", DECODE)
    assert all(fact in diagnosis.line for fact in facts)


def test_a_loader_that_prefetches_on_the_same_cores_is_named_too() -> None:
    assert found(loader=200, step=90, both=60, wait=0.01).culprit == "the loader"


def test_neither_of_them() -> None:
    diagnosis = found(loader=5000, step=90, both=45, wait=0.01)
    assert diagnosis.culprit == "the loop around the step"
    assert "50 %" in diagnosis.line


def verdict(loader: Rates, step: Rates, both: Rates) -> Any:
    return diagnose(64, loader=loader, step=step, end_to_end=both, loader_ceiling=None, step_ceiling=None, step_on_host=False)


@pytest.mark.parametrize(
    ("loader", "step", "both", "why"),
    [
        (rates(50.0), Rates(per_s=(90.0,)), rates(40.0, wait_share=0.6), "1 measurement of each case cannot show it"),
        (rates(50.0), rates(90.0), Rates(per_s=(40.0, 41.0), wait_share=0.6), "2 measurements of each case"),
        (
            rates(50.0),
            rates(90.0, others_share=0.4),
            rates(40.0, wait_share=0.6),
            "other processes used up to 40 % of the cores",
        ),
        # The step is a part of end to end, so it cannot take longer.
        (rates(200.0), rates(60.0), rates(90.0, wait_share=0.01), "end to end reached 90 images/s and the step"),
        (
            rates(200.0),
            Rates(per_s=(50.0, 90.0, 91.0)),
            Rates(per_s=(40.0, 60.0, 61.0), wait_share=0.01),
            "the measurements of the step and of end to end overlap",
        ),
    ],
)
def test_figures_that_do_not_show_what_limits_name_nothing(loader: Rates, step: Rates, both: Rates, why: str) -> None:
    diagnosis = verdict(loader, step, both)
    assert diagnosis.culprit == "not known"
    assert f"what limits it is not known: {why}" in diagnosis.line
    assert "bottleneck" not in diagnosis.line


def test_what_this_process_and_its_children_use_is_their_own() -> None:
    """A child's time counts while it runs and after it ended."""
    before_s, counted_before_s = own_cpu_s(), sum(os.times()[:4])
    burn = "i=0; while [ $i -lt 60000 ]; do i=$((i+1)); done"
    with subprocess.Popen(["bash", "-c", f"{burn}; read line"], stdin=subprocess.PIPE) as child:
        while own_cpu_s() - before_s < 0.1:
            time.sleep(0.05)
        assert child.stdin is not None
        child.stdin.close()
    # User and system time of this process and of its ended children, in ticks of 10 ms. Children that other tests left running
    # are idle, so that they are in neither difference.
    assert own_cpu_s() - before_s == pytest.approx(sum(os.times()[:4]) - counted_before_s, abs=0.1)


# ----------------------------------------------------------------------------------------------------------------- comparison


def document(*medians: float, **more: Any) -> dict[str, Any]:
    rows = [
        {"res": 64, "case": f"case {number}", "images_per_s": {"median": value, "min": 0.9 * value, "max": 1.1 * value}}
        for number, value in enumerate(medians)
    ]
    return {"benchmark": "train", **environment(plan_device("cpu", "off", "off")), "repeats": 3, "rows": rows, **more}


def test_only_what_is_slower_beyond_the_tolerance_fails() -> None:
    comparison = compare(document(100, 89, 91, 120), document(100, 100, 100, 100), 10)
    assert [change.ratio for change in comparison.changes] == [1.0, 0.89, 0.91, 1.2]
    assert [comparison.verdict(change) for change in comparison.changes] == ["", "SLOWER", "", "faster"]
    assert [change.case for change in comparison.slower] == ["case 1"]
    assert comparison.warnings == ()
    _, columns, rows = comparison.table()
    assert all(len(row) == len(columns) for row in rows)
    assert rows[1][4:6] == ("0.89", "0.90-1.10, 0.80-0.98")


def test_rows_are_matched_by_what_they_measure_and_not_by_their_place() -> None:
    old, new = document(100, 50), document(100, 50)
    new["rows"].reverse()
    new["rows"][0]["batch_size"] = 8  # another case now
    comparison = compare(new, old, 10)
    assert [(change.case, change.ratio) for change in comparison.changes] == [("case 0", 1.0)]
    assert set(comparison.warnings) == {
        "only now: train: case 1 64 px, batch 8",
        "only in the old document: train: case 1 64 px",
    }


def test_other_hardware_and_settings_are_reported() -> None:
    new, old = document(100, batch_size=8), document(100, batch_size=32)
    old["machine"] = {**old["machine"], "cpu": "abacus"}
    old["versions"] = {**old["versions"], "torch": "0.1"}
    warnings = compare(new, old, 10).warnings
    assert warnings[0].startswith("train: other hardware: cpu was abacus, is ")
    assert warnings[1] == "train: other conditions: batch_size was 32, is 8"
    assert warnings[2].startswith("train: torch was 0.1, is ")
    assert len(warnings) == 3


def test_nothing_in_common() -> None:
    other = copy.deepcopy(document(100))
    other["rows"][0]["res"] = 224
    with pytest.raises(UsageError, match="no case in common"):
        compare(document(100), other, 10)


def test_documents_of_all_are_compared_part_by_part() -> None:
    def together(*medians: float) -> dict[str, Any]:
        return {
            "benchmark": "all",
            "schema_version": 2,
            "parts": [document(medians[0]), document(medians[1], benchmark="step")],
        }

    comparison = compare(together(100, 50), together(100, 100), 10)
    assert [(change.benchmark, change.ratio) for change in comparison.changes] == [("train", 1.0), ("step", 0.5)]


def test_a_case_that_stopped_running_is_reported() -> None:
    new = document(100, 100)
    new["rows"][1] = {"res": 64, "case": "case 1", "not_run": "it does not start any more"}
    assert compare(new, document(100, 100), 10).stopped == ("case 1 64 px",)
    assert compare(document(100, 100), new, 10).stopped == ()


# --------------------------------------------------------------------------------------------------------- profile, host waits


def event(key: str, device: DeviceType, *, cpu_us: float = 0, gpu_us: float = 0, note: bool = False) -> Any:
    return SimpleNamespace(
        key=key,
        device_type=device,
        is_user_annotation=note,
        self_cpu_time_total=cpu_us,
        self_device_time_total=gpu_us,
        count=profile.STEPS,
    )


def test_a_gpus_time_is_counted_once() -> None:
    """The profiler gives a kernel's time to the kernel, to the operator that queued it, and to annotations around it."""
    events = [
        event("aten::mm", DeviceType.CPU, cpu_us=30, gpu_us=6000),
        event("sgemm", DeviceType.CUDA, gpu_us=6000),
        event("copy", DeviceType.CUDA, gpu_us=3000),
        event("Optimizer.step", DeviceType.CUDA, gpu_us=9000, note=True),
    ]
    title, *lines = profile.summary(events, on_gpu=True, title="a step")
    assert title == "a step: 3.0 ms a step on the GPU, by kernel"
    assert [line.split() for line in lines] == [
        ["66.7", "%", "2.00", "ms", "1", "calls", "sgemm"],
        ["33.3", "%", "1.00", "ms", "1", "calls", "copy"],
    ]
    title, *lines = profile.summary(events, on_gpu=False, title="a step")
    assert (title, len(lines)) == ("a step: 0.0 ms a step on the CPU, by operator", 1)


def test_what_makes_the_host_wait_is_counted(monkeypatch) -> None:
    """Under a debug mode that warns as torch's does; of the step alone, not of the one before it."""
    modes = ["default"]

    def step() -> None:
        if modes[-1] == "warn":
            for _ in range(2):
                warnings.warn(
                    "called a synchronizing CUDA operation (Triggered internally at CUDAFunctions.cpp:148.)", stacklevel=1
                )
            warnings.warn("another thing", stacklevel=1)

    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    assert profile.host_synchronisations(step, torch.device("cuda")) == 2
    assert modes == ["default", "warn", 0]
    assert profile.host_synchronisations(step, torch.device("cpu")) is None


def test_the_line_reports_that_a_step_makes_the_host_wait() -> None:
    busy = found(loader=5000, step=87, both=86, wait=0.004, on_host=False, synchronisations=3)
    assert busy.culprit == "the step"
    assert "makes the host wait for the GPU 3 times" in busy.line
    assert busy.host_synchronisations == 3
    assert "wait for the GPU" not in found(loader=5000, step=87, both=86, wait=0.004, on_host=False, synchronisations=0).line


def test_a_long_wait_is_the_loaders_whatever_the_steps_rate_was() -> None:
    assert found(loader=90, step=87, both=86, wait=0.4).culprit == "the loader"


# ---------------------------------------------------------------------------------------------------------------- table, plot


def test_why_a_case_did_not_run_stands_below_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    """A reason is a sentence; in a cell it would make the column, and every row, as long."""
    report.show(plotted())
    table, _, below = capsys.readouterr().out.partition("not run: ")
    assert "not run" in table
    assert below.startswith("FFCV <raw> (64 px): it has no wheel for this Python & machine\n")
    assert max(map(len, table.splitlines())) < 100


def plotted() -> dict[str, Any]:
    drawn = document(100, 2.5, batch_size=8)
    drawn["rows"][0]["ceiling"] = {"name": "memory copy", "images_per_s": 400.0, "share": 0.25}
    drawn["rows"].append({"res": 64, "case": "FFCV <raw>", "not_run": "it has no wheel for this Python & machine"})
    drawn["growth"] = [
        {
            "res": 64,
            "case": "cached",
            "varied": "threads",
            "threads": n,
            "images_per_s": {"median": n, "min": n / 2, "max": 2 * n},
        }
        for n in (1, 2, 4)
    ]
    return drawn


def test_markdown_has_a_column_for_each_place() -> None:
    rows = document(100, 2.5)["rows"]
    rows[1] |= {"times_original": 0.025, "ceiling": {"name": "memory copy", "images_per_s": 10.0, "share": 0.25}}
    there = {**rows[0], "res": 224}
    missing = {"res": 224, "case": "case 1", "not_run": "no wheel"}
    lines = report.markdown_table({"rows": [*rows, there, missing]}).splitlines()
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines] == [
        ["case", "64 px", "compared", "224 px", "compared"],
        ["---"] * 5,
        ["case 0", "100 (90.0 to 110)", "", "100 (90.0 to 110)", ""],
        ["case 1", "2.5 (2.2 to 2.8)", "0.03 x original, 25 % of memory copy", "not run", "no wheel"],
    ]


def test_markdown_of_growth_has_times_and_memory() -> None:
    rates = {"images_per_s": {"median": 4e3}}
    packed = [
        {"case": "pack", "samples": n, **rates, "seconds": {"median": n / 4e3}, "peak_rss_mib": n / 1e3}
        for n in (2_000, 50_000)
    ]
    missing = {"case": "cached", "samples": 50_000, "not_run": "too large"}
    rows = [*packed, {"case": "cached", "samples": 2_000, **rates}, missing]
    assert [line.split(" | ") for line in report.markdown_table({"rows": rows}).splitlines()] == [
        ["| case", "2,000 samples", "50,000 samples |"],
        ["| ---", "---", "--- |"],
        ["| pack", "0.50 s, 2 MiB", "12.5 s, 50 MiB |"],
        ["| cached", "4,000 images/s", "not run |"],
    ]


def test_bars_and_curves_show_the_figures() -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    figure = plot.draw(plotted())
    bars, curves = figure.axes
    assert bars.get_xscale() == "log"  # 400 is over 20 times 2.25
    assert len(bars.patches) == 0  # the length of a bar says nothing on a logarithmic axis
    dots = [line.get_xdata()[0] for line in bars.lines if line.get_marker() == "o"]
    assert dots == [100, 2.5]
    figure.draw_without_rendering()
    assert {"1", "10", "100"} <= {text.get_text() for text in bars.get_xticklabels()}
    texts = [text.get_text() for text in bars.texts]
    assert texts[0] == "100, 25 % of memory copy"
    assert texts[-1].startswith("not run: it has no wheel")
    assert list(curves.lines[0].get_ydata()) == [1, 2, 4]


def test_labels_of_a_logarithmic_axis_do_not_touch() -> None:
    """Of 10,000 to 100,000,000, as a GPU's cache has beside its decoding."""
    (axes,) = plot.draw(document(15_000, 90_000_000)).axes
    axes.figure.draw_without_rendering()
    low, high = axes.get_xlim()
    labels = [text for text in axes.get_xticklabels() if low <= text.get_position()[0] <= high]
    assert [text.get_text() for text in labels] == ["10k", "100k", "1M", "10M", "100M"]
    boxes = [text.get_window_extent().intervalx for text in labels]
    assert all(left[1] < right[0] for left, right in itertools.pairwise(boxes))


def test_bars_where_the_axis_is_linear_and_no_spread_of_one_repeat() -> None:
    drawn = document(100, 50)
    (axes,) = plot.draw(drawn).axes
    assert [patch.get_width() for patch in axes.patches] == [100, 50]
    assert len(axes.lines) == 2  # from the lowest to the highest
    for row in drawn["rows"]:
        row["images_per_s"] |= {"min": row["images_per_s"]["median"], "max": row["images_per_s"]["median"]}
    assert len(plot.draw({**drawn, "repeats": 1}).axes[0].lines) == 0
    assert "measured once" in plot.about({**drawn, "repeats": 1})[0]


def test_the_page_has_the_ceilings() -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    measured = {"ceiling": "memory copy", "res": 64, "unit": "bytes", "per_s": {"median": 17.5e9, "min": 17e9, "max": 18e9}}
    text = plot.page({**plotted(), "ceilings": [measured]}).decode()
    cells = re.findall(r"<t[hd]>(.*?)</t[hd]>", text.partition("Ceilings")[2])
    assert cells[5:10] == ["memory copy", "64 px", "17.5", "GB/s", "17.0 to 18.0"]


def test_the_page_says_below_its_table_what_was_not_run_and_breaks_no_option() -> None:
    """A reason inside the table would widen it."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    command = f"tidali bench peers --peers {','.join(['dali-webdataset'] * 5)}"
    diagnosis = [{"line": "give --repeats 5, or --res, or --set lr=0.1."}]
    text = plot.page({**plotted(), "command": command, "diagnosis": diagnosis}).decode()
    assert [row[-1] for row in report.rate_table(plotted())[1]] == ["25 % of memory copy", "", ""]
    assert '<p class="muted">not run: FFCV &lt;raw&gt; (64 px): it has no wheel' in text
    unbroken = [f'<span class="whole">{option}</span>' for option in ("--repeats 5", "--res", "--set lr=0.1")]
    assert f"<p>give {', or '.join(unbroken)}.</p>" in text
    code = text.partition("<code>")[2].partition("</code>")[0]
    assert re.sub(r"</?span[^>]*>", "", code).strip() == command  # as it is copied
    assert re.search(r"[.]whole[{][^}]*max-width:100%", text)  # a word that is wider than the screen is broken


def test_the_table_of_growth_has_seconds_and_no_rate_of_them() -> None:
    spread = {"median": 5e3, "min": 4e3, "max": 6e3}
    timed = {"case": "open", "samples": 100, "images_per_s": spread, "seconds": {"median": 0.0035, "min": 0.003, "max": 4.0}}
    drawn = {**document(), "benchmark": "growth", "rows": [timed, {"case": "batches", "samples": 100, "images_per_s": spread}]}
    columns = ["case", "where", "seconds", "images/s", "spread"]
    rows = [["open", "100 samples", "0.0035", "", "0.003 to 4.00"], ["batches", "100 samples", "", "5,000", "4,000 to 6,000"]]
    assert report.rate_table(drawn) == (columns, rows)
    assert report.rate_table({**drawn, "repeats": 1})[0] == columns[:-1]
    columns, rows = report.rate_table({**drawn, "benchmark": "pack", "rows": [timed]})
    assert dict(zip(columns, rows[0], strict=True))["images/s"] == "5,000"


@pytest.mark.parametrize("suffix", [".png", ".svg", ".html"])
def test_files(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    path = tmp_path / f"out{suffix}"
    plot.write_plot(plotted(), path)
    content = path.read_bytes()
    if suffix == ".png":
        assert content.startswith(b"\x89PNG")
        return
    text = content.decode()
    start, end = text.index("<svg"), text.index("</svg>") + len("</svg>")
    ElementTree.fromstring(text[start:end])
    if suffix == ".html":
        assert plot.OURS not in text[start:end]  # a variable in its place, which follows the reader's theme
        assert "FFCV &lt;raw&gt;" in text
        assert "FFCV <raw>" not in text
        assert [word for word in ("src=", "<script", "@import", "url(http") if word in text] == []
