"""The maintainers' check against performance regressions: ``python -m bench.gate DATA``.

It measures tidali and a peer in the same run and compares the ratios with the minimum ratios in bench/gate.json. Ratios,
since rates of another machine, or of this one on a busy day, say nothing about the code. The exit code is 1 if a ratio is below
its minimum. No test runs it.

The minimum ratios are lower than the recorded ones by a sixth or more. Those of the step are for CPUs whose bf16 products are
2.2 times as fast as their float32 ones.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tidali.config import Stem
from tidali.errors import TidaliError, UsageError
from tidali.hardware.cpu_threads import limit_threads, wait_briefly

REPEATS = 5
PEERS_BATCH_SIZE = 256
PEERS = ("torchvision-v1", "tidali-streaming", "tidali-cached")


@dataclass(frozen=True, kw_only=True)
class Minimum:
    """One line of bench/gate.json."""

    benchmark: str
    res: int
    case: str
    peer: str
    """A case of the same run."""
    ratio: float
    """The least ratio of the case's median to the peer's that passes."""
    stem: Stem | None = None
    needs: str | None = None
    """A CPU flag without which the ratio is not checked: bf16 gains little where it is emulated."""

    def __str__(self) -> str:
        return f"{self.benchmark} at {self.res} px{f', {self.stem} stem' if self.stem else ''}: {self.case} to {self.peer}"


def recorded() -> list[Minimum]:
    """bench/gate.json."""
    return [Minimum(**fields) for fields in json.loads(Path(__file__).with_name("gate.json").read_text(encoding="utf-8"))]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    passed: bool
    line: str


def judge(minima: Sequence[Minimum], documents: Mapping[str, Mapping[str, Any]], cpu_flags: Sequence[str]) -> Iterator[Verdict]:
    """Compare what was measured with the minima.

    Args:
        documents: those of `bench_step` and `bench_peers`, by the name of the benchmark.
    """
    for minimum in minima:
        if minimum.needs is not None and minimum.needs not in cpu_flags:
            yield Verdict(passed=True, line=f"skipped   {minimum}: this CPU has no {minimum.needs}")
            continue
        rows = documents[minimum.benchmark]["rows"]
        case, peer = (_median(rows, minimum, name) for name in (minimum.case, minimum.peer))
        if case is None or peer is None:
            yield Verdict(passed=False, line=f"NOT RUN   {minimum}")
            continue
        passed = case / peer >= minimum.ratio
        result = "passed" if passed else "TOO SLOW"
        yield Verdict(passed=passed, line=f"{result:8}  {minimum}: {case / peer:.2f}, minimum {minimum.ratio:g}")


def _median(rows: Sequence[Mapping[str, Any]], minimum: Minimum, case: str) -> float | None:
    for row in rows:
        if (row["case"], row["res"], row.get("stem")) == (case, minimum.res, minimum.stem) and "images_per_s" in row:
            return float(row["images_per_s"]["median"])
    return None


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 1:
        raise UsageError("give a packed data set: python -m bench.gate DATA")
    wait_briefly()  # as the `tidali` command does, and before torch is imported
    limit_threads()
    from bench.peers import bench_peers
    from bench.step import bench_step
    from tidali.dataset.source import open_data

    minima, dataset = recorded(), open_data(arguments[0])
    resolutions = {name: sorted({one.res for one in minima if one.benchmark == name}) for name in ("step", "peers")}
    step = bench_step(resolutions=resolutions["step"], repeats=REPEATS)
    peers = bench_peers(dataset, resolutions=resolutions["peers"], batch_size=PEERS_BATCH_SIZE, repeats=REPEATS, peers=PEERS)
    verdicts = list(judge(minima, {"step": step, "peers": peers}, step["machine"]["cpu_flags"]))
    for verdict in verdicts:
        print(verdict.line)
    return 0 if all(verdict.passed for verdict in verdicts) else 1


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except TidaliError as error:
        print(f"bench.gate: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
