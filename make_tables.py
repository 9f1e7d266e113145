"""Results tables by one command: prepare, fine-tune, probe and compare, with the seeds and the patients in them.

    python make_tables.py --roco /path/to/roco --cbis /path/to/cbis-ddsm --medclip-vit /path/to/medclip-vit.zip \\
      --medclip-resnet /path/to/medclip-resnet.zip --bert-vocab /path/to/vocab.txt --seeds 0 1 2

The rows stand in table_rows.json; a copy of it with other rows (another tower, another subset, fine-tuning end to
end) goes in by --rows. Its `"tables": ["mass", "hospital"]` names the tables, calc and mass where it says nothing, and
any set of --catalog. Everything is checked before the first hour is spent. Each step is an ordinary command, which
--dry-run prints: done ones are skipped, one that was cut off goes on, and a failed one does not stop the others.
Written are tables.md for people and tables.json for make_report.py.
"""

from __future__ import annotations

import argparse
import logging
import shlex
from pathlib import Path
from typing import Any

from flags.tables import check_arguments, get_args_parser
from runtime.command_line import answer_flags, run_script

if __name__ == "__main__":  # before PyTorch is loaded
    answer_flags(get_args_parser(), check_arguments)

import main as training
import main_linear
import models
import utils
from beit_finetuning import run_class_finetuning
from inputs import cbis
from preparation.cbis_tables import read_case_tables, refuse_without_images
from reporting.plan import INPUTS, Plan, PlannedRow, read_plan
from reporting.steps import Step, folder_of, plan_steps, run_steps
from reporting.table_sets import TRAINING, LesionTable
from reporting.tables import collect, describe, name_primary
from runtime.logs import start_logging
from runtime.one_run import one_run

log = logging.getLogger("medslip")


# ---------------------------------------------------------------------------------------------------------------------
# What is checked before the first step
# ---------------------------------------------------------------------------------------------------------------------


def check(plan: Plan, args: argparse.Namespace, out: Path) -> list[str]:
    """Everything that would end a step hours later, as ValueErrors; returns what was found, for people."""
    flags, found = plan_flags(plan), []
    folded = [table.name for table in plan.tables if table.folds]
    for table in plan.tables:
        found.append(check_lesions(table, flags) if isinstance(table, LesionTable) else table.check(flags))
    for name in sorted({row.weights for row in plan.rows if row.weights}):
        found.append(f"weights {models.load_pretrained(name).source}")
    needed = 0
    for row in plan.rows:
        if row.finetune is None:
            given = parse_flags(row, "main_linear.py", main_linear.get_args_parser(), row.probe)
            refuse_parts(row, given, bool(folded))
        elif folded:
            raise ValueError(f"row {row.name!r}: fine-tuning needs a test split, which {folded[0]} does not have")
        else:
            parse_flags(row, "run_class_finetuning.py", run_class_finetuning.get_args_parser(), row.finetune)
        if row.train is not None:
            pairs, size = check_training(row)
            missing = [s for s in args.seeds if not (folder_of(out, row, s) / TRAINING / "checkpoint.pt").is_file()]
            needed += size * len(missing)
            found.append(f"{row.name}: {pairs:,} training pairs")
    out.mkdir(parents=True, exist_ok=True)
    free = utils.refuse_full(out, needed, "the checkpoints of all trainings")
    found.append(f"disk: {needed / 1e9:.1f} GB for checkpoints, {free / 1e9:.0f} GB free")
    return found


def check_lesions(table: LesionTable, flags: str) -> str:
    """A line about a table of CBIS-DDSM; FileNotFoundError where evaluations with these flags would lack images."""
    if not table.file.is_file():
        refuse_without_images(table.root)
        return f"{table.name}: {len(read_case_tables(table.root, table.name))} lesions, to be prepared"
    rows = cbis.read_lesions(table.file)
    absent = [row["lesion"] for row in rows if not row["crop"] or not (table.root / row["crop"]).is_file()]
    if absent and "--image-kind" not in flags:
        raise FileNotFoundError(f"{table.file}: {len(absent)} lesions have no crop, first {absent[0]}")
    return f"{table.name}: {len(rows)} lesions of {len({row['patient'] for row in rows})} patients"


def plan_flags(plan: Plan) -> str:
    """All flags of the evaluations, in one text."""
    return " ".join(row.probe + (row.finetune or "") for row in plan.rows)


def parse_flags(row: PlannedRow, script: str, parser: argparse.ArgumentParser, flags: str) -> argparse.Namespace:
    """A row's flags as their script reads them; ValueError for those that it does not take."""
    parser.exit_on_error = False
    try:
        args, unknown = parser.parse_known_args(shlex.split(flags))
    except (argparse.ArgumentError, SystemExit) as error:
        raise ValueError(f"row {row.name!r}: {script} does not take its flags {flags}: {error}") from error
    if unknown:
        raise ValueError(f"row {row.name!r}: {script} has no flag {unknown[0]}")
    return args


def refuse_parts(row: PlannedRow, args: argparse.Namespace, folded: bool) -> None:
    """ValueError for flags of a probe that is not of a whole table by its own split, or does not go with folds."""
    flags = ("where", "cross_validate", *(("fraction", "knn") if folded else ()))
    if given := [name for name in flags if getattr(args, name)]:
        flag = f"--{given[0].replace('_', '-')}"
        raise ValueError(
            f"row {row.name!r}: {flag} does not go in a table: rows are measured on its whole test split, and on a set "
            "without splits in folds by itself"
        )


def check_training(row: PlannedRow) -> tuple[int, int]:
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


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Make the tables; returns what tables.json holds, or {} after --dry-run. A failed row ends with an error."""
    args = get_args_parser().parse_args(argv)
    check_arguments(args)
    with start_logging():
        return make_tables(args)


def make_tables(args: argparse.Namespace) -> dict[str, Any]:
    """The command once logging has started; returns what `main` does."""
    places = {name: getattr(args, name) for name in INPUTS}
    for name, path in places.items():
        if path and not Path(path).exists():
            raise FileNotFoundError(f"{INPUTS[name]} {path} does not exist")
    places = {name: str(Path(path).absolute()) if path else "" for name, path in places.items()}
    plan, out = read_plan(args.rows, places, args.primary, args.catalog), Path(args.output_dir).absolute()
    log.info("checked:\n" + "\n".join(f"  {line}" for line in check(plan, args, out)))
    steps = plan_steps(plan, args, out)
    if args.dry_run:
        log.info("\n".join(f"# {step.name}{' (done)' * step.done}\n{shlex.join(step.command)}" for step in steps))
        return {}
    with one_run(out):
        return run_plan(plan, args, out, steps)


def run_plan(plan: Plan, args: argparse.Namespace, out: Path, steps: list[Step]) -> dict[str, Any]:
    """Run what is not done, and gather the tables."""
    primary = name_primary(plan, out, any(out.glob("runs/*/*/*/results.json")))
    if stopped_by := run_steps(steps):
        log.info(f"stopped by {stopped_by}: the same command goes on from here")
        return {"stopped_by": stopped_by}
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
    run_script(main)
