"""Which captions a run keeps: lists of words by name, or a regular expression."""

from __future__ import annotations

import re

# Stems of words that name the kind of image. "Mammary", mammoplasty and the Mammotome make no mammogram;
# panoramic and lateral views may be CT; angiography and fluoroscopy use x-rays but look like no radiograph.
MAMMO_WORDS = (
    r"mammogra",  # mammogram, -graphy, -graphic, French mammographie
    r"galactogra",  # a mammogram with contrast in the ducts
    r"breast tomosynthesis",
)
XRAY_WORDS = (
    r"\bx[\s\-\u2010-\u2015]{0,2}ray",  # X-ray, x ray, Xray, with any dash
    r"(?<!auto)(?<!micro)radio-?gra(?:ph|m|f)",  # radiograph, -graphy, -graphic, radiogram, radiografia
    r"r(?:oe|ö)ntgen",
    r"skiagra(?:m|ph)",
    r"\bcxr\b",
    r"\b(?:plain|chest)\b[\w\s]{0,12}\bfilms?\b",
    r"orthopanto",  # orthopantomogram, -graph, -graphy
    r"\bopg\b",
    r"\bcephalogra",
)
CAPTION_FILTERS = {"all": (), "mammo-xray": MAMMO_WORDS + XRAY_WORDS, "mammo": MAMMO_WORDS}


def caption_pattern(caption_filter: str) -> re.Pattern | None:
    """The pattern, blind to case, of a name in CAPTION_FILTERS or of a regular expression; None for all."""
    expression = "|".join(CAPTION_FILTERS.get(caption_filter, (caption_filter,)))
    try:
        return re.compile(expression, re.IGNORECASE) if expression else None
    except re.error as error:
        names = ", ".join(CAPTION_FILTERS)
        raise ValueError(
            f"the caption filter {caption_filter!r} is none of {names}, and no regular expression: {error}"
        ) from error
