"""Models against the published constructors and the reference implementation's outputs and gradients."""

import gzip
import importlib
import json
import math
import re
from argparse import Namespace
from pathlib import Path, PosixPath

import pytest
import torch
from helpers import GOLDENS
from model_helpers import GOLDEN_MODELS, tiny_model, write_checkpoint

import losses
import models
import utils
from flags import names
from runtime import checkpoints
from towers import pretrained
from towers import weights as towers_weights
from towers.build import titled

PUBLISHED = json.loads(gzip.decompress((GOLDENS / "state_dicts.json.gz").read_bytes()))


def golden_model(objective: str):
    model = tiny_model(objective)
    case = GOLDEN_MODELS["cases"][objective]
    assert set(model.state_dict()) == set(case["keys"])
    model.load_state_dict({k: GOLDEN_MODELS["state_dict"][k] for k in case["keys"]})
    return model, case


@pytest.mark.parametrize("name", list(PUBLISHED["models"]))
def test_names_shapes_and_decay_groups_equal_the_published_models(name):
    with torch.device("meta"):
        model = getattr(models, name)()
    golden = PUBLISHED["models"][name]
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == dict(golden["keys"])
    assert sum(p.numel() for p in model.parameters()) == golden["n_params"]
    assert model.visual.blocks[0].attn.num_heads == golden["vision_heads"]
    assert model.visual.norm.eps == golden["norm_eps"] and model.visual.global_pool == golden["global_pool"]
    groups = {g["name"]: g for g in utils.parameter_groups(model, 0.1)}
    ours = {title: sorted(group["names"]) for title, group in groups.items()}
    theirs = PUBLISHED["groups"][name]
    assert ours["decay"] == sorted(theirs["decay"]) and ours["no decay"] == sorted(theirs["no_decay"])
    assert groups["decay"]["weight_decay"] == 0.1 and groups["no decay"]["weight_decay"] == 0


@pytest.mark.parametrize("objective", ["CLIP", "SIMCLR", "SLIP"])
def test_outputs_losses_and_gradients_equal_the_reference(objective):
    model, case = golden_model(objective)
    close = dict(rtol=1e-5, atol=2e-6)
    images, extra = case["inputs"][0], case["inputs"][1:]
    torch.testing.assert_close(model.eval().encode_image(images), case["encode_image"], **close)
    outputs = model(*case["inputs"])
    assert set(outputs) == set(case["eval_outputs"])
    for key, value in case["eval_outputs"].items():
        torch.testing.assert_close(outputs[key], value, **close)
    if objective != "SIMCLR":
        torch.testing.assert_close(model.encode_text(extra[0]), case["encode_text"], **close)

    model.train()
    outputs = model(*case["inputs"])
    for key, value in case["train_outputs"].items():
        torch.testing.assert_close(outputs[key], value, rtol=1e-5, atol=1e-5)
    loss = model.objective.loss(losses.LossSettings())
    result = loss(outputs)
    assert tuple(sorted(result)) == tuple(sorted(model.objective.metrics)) == tuple(sorted(case["losses"]))
    for key, value in case["losses"].items():
        torch.testing.assert_close(result[key].detach(), value, rtol=1e-5, atol=1e-5)
    result["loss"].backward()
    for name, parameter in model.named_parameters():  # every parameter has a gradient: none is dead
        golden = case["grads"][name]
        grad = parameter.grad.flatten()
        scale = max(golden["norm"], 1e-2)  # a bias before BatchNorm has gradient 0, and rounding is all there is of it
        assert abs(grad.norm().item() - golden["norm"]) < 2e-4 * scale, name
        assert abs(grad.sum().item() - golden["sum"]) < 2e-4 * scale * math.sqrt(len(grad)), name
        torch.testing.assert_close(grad[:6], golden["first"], rtol=1e-3, atol=2e-4 * scale)
    for name, value in case["buffers_after"].items():
        torch.testing.assert_close(model.state_dict()[name], value, **close)


def test_initial_distributions_are_the_published_ones():
    torch.manual_seed(0)
    model = models.create_model("SLIP_VITS16", ssl_mlp_dim=512)

    def std(parameter):
        return parameter.detach().float().std().item()

    vit, text = model.visual, model.transformer.resblocks
    assert std(vit.cls_token) == pytest.approx(0.02, rel=0.15)  # timm 0.5; today's timm starts it at 1e-6
    assert std(vit.pos_embed) == pytest.approx(0.02, rel=0.05)
    assert std(vit.blocks[3].attn.qkv.weight) == pytest.approx(0.02, rel=0.02)
    assert std(vit.blocks[3].mlp.fc2.weight) == pytest.approx(0.02, rel=0.02)
    fan_in = 3 * 16 * 16
    assert std(vit.patch_embed.proj.weight) == pytest.approx(1 / math.sqrt(3 * fan_in), rel=0.02)  # Conv2d's own
    assert std(model.image_projection) == pytest.approx(384**-0.5, rel=0.02)
    assert std(model.text_projection) == pytest.approx(512**-0.5, rel=0.02)
    assert std(model.token_embedding.weight) == pytest.approx(0.02, rel=0.02)
    assert std(model.positional_embedding) == pytest.approx(0.01, rel=0.02)
    assert std(text[5].attn.in_proj_weight) == pytest.approx(512**-0.5, rel=0.02)
    assert std(text[5].attn.out_proj.weight) == pytest.approx((512 * 24) ** -0.5, rel=0.02)
    assert std(text[5].mlp.c_fc.weight) == pytest.approx(1024**-0.5, rel=0.02)
    assert std(text[5].mlp.c_proj.weight) == pytest.approx((512 * 24) ** -0.5, rel=0.02)
    assert model.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    assert not text[5].attn.in_proj_bias.any() and not text[5].attn.out_proj.bias.any()
    assert text[5].mlp.c_fc.bias.abs().max() <= 512**-0.5  # nn.Linear's own


def test_any_timm_tower_and_image_size():
    model = models.create_model(
        "SLIP_VITT16",
        vision_tower="resnet10t",
        image_size=64,
        text_layers=1,
        embed_dim=32,
        ssl_mlp_dim=16,
        ssl_emb_dim=8,
    )
    outputs = model(
        *(torch.randn(2, 3, 64, 64), torch.randint(1, 99, (2, 9)), torch.randn(2, 3, 64, 64), torch.randn(2, 3, 64, 64))
    )
    assert outputs["image_embed"].shape == (2, 32) and outputs["aug1_embed"].shape == (2, 8)
    assert not model.joint_views  # its BatchNorm sees each view as a batch of its own
    assert model.visual(torch.randn(2, 3, 64, 64)).shape == (2, model.feature_dim)
    assert models.create_model("CLIP_VITT16", image_size=96).visual.pos_embed.shape == (1, 37, 192)


def test_unknown_names_are_refused_with_the_choices():
    with pytest.raises(ValueError, match="SLIP_VITB17.*SLIP_VITB16"):
        models.create_model("SLIP_VITB17")
    with pytest.raises(ValueError, match="ssl_mlp_dims.*ssl_mlp_dim"):
        models.create_model("SLIP_VITB16", ssl_mlp_dims=3)
    with pytest.raises(ValueError, match="vit_tinny"):
        models.create_model("SLIP_VITT16", vision_tower="vit_tinny")
    with pytest.raises(ValueError, match="depht"):
        models.create_model("SLIP_VITT16", vision_kwargs={"depht": 3})


def test_long_captions_differ_and_trimmed_padding_changes_nothing():
    model = tiny_model("CLIP").eval()
    tokens = torch.tensor([[126, 5, 6, 127, 0, 0], [126, 9, 127, 0, 0, 0]])
    full, trimmed = model.encode_text(tokens), model.encode_text(tokens[:, :4])
    torch.testing.assert_close(full, trimmed, rtol=1e-6, atol=1e-6)
    assert (full[0] - full[1]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="17 tokens.*16"):
        model.encode_text(torch.ones(1, 17, dtype=torch.long))


@pytest.mark.parametrize("tower", ["clip", "bert"])
def test_embeddings_and_gradients_do_not_depend_on_how_far_captions_are_padded(tower):
    """In eval mode, as dropout draws other numbers for another length."""
    model = tiny_model("CLIP", text_tower=tower, context_length=24, text_layers=2).eval().double()
    tokens = torch.tensor([[126, 5, 6, 127, 0, 0], [126, 9, 127, 0, 0, 0]])
    towards = torch.randn(2, model.config["embed_dim"], dtype=torch.float64)
    results = []
    for length in (24, 8, 4):
        padded = torch.zeros(2, length, dtype=torch.long)
        padded[:, : min(length, 6)] = tokens[:, :length]
        model.zero_grad()
        embedded = model.encode_text(padded)
        (embedded * towards).sum().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append({"embedding": embedded.detach(), **grads})
    assert not model.text.reads_padding and len(results[0]) > 20
    for trimmed in results[1:]:
        for name, whole in results[0].items():
            torch.testing.assert_close(trimmed[name], whole, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("tower, prefix", [("image", "visual."), ("text", "transformer.")])
def test_a_frozen_tower_has_no_gradient_and_stays_in_eval_mode(tower, prefix):
    model, case = golden_model("SLIP")
    model.freeze(tower)
    model.train()
    loss = losses.SLIPLoss(losses.CLIPLoss(), losses.SIMCLRLoss())(model(*case["inputs"]))["loss"]
    loss.backward()
    frozen = [n for n, p in model.named_parameters() if p.grad is None]
    assert any(n.startswith(prefix) for n in frozen)
    assert "image_projection" not in frozen and "text_projection" not in frozen
    part = model.visual if tower == "image" else model.transformer
    assert not any(m.training for m in part.modules()) and model.image_mlp.training
    with pytest.raises(ValueError, match="image"):
        tiny_model("SIMCLR").freeze("text")


def test_published_files_load_safely(tmp_path):
    """The published layout: `module.` before every name, a Namespace that holds a PosixPath."""
    model = tiny_model("SLIP")
    args = Namespace(model="SLIP_VITT16", output_dir=PosixPath("/runs/slip"), lr=3e-3)
    path = tmp_path / "slip.pt"
    torch.save(
        {
            "epoch": 25,
            "state_dict": {f"module.{k}": v for k, v in model.state_dict().items()},
            "best_acc1": 42.8,
            "args": args,
        },
        path,
    )
    other = tiny_model("SLIP")
    models.initialise(other, path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_published_full_size_file_is_recognised(tmp_path):
    model = models.SIMCLR_VITS16(ssl_mlp_dim=64, ssl_emb_dim=16)
    path = tmp_path / "simclr_small.pt"
    torch.save(
        {
            "state_dict": {f"module.{k}": v for k, v in model.state_dict().items()},
            "args": Namespace(model="SIMCLR_VITS16"),
        },
        path,
    )
    loaded = models.load_pretrained(path)
    assert loaded.model.name == "SIMCLR_VITS16" and loaded.tokenizer is None and not loaded.model.training
    assert loaded.preprocess.size == 224
    x = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(loaded.model.encode_image(x), model.eval().encode_image(x))


def test_of_published_weights_and_their_average_the_average_is_taken(tmp_path):
    model = models.SIMCLR_VITT16(ssl_mlp_dim=8, ssl_emb_dim=4)
    raw = {f"module.{key}": value for key, value in model.state_dict().items()}
    average = {key: value + 0.25 if value.is_floating_point() else value for key, value in raw.items()}
    old = {key: value for key, value in average.items() if "num_batches" not in key}  # of before PyTorch 0.4.1
    args = Namespace(model="SIMCLR_VITT16")
    torch.save({"state_dict": raw, "state_dict_ema": old, "args": args}, tmp_path / "c.pt")
    other = models.SIMCLR_VITT16(ssl_mlp_dim=8, ssl_emb_dim=4)
    models.initialise(other, tmp_path / "c.pt")
    for found in (models.load_pretrained(tmp_path / "c.pt").model, other):
        assert all(torch.equal(value, average[f"module.{key}"]) for key, value in found.state_dict().items())


FINETUNED = {  # the flags of each reader of pre-trained weights, {} for a fine-tuned checkpoint
    "export": ["--to", "timm", "--output", "out", "{}"],
    "predict": ["embed", "{}", "images", "--output", "bank.npz"],
    "main_linear": ["--dataset", "digits", "--pretrained", "{}"],
    "eval_zeroshot": ["--resume", "{}"],
    "main": ["--evaluate", "--init", "{}"],
    "beit_finetuning.run_class_finetuning": ["--data_set", "digits", "--model", "tower", "--finetune", "{}"],
}


@pytest.mark.parametrize("script", FINETUNED)
def test_a_fine_tuned_classifier_is_refused_by_what_takes_it(script, tmp_path, monkeypatch):
    state = {"settings": {"data_set": "digits"}, "args": {"finetune": "start.pt"}, "state_dict": {}, "network": {}}
    torch.save(state, tmp_path / "checkpoint.pt")
    monkeypatch.chdir(tmp_path)
    flags = [part.format("checkpoint.pt") for part in FINETUNED[script]]
    message = r"fine-tuned classifier and no pre-trained model: `python predict.py classify .*from start.pt"
    with pytest.raises(ValueError, match=message):
        importlib.import_module(script).main(flags)


def test_weights_to_start_or_go_on_from_are_no_fine_tuned_classifier(tmp_path):
    import main

    torch.save({"settings": {"data_set": "digits"}, "state_dict": {}, "preprocess": {}}, tmp_path / "checkpoint.pt")
    for out, checkpoint in ((tmp_path, ""), (tmp_path / "new", str(tmp_path / "checkpoint.pt"))):
        with pytest.raises(ValueError, match="checkpoint.pt is a fine-tuned classifier"):
            main.resume(Namespace(args=Namespace(output_dir=str(out), resume=checkpoint)))
    model = models.create_model("CLIP_VITT16", vision_tower="test_vit")
    with pytest.raises(ValueError, match="checkpoint.pt is a fine-tuned classifier"):
        pretrained.load_vision(model, tmp_path / "checkpoint.pt")


def test_a_file_that_would_run_code_is_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.write_text, (Path(tmp_path / "ran"), "x"))

    path = tmp_path / "bomb.pt"
    torch.save({"state_dict": {}, "args": Bomb()}, path)
    with pytest.raises(ValueError, match="bomb.pt"):
        models.load_pretrained(path)
    assert not (tmp_path / "ran").exists()


def test_checkpoint_round_trip_restores_model_and_settings(tmp_path):
    model = tiny_model("SLIP")
    path = tmp_path / "ours.pt"
    checkpoints.save_checkpoint(
        {
            "model": {"name": model.name, "config": model.config},
            "state_dict": model.state_dict(),
            "preprocess": model.preprocess.to_dict(),
            "tokenizer": {"kind": "clip-bpe", "context_length": 16},
        },
        path,
    )
    loaded = models.load_pretrained(path)
    assert loaded.model.config == model.config and loaded.preprocess == model.preprocess
    assert loaded.tokenizer(["a"]).shape == (1, 16)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded.model.encode_image(images), model.eval().encode_image(images))


def test_a_files_tensors_become_the_models_where_they_lie_in_memory_as_its_do():
    model, prefix = tiny_model("CLIP"), "transformer.resblocks.0.mlp"
    given = {name: torch.rand_like(value) for name, value in model.state_dict().items()}
    other = {
        f"{prefix}.c_fc.weight": torch.Tensor.double,
        f"{prefix}.c_proj.weight": lambda x: x.t().contiguous().t(),
        "visual.patch_embed.proj.weight": lambda x: x.to(memory_format=torch.channels_last),  # as a training saves it
    }
    given |= {name: change(given[name]) for name, change in other.items()}
    towers_weights.load_weights(model, given, "x.pt", from_file=True)
    for name, value in model.named_parameters():
        assert (value.data_ptr() == given[name].data_ptr()) is (name not in other), name
        assert value.requires_grad and value.dtype == torch.float32 and value.is_contiguous()
        assert torch.equal(value, given[name].float())


def test_initialise_resizes_positions_and_passes_over_another_head(tmp_path):
    small = tiny_model("CLIP")
    path = tmp_path / "clip.pt"
    checkpoints.save_checkpoint({"state_dict": small.state_dict()}, path)
    large = tiny_model("SLIP", image_size=48)
    head = large.image_mlp.layer1.weight.clone()
    models.initialise(large, path)
    assert large.visual.pos_embed.shape == (1, 37, 64)
    assert torch.equal(large.visual.pos_embed[:, 0], small.visual.pos_embed[:, 0])  # the class token's is kept
    assert torch.equal(large.transformer.resblocks[1].mlp.c_fc.weight, small.transformer.resblocks[1].mlp.c_fc.weight)
    assert torch.equal(large.image_mlp.layer1.weight, head)
    with pytest.raises(ValueError, match="token_embedding"):
        models.initialise(tiny_model("CLIP", vocab_size=64), path)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint"])
def test_torn_and_foreign_files_are_named(tmp_path, content):
    path = tmp_path / "torn.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="torn.pt"):
        models.load_pretrained(path)
    with pytest.raises(FileNotFoundError, match="absent.pt"):
        models.load_pretrained(tmp_path / "absent.pt")
    torch.save({"weights": 1}, path)
    with pytest.raises(ValueError, match="neither.*weights"):
        models.load_pretrained(path)


def test_an_objective_is_one_entry(monkeypatch, tmp_path):
    """A toy objective, image against caption by squared distance, added by one entry and its name, and trained."""
    from helpers import command
    from roco_tree import make_roco

    import main

    class Distance(torch.nn.Module):
        def __init__(self, settings):
            super().__init__()
            self.scale = settings.ssl_scale

        def forward(self, outputs):
            loss = self.scale * (outputs["image_embed"] - outputs["text_embed"]).square().mean()
            return {"loss": loss, "distance": loss}

    toy = models.Objective(models.CLIP, ("image", "text"), Distance, ("loss", "distance"), ("retrieval",))
    monkeypatch.setitem(models.OBJECTIVES, "toy", toy)
    for name, config in models.variants("toy").items():
        monkeypatch.setitem(models.MODELS, name, config)
        monkeypatch.setitem(names.MODELS, name, "toy")
    run = command(make_roco(tmp_path / "roco"), tmp_path / "run", "--epochs", "4", model="TOY_VITT16")
    scores = main.main([*run, "--lr", "1e-2", "--warmup-epochs", "0", "--batch-size", "4"])
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses_of_steps = [row["distance"] for row in rows if row["kind"] == "train"]
    assert losses_of_steps[-1] < losses_of_steps[0] and scores["val_candidates"] > 0
    assert models.load_pretrained(tmp_path / "run" / "checkpoint.pt").model.objective is toy


def test_an_unknown_objective_is_refused_by_name(monkeypatch):
    monkeypatch.setitem(models.MODELS, "MOCO_VITT16", models.ModelConfig("moco", "vit_tiny_patch16_224"))
    with pytest.raises(ValueError, match="unknown objective 'moco': choose one of clip, simclr, slip"):
        models.create_model("MOCO_VITT16")


@pytest.fixture
def stored(tmp_path):
    """The state of a small checkpoint, changed by a function and written; returns its path."""
    path = write_checkpoint(tmp_path / "checkpoint.pt", "vit")

    def changed(change):
        state = checkpoints.load_checkpoint(path)
        change(state)
        checkpoints.save_checkpoint(state, path)
        return path

    return changed


@pytest.mark.parametrize("setting, message", [
    ({"pretrained": True}, "pretrained is no setting of an architecture"),
    ({"pretrained_cfg": {"file": "weights.pt"}}, "pretrained_cfg is no setting of an architecture"),
    ({"pretrained_cfg_overlay": {"url": "http://localhost/weights.pt"}}, "pretrained_cfg_overlay is no setting"),
    ({"checkpoint_path": "weights.pt"}, "checkpoint_path is no setting of an architecture"),
    ({"cache_dir": "here"}, "cache_dir is no setting of an architecture"),
    ({"drop_path_rate": "weights.pt"}, "drop_path_rate takes numbers, not 'weights.pt'"),
    ({"global_pool": "../weights"}, "global_pool takes numbers, not '../weights'"),
])  # fmt: skip
def test_settings_in_a_file_name_no_weights_no_path_and_no_address(stored, monkeypatch, setting, message):
    def refused(*_, **__):
        raise AssertionError("built")

    path = stored(lambda state: state["model"]["config"]["vision_kwargs"].update(setting))
    monkeypatch.setattr("timm.create_model", refused)
    with pytest.raises(ValueError, match=re.escape(message)):
        models.load_pretrained(path)


@pytest.mark.parametrize("field, value, message", [
    ("vision_tower", "hf-hub:timm/resnet18.a1_in1k", "unknown vision tower 'hf-hub:"),
    ("vision_tower", "local-dir:weights", "unknown vision tower 'local-dir:"),
    ("vision_tower", ["resnet18"], "vision_tower is no ['resnet18']"),
    ("text_heads", 0, "text_heads is a whole number from 1, not 0"),
    ("text_width", "wide", "text_width is a whole number from 1, not 'wide'"),
    ("secret", 1, "has no setting secret"),
])  # fmt: skip
def test_other_fields_of_a_file_are_of_their_kind(stored, field, value, message):
    path = stored(lambda state: state["model"]["config"].update({field: value}))
    with pytest.raises(ValueError, match=re.escape(message)):
        models.load_pretrained(path)


def test_a_swin_of_a_file_takes_its_own_numbers_alone():
    from towers.build import build_image_tower

    with pytest.raises(ValueError, match="medclip-swin has no setting torchscript: choose from embed_dim, depths"):
        build_image_tower("medclip-swin", {"torchscript": 1}, 224)


def test_a_small_file_that_describes_a_huge_model_is_refused_before_it_is_built(stored):
    path = stored(lambda state: state["model"]["config"].update(text_width=4096, text_layers=48))
    with pytest.raises(ValueError, match="describes a model of 9,667,251,265 parameters and holds 363,329"):
        models.load_pretrained(path)


@pytest.mark.parametrize("part", ["preprocess", "state_dict"])
def test_a_checkpoint_without_a_part_names_it(stored, part):
    path = stored(lambda state: state.pop(part))
    with pytest.raises(ValueError, match=f"is no whole checkpoint of ours: it holds no {part}"):
        models.load_pretrained(path)


@pytest.mark.parametrize("size, choose", [((96, 60), "48 or 64"), ((100, 64), "96 or 112"), ((64, 10), "16")])
def test_a_size_that_the_patches_do_not_fill_is_refused(size, choose):
    with pytest.raises(ValueError, match=f"which .* the margin would never be seen; choose {choose}$"):
        models.create_model("SIMCLR_VITT16", image_size=size)


@pytest.mark.parametrize("tower", ["vit_tiny_patch16_224", "resnet18", "medclip-swin"])
def test_a_network_that_weights_are_put_onto_is_not_drawn_first(tower):
    """Its buffers, some of which no file holds, are those of a network that is drawn, and so are its answers."""
    from towers.weights import load_weights, unfilled

    small = dict(vision_tower=tower, text_layers=1, text_width=32, text_heads=2, embed_dim=16)
    torch.manual_seed(0)
    drawn = models.create_model("CLIP_VITT16", **small)
    torch.manual_seed(0)
    empty = unfilled(models.create_model, "CLIP_VITT16", **small)
    after = torch.get_rng_state()
    torch.manual_seed(0)
    assert torch.equal(after, torch.get_rng_state())  # what is drawn next does not depend on what the memory held
    large = max(empty.state_dict(), key=lambda name: empty.state_dict()[name].numel())
    assert not torch.equal(empty.state_dict()[large], drawn.state_dict()[large])
    load_weights(empty, drawn.state_dict(), "drawn")
    theirs = dict(drawn.named_buffers())
    assert all(torch.equal(value, theirs[name]) for name, value in empty.named_buffers())
    images = torch.rand(1, 3, 224, 224)
    with torch.inference_mode():
        assert torch.equal(drawn.eval().encode_image(images), empty.eval().encode_image(images))


def test_a_title_names_the_image_tower_that_is_there():
    small = dict(vision_kwargs={"layers": (1, 1, 1, 1), "channels": (8, 8, 8, 8)}, image_size=64)
    for found, title in (
        (models.create_model("SIMCLR_VITT16", image_size=32), "SIMCLR_VITT16"),  # another size of images alone
        (models.create_model("CLIP_VITT16", vision_tower="test_resnet", text_layers=1), "CLIP with test_resnet"),
        (models.create_model("SLIP_VITT16", vision_tower="resnet18", **small), "SLIP with resnet18 of other sizes"),
        (tiny_model("SLIP"), "SLIP with vit_tiny_patch16_224 of other sizes"),
    ):
        assert found.title == title and "_" in found.name


def test_lists_of_a_checkpoint_are_no_other_sizes():
    usual = models.ModelConfig("simclr", vision_tower="resnet18", vision_kwargs={"channels": (8, 8)})
    own = models.ModelConfig("simclr", vision_tower="resnet18", vision_kwargs={"channels": [8, 8]})
    assert titled("SIMCLR_SMALL", own, usual) == "SIMCLR_SMALL"
