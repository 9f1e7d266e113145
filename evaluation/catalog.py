"""The catalog of labelled sets, dataset_catalog.json, and the class names and prompts beside it.

A set is one entry:

    path, train, test   where it lies, and the names of its two splits
    type                imagefolder (one folder a class), filelist (`<split>_images.npy` and `<split>_labels.npy`), csv
                        (a table with a row for each image) or special (a name in SPECIAL; or a name of
                        datasets.READERS, for retrieval)
    labels              class names in class order, an inner list for synonyms; or a name in labels.json
    templates           prompts with {} for the class name; or a name in templates.json
    metric              top1 (default), mean_per_class, mean_top1_top5 or roc_auc
    folders             imagefolder: the class folders in class order, where sorting them is not what is meant
    images              filelist, csv: the folder of the images where they lie outside of path
    table               csv: the table's file in path (table.csv)
    columns             csv: the names of its columns image, label, split and, where there is one, group, where they are
                        called otherwise. A group (the patient) is whole in a split and in a resample of the intervals;
                        without one each image counts by itself. A list of names for label: several findings of 0 and 1
                        for each image. image may be a path made of columns, `images/{study_id}/{image_id}.dicom`, see
                        set_rows.PathTemplate
    join                csv: {"table": another table in path, "on": the columns that are equal in both, a list, or
                        {column: what the other calls it}}; with "any": {its column: cells that go with every row}, and
                        "gravest_first": the labels by which one of several rows that go with an image counts
    header              csv: {keyword of a DICOM element: column}, of the files that a path with `*` fits those whose
                        header says what the row says
    rows                csv: an expression as --where takes, of the rows that are the set
    classes             csv: the classes in their order, where sorting the labels is not what is meant
    ordered             true: the classes stand in an order, which errors are measured by (metrics.ORDERED_METRICS)
    unit                csv: the column, or columns, that tell what several images are of (a breast, a study), which has
                        figures of its own; or {name: column or columns} of several such, the widest last
    subgroups           csv: columns whose values have figures of their own
    positive            csv: the class that is looked for, which has columns of its own in results
    blank, uncertain    csv with several findings: what an empty cell and a -1 count as: negative, positive or skip
    frame, window       csv: how files of several frames and of more than 8 bits are shown: first, middle or a number
                        from 1; [center, width]

All after type are optional, and for csv train and test too ("train" and "test" then). Without labels and templates
those of labels.json and templates.json under the set's own name are taken, else the class folders' names and "a photo
of a {}."; a published set keeps its metric and folders. Keys that start with "_" are notes.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import READERS
from evaluation.metrics import ORDERED_METRICS, SET_METRICS
from evaluation.set_rows import template_of
from inputs.cbis import CBIS_SETS
from inputs.display import Display, frame_of
from inputs.selection import Selection
from runtime.command_line import UsageError

log = logging.getLogger("medslip")

HERE = Path(__file__).resolve().parents[1]
CATALOG = HERE / "dataset_catalog.json"
TYPES = ("imagefolder", "filelist", "csv", "special")
REQUIRED = ("path", "type", "train", "test")
CSV_ONLY = (
    "table", "columns", "join", "header", "rows", "positive", "blank", "uncertain", "frame", "window", "classes",
    "unit", "subgroups",
)  # fmt: skip
OPTIONAL = ("labels", "templates", "metric", "folders", "images", "ordered", *CSV_ONLY)
COLUMNS = ("image", "label", "split", "group")
COUNT_AS = {"negative": 0, "positive": 1, "skip": -1}  # what an unclear finding counts as
DEFAULT_TEMPLATES = ["a photo of a {}."]
SPECIAL = ("cifar10", "cifar100", "mnist", "stl10", "digits", "cbis_calc", "cbis_mass")  # with readers of their own


class Catalog(dict[str, dict[str, Any]]):
    """{set: entry} of a catalog file, which errors about an entry name."""

    def __init__(self, entries: dict[str, dict[str, Any]], file: str | Path):
        super().__init__(entries)
        self.file = file


def read_catalog(path: str | Path = CATALOG) -> Catalog:
    """The catalog's sets, each entry checked.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no JSON; or an entry lacks a key, has an unknown one, or holds what its key does not allow. The
            message names the file, the entry and the valid choices.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"dataset catalog {path} does not exist")
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except ValueError as error:  # no JSON, or no UTF-8
        raise ValueError(f"dataset catalog {path} is not valid JSON: {error}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"dataset catalog {path} holds a {type(entries).__name__}, not {{set: entry}}")
    catalog = Catalog({name: entry for name, entry in entries.items() if not name.startswith("_")}, path)
    for name, entry in catalog.items():
        if isinstance(entry, dict) and entry.get("type") == "csv":
            catalog[name] = entry = {"train": "train", "test": "test", **entry}
        _check_entry(f"{path}: {name}", name, entry)
        if isinstance(entry["path"], str) and entry["path"]:  # relative to the catalog, wherever a command starts
            entry["path"] = os.path.join(os.path.dirname(os.path.abspath(path)), entry["path"])
    return catalog


def with_selection(name: str, entry: dict[str, Any], where: str) -> dict[str, Any]:
    """The entry with the rows that --where selects, which are a table's; UsageError for a set without one."""
    if not where:
        return entry
    if entry.get("type") != "csv":
        raise UsageError(f"--where selects rows of a table: of {', '.join(CBIS_SETS)} and sets of type csv, not {name}")
    Selection(where)  # what is no expression is said before anything is read
    return {**entry, "where": where}


def _check_entry(where: str, name: str, entry: dict[str, Any]) -> None:
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is a {type(entry).__name__}, not an object with {', '.join(REQUIRED)}")
    if lacking := [key for key in REQUIRED if key not in entry]:
        raise ValueError(f"{where} lacks {', '.join(lacking)}")
    if unknown := [key for key in entry if key not in REQUIRED + OPTIONAL and not key.startswith("_")]:
        raise ValueError(f"{where} has unknown keys {', '.join(unknown)}; choose from {', '.join(REQUIRED + OPTIONAL)}")
    if entry["type"] not in TYPES:
        raise ValueError(f"{where} has type {entry['type']!r}; choose from {', '.join(TYPES)}")
    if entry["type"] == "special" and name not in SPECIAL and name not in READERS:
        raise ValueError(f"{where} is no special set; those are {', '.join([*SPECIAL, *READERS])}")
    if entry.get("metric", "top1") not in SET_METRICS:
        raise ValueError(f"{where} has metric {entry['metric']!r}; choose from {', '.join(SET_METRICS)}")
    if "folders" in entry:
        if entry["type"] != "imagefolder":
            raise ValueError(f'{where}: only the type imagefolder has "folders"')
        folders = _strings(f'{where}, "folders"', entry["folders"])
        if len(set(folders)) != len(folders):
            raise ValueError(f'{where}: "folders" names a folder twice')
    if "labels" in entry:
        _labels_of(where, entry["labels"])
    if "templates" in entry:
        _templates_of(where, entry["templates"])
    if foreign := [key for key in CSV_ONLY if key in entry and entry["type"] != "csv"]:
        raise ValueError(f"{where}: only the type csv has {', '.join(foreign)}")
    columns = entry.get("columns", {})
    if not isinstance(columns, dict) or (unknown := [key for key in columns if key not in COLUMNS]):
        raise ValueError(f'{where}: "columns" names the columns {", ".join(COLUMNS)}; not {unknown or columns}')
    _check_rows(where, entry, columns)
    display_of(entry, where)
    for key in ("blank", "uncertain"):
        if entry.get(key, "skip") not in COUNT_AS:
            raise ValueError(f"{where} counts {key} as {entry[key]!r}; choose from {', '.join(COUNT_AS)}")
    _check_structure(where, entry, several=isinstance(columns.get("label"), list))


def _check_structure(where: str, entry: dict[str, Any], several: bool) -> None:
    """What an entry says of its classes' order, its units and its subgroups."""
    if not isinstance(entry.get("ordered", False), bool):
        raise ValueError(f'{where}: "ordered" is true or false, not {entry["ordered"]!r}')
    if entry.get("metric") in ORDERED_METRICS and not entry.get("ordered"):
        raise ValueError(f'{where}: the metric {entry["metric"]} is of classes in an order: add "ordered": true')
    for key in ("classes", "unit", "subgroups"):
        if key not in entry:
            continue
        if several:
            raise ValueError(f'{where}: a set of several findings has no "{key}"')
        lists = entry[key].values() if key == "unit" and isinstance(entry[key], dict) and entry[key] else [entry[key]]
        for own in lists:
            names = _strings(f'{where}, "{key}"', [own] if key == "unit" and isinstance(own, str) else own)
            if len(set(names)) != len(names):
                raise ValueError(f'{where}: "{key}" names {next(n for n in names if names.count(n) > 1)!r} twice')


def _check_rows(where: str, entry: dict[str, Any], columns: dict[str, Any]) -> None:
    """What an entry says of its table's rows: the path of an image, another table's part, which of them are the set."""
    template = None
    if "rows" in entry and not isinstance(entry["rows"], str):
        raise ValueError(f'{where}: "rows" is an expression as --where takes, not {entry["rows"]!r}')
    try:
        if isinstance(columns.get("image", ""), str):
            template = template_of(entry)
        Selection(entry.get("rows", ""), '"rows"')
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    header = entry.get("header", {})
    if not isinstance(header, dict) or not all(isinstance(column, str) for column in header.values()):
        raise ValueError(f'{where}: "header" is {{keyword of a DICOM element: column}}, not {header!r}')
    if header and not (template and template.searched):
        raise ValueError(
            f'{where}: "header" tells the files apart that a path with * fits, and its image is no such path'
        )
    if "join" not in entry:
        return
    join = entry["join"]
    if not isinstance(join, dict) or not {"table", "on"} <= set(join) <= {"table", "on", "any", "gravest_first"}:
        raise ValueError(f'{where}: "join" has table and on, and perhaps any and gravest_first, not {join!r}')
    on = join["on"]
    theirs = _strings(f'{where}, "join", "on"', [*on.values()] if isinstance(on, dict) else on)
    every = join.get("any", {})
    lists = isinstance(every, dict) and all(isinstance(cells, list) for cells in every.values())
    if not isinstance(join["table"], str) or not lists or not set(every) <= set(theirs):
        raise ValueError(f'{where}, "join": "any" lists cells of the other table\'s columns {", ".join(theirs)}')
    _strings(f'{where}, "join", "gravest_first"', join.get("gravest_first", ["-"]))


def display_of(entry: dict[str, Any], where: str = "the catalog entry") -> Display:
    """How an entry's images are shown; ValueError for another frame, or a window that is no center and width."""
    window = entry.get("window")
    two = isinstance(window, list) and len(window) == 2 and all(isinstance(number, (int, float)) for number in window)
    if window is not None and not (two and window[1] >= 1):
        raise ValueError(f'{where}: "window" is [center, width], the width at least 1, not {window!r}')
    try:
        return Display(frame_of(entry.get("frame", "first")), tuple(window) if window else None)
    except ValueError as error:
        raise ValueError(f'{where}, "frame": {error}') from error


def _published(name: str, key: str) -> Any:
    """What the project's own catalog says of a set, for the catalogs of others that do not say it."""
    return _own_catalog().get(name, {}).get(key)


@functools.cache
def _own_catalog() -> Catalog:
    return read_catalog(CATALOG)


def entry_of(name: str, catalog: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The entry of a labelled set; ValueError for an unknown one and for a set of pairs, with the choices."""
    labelled = ", ".join(n for n in catalog if n not in READERS)
    if name not in catalog:
        raise ValueError(f"unknown dataset {name!r}; choose from {', '.join(catalog)}")
    if name in READERS:
        raise ValueError(
            f"{name} has captions, not classes: datasets.create_reader reads it; sets with classes are {labelled}"
        )
    return catalog[name]


def metric_of(name: str, catalog: dict[str, dict[str, Any]]) -> str:
    """The metric that a set reports, one of metrics.SET_METRICS: its entry's, else its published one, else top-1."""
    return catalog.get(name, {}).get("metric") or _published(name, "metric") or "top1"


ClassNames = list[str | list[str]]  # in class order; an inner list for synonyms


@functools.cache
def read_prompts(file: str) -> dict[str, list]:
    """labels.json or templates.json as {set: strings}; labels in class order, an inner list for synonyms."""
    prompts = json.loads((HERE / file).read_text(encoding="utf-8"))
    return {name: strings for name, strings in prompts.items() if name != "_"}  # "_" is a note


def _strings(where: str, value: object) -> list[str]:
    if not isinstance(value, list) or not value or not all(isinstance(text, str) and text for text in value):
        raise ValueError(f"{where} must be a list of at least one text, not {value!r}")
    return value


def _shared(where: str, key: str, name: str) -> list:
    shared = read_prompts(f"{key}.json")
    if name not in shared:
        raise ValueError(f'{where}, "{key}": {name!r} is not in {key}.json; choose from {", ".join(shared)}')
    return shared[name]


def _labels_of(where: str, value: object) -> ClassNames:
    if isinstance(value, str):
        return _shared(where, "labels", value)
    if not isinstance(value, list) or not value:
        raise ValueError(f'{where}: "labels" must be a list of class names or a name in labels.json, not {value!r}')
    for label in value:
        _strings(f'{where}, "labels"', label if isinstance(label, list) else [label])
    return value


def _templates_of(where: str, value: object) -> list[str]:
    if isinstance(value, str) and "{}" not in value:
        return _shared(where, "templates", value)
    templates = _strings(f'{where}, "templates"', value)
    if lacking := [template for template in templates if "{}" not in template]:
        raise ValueError(f"{where}: template {lacking[0]!r} has no {{}} for the class name")
    return templates


def prompts_of(
    name: str, catalog: dict[str, dict[str, Any]], classes: Sequence[str]
) -> tuple[Sequence[str | Sequence[str]], Sequence[str]]:
    """The class names of a set, in the order of its `classes` on disk, and its prompts with {} for the name.

    Raises:
        ValueError: an unknown set, or classes that cannot be those of the class names, in their order.
    """
    entry = entry_of(name, catalog)
    where = f"{getattr(catalog, 'file', 'dataset catalog')}: {name}"
    if "labels" in entry:
        labels = _labels_of(where, entry["labels"])
    elif name in read_prompts("labels.json"):
        labels = read_prompts("labels.json")[name]
    else:
        labels = [_words(folder) for folder in classes]
        if all(label.isdecimal() for label in labels):
            log.warning(f'{where} has no "labels": its classes are prompted by their numbers')
    if "templates" in entry:
        templates = _templates_of(where, entry["templates"])
    else:
        templates = read_prompts("templates.json").get(name, DEFAULT_TEMPLATES)
    source = f'the "labels" of {where}' if "labels" in entry else "labels.json"
    folders = entry.get("folders") or _published(name, "folders")
    check_class_order(name, classes, labels, folders=folders, source=source)
    if "labels" in entry and folders is None and not _any_alike(classes, labels):
        pairs = ", ".join(f"{c} = {_first_name(label)}" for c, label in zip(classes[:4], labels, strict=False))
        log.warning(f"{where}: no class folder bears the name of its class, so their order alone pairs them: {pairs}")
    return labels, templates


def check_class_order(
    name: str,
    classes: Sequence[str],
    labels: Sequence[str | Sequence[str]],
    *,
    folders: Sequence[str] | None = None,
    source: str = "labels.json",
) -> None:
    """Raise ValueError where the classes found on disk cannot be those of the class names, in their order.

    Their number must agree. Folder names need not equal class names (ImageNet's are WordNet ids), but a folder that
    bears the name of another class shows that the order is wrong.

    Args:
        folders: the class folders in class order, where no class name repeats them and yet they decide.
        source: where the class names stand, for the message.
    """
    if len(classes) != len(labels):
        raise ValueError(
            f"{name}: {len(classes)} classes found, {len(labels)} class names in {source}; "
            f"found {', '.join(classes[:3])}, ... {classes[-1]}"
        )
    if folders is not None and list(classes) != list(folders):
        raise ValueError(f"{name}: class folders {', '.join(classes)}; must be {', '.join(folders)}")
    keys = [{_key(s) for s in ([label] if isinstance(label, str) else label)} for label in labels]
    for i, folder in enumerate(classes):
        key = _key(folder)
        others = [j for j, names in enumerate(keys) if key in names]
        if others and i not in others:
            raise ValueError(
                f"{name}: class {i} is {folder!r} on disk and {labels[i]!r} in {source}, where {folder!r} "
                f'is class {others[0]}: put the class names, or the "folders" of the catalog entry, in the same order'
            )


def _any_alike(classes: Sequence[str], labels: Sequence[str | Sequence[str]]) -> bool:
    names = ([label] if isinstance(label, str) else label for label in labels)
    return any(_key(c) in map(_key, of_class) for c, of_class in zip(classes, names, strict=True))


def _first_name(label: str | Sequence[str]) -> str:
    return label if isinstance(label, str) else label[0]


def _words(folder: str) -> str:
    """A class folder's name as words of a prompt: without the number it may start with, and without underscores."""
    return re.sub(r"^\d+[._](?=.)", "", folder).replace("_", " ")


def _key(name: str) -> str:
    """Letters and digits of a class name or folder name, without the number that some folders start with."""
    return re.sub(r"[^a-z0-9]", "", re.sub(r"^\d+[._]", "", name).lower())


def cbis_root(name: str, given: str, catalog_file: str | Path) -> str:
    """`given`, or where a catalog says that CBIS-DDSM lies; its three tables are in one folder."""
    if given:
        return given
    catalog = read_catalog(catalog_file)
    entry = next((catalog[one] for one in (name, *CBIS_SETS) if one in catalog), None)
    if entry is None:
        raise ValueError(f"{catalog_file} does not say where {name} lies: name its folder")
    return entry["path"]
