"""The point of a training loop at which its ranks meet: what they have summed up, whether to stop, whether to save."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

import distributed
from runtime.signals import StopRequest


@dataclass(frozen=True)
class Meeting:
    """The same on all ranks."""

    sums: list[float]  # (k,), over the ranks
    stopping: bool  # a signal has come on some rank; the StopRequest of each has its name now
    save_due: bool  # some rank wants a checkpoint


def meet(processes: distributed.Processes, sums: Tensor, stop: StopRequest, save_due: bool = False) -> Meeting:
    """What all ranks know together; every one of them calls this after the same step.

    One reduction and one wait for the device, so that a loop which meets once in an interval waits once in it.

    Args:
        sums: (k,) of this rank, on its device.
        save_due: whether this rank wants a checkpoint; the clocks of two ranks may differ, so one of them decides.
    """
    shared = torch.cat([sums, sums.new_tensor([bool(stop.name), save_due])])  # (k + 2,)
    if processes.world_size > 1:
        dist.all_reduce(shared)
    *totals, stopping, save = shared.tolist()
    if stopping:
        stop.name = next(filter(None, distributed.gather_objects(processes, stop.name)))
    return Meeting(totals, bool(stopping), bool(save))


QUIET_SECONDS = 30  # without a line, at most, but for a step that takes longer


class Rhythm:
    """When the ranks of an epoch meet: each `every` steps, after the last, and before QUIET_SECONDS have passed.

    One process looks at its clock, and meets as soon as a signal has come. Several need the same answer without asking
    one another: they meet once to learn how long a step takes, and from then on count the steps of QUIET_SECONDS.

    Args:
        every: steps.
        pace: seconds of a step, as the last epoch's `Rhythm` knew them; 0 where nothing is known.
    """

    def __init__(self, processes: distributed.Processes, stop: StopRequest, every: int, pace: float = 0.0):
        self.processes, self.stop, self.every, self.pace = processes, stop, every, pace
        self.since, self.steps = time.monotonic(), 0  # of the last meeting

    def due(self, step: int, steps: int) -> bool:
        """Whether the ranks meet after `step` of an epoch's `steps`; asked once after each."""
        self.steps += 1
        if not step % self.every or step == steps:
            return True
        if self.processes.world_size == 1:
            return bool(self.stop.name) or time.monotonic() - self.since >= QUIET_SECONDS
        return self.steps >= max(1, int(QUIET_SECONDS / self.pace) if self.pace else 1)

    def meet(self, sums: Tensor, save_due: bool = False) -> Meeting:
        """`meet`, and what it takes to know when the next one is due."""
        seconds = time.monotonic() - self.since
        met = meet(self.processes, torch.cat([sums, sums.new_tensor([seconds])]), self.stop, save_due)
        *totals, seconds = met.sums
        self.pace = seconds / self.processes.world_size / max(self.steps, 1)  # the same on all ranks
        self.since, self.steps = time.monotonic(), 0
        return replace(met, sums=totals)
