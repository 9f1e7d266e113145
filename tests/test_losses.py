"""Losses against the reference implementation's scores, against NumPy formulas, and over several processes."""

import json

import numpy as np
import pytest
import torch
from distributed_helpers import run_ranks
from helpers import GOLDENS

import losses

EMBEDDINGS = ("image_embed", "text_embed", "aug1_embed", "aug2_embed")


def make_loss(case, gather_with_grad=True):
    if case["loss"] == "CLIP":
        return losses.CLIPLoss(gather_with_grad)
    simclr = losses.SIMCLRLoss(case["ssl_temp"])
    return simclr if case["loss"] == "SIMCLR" else losses.SLIPLoss(simclr, case["ssl_scale"], gather_with_grad)


def check(case, gather_with_grad=True):
    inputs = {k: v.clone().requires_grad_() for k, v in case["inputs"].items()}
    result = make_loss(case, gather_with_grad)(inputs)
    assert set(result) == set(case["values"])
    result["loss"].backward()
    for key, value in case["values"].items():
        torch.testing.assert_close(result[key].detach(), value, rtol=2e-6, atol=2e-6, msg=lambda m, k=key: f"{k}: {m}")
    for key, grad in case["grads"].items():
        ours = inputs[key].grad
        if grad is None:
            assert ours is None, key
        else:
            torch.testing.assert_close(ours, grad, rtol=1e-5, atol=3e-6, msg=lambda m, k=key: f"{k}: {m}")


SINGLE = torch.load(GOLDENS / "losses_single.pt", weights_only=True)["cases"]


@pytest.mark.parametrize("i", range(len(SINGLE)))
def test_values_and_gradients_equal_the_reference(i):
    check(SINGLE[i])


def _published_rank(rank, world):
    for case in torch.load(GOLDENS / "losses_gloo_w2.pt", weights_only=True)[rank]:
        check(case, gather_with_grad=False)


def test_two_processes_without_gather_gradient_equal_the_published_runs():
    run_ranks(_published_rank, 2)


def logsumexp(x):
    top = x.max(axis=1, keepdims=True)
    return (top + np.log(np.exp(x - top).sum(axis=1, keepdims=True)))[:, 0]


def simclr_formula(a, b, temperature):
    """Equation 1 of SimCLR over the 2B stacked views, in NumPy."""
    z = np.concatenate([a, b])
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    s = z @ z.T / temperature
    positive = s[np.arange(len(z)), np.roll(np.arange(len(z)), len(a))]
    np.fill_diagonal(s, -np.inf)
    return float(np.mean(logsumexp(s) - positive))


def clip_formula(x, y, scale):
    x, y = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, y))
    s = scale * x @ y.T
    return float((np.mean(logsumexp(s) - np.diag(s)) + np.mean(logsumexp(s.T) - np.diag(s))) / 2)


def random_inputs(batch, dim, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    inputs = {k: torch.randn(batch, dim, generator=g, dtype=dtype) for k in EMBEDDINGS}
    return inputs | {"logit_scale": torch.tensor(14.3, dtype=dtype)}


def test_formulas():
    x = random_inputs(9, 5)
    slip = losses.SLIPLoss(losses.SIMCLRLoss(0.2), 0.7)(x)
    clip = clip_formula(x["image_embed"].numpy(), x["text_embed"].numpy(), 14.3)
    ssl = simclr_formula(x["aug1_embed"].numpy(), x["aug2_embed"].numpy(), 0.2)
    assert slip["clip_loss"].item() == pytest.approx(clip, abs=1e-12)
    assert slip["ssl_loss"].item() == pytest.approx(ssl, abs=1e-12)
    assert slip["loss"].item() == pytest.approx(clip + 0.7 * ssl, abs=1e-12)


def test_half_precision_inputs_and_autocast_give_a_float32_loss():
    x = random_inputs(64, 32, torch.float32)
    expected = losses.SLIPLoss(losses.SIMCLRLoss(0.1))(x)["loss"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = losses.SLIPLoss(losses.SIMCLRLoss(0.1))(x)["loss"]
    assert inside.dtype == torch.float32
    assert torch.equal(inside, expected)
    half = {k: v.half() for k, v in x.items()}
    assert losses.SLIPLoss(losses.SIMCLRLoss(0.1))(half)["loss"].dtype == torch.float32


def _rank_equals_single(rank, world):
    """Mean over ranks of what each rank's loss gives equals the single process with the whole batch."""
    losses.TILE = 3  # several tiles, whose edges are not those of the ranks
    batch = 4
    whole = {k: v.requires_grad_() for k, v in random_inputs(batch * world, 6).items()}
    loss = losses.SLIPLoss(losses.SIMCLRLoss(0.1), 0.8)
    single = loss_without_distribution(loss, whole)
    part = slice(rank * batch, (rank + 1) * batch)
    mine = {k: (v.detach()[part] if k in EMBEDDINGS else v.detach()).clone().requires_grad_() for k, v in whole.items()}
    result = loss(mine)
    result["loss"].backward()
    value = result["loss"].detach().clone()
    torch.distributed.all_reduce(value)
    torch.testing.assert_close(value / world, single, rtol=1e-12, atol=1e-12)
    for key in EMBEDDINGS:  # the gather already summed over ranks: DistributedDataParallel then divides by N
        torch.testing.assert_close(mine[key].grad / world, whole[key].grad[part], rtol=1e-11, atol=1e-13)
    scale_grad = mine["logit_scale"].grad.clone()
    torch.distributed.all_reduce(scale_grad)
    torch.testing.assert_close(scale_grad / world, whole["logit_scale"].grad, rtol=1e-11, atol=1e-13)


def loss_without_distribution(loss, inputs):
    original = losses._world_size
    losses._world_size = lambda: 1
    try:
        value = loss(inputs)["loss"]
        value.backward()
    finally:
        losses._world_size = original
    return value.detach()


@pytest.mark.parametrize("world", [2, 3])
def test_processes_equal_one_process(world):
    run_ranks(_rank_equals_single, world)


def test_losses_do_not_change_what_they_were_given():
    x = random_inputs(4, 3)
    before = json.dumps({k: v.tolist() for k, v in x.items()})
    losses.SLIPLoss(losses.SIMCLRLoss(0.1))(x)
    assert json.dumps({k: v.tolist() for k, v in x.items()}) == before


# --- tiles ----------------------------------------------------------------------------------------------------------


def full_matrices(inputs, temperature, ssl_scale):
    """SLIP's loss as its papers write it: every logit matrix at once. Returns values and gradients."""
    x = {k: v.clone().requires_grad_() for k, v in inputs.items()}
    image, text, a, b = (torch.nn.functional.normalize(x[k], dim=-1) for k in EMBEDDINGS)
    labels = torch.arange(len(image))
    cross_entropy = torch.nn.functional.cross_entropy
    logits = x["logit_scale"] * image @ text.T
    clip = (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2
    self_mask = torch.diag(torch.full((len(a),), torch.inf, dtype=a.dtype))
    from_a = torch.cat([a @ b.T, a @ a.T - self_mask], 1) / temperature
    from_b = torch.cat([b @ a.T, b @ b.T - self_mask], 1) / temperature
    ssl = (cross_entropy(from_a, labels) + cross_entropy(from_b, labels)) / 2
    (clip + ssl_scale * ssl).backward()
    values = {
        "loss": clip + ssl_scale * ssl,
        "clip_loss": clip,
        "ssl_loss": ssl,
        "clip_acc": 100 * (logits.argmax(1) == labels).float().mean(),
        "ssl_acc": 100 * (from_a.argmax(1) == labels).float().mean(),
    }
    return {k: v.detach() for k, v in values.items()}, {k: v.grad for k, v in x.items()}


@pytest.mark.parametrize("temperature", [0.1, 0.02])  # the second is too sharp for one exponential a logit
@pytest.mark.parametrize("tile", [3, 4, 100])
def test_tiles_equal_the_full_matrices(tile, temperature, monkeypatch):
    monkeypatch.setattr(losses, "TILE", tile)
    inputs = random_inputs(11, 6, seed=tile)
    values, grads = full_matrices(inputs, temperature, 0.7)
    x = {k: v.clone().requires_grad_() for k, v in inputs.items()}
    result = losses.SLIPLoss(losses.SIMCLRLoss(temperature), 0.7)(x)
    result["loss"].backward()
    for key, value in values.items():
        torch.testing.assert_close(result[key].detach(), value, rtol=1e-12, atol=1e-12)
    for key, grad in grads.items():
        torch.testing.assert_close(x[key].grad, grad, rtol=1e-10, atol=1e-13)


def test_float32_tiles_at_the_largest_scale_and_a_large_batch():
    inputs = random_inputs(3000, 64, torch.float32) | {"logit_scale": torch.tensor(100.0)}
    inputs["text_embed"] = inputs["image_embed"] + 1.5 * inputs["text_embed"]  # half solved: logits up to 80
    values, grads = full_matrices({k: v.double() for k, v in inputs.items()}, 0.1, 1.0)
    x = {k: v.clone().requires_grad_() for k, v in inputs.items()}
    result = losses.SLIPLoss(losses.SIMCLRLoss(0.1), 1.0)(x)
    result["loss"].backward()
    assert result["loss"].item() == pytest.approx(values["loss"].item(), rel=1e-5)
    for key, grad in grads.items():
        assert ((x[key].grad - grad).norm() / grad.norm()).item() < 1e-4, key


def test_collapsed_embeddings_are_not_counted_as_hits():
    ones = {k: torch.ones(8, 4) for k in EMBEDDINGS} | {"logit_scale": torch.tensor(10.0)}
    result = losses.SLIPLoss(losses.SIMCLRLoss(0.1))(ones)
    assert result["clip_acc"] == result["ssl_acc"] == 12.5
