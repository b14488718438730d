"""How packing, checking, opening and reading a data set grow with its images: the time, the rate and the memory of each.

Each is measured in a process of its own, from the command's start to its end. `bench_growth` starts the processes that read
batches with ``python -m bench.growth``, which print one JSON object.
"""

from __future__ import annotations

import itertools
import json
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.document import make_document
from bench.measure import CaseFailed, Rates
from bench.memory import run_measured
from bench.pack import CLASSES, drawn_jpegs
from tidali.console import say
from tidali.errors import TidaliError
from tidali.hardware.device import plan_device
from tidali.hardware.limits import cpu_count
from tidali.hardware.timing import Stopwatch

SAMPLES = (1_000, 10_000, 100_000)
RES = 64
COMMANDS = ("pack", "resume", "verify", "info")
BATCHES_S = 5.0
"""Batches are read for this long, after one epoch or this long to warm up."""


def bench_growth(*, samples: Sequence[int] = SAMPLES, batch_size: int = 256, repeats: int = 5) -> dict[str, Any]:
    """Pack drawn images of 64 px from a zip, and use the result as a person does; return the JSON document.

    Raises:
        TidaliError: a command failed.
    """
    jpegs, rows = drawn_jpegs(), []
    with tempfile.TemporaryDirectory(prefix="tidali-bench-") as scratch:
        archive, dest = Path(scratch) / "images.zip", Path(scratch) / "data"
        for count in samples:
            say(f"growth: {count:,} images")
            write_zip(archive, count, jpegs)
            found: dict[str, list[dict[str, float]]] = {}
            not_run: dict[str, str] = {}
            for _ in range(repeats):
                shutil.rmtree(dest, ignore_errors=True)
                for case, measured in _use(archive, dest, batch_size):
                    if "not_run" in measured:
                        not_run[case] = measured["not_run"]
                    else:
                        found.setdefault(case, []).append(measured)
            rows += [_row(case, count, measured) for case, measured in found.items()]
            rows += [{"case": case, "samples": count, "not_run": reason} for case, reason in not_run.items()]
    plan = plan_device("cpu", "off", "off")
    return make_document("growth", plan, batch_size=batch_size, workers=cpu_count(), repeats=repeats, rows=rows)


def write_zip(path: Path, count: int, jpegs: Sequence[bytes]) -> None:
    """So many images in folders of classes. Each has its number in a JPEG comment, so that no two are the same file."""
    with zipfile.ZipFile(path, "w") as archive:
        for number, jpeg in zip(range(count), itertools.cycle(jpegs)):
            data = jpeg[:2] + b"\xff\xfe\0\x0a" + b"%08d" % number + jpeg[2:]
            archive.writestr(zipfile.ZipInfo(f"{number % CLASSES:03d}/{number:08d}.jpg"), data)


def _use(archive: Path, dest: Path, batch_size: int) -> list[tuple[str, Any]]:
    """Each case once, in the order in which a person comes to it."""
    tidali, found = [sys.executable, "-m", "tidali"], []
    for case in COMMANDS:
        arguments = ["shard", str(archive), str(dest)] if case in ("pack", "resume") else [case, str(dest)]
        found.append((case, _run(case, [*tidali, *arguments])[1]))
    for route, cache in (("streamed", "off"), ("cached", "auto")):
        arguments = [json.dumps({"root": str(dest), "cache": cache, "batch_size": batch_size})]
        printed, usage = _run(route, [sys.executable, "-m", "bench.growth", *arguments])
        read = json.loads(printed.splitlines()[-1])
        if "not_run" in read:
            found += [(f"{name}, {route}", read) for name in ("first batch", "batches")]
            continue
        if route == "streamed":
            found.append(("open", {"seconds": read["open_s"], "peak_rss_mib": read["open_rss_mib"]}))
        found.append((f"first batch, {route}", {"seconds": read["first_batch_s"]}))
        found.append((f"batches, {route}", {"images_per_s": read["images_per_s"], "peak_rss_mib": usage["peak_rss_mib"]}))
    return found


def _run(case: str, command: Sequence[str]) -> tuple[str, dict[str, float]]:
    try:
        done = run_measured(command)
    except CaseFailed as error:
        raise TidaliError(f"bench growth: {case}: {error}") from None
    return done.printed, {"seconds": done.seconds, "peak_rss_mib": done.peak_rss_mib}


def _row(case: str, count: int, measured: Sequence[dict[str, float]]) -> dict[str, Any]:
    rates = [found["images_per_s"] if "images_per_s" in found else count / found["seconds"] for found in measured]
    row = {"case": case, "samples": count, "images_per_s": Rates(per_s=tuple(rates)).to_dict()}
    if "seconds" in measured[0]:
        row["seconds"] = Rates(per_s=tuple(found["seconds"] for found in measured)).to_dict()
    if "peak_rss_mib" in measured[0]:
        row["peak_rss_mib"] = max(found["peak_rss_mib"] for found in measured)
    return row


def read_batches(root: str, cache: str, batch_size: int) -> dict[str, Any]:
    """Open a data set and read batches of it in this process: seconds until it is open and until there is a batch, without the
    imports; images/s then."""
    import torch

    import tidali.loading.dali  # noqa: F401  DALI's libraries are among the imports
    from bench.memory import memory_mib
    from bench.routes import batch_settings, counting
    from tidali.dataset.source import open_data
    from tidali.hardware.cpu_memory import keep_freed_memory
    from tidali.loading.data import Data

    keep_freed_memory()  # as `tidali train` does
    watch = Stopwatch()
    dataset = open_data(root)
    found = {"open_s": watch.peek_s(), "open_rss_mib": memory_mib("VmHWM")}
    batches = Data(dataset, torch.device("cpu"), cache="off" if cache == "off" else "auto").batches(
        "train", **batch_settings(dataset, RES, min(batch_size, dataset.split("train").samples))
    )
    if cache != "off" and not batches.route.cached:
        return {"not_run": batches.route.describe()}
    step = counting(batches)
    images, samples = step(), dataset.split("train").samples
    found["first_batch_s"] = watch.elapsed_s()
    while images < samples and watch.peek_s() < BATCHES_S:
        images += step()
    watch, images = Stopwatch(), 0
    while not images or watch.peek_s() < BATCHES_S:
        images += step()
    return {**found, "images_per_s": images / watch.elapsed_s()}


if __name__ == "__main__":
    print(json.dumps(read_batches(**json.loads(sys.argv[1]))))
