"""``tidali doctor`` on this machine, and with faults that the tests stage."""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tidali as package
from tidali.cli.doctor import make_samples, verify
from tidali.doctor import files as doctor_files
from tidali.doctor import machine as doctor
from tidali.doctor.findings import Finding, run_check
from tidali.doctor.machine import examine
from tidali.errors import TidaliError
from tidali.hardware.device import DevicePlan, plan_device
from tidali.hardware.limits import FreeMemory
from tidali.loading import data as data_module
from tidali.model.checkpoint import find_checkpoint
from tidali.model.resnet import build_resnet18

PARTS = {
    *("python", "torch", "GPU", "device", "memory", "C compiler", "DALI", "resampling", "training step", "pixels", "epochs"),
    *("evaluation", "training run", "several ranks", "run folder"),
}


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the checks that train: they have tests of their own."""
    monkeypatch.setattr(doctor, "_checks", lambda *_: ())


def found(tmp_path: Path, **options: Any) -> dict[str, Finding]:
    options = {"device": "cpu", "out": tmp_path / "runs", **options}
    return {finding.name: finding for finding in examine(make_samples, verify, **options)}


def test_a_machine_that_can_do_the_job(tidali, demo_data: Path, trained, tmp_path: Path) -> None:
    ended = tidali(
        *("doctor", "--device", "cpu", "--data", demo_data, "--checkpoint", trained[0]),
        *("--out", tmp_path / "runs", "--json", "--parity"),
    )
    assert ended.code == 0, ended.stdout + ended.stderr
    document = json.loads(ended.stdout)
    status = {one["name"]: one["status"] for one in document["findings"]}
    assert status.keys() == PARTS | {"data", "checkpoint"}
    assert {name for name in status if status[name] != "ok"} <= {"GPU", "C compiler"}
    assert all(one["fix"] for one in document["findings"] if one["status"] != "ok")
    assert all("rows" not in one for one in document["findings"])
    assert document["versions"]["tidali"] == package.__version__
    assert {row["res"] for row in document["parity"]} == {32, 64, 128, 224}
    assert all(row["largest"] <= row["largest_allowed"] for row in document["parity"])
    assert list(tmp_path.iterdir()) == []


def test_each_finding_is_a_line_and_the_table_is_computed_once(
    tidali, no_work: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    table, calls = doctor.parity_table, []
    monkeypatch.setattr(doctor, "parity_table", lambda: calls.append(1) or table())
    ended = tidali("doctor", "--device", "cpu", "--parity", "--out", tmp_path)
    assert ended.code == 0, ended.stderr
    assert "ok      device: cpu" in ended.stdout
    assert "torch antialiased" in ended.stdout
    assert ended.stdout.count("matrix against DALI: DALI rounds to uint8") == 1
    assert calls == [1]


# ---------------------------------------------------------------------------------------------------------------- its own files


def damage_size(folder: Path) -> str:
    shard = next(folder.glob("train-*.tar"))
    shard.write_bytes(shard.read_bytes()[:-2048])
    return shard.name


def damage_a_byte(folder: Path) -> str:
    """Inside an image, where only a hash can detect it."""
    shard = next(folder.glob("val-*.tar"))
    content = bytearray(shard.read_bytes())
    content[1000] ^= 1
    shard.write_bytes(content)
    return shard.name


def damage_the_manifest(folder: Path) -> str:
    (folder / "dataset.json").write_text("{")
    return "dataset.json"


@pytest.mark.parametrize("damage", [damage_size, damage_a_byte, damage_the_manifest])
def test_damaged_data(tidali, no_work: None, demo_copy: Path, tmp_path: Path, damage: Callable[[Path], str]) -> None:
    name = damage(demo_copy)
    ended = tidali("doctor", "--device", "cpu", "--data", demo_copy, "--out", tmp_path)
    assert (ended.code, ended.stderr.strip()) == (1, "tidali: 1 failure: data")
    line = next(line for line in ended.stdout.splitlines() if line.startswith("FAILURE"))
    assert name in line
    assert "tidali verify" in line or "pack the source again" in line  # the first says how to repair it


def test_data_that_cannot_be_evaluated_on(no_work: None, write_photos, tmp_path: Path) -> None:
    from shards.pack import pack
    from shards.plan import PackSettings
    from shards.scan import FileSource

    source = write_photos(tmp_path / "photos", {"train/cat": 3, "train/dog": 3})
    pack(FileSource(source, "folder"), tmp_path / "packed", PackSettings(), workers=1)
    finding = found(tmp_path, data=str(tmp_path / "packed"))["data"]
    assert finding.status == "failure"
    assert "no split to evaluate on" in finding.text
    assert "--val-fraction 0.1 --overwrite" in finding.fix


def test_data_behind_a_url_with_quarantined_files(
    no_work: None, write_photos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The local copy that training reads does not have them."""
    from shards.pack import pack
    from shards.scan import FileSource

    monkeypatch.setenv("TIDALI_CACHE", str(tmp_path / "cache"))
    source = write_photos(tmp_path / "photos", {"train/cat": 3, "val/cat": 3})
    (source / "train" / "cat" / "bad.jpg").write_text("no image")
    url = f"memory://{tmp_path.name}/data"
    assert len(pack(FileSource(source), url, workers=1).manifest.quarantine) == 1
    finding = found(tmp_path, data=url)["data"]
    assert (finding.status, finding.fix) == ("ok", "")


def test_an_installation_that_cannot_be_imported(tidali, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tidali.doctor.machine", None)
    ended = tidali("doctor")
    assert (ended.code, ended.stdout) == (1, "")
    (line,) = ended.stderr.splitlines()
    assert line.startswith("tidali: this installation cannot be imported (ModuleNotFoundError: import of tidali.doctor.machine")
    assert "virtual environment" in line.partition("; ")[2]


def test_a_run_folder_of_no_possible_name(no_work: None, tmp_path: Path) -> None:
    finding = found(tmp_path, out=tmp_path / ("x" * 300))["run folder"]
    assert finding.status == "failure"
    assert "cannot be written (File name too long)" in finding.text
    assert "--out" in finding.fix


def test_a_data_set_that_is_not_there(no_work: None, tmp_path: Path) -> None:
    finding = found(tmp_path, data=str(tmp_path / "no"))["data"]
    assert finding.status == "failure"
    assert "tidali shard" in finding.fix


def no_checkpoint(path: Path, good: Path) -> str:
    return "no such checkpoint"


def torchvisions(path: Path, good: Path) -> str:
    torch.save(build_resnet18(4, "imagenet").state_dict(), path)
    return "not a readable safetensors file"


def half_of_one(path: Path, good: Path) -> str:
    path.write_bytes(good.read_bytes()[:1_000_000])
    return "not a readable safetensors file"


def without_a_card(path: Path, good: Path) -> str:
    from safetensors.torch import save_file

    save_file(build_resnet18(4, "imagenet").state_dict(), path)
    return "no tidali metadata"


def not_finite(path: Path, good: Path) -> str:
    from tidali.model.checkpoint import load_model, save_checkpoint

    model, card = load_model(good)
    with torch.no_grad():
        model.fc.weight[0, 0] = float("nan")
    save_checkpoint(path, model, card)
    return "weights that are not finite: fc.weight"


@pytest.mark.parametrize("stage", [no_checkpoint, torchvisions, half_of_one, without_a_card, not_finite])
def test_a_wrong_checkpoint(no_work: None, trained, tmp_path: Path, stage: Callable[[Path, Path], str]) -> None:
    path = tmp_path / "x.safetensors"
    says = stage(path, find_checkpoint(str(trained[0])))
    finding = found(tmp_path, checkpoint=str(path))["checkpoint"]
    assert finding.status == "failure"
    assert str(path) in finding.text
    assert says in finding.text
    assert finding.fix


def test_a_checkpoint_of_other_data(no_work: None, trained, tmp_path: Path) -> None:
    from shards.demo import pack_demo

    pack_demo(tmp_path / "other", classes=3, per_class=5, workers=1)
    finding = found(tmp_path, data=str(tmp_path / "other"), checkpoint=str(trained[0]))["checkpoint"]
    assert finding.status == "failure"
    assert "a head of 4 classes" in finding.text
    assert "evaluate it on its own data" in finding.fix


def test_a_run_folder_that_cannot_be_written(no_work: None, tmp_path: Path) -> None:
    finding = found(tmp_path, out=Path("/proc/runs"))["run folder"]  # where not even root may create files
    assert finding.status == "failure"
    assert "/proc: cannot be written" in finding.text
    assert "--out" in finding.fix


def test_a_run_folder_below_a_file(no_work: None, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    finding = found(tmp_path, out=tmp_path / "file" / "runs")["run folder"]
    assert finding.status == "failure"
    assert f"{tmp_path / 'file'}: cannot be written (Not a directory)" in finding.text
    assert "--out" in finding.fix


@pytest.mark.parametrize(("free_mib", "status"), [(100, "failure"), (500, "warning")])
def test_a_small_disk(no_work: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free_mib: int, status: str) -> None:
    monkeypatch.setattr(doctor_files.shutil, "disk_usage", lambda _: type("Usage", (), {"free": free_mib << 20}))
    finding = found(tmp_path)["run folder"]
    assert (finding.status, "needs up to 1024 MiB" in finding.fix) == (status, True)


def test_a_disk_that_fills_up(no_work: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(doctor_files.os, "fsync", full)
    finding = found(tmp_path)["run folder"]
    assert (finding.status, "needs up to 1024 MiB" in finding.fix) == ("failure", True)
    assert "No space left" in finding.text


# ------------------------------------------------------------------------------------------------------------------ the machine


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a usable GPU")
@pytest.mark.parametrize(
    ("driver", "built", "says", "fix"),
    [
        (None, "12.6", "no NVIDIA driver", "install NVIDIA's driver"),
        ("550.54.15", None, "built without CUDA", "CUDA build of torch"),
        ("470.10", "12.6", "cannot use it: driver 470 is older than CUDA 12 needs", "driver 525 or newer"),
        ("550.54.15", "13.0", "cannot use it: driver 550 is older than CUDA 13 needs", "a torch built for CUDA 12"),
        ("580.65.06", "13.0", "cannot use it", "--gpus all"),
    ],
)
def test_a_gpu_that_cannot_be_used(
    no_work: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, driver: str | None, built: str | None, says: str, fix: str
) -> None:
    monkeypatch.setattr(doctor, "driver_version", lambda: driver)
    monkeypatch.setattr(torch.version, "cuda", built)
    findings = found(tmp_path, device="cuda")
    assert findings["GPU"].status == findings["device"].status == "failure"
    assert says in findings["GPU"].text
    assert fix in findings["GPU"].fix
    assert findings["device"].fix.startswith("use --device cpu")
    assert findings["several ranks"].text.startswith("gloo")  # the other checks run, on the CPU


def test_no_driver_is_no_failure_where_no_gpu_is_asked_for(
    no_work: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor, "driver_version", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert found(tmp_path)["GPU"].status == "warning"


def no_dali(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "dali_is_installed", lambda: False)


def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")


def no_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDALI_CACHE", "/proc/none")


def few_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "raise_open_files_limit", lambda: 20)


def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (doctor, data_module):
        monkeypatch.setattr(module, "free_memory", lambda: FreeMemory(2**30, "/sys/fs/cgroup/memory.max"))


def other_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "tidali.doctor.parity.ROUTES", {**doctor_routes(), "matrix": lambda pixels, res: torch.zeros(8, 3, res, res)}
    )


def doctor_routes() -> dict[str, Callable]:
    from tidali.doctor.parity import ROUTES

    return dict(ROUTES)


@pytest.mark.parametrize(
    ("stage", "name", "status", "says", "fix"),
    [
        (no_dali, "DALI", "failure", "not installed", "pip install nvidia-dali-cuda120"),
        (no_compiler, "C compiler", "warning", "no C compiler on PATH", "install gcc"),
        (no_cache_folder, "C compiler", "warning", "/proc/none", "TIDALI_CACHE"),
        (few_open_files, "open files", "warning", "open 20 files", "ulimit -n"),
        (
            little_memory,
            "memory",
            "warning",
            "1.0 GiB free for tidali on cpu, by the limit in /sys/fs",
            "limit",
        ),
        (other_pixels, "resampling", "failure", "matrix and DALI differ", "expected 1 at most"),
    ],
)
def test_staged_faults(
    no_work: None, monkeypatch, tmp_path: Path, stage: Callable, name: str, status: str, says: str, fix: str
) -> None:
    stage(monkeypatch)
    finding = found(tmp_path)[name]
    assert finding.status == status
    assert says in finding.text
    assert fix in finding.fix


def test_a_check_that_fails_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: object) -> str:
        raise RuntimeError("Triton is\nbroken")

    for name in ("steps_lower_the_loss", "routes_agree"):
        monkeypatch.setattr(doctor.checks, name, fail)
    monkeypatch.setattr(doctor.run_checks, "eval_matches_training", fail)
    findings = found(tmp_path)
    for name in ("training step", "pixels", "training run"):
        assert (findings[name].status, findings[name].text) == ("failure", "RuntimeError: Triton is broken")
        assert findings[name].fix
    assert findings["epochs"].status == findings["evaluation"].status == "ok"


def test_the_work_is_tried_in_each_precision_and_compiled_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = DevicePlan(device=torch.device("cuda", 0), name="", amp_dtype=None, amp_reason="", compile=True, compile_reason="")
    tried: list[object] = []

    def step(device: torch.device, amp: str, compile: str = "off") -> str:
        tried.append((amp, compile))
        return amp

    monkeypatch.setattr(doctor.checks, "precisions", lambda *_: ("bf16", "fp16", "off"))
    monkeypatch.setattr(doctor.checks, "steps_lower_the_loss", step)
    monkeypatch.setattr(doctor.checks, "compiled_matches_eager", lambda _: "the same")
    monkeypatch.setattr(doctor.checks, "routes_agree", lambda *_: "")
    monkeypatch.setattr(doctor.checks, "epochs_are_complete", lambda *_: "")
    monkeypatch.setattr(doctor.checks, "evaluation_counts_once", lambda *_: "")
    monkeypatch.setattr(doctor.run_checks, "eval_matches_training", lambda _, __, cache, ___: cache)
    monkeypatch.setattr(doctor.run_checks, "exported_runs_on", lambda *_: "exported")
    monkeypatch.setattr(doctor.run_checks, "runs_repeat", lambda _, __, cache, ___: f"{cache} again")
    monkeypatch.setattr(doctor.run_checks, "held_batches_stay", lambda _, __, decoder: f"{decoder} held")
    monkeypatch.setattr(doctor, "dali_is_installed", lambda: True)
    findings = {finding.name: finding for finding in doctor._checks(plan, make_samples)}
    assert tried == [("bf16", "off"), ("fp16", "off"), ("off", "off"), ("auto", "on")]
    assert findings["training run"].text == "device; off"
    assert findings["repeated run"].text == "device again; off again"
    assert findings["held batches"].text == "cpu held; mixed held"
    assert {finding.status for finding in findings.values()} == {"ok"}


def test_no_temporary_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor.checks, "steps_lower_the_loss", lambda *_: "")
    monkeypatch.setattr(doctor.tempfile, "tempdir", str(tmp_path / "none"))
    finding = next(finding for finding in doctor._checks(plan_device("cpu", "auto", "off"), make_samples) if finding.fix)
    assert (finding.name, finding.status) == ("temporary folder", "failure")
    assert "TMPDIR" in finding.fix


def test_the_fix_is_taken_from_our_own_errors() -> None:
    def fail() -> Finding:
        raise TidaliError("shard 3 is gone; pack it again; or not")

    expected = Finding(name="data", status="failure", text="shard 3 is gone", fix="pack it again; or not")
    assert run_check("data", fail) == expected
