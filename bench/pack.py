"""How fast a data set is packed: tidali compared with the writers of FFCV and webdataset, on the same images, in turns."""

from __future__ import annotations

import itertools
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench.ceilings import DECODE, ceiling_cases, ceiling_rows, lowest_ceiling, sample_jpegs
from bench.document import make_document
from bench.measure import CaseFailed, Measurable, Rates, measure
from bench.memory import run_measured
from bench.peer_env import Pythons
from shards.demo import DemoSource
from tidali.console import say
from tidali.dataset.contract import Dataset
from tidali.errors import TidaliError, UsageError
from tidali.hardware.device import plan_device
from tidali.hardware.limits import cpu_count

IMAGES = 110_000
"""Tiny-ImageNet's train and val."""
CLASSES = 200
DISTINCT_IMAGES = 5_000
"""Drawn or taken from the data, then repeated: it makes no difference to packing."""
TIDALI, UNDECODED = "tidali", "webdataset, not decoded"
PEERS: dict[str, str | None] = {"FFCV jpg": "ffcv", "FFCV raw": "ffcv", "webdataset": None, UNDECODED: None}
"""Cases of `bench.pack_peers`, and the environment of `bench.peer_env.ENVIRONMENTS` that each needs; None: tidali's own."""


def bench_pack(
    dataset: Dataset | None = None, *, images: int = IMAGES, repeats: int = 3, workers: int | None = None
) -> dict[str, Any]:
    """Pack JPEGs with every packer that can be installed, in turn, and return the JSON document.

    tidali reads the images from a zip; the others get them as files, which is what they take. Times are those of the whole
    command, start-up included.

    Args:
        dataset: its train images are packed, repeated until there are enough; None: images are drawn.
        images: ten elevenths of them are train, as in Tiny-ImageNet.
        workers: processes; None lets tidali choose, and the others use one per core.

    Raises:
        UsageError: the data set has no JPEGs.
        TidaliError: tidali's own packing failed. Where another's fails, its row has the reason.
    """
    plan = plan_device("cpu", "off", "off")
    jpegs = sample_jpegs(dataset, most=DISTINCT_IMAGES) if dataset is not None else drawn_jpegs()
    if not jpegs:
        raise UsageError(f"--data {dataset.root if dataset else ''}: its train split has no JPEGs, which FFCV and others need")
    pythons = Pythons()
    failed: dict[str, str] = {}

    def on_failed(case: str, error: CaseFailed) -> None:
        if case == TIDALI:
            raise TidaliError(f"bench pack: tidali failed: {error}")
        failed[case] = str(error)
        say(f"{case}: not run: {error}")

    with tempfile.TemporaryDirectory(prefix="tidali-bench-") as name:
        say(f"writing {images:,} images to {name}")
        archive, files = _make_sources(Path(name), images, jpegs)
        dest = Path(name) / "dest"

        def command(case: str) -> list[str]:
            if case == TIDALI:
                several = ["--workers", str(workers)] if workers is not None else []
                return [sys.executable, "-m", "tidali", "shard", str(archive), str(dest), *several]
            script = Path(__file__).with_name("pack_peers.py")
            return [str(pythons.of(PEERS[case])), str(script), case, str(files), str(dest), str(workers or cpu_count())]

        packers = {case: _Packer(partial(command, case), images, dest) for case in (TIDALI, *PEERS)}
        cases: dict[str, Measurable] = {**packers, DECODE: ceiling_cases(plan, jpegs=jpegs)[DECODE]}
        rates = measure(cases, repeats=repeats, title="packing", on_failed=on_failed)
    rows = []
    for case, packer in packers.items():
        if case not in failed:
            rate, seconds = rates[case], Rates(per_s=tuple(packer.seconds))
            row = {"case": case, "seconds": seconds.to_dict(), "images_per_s": rate.to_dict(), "peak_rss_mib": packer.peak_mib}
            ceiling = lowest_ceiling(rates, {} if case == UNDECODED else {DECODE: 1.0})
            rows.append({**row, **(ceiling.fields(rate) if ceiling else {})})
    fastest_peer = max((row["images_per_s"]["median"] for row in rows[1:]), default=None)
    return make_document(
        "pack",
        plan,
        dataset,
        images=images,
        workers=workers or cpu_count(),
        repeats=repeats,
        rows=rows + [{"case": case, "not_run": reason} for case, reason in failed.items()],
        ceilings=ceiling_rows(rates),
        times_the_fastest_peer=rows[0]["images_per_s"]["median"] / fastest_peer if fastest_peer else None,
    )


# -------------------------------------------------------------------------------------------------------------------- sources


def _make_sources(folder: Path, images: int, jpegs: Sequence[bytes]) -> tuple[Path, Path]:
    """The same images as a zip in Tiny-ImageNet's layout and as files LABEL/NAME.jpg."""
    distinct = itertools.cycle(jpegs)
    archive, files = folder / "tiny.zip", folder / "files"
    ids = [f"n{label:08d}" for label in range(CLASSES)]
    train = images * 10 // 11
    annotations = []
    for id_ in range(CLASSES):
        (files / str(id_)).mkdir(parents=True)
    with zipfile.ZipFile(archive, "w") as out:
        out.writestr("tiny/wnids.txt", "".join(f"{id_}\n" for id_ in ids))
        for number in range(images):
            label, data = number % CLASSES, next(distinct)
            (files / str(label) / f"{number}.jpg").write_bytes(data)
            if number < train:
                out.writestr(f"tiny/train/{ids[label]}/images/{ids[label]}_{number}.JPEG", data)
            else:
                out.writestr(f"tiny/val/images/val_{number}.JPEG", data)
                annotations.append(f"val_{number}.JPEG\t{ids[label]}\t0\t0\t63\t63\n")
        out.writestr("tiny/val/val_annotations.txt", "".join(annotations))
    return archive, files


def drawn_jpegs() -> list[bytes]:
    """`DISTINCT_IMAGES` of 64 px."""
    scan = DemoSource(classes=50, per_class=DISTINCT_IMAGES // 50).scan()
    with scan.reader.open() as read:
        return [read(item, 1 << 26) for item in scan.splits["train"]]


# ----------------------------------------------------------------------------------------------------------------------- runs


class _Packer:
    """One packer's command."""

    def __init__(self, command: Callable[[], Sequence[str]], images: int, dest: Path) -> None:
        self._command, self._images, self._dest = command, images, dest
        self.seconds: list[float] = []
        """Of each run."""
        self.peak_mib = 0.0
        """The highest peak memory of any of its processes, over all runs."""

    def measure(self) -> Rates:
        """
        Raises:
            CaseFailed: the packer cannot be installed, or ended with an exit code other than 0.
        """
        command = self._command()
        shutil.rmtree(self._dest, ignore_errors=True)
        self._dest.mkdir()
        done = run_measured(command)
        self.peak_mib = max(self.peak_mib, done.peak_rss_mib)
        shutil.rmtree(self._dest)
        self.seconds.append(done.seconds)
        return Rates(per_s=(self._images / done.seconds,))
