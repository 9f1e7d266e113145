"""predict.py and the methods of a loaded model: the run's own predictions, formulas, and what is refused."""

import csv
import importlib.util
import os
import re
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import cbis_tree
import evaluation_helpers
import numpy as np
import pydicom
import pytest
import torch
from helpers import ROOT, slow
from model_helpers import write_checkpoint
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

import distributed
import main_linear
import models
import predict
import utils
from beit_finetuning import run_class_finetuning
from beit_finetuning.modeling_finetune import create_beit
from evaluation import run_folder
from evaluation.features import Backbone
from evaluation.heads import load_heads
from evaluation.saliency import Explainer, identity_head
from inputs.cbis import CBIS_CLASSES
from inputs.images import decode_shown, read_image
from inputs.transforms import Preprocess, eval_view
from preparation.cbis_tables import make_cbis


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    root = tmp_path_factory.mktemp("predict")
    cbis_tree.make_small_cbis(root / "cbis")
    make_cbis(root / "cbis")
    checkpoint = write_checkpoint(root / "checkpoint.pt", "vit")
    main_linear.main([
        "--dataset", "cbis_mass", "--root", str(root / "cbis"), "--pretrained", str(checkpoint), "-j", "0",
        "--resamples", "20", "--output-dir", str(root / "run"),
    ])  # fmt: skip
    return root


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "checkpoint.pt"
    evaluation_helpers.write_checkpoint(path)
    return path


def read_rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_classify_gives_the_runs_own_predictions(probed, tmp_path):
    rows = [row for row in read_rows(probed / "cbis" / "mass.csv") if row["split"] == "test"]
    (probed / "cbis" / "list.csv").write_text("image\n" + "".join(f"{row['crop']}\n" for row in rows))
    found = predict.main(["classify", str(probed / "run"), str(probed / "cbis" / "list.csv"), "--output",
                          str(tmp_path / "answers.csv"), "--batch-size", "128"])  # fmt: skip
    expected = read_rows(probed / "run" / "predictions.csv")
    for row, own in zip(found, expected, strict=True):
        assert [row[f"prob_{name}"] for name in CBIS_CLASSES] == [float(own[f"prob_{name}"]) for name in CBIS_CLASSES]
        assert row["predicted"] == own["predicted"] and row["called_malignant"] in (0, 1)
        assert 0 <= row["calibrated_malignant"] <= 1
    assert [row["image"] for row in read_rows(tmp_path / "answers.csv")] == [row["image"] for row in found]


def test_no_answer_is_a_formula_to_a_spreadsheet(tmp_path):
    rows = [{"image": "=1+1.png", "predicted": "@x", "prob_@x": -0.5, "rank": 1}, {"image": "a.png", "predicted": "+y"}]
    predict.write_rows(rows, str(tmp_path / "answers.csv"))
    found = read_rows(tmp_path / "answers.csv")
    assert found[0] == {"image": "'=1+1.png", "predicted": "'@x", "prob_@x": "-0.5", "rank": "1"}
    assert found[1] == {"image": "a.png", "predicted": "'+y", "prob_@x": "", "rank": ""}
    assert predict.find_files([tmp_path / "answers.csv"]) == [tmp_path / "=1+1.png", tmp_path / "a.png"]


def test_a_probe_is_its_head_and_its_weights(probed, tmp_path):
    """No flag of the run that made it is asked for: the next flag breaks no earlier run."""
    shutil.copy(probed / "run" / "head.safetensors", tmp_path)
    images = [str(next((probed / "cbis").rglob("*.jpg")))]
    alone = predict.main(["classify", str(tmp_path), *images])
    assert alone == predict.main(["classify", str(probed / "run"), *images])


def write_dicom(path, grey):
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, "1.2.840.10008.5.1.4.1.1.1"
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    film = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    film.Rows, film.Columns, film.SamplesPerPixel, film.BitsAllocated, film.BitsStored = *grey.shape, 1, 8, 8
    film.HighBit, film.PixelRepresentation, film.PhotometricInterpretation = 7, 0, "MONOCHROME2"
    film.PixelData = grey.tobytes()
    pydicom.dcmwrite(path, film, enforce_file_format=True)


def test_a_corrupt_image_is_named_and_skipped_and_dicom_is_read(probed, tmp_path, capsys):
    grey = (np.random.default_rng(0).random((40, 40)) * 255).astype(np.uint8)
    (tmp_path / "films").mkdir()
    Image.fromarray(grey).save(tmp_path / "films" / "a.png")
    (tmp_path / "films" / "broken.png").write_bytes(b"no image")
    write_dicom(tmp_path / "films" / "b.dcm", grey)
    found = predict.main(["classify", str(probed / "run"), str(tmp_path / "films")])
    assert [row["image"].rsplit("/", 1)[1] for row in found] == ["a.png", "b.dcm"]
    assert found[0]["prob_MALIGNANT"] == pytest.approx(found[1]["prob_MALIGNANT"], abs=1e-6)
    printed = capsys.readouterr()
    assert "broken.png" in printed.out + printed.err and "1 of 3 images skipped" in printed.out + printed.err


def test_images_unlike_the_training_are_flagged(probed, tmp_path):
    (head,), _ = load_heads(probed / "run" / "head.safetensors")
    features = [np.load(file)["features"] for file in (probed / "run" / "features").glob("*_train_*.npz")]
    features += [np.load(file)["features"] for file in (probed / "run" / "features").glob("*_val_*.npz")]
    known = np.concatenate(features)
    assert (head.distance(known) > 1).mean() <= 0.01 and head.distance(known).max() >= 1
    assert (head.distance(known + 50 * known.std(0)) > 1).all()
    assert (head.distance(known[:5] * 0 + known.mean(0)) < 1).all()
    flag = np.zeros((64, 64, 3), np.uint8)
    flag[:, :32, 0] = flag[:, 32:, 2] = 255  # red and blue, where all that was trained on is grey noise
    Image.fromarray(flag).save(tmp_path / "flag.png")
    (row,) = predict.main(["classify", str(probed / "run"), str(tmp_path / "flag.png")])
    assert row["unlike_training"] == 1


@pytest.mark.parametrize("flags", [("--image-kind", "crop"), *slow(("--precision", "bf16"))])
def test_maps_lie_in_the_image_and_change_nothing(probed, tmp_path, flags):
    """A map for each answer, of the malignant score; in bf16 where the machine has it."""
    captum = pytest.importorskip("captum")
    assert captum
    if "bf16" in flags and not distributed.cpu_has_bf16():
        pytest.skip("no bf16 units")
    run = tmp_path / "run"
    main_linear.main([
        "--dataset", "cbis_mass", "--root", str(probed / "cbis"), "--pretrained", str(probed / "checkpoint.pt"), "-j",
        "0", "--resamples", "20", "--output-dir", str(run), "--gpu", "-1", *flags,
    ])  # fmt: skip
    rows = [row for row in read_rows(probed / "cbis" / "mass.csv") if row["split"] == "test"]
    (probed / "cbis" / "list.csv").write_text("image\n" + "".join(f"{row['crop']}\n" for row in rows))
    given = ["classify", str(run), str(probed / "cbis" / "list.csv"), "--gpu", "-1", "--batch-size", "128"]
    found = predict.main([*given, "--explain", str(tmp_path / "maps"), "--output", str(tmp_path / "answers.csv")])
    expected = read_rows(run / "predictions.csv")
    for row, own in zip(found, expected, strict=True):
        assert row["prob_MALIGNANT"] == float(own["prob_MALIGNANT"])  # the run's precision, too
        crop = read_image(row["image"])
        side = [round(512 / max(crop.size) * length) for length in crop.size]  # of its own proportions, beside its map
        drawn = Image.open(row["map"]).crop((8, 64, 8 + side[0], 64 + side[1]))
        assert np.array_equal(drawn, crop.resize(side, Image.Resampling.BICUBIC))
    assert len({row["map"] for row in read_rows(tmp_path / "answers.csv")}) == len(rows)


@pytest.mark.parametrize(
    "name, tower, settings, size",
    [
        ("MEDCLIP_VIT", "medclip-swin", dict(embed_dim=12, depths=[1, 1], num_heads=[2, 2]), (96, 64)),
        ("CLIP_VITT16", "vit_tiny_patch16_224", dict(depth=1), (96, 32)),
        ("CLIP_VITT16", "test_resnet", {}, (96, 64)),
    ],
)
def test_maps_find_what_the_score_depends_on(name, tower, settings, size):
    """A head that reads one tower's response to a bright corner: the other half of the image hardly matters."""
    pytest.importorskip("captum")
    torch.manual_seed(0)
    model = models.create_model(name, vision_tower=tower, vision_kwargs=settings, image_size=size, text_layers=2)
    backbone = Backbone(model.visual, model.eval(), model.preprocess, "backbone", name)
    flat = torch.zeros(1, 3, *size)
    image = flat.clone()
    image[:, :, : size[0] // 3] = 2.0
    with torch.no_grad():
        direction = (model.visual(image) - model.visual(flat))[0].numpy()
    head = identity_head(2)
    weight = np.stack([np.zeros_like(direction), direction], axis=1)
    width = len(direction)
    head = replace(head, mean=np.zeros(width), scale=np.ones(width), weight=weight, bias=np.zeros(2))
    heat = Explainer(backbone, head, 1)(image.clone())
    assert heat.shape == (1, *size)
    assert heat[0].sum() == pytest.approx(1, abs=1e-4) and (heat >= 0).all()
    if tower != "medclip-swin":  # one block of windows of 7 x 7 mixes all of this small image
        assert heat[0, : size[0] // 2].sum() > 0.6


@pytest.mark.parametrize("mean_pooling", [True, False])
def test_a_fine_tuned_beit_has_maps(mean_pooling):
    pytest.importorskip("captum")
    torch.manual_seed(0)
    settings = dict(patch_size=8, embed_dim=32, depth=2, num_heads=2, use_mean_pooling=mean_pooling)
    model = create_beit("beit_small_patch16_224", img_size=(48, 32), num_classes=3, init_scale=1.0, **settings).eval()
    backbone = Backbone(model, model, Preprocess(size=(48, 32)), "logits", "beit")
    heat = Explainer(backbone, identity_head(3), 2)(torch.rand(2, 3, 48, 32))
    assert heat.shape == (2, 48, 32) and np.allclose(heat.sum((1, 2)), 1, atol=1e-4)


def test_other_weights_than_the_probes_are_refused(probed, tmp_path):
    other = write_checkpoint(tmp_path / "other.pt", "vit", seed=1)
    with pytest.raises(ValueError, match="are not the weights"):
        predict.main(["classify", str(probed / "run"), str(probed / "cbis"), "--weights", str(other)])


def pictures(folder, n=6):
    rng = np.random.default_rng(1)
    folder.mkdir(exist_ok=True)
    for i in range(n):
        Image.fromarray((rng.random((40, 30, 3)) * 255).astype(np.uint8)).save(folder / f"{i}.png")
    return folder


def test_zero_shot_equals_the_formula(clip, tmp_path):
    folder = pictures(tmp_path / "images")
    labels = ["a cat", "a chest radiograph", "a mammogram"]
    found = predict.main(["zero-shot", str(clip), str(folder), "--labels", *labels, "--templates", "a photo of {}."])
    loaded = models.load_pretrained(clip)
    view = eval_view(loaded.preprocess)
    with torch.no_grad():
        images = torch.stack([view(read_image(folder / f"{i}.png"), None) for i in range(6)])
        image = torch.nn.functional.normalize(loaded.model.encode_image(images), dim=-1)
        prompts = loaded.tokenizer([f"a photo of {label}." for label in labels])
        text = torch.nn.functional.normalize(loaded.model.encode_text(prompts), dim=-1)
        prob = (loaded.model.logit_scale.exp() * image @ text.T).softmax(1).numpy()
    assert np.allclose([[row[f"prob_{label}"] for label in labels] for row in found], prob, atol=1e-5)
    several = predict.main(["zero-shot", str(clip), str(folder), "--set", "cbis_mass"])
    assert set(several[0]) == {"image", "predicted", "prob_benign mass", "prob_benign mass without callback",
                               "prob_malignant mass"}  # fmt: skip


def test_classes_of_one_name_have_a_column_each(clip, tmp_path):
    words = ["zero-shot", str(clip), str(pictures(tmp_path / "images", 2)), "--set", "imagenet"]
    for row in predict.main(words):
        prob = {name: value for name, value in row.items() if name.startswith("prob_")}
        assert len(prob) == 1000 and sum(prob.values()) == pytest.approx(1, abs=1e-5)
        assert "prob_sunglasses" in prob and "prob_sunglasses (2)" in prob
    with pytest.raises(ValueError, match="--labels holds 'a' more than once"):
        predict.main([*words[:3], "--labels", "a", "b", "a"])


def test_an_embedded_set_is_searched_by_image_and_by_text(clip, tmp_path):
    folder = pictures(tmp_path / "images")
    bank = tmp_path / "images.npz"
    predict.main(["embed", str(clip), str(folder), "--output", str(bank)])
    found = predict.main(["search", str(bank), str(folder / "3.png"), "-k", "2"])
    assert found[0]["found"].endswith("3.png") and found[0]["cosine"] == pytest.approx(1, abs=1e-5)
    assert [row["rank"] for row in found] == [1, 2]
    (tmp_path / "captions.txt").write_text("a cat\n\na dog on a lawn\n")
    texts = tmp_path / "captions.npz"
    predict.main(["embed", str(clip), "--captions", str(tmp_path / "captions.txt"), "--output", str(texts)])
    found = predict.main(["search", str(texts), "--text", "a dog on a lawn", "-k", "1"])
    assert found[0]["found"] == "a dog on a lawn" and found[0]["cosine"] == pytest.approx(1, abs=1e-5)
    loaded = models.load_pretrained(clip)
    assert np.allclose(np.load(texts)["vectors"], loaded.embed_captions(["a cat", "a dog on a lawn"]), atol=1e-6)
    other = tmp_path / "other.pt"
    state = torch.load(clip, weights_only=True)
    state["state_dict"]["image_projection"] += 1
    torch.save(state, other)
    with pytest.raises(ValueError, match="are not the weights"):
        predict.main(["search", str(bank), str(folder / "3.png"), "--weights", str(other)])


@pytest.mark.parametrize("change", ["cut off", "overwritten", "replaced"])
def test_a_bank_that_changes_while_it_is_searched_is_named(clip, tmp_path, monkeypatch, change):
    """It is mapped into memory: one that is cut off would end the process, without a word."""
    bank, load = tmp_path / "bank.npz", models.load_pretrained
    rng = np.random.default_rng(0)
    loaded = load(clip)
    width = loaded.embed_captions(["a dog"]).shape[1]
    vectors = rng.normal(size=(2000, width)).astype(np.float32)
    about = {"weights": str(clip), "weights_sha256": utils.weights_sha256(loaded.model.state_dict())}
    np.savez(bank, ids=np.arange(2000).astype(str), vectors=vectors, **about)  # type: ignore[arg-type]
    found = predict.main(["search", str(bank), "--text", "a dog", "-k", "5"])
    order = np.argsort(-(loaded.embed_captions(["a dog"]) @ vectors.T)[0], kind="stable")[:5]
    assert [row["found"] for row in found] == order.astype(str).tolist()

    def loads(*args, **more):
        if change == "cut off":
            os.truncate(bank, 1000)
        elif change == "replaced":
            np.savez(tmp_path / "new.npz", ids=np.arange(1))
            os.replace(tmp_path / "new.npz", bank)
        else:
            with open(bank, "r+b") as file:
                file.seek(30_000)
                file.write(b"0" * 1000)
            os.utime(bank, ns=(1, 1))  # a clock may be too coarse for the next write
        return load(*args, **more)

    monkeypatch.setattr(models, "load_pretrained", loads)
    with pytest.raises(ValueError, match="bank.npz was changed while it was read"):
        predict.main(["search", str(bank), "--text", "a dog"])


@pytest.mark.parametrize("command", ["zero-shot", "search"])
def test_images_are_held_one_batch_at_a_time(clip, tmp_path, monkeypatch, command):
    bank = tmp_path / "bank.npz"
    predict.main(["embed", str(clip), str(pictures(tmp_path / "images", 12)), "--output", str(bank)])
    alive, most = set(), []

    def counted(*args):
        image, greys = decode_shown(*args)
        alive.add(id(image))
        weakref.finalize(image, alive.discard, id(image))
        most.append(len(alive))
        return image, greys

    monkeypatch.setattr(predict, "decode_shown", counted)
    for n in (4, 12):
        most.clear()
        images = [str(tmp_path / "images" / f"{i}.png") for i in range(n)]
        if command == "zero-shot":
            found = predict.main(["zero-shot", str(clip), *images, "--labels", "a", "b", "--batch-size", "3"])
        else:
            found = predict.main(["search", str(bank), *images, "-k", "1", "--batch-size", "3"])
        assert len(found) == len(most) == n and max(most) <= 2


def test_paths_images_and_arrays_of_any_depth_embed_alike(clip, tmp_path):
    loaded = models.load_pretrained(clip)
    path = pictures(tmp_path / "images", 1) / "0.png"
    image = Image.open(path)
    array = np.asarray(image)
    vectors = loaded.embed_images([path, str(path), image, array, array.astype(np.uint16) * 257])
    assert np.allclose(vectors, vectors[:1], atol=1e-6) and np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert np.allclose(loaded.embed_images([path] * 5, batch_size=2), vectors[:1], atol=1e-6)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["embed", "{clip}", "{images}", "--output", "x.csv"], "ending .npz"),
        (["embed", "{clip}", "--output", "x.npz"], "one of the two"),
        (["embed", "{clip}", "--captions", "{empty}/none.txt", "--output", "x.npz"], "none.txt holds no caption"),
        (["embed", "{clip}", "--captions", "{empty}/latin.txt", "--output", "x.npz"], "latin.txt is not UTF-8"),
        (["zero-shot", "{clip}", "{images}", "--labels", "one"], "at least two"),
        (["zero-shot", "{clip}", "{images}", "--labels", "a", "b", "--templates", "x"], "has no {}"),
        (["zero-shot", "{clip}", "{images}", "--set", "nothing"], "not in labels.json; choose from"),
        (["zero-shot", "{clip}", "{empty}", "--labels", "a", "b"], "holds no image"),
        (["search", "{clip}.npz"], "images or --text"),
        (["classify", "{empty}", "{images}"], "head.safetensors"),
    ],
)
def test_what_cannot_be_done_is_said(clip, tmp_path, argv, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "none.txt").write_text(" \n\n")
    (tmp_path / "empty" / "latin.txt").write_bytes("Röntgen".encode("latin-1"))
    places = {"clip": clip, "images": pictures(tmp_path / "images", 1), "empty": tmp_path / "empty"}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        predict.main([part.format(**places) if part != "{}" else part for part in argv])


def test_the_readmes_lines_of_python_run_as_they_stand(clip, tmp_path, monkeypatch, capsys):
    text = (ROOT / "README.md").read_text()
    (lines,) = re.findall(r"```python\n(import models\n.*?)```", text, re.DOTALL)
    assert len([line for line in lines.splitlines() if line.strip()]) == 6
    folder = pictures(tmp_path, 2)
    (folder / "0.png").rename(tmp_path / "a.png")
    (folder / "1.png").rename(tmp_path / "b.dcm.png")
    write_dicom(tmp_path / "b.dcm", np.zeros((20, 20), np.uint8))
    monkeypatch.chdir(tmp_path)
    exec(compile(lines.replace("runs/vit_mammo/checkpoint_best.pt", str(clip)), "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert printed.count("[") >= 3


def test_a_fine_tuned_run_gives_its_own_predictions(probed, tmp_path):
    """From its checkpoint alone: the weights that it started from are gone."""
    run, start = tmp_path / "tuned", Path(shutil.copy(probed / "checkpoint.pt", tmp_path / "start.pt"))
    run_class_finetuning.main([
        "--data_set", "cbis_mass", "--data_path", str(probed / "cbis"), "--finetune", str(start),
        "--batch_size", "16", "--epochs", "1", "--warmup_epochs", "0", "--drop_path", "0", "-j", "0", "--gpu", "-1",
        "--resamples", "20", "--output_dir", str(run),
    ])  # fmt: skip
    start.unlink()
    rows = [row for row in read_rows(probed / "cbis" / "mass.csv") if row["split"] == "test"]
    (probed / "cbis" / "list.csv").write_text("image\n" + "".join(f"{row['crop']}\n" for row in rows))
    maps = ["--explain", str(tmp_path / "maps")] if importlib.util.find_spec("captum") else []
    found = predict.main(["classify", str(run), str(probed / "cbis" / "list.csv"), "--batch-size", "16", *maps])
    for row, own in zip(found, read_rows(run / "predictions.csv"), strict=True):
        assert [row[f"prob_{name}"] for name in CBIS_CLASSES] == [float(own[f"prob_{name}"]) for name in CBIS_CLASSES]
        assert row["predicted"] == own["predicted"] and row["called_malignant"] in (0, 1)
        assert not maps or max(Image.open(row["map"]).size) > 1024  # two of 512 pixels and the scale
    with pytest.raises(FileNotFoundError):
        predict.main(["classify", str(tmp_path), str(probed / "cbis" / "list.csv")])


def test_the_folder_of_the_output_is_made_before_the_images_are_read(clip, tmp_path, monkeypatch):
    folder, output = pictures(tmp_path / "images", 2), tmp_path / "answers" / "today"
    predict.main(["zero-shot", str(clip), str(folder), "--labels", "a", "b", "--output", str(output / "a.csv")])
    predict.main(["embed", str(clip), str(folder), "--output", str(output / "a.npz")])
    assert sorted(path.name for path in output.iterdir()) == ["a.csv", "a.npz"]
    with pytest.raises(ValueError, match="today is a folder: name a file in it"):
        predict.main(["embed", str(clip), str(folder), "--output", str(output)])


def test_each_frame_is_an_answer_of_its_own(clip, tmp_path, caplog):
    frames = [Image.fromarray(np.full((40, 40), value, np.uint8)) for value in (20, 120, 220)]
    frames[0].save(tmp_path / "tomo.tif", save_all=True, append_images=frames[1:])
    frames[1].save(tmp_path / "one.png")
    words = ["zero-shot", str(clip), str(tmp_path / "tomo.tif"), str(tmp_path / "one.png"), "--labels", "a", "b"]
    rows = predict.main([*words, "--frame", "all"])
    assert [row["image"] for row in rows] == [*(f"{tmp_path}/tomo.tif#{n}" for n in (1, 2, 3)), f"{tmp_path}/one.png"]
    first, middle = predict.main(words), predict.main([*words, "--frame", "middle"])
    of = [row["prob_a"] for row in rows]
    assert first[0]["prob_a"] == pytest.approx(of[0]) and middle[0]["prob_a"] == pytest.approx(of[1])
    assert middle[1]["prob_a"] == pytest.approx(of[3]) and of[1] == pytest.approx(of[3]) and of[0] != of[1]
    with pytest.raises(ValueError, match="none of number 4|missing or corrupt"):
        predict.main([*words[:3], *words[4:], "--frame", "4"])
    only = [*predict.main([*words, "--frame", "2"])]  # a file of one frame has no second: named, skipped, counted
    assert [row["image"] for row in only] == [f"{tmp_path}/tomo.tif#2"] and "1 of 2 images skipped" in caplog.text


def test_images_shown_otherwise_than_those_of_training_are_said(probed, tmp_path, caplog):
    """The crops are 8-bit JPEGs; as more than 8 bits they are stretched, and through a window they are as they were."""
    assert load_heads(probed / "run" / "head.safetensors")[1]["greys"] == {"8 bits as stored": 16}
    crop = Image.open(next((probed / "cbis").rglob("*.jpg"))).convert("L")
    crop.save(tmp_path / "eight.png")
    deep = np.asarray(crop).astype(np.uint16) * 16 + 3  # as 12 bits
    Image.fromarray(deep).save(tmp_path / "twelve.png")
    run, images = str(probed / "run"), [str(tmp_path / "eight.png"), str(tmp_path / "twelve.png")]
    predict.main(["classify", run, images[0]])
    assert "shown otherwise" not in caplog.text
    predict.main(["classify", run, *images])
    said = (
        f"1 of 2 images are shown otherwise than the training images were (8 bits as stored), the first, {images[1]},"
    )
    assert f"{said} by more than 8 bits between percentiles" in caplog.text
    assert "smaller copies by make_dataset.py shrink had these greys" in caplog.text
    # A window over the whole of the 12 bits: the lowest value shown is 3, the highest 4083.
    eight, twelve = predict.main(["classify", run, *images, "--window", "2043.5", "4081"])
    for name in CBIS_CLASSES:
        assert twelve[f"prob_{name}"] == pytest.approx(eight[f"prob_{name}"], abs=1e-6)


def test_vectors_that_a_disk_cannot_hold_are_refused_before_the_images_are_read(clip, tmp_path, monkeypatch):
    folder = pictures(tmp_path / "images", 3)
    monkeypatch.setattr(predict, "decode_shown", None)  # a call would fail otherwise
    monkeypatch.setattr(utils.shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(100, 99, 1))
    with pytest.raises(OSError, match="GB free; the vectors take"):
        predict.main(["embed", str(clip), str(folder), "--output", str(tmp_path / "bank.npz")])


def test_a_run_that_was_moved_with_its_weights_is_found_and_without_them_asks_for_weights(probed, tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    (old / "probe").mkdir(parents=True)
    shutil.copy(probed / "checkpoint.pt", old / "checkpoint.pt")
    shutil.copy(probed / "run" / "head.safetensors", old / "probe")
    image = str(next((probed / "cbis").rglob("*.jpg")))
    expected = predict.main(["classify", str(probed / "run"), image])
    assert run_folder.places_of(str(old / "checkpoint.pt"), old / "probe") == [str(old / "checkpoint.pt")]
    old.rename(new)
    assert run_folder.places_of(str(old / "checkpoint.pt"), new / "probe") == [str(new / "checkpoint.pt")]
    assert run_folder.places_of("timm:resnet18", new) == ["timm:resnet18"]
    stored = probed / "checkpoint.pt"
    stored.rename(probed / "away.pt")
    try:
        assert predict.main(["classify", str(new / "probe"), image]) == expected
        (new / "checkpoint.pt").unlink()
        with pytest.raises(FileNotFoundError, match="name them by --weights"):
            predict.main(["classify", str(new / "probe"), image])
    finally:
        (probed / "away.pt").rename(stored)


def test_what_is_no_run_is_said(tmp_path):
    for folder, what in ((tmp_path, "holds neither head.safetensors nor"), (tmp_path / "none", "is no folder")):
        with pytest.raises(FileNotFoundError, match=what):
            predict.main(["classify", str(folder), "a.png"])
