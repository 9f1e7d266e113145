"""What the page shows, and its files: HTML, Markdown, CSV and TeX."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2

import utils
from evaluation import comparisons, metrics
from evaluation.predictions import class_rows, describe_interval, describe_settings
from evaluation.set_probes import mean_title
from reporting import checklists
from reporting.lesions import explained, lesion_tables, nearest, percent_cell, splits_table
from reporting.pictures import FOLDER, Pictures
from reporting.plots import Gallery, flow_figure, fraction_figures, short, table_figures, training_figures
from reporting.runs import MISSING, ResultRow, ResultTable, Runs
from reporting.samples import samples, searches
from reporting.table_sets import TABLES
from reporting.text import markdown, tex

HERE = Path(__file__).resolve().parents[1]


def columns_of(table: ResultTable) -> dict[str, str]:
    """The columns of a results table, key -> heading."""
    return metrics.headings(metrics.METRICS, table.positive)


def never_predicted(row: ResultRow) -> str:
    """What a remark says of the classes that a row never predicts; "" where there are none."""
    seeds = " (in a seed)" if len(row.folders) > 1 else ""
    return f"never predicts {', '.join(row.never_predicted)}{seeds}" if row.never_predicted else ""


def table_rows(table: ResultTable) -> list[dict[str, Any]]:
    """A results table's rows as the page shows them, a cell for each metric."""
    return [
        {"name": row.name, "kind": row.kind, "source": row.source, "leaves_out": row.leaves_out,
         "never": never_predicted(row), "cells": [percent_cell(row.metrics.get(key)) for key in columns_of(table)],
         "unlearnt": row.unlearnt}
        for row in table.rows
    ]  # fmt: skip


def comparison_rows(table: ResultTable, runs: Runs) -> list[dict[str, str]]:
    """The differences of AUROC to a baseline, with how each p-value is to be read."""
    found = []
    for entry in table.comparisons:
        value = entry["difference"]["auroc"]
        if entry["primary"] and runs.primary:
            late = "AFTER results were there" if runs.primary["after_results"] else "before any result"
            p = f"{metrics.Difference.of(value).p_text().removeprefix('p = ')}, primary, named {late}"
        elif "p_holm" in entry:
            p = f"{entry['p_holm']:.4f} (Holm, {entry['family']})"
        elif value["p_value"] is None:
            p = "no p-value"
        else:
            p = f"{value['p_value']:.4f}, uncorrected"
        line = {"row": entry["row"], "baseline": short(entry["baseline"], table.kind), "p": p}
        line["differ"] = "; ".join(describe_settings(entry))
        found.append(line | {"difference": percent_cell(value), "leaves_out": entry.get("leaves_out", "")})
    return found


def class_lines(table: ResultTable) -> list[list[str]]:
    """Each class against the rest, of each model: model, class, test samples, AUROC and sensitivity."""
    return [[row.name, *cells] for row in table.rows for cells in class_rows({"per_class": row.per_class})]


def ordered_lines(table: ResultTable) -> list[list[str]]:
    """What classes in an order have, of each model."""
    return [
        [row.name, metrics.ORDERED_METRICS[name], describe_interval(name, value)]
        for row in table.rows
        for name, value in row.ordered.items()
    ]


def seeds_of(table: ResultTable) -> str:
    """How many seeds the rows are of, and why rows of few may have very different intervals."""
    rows = [row for row in table.rows if row.kind == "measured" and row.folders]
    if not rows:
        return ""
    numbers = sorted({len(row.folders) for row in rows})
    said = f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
    line = f"{said} run{'s' * (numbers != [1])} (seed{'s' * (numbers != [1])}) behind each model."
    widths = [(len(row.folders), comparisons.width(row.metrics.get("auroc", {}))) for row in rows]
    return f"{line} {comparisons.FEW_SEEDS}." if comparisons.few_seeds_matter(widths) else line


def fraction_lines(runs: Runs) -> list[list[str]]:
    """Figures of probes on fractions of the labels: row, set, fraction, samples, metric, value."""
    lines = []
    for row, dataset, parts in runs.fractions:
        for part in parts:
            start = [row, dataset, f"{part['fraction']:.2%}"]
            if "metrics" in part:
                of = f"{part['lesions'][0]} lesions of {part['patients'][0]} patients, {len(part['lesions'])} draws"
                lines.append([*start, of, "AUROC", percent_cell(part["metrics"]["auroc"])])
                continue
            unit, form = (1, ".3f") if part["metric"] == "quadratic_kappa" else (100, ".2f")
            spread = "" if part["std"] is None else f" ± {unit * part['std']:{form}}"
            of = f"{part['samples']} images, {len(part['scores'])} draws"
            lines.append([*start, of, part["metric"] or MISSING, f"{unit * part['mean']:{form}}{spread}"])
    return lines


def detection_rows(table: ResultTable) -> list[dict[str, Any]]:
    """The class that is looked for against the rest, of each model; none where no model has it."""
    if not any(row.detection for row in table.rows):
        return []
    return [
        {"name": row.name, "cells": [
            describe_interval(key, row.detection[key]) if key in row.detection else MISSING for key in metrics.DETECTION
        ]} for row in table.rows if row.kind == "measured" and row.predictions == "predictions.csv"
    ]  # fmt: skip


def unit_rows(table: ResultTable) -> list[dict[str, Any]]:
    """The same metrics by breast and by patient, from the mean and from the highest of a unit's scores."""
    found = []
    for row in table.rows:
        for unit, entry in row.units.items():
            for key, how in (("metrics", "mean"), ("metrics_max", "highest")):
                if key not in entry:
                    continue
                values = entry[key] or {}
                cells = [
                    percent_cell(values.get(name)) if values else "a class is missing" for name in columns_of(table)
                ]
                found.append({"name": row.name, "unit": f"{unit} ({entry['number']}), {how}", "cells": cells})
    return found


def subgroup_rows(table: ResultTable) -> list[dict[str, Any]]:
    """Of the last model; the intervals are over patients and, where there are several, seeds."""
    models = [row for row in table.rows if row.subgroups]
    if not models:
        return []
    return [
        {"model": models[-1].name, "group": f"{part['by']}: {part['value']}", "lesions": part["lesions"],
         "patients": part["patients"], "malignant": part["pathologies"].get(table.positive, ""),
         "seeds": max(1, len(models[-1].folders)),
         "auroc": percent_cell(part["auroc"]) if part["auroc"] else "not defined",
         "auroc_malignant": percent_cell(part["auroc_malignant"]) if part["auroc_malignant"] else "not defined"}
        for part in models[-1].subgroups
    ]  # fmt: skip


def two_class_rows(table: ResultTable) -> list[tuple[str, str]]:
    """AUROC without the dismissed lesions, a value for each seed."""
    return [(row.name, "; ".join(map(percent_cell, row.two_class))) for row in table.rows if row.two_class]


def class_codes(table: ResultTable) -> str:
    """The table's classes in words; "" of too many to name."""
    if len(table.classes) > MOST_NAMED:
        return ""
    names = [f"{name} ({CODES[name]})" if name in CODES else name for name in table.classes]
    positive = table.positive if table.positive in table.classes else None
    return ", ".join(names) + (f"; {positive} is the one that is looked for" if positive else "")


MOST_NAMED = 12  # classes
CODES = {"BENIGN_WITHOUT_CALLBACK": "the radiologist asked for neither a biopsy nor further films"}


def build_page(
    runs: Runs, title: str, images: bool, saliency_lesions: int = 0, roco: Path | None = None,
    folders: Sequence[Path] = (),
) -> dict[str, Any]:  # fmt: skip
    """Everything that the templates show."""
    gallery, pictures, sections, lesions = Gallery(), Pictures(), [], lesion_tables(runs)
    for kind, table in runs.tables.items():
        rows = lesions.get(kind)
        sections.append({
            "kind": kind, "anchor": anchor(kind), "title": TABLES.get(kind, kind), "lesion": table.of_lesions,
            "size": table.size(), "unit": table.unit, "classes": class_codes(table),
            "columns": list(columns_of(table).values()), "against": metrics.class_title(table.positive),
            "positive": table.positive or "",
            "detection_columns": list(metrics.headings(metrics.DETECTION, table.positive).values()),
            "rows": table_rows(table), "comparisons": comparison_rows(table, runs), "absent": table.absent,
            "two_class": two_class_rows(table), "per_class": class_lines(table), "ordered": ordered_lines(table),
            "seeds": seeds_of(table),
            "detection": detection_rows(table), "units": unit_rows(table), "subgroups": subgroup_rows(table),
            "figures": table_figures(table, runs, gallery),
            "splits": splits_table(rows) if rows else None,
            "flow": flow_figure(kind, rows, runs, gallery) if rows else None,
            "samples": samples(table, rows, runs, pictures) if images else None,
            "nearest": nearest(table, rows, runs, roco) if rows and images else None,
            "saliency": explained(table, rows, runs, saliency_lesions, images) if rows else None,
        })  # fmt: skip
    training, fractions = training_figures(runs, gallery), fraction_figures(runs, gallery)
    return {
        "title": title,
        "synthetic": runs.synthetic,
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "sections": sections,
        "searches": searches(folders, runs, pictures, images),
        "pictures": pictures.files,
        "training": training,
        "fractions": fractions,
        "fraction_lines": fraction_lines(runs),
        "figures": gallery.found,
        "other": [line for path, result in runs.other for line in describe_other(path, result)],
        "zeroshot": [describe_zeroshot(name, result) for name, result in runs.zeroshot],
        "commands": commands_of(runs),
        "steps": runs.steps,
        "versions": versions_of(runs),
        "checklists": checklists.answer(facts_of(runs, sections)),
        "read": sorted({str(path) for path in runs.read}),
        "missing": MISSING,
    }


OWN_IDS = ("other", "fractions", "searches", "training", "checklists", "provenance")  # of the page's other headings


def anchor(kind: str) -> str:
    """What the page's links to a table call it."""
    return utils.file_name(kind) + "~" * (kind in OWN_IDS)


def describe_other(path: str, result: dict) -> list[dict[str, str]]:
    """A result on a set that has no table, as one line, or one for each of its findings."""
    dataset = str(result.get("dataset"))
    if found := result.get("findings"):
        titles = {name: name for name in found}
        if "mean_of" in found.get("macro", {}):
            titles["macro"] = mean_title(found["macro"]["mean_of"], found["macro"]["left_out"])
        line = {"metric": "AUROC", "source": path}
        return [
            line | {"dataset": f"{dataset}: {titles[name]}", "score": percent_cell(own["auroc"])}
            for name, own in found.items()
        ]
    kinds = {dataset: result, f"{dataset}, logistic regression": result.get("logistic", {})}
    neighbours = result.get("knn", {})
    kinds[f"{dataset}, {neighbours.get('k')}-NN"] = neighbours
    lines = []
    for title, scores in kinds.items():
        if "score" in scores:
            remarks = "".join(f"; {words} {result[key]}" for key, words in REMARKS.items() if key in result)
            metric, value = shown(scores, result)
            lines.append({"dataset": title, "metric": metric, "score": f"{value}{remarks}", "source": path})
    if lines or result.get("fractions"):  # which have a table of their own
        return lines
    return [{"dataset": dataset, "metric": MISSING, "score": MISSING, "source": path}]


def shown(scores: dict, file: dict) -> tuple[str, str]:
    """A metric's name and its value in percent, with the sign (kappa as it is), whatever unit the file has it in."""
    metric, _, value = metrics.shown_score(metrics.fractions(scores, file.get("unit", "percent"))).partition(" ")
    return metric, value


REMARKS = {"no_metrics": "no metrics of the test rows:", "unlearnt": "no training image of"}


def describe_zeroshot(name: str, result: dict) -> dict[str, Any]:
    """A file of eval_zeroshot.py: metric and score of each set."""
    sets = {**result.get("zero_shot", {}), **result.get("retrieval", {})}
    rows = [
        (key, shown(value, result)[0], shown(value, result)[1] + no_metrics(value)) if "score" in value else
        (key, "image-to-text recall at 1",
         f"{100 * metrics.fractions(value, result.get('unit', 'percent'))['i2t_r1']:.2f}%")
        for key, value in sets.items()
    ]  # fmt: skip
    return {"name": name, "rows": rows}


def no_metrics(value: dict[str, Any]) -> str:
    """Why a set whose rows are known is no row of a table."""
    return f"; {REMARKS['no_metrics']} {value['no_metrics']}" if "no_metrics" in value else ""


def commands_of(runs: Runs) -> list[dict[str, str]]:
    """All flags of each run, as settings.json has them, the defaults too."""
    found = []
    for name, settings in runs.settings:
        given = {k: v for k, v in settings.get("args", {}).items() if v not in (None, False, "", [])}
        flags = (f"--{key.replace('_', '-')} {_spelled(value)}".strip() for key, value in given.items())
        found.append({"name": name, "flags": " ".join(flags)})
    return found


def _spelled(value: Any) -> str:
    if value is True:
        return ""
    return shlex.join(map(str, value)) if isinstance(value, list) else shlex.quote(str(value))


def versions_of(runs: Runs) -> dict[str, str]:
    """Of all runs; where they differ, all that occur."""
    found: dict[str, set[str]] = {}
    for _, settings in runs.settings:
        for name, version in settings.get("versions", {}).items():
            found.setdefault(name, set()).add(str(version))
    return {name: ", ".join(sorted(values)) for name, values in sorted(found.items())}


def facts_of(runs: Runs, sections: list[dict[str, Any]]) -> dict[str, Any]:
    """What the checklists are answered from."""
    models = [row for table in runs.tables.values() for row in table.rows if row.kind == "measured"]
    measured = [table for table in runs.tables.values() if any(row.kind == "measured" for row in table.rows)]
    derived = [settings.get("derived", {}) for _, settings in runs.settings]
    return {
        "tables": {TABLES.get(kind, kind): table.size() for kind, table in runs.tables.items() if table.lesions},
        "over": " and ".join(sorted({table.unit for table in runs.tables.values()})),
        "splits": any(s["splits"] for s in sections),
        "flow": any(s["flow"] for s in sections),
        "rows": len(models),
        "seeds": max((len(row.folders) for row in models), default=0),
        "skipped": runs.skipped,
        "cbis": any(table.of_lesions and table.lesions for table in runs.tables.values()),
        "sets": list(
            dict.fromkeys(table.dataset for table in runs.tables.values() if not table.of_lesions and table.lesions)
        ),
        "classes": list(dict.fromkeys(table.classes for table in measured)),
        "metrics": list(dict.fromkeys(title for table in measured for title in columns_of(table).values())),
        "units": " and ".join(sorted({table.unit for table in measured} - {"images", "lesions"})),
        "comparisons": any(table.comparisons for table in runs.tables.values()),
        "primary": runs.primary,
        "detection": any(row.detection for row in models),
        "subgroups": any(row.subgroups for row in models),
        "pairs": sorted({d["training_pairs"] for d in derived if "training_pairs" in d}),
        "parameters": sorted({d["parameters"] for d in derived if "parameters" in d}),
        "devices": sorted({str(d["device"]) for d in derived if "device" in d}),
        "versions": versions_of(runs),
        "commands": bool(runs.settings),
        "misread": any(s["samples"] for s in sections),
        "saliency": any(s["saliency"] and not s["saliency"]["why"] for s in sections),
        "radiologist": any("Radiologist" in row.name for t in runs.tables.values() for row in t.rows),
        "synthetic": runs.synthetic,
    }


def never_seen(unlearnt: list[str]) -> str:
    """What is said of classes without training images; nothing where there are none."""
    return f"no training image of {', '.join(unlearnt)}, in no mean over classes" if unlearnt else ""


MISSING_CELL = percent_cell(None)


def write_csv(page: dict[str, Any]) -> str:
    """All results tables as one CSV, cells as the page has them."""
    titles = metrics.headings(metrics.METRICS, "positive class")
    lines = [["table", "row", "kind", *titles.values(), "positive class", "leaves out", "source"]]
    for section in page["sections"]:
        for row in section["rows"]:
            cells = row["cells"] + [MISSING_CELL] * (len(titles) - len(row["cells"]))  # without a positive class
            leaves_out = "; ".join(filter(None, [row["leaves_out"], never_seen(row["unlearnt"])]))
            lines.append(
                [section["title"], row["name"], row["kind"], *cells, section["positive"], leaves_out, row["source"]]
            )
    return utils.csv_text(lines)


def write_tex(page: dict[str, Any]) -> str:
    """A booktabs table for each results table; the interval stands small below its value."""
    lines = ["% Needs \\usepackage{booktabs}. Percent, with 95\\% intervals."]
    if page["synthetic"]:
        lines.append("% SYNTHETIC data: these numbers say nothing about patients.")
    for section in page["sections"]:
        caption = f"{section['title']}" + (" (SYNTHETIC data)" if page["synthetic"] else "")
        caption += "".join(
            f". {row['name']}: {never_seen(row['unlearnt'])}" for row in section["rows"] if row["unlearnt"]
        )
        heads, shape = ["Model", *map(tex, section["columns"])], "l" + "c" * len(section["columns"])
        lines += [r"\begin{table}", rf"\caption{{{tex(caption)}}}", rf"\begin{{tabular}}{{{shape}}}"]
        lines += [r"\toprule", " & ".join(heads) + r" \\", r"\midrule"]
        for row in section["rows"]:
            name = tex(row["name"]) + (r"$^\dagger$" if row["leaves_out"] else "")
            lines.append(" & ".join([name, *map(tex, row["cells"])]) + r" \\")
        lines += [r"\bottomrule", r"\end{tabular}", r"\end{table}"]
    return "\n".join(lines) + "\n"


def write_report(page: dict[str, Any], folder: Path) -> None:
    """report.html, report.md with figures/, tables.csv and tables.tex; beside them images that are too many for it."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=jinja2.select_autoescape(["html.jinja"]),
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["never_seen"] = never_seen
    environment.filters["md"] = lambda value: markdown(str(value))
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    files: dict[str, str | bytes] = {}
    for figure in page["figures"].values():
        files |= {f"figures/{figure.name}.svg": with_colours(figure.svg), f"figures/{figure.name}.png": figure.png}
    for old in (folder / FOLDER).glob("[0-9]*.jpg"):  # a page without images leaves none of an earlier one beside it
        old.unlink()
    if page["pictures"]:
        (folder / FOLDER).mkdir(exist_ok=True)
    files |= page["pictures"]
    for name in ("report.html", "report.md"):
        files[name] = environment.get_template(f"{name}.jinja").render(page)
    files |= {"tables.csv": write_csv(page), "tables.tex": write_tex(page)}
    for name, text in files.items():
        data = text if isinstance(text, bytes) else text.encode("utf8", "backslashreplace")
        utils.atomic_write(folder / name, lambda file, data=data: file.write(data))


def with_colours(svg: str) -> str:
    """A figure by itself has no page to take its text colour from: one that is read on white and on black."""
    return svg.replace("<svg ", '<svg style="color:#777" ', 1)
