"""The sigmoid loss against open_clip's, on one process and several, and what it changes in models and runs."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
import twins
from distributed_helpers import run_ranks
from helpers import assert_same_run, command, stop_after, weights
from model_helpers import tiny_model, write_checkpoint
from roco_tree import make_roco

import contrast
import losses
import main
import models
import utils
from runtime import checkpoints
from runtime.command_line import UsageError

NAMES = ("image_embed", "text_embed", "logit_scale", "logit_bias")


def random_inputs(batch, dim=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    image = torch.randn(batch, dim, generator=g, dtype=torch.float64)
    text = image + torch.randn(batch, dim, generator=g, dtype=torch.float64)
    return dict(zip(NAMES, (image, text, *torch.tensor([14.3, -3.7], dtype=torch.float64)), strict=True))


def leaves(inputs):
    return {name: value.clone().requires_grad_() for name, value in inputs.items()}


def theirs(inputs, **where):
    """Loss and gradients of open_clip's SigLipLoss."""
    loss_module = pytest.importorskip("open_clip.loss").SigLipLoss(**where)
    x = leaves(inputs)
    image, text = (F.normalize(x[name], dim=-1) for name in NAMES[:2])
    loss = loss_module(image, text, x["logit_scale"], x["logit_bias"])
    loss.backward()
    return loss.detach(), {name: value.grad for name, value in x.items()}


def assert_equal(x, expected):
    for name, grad in expected.items():
        torch.testing.assert_close(x[name].grad, grad, rtol=1e-10, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("tile", [3, 4, 100])
def test_tiles_and_formula_equal_open_clips_loss(tile, monkeypatch):
    monkeypatch.setattr(contrast, "TILE", tile)
    inputs = random_inputs(11, seed=tile)
    loss, grads = theirs(inputs)
    x = leaves(inputs)
    result = losses.SigLIPLoss()(x)
    result["loss"].backward()
    torch.testing.assert_close(result["loss"].detach(), loss, rtol=1e-12, atol=0)
    assert_equal(x, grads)
    torch.testing.assert_close(losses.siglip_loss(*(inputs[name] for name in NAMES)), loss, rtol=1e-12, atol=0)
    cosines = F.normalize(inputs["image_embed"], dim=-1) @ F.normalize(inputs["text_embed"], dim=-1).T
    assert result["siglip_acc"] == pytest.approx(100 * (cosines.argmax(1) == torch.arange(11)).double().mean().item())


def test_large_logits_lose_no_digits():
    """In float32, where the term of a pair at a logit of 80 is 1e-35 and that of a stranger there is 80."""
    inputs = random_inputs(300, 64) | {"logit_scale": torch.tensor(110.0).double()}
    loss, grads = theirs(inputs)
    x = leaves({name: value.float() for name, value in inputs.items()})
    result = losses.SigLIPLoss()(x)["loss"]
    result.backward()
    assert result.dtype == torch.float32 and result.item() == pytest.approx(loss.item(), rel=1e-5)
    for name, grad in grads.items():
        assert ((x[name].grad - grad).norm() / grad.norm()).item() < 1e-4, name


def _rank_equals_open_clip(rank, world):
    """Each rank's loss is theirs, and so is its gradient; the mean of the ranks' losses is that of the whole batch."""
    contrast.TILE = 3
    inputs = random_inputs(4 * world)
    part = slice(4 * rank, 4 * rank + 4)
    mine = {name: value[part] if name in NAMES[:2] else value for name, value in inputs.items()}
    loss, grads = theirs(mine, rank=rank, world_size=world)
    x = leaves(mine)
    result = losses.SigLIPLoss()(x)["loss"]
    result.backward()
    torch.testing.assert_close(result.detach(), loss, rtol=1e-12, atol=0)
    assert_equal(x, grads)
    torch.distributed.all_reduce(loss)
    torch.testing.assert_close(loss / world, theirs(inputs)[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("world", [2, 3])
def test_processes_equal_open_clips(world):
    pytest.importorskip("open_clip")
    run_ranks(_rank_equals_open_clip, world)


def identities_of(batch):
    return torch.randint(0, 5, (batch, 2), generator=torch.Generator().manual_seed(3))


def masked(inputs):
    """Term by term: what two pairs share an image or a caption is in no term but its own."""
    x, identities = leaves(inputs), identities_of(len(inputs["image_embed"]))
    image, text = (F.normalize(x[name], dim=-1) for name in NAMES[:2])
    total = x["logit_scale"].new_zeros(())
    for i in range(len(image)):
        for j in range(len(text)):
            logit = x["logit_scale"] * (image[i] @ text[j]) + x["logit_bias"]
            if i == j or not (identities[i] == identities[j]).any():
                total = total - torch.log(torch.sigmoid(logit if i == j else -logit))
    loss = total / len(image)
    loss.backward()
    return loss.detach(), {name: value.grad for name, value in x.items()}


def _rank_masks(rank, world):
    contrast.TILE = 3
    inputs = random_inputs(4 * world)
    part = slice(4 * rank, 4 * rank + 4)
    x = leaves({name: value[part] if name in NAMES[:2] else value for name, value in inputs.items()})
    result = losses.SigLIPLoss(mask_duplicates=True)({**x, "identities": identities_of(4 * world)[part]})["loss"]
    result.backward()
    loss, grads = masked(inputs)
    ours = result.detach().clone()
    for value in (ours, x["logit_scale"].grad, x["logit_bias"].grad):
        if world > 1:
            torch.distributed.all_reduce(value)
    torch.testing.assert_close(ours / world, loss, rtol=1e-12, atol=0)
    for name, grad in grads.items():
        expected = grad[part] if name in NAMES[:2] else grad
        torch.testing.assert_close(x[name].grad / world, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("world", [1, 2])
def test_duplicates_are_in_no_term_but_their_own(world):
    run_ranks(_rank_masks, world)
    inputs, identities = random_inputs(9), identities_of(9)
    duplicates = (identities[:, None] == identities).any(-1)
    formula = losses.siglip_loss(*(inputs[name] for name in NAMES), duplicates)
    torch.testing.assert_close(formula, masked(inputs)[0], rtol=1e-12, atol=0)


def test_scale_and_bias_start_as_published_learn_and_do_not_decay():
    model = tiny_model("SIGSLIP")
    assert model.logit_scale.exp().item() == pytest.approx(10) and model.logit_bias.item() == -10
    groups = {group["name"]: group["names"] for group in utils.parameter_groups(model, 0.1)}
    assert {"logit_scale", "logit_bias"} <= set(groups["no decay"])
    assert not hasattr(tiny_model("SIMCLR"), "logit_bias") and tiny_model("SLIP").logit_bias is None


def test_another_losss_scale_and_bias_are_not_taken_over(tmp_path):
    """A softmax's scale without the bias that belongs to it would call every caption the image's own."""
    path = write_checkpoint(tmp_path / "clip.pt", "vit")
    state = checkpoints.load_checkpoint(path)
    small = {name: value for name, value in state["model"]["config"].items() if name != "objective"}
    state["state_dict"]["logit_scale"].fill_(4.6)
    checkpoints.save_checkpoint(state, path)
    siglip, clip = (models.create_model(f"{name}_VITT16", **small) for name in ("SIGLIP", "CLIP"))
    models.initialise(siglip, path)
    assert (siglip.logit_scale.exp().item(), siglip.logit_bias.item()) == (pytest.approx(10), -10)
    assert torch.equal(siglip.image_projection, state["state_dict"]["image_projection"])
    with torch.no_grad():
        siglip.logit_scale.fill_(4.8)
    about = {**state, "state_dict": siglip.state_dict(), "model": {"name": siglip.name, "config": siglip.config}}
    checkpoints.save_checkpoint(about, tmp_path / "siglip.pt")
    models.initialise(clip, tmp_path / "siglip.pt")
    assert clip.logit_scale.item() == pytest.approx(4.8) and clip.logit_bias is None
    again = models.create_model("SIGSLIP_VITT16", **small)
    models.initialise(again, tmp_path / "siglip.pt")
    assert again.logit_scale.item() == pytest.approx(4.8) and again.logit_bias.item() == -10


@pytest.fixture(scope="module")
def roco(tmp_path_factory):
    return make_roco(tmp_path_factory.mktemp("roco"))


def rows_of(folder, kind="train"):
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def from_library(roco, source, output, *extra, model="SIGLIP"):
    argv = ["--dataset", "roco", "--root", str(roco), "--model", model, "--init", str(source), "--output-dir"]
    argv += [str(output), "-j", "0", "--batch-size", "8", "--epochs", "1", "--print-freq", "1", *extra]
    return main.main(argv)


STILL = ("--lr", "0", "--lr-start", "0", "--lr-end", "0")


def test_a_siglip_of_transformers_trains_on_with_its_own_scale_and_bias(roco, tmp_path):
    theirs = transformers.SiglipModel.from_pretrained(twins.siglip(tmp_path / "siglip"), dtype=torch.float32).eval()
    with torch.no_grad():
        theirs.logit_scale.fill_(4.77)
        theirs.logit_bias.fill_(-12.9)
    theirs.save_pretrained(tmp_path / "siglip")
    # Nothing learns: the checkpoint's probabilities are those of transformers, at a scale above a softmax's limit.
    from_library(roco, tmp_path / "siglip", tmp_path / "still", *STILL)
    loaded = models.load_pretrained(tmp_path / "still" / "checkpoint.pt")
    assert loaded.model.logit_scale.item() == pytest.approx(4.77) and loaded.model.logit_bias.item() == np.float32(
        -12.9
    )
    labels = ["a mammogram of a mass", "chest radiograph"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "siglip")
    ids = tokenizer(labels, padding="max_length", max_length=16, truncation=True, return_tensors="pt")["input_ids"]
    views = torch.stack([models.eval_view(loaded.preprocess)(image, None) for image in twins.images()])
    with torch.no_grad():
        expected = theirs(input_ids=ids, pixel_values=views).logits_per_image.sigmoid().double().numpy()
    got = loaded.zero_shot(twins.images(), labels, ["{}"])
    assert np.allclose(got, expected, rtol=1e-3, atol=0)
    row = rows_of(tmp_path / "still")[-1]
    assert (row["logit_scale"], row["logit_bias"]) == (pytest.approx(np.exp(4.77), rel=1e-5), pytest.approx(-12.9))
    # All learns, the bias too, and validation measures retrieval.
    scores = from_library(roco, tmp_path / "siglip", tmp_path / "run", "--lr", "1e-2", "--warmup-epochs", "0")
    biases = [row["logit_bias"] for row in rows_of(tmp_path / "run")]
    assert abs(biases[-1] + 12.9) > 1e-3 and scores["val_candidates"] > 0


def test_a_clip_of_transformers_starts_the_sigmoid_afresh(roco, tmp_path):
    from_library(roco, twins.clip(tmp_path / "clip"), tmp_path / "run", *STILL, model="SIGSLIP")
    row = rows_of(tmp_path / "run")[-1]
    assert (row["logit_scale"], row["logit_bias"]) == (pytest.approx(10), -10)


def test_a_siglip_goes_on_as_clip_without_a_bias(roco, tmp_path):
    from_library(roco, twins.siglip(tmp_path / "siglip"), tmp_path / "run", model="CLIP")
    loaded = models.load_pretrained(tmp_path / "run" / "checkpoint.pt")
    assert loaded.model.logit_bias is None
    prob = loaded.zero_shot(twins.images(), ["a mammogram of a mass", "chest radiograph"])
    assert np.allclose(prob.sum(1), 1)  # a softmax's, as it was trained


def test_a_broken_run_continues_as_if_unbroken(roco, tmp_path, monkeypatch):
    flags = ("--mask-duplicates", "--update-freq", "2", "--batch-size", "4")
    main.main(command(roco, tmp_path / "whole", *flags, model="SIGSLIP_VITT16"))
    with monkeypatch.context() as patch:
        patch.setattr(main, "finish_epoch", stop_after(main.finish_epoch))
        with pytest.raises(KeyboardInterrupt):
            main.main(command(roco, tmp_path / "broken", *flags, model="SIGSLIP_VITT16"))
    main.main(command(roco, tmp_path / "broken", *flags, model="SIGSLIP_VITT16"))
    assert_same_run(tmp_path / "whole", tmp_path / "broken")
    assert weights(tmp_path / "whole")["logit_bias"].item() != -10


def test_a_gather_without_gradient_is_refused(roco, tmp_path):
    with pytest.raises(UsageError, match="--no-gather-with-grad.*the text tower would not learn"):
        main.main(command(roco, tmp_path, "--no-gather-with-grad", model="SIGLIP_VITT16"))
