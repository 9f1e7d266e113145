"""Run beit_finetuning/run_class_finetuning.py as a Slurm job through submitit; see run_with_submitit.py.

    python run_with_submitit_finetune.py --model beit_base_patch16_224 --finetune /path/to/checkpoint.pt ...

A job that reaches its time limit or is preempted writes a checkpoint within the epoch and continues from there.
"""

from __future__ import annotations

import submitit

import run_with_submitit
from runtime.command_line import run_script


def main(argv: list[str] | None = None) -> list[submitit.Job]:
    """Submit as the command line says; returns the jobs."""
    return run_with_submitit.submit("beit_finetuning.run_class_finetuning", argv, timeout=2800, nodes=1)


if __name__ == "__main__":
    run_script(main)
