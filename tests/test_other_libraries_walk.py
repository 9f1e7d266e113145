"""A model of another library through the commands: trained, resumed, probed, searched, fine-tuned, exported."""

import json
import shutil

import numpy as np
import pytest
import torch
import twins
from helpers import assert_same_run, stop_after
from PIL import Image

import eval_zeroshot
import export
import main
import main_linear
import models
import predict
from beit_finetuning import run_class_finetuning
from inputs.transforms import eval_view

PAIRS = {
    "clip": twins.clip, "siglip": twins.siglip, "siglip2": twins.siglip2, "open_clip": twins.open_clip_pair,
    "biomedclip": lambda folder: twins.open_clip_pair(folder, "bert"),
}  # fmt: skip
TOWERS = {
    "timm": twins.timm_tower,
    **{kind: lambda folder, kind=kind: twins.vision(kind, folder) for kind in twins.VISION_KINDS},
}
KINDS = {**PAIRS, **TOWERS}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pairs, and a labelled set of two classes: dark and bright."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    rows = []
    for i in range(16):
        small = rng.integers(0, 100, (5, 5, 3)) + 100 * (i % 2)
        for folder in (f"set/{'train' if i < 8 else 'test'}/{'bright' if i % 2 else 'dark'}", "pairs"):
            (root / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(small.astype(np.uint8)).resize((60, 50)).save(root / folder / f"{i}.png")
        rows.append(f"{i}.png,a {'bright' if i % 2 else 'dark'} image of number {i}")
    (root / "pairs" / "train.csv").write_text("image,caption\n" + "\n".join(rows) + "\n")
    entry = dict(path=str(root / "set"), type="imagefolder", train="train", test="test", labels=["bright", "dark"])
    (root / "catalog.json").write_text(json.dumps({"mine": entry}))
    return root


def evaluated(weights, data, out):
    """Through each command that evaluates: the probabilities of a probe of it, of a fine-tuned tower, of words."""
    common = ["--catalog", str(data / "catalog.json"), "--gpu", "-1", "-j", "0"]
    probe = ["--dataset", "mine", "--pretrained", str(weights), "--cache-features", "--resamples", "20"]
    main_linear.main([*probe, *common, "--output-dir", str(out / "probe")])
    images, cpu = str(data / "set" / "test"), ["--gpu", "-1"]
    rows = predict.main(["classify", str(out / "probe"), images, *cpu])
    predict.main(["embed", str(weights), images, "--output", str(out / "bank.npz"), *cpu])
    nearest = predict.main(["search", str(out / "bank.npz"), images, "-k", "1", *cpu])
    assert all(row["query"] == row["found"] and row["cosine"] > 0.9999 for row in nearest)
    model = models.load_pretrained(weights)
    if model.model.objective.text:
        zero = [*common, "--datasets", "mine", "--output-dir", str(out / "zero")]
        eval_zeroshot.main(["--resume", str(weights), *zero])
        rows += predict.main(["zero-shot", str(weights), images, "--labels", "bright", "dark", *cpu])
    return [row["prob_bright"] for row in rows]


@pytest.mark.parametrize("kind", [
    *(pytest.param(kind, marks=() if kind in ("clip", "dinov2") else pytest.mark.slow) for kind in KINDS)
])  # fmt: skip
def test_a_model_of_another_library_through_the_commands(kind, data, tmp_path, monkeypatch):
    out = tmp_path
    source = KINDS[kind](out / kind)
    before = evaluated(source, data, out / "frozen")
    objective = "SLIP" if kind in PAIRS else "SIMCLR"
    train = ["--model", objective, "--init", str(source), "--dataset", "csv", "--root", str(data / "pairs"),
             "--lr", "1e-4", "--batch-size", "4", "--epochs", "2", "--workers", "0", "--gpu", "-1", "--ssl-mlp-dim",
             "16", "--ssl-emb-dim", "8", "--val-fraction", "0.25"]  # fmt: skip
    main.main([*train, "--output-dir", str(out / "whole")])
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):  # cut off after an epoch
        patched.setattr(main, "finish_epoch", stop_after(main.finish_epoch))
        main.main([*train, "--output-dir", str(out / "broken")])
    main.main([*train, "--output-dir", str(out / "broken")])
    assert_same_run(out / "whole", out / "broken")
    whole = out / "whole" / "checkpoint.pt"
    shutil.rmtree(source)  # what a checkpoint says of itself is enough
    after = evaluated(whole, data, out / "trained")
    assert len(after) == len(before) and np.abs(np.subtract(after, before)).max() > 1e-6
    export.main([str(whole), "--to", "safetensors", "--output", str(out / "exported")])
    one, other = models.load_pretrained(whole), models.load_pretrained(out / "exported")
    assert np.array_equal(one.embed_images(twins.images()), other.embed_images(twins.images()))
    tuned = ["--data_set", "image_folder", "--data_path", str(data / "set" / "train"), "--eval_data_path",
             str(data / "set" / "test"), "--finetune", str(whole), "--batch_size", "4", "--epochs", "1",
             "--warmup_epochs", "0", "--num_workers", "0", "--gpu", "-1", "--drop_path", "0",
             "--output_dir", str(out / "tuned")]  # fmt: skip
    run_class_finetuning.main(tuned)
    rows = predict.main(["classify", str(out / "tuned"), str(data / "set" / "test"), "--gpu", "-1"])
    assert len(rows) == 8 and all(0 <= row["prob_bright"] <= 1 for row in rows)


@pytest.mark.parametrize("text", ["roberta", "modernbert"])
def test_two_towers_of_different_models_are_trained_together(text, data, tmp_path):
    image, words = twins.vision("dinov2", tmp_path / "dinov2"), twins.text(text, tmp_path / text)
    train = ["--model", "SLIP", "--vision-weights", str(image), "--text-weights", str(words), "--dataset", "csv",
             "--root", str(data / "pairs"), "--lr", "0", "--lr-start", "0", "--lr-end", "0", "--batch-size", "4",
             "--epochs", "1", "--workers", "0", "--gpu", "-1", "--ssl-mlp-dim", "16", "--ssl-emb-dim", "8",
             "--val-fraction", "0.25", "--wd", "0", "--output-dir", str(tmp_path / "run")]  # fmt: skip
    main.main(train)
    trained, alone = models.load_pretrained(tmp_path / "run" / "checkpoint_best.pt"), models.load_pretrained(image)
    batch = torch.stack([eval_view(alone.preprocess)(picture, None) for picture in twins.images()])
    with torch.inference_mode():
        assert (trained.model.visual(batch) - alone.model.visual(batch)).abs().max() < 1e-6
    shutil.rmtree(words)
    theirs = models.load_pretrained(tmp_path / "run" / "checkpoint_best.pt")
    assert np.ptp(theirs.embed_captions(twins.CAPTIONS), axis=0).max() > 1e-3
