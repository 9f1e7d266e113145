"""The table of a labelled set of type csv: its rows, classes and groups, or one line about what is wrong with it."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.catalog import COUNT_AS
from evaluation.predictions import OWN_COLUMN
from evaluation.set_rows import Numbered, read_rows, template_of
from inputs import conventions, metadata
from inputs.files import composed
from inputs.selection import Selection, selected

_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")
UNIT_COLUMN = "unit "  # how a row calls its unit of a name


@dataclass(frozen=True)
class SetTable:
    """Both splits of a set's table, or all of its rows."""

    # image, label, group, split (as the entry calls it), the cells of several findings; units (UNIT_COLUMN) and the
    # table's columns (OWN_COLUMN) where the entry has units and subgroups
    rows: list[dict[str, str]]
    classes: list[str]  # in the order of their numbers; the findings' columns where there are several
    findings: np.ndarray | None  # (rows, k) 0, 1, or -1 where nothing is known
    positive: str | None  # the class that is looked for
    unit: str  # what a group is: patients or groups; images where the table tells nothing of the kind
    units: list[str]  # names of what several images are of
    remarks: list[str]  # lines about rows left out and what else a reader should know


def read_set_table(name: str, entry: dict[str, Any], table: Path, wanted: str | None) -> SetTable:
    """The rows of the two splits of a catalog entry, which are matched in any case and without blanks around them.

    `wanted` is the one that must be there. None: every row, whatever its split, for cross-validation; the table then
    needs no splits and groups may be in several.

    Labels that are the same whole number (0 and 0.0) are one class; labels that differ in case, blanks or the form of
    an accented letter alone are refused. A group, the patient, is whole in a split.

    Raises:
        ValueError: no such column or split, an image outside of its root; or all of these at once: rows without a
            label, labels that look alike, groups in both splits, an image twice. The message names file and row.
    """
    given, splits = entry.get("columns", {}), (entry["train"], entry["test"])
    columns = _Columns.of(entry)
    rows, remarks = read_rows(name, entry, table, columns.labels, columns.needed)
    _refuse_lacking([row for _, row in rows], columns, "group" in given, wanted is not None, table)
    numbered, lines = _wanted(rows, columns, splits, wanted, table)
    remarks += lines
    every = {row[columns.labels[0]] for _, row, _ in numbered}
    numbered, lines = _selected(numbered, columns, entry.get("where", ""), table)
    remarks += lines
    kept = [columns.sample(row, split, f"{table}, row {number}") for number, row, split in numbered]
    _refuse_alike(columns, [row for _, row, _ in numbered], table)
    named = [columns.group_of(row) for _, row, _ in numbered]
    faults = _shared(kept, named, splits)
    faults += _empty([(number, row[columns.image]) for number, row, _ in numbered], columns.image, conventions.no_value)
    if not columns.several:
        labels = [(number, row[columns.labels[0]]) for number, row, _ in numbered]
        faults += _empty(labels, columns.labels[0], conventions.empty)
        faults += _undeclared(name, entry.get("classes"), labels)
        remarks += _marks(labels, table)
    unit = "images"
    if rows and (columns.group in rows[0][1] or columns.units):
        by = columns.group if columns.group in rows[0][1] else " ".join(columns.units[-1][1])
        called = next((unit_name for unit_name, own in columns.units if own == (columns.group,)), by)
        unit = conventions.group_unit(called) if any(named) else unit
        remarks += _of_groups(named, table, by)
    elif rows and (column := conventions.group_column(rows[0][1])):
        remarks.append(_unnamed_group([(row[column], split) for _, row, split in numbered], table, column, splits))
    one, alike = one_spelling(row["label"] for row in kept if not conventions.empty(row["label"]))
    if faults := faults + alike:
        raise ValueError(f"{table}: {'; '.join(faults)}")
    if one:
        pairs = ", ".join(f"{label!r} as {plain!r}" for label, plain in sorted(one.items()))
        remarks.append(f"{table}: labels that are the same number are one class: {pairs}")
    kept = [row | {"label": one.get(row["label"], row["label"])} for row in kept]
    # Over both splits: a class that one of them lacks must not shift the others.
    classes = [str(c) for c in given["label"]] if columns.several else in_order({row["label"] for row in kept})
    if "classes" in entry:
        classes, lines = _declared(name, entry["classes"], classes, every, table)
        remarks += lines
    positive = _positive(name, entry.get("positive"), classes)
    for unit_name, _ in columns.units:
        _check_units(kept, f"{UNIT_COLUMN}{unit_name}", positive, bool(entry.get("ordered")), table)
    findings = None
    if columns.several:
        cells = [[_finding(row[c], entry, f"{table}, {row['image']}, {c}") for c in columns.labels] for row in kept]
        findings = np.array(cells).reshape(-1, len(columns.labels))
    return SetTable(kept, classes, findings, positive, unit, [unit_name for unit_name, _ in columns.units], remarks)


_InSplits = list[tuple[int, dict[str, str], str]]  # (number, row, split as the entry calls it)


@dataclass(frozen=True)
class _Columns:
    """Names in a csv set's table, as metadata.read_table spells them."""

    image: str
    split: str
    group: str
    labels: tuple[str, ...]  # one with class names, or one for each of several findings
    several: bool
    units: tuple[tuple[str, tuple[str, ...]], ...]  # (name, what together tells it) of units of images, narrow to wide
    subgroups: tuple[str, ...]

    @classmethod
    def of(cls, entry: dict[str, Any]) -> _Columns:
        """From a catalog entry."""
        given, name = entry.get("columns", {}), metadata.column_name
        labels = given.get("label", "label")
        image, split, group = (name(given.get(role, role)) for role in ("image", "split", "group"))
        several = isinstance(labels, list)
        units = tuple((called, tuple(map(name, own))) for called, own in units_of(entry).items())
        return cls(
            "image" if template_of(entry) else image, split, group,
            tuple(map(name, labels if several else [labels])), several, units,
            tuple(map(name, entry.get("subgroups", []))),
        )  # fmt: skip

    @property
    def needed(self) -> list[str]:
        """Those that a table must have."""
        own = [column for _, columns in self.units for column in columns]
        return list(dict.fromkeys([self.image, *self.labels, *own, *self.subgroups]))

    def sample(self, row: dict[str, str], split: str, where: str) -> dict[str, str]:
        """Image, label, group and split of a row, and what else is asked of it; an image without a group is one."""
        image = metadata.inside(row[self.image], where)
        label = "" if self.several else row[self.labels[0]]
        more = {column: row[column] for column in self.labels} if self.several else {}
        more |= {f"{OWN_COLUMN}{column}": row[column] for column in self.subgroups}
        more |= {f"{UNIT_COLUMN}{name}": unit_of(row, own) or image for name, own in self.units}
        return {"image": image, "label": label, "group": self.group_of(row) or image, "split": split, **more}

    def group_of(self, row: dict[str, str]) -> str:
        """The group of a row, "" for none: where the table has no groups its widest unit, which is as whole."""
        if self.group in row:
            return conventions.group_name(row[self.group], "")
        return unit_of(row, self.units[-1][1]) if self.units else ""


def units_of(entry: dict[str, Any]) -> dict[str, list[str]]:
    """{name: columns} of an entry's units; without names they are called by their columns."""
    unit = entry.get("unit", [])
    if isinstance(unit, dict):
        return {name: [own] if isinstance(own, str) else own for name, own in unit.items()}
    columns = [unit] if isinstance(unit, str) else unit
    return {" and ".join(columns): columns} if columns else {}


def unit_of(row: dict[str, str], columns: Sequence[str]) -> str:
    """The unit that a row's image is of, "" for none."""
    return " ".join(filter(None, (conventions.group_name(row[column], "") for column in columns)))


def _refuse_lacking(
    rows: Sequence[dict[str, str]], columns: _Columns, grouped: bool, splits: bool, table: Path
) -> None:  # fmt: skip
    """ValueError where the table has not the column of groups that the entry names, or none of splits."""
    if grouped and rows and columns.group not in rows[0]:
        raise ValueError(f"{table}: no column {columns.group}; found {', '.join(rows[0])}")
    if splits and rows and columns.split not in rows[0]:
        raise ValueError(
            f"{table}: no column {columns.split}; found {', '.join(rows[0])}; main_linear.py --cross-validate 5 needs "
            "none"
        )


def _wanted(
    rows: Numbered, columns: _Columns, splits: Sequence[str], wanted: str | None, table: Path
) -> tuple[_InSplits, list[str]]:
    """The rows of the entry's splits, or all, and a line about those that are left out."""
    if wanted is None:
        return [(number, row, "all") for number, row in rows], []
    numbered, remarks = _of_splits(rows, columns.split, splits, table)
    if not any(split == wanted for _, _, split in numbered):
        found = ", ".join(sorted({row[columns.split] for _, row in rows}))
        raise ValueError(f"{table}: no row of the split {wanted!r}; its splits: {found}")
    return numbered, remarks


def _selected(numbered: _InSplits, columns: _Columns, where: str, table: Path) -> tuple[_InSplits, list[str]]:
    """The rows that --where leaves, and lines about them."""
    label = "" if columns.several else columns.labels[0]
    cells = [(split, row.get(label, "")) for _, row, split in numbered]
    kept, lines = selected(Selection(where), [row for _, row, _ in numbered], str(table), cells, gone=True)
    return [one for one, keep in zip(numbered, kept, strict=True) if keep], lines


def _undeclared(name: str, given: Sequence[str] | None, labels: Sequence[tuple[int, str]]) -> list[str]:
    """What is wrong with labels, each with the number of its row, that are none of an entry's classes."""
    known = {conventions.whole_number(label) for label in given or ()}
    other = [
        label for _, label in labels if not conventions.empty(label) and conventions.whole_number(label) not in known
    ]
    if given is None or not other:
        return []
    return [f'the label {other[0]!r} is not among the "classes" of {name}: {", ".join(given)}']


def _declared(
    name: str, given: Sequence[str], found: Sequence[str], every: set[str], table: Path
) -> tuple[list[str], list[str]]:
    """The classes in the order that an entry declares, by the table's spelling, and a line about those without rows.

    Args:
        found, every: labels that are left, and those before --where, which takes a class that it empties away.
    """
    number = {conventions.whole_number(label): label for label in found}
    declared = [number.get(conventions.whole_number(label), label) for label in given]
    lost = set(map(conventions.whole_number, every)) - set(map(conventions.whole_number, found))
    declared = [label for label in declared if conventions.whole_number(label) not in lost]
    empty = [label for label in declared if label not in found]
    lines = [f'{table}: no row of class {", ".join(empty)}, which the "classes" of {name} declare'] if empty else []
    return declared, lines


def _refuse_alike(columns: _Columns, rows: Sequence[dict[str, str]], table: Path) -> None:
    """ValueError for two units that are called the same, as ("a b", "c") and ("a", "b c") are."""
    for _, own in columns.units:
        called: dict[str, tuple[str, ...]] = {}
        for row in rows:
            cells = tuple(conventions.group_name(row[column], "") for column in own)
            if called.setdefault(name := unit_of(row, own), cells) != cells:
                both = f"{', '.join(own)} are {called[name]} in one row and {cells} in another"
                raise ValueError(f"{table}: two units would be called {name!r}: {both}")


def _check_units(
    rows: Sequence[dict[str, str]], column: str, positive: str | None, ordered: bool, table: Path
) -> None:  # fmt: skip
    """ValueError for a unit of several groups, and for one of several classes of which none is known to count."""
    groups, labels = defaultdict(set), defaultdict(set)
    for row in rows:
        groups[row[column]].add(row["group"])
        labels[row[column]].add(row["label"])
    if several := [unit for unit, own in groups.items() if len(own) > 1]:
        raise ValueError(f"{table}: the unit {several[0]!r} is of {len(groups[several[0]])} groups; it is of one")
    mixed = [unit for unit, own in labels.items() if len(own) > 1 and positive not in own and not ordered]
    if mixed:
        raise ValueError(
            f"{table}: the unit {mixed[0]!r} has images of {' and '.join(sorted(labels[mixed[0]]))}: which of them it "
            'is say "positive" or "ordered": true (the last of "classes")'
        )


def _positive(name: str, given: Any, classes: Sequence[str]) -> str | None:
    """The class that an entry calls positive, a number in any form: "1", "1.0" or 1; ValueError where there is none."""
    if given is None or str(given) in classes:
        return None if given is None else str(given)
    plain = conventions.whole_number(str(given))
    if same := [label for label in classes if conventions.whole_number(label) == plain]:
        return same[0]
    near = [label for label in classes if conventions.look(label) == conventions.look(str(given))]
    hint = f" ({near[0]!r} differs in case, blanks, accents or zeros alone)" if near else ""
    raise ValueError(f"{name}: positive {given!r} is no class{hint}; choose from {', '.join(classes)}")


def in_order(names: Iterable[str]) -> list[str]:
    """Names of classes in the order of their numbers: sorted, as numbers where all are (-1, 0.5, 2, 10)."""
    names = sorted(names)
    return sorted(names, key=Decimal) if all(_NUMBER.fullmatch(name) for name in names) else names


def _of_splits(
    rows: Numbered, column: str, splits: Sequence[str], table: Path
) -> tuple[list[tuple[int, dict[str, str], str]], list[str]]:
    """(number, row, split) of the rows of the entry's splits, and a line about the others."""
    key = conventions.split_key
    if key(splits[0]) == key(splits[1]):  # the entry itself tells them apart by case
        key = str
    named = {key(split): split for split in splits}
    kept, others = [], Counter()
    for number, row in rows:
        if (split := named.get(key(row[column]))) is None:
            others[row[column]] += 1
        else:
            kept.append((number, row, split))
    return kept, [f"{table}: {conventions.left_out(others, 'other splits', splits)}"] if others else []


def _empty(cells: Sequence[tuple[int, str]], column: str, lacks: Callable[[str], bool]) -> list[str]:
    """What is wrong with a column of (row, cell) that has to be filled."""
    if not (rows := [(number, cell) for number, cell in cells if lacks(cell)]):
        return []
    more = f", nor have {len(rows) - 1} more" if len(rows) > 1 else ""
    texts = ", ".join(sorted({repr(cell) for _, cell in rows if cell}))
    return [f"row {rows[0][0]} has no {column}{more}" + (f" ({texts} is none)" if texts else "")]


def _marks(labels: Sequence[tuple[int, str]], table: Path) -> list[str]:
    """A line about classes that may stand for no label."""
    marks = Counter(label for _, label in labels if conventions.no_value(label) and not conventions.empty(label))
    named = ", ".join(f"{label!r} ({n} rows)" for label, n in marks.items())
    about = (
        f"{table}: a class is called {named}; where that says that nothing is known, leave its rows out of both splits"
    )
    return [about] if marks else []


def _of_groups(named: Sequence[str], table: Path, column: str) -> list[str]:
    """Lines about images that have no group, and about groups that may be one."""
    lines = [f"{table}: {alone} images have no {column}, and count by themselves"] if (alone := named.count("")) else []
    if several := [names for names in conventions.alike(named) if len(names) > 1]:
        first = " and ".join(map(repr, several[0]))
        apart = f"{len(several)} times values of {column} differ in case or zeros alone, and count each by itself"
        lines.append(f"{table}: {apart}, first {first}")
    return lines


def _unnamed_group(cells: Sequence[tuple[str, str]], table: Path, column: str, splits: Sequence[str]) -> str:
    """The line about a column of patients that the entry does not name."""
    shared = conventions.crossing(_splits_of((conventions.group_name(cell, ""), split) for cell, split in cells))
    crossing = f" ({len(shared)} of its values are in both {' and '.join(splits)})" if shared else ""
    return (
        f"{table} has a column {column!r} that the catalog entry does not name{crossing}, so splits and intervals are "
        f'over images; where it tells patients apart, add "columns": {{"group": "{column}"}}'
    )


def _splits_of(groups: Iterable[tuple[str, str]]) -> dict[str, set[str]]:
    """{group: its splits} from (group, split) of all rows; the empty one is none."""
    splits_of = defaultdict(set)
    for group, split in groups:
        splits_of[group].add(split)
    splits_of.pop("", None)
    return splits_of


def _shared(rows: Sequence[dict[str, Any]], named: Sequence[str], splits: Sequence[str]) -> list[str]:
    """What is wrong with groups and images: in both splits they would be tested on what was trained.

    Args:
        named: each row's group, "" for none.
    """
    faults = []
    if shared := conventions.crossing(_splits_of(zip(named, (row["split"] for row in rows), strict=True))):
        faults.append(f"{len(shared)} groups are in both {' and '.join(splits)}, first {shared[0]}")
    images = (row["image"] for row in rows if not conventions.no_value(row["image"]))  # `_empty` names the others
    number = Counter(composed(metadata.plain_path(image)) for image in images)
    if twice := [image for image, n in number.items() if n > 1]:
        more = f", and so are {len(twice) - 1} more" if len(twice) > 1 else ""
        faults.append(f"the image {twice[0]} is there twice{more}")
    return faults


def one_spelling(labels: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """{0.0: 0}, labels that are whole numbers where some are the same; what is wrong with others that look alike."""
    number = Counter(labels)
    several = [names for names in conventions.alike(number) if len(names) > 1]
    faults = []
    for group in several:
        if len({conventions.whole_number(label) for label in group}) > 1:
            rows = ", ".join(f"{label!r} ({number[label]} rows)" for label in group)
            faults.append(f"labels that differ in case, blanks, accents or zeros alone: {rows}")
    plain = {label: conventions.whole_number(label) for label in number} if several else {}
    return {label: text for label, text in plain.items() if text != label}, faults


def _finding(cell: str, entry: dict[str, Any], where: str) -> int:
    """0, 1, or -1 for what is to be skipped. CheXpert leaves blank what a report does not mention; -1 is uncertain."""
    if conventions.empty(cell):
        return COUNT_AS[entry.get("blank", "skip")]
    try:
        value = float(cell)
    except ValueError:
        value = None
    if value not in (0, 1, -1):
        raise ValueError(f"{where}: {cell!r} is not 0, 1, -1 or empty")
    return COUNT_AS[entry.get("uncertain", "skip")] if value == -1 else int(value)
