"""BatchNorm over processes, against torch's on the whole batch."""

import pytest
import torch
from distributed_helpers import run_ranks
from torch import nn

import distributed


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
