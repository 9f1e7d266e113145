"""Checkpoints, schedule, synchronised BatchNorm."""

import json
import os

import numpy as np
import pytest
import torch
from distributed_helpers import run_ranks
from helpers import GOLDENS
from torch import nn

import distributed
import utils
from runtime import checkpoints


@pytest.mark.parametrize("case", json.loads((GOLDENS / "cosine_scheduler.json").read_text()))
def test_schedule_equals_the_published_one(case):
    schedule = utils.cosine_scheduler(**case["args"])
    assert len(schedule) == case["length"]
    np.testing.assert_allclose(schedule[case["at"]], case["values"], rtol=1e-12)


def test_schedule_is_defined_beyond_its_ends():
    assert utils.cosine_lr(-1, 10, 1.0, 0.1, 2) == 0
    assert utils.cosine_lr(10_000, 10, 1.0, 0.1, 2) == pytest.approx(0.1)
    assert utils.cosine_lr(0, 0, 1.0, 0.1) == 1.0


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    checkpoints.save_checkpoint({"x": torch.ones(3)}, path)

    def disk_full(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(OSError, match="checkpoint.pt.*No space left"):
        checkpoints.save_checkpoint({"x": torch.zeros(3)}, path)
    assert torch.equal(checkpoints.load_checkpoint(path)["x"], torch.ones(3))
    assert os.listdir(tmp_path) == ["checkpoint.pt"]  # no temporary file stays behind


def test_torn_checkpoint_is_named_and_the_one_before_it_used(tmp_path):
    for step in (5, 10, 15):
        checkpoints.save_training_checkpoint({"step": step}, tmp_path, step, is_best=step == 5, keep_last=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoint.pt",
        "checkpoint_best.pt",
        "checkpoint_step00000010.pt",
        "checkpoint_step00000015.pt",
    ]
    assert checkpoints.load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 15
    assert checkpoints.load_checkpoint(tmp_path / "checkpoint_best.pt")["step"] == 5
    newest = tmp_path / "checkpoint_step00000015.pt"
    newest.write_bytes(newest.read_bytes()[:100])
    said = []
    assert checkpoints.find_training_checkpoint(tmp_path, said.append)["step"] == 10
    assert "checkpoint_step00000015.pt" in said[0]
    (tmp_path / "checkpoint_step00000010.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="no checkpoint in"):
        checkpoints.find_training_checkpoint(tmp_path, said.append)
    assert checkpoints.find_training_checkpoint(tmp_path / "new", said.append) is None


def _norm_rank(rank, world, shape):
    """Three training steps of our BatchNorm on a part each, against torch's on the whole."""
    g = torch.Generator().manual_seed(0)
    processes = distributed.Processes(rank, world)
    ours = nn.Sequential(nn.BatchNorm1d(shape[1]) if len(shape) == 2 else nn.BatchNorm2d(shape[1])).double()
    nn.init.normal_(ours[0].weight, generator=g)
    reference = nn.Sequential(type(ours[0])(shape[1])).double()
    reference.load_state_dict(ours.state_dict())
    ours = distributed.synchronise_batchnorm(ours, processes)
    assert isinstance(ours[0], distributed.CollectiveBatchNorm)
    for _ in range(3):
        x = torch.randn(shape[0] * world, *shape[1:], generator=g, dtype=torch.float64) * 3 + 1
        weight = torch.randn(x.shape, generator=g, dtype=torch.float64)
        part = slice(rank * shape[0], (rank + 1) * shape[0])
        whole, mine = x.clone().requires_grad_(), x[part].clone().requires_grad_()
        out, expected = ours(mine), reference(whole)
        (out.square() * weight[part]).sum().backward()
        (expected.square() * weight).sum().backward()
        torch.testing.assert_close(out, expected[part], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(mine.grad, whole.grad[part], rtol=1e-10, atol=1e-12)
    for key, value in reference.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, rtol=1e-12, atol=1e-12)
    for ours_p, p in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.distributed.all_reduce(ours_p.grad)
        torch.testing.assert_close(ours_p.grad, p.grad, rtol=1e-10, atol=1e-12)
    ours.eval(), reference.eval()
    torch.testing.assert_close(ours(mine), reference(mine), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("world, shape", [(2, (4, 5)), (3, (2, 4, 3, 2))])
def test_batchnorm_over_processes_equals_one_process(world, shape):
    run_ranks(_norm_rank, world, shape)


def test_fused_adamw_leaves_everything_alone_where_the_gradient_is_not_finite():
    """What main.update relies on for skipping an update on the device."""
    p = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([p], lr=0.1, fused=True)
    p.grad = torch.ones(4)
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    before, state = p.detach().clone(), {k: v.clone() for k, v in optimizer.state[p].items()}
    p.grad = torch.full((4,), torch.nan)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert torch.equal(p.detach(), before)
    assert all(torch.equal(v, state[k]) for k, v in optimizer.state[p].items())


def test_learning_rates_of_numpy_are_read_and_other_numbers_refused(tmp_path):
    """SLIP's own training leaves them in its optimizer's state, under the module's old name or its new one."""
    torch.save({"lr": np.float64(0.00075)}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    data = (tmp_path / "a.pt").read_bytes()
    names = (b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert any(name in data for name in names)
    for name in names:
        (tmp_path / "b.pt").write_bytes(data.replace(names[0], name).replace(names[1], name))
        state = checkpoints.load_checkpoint(tmp_path / "b.pt")
        assert state == {"lr": 0.00075} and type(state["lr"]) is float
    for value in (np.float32(1), np.array([1.0])):
        torch.save({"lr": value}, tmp_path / "c.pt")
        with pytest.raises(ValueError, match="c.pt is not a readable checkpoint"):
            checkpoints.load_checkpoint(tmp_path / "c.pt")


def test_wrappers_are_taken_off_parameter_names_wherever_they_stand():
    for name in (
        "module.a.b",
        "module.module.a.b",
        "_orig_mod.a.b",
        "module._orig_mod.a.b",
        "a._orig_mod.b",
        "model.a.b",
    ):
        assert list(checkpoints.strip_wrappers({name: torch.zeros(1)})) == ["a.b"]
    assert list(checkpoints.strip_wrappers(dict.fromkeys(("model.a", "b"), torch.zeros(1)))) == ["model.a", "b"]
