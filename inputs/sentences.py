"""Reports: their sections as one text, its sentences, and which of them a training step reads."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import numpy as np

from inputs.conventions import no_value

# A stop behind one of these ends no sentence; a word of one letter (an initial, "C. difficile") has its own rule.
ABBREVIATIONS = (
    "approx", "ca", "cf", "dr", "e.g", "et al", "fig", "figs", "i.e", "max", "min", "mr", "mrs", "ms", "no", "nos",
    "prof", "resp", "st", "vs",
)  # fmt: skip
END = re.compile(r"[.!?][)\]\"']*\s+")
NO_END = re.compile(rf"(?:^|[\s(])(?:{'|'.join(map(re.escape, ABBREVIATIONS))}|[a-z])\.$", re.IGNORECASE)
NUMBER = re.compile(r"\d+[.)]$")  # of a list's item, which belongs to what follows


def joined(sections: Iterable[str]) -> str:
    """The sections of a report as one text, each ended as a sentence; one that stands for none is left out."""
    texts = [text.strip() for text in sections if not no_value(text)]
    return " ".join([*(text if text.endswith((*".!?:;",)) else f"{text}." for text in texts[:-1]), *texts[-1:]])


def sentences(text: str) -> list[str]:
    """The sentences of an English report in their order, with single blanks: joined by a blank they are the text."""
    found, start = [], 0
    for end in END.finditer(text):
        sentence = " ".join(text[start : end.end()].split())
        if not (NO_END.search(sentence) or NUMBER.fullmatch(sentence)):
            found.append(sentence)
            start = end.end()
    return [*found, " ".join(text[start:].split())] if text[start:].strip() else found


def draw_sentences(text: str, length: Callable[[str], int], most: int, rng: np.random.Generator) -> str:
    """A text that fits as it is; of a longer one, sentences drawn at random up to the first that no longer fits.

    They stay in the order of the text. A sentence that is too long by itself is drawn alone.

    Args:
        length: tokens of a text, special ones included.
        most: tokens that the text tower reads.
    """
    if length(text) <= most:
        return text
    parts = sentences(text)
    drawn: list[int] = []
    for i in rng.permutation(len(parts)).tolist():
        if drawn and length(" ".join(parts[k] for k in sorted([*drawn, i]))) > most:
            break
        drawn.append(i)
    return " ".join(parts[k] for k in sorted(drawn))
