"""The contrast by tiles and over processes against the formulas over whole matrices, in float64."""

import pytest
import torch
from distributed_helpers import run_ranks

import contrast
import distributed
import losses

EMBEDDINGS = ("image_embed", "text_embed", "aug1_embed", "aug2_embed")


def random_inputs(batch, dim, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    inputs = {k: torch.randn(batch, dim, generator=g, dtype=dtype) for k in EMBEDDINGS}
    return inputs | {"logit_scale": torch.tensor(14.3, dtype=dtype)}


def formulas(inputs, temperature=0.1, ssl_scale=0.7, duplicates=None):
    """Values and gradients of the formulas, and what of each side scores highest."""
    x = {k: v.clone().requires_grad_() for k, v in inputs.items()}
    image, text, a, b = (x[k] for k in EMBEDDINGS)
    clip = losses.clip_loss(image, text, x["logit_scale"], duplicates)
    ssl = losses.simclr_loss(a, b, temperature)
    (clip + ssl_scale * ssl).backward()
    image, text, a, b = (torch.nn.functional.normalize(x[k].detach(), dim=-1) for k in EMBEDDINGS)
    labels = torch.arange(len(image))
    between = image @ text.T
    if duplicates is not None:
        between[duplicates & ~torch.eye(len(image), dtype=torch.bool)] = -torch.inf
    among = torch.cat([a @ b.T, (a @ a.T).fill_diagonal_(-torch.inf)], 1)
    values = {
        "loss": clip + ssl_scale * ssl,
        "clip_loss": clip,
        "ssl_loss": ssl,
        "clip_acc": 100 * (between.argmax(1) == labels).float().mean(),
        "ssl_acc": 100 * (among.argmax(1) == labels).float().mean(),
    }
    return {k: v.detach() for k, v in values.items()}, {k: v.grad for k, v in x.items()}


@pytest.mark.parametrize("temperature", [0.1, 0.02])  # the second is too sharp for one exponential a logit
@pytest.mark.parametrize("tile", [3, 4, 100])
def test_tiles_equal_the_formulas(tile, temperature, monkeypatch):
    monkeypatch.setattr(contrast, "TILE", tile)
    inputs = random_inputs(11, 6, seed=tile)
    values, grads = formulas(inputs, temperature)
    x = {k: v.clone().requires_grad_() for k, v in inputs.items()}
    result = losses.SLIPLoss(losses.CLIPLoss(), losses.SIMCLRLoss(temperature), 0.7)(x)
    result["loss"].backward()
    for key, value in values.items():
        torch.testing.assert_close(result[key].detach(), value, rtol=1e-12, atol=1e-12)
    for key, grad in grads.items():
        torch.testing.assert_close(x[key].grad, grad, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("tile", [2, 3, 4, 6, 100])  # 2, 3 and 6 end where the first side ends
def test_the_best_match_is_the_best_of_all(within, tile, monkeypatch):
    """In a plane, where most rows have a neighbour on their own side."""
    monkeypatch.setattr(contrast, "TILE", tile)
    for seed in range(5):
        x = random_inputs(12, 2, seed=seed)
        a, b = (torch.nn.functional.normalize(x[name], dim=-1) for name in ("aug1_embed", "aug2_embed"))
        scores = a @ b.T
        if within:
            scores = torch.cat([scores, (a @ a.T).fill_diagonal_(-torch.inf)], 1)
        _, match = contrast.contrast_pairs(a, b, torch.tensor(5.0, dtype=torch.float64), within=within)
        assert match.tolist() == scores.argmax(1).tolist()
        assert not within or match.max() >= 12


def test_float32_tiles_at_the_largest_scale_and_a_large_batch():
    inputs = random_inputs(3000, 64, torch.float32) | {"logit_scale": torch.tensor(100.0)}
    inputs["text_embed"] = inputs["image_embed"] + 1.5 * inputs["text_embed"]  # half solved: logits up to 80
    values, grads = formulas({k: v.double() for k, v in inputs.items()}, ssl_scale=1.0)
    x = {k: v.clone().requires_grad_() for k, v in inputs.items()}
    result = losses.SLIPLoss(losses.CLIPLoss(), losses.SIMCLRLoss(0.1), 1.0)(x)
    result["loss"].backward()
    assert result["loss"].item() == pytest.approx(values["loss"].item(), rel=1e-5)
    for key, grad in grads.items():
        assert ((x[key].grad - grad).norm() / grad.norm()).item() < 1e-4, key


def identities_and_duplicates(batch, seed=3):
    """Few images and captions, so that many pairs share one; and which do."""
    identities = torch.randint(0, 5, (batch, 2), generator=torch.Generator().manual_seed(seed))
    duplicates = (identities[:, None, 0] == identities[None, :, 0]) | (identities[:, None, 1] == identities[None, :, 1])
    assert 0.2 < duplicates.float().mean() < 0.6
    return identities, duplicates


@pytest.mark.parametrize("tile", [3, 5, 100])
def test_masked_duplicates_equal_the_formula(tile, monkeypatch):
    monkeypatch.setattr(contrast, "TILE", tile)
    inputs = random_inputs(11, 6, seed=tile)
    identities, duplicates = identities_and_duplicates(11)
    values, grads = formulas(inputs, duplicates=duplicates)
    x = {k: v.clone().requires_grad_() for k, v in inputs.items()}
    result = losses.SLIPLoss(losses.CLIPLoss(mask_duplicates=True), losses.SIMCLRLoss(0.1), 0.7)(
        {**x, "identities": identities}
    )
    result["loss"].backward()
    for key, value in values.items():
        torch.testing.assert_close(result[key].detach(), value, rtol=1e-12, atol=1e-12)
    for key, grad in grads.items():
        torch.testing.assert_close(x[key].grad, grad, rtol=1e-10, atol=1e-13)
    unmasked = losses.CLIPLoss()(x)["loss"]
    assert unmasked > result["clip_loss"]  # each log-sum-exp has fewer terms


def test_identities_are_refused_where_they_have_no_meaning():
    x = random_inputs(4, 3)
    with pytest.raises(ValueError, match="between the sides alone"):
        contrast.contrast_pairs(
            x["aug1_embed"], x["aug2_embed"], torch.tensor(1.0), within=True, identities=torch.ones(4)
        )


def _rank_equals_single(rank, world, mask):
    """Mean over ranks of what each rank's loss gives equals the single process with the whole batch."""
    contrast.TILE = 3  # several tiles, whose edges are not those of the ranks
    batch = 4
    inputs = random_inputs(batch * world, 6)
    identities, duplicates = identities_and_duplicates(batch * world)
    values, grads = formulas(inputs, ssl_scale=0.8, duplicates=duplicates if mask else None)
    part = slice(rank * batch, (rank + 1) * batch)
    mine = {k: (v[part] if k in EMBEDDINGS else v).clone().requires_grad_() for k, v in inputs.items()}
    result = losses.SLIPLoss(losses.CLIPLoss(mask_duplicates=mask), losses.SIMCLRLoss(0.1), 0.8)(
        {**mine, "identities": identities[part]}
    )
    result["loss"].backward()
    for key, value in values.items():
        total = result[key].detach().double()
        torch.distributed.all_reduce(total)
        tolerance = 1e-6 if key.endswith("acc") else 1e-12  # percentages are float32
        torch.testing.assert_close(total / world, value.double(), rtol=tolerance, atol=1e-12)
    for key in EMBEDDINGS:  # the gather already summed over ranks: DistributedDataParallel then divides by N
        torch.testing.assert_close(mine[key].grad / world, grads[key][part], rtol=1e-11, atol=1e-13)
    scale_grad = mine["logit_scale"].grad.clone()
    torch.distributed.all_reduce(scale_grad)
    torch.testing.assert_close(scale_grad / world, grads["logit_scale"], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("mask", [False, True])
def test_processes_equal_one_process(world, mask):
    run_ranks(_rank_equals_single, world, mask)


def _gather(rank, world):
    x = torch.full((2, 3), float(rank), dtype=torch.float64, requires_grad=True)
    whole = distributed.gather_batch(x)
    assert whole[:, 0].tolist() == [float(r) for r in range(world) for _ in range(2)]
    # Each rank weighs row i of the whole with i + its own number; a row's gradient is the sum of that over the ranks.
    (whole * (torch.arange(len(whole))[:, None] + rank)).sum().backward()
    own = torch.arange(2 * rank, 2 * rank + 2, dtype=torch.float64)[:, None]
    torch.testing.assert_close(x.grad, (own * world + sum(range(world))).expand(2, 3))
    assert not distributed.gather_batch(x, with_grad=False).requires_grad


def test_gathering_carries_gradients_back():
    run_ranks(_gather, 3)
