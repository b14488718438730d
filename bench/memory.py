"""What cached pixels cost in memory: a fresh process that fills the cache and takes batches from it, beside an idle one.

This file is both sides: `cache_memory` here, and ``python -m bench.memory`` there, which prints one JSON object.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.fingerprint import PACKAGES
from tidali.errors import TidaliError

BATCHES = 40


def cache_memory(root: Path, *, res: int, batch_size: int) -> dict[str, Any]:
    """Memory of one process that trains from the cache of the train split, without a model.

    Returns:
        ``pixels_mib``, what the cached images take; ``idle_rss_mib``, what the process held after its imports;
        ``peak_rss_mib``, the most it ever held; ``times_pixels``, the difference of those two as a multiple of the pixels.
    """
    arguments = json.dumps({"root": str(root.resolve()), "res": res, "batch_size": batch_size})
    command = [sys.executable, "-m", "bench.memory", arguments]
    done = subprocess.run(command, cwd=PACKAGES, capture_output=True, text=True, check=False)
    if done.returncode:
        raise TidaliError(f"bench loader: the memory measurement failed: {' '.join(done.stderr.strip().splitlines()[-1:])}")
    found = json.loads(done.stdout.splitlines()[-1])
    return {"res": res, **found, "times_pixels": (found["peak_rss_mib"] - found["idle_rss_mib"]) / found["pixels_mib"]}


def memory_mib(field: str) -> float:
    """A field of this process's ``/proc/self/status``: VmRSS, what it holds, or VmHWM, the most it ever held."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) / 1024


def _measure(root: str, res: int, batch_size: int) -> dict[str, float]:
    import torch

    import tidali.loading.stream  # noqa: F401  DALI's libraries are imports too
    from tidali.dataset.contract import open_dataset
    from tidali.loading.augment import Augment
    from tidali.loading.data import Data

    idle_rss_mib = memory_mib("VmRSS")
    dataset = open_dataset(Path(root))
    data = Data(dataset, ("train",), torch.device("cpu"), cache="device", max_res=res)
    mean, std = dataset.manifest.mean, dataset.manifest.std
    batches = data.batches(
        "train", res=res, batch_size=batch_size, mean=mean, std=std, train=True, augment=Augment(flip="random")
    )
    iterator = iter(batches)
    for _ in range(min(BATCHES, len(batches))):
        batch = next(iterator)
        del batch  # as the training loop does
    return {
        "pixels_mib": data.route.pixel_bytes / 2**20,
        "idle_rss_mib": idle_rss_mib,
        "peak_rss_mib": memory_mib("VmHWM"),
    }


if __name__ == "__main__":
    print(json.dumps(_measure(**json.loads(sys.argv[1]))))
