"""Which device, precision and compilation a run uses, decided from described facts so that it can be tested without a GPU."""

from __future__ import annotations

import os
import shutil
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from tidali.config import AmpChoice, CompileChoice, DeviceChoice
from tidali.errors import TidaliError, UsageError


@dataclass(frozen=True, kw_only=True)
class DeviceFacts:
    """What the decisions depend on."""

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
    """The decisions, each with its reason."""

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

    def autocast(self) -> AbstractContextManager[None]:
        """The autocast context that every forward pass, of training and evaluation, runs under."""
        return torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None)


def choose_amp(facts: DeviceFacts, wish: AmpChoice) -> tuple[torch.dtype | None, str]:
    """bf16 where the device multiplies it fast, fp16 on older GPUs, float32 otherwise."""
    if wish == "off":
        return None, "--amp off"
    if wish != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16}[wish], f"--amp {wish}"
    if facts.type == "cuda":
        assert facts.capability is not None
        if facts.capability >= (8, 0):
            return torch.bfloat16, f"bf16 tensor cores (compute capability {facts.capability[0]}.{facts.capability[1]})"
        if facts.capability >= (7, 0):
            return torch.float16, "fp16 tensor cores, no bf16 before compute capability 8.0"
        return None, "no tensor cores before compute capability 7.0"
    fast = facts.cpu_flags & {"avx512_bf16", "amx_bf16"}
    if fast:
        return torch.bfloat16, f"this CPU has {min(fast)}"
    return None, "this CPU has neither avx512_bf16 nor amx_bf16, bf16 would be emulated"


def choose_compile(facts: DeviceFacts, wish: CompileChoice) -> tuple[bool, str]:
    """On CUDA yes; on a CPU no: Inductor's convolutions are oneDNN's anyway, and it measured slower than eager there.

    Raises:
        TidaliError: it was asked for where it cannot be had.
    """
    if wish == "off":
        return False, "--compile off"
    obstacle = _why_not_compilable(facts)
    if wish != "auto":
        if obstacle is not None:
            raise TidaliError(f"--compile {wish}: {obstacle}; or use --compile off")
        return True, f"--compile {wish}"
    if facts.type != "cuda":
        return False, "eager is faster on a CPU (57 against 47 img/s at 224 px, measured on two cores)"
    return (False, obstacle) if obstacle is not None else (True, "pays on CUDA")


def _why_not_compilable(facts: DeviceFacts) -> str | None:
    """Why torch.compile cannot work, if it cannot."""
    if facts.capability is not None and facts.capability < (7, 0):
        major, minor = facts.capability
        return f"Triton needs a GPU of compute capability 7.0, {facts.name} has {major}.{minor}"
    if not facts.has_compiler:
        user = "Triton" if facts.type == "cuda" else "Inductor"
        return f"no C compiler on PATH, which {user} needs; install gcc to gain its speed"
    return None


def describe_device(wish: DeviceChoice) -> DeviceFacts:
    """The facts of the device that a run will use.

    Raises:
        TidaliError: ``cuda`` was asked for and cannot be had.
        UsageError: torchrun started more ranks than there are GPUs.
    """
    has_compiler = any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang"))
    if wish == "cuda" and not torch.cuda.is_available():
        cause = "this torch is built without CUDA" if torch.version.cuda is None else "no usable NVIDIA GPU or driver was found"
        raise TidaliError(f"--device cuda: {cause}; use --device cpu, or 'auto' to take a GPU only where there is one")
    if wish != "cpu" and torch.cuda.is_available():
        index, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if index >= count:
            raise UsageError(
                f"torchrun started local rank {index}, and {count} GPUs are visible; "
                f"give it --nproc-per-node {count}, or use --device cpu"
            )
        return DeviceFacts(
            type="cuda",
            name=torch.cuda.get_device_name(index),
            capability=torch.cuda.get_device_capability(index),
            has_compiler=has_compiler,
        )
    name, flags = _cpu_name_and_flags()
    return DeviceFacts(type="cpu", name=name, cpu_flags=flags, has_compiler=has_compiler)


def plan_device(device: DeviceChoice, amp: AmpChoice, compile: CompileChoice) -> DevicePlan:
    """Describe the device and decide precision and compilation for it.

    Raises:
        TidaliError: ``cuda`` was asked for, or compilation, and cannot be had.
        UsageError: torchrun started more ranks than there are GPUs.
    """
    facts = describe_device(device)
    amp_dtype, amp_reason = choose_amp(facts, amp)
    compiled, compile_reason = choose_compile(facts, compile)
    index = int(os.environ.get("LOCAL_RANK", "0")) if facts.type == "cuda" else None
    return DevicePlan(
        device=torch.device(facts.type, index) if index is not None else torch.device("cpu"),
        name=facts.name,
        amp_dtype=amp_dtype,
        amp_reason=amp_reason,
        compile=compiled,
        compile_reason=compile_reason,
        compile_mode="max-autotune" if compile == "max-autotune" else "default",
    )


def set_numerics(deterministic: bool | None = None) -> None:
    """Process-wide switches, the same wherever a network runs, so that a figure is the same wherever it is measured. float32
    products keep full precision unless autocast says otherwise (no TF32, torch's default for matrix products; cuDNN's own
    default would allow it in convolutions).

    Args:
        deterministic: None leaves it as it is.
    """
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        # Without it cuBLAS refuses to run: torch's notes on reproducibility.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)


def cpu_count() -> int:
    """Cores that this process may use, which is fewer than the machine's under taskset or a container."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ranks_on_machine() -> int:
    """Ranks that torchrun started on this machine, which share its memory and cores; 1 without it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def rank_threads() -> int:
    """Cores for each rank on this machine, at least one."""
    return max(cpu_count() // ranks_on_machine(), 1)


def _cpu_name_and_flags() -> tuple[str, frozenset[str]]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "CPU", frozenset()
    facts: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    return facts.get("model name", "CPU"), frozenset(facts.get("flags", "").split())
