"""What the tables of others call things: splits, patients, and what is not there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

SPLIT_NAMES = {
    "train": ("train", "training", "restval"),  # restval: Karpathy's splits of COCO and Flickr30k
    "validation": ("validation", "valid", "val", "validate", "dev"),
    "test": ("test", "testing"),
}
SPLIT_OF = {name: split for split, names in SPLIT_NAMES.items() for name in names}

# Columns that tell what belongs together, the widest first: a patient has studies, a study has images.
GROUP_COLUMNS = (
    "group", "group_id", "patient", "patient_id", "patientid", "patient_name", "patientname", "subject", "subject_id",
    "subjectid", "case", "case_id", "caseid", "study", "study_id", "studyid", "study_instance_uid", "studyinstanceuid",
)  # fmt: skip
NO_VALUE = ("", "nan", "<na>", "#n/a", "null")  # what pandas and spreadsheets write for an empty cell


def split_key(cell: str) -> str:
    """A split's name as it is compared: "Train" and " train" are train."""
    return cell.strip().lower()


def left_out(rows: Counter[str], which: str, known: Iterable[str]) -> str:
    """The line about rows whose splits nobody asked for, by their names."""
    named = ", ".join(f"{name!r} {n}" for name, n in rows.most_common(10))
    return f"{rows.total()} rows of {which} left out: {named}; known are {', '.join(known)}"


def group_column(header: Iterable[str]) -> str | None:
    """The first of GROUP_COLUMNS in a header of lower case, where a space may stand for `_`; None for none."""
    spelled = {name.replace(" ", "_"): name for name in header}
    return next((spelled[name] for name in GROUP_COLUMNS if name in spelled), None)


def group_unit(column: str) -> str:
    """What a column of groups tells apart, in words."""
    return "patients" if "patient" in column or "subject" in column else "groups"


def no_value(cell: str) -> bool:
    """Whether a cell says that there is nothing."""
    return cell.strip().lower() in NO_VALUE


def group_name(cell: str, alone: str) -> str:
    """The group that a cell names, in one spelling of a number; `alone` where it names none."""
    return alone if no_value(cell) else whole_number(cell.strip())


def whole_number(cell: str) -> str:
    """`1.0` as 1, which a spreadsheet makes of a column with an empty cell; any other text as it is."""
    digits, point, zeros = cell.partition(".")
    plain = digits.removeprefix("-")
    return digits if point and not zeros.strip("0") and plain.isdecimal() and str(int(plain)) == plain else cell
