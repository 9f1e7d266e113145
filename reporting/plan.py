"""The rows file of make_tables.py, its places filled in."""

from __future__ import annotations

import json
import re
import shlex
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import utils
from evaluation.catalog import CATALOG
from reporting.table_sets import TABLES, LesionTable, Table, read_tables
from runtime.command_line import UsageError

INPUTS = {"roco": "--roco", "cbis": "--cbis", "medclip_vit": "--medclip-vit", "medclip_resnet": "--medclip-resnet",
          "bert_vocab": "--bert-vocab"}  # fmt: skip
CHECKPOINTS = {"best": "checkpoint_best.pt", "last": "checkpoint.pt"}  # by validation; of the last epoch


@dataclass(frozen=True)
class PlannedRow:
    """A row of the rows file. Flags are those of main.py, main_linear.py and run_class_finetuning.py."""

    name: str
    weights: str = ""  # a model as it is: what --pretrained takes; empty with `train`, or for an untrained tower
    train: str | None = None  # flags of main.py
    checkpoint: str = "best"  # of CHECKPOINTS: which of the training is evaluated
    probe: str = ""  # further flags of main_linear.py
    finetune: str | None = None  # flags of run_class_finetuning.py, in place of the probe
    baseline: tuple[str, ...] = ()  # the rows it is compared with, or the one; the primary comparison is with the first

    @property
    def seeded(self) -> bool:
        """Whether a seed has a part in it: every row but a given model that is probed as it is."""
        return self.train is not None or self.finetune is not None or not self.weights or "--untrained" in self.probe

    @property
    def slug(self) -> str:
        """The name as part of a path, which two rows may share: `read_plan` refuses them."""
        return re.sub(r"[^a-z0-9]+", "_", self.name.lower()).strip("_") or utils.file_name(self.name)


@dataclass(frozen=True)
class Plan:
    """The rows file, its places filled in."""

    rows: list[PlannedRow]
    tables: list[Table]
    primary: tuple[str, str] | None
    published: dict[str, dict[str, dict[str, float]]]  # table -> name -> metric -> percent


def read_plan(
    path: str | Path, places: dict[str, str], primary: Sequence[str] | None, catalog: str | Path = CATALOG
) -> Plan:
    """The rows with {roco} and so on filled in, and their tables; ValueError names what is wrong and the choices."""
    try:
        content = json.loads(Path(path).read_text())
        rows = content["rows"]
    except FileNotFoundError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no rows file (JSON with a list `rows`): {error!r}") from error
    known = [name for name in PlannedRow.__dataclass_fields__]
    found, lacking = [], set()

    def filled(text: str) -> str:
        for _, name, *_ in string.Formatter().parse(text):
            if name is not None and name not in INPUTS:
                raise ValueError(f"{path}: {{{name}}} is no place; choose from {', '.join(INPUTS)}")
            if name and not places.get(name):
                lacking.add(name)
        return text.format(**{name: shlex.quote(places.get(name, "")) for name in INPUTS})

    for entry in rows:
        if not isinstance(entry, dict) or not entry.get("name"):
            raise ValueError(f"{path}: a row without a name: {entry}")
        if unknown := [key for key in entry if key not in known]:
            raise ValueError(f"{path}, row {entry['name']!r}: unknown {', '.join(unknown)}; choose from {known}")
        entry = {key: filled(value) if key != "name" and key != "baseline" else value for key, value in entry.items()}
        for step in ("train", "probe", "finetune"):
            if step in entry:
                entry[step] = f"{filled(content.get(step, ''))} {entry[step]}".strip()
        entry.setdefault("probe", filled(content.get("probe", "")))
        entry["weights"] = " ".join(shlex.split(entry.get("weights", "")))
        given = entry.pop("baseline", None) or []
        found.append(PlannedRow(**entry, baseline=tuple(given if isinstance(given, list) else [given])))
    tables = read_tables(content.get("tables", list(TABLES)), places.get("cbis", ""), catalog)
    if any(isinstance(table, LesionTable) for table in tables) and not places.get("cbis"):
        lacking.add("cbis")
    if lacking:
        raise UsageError(f"the rows or tables of {path} need {', '.join(INPUTS[name] for name in sorted(lacking))}")
    names = [row.name for row in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"{path}: two rows are called {sorted(twice)[0]!r}")
    by_folder: dict[str, str] = {}
    for row in found:
        if (other := by_folder.setdefault(row.slug, row.name)) != row.name:
            raise ValueError(f"{path}: the rows {other!r} and {row.name!r} would share the folder runs/{row.slug}")
        if unknown := [baseline for baseline in row.baseline if baseline not in names]:
            raise ValueError(f"{path}, row {row.name!r}: its baseline {unknown[0]!r} is no row")
        if row.name in row.baseline:
            raise ValueError(f"{path}, row {row.name!r}: it is its own baseline")
        if row.train is not None and row.weights:
            raise ValueError(f"{path}, row {row.name!r}: `weights` are a model as it is; --init starts a training")
        if row.checkpoint not in CHECKPOINTS:
            choices = ", ".join(CHECKPOINTS)
            raise ValueError(f"{path}, row {row.name!r}: checkpoint {row.checkpoint!r}; choose from {choices}")
    chosen = primary or content.get("primary")
    if chosen is not None:
        table, name = chosen
        compared = [row.name for row in found if row.baseline]
        known = [table.name for table in tables]
        if table not in known or name not in compared:
            raise ValueError(f"primary {table!r} {name!r}: choose one of {', '.join(known)} and of {compared}")
        chosen = (table, name)
    return Plan(found, tables, chosen, content.get("published", {}))
