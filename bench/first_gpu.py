"""The summary page of ``bench/first_gpu.sh``: ``python -m bench.first_gpu FOLDER`` writes FOLDER/index.html."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from textwrap import shorten
from typing import Any

from bench.plot import page
from tidali.files import write_atomically

RECORDS = ("train-cached", "train-streamed", "train-graphs", "decoder-cpu", "decoder-mixed", "step")
_TIMED_OUT = (124, 137)
"""Exit codes of ``timeout``."""


def stages(folder: Path) -> list[dict[str, Any]]:
    """What became of each stage, from stages.tsv and the logs."""
    found = []
    for line in (folder / "stages.tsv").read_text().splitlines():
        name, code, seconds = line.split("\t")
        result = "ok" if code == "0" else "took too long" if int(code) in _TIMED_OUT else f"failed, exit code {code}"
        log = folder / f"{name}.log"
        lines = [text.strip() for text in log.read_text(errors="replace").splitlines() if text.strip()]
        found.append(
            {
                "name": name,
                "result": result,
                "seconds": seconds,
                "last": shorten((lines or [""])[-1], 240, placeholder=" …"),
                "log": log.name,
            }
        )
    return found


def summary(folder: Path) -> bytes:
    """The page: a table of the stages, and every record that was written."""
    records = [path for name in RECORDS if (path := folder / f"{name}.json").is_file()]
    document = {"benchmark": "all", "parts": [json.loads(path.read_text()) for path in records]}
    return page(document, title=f"tidali on a GPU for the first time: {folder.name}", stages=stages(folder))


def main() -> None:
    folder = Path(sys.argv[1])
    write_atomically(folder / "index.html", summary(folder))
    print(f"{folder / 'index.html'}: what was found")
    failed = [stage["name"] for stage in stages(folder) if stage["result"] != "ok"]
    if failed:
        sys.exit(f"first_gpu: {', '.join(failed)}: not ok; see their logs")


if __name__ == "__main__":
    main()
