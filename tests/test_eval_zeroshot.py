"""eval_zeroshot.py: the catalog's sets, retrieval over a folder, the files it reads and what it refuses."""

import argparse
import json
import pathlib

import pytest
import torch
from downstream_tree import write_folders
from evaluation_helpers import write_checkpoint
from PIL import Image
from sklearn.metrics import roc_auc_score

import eval_zeroshot as ez
import models
from evaluation import catalog as evaluation_catalog
from evaluation import downstream, features
from evaluation.predictions import Predictions
from inputs.images import UnreadableImage
from inputs.transforms import Preprocess
from runtime import checkpoints


def command(folder, name="checkpoint_best.pt"):
    if not (folder / name).exists():
        write_checkpoint(folder / name)
    return ["--output-dir", str(folder), "-j", "0", "--batch-size", "64", "--gpu", "-1"]


def write_roco(root, n=6):
    folder = root / "test" / "radiology"
    (folder / "images").mkdir(parents=True)
    lines = []
    for i in range(n):
        Image.new("RGB", (40, 30), (i * 40, 255 - i * 40, 128)).save(folder / "images" / f"ROCO_{i:05d}.jpg")
        lines.append(f"ROCO_{i:05d}\t a caption of image {i}\n")
    (folder / "captions.txt").write_text("".join(lines))


def text_files(folder):
    return sorted((folder / "features").glob("text_*.npz"))


def test_text_features_are_encoded_once_for_a_model_and_its_prompts(tmp_path, monkeypatch):
    """The second run reads them; other weights, settings, prompts or tokens never find them."""
    encoded = []
    encode = models.CLIP.encode_text
    monkeypatch.setattr(models.CLIP, "encode_text", lambda *args: encoded.append(1) or encode(*args))
    args = [*command(tmp_path), "--datasets", "digits"]
    first = ez.main(args)
    assert encoded and len(text_files(tmp_path)) == 1
    encoded.clear()
    assert ez.main(args) == first and not encoded

    def encodes(change):
        state = checkpoints.load_checkpoint(tmp_path / "checkpoint_best.pt")
        change(state)
        checkpoints.save_checkpoint(state, tmp_path / "other.pt")
        encoded.clear()
        ez.main([*args, "--resume", str(tmp_path / "other.pt")])
        return bool(encoded)

    assert not encodes(lambda state: state["state_dict"]["visual.pos_embed"].zero_())  # the images' side
    assert encodes(lambda state: state["state_dict"]["positional_embedding"].mul_(2))
    assert encodes(lambda state: state["model"]["config"].update(text_heads=1))
    assert encodes(lambda state: state["tokenizer"].update(context_length=20))
    templates = ["scan of a {}"]
    prompts = {"labels.json": evaluation_catalog.read_prompts("labels.json"), "templates.json": {"digits": templates}}
    monkeypatch.setattr(evaluation_catalog, "read_prompts", prompts.__getitem__)
    encoded.clear()
    ez.main(args)
    assert encoded


def test_a_wrong_order_is_reported_before_any_score(tmp_path, capsys):
    write_folders(tmp_path / "pets" / "test", [f"{i:02d}" for i in range(36)])  # one class is missing
    catalog = tmp_path / "catalog.json"
    entries = {name: evaluation_catalog.read_catalog()[name] for name in ("digits", "pets")}
    entries["pets"]["path"] = str(tmp_path / "pets")
    catalog.write_text(json.dumps(entries))
    with pytest.raises(ValueError, match="pets: 36 classes found, 37 class names"):
        ez.main([*command(tmp_path), "--catalog", str(catalog)])
    assert "digits" not in capsys.readouterr().out
    assert not (tmp_path / "zeroshot.json").exists()


def test_the_command_walks_the_catalog_and_skips_what_is_not_there(tmp_path, capsys, caplog):
    caplog.set_level("INFO", "medslip")
    catalog = evaluation_catalog.read_catalog()
    write_roco(tmp_path / "roco")
    catalog["roco"]["path"] = str(tmp_path / "roco")
    (tmp_path / "catalog.json").write_text(json.dumps(catalog))
    report = ez.main([*command(tmp_path), "--catalog", str(tmp_path / "catalog.json")])
    printed = capsys.readouterr().out
    assert list(report["zero_shot"]) == ["digits"] and report["zero_shot"]["digits"]["samples"] == 360
    assert report["retrieval"]["roco"]["candidates"] == 6
    assert list(report["skipped"]) == [n for n in catalog if n not in ("digits", "roco")]
    assert "skipped food101: /path/to/food101 does not exist" in caplog.text
    assert caplog.messages[-2].startswith("skipped, path not there: food101, cifar10")
    assert "360 images, 10 classes" in printed and "6 candidates (test)" in printed
    assert json.loads((tmp_path / "zeroshot.json").read_text()) == report


def test_the_command_evaluates_the_sets_that_are_named(tmp_path):
    report = ez.main([*command(tmp_path), "--resume", str(tmp_path / "checkpoint_best.pt"), "--datasets", "digits"])
    assert list(report["zero_shot"]) == ["digits"] and not report["skipped"]
    loaded = models.load_pretrained(tmp_path / "checkpoint_best.pt")
    digits = downstream.load_zeroshot_set("digits", loaded.preprocess)
    expected = features.classify_zeroshot(loaded.model, loaded.tokenizer, digits, features.Loading())
    scores = dict(report["zero_shot"]["digits"])
    rows = scores.pop("rows")  # with intervals, and a file of predictions
    assert scores == {**expected, "broken": 0}
    found = Predictions.read(tmp_path / "zeroshot_digits.csv", digits.dataset.scheme)
    assert (found.prob.argmax(1) == found.labels).mean() == pytest.approx(expected["top1"])
    auroc = roc_auc_score(found.labels, found.prob, multi_class="ovr")
    assert rows["metrics"]["auroc"]["value"] == pytest.approx(auroc)
    assert report["unit"] == "fraction" and report["zero_shot"]["digits"]["top1"] == expected["top1"] > 0.01


def test_retrieval_over_a_root(tmp_path):
    write_roco(tmp_path / "data", 7)
    args = [*command(tmp_path), "--retrieval", "--dataset", "roco", "--root", str(tmp_path / "data")]
    report = ez.main(args)
    scores = report["retrieval"]["roco"]
    assert scores["candidates"] == 7 and scores["i2t_r10"] == scores["t2i_r10"] == 1  # fewer than 10 candidates
    assert 1 <= scores["i2t_median_rank"] <= 7
    broken = tmp_path / "data" / "test" / "radiology" / "images" / "ROCO_00003.jpg"
    broken.write_bytes(b"torn")
    with pytest.raises(UnreadableImage, match="ROCO_00003"):
        ez.main(args)
    scores = ez.main([*args, "--skip-broken"])["retrieval"]["roco"]
    assert (scores["candidates"], scores["broken"]) == (6, 1)


def test_the_published_slip_layout_loads(tmp_path):
    """Keys with DistributedDataParallel's prefix beside a pickled Namespace that holds a PosixPath."""
    torch.manual_seed(0)
    model = models.create_model("CLIP_VITS16")
    arguments = argparse.Namespace(model="CLIP_VITS16", output_dir=pathlib.PosixPath("/x"))
    weights = {f"module.{k}": v for k, v in model.state_dict().items()}
    state = {"epoch": 1, "state_dict": weights, "best_acc1": 0.0, "args": arguments}
    torch.save(state, tmp_path / "clip_small.pt")
    args = ez.get_args_parser().parse_args(["--resume", str(tmp_path / "clip_small.pt")])
    loaded = ez.load_model(args)
    assert loaded.preprocess == Preprocess() and not loaded.model.training
    prompts = loaded.tokenizer(["a photo of a cat."])
    with torch.no_grad():
        torch.testing.assert_close(loaded.model.encode_text(prompts), model.eval().encode_text(prompts))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--datasets", "digits", "petz"], "unknown dataset petz; choose from food101"),
        (["--datasets", "pets"], "nothing to evaluate: not there are pets"),
        (["--retrieval", "--datasets", "digits"], "none of digits has captions"),
        (["--root", "data"], "add --retrieval"),
        (["--resume", "absent.pt"], "absent.pt does not exist"),
        (["--resume", "open-clip:ViT-Q-1"], "unknown open_clip model 'ViT-Q-1'; choose from"),
        (["--resume", "open-clip:ViT-B-32/none"], "'none' is no file and no weights of ViT-B-32: openai"),
    ],
)
def test_bad_arguments_name_the_choices(tmp_path, arguments, message):
    if "open-clip" in arguments[-1]:
        pytest.importorskip("open_clip")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        ez.main([*command(tmp_path), *arguments])
    assert not (tmp_path / "zeroshot.json").exists()


def test_a_model_without_a_text_side_is_refused(tmp_path):
    write_checkpoint(tmp_path / "simclr.pt", "SIMCLR_VITT16")
    with pytest.raises(ValueError, match="without a text side; main_linear.py evaluates it"):
        ez.main([*command(tmp_path), "--resume", str(tmp_path / "simclr.pt")])


@pytest.mark.slow
def test_an_open_clip_model_from_a_file(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-S-32-alt")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    report = ez.main(
        [*command(tmp_path), "--datasets", "digits", "--resume", f"open-clip:ViT-S-32-alt/{tmp_path}/weights.pt"]
    )
    digits = downstream.load_zeroshot_set("digits", open_clip.image_transform(224, is_train=False))
    read = open_clip.get_tokenizer("ViT-S-32-alt")
    expected = features.classify_zeroshot(model, read, digits, features.Loading(64))
    assert report["zero_shot"]["digits"]["top1"] == expected["top1"]


def test_a_set_of_ones_own_is_an_entry_of_a_catalog(tmp_path):
    """No code: folders of images and one JSON entry, evaluated zero-shot with the entry's names, prompts and metric."""
    write_folders(tmp_path / "scans" / "test", ["benign", "malignant"])
    entry = {
        "path": str(tmp_path / "scans"), "type": "imagefolder", "train": "train", "test": "test",
        "labels": ["a benign finding", ["cancer", "a malignant finding"]],
        "templates": ["mammogram showing {}.", "{}"], "metric": "roc_auc",
    }  # fmt: skip
    (tmp_path / "mine.json").write_text(json.dumps({"scans": entry}))
    (scores,) = ez.main([*command(tmp_path), "--catalog", str(tmp_path / "mine.json")])["zero_shot"].values()
    assert (scores["metric"], scores["samples"], scores["classes"]) == ("roc_auc", 2, 2)
    model = models.load_pretrained(tmp_path / "checkpoint_best.pt")
    prompts = ["mammogram showing cancer.", "mammogram showing a malignant finding.", "cancer", "a malignant finding"]
    benign = ["mammogram showing a benign finding.", "a benign finding"]
    scans = downstream.load_zeroshot_set("scans", model.preprocess, tmp_path / "mine.json").dataset
    with torch.no_grad():
        texts = [
            torch.nn.functional.normalize(model.model.encode_text(model.tokenizer(of_class)), dim=-1).mean(0)
            for of_class in (benign, prompts)
        ]
        images = model.model.encode_image(torch.stack([scans[0][0], scans[1][0]]))
    weights = torch.nn.functional.normalize(torch.stack(texts), dim=-1)
    margins = (torch.nn.functional.normalize(images, dim=-1) @ weights.T).diff(dim=1)[:, 0]
    assert scores["roc_auc"] == (1.0 if margins[1] > margins[0] else 0.0)


def test_a_missing_image_is_an_error_or_skipped(tmp_path):
    write_folders(tmp_path / "scans" / "test", ["a", "b", "c"])
    entry = {"path": str(tmp_path / "scans"), "type": "imagefolder", "train": "train", "test": "test"}
    (tmp_path / "mine.json").write_text(json.dumps({"scans": entry}))
    load = downstream.load_zeroshot_set

    def removed_meanwhile(*args):
        labelled = load(*args)
        (tmp_path / "scans" / "test" / "b" / "0001.png").unlink(missing_ok=True)
        return labelled

    args = [*command(tmp_path), "--catalog", str(tmp_path / "mine.json")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(downstream, "load_zeroshot_set", removed_meanwhile)
        with pytest.raises(FileNotFoundError, match=r"b/0001\.png.*--skip-broken"):
            ez.main(args)
        write_folders(tmp_path / "other" / "test", ["a", "b", "c"])
        (tmp_path / "other" / "test" / "b" / "0001.png").rename(tmp_path / "scans" / "test" / "b" / "0001.png")
        scores = ez.main([*args, "--skip-broken"])["zero_shot"]["scans"]
    assert (scores["samples"], scores["broken"]) == (2, 1)
