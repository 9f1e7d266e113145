"""The point of a training loop at which its ranks meet: what they have summed up, whether to stop, whether to save."""

from __future__ import annotations

from dataclasses import dataclass

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


def meeting_due(processes: distributed.Processes, stop: StopRequest, step: int, steps: int, every: int) -> bool:
    """Whether the ranks meet after `step` of an epoch's `steps`: each `every` of them, after the last and, where there
    is one process, as soon as a signal has come."""
    return not step % every or step == steps or (processes.world_size == 1 and bool(stop.name))


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
