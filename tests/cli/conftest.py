"""One short training run that the command-line tests look at, and a reader of the pages that commands write."""

from __future__ import annotations

from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def trained(tidali: Callable[..., Any], demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The folder of a run of two epochs at 32 px, and how the command ended."""
    out = tmp_path_factory.mktemp("runs") / "x"
    ended = tidali(
        "train", "--data", demo_data, "--res", 32, "--epochs", 2, "--batch-size", 32, "--device", "cpu", "--out", out
    )
    assert ended.code == 0, ended.stderr
    return out, ended


class Page(HTMLParser):
    """What a page holds, as a browser would read it."""

    VOID = frozenset({"meta", "img", "br", "link", "input", "hr"})

    def __init__(self) -> None:
        super().__init__()
        self.unclosed: list[str] = []
        """Tags that were closed in the wrong order, and those never closed."""
        self.references: list[str] = []
        """Every src, href and xlink:href, and what CSS loads."""
        self.images: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.svgs = 0
        self.text = ""
        self._open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.references += [named[name] or "" for name in ("src", "href", "xlink:href", "srcset", "data") if name in named]
        if tag == "img":
            self.images.append(named["src"] or "")
        if tag not in self.VOID:
            self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        self.svgs += tag == "svg"
        self._add(" ")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open.pop() != tag:
            self.unclosed.append(tag)
        self._add(" ")

    def handle_data(self, data: str) -> None:
        if "style" in self._open or "script" in self._open:
            self.references += [part.partition(")")[0] for part in data.split("url(")[1:]] + ["@import"] * data.count("@import")
        else:
            self._add(data)

    def _add(self, text: str) -> None:
        if {"td", "th"} & set(self._open):
            cell = self.tables[-1][-1]
            cell[-1] += text
        self.text += text


@pytest.fixture(scope="session")
def read_page() -> Callable[[Path], Page]:
    """``read_page(path)`` reads an HTML file; runs of white space in its text and cells become one space."""

    def read(path: Path) -> Page:
        page = Page()
        page.feed(path.read_text(encoding="utf-8"))
        page.close()
        page.unclosed += page._open
        page.text = " ".join(page.text.split())
        page.tables = [[[" ".join(cell.split()) for cell in row] for row in table] for table in page.tables]
        return page

    return read
