"""The maintainers' guard against slowing down: ``python -m bench.gate DATA``.

It measures tidali beside a peer in the same run and holds the ratios against bench/gate.json. Ratios and not rates: those of
another machine, or of this one on a busy day, say nothing about the code. It ends with 1 where a ratio is below its least. No
test runs it.

The least ratios leave a sixth of room or more below what was recorded. Those of the step are of CPUs whose bf16 products are
2.2 times as fast as their float32 ones.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tidali.errors import TidaliError, UsageError
from tidali.hardware.cpu_threads import wait_briefly

REPEATS = 5
PEERS_BATCH_SIZE = 256
PEERS = ("torchvision-v1", "tidali-streaming", "tidali-cached")


@dataclass(frozen=True, kw_only=True)
class Least:
    """One line of bench/gate.json."""

    benchmark: str
    res: int
    case: str
    against: str
    """The peer: a case of the same run."""
    least: float
    """The ratio that the case's median must have to the peer's."""
    stem: str | None = None
    needs: str | None = None
    """A flag of the CPU without which the ratio is not asked for: bf16 is worth little where it is emulated."""

    def __str__(self) -> str:
        return f"{self.benchmark} at {self.res} px{f', {self.stem} stem' if self.stem else ''}: {self.case} to {self.against}"


def recorded() -> list[Least]:
    """bench/gate.json."""
    return [Least(**fields) for fields in json.loads(Path(__file__).with_name("gate.json").read_text(encoding="utf-8"))]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    holds: bool
    line: str


def judge(minima: Sequence[Least], documents: Mapping[str, Mapping[str, Any]], cpu_flags: Sequence[str]) -> Iterator[Verdict]:
    """Hold what was measured against what is asked.

    Args:
        documents: those of `bench_step` and `bench_peers` by the name of the benchmark.
    """
    for wanted in minima:
        if wanted.needs is not None and wanted.needs not in cpu_flags:
            yield Verdict(holds=True, line=f"not asked  {wanted}: this CPU has no {wanted.needs}")
            continue
        rows = documents[wanted.benchmark]["rows"]
        medians = [_median(rows, wanted, case) for case in (wanted.case, wanted.against)]
        if None in medians:
            yield Verdict(holds=False, line=f"NOT RUN    {wanted}")
            continue
        ratio = medians[0] / medians[1]
        holds = ratio >= wanted.least
        yield Verdict(
            holds=holds, line=f"{'holds' if holds else 'TOO SLOW':9}  {wanted}: {ratio:.2f}, at least {wanted.least:g}"
        )


def _median(rows: Sequence[Mapping[str, Any]], wanted: Least, case: str) -> Any:
    for row in rows:
        if (row["case"], row["res"], row.get("stem")) == (case, wanted.res, wanted.stem) and "images_per_s" in row:
            return row["images_per_s"]["median"]
    return None


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 1:
        raise UsageError("give a packed data set: python -m bench.gate DATA")
    wait_briefly()  # as `tidali` does, and before torch is imported
    from bench.peers import bench_peers
    from bench.step import bench_step
    from tidali.dataset.source import open_data

    minima, dataset = recorded(), open_data(arguments[0])
    of_peers = [wanted for wanted in minima if wanted.benchmark == "peers"]
    documents = {
        "step": bench_step(
            resolutions=sorted({wanted.res for wanted in minima if wanted.benchmark == "step"}), repeats=REPEATS
        ),
        "peers": bench_peers(
            dataset,
            resolutions=sorted({wanted.res for wanted in of_peers}),
            batch_size=PEERS_BATCH_SIZE,
            repeats=REPEATS,
            peers=PEERS,
        ),
    }
    verdicts = list(judge(minima, documents, documents["step"]["machine"]["cpu_flags"]))
    for verdict in verdicts:
        print(verdict.line)
    return 0 if all(verdict.holds for verdict in verdicts) else 1


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except TidaliError as error:
        print(f"bench.gate: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
