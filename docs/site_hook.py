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


def on_files(files: Files, config: Any) -> Files:
    for path in sorted((ROOT / "bench" / "results").glob("*.json")):
        files.append(File(str(path.relative_to(ROOT)), str(ROOT), config["site_dir"], config["use_directory_urls"]))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A link that leads out of docs/ in the repository stays inside the site."""
    return markdown.replace("](../bench/results/", "](bench/results/")


def on_post_page(html: str, **_: Any) -> str:
    """The theme gives its search no name that a screen reader could say."""
    return html.replace('role="dialog"', 'role="dialog" aria-label="Search"')


def on_post_template(html: str, **_: Any) -> str:
    """The page of what is not found is made of a template."""
    return on_post_page(html)


def on_page_content(html: str, **_: Any) -> str:
    """Python's prompts are taken off examples, whose results become comments. Words with a dash do not break."""
    html = re.sub(r'<span class="gp">(?:&gt;&gt;&gt;|\.\.\.) ?</span>', "", html)
    html = re.sub(r'<span class="go">', '<span class="c1"># ', html)
    return re.sub(r"(?<=<code>)[^<]+(?=</code>)", lambda code: _WHOLE.sub(r'<span class="whole">\g<0></span>', code[0]), html)
