"""How a loader's rate grows with the ranks of a distributed run: as many processes, each with its share of cores and samples.

This file is both sides: `rank_rates` here, and ``python -m bench.ranks`` there, which says ``ready`` and then answers each line
of its standard input, the name of a route, with a line: the images/s that it measured.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

from bench.fingerprint import PACKAGES
from bench.measure import Case, Rates, measure
from tidali.errors import TidaliError
from tidali.hardware.device import cpu_count

_TIMEOUT_S = 60


def rank_rates(
    root: Path,
    *,
    routes: Sequence[str],
    ranks: Sequence[int],
    res: int,
    batch_size: int,
    repeats: int,
    on_done: Callable[[str], None] | None = None,
) -> dict[tuple[str, int], Rates]:
    """Images/s of all ranks together, the ranks of one number at the same time and the numbers in turn.

    Every rank keeps the whole split decoded, so the ranks of one number are ended before those of the next are started.

    Args:
        batch_size: of all ranks together.

    Raises:
        TidaliError: a rank failed.
    """
    found: dict[tuple[str, int], list[float]] = {(route, world): [] for route in routes for world in ranks}
    for _ in range(repeats):
        for world in ranks:
            with ExitStack() as ends:
                group = [ends.enter_context(_Rank(root, rank, world, res, batch_size)) for rank in range(world)]
                for one in group:
                    one.answer()  # that it is ready
                for route in routes:
                    for one in group:
                        one.ask(route)
                    found[route, world].append(sum(float(one.answer()) for one in group))
                    if on_done is not None:
                        on_done(f"{route}, {world} ranks")
    return {key: Rates(per_s=tuple(values)) for key, values in found.items()}


class _Rank:
    """One process, for as long as it is entered."""

    def __init__(self, root: Path, rank: int, world: int, res: int, batch_size: int) -> None:
        threads = max(cpu_count() // world, 1)
        job: dict[str, Any] = {"root": str(root.resolve()), "rank": rank, "world": world, "res": res, "threads": threads}
        job["batch_size"] = max(batch_size // world, 1)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.ranks", json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=PACKAGES,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )

    def __enter__(self) -> _Rank:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._process.communicate(timeout=_TIMEOUT_S)  # the end of its input ends it
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()

    def ask(self, route: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{route}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._fail()

    def answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._fail()
        return line

    def _fail(self) -> NoReturn:
        _, errors = self._process.communicate()
        raise TidaliError(f"bench loader: a rank failed: {' '.join(errors.strip().splitlines()[-1:])}")


def _serve(root: str, rank: int, world: int, res: int, batch_size: int, threads: int) -> None:
    import torch

    from bench.routes import CACHED, STREAMING, batch_settings, counting
    from tidali.dataset.contract import open_dataset
    from tidali.loading.data import Data
    from tidali.loading.stream import StreamBatches

    dataset = open_dataset(Path(root))
    share: dict[str, Any] = {**batch_settings(dataset, res, batch_size), "rank": rank, "world_size": world}
    flips = share.pop("augment")
    cache = Data(dataset, ("train",), torch.device("cpu"), cache="device", max_res=res)
    steps = {
        STREAMING: counting(StreamBatches(cache.dataset, "train", flip=True, num_threads=threads, **share)),
        CACHED: counting(cache.batches("train", augment=flips, **share)),
    }
    print("ready", flush=True)
    for line in sys.stdin:
        case = Case(name=line.strip(), step=steps[line.strip()])
        print(measure([case], repeats=1)[case.name].median, flush=True)


if __name__ == "__main__":
    _serve(**json.loads(sys.argv[1]))
