"""How much memory processes take; that of the cache of decoded pixels, by a fresh process that fills it and takes batches.

`cache_memory` starts that process with ``python -m bench.memory``, which prints one JSON object.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from bench.document import PACKAGES
from bench.measure import CaseFailed
from tidali.errors import TidaliError
from tidali.hardware.timing import Stopwatch

BATCHES = 40
_POLL_S = 0.02


def cache_memory(root: Path, *, res: int, batch_size: int) -> dict[str, Any]:
    """Memory of one process that reads batches of the train split from the cache, without a model.

    Returns:
        ``pixels_mib``, size of the cached images; ``idle_rss_mib``, resident memory after the imports; ``peak_rss_mib``, the
        highest resident memory; ``times_pixels``, the difference of these two as a multiple of the pixels.
    """
    arguments = json.dumps({"root": str(root.resolve()), "res": res, "batch_size": batch_size})
    command = [sys.executable, "-m", "bench.memory", arguments]
    done = subprocess.run(command, cwd=PACKAGES, capture_output=True, text=True, check=False)
    if done.returncode:
        raise TidaliError(f"bench loader: the memory measurement failed: {' '.join(done.stderr.strip().splitlines()[-1:])}")
    found = json.loads(done.stdout.splitlines()[-1])
    return {"res": res, **found, "times_pixels": (found["peak_rss_mib"] - found["idle_rss_mib"]) / found["pixels_mib"]}


def memory_mib(field: str, process: int | str = "self") -> float:
    """A field of ``/proc/PROCESS/status``: VmRSS, the resident memory, or VmHWM, the highest it has been.

    Raises:
        OSError, KeyError: the process has ended.
    """
    status = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return int(status[field].split()[0]) / 1024


class Usage(NamedTuple):
    """Of a command that has ended."""

    seconds: float
    peak_rss_mib: float
    """The highest resident memory of any of its processes."""
    printed: str


def run_measured(command: Sequence[str]) -> Usage:
    """Run a command, start-up included.

    Raises:
        CaseFailed: it ended with an exit code other than 0.
    """
    peak_mib = 0.0
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        watch = Stopwatch()
        process = subprocess.Popen(command, cwd=PACKAGES, stdout=output, stderr=errors)
        while process.poll() is None:
            peak_mib = max(peak_mib, _peak_rss_mib(process.pid))
            time.sleep(_POLL_S)
        seconds = watch.elapsed_s()
        for file in (output, errors):
            file.seek(0)
        if process.returncode:
            last_line = errors.read().decode(errors="replace").strip().splitlines()[-1:]
            raise CaseFailed(f"ended with exit code {process.returncode}: {' '.join(last_line)}")
        return Usage(seconds, peak_mib, output.read().decode())


def _peak_rss_mib(pid: int) -> float:
    """The highest peak memory (VmHWM) among a process and all its descendants."""
    peak, children = 0.0, list[str]()
    with suppress(OSError, KeyError):  # it has ended
        peak = memory_mib("VmHWM", pid)
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return max([peak, *(_peak_rss_mib(int(child)) for child in children)])


def _measure(root: str, res: int, batch_size: int) -> dict[str, float]:
    import torch

    import tidali.loading.dali  # noqa: F401  DALI's libraries are among the imports
    from bench.routes import batch_settings
    from tidali.dataset.contract import open_dataset
    from tidali.hardware.cpu_memory import keep_freed_memory
    from tidali.loading.data import Data

    idle_rss_mib = memory_mib("VmRSS")
    dataset = open_dataset(Path(root))
    batches = Data(dataset, torch.device("cpu"), cache="device").batches("train", **batch_settings(dataset, res, batch_size))
    keep_freed_memory()  # as `tidali train` does
    iterator = iter(batches)
    for _ in range(min(BATCHES, len(batches))):
        batch = next(iterator)
        del batch  # as the training loop does
    return {
        "pixels_mib": batches.route.pixel_bytes / 2**20,
        "idle_rss_mib": idle_rss_mib,
        "peak_rss_mib": memory_mib("VmHWM"),
    }


if __name__ == "__main__":
    print(json.dumps(_measure(**json.loads(sys.argv[1]))))
