"""What run folders hold, gathered for the page."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import utils
from evaluation import metrics
from evaluation.comparisons import ONE_SEED
from evaluation.predictions import CBIS, Predictions, Scheme, positive_class, set_scheme
from inputs import cbis
from inputs.metadata import inside
from reporting import files
from reporting.files import require
from reporting.table_sets import TABLES
from synthetic.world import is_synthetic

log = logging.getLogger("medslip")
MISSING = "missing"
KNN_PREDICTIONS = "predictions_knn.csv"


@dataclass
class ResultRow:
    """A row of a results table and the runs behind it."""

    name: str
    kind: str  # published, reference or measured
    metrics: dict[str, dict[str, float]]  # fractions, with low and high where there is an interval
    source: str  # the file that the numbers come from
    folders: list[Path] = field(default_factory=list)
    detection: dict[str, dict] = field(default_factory=dict)
    units: dict[str, dict] = field(default_factory=dict)
    subgroups: list[dict] = field(default_factory=list)
    confusion: list[list[float]] | None = None
    two_class: list[dict] = field(default_factory=list)  # AUROC of each seed
    never_predicted: list[str] = field(default_factory=list)
    leaves_out: str = ""
    point: metrics.OperatingPoint | None = None
    unlearnt: list[str] = field(default_factory=list)  # classes without a training image, in no mean over classes
    per_class: dict[str, dict] = field(default_factory=dict)  # each class against the rest
    ordered: dict[str, dict] = field(default_factory=dict)  # of classes that stand in an order
    predictions: str = "predictions.csv"  # the file of a folder that holds them


@dataclass
class ResultTable:
    """One of the two results tables."""

    kind: str  # calc, mass or both; or another set's name; with the number of folds, where there is no test split
    classes: tuple[str, ...] = cbis.CBIS_CLASSES
    positive: str | None = metrics.MALIGNANT  # the class that is looked for
    rows: list[ResultRow] = field(default_factory=list)
    comparisons: list[dict] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    lesions: int | None = None
    patients: int | None = None  # or how many there are of `unit`
    unit: str = "patients"  # what is drawn as a whole: Scheme.unit
    of: str = ""  # calc, mass, both or the set's name where `kind` says more
    folds: int = 0  # of a table of make_tables.py without a test split

    @property
    def dataset(self) -> str:
        """calc, mass or both; or another set's name."""
        return self.of or self.kind

    @property
    def in_folds(self) -> bool:
        """Whether every sample was predicted once, and there is no test split."""
        return bool(self.of or self.folds)

    @property
    def of_lesions(self) -> bool:
        """Whether it is of CBIS-DDSM."""
        return self.dataset in cbis.CBIS_KINDS

    @property
    def scheme(self) -> Scheme:
        """What the rows of its predictions are."""
        return CBIS if self.of_lesions else set_scheme(self.classes, self.positive, self.unit)

    def size(self) -> str:
        """How many samples of how many patients were tested, in words."""
        samples = "lesions" if self.of_lesions else "images"
        lesions, patients = (MISSING if n is None else n for n in (self.lesions, self.patients))
        test = "" if self.in_folds else "test "
        size = f"{lesions} {test}{samples}" + (f" of {patients} {self.unit}" if self.unit != samples else "")
        return f"{size}, {self.folds}-fold cross-validation" if self.folds else size

    def tested(self, found: dict[str, Any], where: str | Path) -> None:
        """Take the numbers of samples and patients from what score_predictions wrote; ValueError as `require`."""
        self.unit = found["interval"]["over"]
        require(found, where, (f"test_{self.unit}",))
        self.lesions, self.patients = int(np.sum(found["confusion"])), found[f"test_{self.unit}"]

    def last(self, *files: str) -> ResultRow | None:
        """The last model whose first run wrote all of `files`: what the page shows of one model is this one's."""
        models = [row for row in self.rows if row.kind == "measured" and row.folders]
        models = [row for row in models if row.predictions == "predictions.csv"]
        models = [row for row in models if all((row.folders[0] / file).is_file() for file in files)]
        return models[-1] if models else None


@dataclass
class Runs:
    """All that was found."""

    tables: dict[str, ResultTable] = field(default_factory=dict)
    primary: dict | None = None
    zeroshot: list[tuple[str, dict]] = field(default_factory=list)
    other: list[tuple[str, dict]] = field(default_factory=list)  # results on other sets, and their files
    fractions: list[tuple[str, str, list[dict]]] = field(default_factory=list)  # row, set, fractions
    trainings: dict[str, list[Path]] = field(default_factory=dict)  # name -> folders, a seed each
    settings: list[tuple[str, dict]] = field(default_factory=list)
    steps: list[dict] = field(default_factory=list)
    skipped: dict[str, dict] = field(default_factory=dict)  # table -> lesions without image, by split
    names: dict[Path, str] = field(default_factory=dict)  # of the row of each results.json
    cbis: Path | None = None
    synthetic: bool = False
    read: list[Path] = field(default_factory=list)


def read_json(path: Path, runs: Runs) -> dict:
    """A run's JSON file, noted as read; ValueError names one that is none."""
    found = utils.read_json(path)
    if path not in runs.read:
        runs.read.append(path)
    return found


def gather(folders: Sequence[Path], cbis_root: Path | None = None) -> Runs:
    """Everything that a report can show, from the files of runs. Raises where a folder has none."""
    runs = Runs(cbis=cbis_root)
    runs.names = row_names(folders)
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is no folder of a run")
        before = len(runs.read)
        if (folder / "tables.json").is_file():
            add_tables(folder, runs)
        else:
            found = result_files(folder)
            # A run that is compared with others comes after them.
            for path in sorted(found, key=lambda path: "differences" in read_json(path, runs)):
                add_results(path, folder, runs)
        for path in sorted(folder.rglob("zeroshot.json")):
            add_zeroshot(path, folder, runs)
        for path in sorted(folder.rglob("log.jsonl")):
            add_training(path, folder, runs)
        for path in sorted(folder.rglob("settings.json")):
            settings = read_json(path, runs)
            runs.settings.append((named(path.parent, folder), settings))
            root = settings.get("args", {}).get("root")
            if runs.cbis is None and str(settings.get("args", {}).get("dataset", "")).startswith("cbis_") and root:
                runs.cbis = Path(root)
        if len(runs.read) == before:
            raise ValueError(f"{folder} holds no tables.json, results.json, zeroshot.json or log.jsonl")
    if runs.cbis is not None:
        runs.synthetic |= is_synthetic(runs.cbis)
    return runs


def named(path: Path, folder: Path) -> str:
    """A run's name: its place below the folder that was given, or that folder's own name."""
    below = path.relative_to(folder).as_posix()
    return folder.resolve().name if below == "." else below


def row_name(path: Path, folder: Path, kind: str) -> str:
    """A probe's name without its table: vit_mammo for vit_mammo/calc, untrained for probe/calc_untrained."""
    words = [re.sub(rf"^{re.escape(kind)}_|_{re.escape(kind)}$", "", part) for part in named(path, folder).split("/")]
    return "/".join(word for word in words if word not in (kind, "probe", "")) or named(path, folder)


GENERIC = {"runs", "probe", "linear", "finetuned", "training", *TABLES, *cbis.CBIS_SETS}  # tell no run from another


def result_files(folder: Path) -> list[Path]:
    """Of the probes and fine-tuned models in a folder, but for those that were set aside."""
    return [path for path in sorted(folder.rglob("results.json")) if "earlier_" not in str(path)]


def row_names(folders: Sequence[Path]) -> dict[Path, str]:
    """What the row of each results.json is called, by its whole path: no two runs of one table alike.

    A run is called by its place below the folder that was given; where that tells nothing (the folder is the run, and
    is called mass) or is another's name too, by the shortest end of its path that no other run of the table has.
    """
    of_table: dict[str, dict[Path, str]] = {}
    for folder in folders:
        for path in result_files(folder):
            dataset = str(utils.read_json(path).get("dataset", ""))
            kind = str(cbis.CBIS_SETS.get(dataset, dataset))
            of_table.setdefault(kind, {})[path.resolve()] = row_name(path.parent, folder, kind)
    names: dict[Path, str] = {}
    for kind, own in of_table.items():
        called = Counter(own.values())
        unclear = [path for path, name in own.items() if called[name] > 1 or name in GENERIC or name == kind]
        names |= own
        words = {path: [part for part in path.parent.parts[1:] if part not in {kind, *GENERIC}] for path in unclear}
        taken = {name for path, name in own.items() if path not in words}
        for path, mine in words.items():
            others = [theirs for other, theirs in words.items() if other != path]
            for length in range(1, len(mine) + 1):
                names[path] = "/".join(mine[-length:])
                if names[path] not in taken and all(theirs[-length:] != mine[-length:] for theirs in others):
                    break
    return names


def add_tables(folder: Path, runs: Runs) -> None:
    """A folder of make_tables.py."""
    path = folder / "tables.json"
    content = read_json(path, runs)
    require(content, path, files.TABLES)
    runs.synthetic |= content["synthetic"]
    runs.primary, runs.steps = content["primary"], content["steps"]
    runs.cbis = runs.cbis or (Path(content["cbis"]) if content["cbis"] else None)
    for kind, table in content["tables"].items():
        own = ResultTable(kind)  # of CBIS-DDSM, which earlier versions had alone and said nothing of
        if "classes" in table:
            own = ResultTable(kind, tuple(table["classes"]), table["positive"], unit=table["unit"])
        mine = runs.tables.setdefault(kind, own)
        mine.lesions, mine.patients, mine.folds = table["lesions"], table["patients"], table.get("folds", 0)
        mine.comparisons += table["comparisons"]
        mine.absent |= table["absent"]
        for name, values in table["published"].items():
            percent = {key: {"value": value / 100} for key, value in values.items()}
            mine.rows.append(ResultRow(f"{name} (as published)", "published", percent, str(path)))
        for row in table["rows"]:
            places = [folder / inside(name, str(path)) for name in row["files"]]
            results = [read_json(place / "results.json", runs) for place in places]
            mine.rows.append(
                ResultRow(
                    row["name"], row["kind"], row["metrics"], str(path), places, row.get("detection", {}),
                    row.get("units", {}), row.get("subgroups", []), row.get("confusion"), row.get("two_class", []),
                    row.get("never_predicted", []), row["leaves_out"], point_of(results[0]) if results else None,
                    table.get("unlearnt", []) if places else [], per_class=row.get("per_class", {}),
                )
            )  # fmt: skip
            for result in results[:1]:
                runs.skipped.setdefault(kind, result.get("lesions_skipped", {}))
                if result.get("fractions"):
                    runs.fractions.append((row["name"], TABLES.get(mine.kind, mine.kind), result["fractions"]))


def two_class_of(result: dict) -> list[dict]:
    """The AUROC without the dismissed lesions, in a list; empty where a run has none."""
    return [result["two_class"]["metrics"]["auroc"]] if result.get("two_class") else []


def point_of(result: dict) -> metrics.OperatingPoint | None:
    """The operating point that validation fixed; None where there is none."""
    point = result.get("operating_point")
    return point and metrics.OperatingPoint(point["temperature"], point["threshold"])


def add_results(path: Path, folder: Path, runs: Runs) -> None:
    """A results.json of a probe or a fine-tuned model."""
    result = read_json(path, runs)
    runs.synthetic |= bool(result.get("synthetic"))
    dataset = result.get("dataset", "")
    if not isinstance(dataset, str) or not dataset:
        return  # a summary of other runs, such as the demo's
    of, name = str(cbis.CBIS_SETS.get(dataset, dataset)), runs.names[path.resolve()]
    kind = of
    if "cross_validation" in result:  # of other samples than the test split's, hence a table of its own
        kind = f"{TABLES.get(kind, kind)}, {result['cross_validation']['folds']}-fold cross-validation"
    if result.get("fractions"):
        runs.fractions.append((name, TABLES.get(kind, kind), fractions_of(result)))
    neighbours = result.get("knn") or {}
    if "metrics" in result:
        add_row(result, path, (kind, of), name, runs)
    if "metrics" in neighbours:
        require(neighbours, f"{path}, knn", ("k",))
        add_row(neighbours, path, (kind, of), f"{name}, {neighbours['k']}-NN", runs, KNN_PREDICTIONS)
    if "metrics" not in result and "metrics" not in neighbours:
        runs.other.append((str(path), result))


def fractions_of(result: dict) -> list[dict]:
    """What a results.json says of fractions of the labels, as fractions; earlier versions wrote percent."""
    parts = [{"metric": result.get("logistic", {}).get("metric", ""), **part} for part in result["fractions"]]
    if result.get("unit") != "percent":
        return parts
    unit = 1.0 if parts[0]["metric"] == "quadratic_kappa" else 100.0
    return [
        part | {"scores": [score / unit for score in part["scores"]]}
        | {key: None if part[key] is None else part[key] / unit for key in ("mean", "std")}
        if "scores" in part else part
        for part in parts
    ]  # fmt: skip


def add_row(
    result: dict, path: Path, table_of: tuple[str, str], name: str, runs: Runs, predictions: str = "predictions.csv"
) -> None:
    """A row of a table, of this kind and set, from what `predictions.report_rows` and what is beside it wrote."""
    require(result, path, files.RESULT)
    kind, of = table_of
    table = runs.tables.setdefault(kind, ResultTable(kind, tuple(result["classes"]), positive_class(result)))
    table.of = of if of != kind else ""
    table.tested(result, path)
    runs.skipped.setdefault(kind, result.get("lesions_skipped", {}))
    untrained = result.get("weights", {}).get("untrained")
    table.rows.append(
        ResultRow(
            name, "measured", result["metrics"], str(path), [path.parent], result.get("detection", {}),
            result.get("units", {}), result.get("subgroups", []), result["confusion"], two_class_of(result),
            result.get("never_predicted", []), "" if untrained else ONE_SEED,
            point_of(result), result.get("unlearnt", []), result.get("per_class", {}), result.get("ordered", {}),
            predictions,
        )
    )  # fmt: skip
    for entry in result.get("differences", []):
        beside = Path(entry["baseline"]).resolve().with_name("results.json")
        theirs = runs.names.get(beside, entry["baseline"])
        if theirs != entry["baseline"] and Path(entry["baseline"]).name == KNN_PREDICTIONS:
            theirs = f"{theirs}, k-NN"
        entry = {**entry, "baseline": theirs, "row": name}
        table.comparisons.append({**entry, "leaves_out": table.rows[-1].leaves_out, "primary": False})


def add_zeroshot(path: Path, folder: Path, runs: Runs) -> None:
    """A file of eval_zeroshot.py; sets whose rows are known become rows of their table."""
    result = read_json(path, runs)
    require(result, path, ("zero_shot?.*", "retrieval?.*"))
    runs.zeroshot.append((named(path.parent, folder), result))
    for dataset, scores in result.get("zero_shot", {}).items():
        if "rows" not in scores:
            continue
        kind, found = str(cbis.CBIS_SETS.get(dataset, dataset)), scores["rows"]
        require(found, f"{path}, {dataset}, rows", files.ZEROSHOT_ROWS)
        table = runs.tables.setdefault(kind, ResultTable(kind, tuple(found["classes"]), positive_class(found)))
        if table.lesions is None:
            table.tested(found, f"{path}, {dataset}, rows")
        name = f"zero-shot, {named(path.parent, folder)}"
        row = ResultRow(name, "measured", found["metrics"], str(path), confusion=found["confusion"])
        row.never_predicted = found["never_predicted"]
        row.per_class, row.ordered = found.get("per_class", {}), found.get("ordered", {})
        row.folders, row.predictions = [path.parent], f"zeroshot_{utils.file_name(dataset)}.csv"
        table.rows.append(row)


def add_training(path: Path, folder: Path, runs: Runs) -> None:
    """The log of a training run; the seeds of a row are one entry."""
    runs.read.append(path)
    parts = [part for part in path.parent.relative_to(folder).parts if part not in ("runs", "training")]
    row = "/".join(part for part in parts if not part.startswith("seed")) or folder.resolve().name
    runs.trainings.setdefault(row, []).append(path.parent)


def read_predictions(table: ResultTable, row: ResultRow, runs: Runs) -> list[Predictions]:
    """Of each seed of a row, where its file is there."""
    found = []
    for folder in row.folders:
        path = folder / row.predictions
        if path.is_file():
            found.append(Predictions.read(path, table.scheme))
            runs.read.append(path)
    return found
