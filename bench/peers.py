"""tidali beside what people use today: loaders, and whole training loops, on the same images, taking turns.

Every case, tidali's too, runs in a process of its own (`bench.case_process`), with the peer's packages in an environment of its
own where they could clash (`bench.peer_env`). Before a case is measured, what it gives is checked (`bench.peer_check`). A case
that cannot be had, or gives something else, is a row with its reason.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.progress import TaskID

from bench.case_process import CaseFailed, CaseProcess
from bench.case_worker import DataJob
from bench.ceilings import COPY, DECODE, binding, ceiling_cases, ceiling_rows, sample_jpegs
from bench.fingerprint import environment
from bench.measure import Case, Rates, measure
from bench.peer_check import CHECK_SAMPLES, wrong_loader, wrong_training
from bench.peer_env import ENVIRONMENTS, PeerMissing, Pythons
from bench.peer_table import LOADERS, REFERENCE, TRAINING, Peer, chosen
from bench.step import step_costs
from tidali.console import progress_bar, say
from tidali.dataset.contract import Dataset, iter_records, parse_image_size
from tidali.errors import UsageError
from tidali.hardware.device import DevicePlan, cpu_count, plan_device


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
    plan = plan_device("cpu", "off", "off")
    split = dataset.labelled_split("train")
    stored_bytes = sum(3 * math.prod(parse_image_size(size)) * count for size, count in split.image_sizes.items())
    counts = list(split.class_counts)

    def make_check(run: _Run) -> Callable[[Peer, DataJob, Callable[[int | None], dict[str, Any]]], str | None]:
        first = min(resolutions)  # the labels do not depend on the resolution: there, every loader gives a whole epoch
        with run.start(REFERENCE, run.job(REFERENCE, first)) as process:
            reference = process.check(None)
        if reference["counts"] != counts:
            raise UsageError(f"{dataset.root}: its files give other labels than its manifest; run 'tidali verify'")

        def check(peer: Peer, job: DataJob, ask: Callable[[int | None], dict[str, Any]]) -> str | None:
            whole = job.res == first
            facts = ask(None if whole else -(-CHECK_SAMPLES // job.batch_size))
            return wrong_loader(facts, reference, job, whole=whole, loose=peer.loose)

        return check

    def costs(peer: Peer, res: int) -> dict[str, float]:
        """The stored pixels are read and the batch's are written; of a copy, each byte is both."""
        moved = (stored_bytes / split.samples + 3 * res * res * peer.pixel_dtype.itemsize) / 2
        return {COPY: moved, **({DECODE: 1.0} if peer.decodes else {})}

    return _bench(
        dataset,
        cases,
        plan,
        ceiling_cases(plan, jpegs=sample_jpegs(dataset)),
        costs,
        resolutions=resolutions,
        batch_size=batch_size,
        repeats=repeats,
        make_check=make_check,
    )


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
    plan = plan_device("auto", "auto", "auto")

    def make_check(run: _Run) -> Callable[[Peer, DataJob, Callable[[int | None], dict[str, Any]]], str | None]:
        return lambda peer, job, ask: wrong_training(ask(None), job)

    document = _bench(
        dataset,
        cases,
        plan,
        ceiling_cases(plan),
        lambda peer, res: step_costs(peer.multiplies_in(plan), res=res, stem="imagenet"),
        resolutions=resolutions,
        batch_size=batch_size,
        repeats=repeats,
        make_check=make_check,
    )
    return {**document, "benchmark": "training peers"}


# ------------------------------------------------------------------------------------------------------------------- the run


class _Run:
    """What all cases of one run share: the images as files, and the scratch folder."""

    def __init__(self, dataset: Dataset, scratch: Path, batch_size: int) -> None:
        self._dataset, self._scratch, self._batch_size = dataset, scratch, batch_size
        self._pythons = Pythons()
        self._folder = extract(dataset, scratch / "train")

    def job(self, peer: Peer, res: int) -> DataJob:
        manifest, split = self._dataset.manifest, self._dataset.split("train")
        return DataJob(
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

    def start(self, peer: Peer, job: DataJob) -> CaseProcess:
        """
        Raises:
            PeerMissing, CaseFailed: it cannot be had, or does not start.
        """
        python = self._pythons.of(peer.env)
        try:
            return CaseProcess(python, job, self._scratch / f"{peer.id}.log")
        except CaseFailed as error:
            hint = peer.hint or (ENVIRONMENTS[peer.env].hint if peer.env is not None else "")
            raise CaseFailed(f"{error}; {hint}" if hint else str(error)) from None


Check = Callable[[Peer, DataJob, Callable[[int | None], dict[str, Any]]], str | None]
Costs = Callable[[Peer, int], Mapping[str, float]]
"""What an image of a case at a resolution takes of each ceiling, for `bench.ceilings.binding`."""


def _bench(
    dataset: Dataset,
    cases: Sequence[Peer],
    plan: DevicePlan,
    limits: Sequence[Case],
    costs: Costs,
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
    ceilings: list[dict[str, Any]] = []
    versions: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="tidali-peers-", ignore_cleanup_errors=True) as name:
        run = _Run(dataset, Path(name), batch_size)
        check = make_check(run)
        for res in resolutions:
            rates, failed = _measure(run, cases, limits, res, repeats, check, versions)
            rows += _rows(cases, res, rates, failed, costs)
            ceilings += ceiling_rows(rates, res=res)
    return {
        "benchmark": "peers",
        **environment(plan),
        "data": {"name": dataset.root.name, "train_samples": samples},
        "batch_size": batch_size,
        "repeats": repeats,
        "peer_versions": versions,
        "rows": rows,
        "ceilings": ceilings,
    }


def _measure(
    run: _Run,
    cases: Sequence[Peer],
    limits: Sequence[Case],
    res: int,
    repeats: int,
    check: Check,
    versions: dict[str, str],
) -> tuple[dict[str, Rates], dict[str, str]]:
    """One resolution: every case started and checked, then all measured in turn, and the ceilings with them.

    Returns:
        The rates by a case's id or a ceiling's name, and by id why a case did not run.
    """
    running: dict[str, CaseProcess] = {}
    failed: dict[str, str] = {}
    found: dict[str, list[Rates]] = {name: [] for name in [*(peer.id for peer in cases), *(limit.name for limit in limits)]}

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
                except (PeerMissing, CaseFailed) as error:
                    reason = str(error)
                if reason is not None:
                    fail(peer, reason)
                bar.update(task, advance=1)
            for _ in range(repeats):
                for peer in cases:
                    bar.update(task, note=peer.name)
                    if peer.id in running:
                        try:
                            found[peer.id].append(running[peer.id].measure())
                        except CaseFailed as error:
                            fail(peer, str(error))
                    bar.update(task, advance=1)
                for name, rates in measure(limits, repeats=1).items():
                    found[name].append(rates)
    finally:
        for process in running.values():
            process.stop()
    return {name: Rates.together(parts) for name, parts in found.items() if name not in failed}, failed


def _rows(
    cases: Sequence[Peer], res: int, rates: dict[str, Rates], failed: Mapping[str, str], costs: Costs
) -> list[dict[str, Any]]:
    """One a case: its rate, as a multiple of torchvision's too where that was measured, or why there is none."""
    rows = []
    for peer in cases:
        row: dict[str, Any] = {"res": res, "case": peer.name}
        if peer.id in failed:
            rows.append({**row, "not_run": failed[peer.id]})
            continue
        rate, base = rates[peer.id], rates.get(peer.base or "torchvision-v1")
        row |= {"images_per_s": rate.to_dict(), "measured": rate.measured()}
        if base is not None:
            row["times_torchvision"] = rate.median / base.median
        bound = binding(rates, costs(peer, res))
        rows.append({**row, **(bound.fields(rate) if bound else {})})
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
