"""The parent's side of a case's process: start it, ask it, hold it still while others are measured."""

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
from bench.fingerprint import PACKAGES
from bench.measure import Rates
from tidali.hardware.cpu_threads import WAITING
from tidali.hardware.timing import Stopwatch

MIN_SECONDS = 3.0
"""Of a measurement. There are few repeats, and one second of a case that memory holds back differs by a fifth from the next."""
START_TIMEOUT_S = 3600.0
"""A data set is converted to the peer's own format first."""
ANSWER_TIMEOUT_S = 1200.0
_STOP_TIMEOUT_S = 10.0
_MAIN = "import sys; sys.path.insert(0, {root!r}) if {root!r} not in sys.path else None; \
from bench.case_worker import Job, serve; serve(Job.from_json(sys.argv[1]))"


class CaseFailed(Exception):
    """A case that cannot be measured, and why."""


class CaseProcess:
    """A case in its own process.

    Between questions the process and its workers are stopped by a signal: what they would prepare ahead would take the cores
    from the case whose turn it is. Should the parent be killed, the kernel wakes the stopped group and hangs it up.
    """

    def __init__(self, python: Path, job: Job, log: Path) -> None:
        """Start it and wait until it has its first batches in reach.

        Raises:
            CaseFailed: it did not come up.
        """
        self._log = log
        scratch = Path(job.scratch)
        scratch.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as messages:
            self._process = subprocess.Popen(
                [str(python), "-c", _MAIN.format(root=str(PACKAGES)), job.to_json()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=messages,
                cwd=scratch,
                env=_environment(job),
            )
        self._rest = b""
        try:
            self.version: str = self._answer(START_TIMEOUT_S)["version"]
        except BaseException:
            self.stop()
            raise
        self._signal(signal.SIGSTOP)

    def check(self, batches: int | None) -> dict[str, Any]:
        """
        Raises:
            CaseFailed: it failed meanwhile.
        """
        return self._ask({"do": "check", "batches": batches})

    def measure(self) -> Rates:
        """One measurement, by its own clock.

        Raises:
            CaseFailed: it failed meanwhile.
        """
        answer = self._ask({"do": "measure", "min_seconds": MIN_SECONDS})
        return Rates(**{**answer, "per_s": tuple(answer["per_s"])})

    def profile(self, path: Path) -> list[str]:
        """The lines of `bench.profile.profile_step`, which writes a trace.

        Raises:
            CaseFailed: it failed meanwhile, or the trace cannot be written.
        """
        lines: list[str] = self._ask({"do": "profile", "path": str(path.absolute())})["lines"]
        return lines

    def __enter__(self) -> CaseProcess:
        return self

    def __exit__(self, *how: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End it and its workers: politely, so that it cleans up its shared memory, then not."""
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

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        self._signal(signal.SIGCONT)
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
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
            while b"\n" not in self._rest:
                if watch.peek_s() > timeout_s:
                    raise CaseFailed(f"no answer in {timeout_s:.0f} s")
                # Its workers hold the pipe open too, so the end of the process need not be the end of the pipe.
                if selector.select(timeout=1.0):
                    read = os.read(self._process.stdout.fileno(), 1 << 16)
                    if not read:
                        raise CaseFailed(self._why_it_ended())
                    self._rest += read
                elif self._process.poll() is not None:
                    raise CaseFailed(self._why_it_ended())
        line, _, self._rest = self._rest.partition(b"\n")
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
        """To the process and its workers."""
        with suppress(ProcessLookupError, PermissionError):  # it ended, or did not come as far as its own group
            os.killpg(self._process.pid, number)


def _environment(job: Job) -> dict[str, str]:
    """A user's of that package: how threads wait for each other is set by the ``tidali`` command for its own process alone."""
    environment = {name: value for name, value in os.environ.items() if name not in WAITING}
    return {**environment, **(WAITING if job.package == "tidali" else {}), "TMPDIR": job.scratch}
