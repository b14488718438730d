"""A hook of mkdocs that adds the recorded measurements to the site, so that links to them work there as in the repository."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]


def on_files(files: Files, config: Any) -> Files:
    for path in sorted((ROOT / "bench" / "results").glob("*.json")):
        files.append(File(str(path.relative_to(ROOT)), str(ROOT), config["site_dir"], config["use_directory_urls"]))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A link that leads out of docs/ in the repository stays inside the site."""
    return markdown.replace("](../bench/results/", "](bench/results/")
