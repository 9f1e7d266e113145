"""Runs of several seeds to tables with intervals and comparisons."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

import utils
from evaluation import comparisons, metrics, subgroups
from evaluation.comparisons import Draws
from evaluation.predictions import Predictions
from evaluation.resamples import Bootstrap
from reporting.files import RESULT, require
from reporting.plan import Plan
from reporting.steps import Step, folder_of, seeds_of
from reporting.table_sets import TABLES, LesionTable, Table, TestSplit
from reporting.text import markdown
from runtime.versions import versions

HOLM_METRIC = "auroc"  # the comparisons of a table are tested on this one


@dataclass
class Measured:
    """The runs of a row for one table, and what they draw."""

    name: str
    kind: str  # measured or reference
    seeds: list[int]
    found: list[Predictions]
    trained: bool
    results: list[dict] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)
    draws: dict[str, Draws] = field(default_factory=dict)


def measure(
    plan: Plan, args: argparse.Namespace, out: Path, table: Table, test: TestSplit
) -> tuple[list[Measured], dict[str, str]]:
    """References and rows of a table, and what is missing and why."""
    measured, absent = [], {}
    for name, found in test.references.items():
        if isinstance(found, str):
            absent[name] = found
        else:
            measured.append(Measured(name, "reference", [], found, trained=False))
    wanted = (*RESULT, "operating_point") if isinstance(table, LesionTable) else RESULT
    for row in plan.rows:
        item = Measured(row.name, "measured", [], [], trained=row.seeded)
        for seed in seeds_of(row, args.seeds):
            folder = folder_of(out, row, seed) / table.folder
            if not (folder / "results.json").is_file():
                item.missing.append(seed)
                continue
            path = folder / "predictions.csv"
            item.found.append(Predictions.read(path, test.scheme).in_order_of(test.rows, path))
            item.results.append(utils.read_json(folder / "results.json"))
            require(item.results[-1], folder / "results.json", wanted)
            item.files.append(str(folder.relative_to(out)))
            item.seeds.append(seed)
        if item.found:
            measured.append(item)
        else:
            absent[row.name] = "no seed has results"
    for item in measured:
        resamples = item.found[0].resamples(Bootstrap(args.resamples))
        item.draws = comparisons.draw_rows(resamples, [p.prob for p in item.found], item.trained)
    return measured, absent


def describe_row(item: Measured, table: Table, test: TestSplit, bootstrap: Bootstrap) -> dict[str, Any]:
    """What tables.json says of a row: its columns, and for a model all else."""
    entry: dict[str, Any] = {
        "name": item.name,
        "kind": item.kind,
        "seeds": item.seeds,
        "missing_seeds": item.missing,
        "leaves_out": comparisons.ONE_SEED if any(d.lacks_seeds for d in item.draws.values()) else "",
        "files": item.files,
        "metrics": {
            name: comparisons.interval(d).plain() | {"values": d.values.tolist()} for name, d in item.draws.items()
        },
    }
    if item.kind == "reference":
        return entry
    # Rows of the table, which know density and the like, with the probabilities of each seed.
    whole = [Predictions(test.rows, p.prob, test.scheme) for p in item.found]
    if all(result.get("operating_point") for result in item.results):
        entry["detection"] = describe_detection(whole, item, bootstrap)
    entry["per_class"] = describe_classes(whole, item, bootstrap)
    entry["never_predicted"] = sorted({name for r in item.results for name in r.get("never_predicted", [])})
    entry["confusion"] = np.mean([r["confusion"] for r in item.results], axis=0).tolist()
    entry["weights"] = [r.get("weights", {}) for r in item.results]
    if units := describe_units(whole, item, bootstrap):
        entry["units"] = units
    if test.scheme.subgroups:
        entry["subgroups"] = subgroups.score_subgroups(whole[0], bootstrap, others=whole[1:])
    if isinstance(table, LesionTable):
        entry["two_class"] = [r["two_class"]["metrics"]["auroc"] for r in item.results if r.get("two_class")]
        entry["test_readings"] = [r.get("test_readings") for r in item.results]
    return entry


def describe_units(whole: list[Predictions], item: Measured, bootstrap: Bootstrap) -> dict[str, dict[str, Any]]:
    """The six columns by breast, patient or what else the set's units are, from the mean of a unit's scores."""
    units = {}
    for unit, _ in whole[0].scheme.units:
        merged = [subgroups.by_unit(p, unit) for p in whole]
        units[unit] = {"number": len(merged[0].rows), "metrics": plain_draws(merged, item.trained, bootstrap)}
    return units


def describe_detection(
    whole: list[Predictions], item: Measured, bootstrap: Bootstrap
) -> dict[str, dict[str, float | None]]:
    """The positive class against the rest at each seed's own operating point; intervals over seeds and patients."""
    resamples = whole[0].resamples(bootstrap)
    drawn = []
    for found, result in zip(whole, item.results, strict=True):
        point = result["operating_point"]
        point = metrics.OperatingPoint(point["temperature"], point["threshold"])
        drawn.append(resamples.draw_detection(found.prob, point))
    return {
        name: comparisons.interval(row, bounded=not name.startswith("calibration")).plain()
        for name, row in comparisons.together(drawn, resamples, item.trained).items()
    }


def describe_classes(whole: list[Predictions], item: Measured, bootstrap: Bootstrap) -> dict[str, dict[str, Any]]:
    """Each class against the rest: its test lesions, AUROC and sensitivity, with intervals over seeds and patients."""
    resamples = whole[0].resamples(bootstrap)
    drawn = []
    for found in whole:
        each = resamples.draw_with_classes(found.prob)[1]
        drawn.append({f"{key} {name}": one for name, own in each.items() for key, one in own.items()})
    rows = comparisons.together(drawn, resamples, item.trained)
    support = np.bincount(whole[0].labels, minlength=len(resamples.classes)).tolist()
    per_class: dict[str, dict[str, Any]] = {
        name: {"support": n} for name, n in zip(resamples.classes, support, strict=True)
    }
    for title, row in rows.items():
        key, _, name = title.partition(" ")
        per_class[name][key] = comparisons.interval(row).plain()
    return per_class


def plain_draws(found: list[Predictions], trained: bool, bootstrap: Bootstrap) -> dict[str, Any] | None:
    """The six columns of other units than lesions; None where a class is missing or the patients are too few."""
    try:
        draws = comparisons.draw_rows(found[0].resamples(bootstrap), [p.prob for p in found], trained)
    except ValueError:
        return None
    return {name: comparisons.interval(d).plain() for name, d in draws.items()}


def compare(plan: Plan, kind: str, measured: list[Measured]) -> list[dict[str, Any]]:
    """Each row with its baselines, and Holm's correction over the AUROCs of all but the primary comparison."""
    by_name = {item.name: item for item in measured}
    found = []
    for row, name in [(own, baseline) for own in plan.rows for baseline in own.baseline]:
        if row.name not in by_name or name not in by_name:
            continue
        item, baseline = by_name[row.name], by_name[name]
        differences = {key: comparisons.difference(d, baseline.draws[key]).plain() for key, d in item.draws.items()}
        alone = [i.name for i in (item, baseline) if any(d.lacks_seeds for d in i.draws.values())]
        found.append({
            "row": row.name, "baseline": name,
            "primary": plan.primary == (kind, row.name) and name == row.baseline[0],
            "difference": differences, "leaves_out": f"{', '.join(alone)}: {comparisons.ONE_SEED}" if alone else "",
        })  # fmt: skip
    secondary = [entry for entry in found if not entry["primary"]]
    tested = [entry for entry in secondary if entry["difference"][HOLM_METRIC]["p_value"] is not None]
    corrected = comparisons.holm([entry["difference"][HOLM_METRIC]["p_value"] for entry in tested])
    for entry, p in zip(tested, corrected, strict=True):
        entry["p_holm"], entry["family"] = p, len(tested)
    return found


def name_primary(plan: Plan, out: Path, results_there: bool) -> dict[str, Any] | None:
    """When the primary comparison was named, and whether results were there by then; kept in primary.json."""
    if plan.primary is None:
        return None
    path = out / "primary.json"
    named = utils.read_json(path) if path.is_file() else {}
    if (named.get("table"), named.get("row")) != plan.primary:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        named = {"table": plan.primary[0], "row": plan.primary[1], "named": now, "after_results": results_there}
        utils.write_json(path, named)
    return named


def collect(plan: Plan, args: argparse.Namespace, out: Path, primary: dict | None, steps: list[Step]) -> dict[str, Any]:
    """Everything that tables.md and a report show."""
    tables = {}
    for table in plan.tables:
        test = table.test()
        measured, absent = measure(plan, args, out, table, test)
        tables[table.name] = {
            "samples": table.samples,
            "folds": table.folds,
            "lesions": len(test.rows),  # or images
            "patients": test.groups,  # or what the unit is
            "unit": test.scheme.unit,
            "classes": list(test.scheme.classes),
            "positive": test.scheme.positive,
            "unlearnt": list(test.scheme.unlearnt),
            "published": plan.published.get(table.name, {}),
            "rows": [describe_row(item, table, test, Bootstrap(args.resamples)) for item in measured],
            "comparisons": compare(plan, table.name, measured),
            "absent": absent,
        }
    return {
        "synthetic": any(table.synthetic for table in plan.tables),
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "cbis": str(args.cbis),
        "seeds": args.seeds,
        "resamples": args.resamples,
        "level": 0.95,
        "unit": "fraction",
        "primary": primary,
        "tables": tables,
        "steps": [
            {"name": s.name, "command": shlex.join(s.command[1:]), "status": s.status, "seconds": round(s.seconds, 1)}
            for s in steps
        ],
    }


def describe(result: dict[str, Any]) -> str:
    """tables.md."""
    lines = []
    if result["synthetic"]:
        lines += ["**SYNTHETIC data: these numbers say nothing about patients.**", ""]
    seeds, tables = len(result["seeds"]), result["tables"]
    over = " or ".join(dict.fromkeys(table["unit"] for table in tables.values()))
    lines.append(
        f"Percent, the mean over {seeds} training seed{'s' * (seeds > 1)}, with 95% intervals over training and "
        f"{over} ({result['resamples']} resamples)."
        if seeds > 1
        else f"Percent, with 95% intervals over {over} ({result['resamples']} resamples); {comparisons.ONE_SEED}."
    )
    for kind, table in tables.items():
        heads = metrics.headings(metrics.METRICS, table["positive"])
        size = f"{table['lesions']} {'' if table['folds'] else 'test '}{table['samples']}"
        size += f" of {table['patients']} {table['unit']}" if table["unit"] != table["samples"] else ""
        size += f", {table['folds']}-fold cross-validation" if table["folds"] else ""
        lines += ["", f"## {TABLES.get(kind, markdown(kind))} ({size})", ""]
        lines += [f"| Model | {' | '.join(heads.values())} |", "| --- |" + " --- |" * len(heads)]
        for name, values in table["published"].items():
            cells = (f"{values[key]:g}" if values.get(key) is not None else "–" for key in heads)
            lines.append(f"| {markdown(name)} (as published) | {' | '.join(cells)} |")
        for row in table["rows"]:
            cells = (metrics.Interval.of(row["metrics"][key]).percent() for key in heads)
            name = markdown(row["name"])
            name = f"*{name}*" if row["kind"] == "reference" else name
            remark = " †" if row["leaves_out"] else ""
            lines.append(f"| {name}{remark} | {' | '.join(cells)} |")
        if any(row["leaves_out"] for row in table["rows"]):
            lines += ["", f"† {comparisons.ONE_SEED}."]
        widths = [(len(row["seeds"]), comparisons.width(row["metrics"]["auroc"])) for row in table["rows"]]
        if comparisons.few_seeds_matter(widths):
            lines += ["", f"{comparisons.FEW_SEEDS}."]
        if table["unlearnt"]:
            lines += ["", f"No training image, and in no mean over classes: {markdown(', '.join(table['unlearnt']))}."]
        lines += describe_remarks(table)
        lines += describe_comparisons(table["comparisons"], result["primary"], table["unit"])
    if any(kind in TABLES for kind in tables):
        lines += [
            "",
            "Rows in italics look at no image but for its size. BENIGN_WITHOUT_CALLBACK: the radiologist asked for "
            "neither a biopsy nor further films.",
        ]
    else:
        lines += ["", "Rows in italics look at no image."]
    return "\n".join(lines)


def describe_remarks(table: dict[str, Any]) -> Iterable[str]:
    """What a reader of a table's rows should know of some, as lines of Markdown."""
    for row in table["rows"]:
        name = markdown(row["name"])
        if row.get("never_predicted"):
            yield f"\n{name} never predicts {markdown(', '.join(row['never_predicted']))} (in a seed)."
        if row["missing_seeds"]:
            yield f"\n{name}: no results of seed {', '.join(map(str, row['missing_seeds']))}."
    for name, why in table["absent"].items():
        yield f"\nWithout a row: {markdown(name)}, because {why}."


def describe_comparisons(found: list[dict[str, Any]], primary: dict | None, unit: str) -> Iterable[str]:
    """The differences of a table as lines of Markdown."""
    if not found:
        return
    yield ""
    yield f"AUROC minus the baseline's, percentage points, paired over {unit}:"
    yield ""
    for entry in found:
        value = entry["difference"][HOLM_METRIC]
        difference = metrics.Difference.of(value)
        if entry["primary"] and primary:
            late = ", AFTER results were there" if primary["after_results"] else ", before any result"
            p = f"{difference.p_text()} (primary, named {primary['named']}{late})"
        elif "p_holm" not in entry:
            p = difference.p_text()
        else:
            p = f"p = {entry['p_holm']:.4f} (Holm, {entry['family']} comparison{'s' * (entry['family'] > 1)})"
        remark = f"; {entry['leaves_out']}" if entry["leaves_out"] else ""
        pair = f"{markdown(entry['row'])} − {markdown(entry['baseline'])}"
        yield f"- {pair}: {difference.percent()}, {p}{markdown(remark)}"
