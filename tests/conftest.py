"""What several test modules share: small data sets made here, and the command run in this process."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
from hypothesis import settings

from tidali.hardware.cpu_threads import wait_briefly

wait_briefly()  # before anything imports torch

settings.register_profile("tidali", deadline=None)  # no test asserts a time, so neither does hypothesis
settings.load_profile("tidali")


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed data set: 4 classes, 160 train and 32 val images of 64 x 64. Read only; `demo_copy` may be damaged."""
    from shards.demo import pack_demo

    folder = tmp_path_factory.mktemp("packed") / "demo"
    pack_demo(folder, classes=4, per_class=40, workers=1)
    return folder


@pytest.fixture
def demo_copy(demo_data: Path, tmp_path: Path) -> Path:
    """A copy of `demo_data` to damage."""
    import shutil

    return Path(shutil.copytree(demo_data, tmp_path / "copy"))


@pytest.fixture(scope="session")
def write_photos() -> Callable[..., Path]:
    """``write_photos(root, {"train/cat": 3}, size=(64, 48))`` writes smooth JPEGs, each of its own content, and gives the root.

    Smooth, because two right bicubic filters differ on noise by what they do at the clamped ends of the scale.
    """
    import numpy as np
    from PIL import Image

    def write(root: Path, folders: dict[str, int], *, size: tuple[int, int] = (64, 64), quality: int = 95) -> Path:
        width, height = size
        y, x = np.mgrid[0:height, 0:width] / 64
        serial = 0
        for folder, count in folders.items():
            (root / folder).mkdir(parents=True)
            for number in range(count):
                serial += 1
                phase = np.array([0.0, 2.1, 4.2]) + 0.37 * serial
                waves = np.sin(2.0 * x[..., None] + 1.3 * y[..., None] + phase) * np.cos(1.7 * y[..., None] - 0.5 * phase)
                pixels = (128 + 90 * waves).astype(np.uint8)
                Image.fromarray(pixels).save(root / folder / f"{number:03d}.jpg", quality=quality)
        return root

    return write


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    stdout: str
    stderr: str


@pytest.fixture(scope="session")
def tidali() -> Callable[..., Ended]:
    """``tidali("eval", path, "--json")`` runs the command in this process; what it raises besides an exit reaches the test."""
    from tidali.cli import main as cli

    def run(*argv: object) -> Ended:
        out, err = io.StringIO(), io.StringIO()
        with (
            mock.patch.object(sys, "argv", ["tidali", *map(str, argv)]),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as ended,
        ):
            cli.main()
        code = ended.value.code
        return Ended(code if isinstance(code, int) else int(bool(code)), out.getvalue(), err.getvalue())

    return run
