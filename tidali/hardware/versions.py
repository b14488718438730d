"""The versions of the software that a result was made with."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from tidali import __version__


def versions() -> dict[str, str]:
    """Versions by package name, of the packages that decide a result."""
    found = {"tidali": __version__, "python": platform.python_version()}
    for package in ("torch", "torchvision", "nvidia-dali-cuda120", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
