"""Every benchmark of tidali itself, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from bench.fingerprint import SCHEMA_VERSION
from tidali.console import say


def bench_all(benchmarks: Mapping[str, Callable[[], dict[str, Any]]]) -> dict[str, Any]:
    """Run them in turn and put their documents into one."""
    documents = []
    for name, run in benchmarks.items():
        say(f"bench {name}")
        documents.append(run())
    return {"benchmark": "all", "schema_version": SCHEMA_VERSION, "parts": documents}
