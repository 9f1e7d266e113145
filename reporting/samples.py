"""The test samples of a table to look through, and what a search has found: images with their scores."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import utils
from evaluation.catalog import CATALOG, display_of
from evaluation.predictions import CBIS, Predictions
from evaluation.set_probes import find_set
from inputs.display import Display
from inputs.files import IMAGE_SUFFIXES
from inputs.metadata import Table, inside, read_table
from reporting.pictures import Pictures
from reporting.runs import ResultRow, ResultTable, Runs, read_json

MOST, CERTAIN = 400, 100  # samples of a table on the page; of these, the ones that all models are surest of
MOST_CLASSES = 10  # up to which samples can be sorted by the probability of each
FOUND = ["query", "rank", "cosine", "found"]  # columns of what `predict.py search` writes
QUERIES = 24  # of a search that are shown

Address = Callable[[dict[str, str]], str]  # from a row of predictions.csv to its image's address; "" without one


def predictions_file(row: ResultRow) -> Path | None:
    """Of a row's first seed; None where there is none."""
    file = row.folders[0] / row.predictions if row.folders else None
    return file if file and file.is_file() else None


def samples(
    table: ResultTable, lesions: Sequence[dict[str, str]] | None, runs: Runs, pictures: Pictures
) -> dict[str, Any] | None:
    """Cards of the table's test samples with what each model says of them; None where no row has predictions."""
    scheme = table.scheme
    read: list[tuple[ResultRow, Path, Predictions]] = []
    for row in table.rows:
        if row.kind == "measured" and (file := predictions_file(row)):
            read.append((row, file, Predictions.read(file, scheme)))
            runs.read += [file] * (file not in runs.read)
    if not read:
        return None
    rows = {row[scheme.sample]: row for *_, found in read for row in found.rows}
    answers, errors = answers_of(rows, [found for *_, found in read])
    shown, which = most_telling(errors)
    files = [file for _, file, _ in read]
    address = (
        lesion_images(lesions, runs, pictures) if scheme is CBIS else set_images(table.dataset, files, runs, pictures)
    )
    cards, titles = [], [name.replace("_", " ") for name in scheme.classes]  # which then break between words
    for i in shown:
        name, row = list(rows)[i], list(rows.values())[i]
        own, label = answers[i], scheme.classes.index(row[scheme.label])
        cards.append({
            "name": name, "group": row[scheme.group], "label": label, "answers": own, "image": address(row),
            "wrong": bool(own[-1]) and own[-1][0] != label, "said": said(own[-1], label, titles),
        })  # fmt: skip
    lacking = sum(not card["image"] for card in cards)
    of = "patient" if scheme is CBIS or table.unit == "patients" else "group"
    first = " First seed of each row." if any(len(row.folders) > 1 for row, *_ in read) else ""
    return {
        "title": f"The {'' if table.in_folds else 'test '}{'lesions' if scheme is CBIS else 'images'}, one by one",
        "about": f"{which} As the page opens: by {read[-1][0].name}, from {read[-1][1]}." + first,
        "lacking": f"{lacking} of {len(cards)} images are not found{why_not(scheme is CBIS, runs)}." if lacking else "",
        "models": [row.name for row, *_ in read], "classes": titles, "group": of, "cards": cards,
        "probabilities": len(scheme.classes) <= MOST_CLASSES,
    }  # fmt: skip


def answers_of(rows: dict[str, dict[str, str]], each: Sequence[Predictions]) -> tuple[list[list], np.ndarray]:
    """Of each sample what each model says, and its largest error by any model (n,).

    An answer is the predicted class, its probability, that of the sample's own class and, of few classes, all; None
    of a model that has not seen the sample.
    """
    answers: list[list] = [[None] * len(each) for _ in rows]
    place, errors = {name: i for i, name in enumerate(rows)}, np.zeros(len(rows))
    for number, found in enumerate(each):
        few = len(found.scheme.classes) <= MOST_CLASSES
        for row, label, prob in zip(found.rows, found.labels.tolist(), found.prob, strict=True):
            i, top = place[row[found.scheme.sample]], int(prob.argmax())
            answer = [top, *(round(float(p), 4) for p in (prob[top], prob[label]))]
            answers[i][number] = [*answer, [round(float(p), 4) for p in prob]] if few else answer
            errors[i] = max(errors[i], 1 - prob[label])
    return answers, errors


def most_telling(errors: np.ndarray) -> tuple[list[int], str]:
    """Numbers of the samples that are shown, the largest error first, and which these are, in words."""
    order = np.argsort(-errors, kind="stable").tolist()
    if len(order) <= MOST:
        return order, f"All {len(order)}."
    return order[: MOST - CERTAIN] + order[-CERTAIN:], (
        f"Of {len(order)} the {MOST - CERTAIN} with the largest error of any model and the {CERTAIN} "
        "of which all are surest and right."
    )


def said(answer: list | None, label: int, classes: Sequence[str]) -> str:
    """A model's answer in words, as report.js writes it."""
    if answer is None:
        return ""
    top, its_own, own = answer[:3]
    return f"said: {classes[top]} {100 * its_own:.1f}%" + (f", its own class {100 * own:.1f}%" if top != label else "")


# ---------------------------------------------------------------------------------------------------------------------
# Where the images are
# ---------------------------------------------------------------------------------------------------------------------


def lesion_images(lesions: Sequence[dict[str, str]] | None, runs: Runs, pictures: Pictures) -> Address:
    """The crop of a lesion, else its mammogram, by the tables of CBIS-DDSM."""
    files = {row["lesion"]: row.get("crop") or row.get("full") or "" for row in lesions or ()}

    def address(row: dict[str, str]) -> str:
        file = files.get(row["lesion"])
        return pictures.add(runs.cbis / inside(file, f"{row['lesion']}")) if file and runs.cbis else ""

    return address


def set_images(kind: str, files: Sequence[Path], runs: Runs, pictures: Pictures) -> Address:
    """The image of a set of the catalog, by the settings of the first run that says where it lies."""
    for file in files:
        settings = file.with_name("settings.json")
        args = read_json(settings, runs).get("args", {}) if settings.is_file() else {}
        root = args.get("root") or args.get("data_path") or ""
        try:
            entry = find_set(kind, root, args.get("catalog") or str(CATALOG))[kind]
            display = display_of(entry)
        except (ValueError, FileNotFoundError):
            continue
        folder = Path(entry.get("images") or entry["path"])
        folder = folder / entry["test"] if entry["type"] == "imagefolder" else folder
        return partial(_set_image, folder=folder, display=display, pictures=pictures, file=file)
    return lambda row: ""


def _set_image(row: dict[str, str], folder: Path, display: Any, pictures: Pictures, file: Path) -> str:
    return pictures.add(folder / inside(row["image"], str(file)), display)


def why_not(lesions: bool, runs: Runs) -> str:
    """Where they were looked for."""
    if not lesions:
        return " where the run's settings.json says that the set lies"
    return f" below {runs.cbis}; --cbis names another folder" if runs.cbis else ": --cbis names their folder"


# ---------------------------------------------------------------------------------------------------------------------
# Searches
# ---------------------------------------------------------------------------------------------------------------------


def searches(folders: Iterable[Path], runs: Runs, pictures: Pictures, images: bool) -> list[dict[str, Any]]:
    """What `predict.py search` has written below the folders: each query with the nearest, their cosines beside."""
    found = []
    for file in sorted({path for folder in folders for path in folder.rglob("*.csv")}):
        if not is_search(file):
            continue
        rows = [{key: utils.csv_value(cell) for key, cell in row.items()} for row in read_table(file, FOUND)]
        runs.read.append(file)
        by_query: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            by_query.setdefault(row["query"], []).append(row)
        lines, lacking = [], 0
        for query, own in list(by_query.items())[:QUERIES]:
            near = [
                {"name": row["found"], "cosine": float(row["cosine"]), "image": _found(row["found"], pictures, images)}
                for row in sorted(own, key=lambda row: int(row["rank"]))
            ]
            lines.append({"query": query, "image": _found(query, pictures, images), "found": near})
            lacking += sum(_is_file_name(name) for name in [query, *(n["name"] for n in near)]) - sum(
                bool(one["image"]) for one in [lines[-1], *near]
            )
        of = f", the first {QUERIES} of {len(by_query)} queries" if len(by_query) > QUERIES else ""
        found.append({
            "about": f"Nearest by cosine, from {file}{of}.", "lines": lines,
            "most": max(len(line["found"]) for line in lines) if lines else 1,
            "lacking": f"{lacking} images are not found at the paths in {file}." if lacking and images else "",
        })  # fmt: skip
    return found


def is_search(file: Path) -> bool:
    """By its columns; what is no table is none."""
    try:
        return file.is_file() and Table(file).header == FOUND
    except ValueError:
        return False


def _found(name: str, pictures: Pictures, images: bool) -> str:
    """The address of an image that answers name, FILE or FILE#FRAME; "" of a caption."""
    if not images or not _is_file_name(name):
        return ""
    path, _, frame = name.rpartition("#")
    if frame.isdecimal() and int(frame) and not Path(name).is_file():
        return pictures.add(Path(path), Display(int(frame)))
    return pictures.add(Path(name))


def _is_file_name(name: str) -> bool:
    """An image's, where captions may stand as well."""
    return len(name) < 4096 and re.sub(r"#\d+$", "", name).lower().endswith(IMAGE_SUFFIXES)
