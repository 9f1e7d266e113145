"""Names out of files as text: in a figure, in Markdown and in TeX nothing in them is markup."""

from __future__ import annotations

import re


def one_line(text: str) -> str:
    """A text without line breaks and other control characters, and in what UTF-8 can hold."""
    text = text.encode("utf8", "backslashreplace").decode()
    return re.sub("[\x00-\x1f\x7f-\x9f\u2028\u2029]+", " ", text)


_MARKDOWN = re.compile(
    r"[\\`*\[\]<>|#~$]"
    r"|(?<![^\W_])_|_(?![^\W_])"  # within a word it is no markup
    r"|&(?=#?\w+;)"
    r"|^ *(?:[-+=](?!\d)|\d+(?=[.)](?:\s|$)))"  # at the start: a list, a line below a heading
)


def markdown(text: str) -> str:
    """A text in which Markdown's signs stand for themselves, in a paragraph, a heading, a table's cell and a link."""
    return _MARKDOWN.sub(_escaped, one_line(text).strip())


def _escaped(found: re.Match[str]) -> str:
    sign = found[0]
    return f"{sign}\\" if sign.strip().isdigit() else f"{sign[:-1]}\\{sign[-1]}"  # 1\. has the stroke before its point


_TEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\textquotedbl{}",
    "[": "{[}", "]": "{]}", "*": "{*}",  # after the end of a table's line they would be its argument
    "-": "-{}",  # of two or more, which would become a dash
    "–": "--", "−": "$-$", "×": r"$\times$",
}  # fmt: skip
_TEX_SIGNS = re.compile("-(?=-)|[" + re.escape("".join(_TEX).replace("-", "")) + "]")


def tex(text: str) -> str:
    """A text in which TeX's signs stand for themselves."""
    return _TEX_SIGNS.sub(lambda found: _TEX[found[0]], one_line(text))
