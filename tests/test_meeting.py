"""What ranks know together where they meet."""

import pytest
import torch
from distributed_helpers import run_ranks

import distributed
from runtime import meeting
from runtime.meeting import Rhythm, meet
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


def steps_met(monkeypatch, seconds_a_step: float, every: int, steps: int, **processes: int) -> list[int]:
    """After which steps of an epoch the ranks meet, on a clock that goes on by so much at each."""
    now = [0.0]
    monkeypatch.setattr(meeting.time, "monotonic", lambda: now[0])
    # Of several ranks this one stands for all: each sums the same seconds.
    world = processes.get("world_size", 1)
    monkeypatch.setattr(meeting.dist, "all_reduce", lambda shared: shared.mul_(world))
    rhythm, met = Rhythm(distributed.Processes(**processes), StopRequest(), every), []
    for step in range(1, steps + 1):
        now[0] += seconds_a_step
        if rhythm.due(step, steps):
            found = rhythm.meet(torch.tensor([1.0]))
            assert found.sums == [world]
            met.append(step)
    return met


def test_slow_steps_are_told_of_every_half_minute_whatever_the_interval(monkeypatch):
    assert steps_met(monkeypatch, 13.0, 10, 9) == [3, 6, 9]
    assert steps_met(monkeypatch, 0.1, 10, 25) == [10, 20, 25]
    assert steps_met(monkeypatch, 50.0, 10, 3) == [1, 2, 3]


def test_several_ranks_learn_the_pace_at_their_first_step_and_count(monkeypatch):
    assert steps_met(monkeypatch, 13.0, 10, 9, rank=1, world_size=2) == [1, 3, 5, 7, 9]
    assert steps_met(monkeypatch, 0.1, 10, 25, rank=1, world_size=2) == [1, 10, 20, 25]


def test_a_signal_is_heard_at_once_where_there_is_one_process():
    stop = StopRequest()
    rhythm = Rhythm(distributed.Processes(), stop, 10)
    assert not rhythm.due(1, 100)
    stop.name = "SIGTERM"
    assert rhythm.due(2, 100)
    assert not Rhythm(distributed.Processes(0, 2), stop, 10, pace=0.1).due(1, 100)
