"""The launcher of the folder above, for those who start it here as BEiT's own is started."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import run_with_submitit_finetune  # noqa: E402
from runtime.command_line import run_script  # noqa: E402

if __name__ == "__main__":
    run_script(run_with_submitit_finetune.main)
