"""A hook of mkdocs: the recorded measurements are part of the site, and code in the pages can be read and copied as it is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
_WHOLE_LETTERS = 30
"""Pieces and words of code up to this length are kept on one line; the narrowest screens have room for as many."""
_WHOLE = re.compile(rf"(?<!\S)(?=\S*-)\S{{1,{_WHOLE_LETTERS}}}(?!\S)")
_TOGETHER = re.compile(
    r"<pre.*?</pre>|<code>.*?</code>|<[^>]*>"
    r"|(?<=\d) (?=(?:%|px|MiB|MB|GB)(?!\w)|[±x] \d)|(?<=\d [±x]) (?=\d)|(?<=\d&nbsp;[±x]) (?=\d)"
    r"|\b(?:[A-Za-z]+-)+\d[\w-]*",
    re.DOTALL,
)
"""The spaces of '34 %', '1.2 ± 0.3' and '3 x 4', and names such as ResNet-50, which stay on one line; or, to be left as they
are, markup and code."""
_SCROLLS = re.compile(
    r'(<div class="[^"]*\b(?:language-py\w+|output|script)\b[^"]*">(?:(?!</div>).)*?<code>)(.*?)(</code>)', re.DOTALL
)


def on_files(files: Files, config: Any) -> Files:
    for path in sorted((ROOT / "bench" / "results").glob("*.json")):
        files.append(File(str(path.relative_to(ROOT)), str(ROOT), config["site_dir"], config["use_directory_urls"]))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A link that leads out of docs/ in the repository stays inside the site. Commands are not coloured, which would take the
    first digit of 0.2 for a number, and would let a line break at their dashes. Scripts (sh) and output scroll."""
    markdown = re.sub(r"^<!-- output -->\n```$", "``` { .text .output }", markdown, flags=re.MULTILINE)
    markdown = re.sub(r"^```sh$", "``` { .text .script }", markdown, flags=re.MULTILINE)
    markdown = re.sub(r"^```bash$", "```", markdown, flags=re.MULTILINE)
    return markdown.replace("](../bench/results/", "](bench/results/")


def on_post_page(html: str, **_: Any) -> str:
    """The theme gives its search no name that a screen reader could say."""
    return html.replace('role="dialog"', 'role="dialog" aria-label="Search"')


def on_post_template(html: str, **_: Any) -> str:
    """The page of what is not found is made of a template."""
    return on_post_page(html)


def on_page_content(html: str, **_: Any) -> str:
    """Python's prompts are taken off examples, whose results become comments. Options, short pieces of code and figures with
    their units do not break. What scrolls has something in it that takes the focus, so that it can be scrolled by key."""
    html = _TOGETHER.sub(_together, html)
    html = re.sub(r'<span class="gp">(?:&gt;&gt;&gt;|\.\.\.) ?</span>', "", html)
    html = re.sub(r'<span class="go">', '<span class="c1"># ', html)
    html = re.sub(r"(?<=<code>)[^<]+(?=</code>)", _whole, html)
    html = re.sub(r'<p>(?=<img [^>]*src="[^"]*report-)', '<p class="picture" tabindex="0">', html)
    return _SCROLLS.sub(r'\1<span tabindex="0">\2</span>\3', html)


def _together(found: re.Match[str]) -> str:
    text = found[0]
    return text if text.startswith("<") else "&nbsp;" if text == " " else f'<span class="whole">{text}</span>'


def _whole(code: re.Match[str]) -> str:
    """A short piece of code that has a dash stays on one line; of a longer one, the words with a dash."""
    if "-" in code[0] and len(code[0]) <= _WHOLE_LETTERS and "\n" not in code[0]:
        return f'<span class="whole">{code[0]}</span>'
    return _WHOLE.sub(r'<span class="whole">\g<0></span>', code[0])
