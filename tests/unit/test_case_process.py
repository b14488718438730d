"""A case's process: its answers, its failures, and that it is suspended, workers included, while others are measured."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.case_process import CaseProcess
from bench.case_worker import Job
from bench.measure import CaseFailed
from tidali.hardware.cpu_threads import WAITING

FAKE = """
import os, sys, time

class Fake:
    device = None
    cycle_steps = 1
    first_step_s = 0.5

    def __init__(self, job):
        print("noise on standard output", flush=True)
        os.system("echo and from a child")
        self.worker = os.fork()
        if not self.worker:
            while True:
                time.sleep(0.01)

    def step(self):
        time.sleep(0.2)
        return 10

    def check(self, batches):
        if batches == 0:
            time.sleep(1000)
        if batches == 1:
            raise ValueError("a reason\\nand more of it")
        if batches == 2:
            print("the last words", file=sys.stderr)
            os._exit(3)
        waits = {name: value for name, value in os.environ.items() if name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
        threads = os.environ.get("OMP_NUM_THREADS")
        return {"worker": self.worker, "batches": batches, "waits": waits, "threads": threads}


def fake(job):
    return Fake(job)


def broken(job):
    raise OSError("no such library")
"""


@pytest.fixture
def job(monkeypatch, tmp_path: Path) -> Job:
    (tmp_path / "fake_case.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    return Job(target="fake_case:fake", package="torch", scratch=str(tmp_path / "scratch"), res=8, batch_size=10, classes=2)


@pytest.fixture
def process(job: Job) -> Iterator[CaseProcess]:
    process = CaseProcess(Path(sys.executable), job)
    yield process
    process.stop()


def state_of(pid: int) -> str:
    """A letter of proc(5): R and S run, T is stopped; '' is gone, as is Z, dead and not yet collected."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
    return "" if letter == "Z" else letter


def becomes(pid: int, states: str) -> bool:
    """Signals arrive when the kernel delivers them: look for up to ten seconds."""
    for _ in range(1000):
        if state_of(pid) in list(states) or state_of(pid) == states:
            return True
        time.sleep(0.01)
    return False


def test_it_answers_and_is_suspended_in_between(process: CaseProcess) -> None:
    assert process.version  # the package's
    facts: dict[str, Any] = process.check(None)
    assert facts["batches"] is None
    assert facts["worker"] > 0
    assert becomes(facts["worker"], "T")
    assert process.check(7)["batches"] == 7  # awake again
    assert becomes(facts["worker"], "T")
    process.stop()
    assert becomes(facts["worker"], "")


@pytest.mark.parametrize(("package", "waits"), [("torch", {}), ("tidali", WAITING)])
def test_threads_wait_as_the_package_has_them(job: Job, monkeypatch, package: str, waits) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    with CaseProcess(Path(sys.executable), replace(job, package=package)) as process:
        assert process.check(None)["waits"] == waits


@pytest.mark.parametrize("threads", [None, 3])
def test_the_number_of_threads_is_the_jobs(job: Job, monkeypatch, threads: int | None) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    with CaseProcess(Path(sys.executable), replace(job, threads=threads)) as process:
        assert process.check(None)["threads"] == str(threads or 5)


def test_it_measures_itself(process: CaseProcess) -> None:
    rates = process.measure(0.5)
    assert rates.first_step_s == 0.5
    assert 5 < rates.median <= 51  # ten images in two tenths of a second, and never faster than it sleeps


def test_a_failure_is_its_first_line(process: CaseProcess) -> None:
    with pytest.raises(CaseFailed, match=r"^ValueError: a reason$"):
        process.check(1)
    with pytest.raises(CaseFailed, match=r"^its process ended with exit code 0"):  # and that was its end
        process.check(3)


def test_a_process_that_ends_is_reported_with_its_last_line(process: CaseProcess) -> None:
    worker = process.check(None)["worker"]
    with pytest.raises(CaseFailed, match=r"^its process ended with exit code 3: the last words$"):
        process.check(2)
    process.stop()
    assert becomes(worker, "")


PARENT = """
import sys
from pathlib import Path
from bench.case_process import CaseProcess
from bench.case_worker import Job
process = CaseProcess(Path(sys.executable), Job.from_json(sys.argv[1]))
print(process._process.pid, process.check(None)["worker"], flush=True)
if sys.argv[2] == "busy":
    process.check(0)
sys.stdin.read()
"""


@pytest.mark.parametrize("doing", ["suspended", "busy"])
def test_nothing_outlives_a_killed_parent(job: Job, doing: str) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, job.to_json(), doing],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with parent:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 2
        if doing == "suspended":
            assert becomes(pids[0], "T")
        parent.kill()
        assert all(becomes(pid, "") for pid in pids)


def test_a_process_that_does_not_start(job: Job) -> None:
    for target, reason in (
        ("fake_case:broken", "OSError: no such library"),
        ("fake_case:missing", "AttributeError: module 'fake_case' has no attribute 'missing'"),
        ("no_such_module:any", "ModuleNotFoundError: No module named 'no_such_module'"),
    ):
        with pytest.raises(CaseFailed) as caught:
            CaseProcess(Path(sys.executable), replace(job, target=target))
        assert str(caught.value) == reason
