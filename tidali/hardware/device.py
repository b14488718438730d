"""The device, precision and compilation of a run, chosen from a description of the device so that tests need no GPU."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tidali.config import CUDA_GRAPHS, AmpChoice, CompileChoice, DeviceChoice
from tidali.errors import TidaliError, UsageError
from tidali.hardware.limits import cpu_count

_COMPILER_TIMEOUT_S = 30
# torch 2.9 warns of ``allow_tf32``, but its own compiler reads that still, and raises an error where the new setting was used.
warnings.filterwarnings("ignore", message="Please use the new API settings to control TF32", category=UserWarning)
# Its compiler's advice, which `set_numerics` refuses.
warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores", category=UserWarning)


@dataclass(frozen=True, kw_only=True)
class DeviceInfo:
    """A device, described by what the decisions depend on."""

    type: str
    """``cpu`` or ``cuda``."""
    name: str
    capability: tuple[int, int] | None = None
    """CUDA compute capability; None on a CPU."""
    cpu_flags: frozenset[str] = frozenset()


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
    compile_mode: str = "default"
    """As `torch.compile` takes it."""

    @property
    def needs_scaler(self) -> bool:
        """float16's range underflows gradients; bfloat16 has float32's range."""
        return self.amp_dtype is torch.float16

    @property
    def images_dtype(self) -> torch.dtype:
        """Of the images that loaders make: on CUDA what the network's first layer would cast them to, so that they are resized
        on tensor cores and take half of the memory. float32 on a CPU, where casting costs nothing that was measured."""
        return self.amp_dtype if self.amp_dtype is not None and self.device.type == "cuda" else torch.float32

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


def choose_compile(
    info: DeviceInfo, choice: CompileChoice, find_fault: Callable[[str], str | None] | None = None
) -> tuple[bool, str]:
    """Whether to compile, and the reason. Not on a CPU: Inductor uses oneDNN's convolutions too, and was slower than eager
    mode.

    Args:
        find_fault: `compile_fault` by default.

    Raises:
        TidaliError: compilation was asked for and cannot work here.
    """
    if choice == "off":
        return False, "--compile off"
    if choice == "auto" and info.type != "cuda":
        return False, "eager is faster on a CPU (measured on another machine, of two cores, at 224 px: 57 against 47 images/s)"
    reason: str | None = None  # why torch.compile cannot work, if it cannot
    if info.capability is not None and info.capability < (7, 0):
        major, minor = info.capability
        reason = f"Triton needs a GPU of compute capability 7.0, {info.name} has {major}.{minor}"
    else:
        reason = (find_fault or compile_fault)(info.type)
    if choice != "auto":
        if reason is not None:
            raise TidaliError(f"--compile {choice}: {reason}; or use --compile off")
        return True, f"--compile {choice}"
    return (False, f"eager, as {reason}") if reason is not None else (True, "pays on CUDA")


def describe_device(choice: DeviceChoice) -> DeviceInfo:
    """Describe the device that a run will use.

    Raises:
        TidaliError: ``cuda`` was asked for and is not available.
        UsageError: torchrun started more ranks than there are GPUs.
    """
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
        )
    name, flags = _cpu_name_and_flags()
    return DeviceInfo(type="cpu", name=name, cpu_flags=flags)


def compile_fault(device_type: str) -> str | None:
    """Why torch.compile cannot make code for this type of device here, and how to fix it; None if it can.

    Both of its back ends compile a file that includes Python.h: Triton its launchers, in C, and Inductor a CPU's code, in C++.
    The same is tried here, with the compiler and the folder of headers that they take (triton/runtime/build.py of Triton 3.8,
    torch/_inductor/cpp_builder.py of torch 2.14), so a compiler without its own headers is found too.
    """
    on_gpu = device_type == "cuda"
    user, variable, language, names = (
        ("Triton", "CC", "c", ("gcc", "clang")) if on_gpu else ("Inductor", "CXX", "c++", ("g++",))
    )
    if on_gpu and importlib.util.find_spec("triton") is None:
        return "Triton is not installed; install torch's Linux build"
    compiler = os.environ.get(variable) or next((name for name in names if shutil.which(name)), None)
    if compiler is None:
        return f"no {language.upper()} compiler on PATH, which {user} needs; install {names[0]}"
    scheme = sysconfig.get_default_scheme()
    # Debian's own Python installs under /usr/local by default, and has its headers under /usr: Triton does the same.
    include = sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"]
    command = [compiler, "-x", language, "-fsyntax-only", f"-I{include}", "-"]
    try:
        done = subprocess.run(
            command, input="#include <Python.h>\n", capture_output=True, text=True, timeout=_COMPILER_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{compiler} cannot be run, which {user} needs ({type(error).__name__}); set {variable} to a working compiler"
    if done.returncode and not (Path(include) / "Python.h").is_file():
        python = f"python{sys.version_info.major}.{sys.version_info.minor}"
        return (
            f"Python.h is not in {include}, which {user} needs; install Python's headers: the package {python}-dev on Debian "
            f"and Ubuntu, {python}-devel on Fedora and Red Hat"
        )
    if done.returncode:
        said = next((line.strip() for line in done.stderr.splitlines() if "error" in line), f"exit code {done.returncode}")
        return f"{compiler} cannot compile Python.h, which {user} needs ({said}); install the C library's headers"
    return _libcuda_fault() if on_gpu else None


def _libcuda_fault() -> str | None:
    """Triton links with libcuda.so.1 where ``ldconfig -p`` or LD_LIBRARY_PATH names it (triton/backends/nvidia/driver.py of
    Triton 3.8); torch loads it by its name alone, so torch may work where Triton does not."""
    if os.environ.get("TRITON_LIBCUDA_PATH"):
        return None
    try:
        known = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return "/sbin/ldconfig is missing, by which Triton finds libcuda.so.1; set TRITON_LIBCUDA_PATH to its folder"
    folders = os.environ.get("LD_LIBRARY_PATH", "").split(":")
    if "libcuda.so.1" in known or any((Path(folder) / "libcuda.so.1").exists() for folder in folders if folder):
        return None
    return "Triton does not find libcuda.so.1; run ldconfig as root, or set TRITON_LIBCUDA_PATH to its folder"


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
        compile_mode=compile if compile in CUDA_GRAPHS else "default",
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
