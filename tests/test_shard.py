"""Fully sharded training against DistributedDataParallel: losses, weights, checkpoints, resuming."""

import pytest
import torch
from distributed_helpers import run_ranks
from helpers import command, slow, weights
from model_helpers import batches, tiny_model
from roco_tree import make_roco

import distributed
import losses
import main
import models
from runtime import checkpoints


@pytest.fixture(scope="module")
def roco(tmp_path_factory):
    return make_roco(tmp_path_factory.mktemp("roco"))


def _train(rank, world, argv):
    main.main(argv)


@pytest.mark.parametrize("model", ["SLIP_VITT16", *slow("SIMCLR_VITT16", "CLIP_VITT16", "SIGLIP_VITT16")])
def test_sharded_weights_equal_ddp(roco, tmp_path, model):
    for name, extra in (("ddp", []), ("shard", ["--shard"])):
        run_ranks(_train, 2, command(roco, tmp_path / name, "--batch-size", "4", "--eps", "1e-2", *extra, model=model))
    a, b = weights(tmp_path / "ddp"), weights(tmp_path / "shard")
    assert a.keys() == b.keys() and all(type(v) is torch.Tensor for v in b.values())
    for key in a:
        torch.testing.assert_close(b[key], a[key], rtol=1e-5, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")
    best = [checkpoints.load_checkpoint(tmp_path / name / "checkpoint.pt")["best_acc1"] for name in ("ddp", "shard")]
    assert best[0] == best[1]
    loaded = models.load_pretrained(tmp_path / "shard" / "checkpoint.pt")  # a single process
    assert loaded.model.encode_image(torch.randn(1, 3, 32, 32)).isfinite().all()


def _stop_after_one_epoch(rank, world, argv):
    original = main.finish_epoch

    def finish(*args):
        original(*args)
        raise SystemExit

    main.finish_epoch = finish
    try:
        main.main(argv)
    except SystemExit:
        pass


@pytest.mark.slow
def test_sharded_run_resumes_as_if_unbroken_and_accumulates(roco, tmp_path):
    argv = ["--batch-size", "2", "--update-freq", "2", "--shard", "--epochs", "2"]
    run_ranks(_train, 2, command(roco, tmp_path / "whole", *argv))
    run_ranks(_stop_after_one_epoch, 2, command(roco, tmp_path / "broken", *argv))
    assert checkpoints.load_checkpoint(tmp_path / "broken" / "checkpoint.pt")["epoch"] == 1
    run_ranks(_train, 2, command(roco, tmp_path / "broken", *argv))
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


def _scale_gradient(rank, world):
    torch.manual_seed(0)
    single, model = tiny_model("SIGLIP"), tiny_model("SIGLIP")
    model.load_state_dict(single.state_dict())
    inputs = [x.float() if x.is_floating_point() else x for x in batches(single, 8)]
    processes = distributed.Processes(rank, world)
    model = distributed.shard(model, processes)
    scalars = [model.logit_scale, model.logit_bias]
    assert all(value.shape == () and not distributed.is_split(value) for value in scalars)
    loss = model.objective.loss(losses.LossSettings())
    loss(model(*[x[rank * 4 : (rank + 1) * 4] for x in inputs]))["loss"].backward()
    assert not model.logit_bias._backward_hooks  # of which each step would leave one more
    distributed.average_whole_gradients(model, processes)
    grads = [value.grad.clone() for value in scalars]
    torch.distributed.destroy_process_group()
    loss(single(*inputs))["loss"].backward()
    for grad, whole in zip(grads, (single.logit_scale, single.logit_bias), strict=True):
        torch.testing.assert_close(grad, whole.grad, rtol=1e-4, atol=1e-6)


def test_scale_and_bias_stay_whole_and_their_gradients_are_averaged():
    run_ranks(_scale_gradient, 2)


def test_shard_alone_and_with_full_negatives_is_refused(roco, tmp_path):
    with pytest.raises(ValueError, match="several processes"):
        main.main(command(roco, tmp_path, "--shard"))
    with pytest.raises(ValueError, match="accum-negatives micro"):
        main.main(command(roco, tmp_path, "--shard", "--accum-negatives", "full"))
