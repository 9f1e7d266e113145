"""What the tables of others call things: splits, patients, and what is not there."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

from inputs.files import composed

SPLIT_NAMES = {
    "train": ("train", "training", "restval"),  # restval: Karpathy's splits of COCO and Flickr30k
    "validation": ("validation", "valid", "val", "validate", "dev"),
    "test": ("test", "testing"),
}
SPLIT_OF = {name: split for split, names in SPLIT_NAMES.items() for name in names}

# Columns that tell which images show the same together: two views of a breast, of a chest.
STUDY_COLUMNS = ("study", "study_id", "studyid", "study_instance_uid", "studyinstanceuid")
# Columns that tell what belongs together, the widest first: a patient has studies, a study has images.
GROUP_COLUMNS = (
    "group", "group_id", "patient", "patient_id", "patientid", "patient_name", "patientname", "mrn", "pid", "subject",
    "subject_id", "subjectid", "participant", "participant_id", "participantid", "case", "case_id", "caseid",
    "record_id", "recordid", *STUDY_COLUMNS,
)  # fmt: skip
# What pandas, R and spreadsheets write for an empty cell, or for one that could not be computed.
EMPTY = (
    "", "nan", "na", "n/a", "<na>", "nat", "null", "#n/a", "#value!", "#ref!", "#name?", "#num!", "#null!", "#div/0!",
)  # fmt: skip
MARKS = ("none", "-", "?")  # what people and Python write for it; a class or an answer can be called so, too
LONGEST_MARK = max(map(len, (*EMPTY, *MARKS)))  # what is longer need not be looked up: millions of captions are


def split_key(cell: str) -> str:
    """A split's name as it is compared: "Train" and " train" are train."""
    return cell.strip().lower()


def left_out(rows: Counter[str], which: str, known: Iterable[str]) -> str:
    """The line about rows whose splits nobody asked for, by their names."""
    named = ", ".join(f"{name!r} {n}" for name, n in rows.most_common(10))
    return f"{rows.total()} rows of {which} left out: {named}; known are {', '.join(known)}"


def column_key(name: str) -> str:
    """A column's name as it is compared: `Patient ID`, `patient-id` and R's `Patient.ID` are patient_id."""
    return re.sub(r"[\s._-]+", "_", name.strip().lower())


def group_column(header: Iterable[str]) -> str | None:
    """The first of GROUP_COLUMNS in a header, as the header spells it; None for none."""
    spelled = {column_key(name): name for name in header}
    return next((spelled[name] for name in GROUP_COLUMNS if name in spelled), None)


def group_unit(column: str) -> str:
    """What a column of groups tells apart, in words."""
    people = any(name in column.lower() for name in ("patient", "subject", "participant"))
    return "patients" if people or column.lower() in ("mrn", "pid") else "groups"


def empty(cell: str) -> bool:
    """Whether a cell holds nothing, or what a program writes for that: so of classes and answers."""
    return cell.strip().lower() in EMPTY


def no_value(cell: str) -> bool:
    """Whether a cell says that there is nothing: so of patients, captions and paths, which nobody calls by MARKS."""
    text = cell.strip()
    return len(text) <= LONGEST_MARK and (text.lower() in EMPTY or text.lower() in MARKS)


def group_name(cell: str, alone: str) -> str:
    """The group that a cell names, in one form of numbers, blanks and accented letters; `alone` where it names none."""
    return alone if no_value(cell) else composed(" ".join(whole_number(cell.strip()).split()))


def look(name: str) -> str:
    """The same for names that differ in case, blanks, the form of accented letters or a number's zeros alone."""
    plain = " ".join(composed(whole_number(name.strip())).casefold().split())
    return str(int(plain)) if plain.isdecimal() else plain


def alike(names: Iterable[str]) -> list[list[str]]:
    """The names by their `look`, in order."""
    by_look = defaultdict(list)
    for name in sorted(set(names)):
        by_look[look(name)].append(name)
    return list(by_look.values())


def crossing(splits_of: Mapping[str, Iterable[str]]) -> list[str]:
    """The groups in several splits, in words: by their name, or by names that look alike and are one by all odds.

    Args:
        splits_of: {group: the splits it is in}.
    """
    several = [names for names in alike(splits_of) if len({split for n in names for split in splits_of[n]}) > 1]
    differ = " (which differ in case, blanks, accents or zeros alone)"
    return [" and ".join(map(repr, names)) + differ * (len(names) > 1) for names in several]


def whole_number(cell: str) -> str:
    """`1.0` as 1, which a spreadsheet makes of a column with an empty cell; any other text as it is."""
    digits, point, zeros = cell.partition(".")
    plain = digits.removeprefix("-")
    return digits if point and not zeros.strip("0") and plain.isdecimal() and str(int(plain)) == plain else cell
