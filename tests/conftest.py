"""What several test modules share: which tests are slow, small data sets made here, and the command run in this process."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import io
import os
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, NamedTuple
from unittest import mock

import pytest
from hypothesis import settings

from tidali.hardware.cpu_threads import wait_briefly

wait_briefly()  # before anything imports torch
# pytest-xdist's workers divide the cores between them, and so do the processes that their tests start.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // workers, 1)))

settings.register_profile("tidali", deadline=None)  # no test asserts a time, so neither does hypothesis
settings.load_profile("tidali")

SLOW = (
    "wheel",
    "cli/test_bench.py",
    "cli/test_doctor.py",
    "cli/test_kills.py",
    "cli/test_manners.py",
    "packing/test_adopt.py",
    "packing/test_commands.py",
    "packing/test_download.py",
    "packing/test_fuzz_images.py",
    "packing/test_limited_copy.py",
    "packing/test_odd_images.py",
    "packing/test_resume.py",
    "packing/test_tar_source.py",
    "unit/test_bench_parts.py",
    "unit/test_cache.py",
    "unit/test_cache_on_cuda.py",
    "unit/test_case_process.py",
    "unit/test_checks.py",
    "unit/test_corrupt.py",
    "unit/test_coverage.py",
    "unit/test_data.py",
    "unit/test_figures.py",
    "unit/test_finetuning.py",
    "unit/test_insight.py",
    "unit/test_launches.py",
    "unit/test_models.py",
    "unit/test_old_formats.py",
    "unit/test_own_network.py",
    "unit/test_peers.py",
    "unit/test_photographs.py",
    "unit/test_pretrained.py",
    "unit/test_resume.py",
    "unit/test_samples.py",
    "unit/test_stream.py",
    "unit/test_weight_files.py",
)
"""Folders and files below this one whose tests are all slow, or many: together the others take less than a minute."""
SLOW_FIXTURES = {"trained", "s3"}
"""A whole training run, and an S3 server."""
EXPENSIVE_FIXTURES = {"site", "trained", "undisturbed", "wheel"}
"""One process runs all tests that use one of these, so that it is made once. pytest-xdist begins with the largest groups."""


@pytest.hookimpl(tryfirst=True)  # before ``-m`` chooses
def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Mark as slow what SLOW and SLOW_FIXTURES name, and every test that starts another Python, which imports torch anew."""
    slow = {Path(__file__).parent / name for name in SLOW}
    for item in items:
        if (
            not slow.isdisjoint((item.path, *item.path.parents))
            or not SLOW_FIXTURES.isdisjoint(item.fixturenames)
            or _starts_python(item.function, set())
        ):
            item.add_marker(pytest.mark.slow)
        for name in sorted(EXPENSIVE_FIXTURES & set(item.fixturenames)):
            item.add_marker(pytest.mark.xdist_group(name))


def _starts_python(function: Callable[..., Any], seen: set[CodeType]) -> bool:
    """Whether it refers to `sys.executable`, itself or by a function or list of its module."""
    function = inspect.unwrap(function)
    if function.__code__ in seen:
        return False
    seen.add(function.__code__)
    names = _names(function.__code__)
    if "executable" in names:
        return True
    values = [function.__globals__[name] for name in names if name in function.__globals__]
    return any(isinstance(value, list) and sys.executable in value for value in values) or any(
        _starts_python(value, seen)
        for value in values
        if isinstance(value, FunctionType) and value.__module__ == function.__module__
    )


def _names(code: CodeType) -> set[str]:
    """The globals and attributes that a function refers to, and those that functions inside it do."""
    return set(code.co_names).union(*(_names(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--slow-limit", type=float, metavar="SECONDS", help="fail where a test not marked slow takes more processor time"
    )


def pytest_configure(config: pytest.Config) -> None:
    limit_s = config.getoption("--slow-limit")
    if limit_s is not None:
        config.pluginmanager.register(UnmarkedSlowTests(limit_s))


class UnmarkedSlowTests:
    """Fails the run where a test without the mark ``slow`` took too long.

    Measured in processor time of this process and of those that it started and waited for, because on a shared machine the
    wall clock measures the neighbours too. Setup counts, and the first test of a process that uses a session's fixture or
    torch pays for it, so the limit must be generous.
    """

    STARTED_S = pytest.StashKey[float]()

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self.found: dict[str, float] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        item.stash[self.STARTED_S] = self._processor_s()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
        report = yield
        if call.when == "teardown":  # xdist sends user_properties from its workers to the process that counts
            report.user_properties.append(("processor_s", self._processor_s() - item.stash[self.STARTED_S]))
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        taken_s = dict(report.user_properties).get("processor_s")
        if taken_s is not None and taken_s > self.limit_s and "slow" not in report.keywords:
            self.found[report.nodeid] = taken_s

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.found and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for nodeid, taken_s in sorted(self.found.items(), key=lambda one: -one[1]):
            terminalreporter.write_line(f"{nodeid}: {taken_s:.1f} s of processor time; mark it with pytest.mark.slow", red=True)

    @staticmethod
    def _processor_s() -> float:
        taken = os.times()
        return taken.user + taken.system + taken.children_user + taken.children_system


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


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For torch, which adds up in another order on more. A process with OMP_NUM_THREADS=1 then computes the same to the bit."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


@pytest.fixture(scope="session")
def serious_findings() -> Callable[[Path, list[Path]], list[str]]:
    """``serious_findings(folder, pages)``: what axe-core finds in the pages below the folder, in both themes, a line each."""
    path = Path(__file__).parent / "docs" / "accessibility.py"
    spec = importlib.util.spec_from_file_location("accessibility", path)
    assert spec is not None
    assert spec.loader is not None
    accessibility = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(accessibility)
    if reason := accessibility.missing():
        pytest.skip(reason)

    def look(folder: Path, pages: list[Path]) -> list[str]:
        found = [one for dark in (False, True) for one in accessibility.findings(folder, pages, dark=dark)]
        return accessibility.serious(found)

    return look


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
