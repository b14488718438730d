"""How fast a data set is packed: tidali beside FFCV's and webdataset's writers, on the same images, taking turns."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.ceilings import DECODE, binding, ceiling_cases, ceiling_rows, sample_jpegs
from bench.fingerprint import PACKAGES, environment
from bench.measure import Rates, measure
from bench.peer_env import PeerMissing, Pythons
from shards.demo import DemoSource
from tidali.console import progress_bar, say
from tidali.dataset.contract import Dataset
from tidali.errors import TidaliError, UsageError
from tidali.hardware.device import cpu_count, plan_device
from tidali.hardware.timing import Stopwatch

IMAGES = 110_000
"""Tiny-ImageNet's train and val."""
CLASSES = 200
DISTINCT_IMAGES = 5_000
"""Drawn or taken from the data, then used again and again: packing does not care."""
TIDALI, UNDECODED = "tidali", "webdataset, not decoded"
PEERS: dict[str, str | None] = {"FFCV jpg": "ffcv", "FFCV raw": "ffcv", "webdataset": None, UNDECODED: None}
"""Cases of `bench.pack_peers`, and which of `bench.peer_env.ENVIRONMENTS` has them; None: tidali's own."""

_POLL_S = 0.05


def bench_pack(
    dataset: Dataset | None = None, *, images: int = IMAGES, repeats: int = 3, workers: int | None = None
) -> dict[str, Any]:
    """Pack JPEGs with every packer that is installed, in turns, and return the JSON document.

    tidali reads the images out of a zip; the others get them as files, which is what they take. Times are of the whole command,
    start-up included.

    Args:
        dataset: its train images are packed, again and again until they are as many as asked for; None: images are drawn.
        images: ten elevenths of them are train, as in Tiny-ImageNet.
        workers: processes; None lets tidali choose and gives the others one a core.

    Raises:
        UsageError: the data set has no JPEGs.
        TidaliError: tidali's own packing failed. Another's is a row with its reason.
    """
    cores, plan = cpu_count(), plan_device("cpu", "off", "off")
    jpegs = sample_jpegs(dataset, most=DISTINCT_IMAGES) if dataset is not None else _drawn()
    if not jpegs:
        raise UsageError(f"--data {dataset.root if dataset else ''}: its train split has no JPEGs, which FFCV and others need")
    decoding = [case for case in ceiling_cases(plan, jpegs=jpegs) if case.name == DECODE]
    pythons = Pythons()
    missing: dict[str, str] = {}
    runs: dict[str, list[tuple[float, float]]] = {case: [] for case in (TIDALI, *PEERS)}
    limits: list[Rates] = []
    with tempfile.TemporaryDirectory(prefix="tidali-bench-") as name, progress_bar() as bar:
        task = bar.add_task("packing", total=repeats * len(runs), note="making the images' files")
        folder = Path(name)
        archive, files = _make_sources(folder, images, jpegs)
        for _ in range(repeats):
            for case in runs:
                bar.update(task, note=case)
                if case not in missing:
                    try:
                        command = _command(case, pythons, archive, files, folder / "dest", workers)
                        runs[case].append(_run_once(command, folder / "dest"))
                    except (PeerMissing, _Failed) as error:
                        if case == TIDALI:
                            raise TidaliError(f"bench pack: tidali failed: {error}") from None
                        missing[case] = str(error)
                        say(f"{case}: not run: {error}")
                bar.update(task, advance=1)
            limits.append(measure(decoding, repeats=1)[DECODE])
    measured = {DECODE: Rates.together(limits)}
    rows = [_row(case, images, runs[case], measured) for case in runs if case not in missing]
    fastest_peer = max((row["images_per_s"]["median"] for row in rows[1:]), default=None)
    return {
        "benchmark": "pack",
        **environment(plan),
        **({"data": {"name": dataset.root.name, "train_samples": dataset.split("train").samples}} if dataset else {}),
        "images": images,
        "workers": workers or cores,
        "repeats": repeats,
        "rows": rows + [{"case": case, "not_run": reason} for case, reason in missing.items()],
        "ceilings": ceiling_rows(measured),
        "times_the_fastest_peer": rows[0]["images_per_s"]["median"] / fastest_peer if fastest_peer else None,
    }


def _command(case: str, pythons: Pythons, archive: Path, files: Path, dest: Path, workers: int | None) -> list[str]:
    """
    Raises:
        PeerMissing: what the case needs cannot be installed.
    """
    if case == TIDALI:
        several = ["--workers", str(workers)] if workers is not None else []
        return [sys.executable, "-m", "tidali", "shard", str(archive), str(dest), *several]
    python, script = str(pythons.of(PEERS[case])), str(Path(__file__).with_name("pack_peers.py"))
    return [python, script, case, str(files), str(dest), str(workers or cpu_count())]


def _row(case: str, images: int, runs: Sequence[tuple[float, float]], limits: Mapping[str, Rates]) -> dict[str, Any]:
    seconds = tuple(pair[0] for pair in runs)
    rate = Rates(per_s=tuple(images / value for value in seconds))
    bound = binding(limits, {} if case == UNDECODED else {DECODE: 1.0})
    return {
        "case": case,
        "seconds": Rates(per_s=seconds).to_dict(),
        "images_per_s": rate.to_dict(),
        "peak_rss_mib": max(pair[1] for pair in runs),
        **(bound.fields(rate) if bound else {}),
    }


# -------------------------------------------------------------------------------------------------------------------- sources


def _make_sources(folder: Path, images: int, jpegs: Sequence[bytes]) -> tuple[Path, Path]:
    """The same images as a zip in Tiny-ImageNet's layout and as LABEL/NAME.jpg files."""
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


def _drawn() -> list[bytes]:
    scan = DemoSource(classes=50, per_class=DISTINCT_IMAGES // 50).scan()
    with scan.reader.open() as read:
        return [read(item, 1 << 26) for item in scan.splits["train"]]


# ----------------------------------------------------------------------------------------------------------------------- runs


class _Failed(Exception):
    """A packer's own last words."""


def _run_once(command: Sequence[str], dest: Path) -> tuple[float, float]:
    """Seconds, and the largest peak memory of any of its processes in MiB.

    Raises:
        _Failed: it ended with another exit code than 0.
    """
    shutil.rmtree(dest, ignore_errors=True)
    dest.mkdir()
    peaks: dict[int, float] = {}
    with tempfile.TemporaryFile() as errors:
        watch = Stopwatch()
        process = subprocess.Popen(command, cwd=PACKAGES, stdout=subprocess.DEVNULL, stderr=errors)
        while process.poll() is None:
            peaks.update(_peak_rss_mib(process.pid))
            time.sleep(_POLL_S)
        seconds = watch.elapsed_s()
        if process.returncode:
            errors.seek(0)
            last_line = errors.read().decode(errors="replace").strip().splitlines()[-1:]
            raise _Failed(f"ended with exit code {process.returncode}: {' '.join(last_line)}")
    shutil.rmtree(dest)
    return seconds, max(peaks.values(), default=0.0)


def _peak_rss_mib(pid: int) -> dict[int, float]:
    """The kernel's high-water mark (VmHWM) of a process and all below it."""
    peaks = {}
    try:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        if "VmHWM" in status:  # a process that ended has none
            peaks[pid] = int(status["VmHWM"].split()[0]) / 1024
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it ended meanwhile
        return peaks
    for child in children:
        peaks |= _peak_rss_mib(int(child))
    return peaks
