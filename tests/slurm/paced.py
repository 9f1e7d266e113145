"""main.py at walking pace in a job's first start, so that what a test does to the job comes before its end.

A name of its own because the launcher runs a module by name. Each rank writes its process id to rank<N>.pid.
"""

import os
import time
from pathlib import Path

import main as training
from main import get_args_parser

__all__ = ["get_args_parser", "main"]
SECONDS = 1.0


def main(argv: list[str]) -> dict:
    output_dir = Path(get_args_parser().parse_args(argv).output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / f"rank{os.environ['RANK']}.pid").write_text(str(os.getpid()))
    if os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
        fast = training.update

        def update(*args):
            fast(*args)
            time.sleep(SECONDS)

        training.update = update
    return training.main(argv)
