"""A report's page as a headless Chromium lays it out."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import make_report

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

# What a page is like once it is laid out, told to the page that frames it.
MEASURE = """<script>addEventListener("load", () => {
  const box = e => e.getBoundingClientRect();
  const seen = e => box(e).width > 0;
  const figures = [...document.querySelectorAll("figure")].map(f => {
    const drawn = box(f.querySelector("svg, img, .gone")), img = f.querySelector("img");
    return [drawn.width, drawn.height, img ? img.naturalWidth : 1];
  });
  const texts = [...document.querySelectorAll("figure svg")].filter(seen).flatMap(svg => {
    const scale = box(svg).width / svg.viewBox.baseVal.width;
    return [...svg.querySelectorAll("text")].filter(t => t.textContent !== "SYNTHETIC")
      .map(t => scale * parseFloat(getComputedStyle(t).fontSize));
  });
  const frames = [...document.querySelectorAll(".wide")].filter(seen);
  const cut = frames.filter(f => f.scrollWidth > f.clientWidth);
  const first = frames.flatMap(f => [...f.querySelectorAll("tbody tr")].map(r => r.cells[1]).filter(Boolean));
  const cards = [...document.querySelectorAll(".card")].filter(seen);
  const style = getComputedStyle(document.body);
  STEPS
  parent.document.title = JSON.stringify({figures, smallest: Math.min(...texts),
    wide: document.documentElement.scrollWidth, width: innerWidth,
    background: style.backgroundColor, colour: style.color,
    cut: cut.length, reached: cut.filter(f => f.tabIndex === 0).length,
    cued: cut.filter(f => getComputedStyle(f).backgroundImage.includes("gradient")).length,
    firstNumbers: first.filter(seen).map(c => [box(c).left, box(c).left + 60]),
    cards: cards.length, pictures: cards.flatMap(c => [...c.querySelectorAll("img")]).map(i => i.naturalWidth),
    steps});
})</script>"""
# A frame, since a browser's own window is never narrower than 500 pixels.
FRAME = """<html><head><title></title></head><body style="margin: 0">
<iframe src="%s" width="%d" height="900" style="border: 0"></iframe></body></html>"""


def laid_out(path: Path, width: int, dark: bool, folder: Path, steps: str = "const steps = null;") -> tuple[dict, str]:
    """What MEASURE says of a page in a headless Chromium, and the console's messages.

    Args:
        steps: what a reader does on the page; leaves what it saw in `steps`.
    """
    assert BROWSER is not None
    copy = path.with_name(f"measured_{path.name}")  # beside the images that lie beside the page
    page = path.read_text("utf-8").replace(' loading="lazy"', "")  # all are there once the page is
    copy.write_text(page.replace("</body>", MEASURE.replace("STEPS", steps) + "</body>"), "utf-8")
    frame = folder / "frame.html"
    frame.write_text(FRAME % (copy.as_uri(), width), "utf-8")
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
         f"--user-data-dir={folder / 'user'}", "--allow-file-access-from-files",  # the frame may hear of what it holds
         f"--blink-settings=preferredColorScheme={0 if dark else 1}", f"--window-size={max(width, 500)},900",
         "--dump-dom", frame.as_uri()],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    copy.unlink()
    title = re.search(r"<title>(\{.*?\})</title>", done.stdout, re.DOTALL)
    assert title, done.stderr[-2000:]
    return json.loads(unescape(title[1])), "\n".join(re.findall(r".*CONSOLE.*", done.stderr))


def check_layout(path: Path, folder: Path) -> None:
    """On a desk and on a phone, light and dark: nothing is cut without a sign, and nothing is too small to read."""
    seen, number = {}, path.read_text("utf-8").count("<figure")
    for width in (1300, 420):
        for dark in (False, True):
            own = folder / f"{width}{dark}"
            own.mkdir(parents=True)
            found, console = laid_out(path, width, dark, own)
            assert console == "" and len(found["figures"]) == number
            assert all(w > 40 and h > 40 and natural > 0 for w, h, natural in found["figures"]), found["figures"]
            assert found["wide"] <= found["width"] == width  # tables scroll inside their frames, the page does not
            assert all(w <= found["width"] for w, *_ in found["figures"])
            assert number == 0 or found["smallest"] >= 10
            assert found["cut"] == found["cued"] == found["reached"]  # a shadow, and keys can scroll it
            assert all(right <= width for _, right in found["firstNumbers"]), found["firstNumbers"]
            assert all(natural > 20 for natural in found["pictures"]), found["pictures"]
            seen[width, dark] = found["background"], found["colour"]
    assert seen[1300, False] == seen[420, False] != seen[1300, True] == seen[420, True]


def report(runs: Path, *flags: str) -> tuple[dict, str]:
    """The page about a folder of runs, written beside it: what it shows, and its text."""
    page = make_report.main([str(runs), "--output-dir", str(runs.parent / "report"), *flags])
    return page, (runs.parent / "report" / "report.html").read_text("utf8")
