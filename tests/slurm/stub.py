"""A script that starts in no time: what the launcher gives to a rank, and how it deals with the end of one."""

import argparse
import os
import signal
import time
from pathlib import Path

KEYS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES")


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("stub.py")
    parser.add_argument("--output-dir", default="./")
    parser.add_argument("--gpu", default=None, type=int)
    parser.add_argument("--seed", default=0, type=int)
    parser.add_argument("--wait", action="store_true", help="in the first start stop at the signal, rank 1 by failing")
    return parser


def main(argv: list[str]) -> dict:
    """The rank's environment and arguments."""
    args = get_args_parser().parse_args(argv)
    seen = {key: os.environ.get(key, "") for key in KEYS} | vars(args)
    ready = Path(args.output_dir, f"ready{seen['RANK']}")
    if not args.wait or ready.exists():
        return seen
    caught = []
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, lambda number, frame: caught.append(number))
    ready.touch()
    while not caught:
        time.sleep(0.05)
    if seen["RANK"] == "1":
        raise RuntimeError("this rank leaves an error behind")
    return {"stopped_by": signal.Signals(caught[0]).name}
