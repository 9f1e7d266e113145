"""Run main.py as a Slurm job through submitit: one task for each GPU, on as many nodes as asked for.

    python run_with_submitit.py --root /path/to/yfcc100m --model SLIP_VITB16 --lr 3e-3 --wd 0.1

Takes every flag of main.py and those of the job. A job that reaches its time limit or is preempted writes a checkpoint
within the epoch, goes back into the queue and continues from there. --dry-run shows what would be submitted; --local
runs the same job on this machine.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import UncompletedJobError

from runtime.command_line import run_script
from runtime.logs import start_logging
from runtime.memory import keep_freed_memory

log = logging.getLogger("medslip")
HERE = Path(__file__).resolve().parent
MAX_TIMEOUTS = 30  # times that a job may reach its time limit before it stays out of the queue, as SLIP's launcher


def add_job_arguments(parser: argparse.ArgumentParser, timeout: int, nodes: int) -> None:
    """Flags of the job; `timeout` (minutes) and `nodes` are their defaults."""
    job = parser.add_argument_group("job")
    job.add_argument("--ngpus", default=8, type=int, help="tasks on each node, one for each GPU")
    job.add_argument("--nodes", default=nodes, type=int, help="nodes; with --local always one")
    job.add_argument(
        "--timeout",
        default=timeout,
        type=int,
        metavar="MINUTES",
        help="time limit of one start; the run continues after it, so ask for what starts soon. submitit "
        "takes a preemption in the last 10 minutes or 20%% of it for a time-out, of which "
        f"{MAX_TIMEOUTS} are allowed",
    )
    job.add_argument(
        "--signal-delay",
        "--signal_delay",
        default=120,
        type=int,
        metavar="SECONDS",
        help="warning before the end: longer than --print-freq steps and writing a checkpoint take",
    )
    job.add_argument(
        "--job_dir",
        "--job-dir",
        default="",
        type=str,
        metavar="DIR",
        help="folder for the job's files and, unless --output-dir is given, the run's; every node must "
        "see it, %%j stands for the job id (default: jobs/%%j here). One without %%j can be "
        "submitted again to continue its run",
    )
    job.add_argument(
        "--seeds",
        default=[],
        type=int,
        nargs="+",
        metavar="SEED",
        help="an array of jobs, one for each seed, each writing to its own folder seed<SEED>",
    )
    job.add_argument("--partition", default="", type=str, help="where to queue (default: the cluster's)")
    job.add_argument("--account", default="", type=str, help="whom to charge, where the cluster asks for it")
    job.add_argument("--qos", default="", type=str, help="quality of service")
    job.add_argument("--constraint", default="", type=str, help="features that the nodes must have")
    job.add_argument(
        "--use_volta32",
        "--use-volta32",
        action="store_true",
        help="only nodes whose V100s have 32 GB: the constraint volta32gb",
    )
    job.add_argument("--comment", default="", type=str, help="what some clusters demand of urgent jobs")
    job.add_argument("--mem", default=40, type=int, metavar="GB", help="memory for each task")
    job.add_argument("--cpus", default=10, type=int, help="processor cores for each task; --workers fits in them")
    job.add_argument("--local", action="store_true", help="run on this machine, without Slurm, and wait for the end")
    job.add_argument("--dry-run", "--dry_run", action="store_true", help="print the sbatch file and submit nothing")


# ---------------------------------------------------------------------------------------------------------------------
# Inside the job
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class ScriptJob:
    """Calls `main(argv)` of a script on every task of a job; what submitit stores and calls there.

    A script that returns a dict with `stopped_by`, the name of a signal, has written a checkpoint and waits for its
    continuation. One that leaves signals alone starts again when the job does.
    """

    script: str  # name of the module
    argv: list[str]  # without --output-dir
    output_dir: str  # %j stands for the job id

    def __call__(self) -> dict | None:
        """What a task of the job does: learn who it is, then run the script."""
        keep_freed_memory()
        env = submitit.JobEnvironment()
        forget_earlier_start(env)
        requeue = guard_requeue(env)
        os.environ.update(rank_environment(env))
        output_dir = Path(self.output_dir.replace("%j", env.job_id))
        output_dir.mkdir(parents=True, exist_ok=True)
        with start_logging(output_dir, is_main=env.global_rank == 0):
            return self.run(env, output_dir, requeue)

    def run(self, env: submitit.JobEnvironment, output_dir: Path, requeue: Callable[[], None]) -> dict | None:
        """The script's main, and after a signal what decides whether the job goes on."""
        start = int(os.environ.get("SLURM_RESTART_COUNT", 0)) + 1
        where = f"{env.num_tasks} task(s) on {', '.join(env.hostnames)}"
        log.info(f"{env.cluster} job {env.job_id}, start {start}: {where}")
        result = importlib.import_module(self.script).main([*self.argv, "--output-dir", str(output_dir)])
        stopped_by = result.get("stopped_by") if isinstance(result, dict) else None
        if not stopped_by:
            return result
        if env.global_rank != 0:
            raise SystemExit(0)  # leaves no result file: rank 0 says how it goes on
        goes_on, why = after_stop(env, stopped_by)
        if not goes_on:
            log.info(
                f"job {env.job_id} ends here: {why}. Its checkpoint is in {output_dir}; submitted "
                f"again with --output-dir {output_dir}, the run continues from it",
            )
            raise UncompletedJobError(f"stopped by {stopped_by}: {why}")
        log.info(
            f"job {env.job_id}: {why}. It goes back into the queue and continues from the "
            "checkpoint when it starts again",
        )
        return requeue()  # ends the process

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """The job to store for the next start: the same one, since the script finds its own checkpoint."""
        return submitit.helpers.DelayedSubmission(self)


def forget_earlier_start(env: submitit.JobEnvironment) -> None:
    """Remove what an earlier start of this job has left for this rank: results() would take it for the outcome."""
    paths = [env.paths.result_pickle] + [env.paths.submitted_pickle] * (env.global_rank == 0)
    env.paths.result_pickle.unlink(missing_ok=True)
    for path in paths:
        path.with_name(f"{path.name}.save_tmp").unlink(missing_ok=True)  # half-written; submitit refuses to go over it


def guard_requeue(env: submitit.JobEnvironment):
    """Confine submitit's handler of the warning signal to this process, and return it as a function to call.

    The handler counts the time-outs, stores the job and asks for the requeue. Slurm signals every process of a step,
    and data loader workers, forked from here, must not do that too.
    """
    number = getattr(signal, f"SIG{env.USR_SIG}")
    handler: Any = signal.getsignal(number)
    process = os.getpid()

    def in_this_process(signum, frame) -> None:
        if os.getpid() == process:
            handler(signum, frame)

    def requeue() -> None:
        signal.signal(number, signal.SIG_IGN)
        handler(number, None)

    signal.signal(number, in_this_process)
    return requeue


def rank_environment(env: submitit.JobEnvironment) -> dict[str, str]:
    """What torch's env:// rendezvous and distributed.init_distributed read, as torchrun would set it."""
    return {
        "RANK": str(env.global_rank),
        "WORLD_SIZE": str(env.num_tasks),
        "LOCAL_RANK": str(env.local_rank),
        "LOCAL_WORLD_SIZE": str(env.num_tasks // env.num_nodes),
        "MASTER_ADDR": env.hostnames[0],
        # One port a job, below those that systems hand out themselves.
        "MASTER_PORT": str(10000 + int(env.raw_job_id) % 20000),
    }


def after_stop(env: submitit.JobEnvironment, stopped_by: str) -> tuple[bool, str]:
    """Whether a run that wrote a checkpoint on the signal `stopped_by` is to be requeued, and why, in words."""
    warned = stopped_by == f"SIG{env.USR_SIG}"
    if env.cluster != "slurm":
        return warned, "its time limit is near" if warned else f"it was asked to stop by {stopped_by}"
    shown = subprocess.run(
        ["scontrol", "--oneliner", "show", "job", env.job_id], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    job = dict(pair.split("=", 1) for pair in shown.split() if "=" in pair)
    if job.get("JobState") != "RUNNING":
        # Requeueing now would bring a cancelled job back; one that Slurm requeues returns without us.
        return False, f"Slurm itself ends this start (the job's state is {job.get('JobState')})"
    if job.get("PreemptTime", "None") != "None":
        return True, "another job takes its place (preemption)"
    return warned, "its time limit is near" if warned else f"it was asked to stop by {stopped_by}"


# ---------------------------------------------------------------------------------------------------------------------
# Submission
# ---------------------------------------------------------------------------------------------------------------------


class Sbatch(submitit.SlurmExecutor):
    """submitit's executor with the sbatch file readable beforehand, also where there is no Slurm."""

    @classmethod
    def affinity(cls) -> int:
        """That of a machine with Slurm."""
        return 2

    def text(self, n_jobs: int) -> str:
        """The sbatch file for this many jobs."""
        if n_jobs > 1:
            self.parameters["map_count"] = n_jobs
        return self._make_submission_file_text(self._submitit_command_str, "dry-run")


# Where the flags of a script are told without loading it.
FLAGS = {
    "main": "flags.training",
    "main_linear": "flags.linear",
    "beit_finetuning.run_class_finetuning": "flags.finetuning",
}


def split_arguments(script: str, argv: list[str] | None, timeout: int, nodes: int):
    """(all arguments, the script's part of the command line); the script's own parser has checked its part."""
    argv = sys.argv[1:] if argv is None else list(argv)
    flags = importlib.import_module(FLAGS.get(script, script))
    parser = flags.get_args_parser()
    parser.prog, parser.allow_abbrev = Path(sys.argv[0]).name, False
    parser.description = (__doc__ or "").replace("main.py", f"{script}.py")
    parser.set_defaults(output_dir=None)
    add_job_arguments(parser, timeout, nodes)
    args = parser.parse_args(argv)
    if script in FLAGS:
        flags.check_arguments(args)
    job_only = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_job_arguments(job_only, timeout, nodes)
    return args, job_only.parse_known_args(argv)[1]


def sbatch_settings(args: argparse.Namespace, name: str) -> dict:
    """Keyword arguments of submitit's SlurmExecutor, which are named after sbatch's options."""
    settings = {
        "job_name": name,
        "time": args.timeout,
        "nodes": args.nodes,
        "ntasks_per_node": args.ngpus,
        "cpus_per_task": args.cpus,
        "mem": f"{args.mem * args.ngpus}GB",
        "signal_delay_s": args.signal_delay,
        "setup": [f"export PYTHONPATH={shlex.quote(str(HERE))}${{PYTHONPATH:+:$PYTHONPATH}}"],
        # srun no longer takes the number of cores over from sbatch (Slurm 22.05); a rank that dies ends the others.
        "srun_args": [f"--cpus-per-task={args.cpus}", "--kill-on-bad-exit=1"],
        "additional_parameters": {"requeue": True},  # where the cluster's default forbids it
    }
    if args.gpu != -1:
        settings["gpus_per_node"] = args.ngpus
    constraint = "&".join(["volta32gb"] * args.use_volta32 + [args.constraint] * bool(args.constraint))
    chosen = {
        "partition": args.partition,
        "account": args.account,
        "qos": args.qos,
        "constraint": constraint,
        "comment": args.comment,
    }
    return settings | {key: value for key, value in chosen.items() if value}


def local_settings(args: argparse.Namespace) -> dict:
    """Keyword arguments of submitit's LocalExecutor."""
    return {
        "timeout_min": args.timeout,
        "tasks_per_node": args.ngpus,
        "signal_delay_s": args.signal_delay,
        "gpus_per_node": 0 if args.gpu == -1 else args.ngpus,
    }


def submit(script: str, argv: list[str] | None = None, timeout: int = 2800, nodes: int = 8) -> list[submitit.Job]:
    """Submit `script`, a module with `get_args_parser()` and `main(argv)`, as the command line says.

    `timeout` and `nodes` are the defaults of these flags. Returns the jobs: none after --dry-run.
    """
    args, script_argv = split_arguments(script, argv, timeout, nodes)
    with start_logging():
        return submit_script(script, args, script_argv)


def submit_script(script: str, args: argparse.Namespace, script_argv: list[str]) -> list[submitit.Job]:
    """Submit, run here or only show what the flags describe; returns the jobs."""
    folder = Path(args.job_dir or "jobs/%j").absolute()
    output_dir = str(Path(args.output_dir).absolute() if args.output_dir else folder)
    jobs = [ScriptJob(script, script_argv, output_dir)]
    if args.seeds:
        jobs = [
            ScriptJob(script, [*script_argv, "--seed", str(seed)], f"{output_dir}/seed{seed}") for seed in args.seeds
        ]
    if args.dry_run:
        log.info(
            f"on this machine: {local_settings(args)}\n"
            if args.local
            else cluster_executor(args, folder, script, Sbatch).text(len(jobs))
        )
        for job in jobs:
            log.info(f"# {script}.py {shlex.join(job.argv)} --output-dir {job.output_dir}")
        return []
    if args.local:
        return run_here(args, folder, jobs)
    submitted = cluster_executor(args, folder, script, submitit.SlurmExecutor).submit_array(jobs)
    for job, what in zip(submitted, jobs, strict=True):
        announce(job, what)
    return submitted


def cluster_executor(args: argparse.Namespace, folder: Path, script: str, kind: type) -> Any:
    """submitit's executor of this kind with the job's settings."""
    executor = kind(folder, max_num_timeout=MAX_TIMEOUTS)
    executor.update_parameters(**sbatch_settings(args, f"medslip-{script}"))
    return executor


def run_here(args: argparse.Namespace, folder: Path, jobs: list[ScriptJob]) -> list[submitit.Job]:
    """Each job on this machine, one after the other; raises what a job raised."""
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    executor = submitit.LocalExecutor(folder, max_num_timeout=MAX_TIMEOUTS)
    executor.update_parameters(**local_settings(args))
    submitted = []
    for what in jobs:
        submitted.append(executor.submit(what))
        announce(submitted[-1], what)
        submitted[-1].results()
    return submitted


def announce(job: submitit.Job, what: ScriptJob) -> None:
    """Say where a job's files and its run lie."""
    log.info(f"job {job.job_id}: files in {job.paths.folder}, run in {what.output_dir.replace('%j', job.job_id)}")


def main(argv: list[str] | None = None) -> list[submitit.Job]:
    """Submit main.py as the command line says; returns the jobs."""
    return submit("main", argv)


if __name__ == "__main__":
    import run_with_submitit

    # By its name, so that the stored job refers to this file instead of copying from it.
    run_script(run_with_submitit.main)
