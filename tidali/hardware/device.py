"""The device, precision and compilation of a run, chosen from a description of the device so that tests need no GPU."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from tidali.config import AmpChoice, CompileChoice, DeviceChoice
from tidali.errors import TidaliError, UsageError


@dataclass(frozen=True, kw_only=True)
class DeviceInfo:
    """A device, described by what the decisions depend on."""

    type: str
    """``cpu`` or ``cuda``."""
    name: str
    capability: tuple[int, int] | None = None
    """CUDA compute capability; None on a CPU."""
    cpu_flags: frozenset[str] = frozenset()
    has_compiler: bool = False
    """A C compiler is on the path: Triton's launchers and Inductor's CPU code need one."""


@dataclass(frozen=True, kw_only=True)
class DevicePlan:
    """The device, precision and compilation of a run, each decision with its reason."""

    device: torch.device
    name: str
    amp_dtype: torch.dtype | None
    """None: float32."""
    amp_reason: str
    compile: bool
    compile_reason: str
    compile_mode: Literal["default", "max-autotune"] = "default"

    @property
    def needs_scaler(self) -> bool:
        """float16's range underflows gradients; bfloat16 has float32's range."""
        return self.amp_dtype is torch.float16

    @property
    def dtype_name(self) -> str:
        return str(self.amp_dtype or torch.float32).removeprefix("torch.")

    def describe(self) -> dict[str, Any]:
        """The device and precision as summary.json and study.json state them."""
        return {"type": self.device.type, "name": self.name, "cores": cpu_count(), "dtype": self.dtype_name}

    def autocast(self) -> AbstractContextManager[None]:
        """The autocast context that every forward pass, of training and evaluation, runs under."""
        return torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None)


def choose_amp(info: DeviceInfo, choice: AmpChoice) -> tuple[torch.dtype | None, str]:
    """bf16 where the device has fast bf16 arithmetic, fp16 on older GPUs, float32 otherwise; and the reason."""
    if choice == "off":
        return None, "--amp off"
    if choice != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16}[choice], f"--amp {choice}"
    if info.type == "cuda":
        assert info.capability is not None
        if info.capability >= (8, 0):
            return torch.bfloat16, f"bf16 tensor cores (compute capability {info.capability[0]}.{info.capability[1]})"
        if info.capability >= (7, 0):
            return torch.float16, "fp16 tensor cores, no bf16 before compute capability 8.0"
        return None, "no tensor cores before compute capability 7.0"
    fast = info.cpu_flags & {"avx512_bf16", "amx_bf16"}
    if fast:
        return torch.bfloat16, f"this CPU has {min(fast)}"
    return None, "this CPU has neither avx512_bf16 nor amx_bf16, bf16 would be emulated"


def choose_compile(info: DeviceInfo, choice: CompileChoice) -> tuple[bool, str]:
    """Whether to compile, and the reason. Not on a CPU: Inductor uses oneDNN's convolutions too, and was slower than eager
    mode.

    Raises:
        TidaliError: compilation was asked for and cannot work here.
    """
    if choice == "off":
        return False, "--compile off"
    reason: str | None = None  # why torch.compile cannot work, if it cannot
    if info.capability is not None and info.capability < (7, 0):
        major, minor = info.capability
        reason = f"Triton needs a GPU of compute capability 7.0, {info.name} has {major}.{minor}"
    elif not info.has_compiler:
        user = "Triton" if info.type == "cuda" else "Inductor"
        reason = f"no C compiler on PATH, which {user} needs; install gcc to gain its speed"
    if choice != "auto":
        if reason is not None:
            raise TidaliError(f"--compile {choice}: {reason}; or use --compile off")
        return True, f"--compile {choice}"
    if info.type != "cuda":
        return False, "eager is faster on a CPU (57 against 47 img/s at 224 px, measured on two cores)"
    return (False, reason) if reason is not None else (True, "pays on CUDA")


def describe_device(choice: DeviceChoice) -> DeviceInfo:
    """Describe the device that a run will use.

    Raises:
        TidaliError: ``cuda`` was asked for and is not available.
        UsageError: torchrun started more ranks than there are GPUs.
    """
    has_compiler = any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang"))
    if choice == "cuda" and not torch.cuda.is_available():
        cause = "this torch is built without CUDA" if torch.version.cuda is None else "no usable NVIDIA GPU or driver was found"
        raise TidaliError(f"--device cuda: {cause}; use --device cpu, or 'auto' to take a GPU only where there is one")
    if choice != "cpu" and torch.cuda.is_available():
        index, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if index >= count:
            raise UsageError(
                f"torchrun started local rank {index}, and {count} GPUs are visible; "
                f"give it --nproc-per-node {count}, or use --device cpu"
            )
        return DeviceInfo(
            type="cuda",
            name=torch.cuda.get_device_name(index),
            capability=torch.cuda.get_device_capability(index),
            has_compiler=has_compiler,
        )
    name, flags = _cpu_name_and_flags()
    return DeviceInfo(type="cpu", name=name, cpu_flags=flags, has_compiler=has_compiler)


def plan_device(device: DeviceChoice, amp: AmpChoice, compile: CompileChoice) -> DevicePlan:
    """Choose the device, and precision and compilation for it.

    Raises:
        TidaliError: ``cuda`` or compilation was asked for and is not available.
        UsageError: torchrun started more ranks than there are GPUs.
    """
    info = describe_device(device)
    amp_dtype, amp_reason = choose_amp(info, amp)
    compiled, compile_reason = choose_compile(info, compile)
    index = int(os.environ.get("LOCAL_RANK", "0")) if info.type == "cuda" else None
    return DevicePlan(
        device=torch.device(info.type, index) if index is not None else torch.device("cpu"),
        name=info.name,
        amp_dtype=amp_dtype,
        amp_reason=amp_reason,
        compile=compiled,
        compile_reason=compile_reason,
        compile_mode="max-autotune" if compile == "max-autotune" else "default",
    )


def set_numerics(deterministic: bool | None = None) -> None:
    """Set torch's process-wide switches to the same values wherever a network runs, so that its results are the same too.

    float32 products keep full precision unless autocast is on. That is torch's default for matrix products; in convolutions
    cuDNN would use TF32 by default.

    Args:
        deterministic: whether to use deterministic algorithms alone; None leaves that switch as it is.
    """
    if deterministic:
        # Without it cuBLAS refuses to run: torch's notes on reproducibility.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if deterministic is not None:
        torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()


@contextmanager
def numerics(deterministic: bool | None = None) -> Iterator[None]:
    """`set_numerics` for as long as this is entered, or for each call of the function that it decorates."""
    cudnn = torch.backends.cudnn
    allow_tf32, benchmark = cudnn.allow_tf32, cudnn.benchmark
    before, warn_only = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    set_numerics(deterministic)
    try:
        yield
    finally:
        cudnn.allow_tf32, cudnn.benchmark = allow_tf32, benchmark
        if deterministic is not None:
            torch.use_deterministic_algorithms(before, warn_only=warn_only)


def cpu_count() -> int:
    """Cores that this process may use, which is fewer than the machine's under taskset or a container."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ranks_on_machine() -> int:
    """Ranks that torchrun started on this machine, which share its memory and cores; 1 without it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def rank_threads() -> int:
    """Cores for each rank on this machine, at least 1."""
    return max(cpu_count() // ranks_on_machine(), 1)


def _cpu_name_and_flags() -> tuple[str, frozenset[str]]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "CPU", frozenset()
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    return fields.get("model name", "CPU"), frozenset(fields.get("flags", "").split())
