"""Towers that start from others' weights, against timm and transformers themselves."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
import twins
from helpers import command
from PIL import Image
from roco_tree import make_roco
from safetensors.torch import save_file
from torchvision import transforms as tv
from transformers import BertConfig, BertForMaskedLM, BertTokenizer

import main
import models
from runtime import command_line
from towers import pretrained as pretrained_towers

TOWER = "tf_efficientnet_lite0"  # its weights expect a mean of 0.5
VOCAB = [*"[PAD] [UNK] [CLS] [SEP] [MASK]".split(), *"abcdefghijklmnopqrstuvwxyz", "CT", "ct", "axial", "##s", "of"]


def build(*extra: str, model: str = "CLIP_VITT16"):
    small = ["--override", "text_layers=2", "text_width=32", "text_heads=2"]
    return main.build_model(main.get_args_parser().parse_args(["--model", model, *small, *extra]))


def timm_model(seed: int = 0):
    torch.manual_seed(seed)
    return timm.create_model(TOWER).eval()


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("weights") / "tower.pt"
    torch.save(timm_model().state_dict(), file)
    return file


def test_an_image_tower_and_its_images_are_those_of_timm(weights):
    model, _ = build("--vision-tower", TOWER, "--vision-weights", str(weights), "--image-size", "64")
    theirs = timm_model()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    cfg = timm.data.resolve_model_data_config(theirs)
    view = tv.Compose([tv.ToTensor(), tv.Normalize(cfg["mean"], cfg["std"])])
    expected = theirs.forward_head(theirs.forward_features(view(Image.fromarray(pixels))[None]), pre_logits=True)
    found = model.eval().visual(model.preprocess.tensor(Image.fromarray(pixels))[None])
    torch.testing.assert_close(found, expected)
    assert model.preprocess.mean == (0.5, 0.5, 0.5) and model.preprocess.size == 64
    assert build("--vision-tower", TOWER, "--vision-weights", str(weights))[0].preprocess.size == 224


def test_safetensors_a_folder_and_a_training_checkpoint_hold_the_same(weights, tmp_path):
    state = torch.load(weights, weights_only=True)
    save_file(state, tmp_path / "model.safetensors")
    cfg = {"architecture": TOWER, "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}
    (tmp_path / "config.json").write_text(json.dumps(cfg))
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "ddp.pth")
    for source in (tmp_path / "model.safetensors", tmp_path, tmp_path / "ddp.pth"):
        model, _ = build("--vision-tower", TOWER, "--vision-weights", str(source), "--image-size", "64")
        for key, value in model.visual.state_dict().items():
            assert torch.equal(value, state[key]), (source, key)
        assert model.preprocess.mean == ((0.1, 0.2, 0.3) if source == tmp_path else (0.5, 0.5, 0.5))
    cfg["architecture"] = "resnet18"
    (tmp_path / "config.json").write_text(json.dumps(cfg))
    with pytest.raises(ValueError, match="describes resnet18.*--vision-tower resnet18"):
        build("--vision-tower", TOWER, "--vision-weights", str(tmp_path))


def test_a_vits_position_embeddings_follow_the_image_size(tmp_path):
    torch.manual_seed(0)
    theirs = timm.create_model("vit_tiny_patch16_224").eval()
    torch.save(theirs.state_dict(), tmp_path / "vit.pt")
    model, _ = build("--vision-weights", str(tmp_path / "vit.pt"), "--image-size", "96")
    source = dict(file=str(tmp_path / "vit.pt"))
    grown = timm.create_model(
        "vit_tiny_patch16_224", img_size=96, pretrained=True, pretrained_cfg_overlay=source
    ).eval()
    torch.testing.assert_close(model.visual.pos_embed, grown.pos_embed)
    x = torch.randn(2, 3, 96, 96)
    expected = grown.forward_head(grown.forward_features(x), pre_logits=True)
    torch.testing.assert_close(model.eval().visual(x), expected)


def old_names(state: dict, prefix: str = "") -> dict:
    """A DenseNet's weights as torchvision published them in 2017, and as CheXNet's authors hold them in a network."""
    renamed = {re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", key): value for key, value in state.items()}
    return {prefix + key: value for key, value in renamed.items() if not key.endswith("num_batches_tracked")}


@pytest.mark.parametrize("wrapper", ["", "module.densenet121.", "densenet121."])
def test_a_densenet_of_old_names_is_loaded_as_timm_loads_it(wrapper, tmp_path):
    torch.manual_seed(0)
    state = old_names(torchvision.models.densenet121(num_classes=14).state_dict())
    assert "features.denseblock1.denselayer1.norm.1.weight" in state
    torch.save(state, tmp_path / "published.pth")
    source = dict(file=str(tmp_path / "published.pth"), num_classes=14)
    theirs = timm.create_model("densenet121", num_classes=14, pretrained=True, pretrained_cfg_overlay=source)
    file = tmp_path / "chexnet.pth.tar"
    torch.save({"state_dict": {wrapper + key.replace("classifier", "classifier.0"): state[key] for key in state}}, file)
    flags = ("--vision-tower", "densenet121", "--image-size", "32", "--vision-weights", str(file))
    own = build(*flags)[0].visual.state_dict()
    assert own and all(torch.equal(own[key], theirs.state_dict()[key]) for key in own)
    lacking = {key: value for key, value in state.items() if key != "features.denseblock1.denselayer1.norm.1.weight"}
    torch.save({wrapper + key: value for key, value in lacking.items()}, file)
    with pytest.raises(ValueError, match=r"missing \(1\): features.denseblock1.denselayer1.norm1.weight; unexp.*none"):
        build(*flags)


@pytest.mark.parametrize(("raw", "average"), [("state_dict", "state_dict_ema"), ("model", "model_ema")])
def test_of_weights_and_their_average_the_average_is_taken_as_timm_does(raw, average, weights, tmp_path, caplog):
    state = torch.load(weights, weights_only=True)
    mean = {f"module.{k}": v + 0.25 if v.is_floating_point() else v for k, v in state.items()}
    file = tmp_path / "model_best.pth.tar"
    torch.save({"arch": TOWER, raw: state, average: mean}, file)
    theirs = timm.models.load_state_dict(str(file))
    with caplog.at_level("INFO"):
        model, _ = build("--vision-tower", TOWER, "--vision-weights", str(file), "--image-size", "64")
    assert all(torch.equal(value, theirs[key]) for key, value in model.visual.state_dict().items())
    assert f"the average, {average}, is taken" in caplog.text
    torch.save({"arch": TOWER, raw: state, average: None}, file)
    model, _ = build("--vision-tower", TOWER, "--vision-weights", str(file), "--image-size", "64")
    assert torch.equal(model.visual.conv_stem.weight, state["conv_stem.weight"])


@pytest.mark.parametrize(
    ("name", "wrap"),
    [
        ("ema", lambda mean: {"decay": 0.99, "module": mean}),
        ("ema", lambda mean: mean),
        ("ema_state_dict", lambda mean: mean),
        ("ema_model", lambda mean: {"state_dict": mean, "updates": 7}),
        ("model_ema", lambda mean: {"n_averaged": torch.tensor(7), **{f"module.{k}": v for k, v in mean.items()}}),
    ],
)
def test_an_average_is_taken_under_the_names_that_trainers_give_it(name, wrap, weights, tmp_path):
    state = torch.load(weights, weights_only=True)
    mean = {k: v + 0.25 if v.is_floating_point() else v for k, v in state.items()}
    torch.save({"model": state, name: wrap(mean), "ema_config": {"decay": 0.99}, "ema_decay": 0.99}, tmp_path / "a.pth")
    assert torch.equal(pretrained_towers.read_state(tmp_path / "a.pth")["conv_stem.weight"], mean["conv_stem.weight"])


def test_an_average_in_another_form_and_whole_numbers_for_weights_are_refused(weights, tmp_path):
    state = torch.load(weights, weights_only=True)
    shadows = {"decay": 0.99, "shadow_params": list(state.values())}
    torch.save({"model": state, "ema": shadows}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="a.pth holds tensors under 'ema', .* holds decay, shadow_params"):
        pretrained_towers.read_state(tmp_path / "a.pth")
    torch.save({**state, "conv_stem.weight": state["conv_stem.weight"].to(torch.int8)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"other type \(1\): conv_stem.weight int8 instead of float32"):
        build("--vision-tower", TOWER, "--vision-weights", str(tmp_path / "a.pth"), "--image-size", "64")


def test_what_does_not_fit_is_named(weights, tmp_path):
    state = torch.load(weights, weights_only=True)
    state["spare.weight"] = torch.zeros(2)
    del state["conv_stem.weight"]
    torch.save(state, tmp_path / "torn.pt")
    with pytest.raises(ValueError, match=r"missing \(1\): conv_stem.weight; unexpected \(1\): spare.weight"):
        build("--vision-tower", TOWER, "--vision-weights", str(tmp_path / "torn.pt"))
    whole = torch.load(weights, weights_only=True)
    torch.save({f"copy.{key}": value + 1 for key, value in whole.items()} | whole, tmp_path / "twice.pt")
    with pytest.raises(ValueError, match=r"missing \(0\): none; unexpected \(\d+\): copy.conv_stem.weight"):
        build("--vision-tower", TOWER, "--vision-weights", str(tmp_path / "twice.pt"))
    with pytest.raises(ValueError, match="add --vision-tower"):
        build("--vision-weights", str(weights), model="MEDSLIP_VIT")
    with pytest.raises(FileNotFoundError, match="nowhere.pt"):
        build("--vision-tower", TOWER, "--vision-weights", str(tmp_path / "nowhere.pt"))
    (tmp_path / "bad.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        build("--vision-tower", TOWER, "--vision-weights", str(tmp_path / "bad.safetensors"))
    with pytest.raises(command_line.UsageError, match="--vision-weights.*leave out --init"):
        main.main(["--vision-weights", "a.pt", "--init", "b.pt"])


def bert_folder(folder: Path, **config) -> Path:
    torch.manual_seed(1)
    settings = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128)
    bert = BertForMaskedLM(BertConfig(vocab_size=len(VOCAB), **{**settings, **config}))
    bert.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(VOCAB) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))
    return folder


def test_a_text_tower_and_its_tokens_are_those_of_transformers(tmp_path):
    folder = bert_folder(tmp_path / "bert")
    model, tokenizer = build("--text-weights", str(folder), "--vision-tower", "test_resnet", "--image-size", "32")
    captions = ["axial CT of a", "cts of cts and nothing else"]
    theirs = BertTokenizer(str(folder / "vocab.txt"), do_lower_case=False)(captions, padding=True, return_tensors="pt")
    tokens = tokenizer(captions)
    assert tokens.tolist() == theirs["input_ids"].tolist() and tokens[0, 2] == VOCAB.index("CT")
    bert = BertForMaskedLM.from_pretrained(folder).eval().bert
    hidden = bert(**theirs, output_hidden_states=True).hidden_states
    mean, mask = (hidden[1] + hidden[2] + hidden[-1]) / 3, theirs["attention_mask"][..., None]
    expected = (mean * mask).sum(1) / mask.sum(1) @ model.text_projection
    torch.testing.assert_close(model.eval().encode_text(tokens), expected)


@pytest.mark.parametrize("sizes, model", [
    (dict(intermediate_size=48), "CLIP_VITT16"), (dict(num_hidden_layers=1), "MEDSLIP_RESNET"),
    (dict(max_position_embeddings=40, type_vocab_size=1, hidden_act="relu"), "CLIP_VITT16"), ({}, "SLIP"),
])  # fmt: skip
def test_a_bert_of_other_sizes_and_of_any_pair_is_the_module_of_transformers(sizes, model, tmp_path):
    """With the mean of its last layer; in a vocab.txt alone lie its tokens."""
    folder = bert_folder(tmp_path / "bert", **sizes)
    init = ["--init", str(twins.vision("dinov2", tmp_path / "dinov2"))] if model == "SLIP" else []
    ours, tokenizer = build("--text-weights", str(folder), *init, model=model)
    captions = ["axial CT of a", "cts of cts and nothing else " * 20]
    theirs = BertTokenizer(str(folder / "vocab.txt"), do_lower_case=False)
    length = min(77, sizes.get("max_position_embeddings", 77))
    read = theirs(captions, padding=True, truncation=True, max_length=length, return_tensors="pt")
    tokens = tokenizer(captions)
    assert tokens.tolist() == read["input_ids"].tolist() and tokens.shape[1] == length
    hidden = BertForMaskedLM.from_pretrained(folder).eval().bert(**read).last_hidden_state
    mask = read["attention_mask"][..., None]
    expected = (hidden * mask).sum(1) / mask.sum(1) @ ours.text_projection
    torch.testing.assert_close(ours.eval().encode_text(tokens), expected)


def test_a_bert_that_the_text_tower_cannot_hold_is_refused(tmp_path):
    folder = bert_folder(tmp_path / "short")
    (folder / "vocab.txt").write_text("\n".join(VOCAB[:-1]))
    with pytest.raises(ValueError, match=f"counts {len(VOCAB)} tokens, its vocabulary {len(VOCAB) - 1}"):
        build("--text-weights", str(folder))
    thin = bert_folder(tmp_path / "thin", intermediate_size=64)
    (thin / "vocab.txt").write_text("\n".join([*VOCAB, "more"]))
    with pytest.raises(ValueError, match=f"embeddings of {len(VOCAB)} tokens, its tokenizer has {len(VOCAB) + 1}"):
        build("--text-weights", str(thin))
    with pytest.raises(FileNotFoundError, match="config.json"):
        build("--text-weights", str(tmp_path))
    with pytest.raises(ValueError, match="models that read captions"):
        build("--text-weights", str(bert_folder(tmp_path / "whole")), model="SIMCLR_VITT16")


def test_a_run_starts_from_both_and_its_checkpoint_needs_neither(weights, tmp_path):
    """Trained, continued, validated and read again from the checkpoint alone, with the mean of the tower's weights."""
    root, folder = make_roco(tmp_path / "roco"), bert_folder(tmp_path / "bert")
    argv = command(root, tmp_path / "run", "--epochs", "1", "--vision-tower", TOWER, "--vision-weights", str(weights))
    cut = argv.index("--override")
    argv = [*argv[:cut], "--text-weights", str(folder), "--batch-size", "8"]
    argv += ["--dataset", "roco", "--root", str(root), "--output-dir", str(tmp_path / "run"), "--epochs", "1"]
    argv += ["--vision-tower", TOWER, "--vision-weights", str(weights), "--image-size", "32", "-j", "0", "--gpu", "-1"]
    main.main(argv)
    weights.rename(weights.with_suffix(".away"))
    try:
        loaded = models.load_pretrained(tmp_path / "run" / "checkpoint.pt")
    finally:
        weights.with_suffix(".away").rename(weights)
    assert loaded.preprocess.mean == (0.5, 0.5, 0.5) and loaded.preprocess.size == 32
    assert loaded.tokenizer is not None and loaded.tokenizer(["CT"])[0, 1] == VOCAB.index("CT")
    started = main.build_model(main.get_args_parser().parse_args(argv))[0]
    assert not torch.equal(
        loaded.model.bert.embeddings.word_embeddings.weight, started.bert.embeddings.word_embeddings.weight
    )
    heir = ["--model", "CLIP_VITT16", "--vision-tower", TOWER, "--init", str(tmp_path / "run" / "checkpoint.pt")]
    heir += ["--bert-vocab", str(folder / "vocab.txt"), "--image-size", "32", "--override", "text_tower=bert"]
    with pytest.raises(ValueError, match="vocabulary"):  # this flag lower-cases, the run did not
        main.build_model(main.get_args_parser().parse_args([*heir, "text_layers=2", "text_width=32", "text_heads=2"]))


def test_timm_without_weights_says_so(monkeypatch):
    def absent(*args, **kwargs):
        raise OSError("offline")

    model, _ = build("--vision-tower", TOWER, "--image-size", "64")
    monkeypatch.setattr(timm, "create_model", absent)
    with pytest.raises(ValueError, match=f"timm has no weights of {TOWER}.*offline.*give --vision-weights a file"):
        pretrained_towers.load_vision(model, "timm")


def test_held_batchnorm_keeps_its_statistics_while_its_weights_learn(weights, tmp_path):
    root = make_roco(tmp_path / "roco")
    argv = ["--model", "CLIP_VITT16", "--vision-tower", TOWER, "--vision-weights", str(weights), "--image-size", "32"]
    argv += ["--override", "text_layers=1", "text_width=32", "text_heads=2", "--lr", "1e-3", "--warmup-epochs", "0"]
    argv += ["--dataset", "roco", "--root", str(root), "--epochs", "1", "--batch-size", "8", "-j", "0", "--gpu", "-1"]
    start = torch.load(weights, weights_only=True)
    for flags, kept in (([], False), (["--hold-batchnorm"], True)):
        out = tmp_path / f"run{kept}"
        main.main([*argv, "--output-dir", str(out), *flags])
        end = models.load_pretrained(out / "checkpoint.pt").model.visual.state_dict()
        statistics = [name for name in end if name.endswith(("running_mean", "running_var"))]
        assert all(torch.equal(end[name], start[name]) for name in statistics) == kept
        assert not torch.equal(end["bn1.weight"], start["bn1.weight"])
    with pytest.raises(ValueError, match="vit_tiny_patch16_224 has no BatchNorm"):
        build("--hold-batchnorm")


def test_held_batchnorm_stays_held_over_several_processes():
    """SyncBatchNorm takes the layers' places; in training they must still be in eval mode."""
    model, _ = build("--vision-tower", "test_resnet", "--image-size", "32", "--hold-batchnorm")
    converted = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    converted.train()
    norms = [m for m in converted.visual.modules() if isinstance(m, torch.nn.SyncBatchNorm)]
    assert norms and not any(norm.training for norm in norms) and converted.training


def test_a_run_is_not_continued_with_another_mean(weights, tmp_path):
    root = make_roco(tmp_path / "roco")
    argv = ["--model", "CLIP_VITT16", "--vision-tower", TOWER, "--image-size", "32", "--dataset", "roco"]
    argv += ["--root", str(root), "--epochs", "1", "--batch-size", "8", "-j", "0", "--gpu", "-1"]
    argv += ["--override", "text_layers=1", "text_width=32", "text_heads=2"]
    main.main([*argv, "--vision-weights", str(weights), "--output-dir", str(tmp_path / "run")])
    moved = ["--resume", str(tmp_path / "run" / "checkpoint.pt"), "--output-dir", str(tmp_path / "other")]
    with pytest.raises(ValueError, match="preprocess: .*0.5.* there"):
        main.main([*argv, *moved])
    main.main([*argv, *moved, "--vision-weights", str(weights)])  # finished; nothing is left to do
