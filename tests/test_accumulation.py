"""Gradient accumulation against the one big batch, on one process and on several, and gradient checkpointing."""

import json

import pytest
import torch
from distributed_helpers import run_ranks
from helpers import command, weights
from model_helpers import batches, gradients, split, tiny_medslip, tiny_model
from torch import nn

import distributed
import losses
import main

OBJECTIVES = ("CLIP", "SIMCLR", "SLIP", "SIGSLIP")


def assert_equal_gradients(ours, theirs, rtol=1e-9, atol=1e-12):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_full_negatives_give_the_gradient_of_the_big_batch(objective):
    torch.manual_seed(0)
    big, small = tiny_model(objective).double(), tiny_model(objective).double()
    small.load_state_dict(big.state_dict())
    inputs = batches(big, 12)
    (expected,), theirs = gradients(big, [inputs], main.accumulate_micro)
    (metrics,), ours = gradients(small, split(inputs, 3), main.accumulate_full)
    assert_equal_gradients(ours, theirs)
    for key, value in expected.items():
        torch.testing.assert_close(metrics[key], value)
    for (name, a), b in zip(small.named_buffers(), big.buffers(), strict=True):  # the head's BatchNorm is exact too
        torch.testing.assert_close(a, b, msg=lambda m, n=name: f"{n}: {m}")


def test_full_negatives_repeat_the_same_dropout():
    """Both passes through a tower with drop-path draw the same numbers: a step equals itself without accumulation."""
    torch.manual_seed(0)
    model = tiny_model(
        "SLIP",
        vision_kwargs=dict(patch_size=8, embed_dim=64, depth=2, num_heads=4, drop_path_rate=0.5, proj_drop_rate=0.3),
    ).double()
    inputs = batches(model, 8)
    torch.manual_seed(5)
    _, theirs = gradients(model, [inputs], main.accumulate_micro)
    theirs = {k: v.clone() for k, v in theirs.items()}
    model.zero_grad()
    torch.manual_seed(5)
    _, ours = gradients(model, [inputs], main.accumulate_full)
    assert_equal_gradients(ours, theirs)


def test_micro_negatives_average_their_micro_batches():
    torch.manual_seed(0)
    model = tiny_model("CLIP").double()
    inputs = batches(model, 8)
    _, ours = gradients(model, split(inputs, 2), main.accumulate_micro)
    ours = {k: v.clone() for k, v in ours.items()}
    parts = []
    for part in split(inputs, 2):
        model.zero_grad()
        parts.append({k: v.clone() for k, v in gradients(model, [part], main.accumulate_micro)[1].items()})
    assert_equal_gradients(ours, {k: (parts[0][k] + parts[1][k]) / 2 for k in ours})


def test_a_resnet_tower_counts_each_micro_batch_once():
    torch.manual_seed(0)
    model = tiny_model("SLIP", vision_tower="resnet10t", vision_kwargs={}).double()
    inputs = batches(model, 8)
    gradients(model, split(inputs, 2), main.accumulate_full)
    norms = [m for m in model.visual.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {int(m.num_batches_tracked) for m in norms} == {6}  # three views of two micro-batches
    assert {m.momentum for m in norms} == {0.1}


def _full_rank(rank, world, objective):
    torch.manual_seed(0)
    big = tiny_model(objective).double()
    inputs = batches(big, 6 * world)
    processes = distributed.Processes(rank, world)
    mine = tiny_model(objective).double()
    mine.load_state_dict(big.state_dict())
    mine = distributed.synchronise_batchnorm(mine, processes)
    part = [x[rank * 6 : (rank + 1) * 6] for x in inputs]
    (metrics,), ours = gradients(mine, split(part, 3), main.accumulate_full, processes)
    loss = metrics["loss"].detach().clone()
    torch.distributed.all_reduce(loss)
    torch.distributed.destroy_process_group()  # the big batch is one process's
    (expected,), theirs = gradients(big, [inputs], main.accumulate_micro)
    torch.testing.assert_close(loss / world, expected["loss"].detach(), rtol=1e-11, atol=1e-11)
    assert_equal_gradients(ours, theirs)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_full_negatives_over_processes_equal_the_big_batch(objective, world):
    run_ranks(_full_rank, world, objective)


def _ddp_rank(rank, world, objective):
    """Losses, gradients, BatchNorm and weights after three steps, in float64, against one process."""
    torch.manual_seed(0)
    single = tiny_model(objective).double()
    processes = distributed.Processes(rank, world)
    model = tiny_model(objective).double()
    model.load_state_dict(single.state_dict())
    model = distributed.synchronise_batchnorm(model, processes)
    wrapped = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    loss = model.objective.loss(losses.LossSettings())
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    values = []
    for step in range(3):
        part = [x[rank * 4 : (rank + 1) * 4] for x in batches(model, 4 * world, step)]
        value = loss(wrapped(*part))["loss"]
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        value = value.detach().clone()
        torch.distributed.all_reduce(value)
        values.append(value / world)
    torch.distributed.destroy_process_group()
    optimizer = torch.optim.SGD(single.parameters(), lr=0.1)
    for step in range(3):
        value = loss(single(*batches(single, 4 * world, step)))["loss"]
        torch.testing.assert_close(values[step], value.detach(), rtol=1e-10, atol=1e-10)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    ours = model.state_dict()
    for name, value in single.state_dict().items():
        torch.testing.assert_close(ours[name], value, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
    assert_equal_gradients(
        {n: p.grad for n, p in model.named_parameters()}, {n: p.grad for n, p in single.named_parameters()}
    )


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_processes_equal_one_process_in_float64(objective, world):
    run_ranks(_ddp_rank, world, objective)


@pytest.mark.parametrize("make", [lambda: tiny_model("SLIP"), tiny_medslip], ids=["vit", "medslip"])
def test_gradient_checkpointing_changes_nothing(make):
    torch.manual_seed(0)
    plain, saved = make().double(), make().double()
    saved.load_state_dict(plain.state_dict())
    saved.checkpoint_gradients()
    inputs = batches(plain, 4, size=plain.config["image_size"])
    results = []
    for model in (plain, saved):
        torch.manual_seed(3)  # the same dropout
        results.append(gradients(model, [inputs], main.accumulate_micro)[1])
    assert_equal_gradients(*results)
    with pytest.raises(ValueError, match="BatchNorm"):
        tiny_model("SLIP", vision_tower="resnet10t", vision_kwargs={}).checkpoint_gradients()


def test_main_accumulates_over_the_whole_step(tmp_path):
    from roco_tree import make_roco

    roco = make_roco(tmp_path / "roco")
    eps = ["--eps", "1e-2", "--epochs", "1"]  # AdamW divides rounding noise by itself where gradients vanish
    main.main(command(roco, tmp_path / "big", "--batch-size", "8", *eps))
    main.main(
        command(roco, tmp_path / "cached", "--batch-size", "4", "--update-freq", "2", "--accum-negatives", "full", *eps)
    )
    a, b = weights(tmp_path / "big"), weights(tmp_path / "cached")
    for key in a:
        torch.testing.assert_close(b[key], a[key], rtol=1e-3, atol=2e-5, msg=lambda m, k=key: f"{k}: {m}")
    rows = [
        [json.loads(line) for line in (tmp_path / run / "log.jsonl").read_text().splitlines()]
        for run in ("big", "cached")
    ]
    assert rows[0][0]["loss"] == pytest.approx(rows[1][0]["loss"], rel=1e-5)
