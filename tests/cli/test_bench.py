"""``tidali bench``: what it prints, draws and writes, and that it finds a planted slowdown. No test asserts a rate."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from bench import (
    case_process,
    ceilings,
    crops,
    diagnosis,
    growth,
    loader_growth,
    loading,
    measure,
    memory,
    pack,
    peer_env,
    peers,
    step,
)
from bench import train as bench_train
from bench.document import bench_all, environment
from bench.measure import CaseFailed, Rates
from bench.peer_env import PeerMissing
from bench.report import parts
from bench.routes import ROUTES
from bench.train import CASES
from tidali.dataset.contract import open_dataset
from tidali.hardware import cpu_memory
from tidali.hardware.device import plan_device
from tidali.hardware.limits import cpu_count
from tidali.loading import batches
from tidali.loading import data as data_module
from tidali.training import engine

SCHEMA = json.loads((Path(measure.__file__).parent / "schema.json").read_text())
RECORDED = [
    path for path in sorted((Path(measure.__file__).parent / "results").glob("*.json")) if not path.name.startswith("study_")
]


def check(document: dict[str, Any]) -> None:
    """Against the published schema, read back as a consumer reads it."""
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    errors = list(jsonschema.Draft202012Validator(SCHEMA).iter_errors(json.loads(json.dumps(document))))
    assert [jsonschema.exceptions.best_match([error]).message for error in errors] == []


@pytest.fixture
def quick(monkeypatch, one_thread: None) -> None:
    """One step a measurement, after one to warm up, and small ceilings. On one thread: where other processes take the cores,
    threads that wait for each other need seconds for a step of 8 images."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of the cases' own processes
    monkeypatch.setattr(case_process, "MIN_SECONDS", 0.0)
    monkeypatch.setattr(measure, "WARMUP_STEPS", 1)
    monkeypatch.setattr(measure, "MIN_STEPS", 1)
    monkeypatch.setattr(measure, "MAX_CYCLE_SECONDS", 0.0)
    monkeypatch.setattr(measure, "MIN_SECONDS", 0.0)
    monkeypatch.setattr(diagnosis, "BUSY_SHARE", 1.0)  # of so short a time, and other processes may use the machine
    monkeypatch.setattr(ceilings, "_PRODUCT_SIDE", {"cpu": 64, "cuda": 64})
    monkeypatch.setattr(ceilings, "_COPY_BYTES", {"cpu": 1 << 16, "cuda": 1 << 16})
    monkeypatch.setattr(ceilings, "_DECODE_IMAGES", 8)


@pytest.fixture
def small(demo_data: Path) -> tuple[object, ...]:
    """Options of a tiny measurement."""
    return ("--data", demo_data, "--res", 32, "--batch-size", 8, "--device", "cpu")


def conv1_macs(stem: str, res: int) -> int:
    """Of an image: kernel x channels in x channels out x places."""
    return 7 * 7 * 3 * 64 * (res // 2) ** 2 if stem == "imagenet" else 3 * 3 * 3 * 64 * res**2


@pytest.mark.slow
def test_train_as_a_table_and_a_file(tidali, quick, small, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    ended = tidali("bench", *small, "--repeats", 1, "--json", out)
    assert ended.code == 0, ended.stderr
    document = json.loads(out.read_text())
    check(document)
    assert (document["benchmark"], document["batch_size"], document["data"]["train_samples"]) == ("train", 8, 160)
    assert [(row["res"], row["case"]) for row in document["rows"]] == [(32, case) for case in CASES]
    for row in document["rows"]:
        assert any(row["case"] in line and f"{row['ceiling']['share']:.0%}"[:-1] in line for line in ended.stdout.splitlines())
    (found,) = document["diagnosis"]
    assert found["line"] in ended.stderr
    named = {row["ceiling"] for row in document["ceilings"]}
    assert {ceilings.DECODE, ceilings.COPY, "float32 matrix-product"} <= named


@pytest.mark.slow
def test_json_alone_on_standard_output(tidali, quick, demo_data: Path) -> None:
    ended = tidali(
        "bench", "--data", demo_data, "--res", "32,64", "--repeats", 2, "--batch-size", 4, "--device", "cpu", "--json", "-"
    )
    assert ended.code == 0, ended.stderr
    assert len(ended.stdout.splitlines()) == 1
    document = json.loads(ended.stdout)
    check(document)
    assert document["repeats"] == 2
    assert [row["res"] for row in document["rows"]] == [32] * 4 + [64] * 4


def test_step_has_both_stems_up_to_64_px(quick, monkeypatch) -> None:
    """With rates that are given: two of the original loop, three of tidali's, four of the ceiling."""
    given = {step.ORIGINAL: 2.0, step.TIDALI: 3.0, "float32 matrix-product": 4.0}
    rates = {case: Rates(per_s=(rate,)) for case, rate in given.items()}
    monkeypatch.setattr(step, "_measure", lambda *_: rates)
    document = step.bench_step(resolutions=[32, 96], repeats=1, device="cpu", amp="off")
    check(document)
    measured = [("imagenet", 32), ("imagenet", 96), ("small", 32)]
    rows = document["rows"]
    assert [(row["stem"], row["res"], row["case"]) for row in rows] == [
        (*one, case) for one in measured for case in list(given)[:2]
    ]
    for row in rows:
        # Of images/s and of operations a second: the same share, worked out the other way round. Three forward passes' worth,
        # but that the image itself needs no gradient.
        flop = 6e9 * row["gmacs"] - 2 * conv1_macs(row["stem"], row["res"])
        assert row["ceiling"]["share"] == pytest.approx(given[row["case"]] * flop / 4.0)
        assert row["times_original"] == given[row["case"]] / 2.0


@pytest.mark.slow
def test_step_beside_the_original_loop_with_a_profile(tidali, quick, tmp_path: Path) -> None:
    """At 96 px, where there is one stem: a process of each loop."""
    out = tmp_path / "step.json"
    ended = tidali(
        "bench", "step", "--res", 96, "--batch-size", 4, "--repeats", 1, "--device", "cpu", "--json", out, "--profile"
    )
    assert ended.code == 0, ended.stderr
    document = json.loads(out.read_text())
    check(document)
    original, ours = document["rows"]
    assert (original["case"], ours["case"]) == ("original study's loop", "tidali")
    assert original["times_original"] == 1
    assert ours["times_original"] == ours["images_per_s"]["median"] / original["images_per_s"]["median"]
    assert original["ceiling"]["name"] == "float32 matrix-product"
    trace = json.loads((tmp_path / "step-profile-96-imagenet.json").read_text())
    assert any(event.get("name") == "aten::convolution_backward" for event in trace["traceEvents"])
    summary = [line for line in ended.stderr.splitlines() if " calls  " in line]
    assert len(summary) == 8
    assert any("convolution_backward" in line for line in summary)


def test_a_loop_that_fails_is_one_line(tidali, quick, monkeypatch) -> None:
    def out_of_memory(*args: object) -> None:
        raise CaseFailed("OutOfMemoryError: CUDA out of memory. Tried to allocate 9.00 GiB.")

    monkeypatch.setattr(case_process.CaseProcess, "__init__", out_of_memory)
    ended = tidali("bench", "step", "--res", 32, "--batch-size", 4, "--repeats", 1, "--device", "cpu")
    assert (ended.code, ended.stdout) == (1, "")
    (line,) = (line for line in ended.stderr.splitlines() if line.startswith("tidali:"))
    assert "4 images of 32 px: OutOfMemoryError: CUDA out of memory" in line
    assert line.endswith("give a smaller --batch-size")


@pytest.mark.slow
def test_loader_with_its_growth(tidali, quick, small, monkeypatch) -> None:
    monkeypatch.setattr(loader_growth, "BATCHES", (4, 16, 1024))
    monkeypatch.setattr(loader_growth, "powers_of_two", lambda cores: [2])  # processes are what takes long here
    monkeypatch.setattr(loading, "cache_memory", lambda root, **_: memory)
    memory = {"res": 32, "pixels_mib": 1.0, "idle_rss_mib": 5.0, "peak_rss_mib": 7.0, "times_pixels": 2.0}
    ended = tidali("bench", "loader", *small[:-2], "--repeats", 1, "--json", "-")
    assert ended.code == 0, ended.stderr
    document = json.loads(ended.stdout)
    check(document)
    assert [row["case"] for row in document["rows"]] == list(ROUTES)
    varied = [(row["varied"], row[row["varied"]]) for row in document["growth"] if row["case"] == "cached"]
    assert {("batch_size", 4), ("batch_size", 16), ("threads", 2), ("samples", 160), ("samples", 40)} <= set(varied)
    assert ("batch_size", 1024) not in varied  # the split has 160
    assert ("ranks", 2) in varied


@pytest.mark.slow
def test_growth(tidali, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pack, "DISTINCT_IMAGES", 50)
    monkeypatch.setattr(growth, "BATCHES_S", 0.0)
    monkeypatch.setattr(cpu_memory, "keep_freed_memory", lambda: None)  # of this process

    def run_here(command: list[str]) -> memory.Usage:
        """What a process of its own would do, whose start takes longer than the work."""
        if command[2] == "bench.growth":
            return memory.Usage(2.0, 700.0, json.dumps(growth.read_batches(**json.loads(command[3]))))
        ended = tidali(*command[3:])
        assert ended.code == 0, ended.stderr
        return memory.Usage(0.5, 60.0, ended.stdout)

    monkeypatch.setattr(growth, "run_measured", run_here)
    written, picture = tmp_path / "growth.json", tmp_path / "growth.svg"
    command = ("bench", "growth", "--samples", "20,60", "--batch-size", 8, "--repeats", 1, "--json", written, "--plot", picture)
    ended = tidali(*command)
    assert ended.code == 0, ended.stderr
    document = json.loads(written.read_text())
    check(document)
    read = [f"{what}, {route}" for route in ("streamed", "cached") for what in ("first batch", "batches")]
    cases = ["pack", "resume", "verify", "info", "open", *read]
    assert [(row["samples"], row["case"]) for row in document["rows"]] == [(n, case) for n in (20, 60) for case in cases]
    rows = {(row["samples"], row["case"]): row for row in document["rows"]}
    assert rows[60, "pack"]["images_per_s"]["median"] == 60 / 0.5
    assert (rows[60, "verify"]["seconds"]["max"], rows[60, "verify"]["peak_rss_mib"]) == (0.5, 60.0)
    for panel in ("seconds", "images/s", "peak memory, MiB"):
        assert f"{panel} by the number of images" in picture.read_text()
    monkeypatch.setattr(data_module, "free_memory_bytes", lambda device: 1)
    tidali(*command, "--samples", "20")
    rows = {row["case"]: row for row in json.loads(written.read_text())["rows"]}
    assert "over half of the 0.0 GiB free" in rows["batches, cached"]["not_run"]
    assert "images_per_s" in rows["batches, streamed"]


@pytest.mark.slow
@pytest.mark.parametrize("of_data", [False, True])
def test_pack(monkeypatch, quick, demo_data: Path, of_data: bool) -> None:
    asked = []

    def cannot(name: str) -> Path:
        asked.append(name)
        raise PeerMissing(f"{name} does not compile here")

    monkeypatch.setattr(pack, "PEERS", {"FFCV jpg": "ffcv", "FFCV raw": "ffcv", "broken": None, pack.UNDECODED: None})
    monkeypatch.setattr(peer_env, "python_of", cannot)
    monkeypatch.setattr(pack, "DISTINCT_IMAGES", 100)
    document = pack.bench_pack(open_dataset(demo_data) if of_data else None, images=220, repeats=1, workers=1)
    check(document)
    ours, theirs, *missing = document["rows"]
    assert (ours["case"], theirs["case"]) == ("tidali", "webdataset, not decoded")
    assert ours["ceiling"]["name"] == ceilings.DECODE
    assert "ceiling" not in theirs
    assert document["times_the_fastest_peer"] == ours["images_per_s"]["median"] / theirs["images_per_s"]["median"]
    *both, broken = missing
    assert both == [{"case": f"FFCV {kind}", "not_run": "ffcv does not compile here"} for kind in ("jpg", "raw")]
    assert asked == ["ffcv"]  # a build that fails takes minutes
    assert broken["case"] == "broken"  # the script knows no such case, and fails
    assert broken["not_run"].startswith("ended with exit code 1: ")
    assert document.get("data", {}).get("name") == (demo_data.name if of_data else None)


@pytest.mark.slow
def test_peers_at_random_crops(tidali, quick, write_photos, monkeypatch, tmp_path: Path) -> None:
    photos, packed, out, plot = tmp_path / "photos", tmp_path / "packed", tmp_path / "out.json", tmp_path / "out.svg"
    # Fewer of the images and crops by which loaders are checked; tests/unit/test_peers.py has which crops are refused.
    monkeypatch.setattr(crops, "PER_SIZE", 8)
    monkeypatch.setattr(peers, "CHECK_CROPS", 512)
    write_photos(photos, {"train/wide": 16}, size=(120, 80))
    write_photos(photos, {"train/high": 16}, size=(70, 100))
    assert tidali("shard", photos, packed, "--workers", 1).code == 0
    chosen = ("--crops", "--peers", "torchvision-v1,tidali", "--batch-size", 8)
    ended = tidali("bench", "peers", "--data", packed, "--res", 48, "--repeats", 1, *chosen, "--json", out, "--plot", plot)
    assert ended.code == 0, ended.stderr
    document = json.loads(out.read_text())
    check(document)
    assert document["crops"] is True
    rows = {row["case"]: row for row in document["rows"]}
    assert list(rows) == ["torchvision v1", "tidali streaming", "tidali cached", "tidali cached, bf16"]
    for case in ("torchvision v1", "tidali streaming"):
        assert rows[case]["images_per_s"]["median"] > 0
        assert rows[case]["kernel"] == "bicubic"
        stored = sum(path.stat().st_size for path in photos.rglob("*.jpg"))
        assert rows[case]["stored_kib_per_image"] == pytest.approx(stored / 32 / 1024)
    assert "--crops" in rows["tidali cached"]["not_run"]
    assert "random crops" in ended.stdout
    assert "random crops" in plot.read_text()


def test_all_is_kept_part_by_part() -> None:
    kept: list[int] = []
    part = {"benchmark": "step", **environment(plan_device("cpu", "off", "off")), "repeats": 1}
    part["rows"] = [{"case": "a", "images_per_s": {"median": 1.0, "min": 1.0, "max": 1.0}}]
    together = bench_all({"one": lambda: part, "two": lambda: part}, lambda so_far: kept.append(len(so_far["parts"])))
    check(together)
    assert kept == [1, 2]


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_recorded_results_follow_the_schema_and_name_no_machine(path: Path) -> None:
    document = json.loads(path.read_text())
    check(document)
    for part in parts(document):
        assert part["commit"] is not None
        assert "/" not in part["command"].replace("data/", "")


def test_what_the_schema_refuses() -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    rate = {"median": 2.0, "min": 1.0, "max": 3.0}
    rows = [{"case": "a", "images_per_s": rate, "times_torchvision": 1.5}, {"case": "b", "not_run": "no wheel"}]
    head = environment(plan_device("cpu", "off", "off"))
    document = {"benchmark": "peers", **head, "batch_size": 8, "repeats": 3, "rows": rows}
    check(document)
    validator = jsonschema.Draft202012Validator(SCHEMA)
    for wrong in (
        {**document, "schema_version": 1},
        {**document, "benchmark": "stages"},
        {name: value for name, value in document.items() if name != "machine"},
        {**document, "rows": [{"case": "a"}]},
        {**document, "rows": [{"case": "a", "images_per_s": {**rate, "median": 0}}]},
        {**document, "rows": [{"case": "a", "images_per_s": rate, "not_run": "both"}]},
    ):
        assert not validator.is_valid(wrong)


# ---------------------------------------------------------------------------------------------------------- planted slowdowns


PLANTED_S = 0.5
"""Ten times what a step of 8 images of 32 px takes on two free cores."""


def slowed(function: Any, before: Path | None = None) -> Any:
    """The function with a delay: `PLANTED_S`, or four batches' time of the slowest case in a document of a busy machine."""
    rows = json.loads(before.read_text())["rows"] if before is not None else []
    planted_s = max([PLANTED_S, *(4 * 8 / row["images_per_s"]["median"] for row in rows)])

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(planted_s)
        return function(*args, **kwargs)

    return slow


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench") / "before.json"


@pytest.fixture
def before(tidali, quick, small, undisturbed: Path) -> Path:
    """The document of a measurement without a delay, made once."""
    if not undisturbed.exists():
        assert tidali("bench", *small, "--repeats", 3, "--json", undisturbed).code == 0
    return undisturbed


@pytest.mark.slow
def test_a_sleep_in_the_loader_is_found(tidali, quick, small, before: Path, monkeypatch, tmp_path: Path) -> None:
    after = tmp_path / "after.json"
    monkeypatch.setattr(batches.Batches, "_batch", slowed(batches.Batches._batch, before))
    ended = tidali("bench", *small, "--repeats", 3, "--json", after, "--compare", before, "--tolerance", 60)
    assert ended.code == 1
    (found,) = json.loads(after.read_text())["diagnosis"]
    assert found["culprit"] == "the loader"
    assert found["data_wait_share"] > 0.5
    assert "the loader" in found["line"]
    (message,) = (line for line in ended.stderr.splitlines() if line.startswith("tidali:"))
    assert "slower than in the old document by more than 60 %" in message
    assert "loader only" in message
    assert "end to end" in message


@pytest.mark.slow
def test_a_wait_in_the_step_is_found(tidali, quick, small, before: Path, monkeypatch, tmp_path: Path) -> None:
    after = tmp_path / "after.json"
    monkeypatch.setattr(engine, "train_step", slowed(engine.train_step, before))
    # What the cores would have idle if this process had them alone: another process must not use up the time that is lost here.
    monkeypatch.setattr(measure, "idle_s", lambda: cpu_count() * time.perf_counter() - time.process_time())
    ended = tidali("bench", *small, "--repeats", 3, "--json", after, "--compare", before, "--tolerance", 60)
    assert ended.code == 1
    (found,) = json.loads(after.read_text())["diagnosis"]
    assert found["culprit"] == "the step"
    assert found["data_wait_share"] < 0.15
    assert "the step" in found["line"]
    assert "the cores are idle for" in found["line"]
    (message,) = (line for line in ended.stderr.splitlines() if line.startswith("tidali:"))
    assert "step, synthetic" in message


@pytest.mark.slow
def test_a_wait_around_the_step_is_found(tidali, quick, small, monkeypatch) -> None:
    monkeypatch.setattr(bench_train.Meter, "update", slowed(bench_train.Meter.update))
    ended = tidali("bench", *small, "--repeats", 3, "--json", "-")
    (found,) = json.loads(ended.stdout)["diagnosis"]
    assert found["culprit"] == "the loop around the step", found["line"]


# ---------------------------------------------------------------------------------------------------------- wrong use


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--plot", "out.pdf"], "--plot out.pdf: give a file that ends in .png or .svg or .html"),
        (["--plot", "nowhere/out.png"], "--plot nowhere/out.png: there is no folder nowhere"),
        (["pack", "--profile"], "--profile: goes with 'bench train', 'bench step', not with 'bench pack'"),
        (["step", "--peers", "ffcv"], "--peers: goes with 'bench peers', not with 'bench step'"),
        (["loader", "--device", "cuda"], "--device: goes with 'bench train', 'bench step', not with 'bench loader'"),
        (["step", "--data", "data/tiny"], "--data: goes with 'bench train', 'bench loader', 'bench pack', 'bench peers', not"),
        (["train", "--crops"], "--crops: goes with 'bench peers', not with 'bench train'"),
        (["peers", "--crops", "--training"], "--crops: measures loaders; it does not go with --training"),
        (["--compare", "nowhere.json"], "--compare nowhere.json: cannot be read"),
        (["--tolerance", "-1"], "--tolerance"),
        (["stages"], "stages"),
    ],
)
def test_wrong_use(tidali, argv: list[str], message: str) -> None:
    ended = tidali("bench", *argv)
    assert (ended.code, ended.stdout) == (2, "")
    assert message in ended.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not a JSON document"),
        ("[1]", "is not a document of 'tidali bench --json'"),
        ('{"benchmark": "step", "schema_version": 2}', "is of 'tidali bench step', this is 'tidali bench train'"),
        ('{"benchmark": "train", "schema_version": 1}', "has schema version 1, this tidali writes 2"),
        ('{"benchmark": "train", "schema_version": 2}', "has no rows"),
    ],
)
def test_an_old_document_that_does_not_fit(tidali, tmp_path: Path, content: str, message: str) -> None:
    old = tmp_path / "old.json"
    old.write_text(content)
    ended = tidali("bench", "train", "--compare", old)
    assert ended.code == 2
    assert message in ended.stderr
