"""A hook of mkdocs: the recorded measurements are part of the site, and code in the pages can be read and copied as it is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
_WHOLE_LETTERS = 30
"""Words of code up to this length are kept on one line; the narrowest screens have room for as many."""
_WHOLE = re.compile(rf"(?<!\S)(?=\S*-)\S{{1,{_WHOLE_LETTERS}}}(?!\S)")
_BEFORE_UNIT = re.compile(r"<pre.*?</pre>|(?<=\d) (?=(?:%|px)(?!\w))", re.DOTALL)
"""The space of '34 %', or a block of code, in which it stays what it is."""


def on_files(files: Files, config: Any) -> Files:
    for path in sorted((ROOT / "bench" / "results").glob("*.json")):
        files.append(File(str(path.relative_to(ROOT)), str(ROOT), config["site_dir"], config["use_directory_urls"]))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A link that leads out of docs/ in the repository stays inside the site. Commands are not coloured, which would take the
    first digit of 0.2 for a number, and would let a line break at their dashes. What is marked as output, scrolls."""
    markdown = re.sub(r"^<!-- output -->\n```$", "``` { .text .output }", markdown, flags=re.MULTILINE)
    markdown = re.sub(r"^```(bash|sh)$", "```", markdown, flags=re.MULTILINE)
    return markdown.replace("](../bench/results/", "](bench/results/")


def on_post_page(html: str, **_: Any) -> str:
    """The theme gives its search no name that a screen reader could say."""
    return html.replace('role="dialog"', 'role="dialog" aria-label="Search"')


def on_post_template(html: str, **_: Any) -> str:
    """The page of what is not found is made of a template."""
    return on_post_page(html)


def on_page_content(html: str, **_: Any) -> str:
    """Python's prompts are taken off examples, whose results become comments. Words with a dash do not break, nor do lines
    between a number and its unit, outside code."""
    html = _BEFORE_UNIT.sub(lambda found: "&nbsp;" if found[0] == " " else found[0], html)
    html = re.sub(r'<span class="gp">(?:&gt;&gt;&gt;|\.\.\.) ?</span>', "", html)
    html = re.sub(r'<span class="go">', '<span class="c1"># ', html)
    return re.sub(r"(?<=<code>)[^<]+(?=</code>)", lambda code: _WHOLE.sub(r'<span class="whole">\g<0></span>', code[0]), html)
