"""How fast a data set is packed: tidali beside FFCV's and webdataset's writers, on the same images, taking turns."""

from __future__ import annotations

import itertools
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.fingerprint import environment
from bench.peer_env import PeerMissing, python_of
from shards.demo import DemoSource
from shards.scan import FileSource, Source
from tidali.device import cpu_count, plan_device
from tidali.errors import TidaliError
from tidali.timing import Stopwatch

CLASSES = 200
DISTINCT_IMAGES = 5_000  # drawn or taken from the source, then used again and again: packing does not care
PEERS: dict[str, str | None] = {"ffcv-jpg": "ffcv", "ffcv-raw": "ffcv", "webdataset": None}
"""Cases of `bench.pack_peers`, and which of `bench.peer_env.ENVIRONMENTS` has them; None: tidali's own."""

_POLL_S = 0.05


def run(
    *,
    images: int = 110_000,
    repeats: int = 3,
    workers: int | None = None,
    source: Path | None = None,
    on_done: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Pack ``images`` JPEGs with every packer that is installed, ``repeats`` times in turn.

    The images come from ``source`` (a folder or zip that tidali can pack), else they are drawn; ten elevenths are train, as in
    Tiny-ImageNet. tidali reads them out of a zip; the peers get them as files, which is what they take. Times are of the whole
    command, start-up included.

    Args:
        workers: processes; None lets tidali choose and gives the peers one a core.
        on_done: called with a case's name after each of its runs.

    Returns:
        ``rows``, one a case: seconds and images_per_s (median, min, max) and peak_rss_mib, the largest process's peak; or
        ``not_run``, the reason why a peer could not be had.
    """
    cores = cpu_count()
    with tempfile.TemporaryDirectory(prefix="tidali-bench-") as name:
        folder = Path(name)
        archive, files = _make_sources(folder, images, source)
        commands = {"tidali": [sys.executable, "-m", "tidali", "shard", str(archive), "{dest}"]}
        if workers is not None:
            commands["tidali"] += ["--workers", str(workers)]
        missing: dict[str, str] = {}
        for case, env in PEERS.items():
            try:
                python = str(python_of(env)) if env is not None else sys.executable
            except PeerMissing as error:
                missing[case] = str(error)
                continue
            script = str(Path(__file__).with_name("pack_peers.py"))
            commands[case] = [python, script, case, str(files), "{dest}", str(workers or cores)]
        runs: dict[str, list[tuple[float, float]]] = {case: [] for case in commands}
        for _ in range(repeats):
            for case, command in commands.items():
                runs[case].append(_run_once(case, command, folder / "dest"))
                if on_done is not None:
                    on_done(case)
    rows = [_row(case, images, pairs) for case, pairs in runs.items()]
    fastest_peer = max((row["images_per_s"]["median"] for row in rows[1:]), default=None)
    return {
        "benchmark": "pack",
        **environment(plan_device("cpu", "off", "off")),
        "images": images,
        "workers": workers or cores,
        "repeats": repeats,
        "rows": rows + [{"case": case, "not_run": reason} for case, reason in missing.items()],
        "times_the_fastest_peer": rows[0]["images_per_s"]["median"] / fastest_peer if fastest_peer else None,
    }


def _row(case: str, images: int, pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    seconds = [pair[0] for pair in pairs]
    return {
        "case": case,
        "seconds": _spread(seconds),
        "images_per_s": _spread([images / value for value in seconds]),
        "peak_rss_mib": max(pair[1] for pair in pairs),
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


# -------------------------------------------------------------------------------------------------------------------- sources


def _make_sources(folder: Path, images: int, source: Path | None) -> tuple[Path, Path]:
    """The same images as a zip in Tiny-ImageNet's layout and as LABEL/NAME.jpg files."""
    distinct = itertools.cycle(_distinct_images(source))
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


def _distinct_images(path: Path | None) -> list[bytes]:
    source: Source = FileSource(path) if path else DemoSource(classes=50, per_class=DISTINCT_IMAGES // 50)
    scan = source.scan()
    with scan.reader.open() as read:
        return [read(item, 1 << 26) for item in scan.splits["train"][:DISTINCT_IMAGES]]


# ----------------------------------------------------------------------------------------------------------------------- runs


def _run_once(case: str, command: Sequence[str], dest: Path) -> tuple[float, float]:
    """Seconds, and the largest peak memory of any of its processes in MiB."""
    shutil.rmtree(dest, ignore_errors=True)
    dest.mkdir()
    arguments = [part.replace("{dest}", str(dest)) for part in command]
    peaks: dict[int, float] = {}
    with tempfile.TemporaryFile() as errors:
        watch = Stopwatch()
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=errors)
        while process.poll() is None:
            peaks.update(_peak_rss_mib(process.pid))
            time.sleep(_POLL_S)
        seconds = watch.elapsed_s()
        if process.returncode:
            errors.seek(0)
            last_line = errors.read().decode(errors="replace").strip().splitlines()[-1:]
            raise TidaliError(f"bench pack: {case} failed: {' '.join(last_line)}")
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
