"""The documents are true: what is made from the program is fresh, links lead somewhere, and the commands run."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import typer

from bench import measure
from bench.plot import write_plot
from tidali.cli.main import app

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
DOCUMENTS = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
COMMANDS = typer.main.get_command(app).commands


class Block(NamedTuple):
    """A fenced block of code."""

    runnable: bool
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    found = re.findall(r"^(<!-- run -->\n)?```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [Block(bool(mark), language, text) for mark, language, text in found]


def command_lines(page: Path) -> list[list[str]]:
    """The words after the program's name of every line in a block that begins with it, or with torchrun."""
    lines = [line for block in blocks(page) for line in block.text.splitlines() if not line.endswith("[OPTIONS]")]
    lines = [re.split(r" [>|] ", line)[0] for line in lines if re.match(r"tidali \w|torchrun .*-m tidali ", line)]
    words = [shlex.split(line, comments=True) for line in lines]
    return [line[line.index("tidali") + 1 :] for line in words]


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(DOCS)
        return importlib.import_module("generate")


def test_generated_pages_are_fresh(generate: ModuleType) -> None:
    stale = [path.name for path, text in generate.pages().items() if path.read_text() != text]
    assert stale == [], "run python docs/generate.py"


def test_every_command_option_and_field_is_in_the_reference(generate: ModuleType) -> None:
    text = generate.command_line()
    for name, command in COMMANDS.items():
        section = text.partition(f"## tidali {name}\n")[2].partition("\n## ")[0]
        options = {option for parameter in command.params for option in parameter.opts if option.startswith("-")}
        assert {option for option in options - {"-h", "--help"} if f"`{option}`" not in section} == set(), name


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.name)
def test_the_rows_of_a_table_have_its_columns(page: Path) -> None:
    """A bar that is not escaped begins another cell, in code too."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1, table


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_chart_of_loaders_shows_every_row_of_its_record(generate: ModuleType, theme: str) -> None:
    """Also those that are faster than tidali: a name and a number for each, the fastest first."""
    rows = generate.measured.recorded(generate.measured.PEERS, "peers")["rows"]
    shown = re.findall(r"<text [^>]*>(.*?)</text>", (DOCS / f"loaders-{theme}.svg").read_text())
    for res in (64, 224):
        of_res = sorted((row for row in rows if row["res"] == res), key=lambda row: row["images_per_s"]["median"], reverse=True)
        expected = [text for row in of_res for text in (row["case"], f"{row['images_per_s']['median']:,.0f}")]
        start = shown.index(f"Loaders at {res} px, images/s") + 1
        assert shown[start : start + len(expected)] == expected


def test_a_stale_page_is_noticed(generate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    (tmp_path / "cli.md").write_text("old")
    monkeypatch.setattr(generate, "pages", lambda: {tmp_path / "cli.md": "new"})
    monkeypatch.setattr(sys, "argv", ["generate.py", "--check"])
    with pytest.raises(SystemExit):
        generate.main()
    assert "stale" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["generate.py"])
    generate.main()
    assert (tmp_path / "cli.md").read_text() == "new"


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text):
        if not re.match(r"[a-z]+:", target):
            path, _, anchor = target.partition("#")
            there = (page.parent / path) if path else page
            assert there.exists(), target
            if anchor and there.suffix == ".md":
                headings = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE)
                assert anchor in {re.sub(r"[^\w]+", "-", heading.lower()).strip("-") for heading in headings}, target


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.name)
def test_every_command_can_be_given(page: Path) -> None:
    for words in command_lines(page):
        COMMANDS[words[0]].make_context(words[0], words[1:])  # refuses what is unknown, missing, or of the wrong kind


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(block.runnable for block in blocks(page))], ids=lambda p: p.name
)
def test_the_commands_run(page: Path, tidali, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, in an empty folder."""
    monkeypatch.setattr(measure, "MIN_SECONDS", 0.0)  # a benchmark's figures are not looked at
    monkeypatch.chdir(tmp_path)
    for block in (block for block in blocks(page) if block.runnable):
        if block.language == "python":
            done = subprocess.run([sys.executable, "-c", block.text], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            continue
        for line in block.text.splitlines():
            command, _, file = line.partition(" > ")
            program, *words = shlex.split(command, comments=True)
            assert program == "tidali", line
            ended = tidali(*words)
            assert ended.code == 0, f"{line}\n{ended.stderr}"
            if file:
                Path(file).write_text(ended.stdout)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documentation's site, built from another folder than the repository."""
    pytest.importorskip("mkdocs", reason="the extra 'docs' is not installed")
    pytest.importorskip("material", reason="the extra 'docs' is not installed")
    pytest.importorskip("mkdocstrings", reason="the extra 'docs' is not installed")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-f", str(ROOT / "mkdocs.yml")]
    folder = tmp_path_factory.mktemp("built")
    build += ["--site-dir", str(folder / "site")]
    done = subprocess.run(build, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "site"


def test_the_site_builds_and_asks_for_nothing(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) >= len(PAGES)
    assert [path.name for path in site.rglob("*.py")] == []
    records = set((site / "bench" / "results").iterdir())
    linked = re.findall(r'href="([^"]+bench/results/[^"]+)"', (site / "results" / "index.html").read_text())
    assert linked
    assert {(site / "results" / link).resolve() for link in linked} <= records
    assert "&gt;&gt;&gt;" not in (site / "api" / "index.html").read_text()  # examples can be copied as they are
    assert "\\|" not in (site / "cli" / "index.html").read_text()
    for page in pages:
        loaded = re.findall(r"<(?:script|img|iframe)[^>]* src=\"?([^\"\s>]+)", page.read_text())
        loaded += re.findall(r"<link[^>]*rel=\"?(?:stylesheet|preconnect|icon)[^>]* href=\"?([^\"\s>]+)", page.read_text())
        assert [address for address in loaded if re.match(r"(https?:)?//", address)] == [], page


def test_output_scrolls_and_commands_are_copied_as_they_are(site: Path) -> None:
    """A table's columns stay below each other, and the words of a command are whole."""
    hour = (site / "first-hour" / "index.html").read_text()
    scrolled = re.findall(r'<div class="[^"]*\boutput\b[^"]*">.*?</div>', hour, re.DOTALL)
    assert len(scrolled) == (DOCS / "first-hour.md").read_text().count("<!-- output -->") > 0
    assert "split  samples  shards" in scrolled[0]
    tutorial = (site / "tutorial" / "index.html").read_text()
    assert '<span class="whole">--val-fraction</span> 0.2' in tutorial
    assert "34&nbsp;%" in (site / "results" / "index.html").read_text()


def test_axe_finds_nothing_serious_in_the_site(site: Path, serious_findings) -> None:
    assert serious_findings(site, [site / "index.html", site / "recipes" / "index.html"]) == []


def test_axe_finds_nothing_serious_in_a_benchmarks_page(tmp_path: Path, serious_findings) -> None:
    record = next((ROOT / "bench" / "results").glob("train_*.json"))
    write_plot(json.loads(record.read_text()), tmp_path / "bench.html")
    assert serious_findings(tmp_path, [tmp_path / "bench.html"]) == []
