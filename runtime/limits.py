"""What one file of others may ask for: a small one can declare, or unpack to, far more than memory holds.

A declared size is judged before anything of that size is made. The limits are far above what this field's files have,
and the message names the variable of the environment that raises one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Limit:
    """The most of something that a file may ask for."""

    variable: str  # of the environment
    default: int
    unit: str

    @property
    def most(self) -> int:
        """As the environment has it, else the default; ValueError where that is no whole number from 1."""
        text = os.environ.get(self.variable, str(self.default))
        if not text.isdecimal() or not int(text):
            raise ValueError(f"{self.variable}={text}: give a whole number of {self.unit}")
        return int(text)

    def refuse(self, size: int, name: str) -> None:
        """ValueError, naming the file, its size and the limit, where the size is above the limit."""
        if size > self.most:
            raise ValueError(f"{name} declares {size:,} {self.unit}, above the limit of {self.most:,}{self.advice}")

    @property
    def advice(self) -> str:
        """The end of a message: how to raise the limit."""
        return f"; if it is meant to be so large, set {self.variable}"


# Of an image, or a frame; 30 million have the largest mammograms. The default is Pillow's own.
PIXELS = Limit("MEDSLIP_MOST_PIXELS", 178_956_970, "pixels")
# Of a member of an archive, or of a row group of a table, when it is unpacked.
BYTES = Limit("MEDSLIP_MOST_BYTES", 4 << 30, "bytes")
# Of memory for each byte of a pickle. An empty list is a byte or two of a file, and 64 with its place.
MEMORY = Limit("MEDSLIP_MOST_MEMORY_PER_BYTE", 100, "bytes of memory for each byte of the file")
_SPARE = 256 << 20  # bytes that any file may take


@contextmanager
def memory_for(path: str | Path) -> Iterator[None]:
    """What is read inside the block may take MEMORY times the file's size; ValueError, naming it, where it takes more.

    The kernel holds the limit for the whole process, so that it also meets one huge request of a parser in C. Where the
    system has no such limit (other than Linux), nothing is held.
    """
    if sys.platform != "linux":
        yield
        return
    import resource

    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    wanted = taken + _SPARE + MEMORY.most * os.path.getsize(path)
    lower = [limit for limit in (before[0], wanted) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(lower), before[1]))
    try:
        yield
    except MemoryError as error:
        raise ValueError(f"{path} asks for more than {MEMORY.most} {MEMORY.unit}{MEMORY.advice}") from error
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
