"""The README's walk: train on phantoms, classify new ones and a DICOM, search, export, load elsewhere."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from test_predict import write_dicom

import export
import main
import main_linear
import make_dataset
import models
import predict

pytestmark = pytest.mark.slow


def test_from_training_to_other_libraries(tmp_path):
    for name, seed in (("world", 0), ("new", 1)):
        make_dataset.main(
            ["demo", "--root", str(tmp_path / name), "--pairs", "240", "--seed", str(seed), "--workers", "1"]
        )
    run = tmp_path / "run"
    main.main(
        ["--dataset", "roco", "--root", str(tmp_path / "world" / "roco"), "--output-dir", str(run), "--model",
         "SLIP_VITT16", "--vision-tower", "test_resnet", "--image-size", "64", "--ssl-mlp-dim", "64", "--lr", "1e-3",
         "--epochs", "1", "--batch-size", "32", "-j", "0", "--gpu", "-1", "--override", "text_layers=2",
         "text_width=64", "text_heads=2"]
    )  # fmt: skip
    checkpoint, probe = run / "checkpoint_best.pt", run / "calc"
    main_linear.main(
        ["--dataset", "cbis_calc", "--root", str(tmp_path / "world" / "cbis"), "--pretrained", str(checkpoint),
         "--output-dir", str(probe), "-j", "0", "--gpu", "-1", "--resamples", "50"]
    )  # fmt: skip

    films = tmp_path / "films"
    films.mkdir()
    crops = [row for row in (tmp_path / "new" / "cbis" / "calc.csv").read_text().splitlines()[1:6]]
    paths = sorted((tmp_path / "new" / "cbis").rglob("*.jpg"))[: len(crops)]
    for i, path in enumerate(paths):
        Image.open(path).save(films / f"{i}.png")
    write_dicom(films / "film.dcm", np.asarray(Image.open(paths[0]).convert("L")))
    answers = predict.main(["classify", str(probe), str(films), "--output", str(tmp_path / "answers.csv")])
    assert len(answers) == len(paths) + 1 and any(row["image"].endswith("film.dcm") for row in answers)

    bank = tmp_path / "bank.npz"
    predict.main(["embed", str(checkpoint), str(films), "--output", str(bank)])
    nearest = predict.main(["search", str(bank), str(films / "1.png"), "-k", "1"])
    assert json.dumps(nearest, default=str).count("1.png") >= 2  # the query, and itself as its nearest

    out = export.main(
        [str(checkpoint), "--to", "open-clip", "--output", str(tmp_path / "clip"), "--results", str(probe)]
    )
    card = (out / "README.md").read_text()
    assert "SYNTHETIC" in card and "cbis_calc" in card
    x = torch.randn(2, 3, 64, 64)
    ours = models.load_pretrained(checkpoint).model
    open_clip = pytest.importorskip("open_clip")
    theirs, _, _ = open_clip.create_model_and_transforms(f"local-dir:{out}")
    with torch.inference_mode():
        torch.testing.assert_close(theirs.eval().encode_image(x), ours.encode_image(x), rtol=1e-4, atol=1e-4)
    tower = export.main([str(checkpoint), "--to", "timm", "--output", str(tmp_path / "tower")])
    with torch.inference_mode():
        torch.testing.assert_close(
            timm.create_model(f"local-dir:{tower}", pretrained=True).eval()(x), ours.visual(x), rtol=1e-4, atol=1e-4
        )
