"""The parent's side of a case that runs in its own process: start it, send it requests, suspend it while others are
measured."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

from bench.case_worker import Job
from bench.document import PACKAGES
from bench.measure import CaseFailed, Rates
from tidali.hardware.cpu_threads import WAITING
from tidali.hardware.timing import Stopwatch

MIN_SECONDS = 3.0
"""Shortest duration of a measurement. There are few repeats, and for a case that is limited by memory one second differs from
the next by a fifth."""
START_TIMEOUT_S = 3600.0
"""Long: the case may have to convert the data set to its own format first."""
ANSWER_TIMEOUT_S = 1200.0
_STOP_TIMEOUT_S = 10.0
_MAIN = "import sys; sys.path.insert(0, {root!r}) if {root!r} not in sys.path else None; \
from bench.case_worker import Job, serve; serve(Job.from_json(sys.argv[1]))"


class CaseProcess:
    """A case in its own process.

    Between requests the process and its workers are suspended by SIGSTOP: what they prefetch would take the cores from the case
    that is being measured. If the parent is killed, the kernel wakes the suspended process group and sends it SIGHUP.
    """

    def __init__(self, python: Path, job: Job) -> None:
        """Start it and wait until it is ready. Its messages go to a file beside its scratch folder, SCRATCH.log.

        Raises:
            CaseFailed: it did not start.
        """
        scratch, self._log = Path(job.scratch), Path(f"{job.scratch}.log")
        scratch.mkdir(parents=True, exist_ok=True)
        with self._log.open("wb") as messages:
            self._process = subprocess.Popen(
                [str(python), "-c", _MAIN.format(root=str(PACKAGES)), job.to_json()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=messages,
                cwd=scratch,
                env=_environment(job),
            )
        self._unread = b""
        try:
            self.version: str = self._answer(START_TIMEOUT_S)["version"]
        except BaseException:
            self.stop()
            raise
        self._signal(signal.SIGSTOP)

    def check(self, batches: int | None) -> dict[str, Any]:
        """What the case reports of its own batches: `bench.case_worker.Subject.check`.

        Raises:
            CaseFailed: it failed.
        """
        return self._request({"do": "check", "batches": batches})

    def crops(self, count: int) -> dict[str, Any]:
        """Where a loader's crops of the check set come from: `bench.case_worker.Stream.crops`.

        Raises:
            CaseFailed: it failed.
        """
        return self._request({"do": "crops", "count": count})

    def measure(self, min_seconds: float | None = None) -> Rates:
        """One measurement, by the clock of that process.

        Args:
            min_seconds: None: `MIN_SECONDS`.

        Raises:
            CaseFailed: it failed.
        """
        answer = self._request({"do": "measure", "min_seconds": MIN_SECONDS if min_seconds is None else min_seconds})
        return Rates(**{**answer, "per_s": tuple(answer["per_s"])})

    def profile(self, path: Path) -> list[str]:
        """Write a trace to the path, and return the lines of `bench.profile.profile_step`.

        Raises:
            CaseFailed: it failed, or the trace cannot be written.
        """
        lines: list[str] = self._request({"do": "profile", "path": str(path.absolute())})["lines"]
        return lines

    def __enter__(self) -> CaseProcess:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End it and its workers: by closing its input, so that it cleans up its shared memory; if that does not do, by
        SIGKILL."""
        self._signal(signal.SIGCONT)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(OSError, subprocess.TimeoutExpired):
            self._process.stdin.close()
            self._process.wait(_STOP_TIMEOUT_S)
        self._signal(signal.SIGKILL)
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()

    def _request(self, request: dict[str, Any]) -> dict[str, Any]:
        self._signal(signal.SIGCONT)
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise CaseFailed(self._why_it_ended()) from None
        answer = self._answer(ANSWER_TIMEOUT_S)
        self._signal(signal.SIGSTOP)
        return answer

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        watch = Stopwatch()
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                if watch.peek_s() > timeout_s:
                    raise CaseFailed(f"no answer in {timeout_s:.0f} s")
                # Its workers keep the pipe open too, so the process can end before the pipe does.
                if selector.select(timeout=1.0):
                    read = os.read(self._process.stdout.fileno(), 1 << 16)
                    if not read:
                        raise CaseFailed(self._why_it_ended())
                    self._unread += read
                elif self._process.poll() is not None:
                    raise CaseFailed(self._why_it_ended())
        line, _, self._unread = self._unread.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise CaseFailed(answer["error"])
        return answer

    def _why_it_ended(self) -> str:
        code = self._process.wait()
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return f"its process {how}" + (f": {lines[-1]}" if lines else "")

    def _signal(self, number: signal.Signals) -> None:
        """Send a signal to the process and its workers."""
        with suppress(ProcessLookupError, PermissionError):  # it has ended, or is not yet in its own process group
            os.killpg(self._process.pid, number)


def _environment(job: Job) -> dict[str, str]:
    """The variables that a user of that package would have: the ``tidali`` command sets how threads wait for each other
    (`WAITING`) for its own process only."""
    environment = {name: value for name, value in os.environ.items() if name not in WAITING}
    environment |= WAITING if job.package == "tidali" else {}
    environment |= {"OMP_NUM_THREADS": str(job.threads)} if job.threads is not None else {}
    return {**environment, "TMPDIR": job.scratch}
