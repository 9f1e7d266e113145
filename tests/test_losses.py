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
    if case["loss"] == "SIMCLR":
        return simclr
    return losses.SLIPLoss(losses.CLIPLoss(gather_with_grad), simclr, case["ssl_scale"])


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
    slip = losses.SLIPLoss(losses.CLIPLoss(), losses.SIMCLRLoss(0.2), 0.7)(x)
    clip = clip_formula(x["image_embed"].numpy(), x["text_embed"].numpy(), 14.3)
    ssl = simclr_formula(x["aug1_embed"].numpy(), x["aug2_embed"].numpy(), 0.2)
    assert slip["clip_loss"].item() == pytest.approx(clip, abs=1e-12)
    assert slip["ssl_loss"].item() == pytest.approx(ssl, abs=1e-12)
    assert slip["loss"].item() == pytest.approx(clip + 0.7 * ssl, abs=1e-12)
    whole = losses.slip_loss(*(x[name] for name in EMBEDDINGS), x["logit_scale"], 0.7, 0.2)  # what others compare with
    assert whole.item() == pytest.approx(clip + 0.7 * ssl, abs=1e-12)


def test_what_nobody_asks_for_is_as_published():
    """SLIP's own: both losses weigh 1, SimCLR's temperature is 0.1."""
    x = random_inputs(5, 3)
    clip = clip_formula(x["image_embed"].numpy(), x["text_embed"].numpy(), 14.3)
    ssl = simclr_formula(x["aug1_embed"].numpy(), x["aug2_embed"].numpy(), 0.1)
    assert losses.SLIPLoss(losses.CLIPLoss(), losses.SIMCLRLoss())(x)["loss"].item() == pytest.approx(
        clip + ssl, abs=1e-12
    )
    assert losses.SLIPLoss(losses.CLIPLoss(), losses.SIMCLRLoss())(x)["ssl_loss"].item() == pytest.approx(
        ssl, abs=1e-12
    )
    assert losses.simclr_loss(x["aug1_embed"], x["aug2_embed"]).item() == pytest.approx(ssl, abs=1e-12)
    whole = losses.slip_loss(*(x[name] for name in EMBEDDINGS), x["logit_scale"])
    assert whole.item() == pytest.approx(clip + ssl, abs=1e-12)
    assert losses.LossSettings() == losses.LossSettings(1.0, 0.1, gather_with_grad=True, mask_duplicates=False)


def test_duplicates_are_no_negatives_in_the_formula():
    x = random_inputs(3, 5)
    shared = torch.zeros(3, 3, dtype=torch.bool)
    shared[0, 1] = shared[1, 0] = True
    image, text = (torch.nn.functional.normalize(x[k], dim=-1) for k in ("image_embed", "text_embed"))
    logits = 14.3 * image @ text.T
    kept = [[0, 2], [1, 2], [0, 1, 2]]  # what each row may be compared with; the same read by columns
    rows = [torch.logsumexp(logits[i, kept[i]], 0) - logits[i, i] for i in range(3)]
    columns = [torch.logsumexp(logits[kept[i], i], 0) - logits[i, i] for i in range(3)]
    expected = (torch.stack(rows).mean() + torch.stack(columns).mean()) / 2
    ours = losses.clip_loss(x["image_embed"], x["text_embed"], 14.3, shared)
    torch.testing.assert_close(ours, expected, rtol=1e-13, atol=0)


def test_half_precision_inputs_and_autocast_give_a_float32_loss():
    x = random_inputs(64, 32, torch.float32)
    expected = losses.SLIPLoss(losses.CLIPLoss(), losses.SIMCLRLoss(0.1))(x)["loss"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = losses.SLIPLoss(losses.CLIPLoss(), losses.SIMCLRLoss(0.1))(x)["loss"]
    assert inside.dtype == torch.float32
    assert torch.equal(inside, expected)
    half = {k: v.half() for k, v in x.items()}
    assert losses.SLIPLoss(losses.CLIPLoss(), losses.SIMCLRLoss(0.1))(half)["loss"].dtype == torch.float32


def test_losses_do_not_change_what_they_were_given():
    x = random_inputs(4, 3)
    before = json.dumps({k: v.tolist() for k, v in x.items()})
    losses.SLIPLoss(losses.CLIPLoss(), losses.SIMCLRLoss(0.1))(x)
    assert json.dumps({k: v.tolist() for k, v in x.items()}) == before


def test_collapsed_embeddings_are_not_counted_as_hits():
    ones = {k: torch.ones(8, 4) for k in EMBEDDINGS} | {"logit_scale": torch.tensor(10.0)}
    result = losses.SLIPLoss(losses.CLIPLoss(), losses.SIMCLRLoss(0.1))(ones)
    assert result["clip_acc"] == result["ssl_acc"] == 12.5
