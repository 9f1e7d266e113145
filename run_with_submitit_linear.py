"""Run main_linear.py as a Slurm job through submitit, by default on one node; see run_with_submitit.py.

    python run_with_submitit_linear.py --dataset cbis_calc --pretrained /path/to/checkpoint.pt

A job that reaches its time limit or is preempted goes back into the queue and starts again.
"""

from __future__ import annotations

import submitit

import run_with_submitit
from runtime.command_line import run_script


def main(argv: list[str] | None = None) -> list[submitit.Job]:
    """Submit as the command line says; returns the jobs."""
    return run_with_submitit.submit("main_linear", argv, timeout=1800, nodes=1)


if __name__ == "__main__":
    run_script(main)
