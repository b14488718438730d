"""Whether a driver, a GPU and a build of torch fit together, decided from given facts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tidali.doctor.gpu import driver_fault, driver_version, gpu_fault

CU130 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


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


@pytest.mark.parametrize(
    ("driver", "cuda", "fix"),
    [
        ("580.65.06", "13.0", None),
        ("550.54.15", "12.8", None),
        ("525.60.13", "12.1", None),
        ("550.54.15", "13.0", "install driver 580 or newer, or a torch built for CUDA 12"),
        ("470.82", "12.6", "install driver 525 or newer"),
        ("470.82", "13.0", "install driver 580 or newer"),
        ("470.82", "11.8", "install driver 525 or newer"),  # torch would work, but DALI would not
        (None, "13.0", None),
        ("470.82", None, None),
    ],
)
def test_pairing(driver: str | None, cuda: str | None, fix: str | None) -> None:
    fault = driver_fault(driver, cuda)
    if fix is None:
        assert fault is None
    else:
        assert fault is not None
        assert fault[1].startswith(fix)
        assert ("torch built for" in fault[1]) == ("torch built for" in fix)


@pytest.mark.parametrize(
    ("capability", "built_for", "runs"),
    [
        ((8, 0), CU130, True),
        ((8, 9), CU130, True),  # with the code for 8.6
        ((12, 0), CU130, True),
        ((13, 0), CU130, True),  # with compute_120, which is compiled when it is loaded
        ((7, 0), CU130, False),  # Volta: code for 7.5 is newer
        ((6, 1), CU130, False),
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_90a"], True),
        ((9, 1), ["sm_90a"], False),  # a: only for that capability
        ((10, 0), ["sm_80", "compute_80"], True),
        ((8, 0), [], False),
    ],
)
def test_code_for_a_gpu(capability: tuple[int, int], built_for: list[str], runs: bool) -> None:
    assert (gpu_fault(capability, built_for) is None) == runs


def test_whether_an_older_or_a_newer_torch_helps() -> None:
    old = gpu_fault((7, 0), CU130)
    new = gpu_fault((12, 0), ["sm_80", "sm_90"])
    assert old is not None
    assert new is not None
    assert "an older torch" in old[1]
    assert "a newer torch" in new[1]
