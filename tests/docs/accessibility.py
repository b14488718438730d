"""Looks at pages in a headless Chromium as axe-core does, at the width of a telephone and of a desk, in light and in dark.

``python tests/docs/accessibility.py PAGE.html... | FOLDER`` prints what it finds, and exits with 1 if anything is serious. It
needs Chromium, and axe-core in node_modules of this repository: ``npm install --no-save axe-core``.
"""

from __future__ import annotations

import functools
import html
import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
AXE = ROOT / "node_modules" / "axe-core" / "axe.min.js"
WIDTHS_PX = (400, 1400)
_TIMEOUT_S = 300
_SCROLLED_BY_THEME = '<div class="md-typeset__scrollwrap"'

# Every page is loaded into a frame of its own size, where axe looks at it. A page may not be wider than its frame.
_DRIVER = """<!DOCTYPE html><html lang="en"><title>axe</title><body><script>
const frame = (url, width) => new Promise(done => {
  const made = document.createElement("iframe");
  made.style = `width:${width}px;height:900px;border:0`;
  made.onload = () => done(made);
  made.src = url;
  document.body.append(made);
});
const say = found => {
  const out = document.createElement("pre");
  out.textContent = JSON.stringify(found);
  document.body.append(out);
};
(async () => {
  const found = [];
  for (const url of PAGES) for (const width of WIDTHS) {
    const made = await frame(url, width), page = made.contentWindow, body = made.contentDocument;
    const script = body.createElement("script");
    script.textContent = AXE;
    body.head.append(script);
    const result = await page.axe.run(body, {resultTypes: ["violations"]});
    for (const one of result.violations) for (const node of one.nodes)
      found.push({url, width, rule: one.id, impact: one.impact, node: node.html.slice(0, 160), why: node.failureSummary});
    const widest = body.documentElement.scrollWidth;
    if (widest > width)
      found.push({url, width, rule: "wider-than-the-screen", impact: "serious", node: "", why: `${widest} px`});
    made.remove();
  }
  say(found);
})().catch(error => say(String(error)));
</script></body></html>"""


def missing() -> str | None:
    """Why pages cannot be looked at here; None if they can."""
    if browser() is None:
        return "there is no Chromium"
    return None if AXE.is_file() else "there is no axe-core: npm install --no-save axe-core"


def browser() -> str | None:
    return next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)


def findings(folder: Path, pages: Sequence[Path], *, dark: bool = False) -> list[dict[str, Any]]:
    """What axe finds in the pages, which are below the folder, at each of `WIDTHS_PX`.

    Raises:
        RuntimeError: Chromium did not get to the end.
    """
    urls = [f"/{page.relative_to(folder).as_posix()}" for page in pages]
    values = {"PAGES": urls, "WIDTHS": WIDTHS_PX, "AXE": AXE.read_text(encoding="utf-8")}
    # A closing tag inside the script would end it.
    head = "".join(f"const {name} = {json.dumps(value)};" for name, value in values.items()).replace("</", "<\\/")
    driver = _DRIVER.replace("<script>", f"<script>{head}", 1)
    with served(folder, driver) as address:
        command = [
            str(browser()),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--virtual-time-budget=100000000",
            "--dump-dom",
        ]
        command += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", f"{address}/driver"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
    text = re.search(r"<pre>(.*?)</pre>", done.stdout, re.DOTALL)
    if text is None:
        raise RuntimeError(f"Chromium did not get to the end: {done.stderr[-500:]}")
    found = json.loads(html.unescape(text[1]))
    if isinstance(found, str):
        raise RuntimeError(found)
    return [{**one, "theme": "dark" if dark else "light"} for one in found]


def serious(found: Sequence[dict[str, Any]]) -> list[str]:
    """The findings that keep a person from reading or using a page, a line each.

    The frames that the site's theme puts around tables are left out: Chromium lets the keyboard scroll them.
    """
    return [
        f"{one['url']} at {one['width']} px, {one['theme']}: {one['rule']}: {one['node']} {one['why']}"
        for one in found
        if one["impact"] in ("serious", "critical")
        and not (one["rule"] == "scrollable-region-focusable" and one["node"].startswith(_SCROLLED_BY_THEME))
    ]


@contextmanager
def served(folder: Path, driver: str) -> Iterator[str]:
    """The folder, and the driver, under an address of this machine: pages from files may not look at each other."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/driver":
                return super().do_GET()
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(driver.encode())

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def main() -> None:
    if reason := missing():
        sys.exit(reason)
    given = [Path(one).resolve() for one in sys.argv[1:]]
    found = []
    for path in given:
        folder, pages = (path, sorted(path.rglob("*.html"))) if path.is_dir() else (path.parent, [path])
        for dark in (False, True):
            found += findings(folder, pages, dark=dark)
    for one in found:
        print(f"{one['impact']}: {one['url']} at {one['width']} px, {one['theme']}: {one['rule']}: {one['node']}")
    sys.exit(bool(serious(found)))


if __name__ == "__main__":
    main()
