"""One short training run that the command-line tests look at."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def trained(tidali: Callable[..., Any], demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The folder of a run of two epochs at 32 px, and how the command ended."""
    out = tmp_path_factory.mktemp("runs") / "x"
    ended = tidali(
        "train", "--data", demo_data, "--res", 32, "--epochs", 2, "--batch-size", 32, "--device", "cpu", "--out", out
    )
    assert ended.code == 0, ended.stderr
    return out, ended
