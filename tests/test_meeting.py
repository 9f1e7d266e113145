"""What ranks know together where they meet."""

import pytest
import torch
from distributed_helpers import run_ranks

import distributed
from runtime.meeting import meet
from runtime.signals import StopRequest


def ranks_meet(rank: int, world: int, signalled: tuple[int, ...]) -> None:
    stop = StopRequest()
    if rank in signalled:
        stop.name = f"SIG{rank}"
    processes = distributed.Processes(rank, world)
    met = meet(processes, torch.tensor([float(rank), 1.0]), stop, save_due=rank == 0)
    assert met.sums == [sum(range(world)), world] and met.save_due
    assert met.stopping == bool(signalled) and stop.name == (f"SIG{signalled[0]}" if signalled else "")


@pytest.mark.parametrize("signalled", [(), (2,), (1, 2)])
def test_sums_signals_and_checkpoints_are_the_same_on_all_ranks(signalled):
    run_ranks(ranks_meet, 3, signalled)


def test_one_process_meets_itself():
    stop = StopRequest()
    assert meet(distributed.Processes(), torch.tensor([2.5]), stop).sums == [2.5]
    stop.name = "SIGTERM"
    met = meet(distributed.Processes(), torch.tensor([2.5]), stop)
    assert met.stopping and not met.save_due and stop.name == "SIGTERM"
