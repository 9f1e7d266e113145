"""Both results tables by one command: prepare, fine-tune, probe and compare, with the seeds and the patients in them.

    python make_tables.py --roco /path/to/roco --cbis /path/to/cbis-ddsm --medclip-vit /path/to/medclip-vit.zip \\
      --medclip-resnet /path/to/medclip-resnet.zip --bert-vocab /path/to/vocab.txt --seeds 0 1 2

The rows stand in table_rows.json; a copy of it with other rows (another tower, another subset, fine-tuning end to
end) goes in by --rows. Everything is checked before the first hour is spent. Each step is an ordinary command, which
--dry-run prints: done ones are skipped, one that was cut off goes on, and a failed one does not stop the others.
Written are tables.md for people and tables.json for make_report.py.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import shlex
import shutil
import signal
import string
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

import cbis
import comparisons
import main as training
import main_linear
import metrics
import models
import predictions
import references
import utils
from beit_finetuning import run_class_finetuning
from comparisons import Draws
from predictions import Predictions

log = logging.getLogger("medslip")
HERE = Path(__file__).resolve().parent
TABLES = {"calc": "Calcification", "mass": "Mass"}
INPUTS = {"roco": "--roco", "cbis": "--cbis", "medclip_vit": "--medclip-vit", "medclip_resnet": "--medclip-resnet",
          "bert_vocab": "--bert-vocab"}  # fmt: skip
HOLM_METRIC = "auroc"  # the comparisons of a table are tested on this one


# fmt: off
def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("make_tables.py", description=__doc__, formatter_class=utils.HelpFormatter)
    data = parser.add_argument_group("what the rows are made from")
    data.add_argument("--roco", default="", type=str, help="folder of ROCO")
    data.add_argument("--cbis", default="", type=str, help="folder of CBIS-DDSM; its tables are prepared where absent")
    data.add_argument("--medclip-vit", default="", type=str, help="MedCLIP's medclip-vit: folder, zip or .bin")
    data.add_argument("--medclip-resnet", default="", type=str, help="MedCLIP's medclip-resnet: folder, zip or .bin")
    data.add_argument("--bert-vocab", default="", type=str, help="vocab.txt of Bio_ClinicalBERT")
    rows = parser.add_argument_group("rows")
    rows.add_argument("--rows", default=str(HERE / "table_rows.json"), type=str, metavar="JSON",
                      help="the rows; copy the default to change them")
    rows.add_argument("--seeds", default=[0, 1, 2], nargs="+", type=int,
                      help="trainings of each row. One says nothing of the training's chance, three are few; a "
                      "published model as it is has none")
    rows.add_argument("--primary", default=None, nargs=2, metavar=("TABLE", "ROW"),
                      help="the one comparison that is tested without correction, named before results are there "
                      "(default: the rows file's)")
    rows.add_argument("--resamples", default=2000, type=utils.positive_int, help="of the patients, for intervals")
    run = parser.add_argument_group("running")
    run.add_argument("--output-dir", default="./tables", type=str, help="runs and tables go here")
    run.add_argument("-j", "--workers", default=8, type=int, help="loader processes of each step")
    run.add_argument("--dry-run", action="store_true", help="check everything, print each step's command and stop")
    run.add_argument("--submit", default=None, nargs="?", const="", type=str, metavar="FLAGS",
                     help="send the trainings to Slurm through run_with_submitit.py with these flags, e.g. "
                     "--submit='--partition gpu --nodes 1 --ngpus 1'; the same command again says which still wait or "
                     "run, and goes on when they have ended")
    return parser
# fmt: on

# ---------------------------------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A row of the rows file. Flags are those of main.py, main_linear.py and run_class_finetuning.py."""

    name: str
    weights: str = ""  # a model as it is: what --pretrained takes; empty with `train`, or for an untrained tower
    train: str | None = None  # flags of main.py; its best checkpoint is evaluated
    probe: str = ""  # further flags of main_linear.py
    finetune: str | None = None  # flags of run_class_finetuning.py, in place of the probe
    baseline: str | None = None  # the row it is compared with

    @property
    def seeded(self) -> bool:
        """Whether a seed has a part in it: every row but a given model that is probed as it is."""
        return self.train is not None or self.finetune is not None or not self.weights or "--untrained" in self.probe

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9]+", "_", self.name.lower()).strip("_")


@dataclass(frozen=True)
class Plan:
    """The rows file, its places filled in."""

    rows: list[Row]
    primary: tuple[str, str] | None
    published: dict[str, dict[str, dict[str, float]]]  # table -> name -> metric -> percent


def read_plan(path: str | Path, places: dict[str, str], primary: Sequence[str] | None) -> Plan:
    """The rows with {roco} and so on filled in; ValueError names what is wrong and the valid choices."""
    try:
        content = json.loads(Path(path).read_text())
        rows = content["rows"]
    except FileNotFoundError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no rows file (JSON with a list `rows`): {error!r}") from error
    known = [name for name in Row.__dataclass_fields__]
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
        found.append(Row(**entry))
    if lacking:
        raise utils.UsageError(f"the rows of {path} need {', '.join(INPUTS[name] for name in sorted(lacking))}")
    names = [row.name for row in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"{path}: two rows are called {sorted(twice)[0]!r}")
    for row in found:
        if row.baseline is not None and row.baseline not in names:
            raise ValueError(f"{path}, row {row.name!r}: its baseline {row.baseline!r} is no row")
        if row.train is not None and row.weights:
            raise ValueError(f"{path}, row {row.name!r}: `weights` are a model as it is; --init starts a training")
    chosen = primary or content.get("primary")
    if chosen is not None:
        table, name = chosen
        compared = [row.name for row in found if row.baseline]
        if table not in TABLES or name not in compared:
            raise ValueError(f"primary {table!r} {name!r}: choose one of {', '.join(TABLES)} and of {compared}")
        chosen = (table, name)
    return Plan(found, chosen, content.get("published", {}))


# ---------------------------------------------------------------------------------------------------------------------
# Steps
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Step:
    """A command, the folder that it fills, and what has to be there before it."""

    name: str
    folder: Path
    command: list[str]
    result: Path  # is there when the step is done
    needs: list[Path] = field(default_factory=list)
    training: bool = False
    status: str = "waiting"
    seconds: float = 0.0

    def record(self) -> dict[str, Any]:
        """What the result follows from: the command, and size and time of the files that it reads."""
        stamps = {str(path): [path.stat().st_size, path.stat().st_mtime_ns] for path in self.needs if path.is_file()}
        return {"command": self.command, "inputs": stamps}

    @property
    def done(self) -> bool:
        return self.result.is_file() and self.recorded == json.loads(json.dumps(self.record()))

    @property
    def recorded(self) -> dict[str, Any] | None:
        """`record` when the step last ran; None where it never has."""
        path = self.folder / "step.json"
        return json.loads(path.read_text()) if path.is_file() else None


def seeds_of(row: Row, seeds: Sequence[int]) -> list[int]:
    return list(seeds) if row.seeded else [seeds[0]]


def folder_of(out: Path, row: Row, seed: int) -> Path:
    return out / "runs" / row.slug / (f"seed{seed}" if row.seeded else "as_is")


def plan_steps(plan: Plan, args: argparse.Namespace, out: Path) -> list[Step]:
    """All commands in the order in which they can run."""
    steps, python = [], sys.executable
    root, tables = Path(args.cbis).absolute(), [f"{kind}.csv" for kind in TABLES]
    if not all((root / name).is_file() for name in tables):
        command = [python, str(HERE / "make_dataset.py"), "cbis", "--root", str(root)]
        steps.append(Step("prepare CBIS-DDSM", out / "runs" / "prepare", command, root / tables[-1]))
    for row in plan.rows:
        for seed in seeds_of(row, args.seeds):
            folder = folder_of(out, row, seed)
            weights = Path(row.weights).absolute() if row.weights else None
            if row.train is not None:
                weights = folder / "training" / "checkpoint_best.pt"
                flags = [*shlex.split(row.train), "--seed", str(seed), "--workers", str(args.workers)]
                script = "main.py" if args.submit is None else "run_with_submitit.py"
                job = [] if args.submit is None else shlex.split(args.submit)
                if args.submit is not None and "--job_dir" not in job:
                    job += ["--job_dir", str(out / "jobs" / "%j")]
                command = [python, str(HERE / script), *flags, "--output-dir", str(folder / "training"), *job]
                steps.append(Step(f"{row.name}, seed {seed}: train", folder / "training", command, weights,
                                  training=True))  # fmt: skip
            for kind in TABLES:
                steps.append(evaluation(row, kind, folder / kind, weights, seed, args, root))
    return steps


def evaluation(
    row: Row, kind: str, folder: Path, weights: Path | None, seed: int, args: argparse.Namespace, root: Path
) -> Step:
    """The step that ends in a row's predictions for one table: a probe, or fine-tuning end to end."""
    needs = [root / f"{kind}.csv", *([weights] if weights else [])]
    result = folder / "results.json"
    name = f"{row.name}, seed {seed}: {kind}" if row.seeded else f"{row.name}: {kind}"
    if row.finetune is not None:
        command = [sys.executable, str(HERE / "beit_finetuning" / "run_class_finetuning.py"),
                   "--data_set", f"cbis_{kind}", "--data_path", str(root), *shlex.split(row.finetune),
                   "--seed", str(seed), "--output_dir", str(folder)]  # fmt: skip
        command += ["--finetune", str(weights)] if weights else []
    else:
        command = [sys.executable, str(HERE / "main_linear.py"),
                   "--dataset", f"cbis_{kind}", "--root", str(root), *shlex.split(row.probe),
                   "--seed", str(seed), "--workers", str(args.workers), "--output-dir", str(folder)]  # fmt: skip
        command += ["--pretrained", str(weights)] if weights else []
    return Step(name, folder, command, result, needs)


# ---------------------------------------------------------------------------------------------------------------------
# What is checked before the first step
# ---------------------------------------------------------------------------------------------------------------------


def check(plan: Plan, args: argparse.Namespace, out: Path) -> list[str]:
    """Everything that would end a step hours later, as ValueErrors; returns what was found, for people."""
    found = []
    root = Path(args.cbis)
    for kind in TABLES:
        if (root / f"{kind}.csv").is_file():
            rows = cbis.read_lesions(root / f"{kind}.csv")
            absent = [row["lesion"] for row in rows if not row["crop"] or not (root / row["crop"]).is_file()]
            if absent and "--image-kind" not in plan_flags(plan):
                raise FileNotFoundError(f"{root / kind}.csv: {len(absent)} lesions have no crop, first {absent[0]}")
            found.append(f"{kind}: {len(rows)} lesions of {len({row['patient'] for row in rows})} patients")
        else:
            cbis.index_series(root)
            found.append(f"{kind}: {len(cbis.read_case_tables(root, kind))} lesions, to be prepared")
    for name in sorted({row.weights for row in plan.rows if row.weights}):
        found.append(f"weights {models.load_pretrained(name).source}")
    needed = 0
    for row in plan.rows:
        if row.finetune is None:
            parse_flags(row, "main_linear.py", main_linear.get_args_parser(), row.probe)
        else:
            parse_flags(row, "run_class_finetuning.py", run_class_finetuning.get_args_parser(), row.finetune)
        if row.train is not None:
            pairs, size = check_training(row)
            missing = [s for s in args.seeds if not (folder_of(out, row, s) / "training" / "checkpoint.pt").is_file()]
            needed += size * len(missing)
            found.append(f"{row.name}: {pairs:,} training pairs")
    out.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out).free
    if needed > free:
        raise OSError(
            f"{out} has {free / 1e9:.0f} GB free; the checkpoints of all trainings need {needed / 1e9:.0f} GB"
        )
    found.append(f"disk: {needed / 1e9:.1f} GB for checkpoints, {free / 1e9:.0f} GB free")
    return found


def plan_flags(plan: Plan) -> str:
    return " ".join(row.probe + (row.finetune or "") for row in plan.rows)


def parse_flags(row: Row, script: str, parser: argparse.ArgumentParser, flags: str) -> argparse.Namespace:
    """A row's flags as their script reads them; ValueError for those that it does not take."""
    parser.exit_on_error = False
    try:
        args, unknown = parser.parse_known_args(shlex.split(flags))
    except (argparse.ArgumentError, SystemExit) as error:
        raise ValueError(f"row {row.name!r}: {script} does not take its flags {flags}: {error}") from error
    if unknown:
        raise ValueError(f"row {row.name!r}: {script} has no flag {unknown[0]}")
    return args


def check_training(row: Row) -> tuple[int, int]:
    """(training pairs, bytes of its checkpoints) of a row; ValueError where the flags, files or pairs do not do."""
    args = parse_flags(row, "main.py", training.get_args_parser(), row.train or "")
    training.check_arguments(args)
    try:
        model, _ = training.build_model(args)  # reads weights and vocabulary
        pairs = len(training.build_reader(args, "train", args.caption_filter, quiet=True))
    except (ValueError, OSError) as error:
        raise type(error)(f"row {row.name!r}: {error}") from error
    if pairs < args.batch_size:
        raise ValueError(f"row {row.name!r}: {pairs} training pairs are fewer than --batch-size {args.batch_size}")
    # Weights and the two moments of AdamW, in the newest numbered file(s) and the best.
    parameters = sum(p.numel() for p in model.parameters())
    return pairs, 12 * parameters * (args.keep_last + 1)


# ---------------------------------------------------------------------------------------------------------------------
# Running
# ---------------------------------------------------------------------------------------------------------------------


def run_steps(steps: list[Step]) -> None:
    """Each step that is not done and has what it needs; a failure stops only what needs it."""
    for number, step in enumerate(steps, 1):
        title = f"[{number}/{len(steps)}] {step.name}"
        if step.training and already_trained(step):
            step.status = "done before"
        elif step.done:
            step.status = "done before"
        elif step.training and (state := state_in_queue(step.folder)):
            step.status = f"submitted before: {state}"
        elif absent := [path for path in step.needs if not path.exists()]:
            step.status = f"not run: {absent[0]} is not there"
        else:
            run_step(step, title)
            continue
        log.info(f"{title}: {step.status}")


def already_trained(step: Step) -> bool:
    """Whether the training of this folder has reached its end; main.py itself refuses other settings."""
    newest = step.folder / "checkpoint.pt"
    if not newest.is_file() or not step.result.is_file() or step.recorded is None:
        return False
    if step.recorded["command"][2:] != step.command[2:]:
        return False
    return bool(utils.training_progress(utils.load_checkpoint(newest, mmap=True), newest).get("finished"))


JOB = "job.txt"  # of a training's folder: the job's number in Slurm


def state_in_queue(folder: Path) -> str:
    """Slurm's word for the training's job, RUNNING and so on; "" where none waits or runs, or Slurm cannot be asked."""
    path = folder / JOB
    if not path.is_file():
        return ""
    number = path.read_text().strip()
    try:
        asked = subprocess.run(["squeue", "-h", "-j", number, "-o", "%T"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    states = sorted(set(asked.stdout.split()) - {"COMPLETING"}) if asked.returncode == 0 else []
    return f"job {number} is {', '.join(states)}" if states else ""


def run_step(step: Step, title: str) -> None:
    """One command in a process of its own; its output goes to output.txt in the folder, its last lines are shown."""
    step.folder.mkdir(parents=True, exist_ok=True)
    output, start = step.folder / "output.txt", time.monotonic()
    log.info(f"{title}: {shlex.join(step.command[1:])}")
    utils.write_json(step.folder / "step.json", step.record())
    with open(output, "a") as file:
        process = subprocess.Popen(step.command, stdout=file, stderr=subprocess.STDOUT)
        previous = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            process.wait()
            raise
        finally:
            signal.signal(signal.SIGTERM, previous)
    step.seconds = time.monotonic() - start
    if code == 0 and step.result.is_file():
        step.status = "done"
    elif code == 0 and "run_with_submitit.py" in step.command[1]:
        numbers = re.findall(r"^job (\S+): files in", output.read_text(errors="replace"), re.MULTILINE)
        if numbers:
            (step.folder / JOB).write_text(numbers[-1] + "\n")
        step.status = f"submitted: job {numbers[-1]}" if numbers else "submitted"
    elif code == 0:
        step.status = f"no {step.result.name} came of it"
    else:
        step.status = f"FAILED with code {code}"
        if step.result.name == "results.json":
            (step.folder / "step.json").unlink()
    log.info(f"    {step.status} after {utils.format_seconds(step.seconds)}")
    if step.status.startswith(("FAILED", "no ")):
        lines = output.read_text(errors="replace").splitlines()
        log.info("\n".join(f"    | {line}" for line in lines[-8:]) + f"\n    all of it: {output}")


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


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


def measure(plan: Plan, args: argparse.Namespace, out: Path, kind: str) -> tuple[list[Measured], dict[str, str], list]:
    """References and rows of a table, what is missing and why, and the test rows."""
    rows = cbis.read_lesions(Path(args.cbis) / f"{kind}.csv")
    measured, absent = [], {}
    for name, found in references.reference_rows(rows).items():
        if isinstance(found, str):
            absent[name] = found
        else:
            measured.append(Measured(name, "reference", [], found, trained=False))
    test = [row for row in rows if row["split"] == "test"]
    for row in plan.rows:
        item = Measured(row.name, "measured", [], [], trained=row.seeded)
        for seed in seeds_of(row, args.seeds):
            folder = folder_of(out, row, seed) / kind
            if not (folder / "results.json").is_file():
                item.missing.append(seed)
                continue
            path = folder / "predictions.csv"
            item.found.append(Predictions.read(path).in_order_of(test, path))
            item.results.append(json.loads((folder / "results.json").read_text()))
            item.files.append(str(folder.relative_to(out)))
            item.seeds.append(seed)
        if item.found:
            measured.append(item)
        else:
            absent[row.name] = "no seed has results"
    for item in measured:
        item.draws = comparisons.draw_metrics(
            item.found[0].labels, [p.prob for p in item.found], item.found[0].patients, cbis.CBIS_CLASSES,
            trained=item.trained, resamples=args.resamples,
        )  # fmt: skip
    return measured, absent, test


def describe_row(item: Measured, test: list[dict[str, str]], resamples: int) -> dict[str, Any]:
    """What tables.json says of a row: the six columns, and for a model all else."""
    entry: dict[str, Any] = {
        "name": item.name,
        "kind": item.kind,
        "seeds": item.seeds,
        "missing_seeds": item.missing,
        "leaves_out": comparisons.ONE_SEED if any(d.lacks_seeds for d in item.draws.values()) else "",
        "files": item.files,
        "metrics": {
            name: asdict(comparisons.interval(d)) | {"values": d.values.tolist()} for name, d in item.draws.items()
        },
    }
    if item.kind == "reference":
        return entry
    # Rows of the table, which know density and the like, with the probabilities of each seed.
    whole = [Predictions(test, p.prob) for p in item.found]
    points = [r["operating_point"] for r in item.results]
    entry["detection"] = estimates([
        metrics.resampled_detection(
            p.labels, p.prob, p.patients, cbis.CBIS_CLASSES,
            metrics.OperatingPoint(point["temperature"], point["threshold"]), resamples=resamples,
        ) for p, point in zip(whole, points, strict=True)
    ], item)  # fmt: skip
    entry["units"] = {}
    for unit in predictions.UNITS:
        merged = [predictions.by_unit(p, unit) for p in whole]
        entry["units"][unit] = {
            "number": len(merged[0].rows),
            "metrics": plain_draws(merged, item.trained, resamples),
        }
    entry["never_predicted"] = sorted({name for r in item.results for name in r.get("never_predicted", [])})
    entry["subgroups"] = predictions.score_subgroups(whole[0], resamples, others=whole[1:])
    entry["two_class"] = [r["two_class"]["metrics"]["auroc"] for r in item.results if r.get("two_class")]
    entry["confusion"] = np.mean([r["confusion"] for r in item.results], axis=0).tolist()
    entry["weights"] = [r.get("weights", {}) for r in item.results]
    entry["test_readings"] = [r.get("test_readings") for r in item.results]
    return entry


def estimates(each: list[dict], item: Measured) -> dict[str, dict[str, float | None]]:
    """Intervals over seeds and patients of draws that are not the six columns."""
    patients = item.draws["auroc"].patients
    return {
        name: predictions.plain(
            comparisons.interval(
                Draws(
                    np.array([e[name][0] for e in each]), np.stack([e[name][1] for e in each]), patients, item.trained
                ),
                bounded=not name.startswith("calibration"),
            )
        )
        for name in each[0]
    }


def plain_draws(found: list[Predictions], trained: bool, resamples: int) -> dict[str, Any] | None:
    """The six columns of other units than lesions; None where a class is missing or the patients are too few."""
    try:
        draws = comparisons.draw_metrics(
            found[0].labels, [p.prob for p in found], found[0].patients, cbis.CBIS_CLASSES, trained=trained,
            resamples=resamples,
        )  # fmt: skip
    except ValueError:
        return None
    return {name: asdict(comparisons.interval(d)) for name, d in draws.items()}


def compare(plan: Plan, kind: str, measured: list[Measured]) -> list[dict[str, Any]]:
    """Each row with its baseline, and Holm's correction over the AUROCs of all but the primary comparison."""
    by_name = {item.name: item for item in measured}
    found = []
    for row in plan.rows:
        if row.baseline is None or row.name not in by_name or row.baseline not in by_name:
            continue
        item, baseline = by_name[row.name], by_name[row.baseline]
        differences = {name: asdict(comparisons.difference(d, baseline.draws[name])) for name, d in item.draws.items()}
        alone = [i.name for i in (item, baseline) if any(d.lacks_seeds for d in i.draws.values())]
        found.append({
            "row": row.name, "baseline": row.baseline, "primary": plan.primary == (kind, row.name),
            "difference": differences, "leaves_out": f"{', '.join(alone)}: {comparisons.ONE_SEED}" if alone else "",
        })  # fmt: skip
    secondary = [entry for entry in found if not entry["primary"]]
    corrected = comparisons.holm([entry["difference"][HOLM_METRIC]["p_value"] for entry in secondary])
    for entry, p in zip(secondary, corrected, strict=True):
        entry["p_holm"], entry["family"] = p, len(secondary)
    return found


def name_primary(plan: Plan, out: Path, results_there: bool) -> dict[str, Any] | None:
    """When the primary comparison was named, and whether results were there by then; kept in primary.json."""
    if plan.primary is None:
        return None
    path = out / "primary.json"
    named = json.loads(path.read_text()) if path.is_file() else {}
    if (named.get("table"), named.get("row")) != plan.primary:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        named = {"table": plan.primary[0], "row": plan.primary[1], "named": now, "after_results": results_there}
        utils.write_json(path, named)
    return named


def collect(plan: Plan, args: argparse.Namespace, out: Path, primary: dict | None, steps: list[Step]) -> dict[str, Any]:
    """Everything that tables.md and a report show."""
    tables = {}
    for kind in TABLES:
        measured, absent, test = measure(plan, args, out, kind)
        tables[kind] = {
            "lesions": len(test),
            "patients": len({row["patient"] for row in test}),
            "published": plan.published.get(kind, {}),
            "rows": [describe_row(item, test, args.resamples) for item in measured],
            "comparisons": compare(plan, kind, measured),
            "absent": absent,
        }
    return {
        "synthetic": is_synthetic(Path(args.cbis)),
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": utils.versions(),
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


def is_synthetic(root: Path) -> bool:
    """Whether a folder is part of a drawn world (demo.py): its README says so."""
    readmes = (root / "README.txt", root.absolute().parent / "README.txt")
    return any(path.is_file() and "SYNTHETIC" in path.read_text(errors="replace")[:200] for path in readmes)


def describe(result: dict[str, Any]) -> str:
    """tables.md."""
    lines = []
    if result["synthetic"]:
        lines += ["**SYNTHETIC data: these numbers say nothing about patients.**", ""]
    seeds = len(result["seeds"])
    lines.append(
        f"Percent, the mean over {seeds} training seed{'s' * (seeds > 1)}, with 95% intervals over training and "
        f"patients ({result['resamples']} resamples)."
        if seeds > 1
        else f"Percent, with 95% intervals over patients ({result['resamples']} resamples); {comparisons.ONE_SEED}."
    )
    for kind, table in result["tables"].items():
        heads = list(metrics.METRICS.values())
        lines += ["", f"## {TABLES[kind]} ({table['lesions']} test lesions of {table['patients']} patients)", ""]
        lines += [f"| Model | {' | '.join(heads)} |", "| --- |" + " --- |" * len(heads)]
        for name, values in table["published"].items():
            cells = (f"{values[key]:g}" if values.get(key) is not None else "–" for key in metrics.METRICS)
            lines.append(f"| {name} (as published) | {' | '.join(cells)} |")
        for row in table["rows"]:
            cells = (interval_of(row["metrics"][key]).percent() for key in metrics.METRICS)
            name = f"*{row['name']}*" if row["kind"] == "reference" else row["name"]
            remark = " †" if row["leaves_out"] else ""
            lines.append(f"| {name}{remark} | {' | '.join(cells)} |")
        if any(row["leaves_out"] for row in table["rows"]):
            lines += ["", f"† {comparisons.ONE_SEED}."]
        for row in table["rows"]:
            if row.get("never_predicted"):
                lines += ["", f"{row['name']} never predicts {', '.join(row['never_predicted'])} (in a seed)."]
            if row["missing_seeds"]:
                lines += ["", f"{row['name']}: no results of seed {', '.join(map(str, row['missing_seeds']))}."]
        lines += [f"\nWithout a row: {name}, because {why}." for name, why in table["absent"].items()]
        lines += describe_comparisons(table["comparisons"], result["primary"])
    lines += [
        "",
        "Rows in italics look at no image but for its size. BENIGN_WITHOUT_CALLBACK: the radiologist asked for neither "
        "a biopsy nor further films.",
    ]
    return "\n".join(lines)


def interval_of(value: dict[str, Any]) -> metrics.Interval:
    return metrics.Interval(value["value"], value["low"], value["high"])


def describe_comparisons(found: list[dict[str, Any]], primary: dict | None) -> Iterable[str]:
    if not found:
        return
    yield ""
    yield "AUROC minus the baseline's, percentage points, paired over patients:"
    yield ""
    for entry in found:
        value = entry["difference"][HOLM_METRIC]
        difference = metrics.Difference(**value)
        if entry["primary"] and primary:
            late = ", AFTER results were there" if primary["after_results"] else ", before any result"
            p = f"p = {difference.p_value:.4f} (primary, named {primary['named']}{late})"
        else:
            p = f"p = {entry['p_holm']:.4f} (Holm, {entry['family']} comparison{'s' * (entry['family'] > 1)})"
        remark = f"; {entry['leaves_out']}" if entry["leaves_out"] else ""
        yield f"- {entry['row']} − {entry['baseline']}: {difference.percent()}, {p}{remark}"


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Make the tables; returns what tables.json holds, or {} after --dry-run. A failed row ends with an error."""
    args = get_args_parser().parse_args(argv)
    with utils.start_logging():
        return make_tables(args)


def make_tables(args: argparse.Namespace) -> dict[str, Any]:
    places = {name: getattr(args, name) for name in INPUTS}
    if not args.cbis:
        raise utils.UsageError("--cbis is missing: the folder of CBIS-DDSM")
    if len(set(args.seeds)) < len(args.seeds):
        raise utils.UsageError(f"--seeds {args.seeds}: a seed is there twice")
    for name, path in places.items():
        if path and not Path(path).exists():
            raise FileNotFoundError(f"{INPUTS[name]} {path} does not exist")
    places = {name: str(Path(path).absolute()) if path else "" for name, path in places.items()}
    plan, out = read_plan(args.rows, places, args.primary), Path(args.output_dir).absolute()
    log.info("checked:\n" + "\n".join(f"  {line}" for line in check(plan, args, out)))
    steps = plan_steps(plan, args, out)
    if args.dry_run:
        log.info("\n".join(f"# {step.name}{' (done)' * step.done}\n{shlex.join(step.command)}" for step in steps))
        return {}
    primary = name_primary(plan, out, any(out.glob("runs/*/*/*/results.json")))
    run_steps(steps)
    if any(step.status.startswith("submitted") for step in steps):
        log.info("trainings are in the queue: run the same command again when they have ended")
        return {}
    result = collect(plan, args, out, primary, steps)
    utils.write_json(out / "tables.json", result)
    text = describe(result)
    utils.atomic_write(out / "tables.md", lambda file: file.write(f"{text}\n".encode()))
    log.info(f"\n{text}\n\n{out / 'tables.md'} and tables.json")
    failed = [f"{step.name}: {step.status}" for step in steps if not step.status.startswith("done")]
    if failed:
        raise RuntimeError("rows are incomplete; the same command goes on from here:\n  " + "\n  ".join(failed))
    return result


if __name__ == "__main__":
    utils.run_script(main)
