"""tidali compared with its peers, the loaders and training loops that people use today, on the same images, in turns.

Every case, tidali's too, runs in a process of its own (`bench.case_process`), with the peer's packages in an environment of its
own if they could clash (`bench.peer_env`). Before a case is measured, its batches are checked (`bench.peer_check`), and its
crops, if it crops (`bench.crops`). A case that cannot be installed, fails, or returns something else becomes a row with the
reason.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.case_process import CaseProcess
from bench.case_worker import DataJob
from bench.ceilings import COPY, DECODE, ceiling_cases, ceiling_rows, lowest_ceiling, sample_jpegs, stored_images
from bench.crops import CHECK_CROPS, SIZES, pack_check_set, torchvision_crops, why_wrong_crops
from bench.document import make_document, make_row
from bench.measure import CaseFailed, Measurable, Rates, measure, progress
from bench.peer_check import CHECK_SAMPLES, why_wrong_form, why_wrong_loader, why_wrong_training
from bench.peer_env import ENVIRONMENTS, Pythons
from bench.peer_table import LOADERS, REFERENCE, TRAINING, Peer, chosen
from bench.routes import check_batch_size
from bench.step import step_cost
from tidali.console import say
from tidali.dataset.contract import Dataset, parse_image_size
from tidali.errors import UsageError
from tidali.hardware.device import DevicePlan, plan_device
from tidali.hardware.limits import cpu_count

_CHECK_BATCH_SIZE = 32


def bench_peers(
    dataset: Dataset,
    *,
    resolutions: Sequence[int],
    batch_size: int,
    repeats: int,
    peers: Sequence[str] | None,
    training: bool = False,
    crops: bool = False,
) -> dict[str, Any]:
    """Measure loaders on the CPU, or training loops on a GPU if there is one, and return the JSON document.

    Every loader shuffles, flips horizontally at random and normalises. Every training loop is measured twice: its optimizer
    step on one batch in memory, and end to end, fed by its own loader.

    Args:
        peers: ids or families of `LOADERS`, or of `TRAINING`; None: all.
        training: measure training loops instead of loaders.
        crops: every loader returns random resized crops, of 0.08 to 1 of the area, instead of centre squares.

    Raises:
        UsageError: there is no such peer, or the batch is larger than the train split.
        TidaliError, DatasetError: the data cannot be used.
    """
    plan = plan_device("auto", "auto", "auto") if training else plan_device("cpu", "off", "off")
    cases = [peer for peer in chosen(TRAINING if training else LOADERS, peers) if crops or not peer.only_crops]
    check_batch_size(dataset, batch_size)
    limits = ceiling_cases(plan, jpegs=() if training else sample_jpegs(dataset))
    rows, ceilings = [], []
    with tempfile.TemporaryDirectory(prefix="tidali-peers-", ignore_cleanup_errors=True) as scratch:
        run = _Run(dataset, plan, Path(scratch), batch_size, min(resolutions), training=training, crops=crops)
        for res in resolutions:
            rates, failed = run.measure(cases, limits, res, repeats)
            rows += [run.row(peer, res, rates, failed) for peer in cases]
            ceilings += ceiling_rows(rates, res=res)
    return make_document(
        "training peers" if training else "peers",
        plan,
        dataset,
        batch_size=batch_size,
        repeats=repeats,
        peer_versions=run.versions,
        **({"crops": True} if crops else {}),
        rows=rows,
        ceilings=ceilings,
    )


class _Run:
    """What all cases of one run share: the images as files, the scratch folder, and the facts that loaders are checked
    against."""

    def __init__(
        self,
        dataset: Dataset,
        plan: DevicePlan,
        scratch: Path,
        batch_size: int,
        first_res: int,
        *,
        training: bool,
        crops: bool,
    ) -> None:
        """
        Args:
            first_res: the resolution at which every loader is checked over a whole epoch; labels do not depend on the
                resolution.
        """
        self._dataset, self._plan, self._scratch = dataset, plan, scratch
        self._batch_size, self._first_res, self._training = batch_size, first_res, training
        self._crops = crops
        self._pythons = Pythons()
        if dataset.manifest.adopted:
            raise UsageError(f"{dataset.root}: other loaders read the form that 'tidali shard' packs; pack the tars with it")
        self._folder = extract(dataset, scratch / "train")
        self.versions: dict[str, str] = {}
        if crops:
            self._check_set = pack_check_set(scratch / "check-set")
            self._check_folder = extract(self._check_set, scratch / "check-train")
            self._expected_crops = torchvision_crops()
        if not training:
            with self._start(REFERENCE, self._job(REFERENCE, first_res)) as process:
                self._reference = process.check(None)
            if self._reference["counts"] != list(dataset.split("train").class_counts):
                raise UsageError(f"{dataset.root}: the labels in the shards differ from the manifest; run 'tidali verify'")

    def measure(
        self, cases: Sequence[Peer], limits: Mapping[str, Measurable], res: int, repeats: int
    ) -> tuple[dict[str, Rates], dict[str, str]]:
        """One resolution: every case is started and checked, then all and the ceilings are measured in turn.

        Returns:
            The rates by id of the case or name of the ceiling, and by id the reason why a case did not run.
        """
        running: dict[str, CaseProcess] = {}
        failed: dict[str, str] = {}

        def fail(id: str, error: CaseFailed) -> None:
            failed[id] = str(error)
            say(f"{res} px: {id}: not run: {error}")
            if id in running:
                running.pop(id).stop()

        try:
            with progress(f"starting peers at {res}", len(cases)) as begin:
                for peer in cases:
                    begin(peer.id)
                    try:
                        if self._crops:
                            self._check_crops(peer, res)
                        job = self._job(peer, res)
                        process = running[peer.id] = self._start(peer, job)
                        self.versions[peer.package] = process.version
                        self._check(peer, job, process)
                    except CaseFailed as error:
                        fail(peer.id, error)
            started: dict[str, Measurable] = {**running, **limits}
            return measure(started, repeats=repeats, title=f"peers at {res}", on_failed=fail), failed
        finally:
            for process in running.values():
                process.stop()

    def row(self, peer: Peer, res: int, rates: Mapping[str, Rates], failed: Mapping[str, str]) -> dict[str, Any]:
        """For the document: the rate, also as a multiple of torchvision's if that was measured, or why there is none."""
        if peer.id in failed:
            return {"res": res, "case": peer.name, "not_run": failed[peer.id]}
        base = rates.get(peer.base)
        more: dict[str, Any] = {"times_torchvision": rates[peer.id].median / base.median} if base is not None else {}
        if self._crops:
            more |= {"kernel": peer.kernel, "stored_kib_per_image": self._stored_bytes(peer) / 1024}
        return make_row(peer.name, rates[peer.id], lowest_ceiling(rates, self._cost(peer, res)), res=res, **more)

    def _job(self, peer: Peer, res: int) -> DataJob:
        manifest, split = self._dataset.manifest, self._dataset.split("train")
        return DataJob(
            target=peer.target,
            package=peer.package,
            root=str(self._dataset.root.resolve()),
            folder=str(self._folder),
            scratch=str(self._scratch / peer.id),
            res=res,
            batch_size=self._batch_size,
            mean=manifest.mean,
            std=manifest.std,
            classes=len(manifest.classes),
            samples=split.samples,
            as_stored=set(split.image_sizes) == {f"{res}x{res}"},
            cores=cpu_count(),
            crops=self._crops and peer is not REFERENCE,
        )

    def _check_job(self, job: DataJob) -> DataJob:
        """The same case, reading the check set of crops. With few workers, so that each has whole batches of the few images."""
        return replace(
            job,
            root=str(self._check_set.root.resolve()),
            folder=str(self._check_folder),
            scratch=f"{job.scratch}-check",
            batch_size=_CHECK_BATCH_SIZE,
            classes=len(SIZES),
            samples=self._check_set.split("train").samples,
            as_stored=False,
            cores=min(job.cores, 4),
        )

    def _check_crops(self, peer: Peer, res: int) -> None:
        """
        Raises:
            CaseFailed: the case has no random resized crops, or they are distributed otherwise than torchvision's.
        """
        if peer.no_crops:
            raise CaseFailed(f"not with --crops: {peer.no_crops}")
        job = self._check_job(self._job(peer, res))
        with self._start(peer, job) as process:
            crops = process.crops(CHECK_CROPS)
            wrong = why_wrong_form(crops, job) or why_wrong_crops(crops, self._expected_crops)
        if wrong is not None:
            raise CaseFailed(wrong)

    def _start(self, peer: Peer, job: DataJob) -> CaseProcess:
        """
        Raises:
            CaseFailed: the peer cannot be installed, or does not start.
        """
        python = self._pythons.of(peer.env)
        try:
            return CaseProcess(python, job)
        except CaseFailed as error:
            hint = peer.hint or (ENVIRONMENTS[peer.env].hint if peer.env is not None else "")
            raise CaseFailed(f"{error}; {hint}" if hint else str(error)) from None

    def _check(self, peer: Peer, job: DataJob, process: CaseProcess) -> None:
        """
        Raises:
            CaseFailed: the case does other work than it is measured for.
        """
        if self._training:
            wrong = why_wrong_training(process.check(None), job)
        else:
            whole = job.res == self._first_res
            facts = process.check(None if whole else -(-CHECK_SAMPLES // job.batch_size))
            wrong = why_wrong_loader(facts, self._reference, job, whole=whole, carried_over=peer.carried_over)
        if wrong is not None:
            raise CaseFailed(wrong)

    def _cost(self, peer: Peer, res: int) -> dict[str, float]:
        """What one image of a case costs of each ceiling, for `bench.ceilings.lowest_ceiling`."""
        if self._training:
            return step_cost(peer.product_dtype(self._plan), res=res, stem="imagenet")
        split = self._dataset.split("train")
        decoding = {DECODE: 1.0} if peer.decodes else {}
        if self._crops:  # How much of an image is read depends on its crop; the pixels of the batch are written in any case.
            return {COPY: 3 * res * res * peer.pixel_dtype.itemsize / 2, **decoding}
        stored_bytes = sum(3 * math.prod(parse_image_size(size)) * count for size, count in split.image_sizes.items())
        # The stored pixels are read and those of the batch are written; a copy does both with each byte.
        moved = (stored_bytes / split.samples + 3 * res * res * peer.pixel_dtype.itemsize) / 2
        return {COPY: moved, **decoding}

    def _stored_bytes(self, peer: Peer) -> float:
        """What a loader stores of one image, on average: in its own format, or the JPEG."""
        files = (self._scratch / peer.id).glob(peer.own_files) if peer.own_files else self._folder.glob("*/*")
        return sum(file.stat().st_size for file in files) / self._dataset.split("train").samples


def extract(dataset: Dataset, folder: Path) -> Path:
    """Write the train split as files, LABEL/KEY.jpg, for the loaders that read files. Labels have leading zeros, so that
    loaders that number the folders in alphabetical order assign the same labels."""
    folders = [folder / f"{label:0{dataset.manifest.label_digits}d}" for label in range(len(dataset.manifest.classes))]
    for of_class in folders:
        of_class.mkdir(parents=True)
    for record, content in stored_images(dataset):
        assert record.label is not None
        (folders[record.label] / f"{record.key}.{record.extension}").write_bytes(content)
    return folder
