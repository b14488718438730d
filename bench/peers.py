"""tidali beside what people use today: loaders, and whole training loops, on the same images, taking turns.

Every case, tidali's too, runs in a process of its own (`bench.peer_process`), with the peer's packages in an environment of its
own where they could clash (`bench.peer_env`). Before a case is measured, what it gives is checked (`bench.peer_check`). A case
that cannot be had, or gives something else, is a row with its reason.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import TaskID

from bench.measure import Rates
from bench.peer_check import CHECK_SAMPLES, wrong_loader, wrong_training
from bench.peer_env import ENVIRONMENTS, PeerMissing, python_of
from bench.peer_process import PeerFailed, PeerProcess
from bench.peer_worker import Job
from bench.report import environment
from tidali.console import progress_bar, say
from tidali.contract import Dataset, iter_records
from tidali.device import cpu_count, plan_device
from tidali.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A case."""

    id: str
    """On the command line."""
    name: str
    """In the table."""
    target: str
    package: str
    """The distribution whose version is recorded."""
    env: str | None = None
    """Of `bench.peer_env.ENVIRONMENTS`; None: tidali's own Python has it."""
    loose: int = 0
    """Samples that an epoch may take from the next one: a shuffle buffer that is not emptied in between."""
    hint: str = ""
    """The way out where it does not start."""
    base: str | None = None
    """Id of the case that this one's rate is given as a multiple of; None: torchvision's of the table."""


def _loader(id: str, name: str, package: str, **more: Any) -> Peer:
    return Peer(id=id, name=name, package=package, target=f"bench.peer_loaders:{id.replace('-', '_')}", **more)


def _training(loop: str, name: str, package: str, **more: Any) -> list[Peer]:
    return [
        Peer(
            id=f"{loop}-{part}",
            name=f"{name}, {words}",
            package=package,
            target=f"bench.peer_training:{loop}_{part}",
            base=f"torchvision-{part}",
            **more,
        )
        for part, words in (("step", "step"), ("loop", "end to end"))
    ]


LOADERS = (
    _loader("torchvision-v1", "torchvision v1", "torchvision"),
    _loader("torchvision-v2", "torchvision v2", "torchvision"),
    _loader("webdataset", "webdataset", "webdataset"),
    _loader("dali-file", "DALI file reader", "nvidia-dali-cuda120"),
    _loader("dali-webdataset", "DALI webdataset reader", "nvidia-dali-cuda120", loose=1024),  # its buffer's default
    _loader("ffcv-raw", "FFCV raw", "ffcv", env="ffcv"),
    _loader("ffcv-jpg", "FFCV jpg", "ffcv", env="ffcv"),
    _loader("litdata", "LitData", "litdata", env="litdata"),
    _loader("mosaic", "MosaicML Streaming", "mosaicml-streaming", env="mosaic"),
    _loader("spdl", "SPDL", "spdl", env="spdl", hint="it needs FFmpeg's libraries, 4 or later: apt-get install ffmpeg"),
    _loader("tidali-streaming", "tidali streaming", "tidali"),
    _loader("tidali-cached", "tidali cached", "tidali"),
    _loader("tidali-cached-bf16", "tidali cached, bf16", "tidali"),
)
TRAINING = (
    *_training("study", "original study", "torch"),
    *_training("torchvision", "torchvision reference", "torchvision"),
    *_training("timm", "timm", "timm", env="timm"),
    *_training("tidali", "tidali", "tidali"),
)
REFERENCE = _loader("reference", "the reference", "torchvision")
"""What the loaders are checked by."""


def chosen(table: Sequence[Peer], names: Sequence[str] | None) -> tuple[Peer, ...]:
    """The peers of these ids, or of these families: ``ffcv`` is ffcv-raw and ffcv-jpg. None: all. In the table's order.

    Raises:
        UsageError: a name that is neither.
    """
    if names is None:
        return tuple(table)
    wanted = set()
    for name in names:
        found = {peer.id for peer in table if peer.id == name or peer.id.startswith(f"{name}-")}
        if not found:
            raise UsageError(f"--peers {name}: choose from {', '.join(peer.id for peer in table)}")
        wanted |= found
    return tuple(peer for peer in table if peer.id in wanted)


def bench_peers(
    dataset: Dataset, *, resolutions: Sequence[int], batch_size: int, repeats: int, peers: Sequence[str] | None
) -> dict[str, Any]:
    """Measure loaders on the CPU, and return the JSON document. Every one shuffles, mirrors at random and normalises.

    Args:
        peers: ids or families of `LOADERS`; None: all.

    Raises:
        UsageError: no such peer, or a batch larger than the train split.
        TidaliError, DatasetError: the data cannot be used.
    """
    cases = chosen(LOADERS, peers)
    counts = list(dataset.labelled_split("train").class_counts)

    def make_check(run: _Run) -> Callable[[Peer, Job, Callable[[int | None], dict[str, Any]]], str | None]:
        first = min(resolutions)  # the labels do not depend on the resolution: there, every loader gives a whole epoch
        with run.started(REFERENCE, run.job(REFERENCE, first)) as process:
            reference = process.check(None)
        if reference["counts"] != counts:
            raise UsageError(f"{dataset.root}: its files give other labels than its manifest; run 'tidali verify'")

        def check(peer: Peer, job: Job, ask: Callable[[int | None], dict[str, Any]]) -> str | None:
            whole = job.res == first
            facts = ask(None if whole else -(-CHECK_SAMPLES // job.batch_size))
            return wrong_loader(facts, reference, job, whole=whole, loose=peer.loose)

        return check

    return _bench(dataset, cases, "cpu", resolutions=resolutions, batch_size=batch_size, repeats=repeats, make_check=make_check)


def bench_training_peers(
    dataset: Dataset, *, resolutions: Sequence[int], batch_size: int, repeats: int, peers: Sequence[str] | None
) -> dict[str, Any]:
    """Measure training loops, on a GPU where there is one, and return the JSON document in the form of `bench_peers`.

    Each twice: its optimizer step on one batch in memory, and end to end, fed by its own loader.

    Args:
        peers: ids or families of `TRAINING`; None: all.

    Raises:
        UsageError: no such peer, or a batch larger than the train split.
        TidaliError, DatasetError: the data cannot be used.
    """
    cases = chosen(TRAINING, peers)

    def make_check(run: _Run) -> Callable[[Peer, Job, Callable[[int | None], dict[str, Any]]], str | None]:
        return lambda peer, job, ask: wrong_training(ask(None), job)

    document = _bench(
        dataset, cases, "auto", resolutions=resolutions, batch_size=batch_size, repeats=repeats, make_check=make_check
    )
    return {**document, "benchmark": "training peers"}


# ------------------------------------------------------------------------------------------------------------------- the run


class _Run:
    """What all cases of one run share: the images as files, and the scratch folder."""

    def __init__(self, dataset: Dataset, scratch: Path, batch_size: int) -> None:
        self._dataset, self._scratch, self._batch_size = dataset, scratch, batch_size
        self._folder = extract(dataset, scratch / "train")

    def job(self, peer: Peer, res: int) -> Job:
        manifest, split = self._dataset.manifest, self._dataset.split("train")
        return Job(
            target=peer.target,
            package=peer.package,
            root=str(self._dataset.root.resolve()),
            folder=str(self._folder),
            scratch=str(self._scratch / peer.id),
            res=res,
            batch_size=self._batch_size,
            mean=tuple(manifest.mean),
            std=tuple(manifest.std),
            classes=len(manifest.classes),
            samples=split.samples,
            as_stored=set(split.image_sizes) == {f"{res}x{res}"},
            cores=cpu_count(),
        )

    def start(self, peer: Peer, job: Job) -> PeerProcess:
        """
        Raises:
            PeerMissing, PeerFailed: it cannot be had, or does not start.
        """
        python = python_of(peer.env) if peer.env is not None else Path(sys.executable)
        try:
            return PeerProcess(python, job, self._scratch / f"{peer.id}.log")
        except PeerFailed as error:
            hint = peer.hint or (ENVIRONMENTS[peer.env].hint if peer.env is not None else "")
            raise PeerFailed(f"{error}; {hint}" if hint else str(error)) from None

    @contextmanager
    def started(self, peer: Peer, job: Job) -> Iterator[PeerProcess]:
        process = self.start(peer, job)
        try:
            yield process
        finally:
            process.stop()


Check = Callable[[Peer, Job, Callable[[int | None], dict[str, Any]]], str | None]


def _bench(
    dataset: Dataset,
    cases: Sequence[Peer],
    device: Any,
    *,
    resolutions: Sequence[int],
    batch_size: int,
    repeats: int,
    make_check: Callable[[_Run], Check],
) -> dict[str, Any]:
    samples = dataset.labelled_split("train").samples
    if batch_size > samples:
        raise UsageError(f"--batch-size {batch_size}: the train split has {samples} samples; measure with at most that many")
    rows: list[dict[str, Any]] = []
    versions: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="tidali-peers-", ignore_cleanup_errors=True) as name:
        run = _Run(dataset, Path(name), batch_size)
        check = make_check(run)
        for res in resolutions:
            rows += _measure(run, cases, res, repeats, check, versions)
    return {
        "benchmark": "peers",
        **environment(plan_device(device, "off" if device == "cpu" else "auto", "off" if device == "cpu" else "auto")),
        "data": {"name": dataset.root.name, "train_samples": samples},
        "batch_size": batch_size,
        "repeats": repeats,
        "peer_versions": versions,
        "rows": rows,
    }


def _measure(
    run: _Run, cases: Sequence[Peer], res: int, repeats: int, check: Check, versions: dict[str, str]
) -> list[dict[str, Any]]:
    """One resolution's rows: every case started and checked, then all measured in turn."""
    running: dict[str, PeerProcess] = {}
    failed: dict[str, str] = {}
    rates: dict[str, list[float]] = {peer.id: [] for peer in cases}

    def fail(peer: Peer, reason: str) -> None:
        failed[peer.id] = reason
        say(f"{res} px: {peer.name}: not run: {reason}")
        if peer.id in running:
            running.pop(peer.id).stop()

    try:
        with progress_bar() as bar:
            task: TaskID = bar.add_task(f"peers at {res}", total=len(cases) * (1 + repeats), note="")
            for peer in cases:
                bar.update(task, note=f"starting {peer.name}")
                try:
                    job = run.job(peer, res)
                    process = running[peer.id] = run.start(peer, job)
                    versions[peer.package] = process.version
                    reason = check(peer, job, process.check)
                except (PeerMissing, PeerFailed) as error:
                    reason = str(error)
                if reason is not None:
                    fail(peer, reason)
                bar.update(task, advance=1)
            for _ in range(repeats):
                for peer in cases:
                    bar.update(task, note=peer.name)
                    if peer.id in running:
                        try:
                            rates[peer.id].append(running[peer.id].measure())
                        except PeerFailed as error:
                            fail(peer, str(error))
                    bar.update(task, advance=1)
    finally:
        for process in running.values():
            process.stop()
    return _rows(cases, res, rates, failed)


def _rows(
    cases: Sequence[Peer], res: int, rates: Mapping[str, Sequence[float]], failed: Mapping[str, str]
) -> list[dict[str, Any]]:
    """One a case: its rate, as a multiple of torchvision's too where that was measured, or why there is none."""
    medians = {id: statistics.median(values) for id, values in rates.items() if id not in failed}
    rows = []
    for peer in cases:
        row: dict[str, Any] = {"res": res, "case": peer.name}
        if peer.id in failed:
            rows.append({**row, "not_run": failed[peer.id]})
            continue
        row["images_per_s"] = Rates(per_s=tuple(rates[peer.id])).to_dict()
        base = medians.get(peer.base or "torchvision-v1")
        if base is not None:
            row["times_torchvision"] = medians[peer.id] / base
        rows.append(row)
    return rows


def extract(dataset: Dataset, folder: Path) -> Path:
    """The train split as files, LABEL/KEY.jpg, for the loaders that take files. The label has leading zeros: those that number
    the folders in their order give it back."""
    folders = [folder / f"{label:0{dataset.manifest.label_digits}d}" for label in range(len(dataset.manifest.classes))]
    for of_class in folders:
        of_class.mkdir(parents=True)
    for shard, record in iter_records(dataset, "train"):
        assert record.label is not None
        with (dataset.root / shard.name).open("rb") as tar:
            tar.seek(record.offset)
            (folders[record.label] / f"{record.key}.{record.extension}").write_bytes(tar.read(record.size_bytes))
    return folder
