"""The versions of the software that a result was made with."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from tidali import __version__

_DALI_PACKAGES = ("nvidia-dali-cuda120", "nvidia-dali-cuda130")
"""One library, built for CUDA 12 and for CUDA 13."""


def versions() -> dict[str, str]:
    """Versions by package name, of the packages that decide a result."""
    found = {"tidali": __version__, "python": platform.python_version()}
    for package in ("torch", "torchvision", dali_package(), "numpy"):
        found[package] = installed_version(package) or "not installed"
    return found


def dali_package() -> str:
    """The package that DALI was installed by; the one that tidali depends on if there is none."""
    return next((package for package in _DALI_PACKAGES if installed_version(package)), _DALI_PACKAGES[0])


def installed_version(package: str) -> str | None:
    """None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
