"""CBIS-DDSM (Lee et al. 2017): the tables of lesions that preparation/cbis_tables.py writes, and their reader."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch.utils.data import Dataset

from inputs.images import read_image
from inputs.metadata import inside, read_table
from inputs.selection import Selection, selected
from inputs.transforms import Preprocess, eval_view

log = logging.getLogger("medslip")

# BENIGN_WITHOUT_CALLBACK: the radiologist asked for no further films and no biopsy.
CBIS_CLASSES = ("BENIGN", "BENIGN_WITHOUT_CALLBACK", "MALIGNANT")
CBIS_KINDS = ("calc", "mass", "both")
CBIS_SETS = {f"cbis_{kind}": kind for kind in CBIS_KINDS}  # names in the catalog and on command lines
CBIS_SPLITS = ("train", "val", "test")
CBIS_IMAGES = ("crop", "full", "mask")
# Columns of the tables that make_dataset.py writes; the last three hold paths relative to the root, or
# nothing.
CBIS_COLUMNS = (
    "lesion", "type", "split", "patient", "side", "view", "abnormality", "pathology", *CBIS_IMAGES,
)  # fmt: skip
# What the radiologist wrote down, and the crop's size in pixels: no model sees them, reference rows and subgroups do.
# Columns that follow the others in the tables; a table written before they existed is still read.
CBIS_DESCRIPTORS = {"calc": ("calc_type", "calc_distribution"), "mass": ("mass_shape", "mass_margins")}
CBIS_READING = (
    "density", "assessment", "subtlety", *CBIS_DESCRIPTORS["calc"], *CBIS_DESCRIPTORS["mass"],
)  # fmt: skip
CROP_SIZE = ("crop_width", "crop_height")


class CbisLesions(Dataset):
    """One split of the lesion table <root>/<kind>.csv: `ds[i] -> (tensor (3, size, size), label, row)`.

    The label indexes CBIS_CLASSES; `row` is the lesion's row of the table. `image` says which of the
    lesion's images is read. With `skip_missing` lesions without it are skipped and counted in `dropped`,
    else they are an error: a figure on fewer lesions is another figure. `where` selects rows of all splits.

    Raises ValueError for an unknown kind, split or image, for missing images and for a table that is not
    ours or names a file outside the root; FileNotFoundError where there is no table.
    """

    classes = CBIS_CLASSES

    def __init__(
        self,
        root: str | Path,
        kind: str,
        split: str,
        image: str = "crop",
        preprocess: Preprocess | None = None,
        skip_missing: bool = False,
        where: str = "",
    ):
        options = {"kind": (kind, CBIS_KINDS), "split": (split, CBIS_SPLITS), "image": (image, CBIS_IMAGES)}
        for name, (value, choices) in options.items():
            if value not in choices:
                raise ValueError(f"unknown {name} {value!r}; choose from {', '.join(choices)}")
        table = Path(root) / f"{kind}.csv"
        rows = [row for row in select_lesions(read_lesions(table), where, table)[0] if row["split"] == split]
        self.rows = [row for row in rows if row[image]]
        self.dropped = len(rows) - len(self.rows)
        if self.dropped and not skip_missing:
            named = ", ".join(row["lesion"] for row in rows if not row[image])
            raise ValueError(f"{table}: {self.dropped} of {len(rows)} {split} lesions have no {image}: {named}")
        self.paths = [Path(root) / row[image] for row in self.rows]
        self.labels = [CBIS_CLASSES.index(row["pathology"]) for row in self.rows]
        self.patients = [row["patient"] for row in self.rows]
        self.view = eval_view(preprocess or Preprocess())

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int, dict[str, str]]:
        return self.view(read_image(self.paths[i], grey=True), None), self.labels[i], self.rows[i]


def select_lesions(
    rows: list[dict[str, str]], where: str, table: Path
) -> tuple[list[dict[str, str]], list[str]]:  # fmt: skip
    """The lesions that --where leaves, of all splits, and lines about them; raises as inputs.selection.selected."""
    cells = [(row["split"], row["pathology"]) for row in rows]
    kept, lines = selected(Selection(where), rows, str(table), cells, gone=False)
    return [row for row, keep in zip(rows, kept, strict=True) if keep], lines


def read_lesions(table: Path) -> list[dict[str, str]]:
    """All rows of a table that `make_dataset.py cbis` wrote; raises as CbisLesions does."""
    if not table.is_file():
        merged = " --merge-types" if table.stem == "both" else ""
        command = f"make_dataset.py cbis --root {table.parent}{merged}"
        raise FileNotFoundError(f"{table} does not exist: write it with {command}")
    rows = read_table(table, CBIS_COLUMNS)
    for number, row in enumerate(rows, 1):
        if row["pathology"] not in CBIS_CLASSES or row["split"] not in CBIS_SPLITS:
            raise ValueError(f"{table}, row {number}: pathology {row['pathology']!r}, split {row['split']!r}")
        for image in CBIS_IMAGES:
            inside(row[image], f"{table}, row {number}")
    return rows
