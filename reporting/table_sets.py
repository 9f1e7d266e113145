"""The labelled sets that make_tables.py measures its rows on: CBIS-DDSM's two tables, and any set of a catalog."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

import utils
from datasets import READERS
from evaluation import downstream, metrics, references
from evaluation.catalog import Catalog, read_catalog
from evaluation.predictions import CBIS, Predictions, Scheme, unlearnt_classes
from evaluation.set_rows import tables_of
from inputs import cbis
from inputs.files import on_disk
from synthetic.world import is_synthetic

TABLES = {"calc": "Calcification", "mass": "Mass"}  # of CBIS-DDSM
TRAINING = "training"  # the folder beside those of the tables
FOLDS = 5  # of whole groups, in which a set without splits is cross-validated


@dataclass(frozen=True)
class TestSplit:
    """What a table's rows are measured on."""

    rows: list[dict[str, str]]
    scheme: Scheme  # without the classes that no training image has
    references: dict[str, list[Predictions] | str]  # rows that are no model's, or why there is none

    @property
    def groups(self) -> int:
        """How many patients, or what the scheme's unit is."""
        return len({row[self.scheme.group] for row in self.rows})


@dataclass(frozen=True)
class LesionTable:
    """A table of CBIS-DDSM, made from the case tables where it is not there."""

    name: str  # of TABLES
    root: Path
    samples = "lesions"
    folds = 0

    @property
    def folder(self) -> str:
        """Of a run's evaluation."""
        return self.name

    @property
    def file(self) -> Path:
        """The table itself."""
        return self.root / f"{self.name}.csv"

    @property
    def files(self) -> list[Path]:
        """What evaluations read."""
        return [self.file]

    @property
    def probe(self) -> list[str]:
        """Flags of main_linear.py."""
        return ["--dataset", f"cbis_{self.name}", "--root", str(self.root)]

    @property
    def finetune(self) -> list[str]:
        """Flags of run_class_finetuning.py."""
        return ["--data_set", f"cbis_{self.name}", "--data_path", str(self.root)]

    @property
    def entry(self) -> dict[str, Any]:
        """What else an evaluation follows from."""
        return {}

    @property
    def synthetic(self) -> bool:
        """Whether its images are drawn."""
        return is_synthetic(self.root)

    def test(self) -> TestSplit:
        """Its official test table, and the references that its case tables give."""
        rows = cbis.read_lesions(self.file)
        test = [row for row in rows if row["split"] == "test"]
        return TestSplit(test, CBIS, references.reference_rows(rows))


@dataclass(frozen=True)
class CatalogTable:
    """A set of the catalog with one class an image, probed by logistic regression on cached features."""

    name: str
    catalog: Catalog
    samples = "images"

    @property
    def folder(self) -> str:
        """Of a run's evaluation."""
        name = utils.file_name(self.name)
        return f"{name}~" if name in (TRAINING, *TABLES) else name

    @property
    def files(self) -> list[Path]:
        """What evaluations read, of a set that is a table."""
        return tables_of(self.entry) if self.entry["type"] == "csv" else []

    @property
    def probe(self) -> list[str]:
        """Flags of main_linear.py."""
        how = ["--cross-validate", str(self.folds)] if self.folds else ["--cache-features"]
        return ["--dataset", self.name, "--catalog", str(Path(self.catalog.file).absolute()), *how]

    @property
    def finetune(self) -> list[str]:
        """Flags of run_class_finetuning.py."""
        return ["--data_set", self.name, "--catalog", str(Path(self.catalog.file).absolute())]

    @property
    def entry(self) -> dict[str, Any]:
        """What else an evaluation follows from: the catalog's words for the set."""
        return self.catalog[self.name]

    @property
    def synthetic(self) -> bool:
        """Whether its images are drawn."""
        return is_synthetic(Path(self.entry["path"]))

    @cached_property
    def folds(self) -> int:
        """In how many folds every image is predicted once; 0 of a set with a test split."""
        return 0 if downstream.has_splits(self.name, self.catalog) else FOLDS

    @cached_property
    def _splits(self) -> tuple[downstream.Downstream, downstream.Downstream]:
        if self.folds:
            every = downstream.open_every_row(self.name, self.catalog, None)
            return every, every
        return downstream.open_splits(self.name, self.catalog)

    def check(self, flags: str) -> str:
        """A line about it; ValueError, FileNotFoundError where it can be no table, or images are missing."""
        train, test = self._splits
        if test.findings is not None:
            raise ValueError(
                f"{self.name} has several findings for each image: tables are of sets with one class each; "
                f"main_linear.py --dataset {self.name} --cache-features probes them one by one"
            )
        if test.scheme is None:
            raise ValueError(f"the test split of {self.name} is too large to keep its predictions, which tables need")
        if "--skip-broken" not in flags and self.entry["type"] == "csv":
            folder = Path(self.entry.get("images", self.entry["path"]))
            rows = test.rows if self.folds else [*train.rows, *test.rows]
            files = [folder / row["image"] for row in rows]
            if absent := [file for file in files if not on_disk(file).is_file()]:
                raise FileNotFoundError(f"{self.files[0]}: {len(absent)} images are not there, first {absent[0]}")
        split = self.test()
        for guess in split.references["Chance"][:1]:  # of a class without test images there is no metric
            assert isinstance(guess, Predictions)
            try:
                metrics.checked(guess.labels, guess.prob, split.scheme.classes, split.scheme.unlearnt)
            except ValueError as error:
                raise ValueError(f"{self.name}: {error}") from error
        groups = f" of {split.groups} {split.scheme.unit}" if split.scheme.unit != self.samples else ""
        if split.groups < self.folds:
            raise ValueError(f"{self.name} has no splits, and {split.groups} groups are too few for {self.folds} folds")
        if self.folds:
            return f"{self.name}: {len(test)} images{groups}, without splits: cross-validated in {self.folds} folds"
        return f"{self.name}: {len(train)} training images, {len(test)} test images{groups}"

    def test(self) -> TestSplit:
        """Its test split, or every row of a set without splits, and guesses."""
        train, test = self._splits
        assert test.scheme is not None
        scheme = test.scheme.without(unlearnt_classes(test.classes, train.labels, self.name))
        counts = np.bincount(train.labels, minlength=len(test.classes))
        return TestSplit(test.rows, scheme, {**references.guesses(test.rows, scheme, counts)})


Table = LesionTable | CatalogTable


def read_tables(names: Sequence[str], cbis_root: str, catalog_file: str | Path) -> list[Table]:
    """The tables of these names; ValueError with the choices for an unknown one, one given twice, or none."""
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"tables {names!r}: a list of {', '.join(TABLES)} and names of sets of the catalog")
    catalog = read_catalog(catalog_file)
    known = [*TABLES, *(name for name in catalog if name not in (*READERS, *cbis.CBIS_SETS))]
    for number, name in enumerate(names):
        if name not in known:
            raise ValueError(f"unknown table {name!r}; choose from {', '.join(known)} ({catalog_file})")
        if name in names[:number]:
            raise ValueError(f"tables {names}: {name!r} is there twice")
    root = Path(cbis_root).absolute()
    return [LesionTable(name, root) if name in TABLES else CatalogTable(name, catalog) for name in names]
