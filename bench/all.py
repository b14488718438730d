"""Every benchmark, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from bench.fingerprint import SCHEMA_VERSION
from tidali.console import say


def bench_all(
    benchmarks: Mapping[str, Callable[[], dict[str, Any]]], keep: Callable[[dict[str, Any]], None] = lambda document: None
) -> dict[str, Any]:
    """Run them in turn and put their documents into one.

    Args:
        keep: given the document so far after each: together they take an hour, and the last may fail.
    """
    document: dict[str, Any] = {"benchmark": "all", "schema_version": SCHEMA_VERSION, "parts": []}
    for name, run in benchmarks.items():
        say(f"bench {name}")
        document["parts"].append(run())
        keep(document)
    return document
