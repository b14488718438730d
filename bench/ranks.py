"""How a loader's throughput scales with the ranks of a distributed run: a process per rank, each with its share of the cores
and of the samples."""

from __future__ import annotations

import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Barrier, BrokenBarrierError
from typing import Any

import torch

from bench import measure
from bench.case_process import CaseProcess
from bench.case_worker import Job
from bench.measure import Case, CaseFailed, Rates
from bench.routes import CACHED, batch_settings, counting
from tidali.dataset.contract import open_dataset
from tidali.errors import TidaliError
from tidali.hardware.device import cpu_count
from tidali.hardware.ranks import Ranks
from tidali.loading.batches import Batches
from tidali.loading.data import Data


@dataclass(frozen=True, kw_only=True)
class RankJob(Job):
    """One rank's loader. The batch size is the rank's own."""

    root: str
    route: str
    rank: int
    world_size: int


class RankGroup:
    """All ranks of one loader, measured at the same time.

    Their processes run only while they are measured: with the cached route each keeps the whole split decoded.
    """

    def __init__(self, root: Path, route: str, world_size: int, *, res: int, batch_size: int) -> None:
        """
        Args:
            batch_size: of all ranks together.
        """
        self._settings: dict[str, Any] = dict(
            target="bench.ranks:rank_loader",
            package="tidali",
            classes=0,
            res=res,
            batch_size=max(batch_size // world_size, 1),
            root=str(root.resolve()),
            route=route,
            world_size=world_size,
            threads=max(cpu_count() // world_size, 1),
        )

    def measure(self) -> Rates:
        """Images/s of all ranks together.

        Raises:
            TidaliError: a rank failed.
        """
        world_size = self._settings["world_size"]
        barrier = Barrier(world_size)

        def run(job: RankJob) -> float:
            try:
                with CaseProcess(Path(sys.executable), job) as process:
                    barrier.wait()
                    images_per_s = process.measure(measure.MIN_SECONDS).median
                    barrier.wait()  # ending a process takes the cores' time, too
                    return images_per_s
            except BrokenBarrierError:  # another rank failed, and raises
                return 0.0
            except CaseFailed as error:
                barrier.abort()
                raise TidaliError(f"bench loader: a rank failed: {error}") from None

        with tempfile.TemporaryDirectory(prefix="tidali-ranks-") as scratch, ThreadPoolExecutor(world_size) as pool:
            jobs = [RankJob(rank=rank, scratch=f"{scratch}/{rank}", **self._settings) for rank in range(world_size)]
            return Rates(per_s=(sum(pool.map(run, jobs)),))


def rank_loader(job: RankJob) -> Case:
    dataset = open_dataset(Path(job.root))
    ranks = Ranks(rank=job.rank, world_size=job.world_size)
    data = Data(dataset, torch.device("cpu"), cache="device" if job.route == CACHED else "off", ranks=ranks)
    settings = batch_settings(dataset, job.res, job.batch_size)
    if job.route == CACHED:
        return Case(step=counting(data.batches("train", **settings)))
    source = data.streamed("train", settings["preprocess"], job.batch_size, num_threads=job.threads)
    return Case(step=counting(Batches(source, **settings, ranks=ranks)))
