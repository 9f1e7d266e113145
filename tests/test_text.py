"""Names are shown as text: Markdown by markdown-it's rules, TeX by a small reader, figures by what their SVG says."""

import re
from html import unescape
from xml.etree import ElementTree

import numpy as np
import pytest

from evaluation import metrics
from reporting import figures, plots, text

NAMES = [
    r"$x^2$ costs $5", "$x^2$", r"$\no$", r"a_b _c_ __d__ e_", "{x} ^ ~ \\ & % #", "*a* **b** `c` ~~d~~",
    "<b>bold</b> <!-- x", "[a](http://x) ![b](c)",
    r"a|b \| c\|d \\", "&amp; &#65; & x", "# head", "- item", "+ item", "1. item", "12) item", "---", "===", "> quote",
    "two\nlines\r\nand\tmore", "-5 dB", "3.5T", r"\textbf{x} \input{y}", "[opt] * x", "a--b---c",
    '"quoted" \'text\'', "_hidden",
    "ViT (mammo + x-ray)", "日本 ü", 'id="x" url(#y) #010203', "$", "\\", "|", "nul\0here", "]", "a]b",
]  # fmt: skip
PLAIN = ["ViT (mammo + x-ray)", "vit_mammo/calc", "Radiologist: BI-RADS assessment", "80.12 (75.0 to 85.1)", "-5"]


def shown(name: str) -> str:
    """What a reader sees of it on one line."""
    return re.sub(r"[\0-\x1f]+", " ", name)


@pytest.mark.parametrize("name", NAMES)
def test_markdown_shows_a_name_as_text(name):
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable(["table", "strikethrough"])
    escaped = text.markdown(name)
    source = f"# {escaped}\n\n| {escaped} | x |\n| --- | --- |\n| y | {escaped} |\n\n{escaped} never\n\n"
    html = parser.render(source + f"![{escaped}](f.svg)\n\n- {escaped}\n")
    wanted = shown(name).replace("\0", "\ufffd")
    for pattern in (r"<h1>(.*)</h1>", r"<th>(.*)</th>\n<th>x", r"y</td>\n<td>(.*)</td>", r"<p>(.*) never</p>",
                    r'alt="(.*)" />', r"<li>(.*)</li>"):  # fmt: skip
        found = re.search(pattern, html)
        assert found and unescape(found[1]) == wanted, (pattern, source, html)


def test_ordinary_names_are_the_same_in_markdown_and_tex():
    for name in PLAIN:
        assert text.markdown(name) == name
        assert text.tex(name).replace(r"\_", "_") == name


COMMANDS = {
    r"\textbackslash{}": "\\", r"\textasciicircum{}": "^", r"\textasciitilde{}": "~", r"\textless{}": "<",
    r"\textgreater{}": ">", r"\textbar{}": "|", r"\textquotedbl{}": '"', r"\{": "{", r"\}": "}", r"\$": "$", r"\&": "&",
    r"\%": "%", r"\_": "_", r"\#": "#", "{[}": "[", "{]}": "]", "{*}": "*", "-{}": "-",
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_tex_shows_a_name_as_text(name):
    """Read back token by token: no sign that TeX acts upon is left outside of the commands that print one."""
    token = re.compile(
        "|".join(map(re.escape, sorted(COMMANDS, key=len, reverse=True))) + r"|[^\\{}$&%_#^~<>|\"\[\]*\n]"
    )
    escaped, at, read = text.tex(name), 0, ""
    while at < len(escaped):
        found = token.match(escaped, at)
        assert found, f"{escaped[at:]!r} in {escaped!r}"
        read, at = read + COMMANDS.get(found[0], found[0]), found.end()
    assert read == shown(name) and "--" not in escaped


def words(svg: str) -> list[str]:
    return ["".join(node.itertext()) for node in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.parametrize("name", [name for name in NAMES if len(name) < 46])
def test_figures_show_a_name_as_text(name):
    interval, x = metrics.Interval(0.5, 0.4, 0.6), np.array([0.0, 1.0])
    wanted = shown(name)
    forest = figures.forest([(name, interval)], name, "axis", synthetic=False)
    curves = figures.curves([(name, x, x, x[:0], x[:0])], name, ("x", "y"), synthetic=False)
    confusion = figures.confusion(np.eye(2), ["a", name], name, synthetic=False)
    gallery = plots.Gallery()
    for key, svg in (("forest", forest), ("curves", curves), ("confusion", confusion)):
        gallery.add(key, name, svg, "file")
        svg = gallery.found[key].svg
        squeezed = [" ".join(word.split()) for word in words(svg)]
        if key == "confusion":  # a long class name stands in several lines
            told = "".join(wanted.replace("_", " ").split())
            assert told in "".join("".join(squeezed).split()), words(svg)
        else:
            assert " ".join(wanted.split()) in squeezed, (key, words(svg))
        assert ElementTree.fromstring(svg).get("aria-label") == wanted


def test_two_figures_share_no_id():
    gallery, svg = plots.Gallery(), figures.flow([("a", ""), ("b", "c")], "t", synthetic=False)
    for i, title in enumerate(("a/b: x", "a_b: x", "A b: x")):
        gallery.add(f"f{i}", title, svg, "file")
    ids = [found for figure in gallery.found.values() for found in re.findall(r'\bid="([^"]*)"', figure.svg)]
    assert len(ids) > 6 and len(set(ids)) == len(ids)


def test_a_name_that_utf8_cannot_hold_is_still_shown():
    assert text.one_line("a\udcffb") == "a\\udcffb"
