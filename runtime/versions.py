"""What a result depends on beside its settings: the commit of this code and the libraries. Loads none of them."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path


@functools.cache
def commit() -> str:
    """The commit of this code, with -dirty after it where files were edited, or "unknown" outside of git.

    Asked once, when a run begins (runtime.logs.start_logging): what is edited later is not what it runs.
    """
    command = ["git", "-C", str(Path(__file__).resolve().parents[1]), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def versions() -> dict[str, str]:
    """What a result depends on beside its settings: the commit and the libraries."""
    import timm
    import torch
    import torchvision

    return {
        "commit": commit(),
        "python": sys.version.split()[0],
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "timm": str(timm.__version__),
    }
