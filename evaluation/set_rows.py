"""The rows of a csv set as its publisher's files give them: a table, what is joined to it, the images that it names."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inputs import conventions, metadata
from inputs.dicom import header_text
from inputs.files import composed, images_below, is_system
from inputs.selection import Selection

Row = dict[str, str]
Numbered = list[tuple[int, Row]]  # with the number of the table's row, from 1

# {column}, {column#what it begins with, left out}, {*new column}, or a * of no name
_FIELD = re.compile(r"\{(?P<star>\*?)(?P<name>[^{}#*]+)(#(?P<prefix>[^{}]*))?\}|(?P<any>\*)")


@dataclass(frozen=True)
class PathTemplate:
    """Where a row's image lies: `images/{study_id}/{image_id}.dicom`, relative to the folder of the images.

    A column's name in braces stands for the row's cell, `{path#/mnt/}` for it without that beginning. `*` stands for
    what the table does not say, within a name: the files on disk say it, and each that fits is an image of the row.
    `{*patient}` is such a part that becomes a column of its own.
    """

    text: str

    def __post_init__(self) -> None:
        rest = _FIELD.sub("", self.text)
        if "{" in rest or "}" in rest:
            raise ValueError(
                f"the path {self.text!r} has a brace that is no {{column}}, {{column#prefix}}, {{*column}}"
            )
        metadata.inside(rest, "the catalog")

    @property
    def columns(self) -> list[str]:
        """Names of the columns that it is filled from, as metadata.read_table spells them."""
        return [metadata.column_name(m["name"]) for m in _FIELD.finditer(self.text) if m["name"] and not m["star"]]

    @property
    def captured(self) -> list[str]:
        """Names of the columns that the files on disk give."""
        return [metadata.column_name(m["name"]) for m in _FIELD.finditer(self.text) if m["star"]]

    @property
    def searched(self) -> bool:
        """Whether the disk is asked which files there are."""
        return "*" in self.text

    def fill(self, row: Row) -> tuple[str, str, str] | None:
        """A row's path with `*` as it stands, as a glob pattern, and as a regular one whose groups are `captured`.

        None where a column that the path is made of is empty.
        """
        shown, pattern, expression, last = "", "", "", 0
        for m in _FIELD.finditer(self.text):
            literal, last = self.text[last : m.start()], m.end()
            if m["star"] or m["any"]:
                cell, found, exact = "*", "*", "([^/]+?)" if m["star"] else "[^/]*"
            else:
                cell = row[metadata.column_name(m["name"])]
                if conventions.no_value(cell):
                    return None
                cell = conventions.whole_number(cell).removeprefix(m["prefix"] or "")  # 20586908.0, of a spreadsheet
                found, exact = glob.escape(cell), re.escape(cell)
            shown += literal + cell
            pattern += glob.escape(literal) + found
            expression += re.escape(literal) + exact
        end = self.text[last:]
        return shown + end, pattern + glob.escape(end), expression + re.escape(end)


def template_of(entry: Mapping[str, Any]) -> PathTemplate | None:
    """An entry's column of images, where it is a path made of several columns; ValueError names a fault of it."""
    image = entry.get("columns", {}).get("image", "image")
    return PathTemplate(image) if "{" in image else None


def tables_of(entry: Mapping[str, Any]) -> list[Path]:
    """The files of an entry's table and of what is joined to it: a workbook of that name where there is no .csv."""
    names = [entry.get("table", "table.csv"), *([entry["join"]["table"]] if "join" in entry else [])]
    files = [Path(entry["path"]) / name for name in names]
    books = [file.with_suffix(".xlsx") for file in files]
    return [book if book.is_file() and not file.exists() else file for file, book in zip(files, books, strict=True)]


def read_rows(
    name: str, entry: Mapping[str, Any], table: Path, label: Sequence[str], needed: Iterable[str]
) -> tuple[Numbered, list[str]]:
    """The rows of an entry's table by its columns' names, joined, with the path of an image each, and remarks on them.

    Args:
        label: the columns of the class, or of several findings, by which one of several joined rows counts.
        needed: all columns that the set is read by; `image` is made where the entry has a template for it.

    Raises:
        FileNotFoundError: the table that is joined is not there.
        ValueError: a column is not there, and as metadata.read_table; rows that cannot be joined to one.
    """
    template, join = template_of(entry), entry.get("join")
    made = {"image", *template.captured} if template else set()
    needed = [*(template.columns if template else ()), *(column for column in needed if column not in made)]
    remarks: list[str] = []
    if join is None:
        numbered = list(enumerate(metadata.read_table(table, needed), 1))
    else:
        numbered, remarks = _joined(name, join, table, tables_of(entry)[1], label, needed)
    if template:
        root = Path(entry.get("images") or entry["path"])
        header = {keyword: metadata.column_name(column) for keyword, column in entry.get("header", {}).items()}
        numbered, lines = _with_images(numbered, template, root, header, table)
        remarks += lines
    if (selection := Selection(entry.get("rows", ""), f'{name}, "rows"')) and numbered:
        kept = selection.of([row for _, row in numbered], str(table))
        remarks.append(f"{table}: {sum(kept):,} of {len(kept):,} rows are left by {selection.text}")
        remarks += _labels_gone(numbered, kept, label, table)
        numbered = [one for one, keep in zip(numbered, kept, strict=True) if keep]
    return numbered, remarks


def _labels_gone(numbered: Numbered, kept: Sequence[bool], label: Sequence[str], table: Path) -> list[str]:
    """A line about labels that none of the rows has which an entry's "rows" leave: an odd one should not go unseen."""
    if len(label) > 1:
        return []
    cells = [row[label[0]] for _, row in numbered]
    there = {cell for cell, keep in zip(cells, kept, strict=True) if keep}
    gone = Counter(cell for cell in cells if cell not in there and not conventions.empty(cell))
    named = ", ".join(f"{cell!r} ({n} rows)" for cell, n in gone.most_common(10))
    return [f"{table}: without a row of {label[0]} {named}"] if gone else []


def _joined(
    name: str, join: Mapping[str, Any], table: Path, other: Path, label: Sequence[str], needed: Sequence[str]
) -> tuple[Numbered, list[str]]:
    """The table's rows, each with the cells of the row of another table that goes with it.

    A cell that the key `any` names for its column goes with every row. A column of both tables has the first one's
    cells. Rows without a partner are left out, and counted.
    """
    if not other.is_file():
        raise FileNotFoundError(f"{name}: {other} does not exist, which is joined to {table}")
    on = join["on"] if isinstance(join["on"], dict) else {column: column for column in join["on"]}
    on = {metadata.column_name(own): metadata.column_name(theirs) for own, theirs in on.items()}
    every = {metadata.column_name(column): {*map(_key, cells)} for column, cells in join.get("any", {}).items()}
    rows, others = metadata.read_table(table, on), metadata.read_table(other, on.values())
    there = {*(rows[0] if rows else needed), *(others[0] if others else ())}
    if missing := [column for column in needed if column not in there]:
        raise ValueError(f"{table} and {other}: no column {', '.join(missing)}; found {', '.join(sorted(there))}")
    by_key: dict[tuple[str | None, ...], list[int]] = defaultdict(list)
    for i, row in enumerate(others):
        cells = {theirs: _key(row[theirs]) for theirs in on.values()}
        key = tuple(None if cell in every.get(theirs, ()) else cell for theirs, cell in cells.items())
        if "" not in key:  # an empty cell is no name that two rows share
            by_key[key].append(i)
    masks = {tuple(part is None for part in key) for key in by_key}
    numbered, used, several = [], set(), 0
    for number, row in enumerate(rows, 1):
        cells = tuple(_key(row[own]) for own in on)
        keys = (tuple(None if free else c for free, c in zip(mask, cells, strict=True)) for mask in masks)
        found = sorted(i for key in keys for i in by_key.get(key, ()))
        used.update(found)
        several += len(found) > 1
        if found:
            partner = _gravest([others[i] for i in found], label, join, f"{table}, row {number}: {other}")
            numbered.append((number, {**{k: v for k, v in partner.items() if k not in row}, **row}))
    remarks = []
    if lost := len(rows) - len(numbered):
        remarks.append(f"{table}: {lost:,} of {len(rows):,} rows are left out, no row of {other} goes with them")
    if rows and not numbered:
        keys = ", ".join(own if own == theirs else f"{own} and {theirs}" for own, theirs in on.items())
        first = f"{_first(rows, on)} and {_first(others, on.values())}"
        raise ValueError(f"no row of {table} goes with one of {other} by {keys}, first {first}")
    if lost := len(others) - len(used):
        remarks.append(f"{other}: {lost:,} of {len(others):,} rows go with no row of {table}")
    if several:
        remarks.append(f"{table}: {several:,} rows go with several of {other}, of which the gravest counts")
    return numbered, remarks


def _first(rows: Sequence[Row], columns: Iterable[str]) -> str:
    """The cells of the first row, for people."""
    return f"({', '.join(rows[0][column] for column in columns)})" if rows else "no row"


def _key(cell: str) -> str:
    """A cell as it is compared: 1 and 1.0 are the same, and so are all ways to write nothing."""
    return "" if conventions.empty(cell) else conventions.whole_number(cell)


def _gravest(rows: Sequence[Row], label: Sequence[str], join: Mapping[str, Any], where: str) -> Row:
    """Of the rows that go with one row the one that counts: by the join's key `gravest_first`, an empty label last."""
    own = [column for column in label if column in rows[0]]
    cells = [[_key(row[column]) for column in own] for row in rows]
    labels = [", ".join(one) if any(one) else "" for one in cells]  # of several findings, all
    if len(distinct := set(filter(None, labels))) <= 1 and (own or len(rows) == 1):
        return rows[next((i for i, named in enumerate(labels) if named), 0)]
    order = [_key(name) for name in join.get("gravest_first", ())]
    if not own:
        raise ValueError(
            f"{where} has {len(rows)} rows for it, and no column {' or '.join(label)} to tell which counts"
        )
    if other := sorted(distinct - set(order)):
        raise ValueError(
            f"{where} has rows of several labels for it, {', '.join(other)} among them: "
            '"gravest_first" of the "join" says which of them counts'
        )
    ranks = [order.index(named) if named else len(order) for named in labels]
    return rows[ranks.index(min(ranks))]


def _with_images(
    numbered: Numbered, template: PathTemplate, root: Path, header: Mapping[str, str], table: Path
) -> tuple[Numbered, list[str]]:
    """A row for each image that a row's path stands for; where the disk has none the path stays as it is written.

    Args:
        header: {keyword of a DICOM element: column}: of the files that fit, those whose header says what the row says.
    """
    if numbered and (twice := [column for column in template.captured if column in numbered[0][1]]):
        raise ValueError(f"{table} has a column {twice[0]}: call the part {{*{twice[0]}}} of {template.text} otherwise")
    kept: Numbered = []
    read: dict[str, dict[str, str]] = {}  # {file: its elements}: two breasts of a patient ask for the same files
    fitting, taken, absent, damaged, several = {}, set(), [], {}, 0
    for number, row in numbered:
        if (filled := template.fill(row)) is None:
            kept.append((number, {**row, "image": "", **dict.fromkeys(template.captured, "")}))
            continue
        shown, pattern, expression = filled
        metadata.inside(shown, f"{table}, row {number}")
        if not template.searched:
            kept.append((number, {**row, "image": shown}))
            continue
        found = []
        for file in sorted(_files(root, pattern)):
            if header and file not in read and file not in damaged:
                try:
                    read[file] = {keyword: _said(root / file, keyword) for keyword in header}
                except ValueError as error:
                    damaged[file] = error
            fitting[file] = None
            if file not in damaged and all(
                read[file][word].lower() == row[column].lower() for word, column in header.items()
            ):
                captured = re.fullmatch(expression, file)
                assert captured is not None
                found.append({**row, "image": file, **dict(zip(template.captured, captured.groups(), strict=True))})
        taken.update(image["image"] for image in found)
        several += len(found) > 1
        if not found:  # named, counted and refused where it is read, like any file that is not there
            # With what its header would say: two breasts of a patient are not one image.
            shown += f" ({', '.join(f'{word} {row[column]}' for word, column in header.items())})" if header else ""
            absent.append(shown)
            found = [{**row, "image": shown, **dict.fromkeys(template.captured, shown)}]
        kept += [(number, image) for image in found]
    if damaged:
        first = next(iter(damaged.values()))
        raise ValueError(f"{table}: {len(damaged):,} files do not say which row they are of: {first}")
    remarks = []
    if absent:
        remarks.append(f"{table}: {len(absent):,} rows have no file below {root} that fits, first {absent[0]}")
    if several and not header:
        remarks.append(f"{table}: {several:,} rows have several files that fit, each an image of its own")
    if other := [file for file in fitting if file not in taken]:
        what = " and ".join(header)
        remarks.append(f"{root}: {len(other):,} files are of no row, by {what} in their headers, first {other[0]}")
    return kept, remarks


def _said(file: Path, keyword: str) -> str:
    """What a DICOM file's header says by a keyword; ValueError where it says nothing."""
    if text := header_text(file, keyword):
        return text
    raise ValueError(f"{file} has no {keyword} in its header")


def files_without_row(entry: Mapping[str, Any]) -> tuple[Path, list[str]]:
    """The folder of an entry's images, and those below it that no row of its table names, whatever its split or label.

    A file that a row's path would fit is of that row, and so are both breasts' where headers tell them apart.
    """
    table, template = tables_of(entry)[0], template_of(entry)
    root = Path(entry.get("images") or entry["path"])
    rows = metadata.read_table(table, template.columns if template else ())
    named: set[str] = set()
    if template is None:
        image = metadata.column_name(entry.get("columns", {}).get("image", "image"))
        named.update(composed(metadata.plain_path(row[image])) for row in rows if image in row)
        folder = root
    else:
        for row in rows:
            shown, pattern, _ = template.fill(row) or ("", "", "")
            named.update(map(composed, _files(root, pattern) if template.searched else [shown]))
        folder = root / os.path.dirname(re.split(r"[{*]", template.text)[0])
    below = (Path(file).relative_to(root).as_posix() for file in images_below(folder))
    return folder, sorted(file for file in below if composed(file) not in named)


def _files(root: Path, pattern: str) -> Iterable[str]:
    """Files below a folder that fit a glob pattern, with `/`; not what an operating system left there."""
    for file in glob.iglob(pattern, root_dir=root):
        file = file.replace(os.sep, "/")
        if not any(map(is_system, file.split("/"))) and (root / file).is_file():
            yield file
