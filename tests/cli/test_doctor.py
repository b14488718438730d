"""``tidali doctor`` on this machine, and against staged faults."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tidali import doctor, native
from tidali.doctor import Finding, driver_version, examine
from tidali.errors import TidaliError


def found(tmp_path: Path, device: str = "cpu", data: str | None = None, out: Path | None = None) -> dict[str, Finding]:
    return {finding.name: finding for finding in examine(device, data, out or tmp_path / "runs")}  # type: ignore[arg-type]


def test_a_machine_that_can_do_the_job(tidali, demo_data: Path, tmp_path: Path) -> None:
    ended = tidali("doctor", "--device", "cpu", "--data", demo_data, "--out", tmp_path / "runs", "--json", "--parity")
    assert ended.code == 0, ended.stderr
    document = json.loads(ended.stdout)
    status = {one["name"]: one["status"] for one in document["findings"]}
    assert "failure" not in status.values()
    names = {
        "python",
        "torch",
        "device",
        "memory",
        "DALI",
        "resampling",
        "training step",
        "several ranks",
        "run folder",
        "data",
    }
    assert {name for name in names if status[name] == "ok"} == names
    assert all(one["mend"] for one in document["findings"] if one["status"] != "ok")
    assert {row["res"] for row in document["parity"]} == {32, 64, 128, 224}
    assert all(row["largest"] <= row["largest_allowed"] for row in document["parity"])
    assert list(tmp_path.iterdir()) == []


def test_a_line_each_and_the_table(tidali, tmp_path: Path) -> None:
    ended = tidali("doctor", "--device", "cpu", "--parity", "--out", tmp_path)
    assert ended.code == 0, ended.stderr
    assert "ok      training step: float32" in ended.stdout or "ok      training step: bfloat16" in ended.stdout
    assert "torch antialiased" in ended.stdout


def test_damaged_data(tidali, demo_copy: Path, tmp_path: Path) -> None:
    shard = next(demo_copy.glob("train-*.tar"))
    shard.write_bytes(shard.read_bytes()[:-2048])
    ended = tidali("doctor", "--device", "cpu", "--data", demo_copy, "--out", tmp_path)
    assert (ended.code, ended.stderr.strip()) == (1, "tidali: 1 failure: data")
    line = next(line for line in ended.stdout.splitlines() if line.startswith("FAILURE"))
    assert shard.name in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a usable GPU")
@pytest.mark.parametrize(
    ("driver", "built", "says", "mend"),
    [
        (None, "12.6", "no NVIDIA driver", "install NVIDIA's driver"),
        ("550.54.15", None, "built without CUDA", "CUDA build of torch"),
        ("470.10", "12.6", "cannot use it", "driver 525 or newer"),
    ],
)
def test_a_gpu_that_cannot_be_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, driver: str | None, built: str | None, says: str, mend: str
) -> None:
    monkeypatch.setattr(doctor, "driver_version", lambda: driver)
    monkeypatch.setattr(torch.version, "cuda", built)
    findings = found(tmp_path, device="cuda")
    assert findings["GPU"].status == findings["device"].status == "failure"
    assert says in findings["GPU"].text
    assert mend in findings["GPU"].mend
    assert findings["training step"].status == "ok"  # the rest is looked at, on the CPU


def test_no_driver_is_no_failure_where_no_gpu_was_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "driver_version", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert found(tmp_path)["GPU"].status == "warning"


def no_dali(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "dali_is_installed", lambda: False)


def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "load", lambda: None)


def broken_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("Triton is\nbroken")

    monkeypatch.setattr(doctor, "train_step", fail)


def other_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tidali.parity.ROUTES", {**doctor_routes(), "matrix": lambda pixels, res: torch.zeros(8, 3, res, res)})


def doctor_routes() -> dict[str, Callable]:
    from tidali.parity import ROUTES

    return dict(ROUTES)


@pytest.mark.parametrize(
    ("stage", "name", "status", "says", "mend"),
    [
        (no_dali, "DALI", "failure", "not installed", "pip install nvidia-dali-cuda120"),
        (no_compiler, "C compiler", "warning", "by torch", "install gcc"),
        (broken_step, "training step", "failure", "RuntimeError: Triton is broken", "new virtual environment"),
        (other_pixels, "resampling", "failure", "matrix and DALI differ", "expected 1 at most"),
    ],
)
def test_staged_faults(monkeypatch, tmp_path: Path, stage: Callable, name: str, status: str, says: str, mend: str) -> None:
    stage(monkeypatch)
    finding = found(tmp_path)[name]
    assert finding.status == status
    assert says in finding.text
    assert mend in finding.mend


def test_a_run_folder_that_cannot_be_written(tmp_path: Path) -> None:
    finding = found(tmp_path, out=Path("/proc/runs"))["run folder"]  # not even root may make files there
    assert finding.status == "failure"
    assert "/proc" in finding.text
    assert "--out" in finding.mend


def test_a_small_disk_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 100 << 20}))
    finding = found(tmp_path)["run folder"]
    assert (finding.status, "make room" in finding.mend) == ("warning", True)


def test_a_data_set_that_is_not_there(tmp_path: Path) -> None:
    assert found(tmp_path, data=str(tmp_path / "no"))["data"].status == "failure"


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\nGCC", "550.54.15"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  575.57.08  Release Build\n", "575.57.08"),
        ("", None),
    ],
)
def test_the_drivers_version(tmp_path: Path, text: str, version: str | None) -> None:
    (tmp_path / "version").write_text(text)
    assert driver_version(tmp_path / "version") == version
    assert driver_version(tmp_path / "none") is None


def test_our_own_errors_keep_their_text(tmp_path: Path) -> None:
    def fail() -> Finding:
        raise TidaliError("shard 3 is gone; pack it again")

    assert doctor._guard("data", fail) == Finding(name="data", status="failure", text="shard 3 is gone; pack it again")
