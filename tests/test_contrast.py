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


def formulas(inputs, temperature=0.1, ssl_scale=0.7, duplicates=None, same_study=None):
    """Values and gradients of the formulas, and what of each side scores highest."""
    x = {k: v.clone().requires_grad_() for k, v in inputs.items()}
    image, text, a, b = (x[k] for k in EMBEDDINGS)
    clip = losses.clip_loss(image, text, x["logit_scale"], duplicates)
    ssl = losses.simclr_loss(a, b, temperature, same_study)
    (clip + ssl_scale * ssl).backward()
    image, text, a, b = (torch.nn.functional.normalize(x[k].detach(), dim=-1) for k in EMBEDDINGS)
    labels = torch.arange(len(image))
    between = image @ text.T
    if duplicates is not None:
        between[duplicates & ~torch.eye(len(image), dtype=torch.bool)] = -torch.inf
    among = torch.cat([a @ b.T, (a @ a.T).fill_diagonal_(-torch.inf)], 1)
    if same_study is not None:
        others = same_study & ~torch.eye(len(image), dtype=torch.bool)
        among[torch.cat([others, others], 1)] = -torch.inf
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


def studies_of(batch, seed=5):
    """Studies (B, 1) of three images and one of a single image, in any order."""
    studies = torch.arange(batch) // 3
    studies[-1] = 99
    return studies[torch.randperm(batch, generator=torch.Generator().manual_seed(seed))][:, None]


def nt_xent(a, b, studies, temperature):
    """NT-Xent row by row as its sum says, with what is left out of the sum by name; no code of the project."""
    views = [(i, x / x.norm()) for side in (a, b) for i, x in enumerate(side)]
    total, found = 0.0, []
    for row, (image, x) in enumerate(views):
        own = (row + len(a)) % len(views)
        others = [k for k, (other, _) in enumerate(views) if k == own or studies[other] != studies[image]]
        logits = {k: x @ views[k][1] / temperature for k in others}
        total = total + torch.stack(list(logits.values())).exp().sum().log() - logits[own]
        found.append(max(logits, key=lambda k: float(logits[k].detach())) == own)
    return total / len(views), 100 * sum(found[: len(a)]) / len(a)


@pytest.mark.parametrize("temperature", [0.1, 0.02])
@pytest.mark.parametrize("tile", [3, 5, 100])
def test_images_of_a_study_are_no_negatives(tile, temperature, monkeypatch):
    """The tiles and the formula against the sum written out, in values and gradients."""
    monkeypatch.setattr(contrast, "TILE", tile)
    inputs, studies = random_inputs(11, 6, seed=tile), studies_of(11)
    sides, whole, tiles = ([inputs[k].clone().requires_grad_() for k in EMBEDDINGS[2:]] for _ in range(3))
    expected, accuracy = nt_xent(*sides, studies[:, 0].tolist(), temperature)
    expected.backward()
    formula = losses.simclr_loss(*whole, temperature, studies == studies.T)
    formula.backward()
    result = losses.SIMCLRLoss(temperature, mask_studies=True)(
        dict(zip(EMBEDDINGS[2:], tiles, strict=True)) | {"studies": studies}
    )
    result["loss"].backward()
    assert result["ssl_acc"].item() == pytest.approx(accuracy)
    for loss, found in ((formula, whole), (result["loss"], tiles)):
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
        for x, y in zip(found, sides, strict=True):
            torch.testing.assert_close(x.grad, y.grad, rtol=1e-9, atol=1e-12)
    assert result["loss"] < losses.simclr_loss(*sides, temperature)  # each log-sum-exp has fewer terms
    alone = losses.SIMCLRLoss(temperature, mask_studies=True)(
        dict(zip(EMBEDDINGS[2:], sides, strict=True)) | {"studies": torch.arange(11)[:, None]}
    )
    torch.testing.assert_close(alone["loss"], losses.simclr_loss(*sides, temperature), rtol=1e-12, atol=1e-12)


def test_a_batch_of_one_study_has_no_loss_and_no_gradient():
    x = {k: v.requires_grad_() for k, v in random_inputs(4, 3).items()} | {"studies": torch.zeros(4, 1)}
    loss = losses.SIMCLRLoss(0.1, mask_studies=True)(x)["loss"]
    loss.backward()
    assert abs(loss.item()) < 1e-12 and x["aug1_embed"].grad.abs().max() < 1e-12


def _rank_equals_single(rank, world, mask):
    """Mean over ranks of what each rank's loss gives equals the single process with the whole batch."""
    contrast.TILE = 3  # several tiles, whose edges are not those of the ranks
    batch = 4
    inputs = random_inputs(batch * world, 6)
    identities, duplicates = identities_and_duplicates(batch * world)
    studies = studies_of(batch * world)
    masks = dict(duplicates=duplicates, same_study=studies == studies.T) if mask else {}
    values, grads = formulas(inputs, ssl_scale=0.8, **masks)
    part = slice(rank * batch, (rank + 1) * batch)
    mine = {k: (v[part] if k in EMBEDDINGS else v).clone().requires_grad_() for k, v in inputs.items()}
    result = losses.SLIPLoss(losses.CLIPLoss(mask_duplicates=mask), losses.SIMCLRLoss(0.1, mask), 0.8)(
        {**mine, "identities": identities[part], "studies": studies[part]}
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
