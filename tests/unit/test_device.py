"""Decisions about described devices: none of them is here."""

from __future__ import annotations

import contextlib
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tidali.config import CUDA_GRAPHS
from tidali.dataset.contract import open_dataset
from tidali.errors import TidaliError, UsageError
from tidali.hardware import device
from tidali.hardware.device import DeviceInfo, choose_amp, choose_compile, describe_device, numerics, plan_device, set_numerics
from tidali.model.checkpoint import ModelCard, save_checkpoint
from tidali.model.predict import load_model
from tidali.report.insight import inspect_checkpoint
from tidali.training.evaluation import EvalOptions, evaluate_checkpoint, evaluate_served

H100 = DeviceInfo(type="cuda", name="H100", capability=(9, 0))
A100 = DeviceInfo(type="cuda", name="A100", capability=(8, 0))
T4 = DeviceInfo(type="cuda", name="T4", capability=(7, 5))
P100 = DeviceInfo(type="cuda", name="P100", capability=(6, 0))
BARE_A100 = DeviceInfo(type="cuda", name="A100 without a compiler", capability=(8, 0))
NO_COMPILER = "no C compiler on PATH"


def find_fault(info: DeviceInfo) -> Callable[[str], str | None]:
    """What `choose_compile` is told of the machine of a described device."""
    return lambda device_type: NO_COMPILER if info in (BARE_A100, SAPPHIRE) else None


OLD_CPU = DeviceInfo(type="cpu", name="AVX2", cpu_flags=frozenset({"avx2", "avx512f"}))
ZEN4 = DeviceInfo(type="cpu", name="Zen 4", cpu_flags=frozenset({"avx2", "avx512_bf16"}))
SAPPHIRE = DeviceInfo(type="cpu", name="Sapphire Rapids", cpu_flags=frozenset({"amx_bf16", "avx512_bf16"}))


@pytest.mark.parametrize(
    ("info", "dtype", "compiled"),
    [
        (H100, torch.bfloat16, True),
        (A100, torch.bfloat16, True),
        (T4, torch.float16, True),
        (P100, None, False),
        (BARE_A100, torch.bfloat16, False),
        (OLD_CPU, None, False),
        (ZEN4, torch.bfloat16, False),
        (SAPPHIRE, torch.bfloat16, False),
    ],
    ids=lambda value: value.name if isinstance(value, DeviceInfo) else "",
)
def test_auto(info: DeviceInfo, dtype: torch.dtype | None, compiled: bool) -> None:
    chosen, amp_reason = choose_amp(info, "auto")
    assert (chosen, choose_compile(info, "auto", find_fault(info))[0]) == (dtype, compiled)
    assert amp_reason
    assert choose_compile(info, "auto", find_fault(info))[1]


@pytest.mark.parametrize("info", [H100, P100, OLD_CPU], ids=lambda info: info.name)
def test_an_explicit_choice_is_kept_and_is_the_reason(info: DeviceInfo) -> None:
    assert choose_amp(info, "off") == (None, "--amp off")
    assert choose_amp(info, "bf16") == (torch.bfloat16, "--amp bf16")
    assert choose_amp(info, "fp16") == (torch.float16, "--amp fp16")
    assert choose_compile(info, "off", find_fault(info)) == (False, "--compile off")


@pytest.mark.parametrize("info", [H100, T4, OLD_CPU], ids=lambda info: info.name)
def test_compilation_is_on_where_it_is_asked_for(info: DeviceInfo) -> None:
    assert choose_compile(info, "on", find_fault(info)) == (True, "--compile on")


@pytest.mark.parametrize(
    ("info", "cause"),
    [(P100, "compute capability 7.0, P100 has 6.0"), (BARE_A100, "no C compiler on PATH"), (SAPPHIRE, "no C compiler on PATH")],
    ids=lambda value: value.name if isinstance(value, DeviceInfo) else "",
)
def test_compilation_that_cannot_work_is_refused(info: DeviceInfo, cause: str) -> None:
    assert choose_compile(info, "off", find_fault(info)) == (False, "--compile off")
    for choice in ("on", *CUDA_GRAPHS):
        with pytest.raises(TidaliError, match=f"--compile {choice}: .*{cause}.*--compile off"):
            choose_compile(info, choice, find_fault(info))
    if info.type == "cuda":
        assert cause in choose_compile(info, "auto", find_fault(info))[1]


@pytest.fixture
def headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in which Python's headers are looked for; nothing else of a GPU's machine is missing."""
    for variable in ("CC", "CXX", "CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("TRITON_LIBCUDA_PATH", str(tmp_path))
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    if shutil.which("gcc") is None or shutil.which("g++") is None:
        pytest.skip("no C compiler")
    return tmp_path


@pytest.mark.parametrize("info", [A100, OLD_CPU], ids=lambda info: info.name)
def test_python_h_is_looked_for_where_it_is_included_from(info: DeviceInfo, headers: Path) -> None:
    """By a compiler, as torch.compile's back ends do: a Debian without python3-dev has gcc and no Python.h."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    fault = device.compile_fault(info.type)
    assert fault is not None
    assert all(fact in fault for fact in ("Python.h", str(headers), f"{version}-dev", f"{version}-devel"))
    with pytest.raises(TidaliError, match=r"--compile on: .*Python\.h.*--compile off"):
        choose_compile(info, "on")
    if info.type == "cuda":
        compiles, reason = choose_compile(info, "auto")
        assert not compiles
        assert fault in reason
    (headers / "Python.h").write_text("#include <no_such_header.h>\n")
    assert "no_such_header.h" in (device.compile_fault(info.type) or "")  # gcc without libc6-dev has no stdio.h
    (headers / "Python.h").write_text("int one;\n")
    assert device.compile_fault(info.type) is None
    assert choose_compile(info, "on") == (True, "--compile on")


def test_a_missing_compiler_and_libcuda_are_named(headers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (headers / "Python.h").touch()
    monkeypatch.setenv("CC", str(headers / "none"))
    assert "CC" in (device.compile_fault("cuda") or "")
    monkeypatch.delenv("CC")
    monkeypatch.delenv("TRITON_LIBCUDA_PATH")
    if not torch.cuda.is_available():
        assert "libcuda.so.1" in (device.compile_fault("cuda") or "")
    (headers / "libcuda.so.1").touch()
    monkeypatch.setenv("LD_LIBRARY_PATH", f"/none:{headers}")
    assert device.compile_fault("cuda") is None
    monkeypatch.setenv("PATH", str(headers))
    assert "install gcc" in (device.compile_fault("cuda") or "")
    assert "install g++" in (device.compile_fault("cpu") or "")


@pytest.mark.parametrize(
    ("info", "amp", "dtype_name", "needs_scaler", "autocasts"),
    [(T4, "auto", "float16", True, True), (A100, "auto", "bfloat16", False, True), (P100, "auto", "float32", False, False)],
    ids=lambda value: value.name if isinstance(value, DeviceInfo) else "",
)
def test_plan_of_a_gpu(monkeypatch, info: DeviceInfo, amp: str, dtype_name: str, needs_scaler: bool, autocasts: bool) -> None:
    monkeypatch.setattr(device, "describe_device", lambda choice: info)
    monkeypatch.setattr(device, "compile_fault", find_fault(info))
    monkeypatch.setenv("LOCAL_RANK", "3")
    plan = plan_device("auto", amp, "auto")
    assert (plan.device, plan.name) == (torch.device("cuda", 3), info.name)
    assert (plan.dtype_name, plan.needs_scaler, plan.amp_dtype is not None) == (dtype_name, needs_scaler, autocasts)


def test_autocast_is_in_the_planned_dtype() -> None:
    with plan_device("cpu", "bf16", "auto").autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.bfloat16
    with plan_device("cpu", "off", "auto").autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.float32


def test_cuda_without_a_gpu_says_so_in_one_line(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(
        TidaliError, match=r"--device cuda: no usable NVIDIA GPU or driver was found; use --device cpu"
    ) as refused:
        describe_device("cuda")
    assert "\n" not in str(refused.value)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(TidaliError, match=r"--device cuda: this torch is built without CUDA"):
        describe_device("cuda")
    assert describe_device("auto").type == describe_device("cpu").type == "cpu"


def test_more_ranks_than_gpus_are_refused(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UsageError, match="local rank 2, and 2 GPUs are visible; give it --nproc-per-node 2"):
        describe_device("auto")


@pytest.fixture
def torchs_numerics() -> Iterator[None]:
    """torch's own switches; afterwards they are as they were before."""
    cudnn, deterministic = torch.backends.cudnn, torch.are_deterministic_algorithms_enabled()
    before = cudnn.allow_tf32, cudnn.benchmark
    cudnn.allow_tf32, cudnn.benchmark = True, False
    yield
    cudnn.allow_tf32, cudnn.benchmark = before
    torch.use_deterministic_algorithms(deterministic)


def test_numerics_are_those_of_training_and_determinism_is_kept(torchs_numerics: None, monkeypatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    set_numerics()
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark) == (False, True)
    for deterministic in (True, False):
        set_numerics(deterministic)
        set_numerics()
        assert torch.backends.cudnn.benchmark is not deterministic
        assert torch.are_deterministic_algorithms_enabled() is deterministic


@pytest.mark.parametrize("command", ["evaluate", "evaluate served", "report", "predict"])
def test_a_checkpoint_runs_with_the_numerics_of_training_and_leaves_the_programs(
    torchs_numerics: None, command: str, demo_data: Path, tmp_path: Path
) -> None:
    dataset = open_dataset(demo_data)
    mean, std, classes = dataset.manifest.mean, dataset.manifest.std, dataset.manifest.classes
    card = ModelCard(classes=classes, stem="imagenet", stem_bias=False, res=32, mean=mean, std=std)
    path = str(tmp_path / "x.safetensors")
    save_checkpoint(tmp_path / "x.safetensors", card.build_model(), card)
    seen = set()

    def record(*_: object) -> None:
        seen.add((torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark))

    handle = nn.modules.module.register_module_forward_hook(record)
    if command == "evaluate":
        evaluate_checkpoint(path, dataset, device="cpu")
    elif command == "evaluate served":
        evaluate_served(path, dataset, device="cpu")
    elif command == "report":
        inspect_checkpoint(path, dataset, EvalOptions(device="cpu"))
    else:
        load_model(path, device="cpu").predict(np.zeros((32, 32, 3), np.uint8))
    handle.remove()
    assert seen == {(False, True)}
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark) == (True, False)


@pytest.mark.parametrize("before", [True, False])
def test_numerics_are_restored(torchs_numerics: None, monkeypatch, before: bool) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(before, warn_only=before)
    for deterministic in (None, True, False):
        with contextlib.suppress(KeyError), numerics(deterministic):
            assert torch.are_deterministic_algorithms_enabled() is (before if deterministic is None else deterministic)
            assert not torch.backends.cudnn.allow_tf32
            raise KeyError
        assert torch.are_deterministic_algorithms_enabled() is before
        assert torch.is_deterministic_algorithms_warn_only_enabled() is before
        assert (torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark) == (True, False)


def test_this_cpu_is_described() -> None:
    info = describe_device("cpu")
    assert (info.type, info.capability) == ("cpu", None)
    assert info.name
    assert plan_device("cpu", "off", "auto").device == torch.device("cpu")


def test_a_machine_without_proc_is_a_cpu_without_flags(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(device, "Path", lambda path: tmp_path / "none")
    assert device._cpu_name_and_flags() == ("CPU", frozenset())
