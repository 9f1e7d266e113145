"""The commands that make a table's rows: which are done, and how the others are run."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import utils
from reporting.plan import CHECKPOINTS, Plan, PlannedRow
from reporting.table_sets import TRAINING, LesionTable, Table
from runtime.checkpoints import load_checkpoint, training_progress
from runtime.logs import format_seconds
from runtime.one_run import in_use
from runtime.signals import ENDS_WITH_PARENT, SIGNALS
from towers.sources import is_name

log = logging.getLogger("medslip")
HERE = Path(__file__).resolve().parents[1]


@dataclass
class Step:
    """A command, the folder that it fills, and what has to be there before it."""

    name: str
    folder: Path
    command: list[str]
    result: Path  # is there when the step is done
    needs: list[Path] = field(default_factory=list)
    entry: dict[str, Any] = field(default_factory=dict)  # what the result follows from beside its inputs
    training: bool = False
    status: str = "waiting"
    seconds: float = 0.0

    def record(self) -> dict[str, Any]:
        """What the result follows from: the command, size and time of the files that it reads, a catalog's entry."""
        stamps = {str(path): [path.stat().st_size, path.stat().st_mtime_ns] for path in self.needs if path.is_file()}
        return {"command": self.command, "inputs": stamps} | ({"entry": self.entry} if self.entry else {})

    @property
    def done(self) -> bool:
        """Whether its result is there, made by this very command."""
        return self.result.is_file() and self.recorded == json.loads(json.dumps(self.record()))

    @property
    def recorded(self) -> dict[str, Any] | None:
        """`record` when the step last ran; None where it never has."""
        path = self.folder / "step.json"
        return utils.read_json(path) if path.is_file() else None


def seeds_of(row: PlannedRow, seeds: Sequence[int]) -> list[int]:
    """The seeds that have a part in a row; a model as it is has one."""
    return list(seeds) if row.seeded else [seeds[0]]


def folder_of(out: Path, row: PlannedRow, seed: int) -> Path:
    """Where the runs of a row and seed lie."""
    return out / "runs" / row.slug / (f"seed{seed}" if row.seeded else "as_is")


def plan_steps(plan: Plan, args: argparse.Namespace, out: Path) -> list[Step]:
    """All commands in the order in which they can run."""
    steps, python = [], sys.executable
    lesions = [table for table in plan.tables if isinstance(table, LesionTable)]
    if not all(table.file.is_file() for table in lesions):
        command = [python, str(HERE / "make_dataset.py"), "cbis", "--root", str(lesions[-1].root)]
        steps.append(Step("prepare CBIS-DDSM", out / "runs" / "prepare", command, lesions[-1].file))
    for row in plan.rows:
        for seed in seeds_of(row, args.seeds):
            folder = folder_of(out, row, seed)
            weights: str | Path | None = row.weights or None
            if weights and not is_name(weights):
                weights = Path(weights).absolute()
            if row.train is not None:
                weights = folder / TRAINING / CHECKPOINTS[row.checkpoint]
                flags = [*shlex.split(row.train), "--seed", str(seed), "--workers", str(args.workers)]
                script = "main.py" if args.submit is None else "run_with_submitit.py"
                job = [] if args.submit is None else shlex.split(args.submit)
                if args.submit is not None and "--job_dir" not in job:
                    job += ["--job_dir", str(out / "jobs" / "%j")]
                command = [python, str(HERE / script), *flags, "--output-dir", str(folder / TRAINING), *job]
                steps.append(Step(f"{row.name}, seed {seed}: train", folder / TRAINING, command, weights,
                                  training=True))  # fmt: skip
            for table in plan.tables:
                steps.append(evaluation(row, table, folder / table.folder, weights, seed, args))
    return steps


def evaluation(
    row: PlannedRow, table: Table, folder: Path, weights: str | Path | None, seed: int, args: argparse.Namespace
) -> Step:
    """The step that ends in a row's predictions for one table: a probe, or fine-tuning end to end."""
    needs = [*table.files, *([weights] if isinstance(weights, Path) else [])]
    result = folder / "results.json"
    name = f"{row.name}, seed {seed}: {table.name}" if row.seeded else f"{row.name}: {table.name}"
    if row.finetune is not None:
        command = [sys.executable, str(HERE / "beit_finetuning" / "run_class_finetuning.py"),
                   *table.finetune, *shlex.split(row.finetune),
                   "--seed", str(seed), "--output_dir", str(folder)]  # fmt: skip
        command += ["--finetune", str(weights)] if weights else []
    else:
        command = [sys.executable, str(HERE / "main_linear.py"),
                   *table.probe, *shlex.split(row.probe),
                   "--seed", str(seed), "--workers", str(args.workers), "--output-dir", str(folder)]  # fmt: skip
        command += ["--pretrained", str(weights)] if weights else []
    return Step(name, folder, command, result, needs, table.entry)


class Signals:
    """Inside the block a signal that asks to stop goes on to the step that runs, and none is started after it."""

    def __init__(self) -> None:
        self.name = ""
        self.running: subprocess.Popen | None = None

    def __enter__(self) -> Signals:
        self.before = {number: signal.getsignal(number) for number in SIGNALS}
        for number, handler in self.before.items():
            if handler != signal.SIG_IGN:  # nohup's
                signal.signal(number, self.pass_on)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def pass_on(self, number: int, frame: object) -> None:
        """The handler."""
        self.name = self.name or signal.Signals(number).name
        if self.running is not None:
            self.running.send_signal(number)


def run_steps(steps: list[Step]) -> str:
    """Each step that is not done and has what it needs; a failure stops only what needs it.

    Returns:
        The name of the signal that stopped them; "" where none came.
    """
    with Signals() as signals:
        for number, step in enumerate(steps, 1):
            title = f"[{number}/{len(steps)}] {step.name}"
            # Of a training the checkpoints are there from its first epoch on.
            if already_trained(step) if step.training else step.done:
                step.status = "done before"
            elif signals.name:
                step.status = f"not run: stopped by {signals.name}"
            elif step.training and (state := state_in_queue(step.folder)):
                step.status = f"submitted before: {state}"
            elif absent := [path for path in step.needs if not path.exists()]:
                step.status = f"not run: {absent[0]} is not there"
            elif user := wait_for_folder(step, signals):
                step.status = f"not run: {user}"
            else:
                run_step(step, title, signals)
                continue
            log.info(f"{title}: {step.status}")
    return signals.name


PATIENCE = 120  # s, for the step of a make_tables.py that was killed to write its checkpoint and end


def wait_for_folder(step: Step, signals: Signals) -> str:
    """Who is still in the step's folder after PATIENCE; "" once nobody is."""
    end = time.monotonic() + PATIENCE
    while (user := in_use(step.folder)) and not signals.name and time.monotonic() < end:
        time.sleep(1)
    return user


def already_trained(step: Step) -> bool:
    """Whether the training of this folder has reached its end; main.py itself refuses other settings."""
    newest = step.folder / "checkpoint.pt"
    if not newest.is_file() or not step.result.is_file() or step.recorded is None:
        return False
    if step.recorded["command"][2:] != step.command[2:]:
        return False
    return bool(training_progress(load_checkpoint(newest, mmap=True), newest).get("finished"))


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


def run_step(step: Step, title: str, signals: Signals) -> None:
    """One command in a process of its own; its output goes to output.txt in the folder, its last lines are shown."""
    step.folder.mkdir(parents=True, exist_ok=True)
    output, start = step.folder / "output.txt", time.monotonic()
    log.info(f"{title}: {shlex.join(step.command[1:])}")
    utils.write_json(step.folder / "step.json", step.record())
    with open(output, "a") as file:
        # In a group of its own: a Ctrl-C reaches it once, from here.
        signals.running = subprocess.Popen(
            step.command, stdout=file, stderr=subprocess.STDOUT, process_group=0,
            env=os.environ | {ENDS_WITH_PARENT: "1"},
        )  # fmt: skip
        if signals.name:  # between the last look and the start
            signals.running.terminate()
        code, signals.running = signals.running.wait(), None
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
        step.status = f"stopped by {signals.name}" if signals.name else f"FAILED with code {code}"
        if step.result.name == "results.json":
            (step.folder / "step.json").unlink()
    log.info(f"    {step.status} after {format_seconds(step.seconds)}")
    if step.status.startswith(("FAILED", "no ")):
        lines = output.read_text(errors="replace").splitlines()
        log.info("\n".join(f"    | {line}" for line in lines[-8:]) + f"\n    all of it: {output}")
