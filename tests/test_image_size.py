"""Images that are no squares, `--image-size H W`: the views against torchvision, the towers, and every script."""

import json
from functools import partial

import cbis_tree
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import TINY, command
from model_helpers import tiny_medslip
from PIL import Image
from roco_tree import make_roco
from test_export import built
from torchvision.transforms import v2
from view_helpers import grainy, image

import eval_zeroshot
import export
import main
import main_linear
import models
import predict
from beit_finetuning import run_class_finetuning
from beit_finetuning.modeling_finetune import create_beit
from beit_finetuning.views import EvalView, beit_preprocess
from beit_finetuning.weights import load_weights
from exporting import formats
from inputs.sizes import as_size, height_width
from inputs.transforms import (
    Preprocess,
    _crop_box,
    centre_crop,
    eval_view,
    pad_to_shape,
    random_resized_crop,
    ssl_pixels,
    train_pixels,
)
from preparation.cbis_tables import make_cbis

TALL, WIDE = (48, 32), (24, 40)


# ---------------------------------------------------------------------------------------------------------------------
# Sizes and views
# ---------------------------------------------------------------------------------------------------------------------


def test_a_size_is_a_side_or_height_and_width():
    assert [as_size(value) for value in (224, [224], (64, 64), [1520, 912])] == [224, 224, 64, (1520, 912)]
    assert height_width(7) == (7, 7) and Preprocess(size=[48, 32]).shape == TALL
    for wrong in (0, [], [1, 2, 3], [224, 0], ["224"], 2.5):
        with pytest.raises((ValueError, TypeError)):
            as_size(wrong)
    kept = Preprocess(size=TALL)
    assert Preprocess.from_dict(json.loads(json.dumps(kept.to_dict()))) == kept


@pytest.mark.parametrize("size", [TALL, WIDE])
@pytest.mark.parametrize("source", [(80, 60), (60, 80), (50, 75), (20, 200)])
def test_the_evaluation_view_covers_the_size_and_takes_its_centre(size, source):
    img = grainy(*source)
    scale = max(size[0] / img.height, size[1] / img.width)
    enough = v2.functional.resize(img, [int(scale * img.height + 1e-9), int(scale * img.width + 1e-9)], antialias=True)
    expected = v2.functional.center_crop(enough, list(size))
    strip = img.height > 8 * img.width  # cut out before it is resized
    assert abs(np.asarray(centre_crop(img, size), dtype=int) - np.asarray(expected, dtype=int)).max() <= strip
    assert eval_view(Preprocess(size=size))(img, None).shape == (3, *size)


@pytest.mark.parametrize("size", [TALL, WIDE, (61, 37)])
@pytest.mark.parametrize("source", [(80, 60), (60, 80), (9, 7), (31, 200), (37, 61)])
def test_padding_keeps_all_of_the_image_in_the_middle_and_is_idempotent(size, source):
    img = image(*source).convert("L")
    padded = pad_to_shape(img, size)
    assert padded.height >= max(img.height, size[0]) and padded.width >= max(img.width, size[1])
    assert abs(padded.height * size[1] - padded.width * size[0]) <= max(size) / 2  # to the nearest pixel
    left, top = (padded.width - img.width) // 2, (padded.height - img.height) // 2
    assert np.array_equal(padded.crop((left, top, left + img.width, top + img.height)), img)
    assert np.asarray(padded, dtype=int).sum() == np.asarray(img, dtype=int).sum()
    assert pad_to_shape(padded, size) is padded
    preprocess = Preprocess(size=size, prepare="medclip")
    pixels = preprocess.pixels(img)
    assert np.array_equal(pixels[0], padded) and torch.equal(preprocess.pixels(pixels), pixels)


@pytest.mark.parametrize("size", [TALL, WIDE])
def test_medclips_evaluation_view_is_all_of_the_padded_image(size):
    medclip, img = Preprocess(size=size, mean=(0, 0, 0), std=(1, 1, 1), prepare="medclip"), image(80, 60)
    whole = np.asarray(pad_to_shape(img.convert("L"), size))
    expected = np.asarray(Image.fromarray(whole).resize(size[::-1], Image.Resampling.BICUBIC)) / np.float32(255)
    np.testing.assert_allclose(eval_view(medclip)(img), np.stack([expected] * 3), rtol=0, atol=1e-6)


def test_training_crops_have_the_proportions_of_the_size_within_a_third():
    rng = np.random.default_rng(0)
    boxes = [_crop_box(4000, 4000, (0.08, 0.3), rng, WIDE[1] / WIDE[0]) for _ in range(2000)]
    aspect = np.array([width / height for _, _, height, width in boxes]) / (WIDE[1] / WIDE[0])
    assert 0.745 < aspect.min() < 0.77 and 1.31 < aspect.max() < 1.34
    assert abs(np.log(aspect).mean()) < 0.02  # log-uniform around it
    preprocess, planes = Preprocess(size=WIDE), Preprocess().pixels(image())
    assert train_pixels(preprocess, planes, rng).shape[1:] == WIDE == ssl_pixels(preprocess, planes, rng)[0].shape[1:]


@pytest.mark.parametrize("size", [TALL, WIDE, 32])
def test_a_crop_of_a_ramp_shows_its_proportions(size):
    """Red grows to the right and green downwards, so that a crop's colours say which part it is."""
    pixels, rng = Preprocess().pixels(image(400, 400)), np.random.default_rng(0)
    shape = height_width(size)
    aspects = []
    for _ in range(60):
        red, green, _ = random_resized_crop(pixels, size, (0.1, 0.3), rng)
        across, down = (int(ramp.max()) - int(ramp.min()) for ramp in (red, green))
        aspects.append(across / (1 - 1 / shape[1]) / (down / (1 - 1 / shape[0])))
    aspects = np.array(aspects) / (shape[1] / shape[0])
    assert 0.72 < aspects.min() < 0.82 and 1.22 < aspects.max() < 1.39


@pytest.mark.parametrize("size", [224, 96, (48, 80), 400])
def test_fine_tuning_sees_what_torchvision_makes(size):
    """Of a square what the published recipe says; bicubic."""
    img, (height, width) = grainy(150, 130), height_width(size)
    crop_pct = 224 / 256 if min(height, width) < 384 else 1
    cover = int(height / crop_pct), int(width / crop_pct)
    scale = max(cover[0] / img.height, cover[1] / img.width)
    shape = [int(scale * img.height + 1e-9), int(scale * img.width + 1e-9)]
    bigger = v2.functional.resize(img, shape, v2.InterpolationMode.BICUBIC, antialias=True)
    expected = v2.functional.center_crop(bigger, [height, width])
    preprocess = beit_preprocess(size, False)
    assert torch.equal(EvalView(preprocess)(img), preprocess.tensor(expected))


# ---------------------------------------------------------------------------------------------------------------------
# Towers
# ---------------------------------------------------------------------------------------------------------------------

SMALL = dict(text_layers=1, text_width=32, text_heads=2, embed_dim=16, vocab_size=64, context_length=8)


def bicubic(grid, shape):
    return F.interpolate(grid[None].permute(0, 3, 1, 2), shape, mode="bicubic", antialias=True)[0].permute(1, 2, 0)


@pytest.mark.parametrize("size", [(64, 32), (16, 64), (128, 8), 96])
def test_a_vits_positions_follow_to_any_shape_and_back(size):
    """128 x 8 pixels have as many patches as 32 x 32: their number says nothing of where they lie."""
    settings = dict(patch_size=8, embed_dim=32, depth=1, num_heads=2)
    model = models.create_model("CLIP_VITT16", image_size=32, vision_kwargs=settings, **SMALL).eval()
    other = models.at_size(model, size)
    height, width = (side // 8 for side in height_width(size))
    grid = model.visual.pos_embed[0, 1:].reshape(4, 4, 32)
    expected = bicubic(grid, (height, width)).reshape(-1, 32)
    torch.testing.assert_close(other.visual.pos_embed[0, 1:], expected)
    assert torch.equal(other.visual.pos_embed[0, 0], model.visual.pos_embed[0, 0])
    assert other.visual(torch.rand(2, 3, *height_width(size))).shape == (2, 32)
    back = models.at_size(other, 32)  # from the shape that it has, not from a square
    again = bicubic(expected.reshape(height, width, 32), (4, 4)).reshape(-1, 32)
    torch.testing.assert_close(back.visual.pos_embed[0, 1:], again)


def test_positions_without_the_class_token_follow_too():
    settings = dict(patch_size=8, embed_dim=32, depth=1, num_heads=2, no_embed_class=True, reg_tokens=4)
    model = models.create_model("CLIP_VITT16", image_size=32, vision_kwargs=settings, **SMALL).eval()
    other = models.at_size(model, (64, 24))
    expected = bicubic(model.visual.pos_embed[0].reshape(4, 4, 32), (8, 3)).reshape(-1, 32)
    torch.testing.assert_close(other.visual.pos_embed[0], expected)


@pytest.mark.parametrize(
    "name, tower, settings, size",
    [
        ("CLIP_VITT16", "test_resnet", {}, (96, 48)),
        ("CLIP_VITT16", "swin_tiny_patch4_window7_224", dict(embed_dim=24, num_heads=(1, 2, 4, 8)), (256, 160)),
        ("CLIP_VITT16", "swin_tiny_patch4_window7_224", dict(embed_dim=24, num_heads=(1, 2, 4, 8)), 96),
        ("MEDCLIP_VIT", "medclip-swin", dict(embed_dim=24, num_heads=[1, 2, 4, 8]), (320, 230)),
        ("MEDCLIP_RESNET", "medclip-resnet50", {}, (96, 64)),
    ],
)
def test_other_towers_take_the_same_weights(name, tower, settings, size):
    small = {**SMALL, "text_layers": 2}
    model = models.create_model(name, vision_tower=tower, vision_kwargs=settings, **small).eval()
    other = models.at_size(model, size)
    assert not other.training and other.preprocess.size == size
    assert other.preprocess.prepare == model.preprocess.prepare
    features = other.visual(torch.rand(2, 3, *height_width(size)))
    assert features.shape == (2, model.feature_dim) and features.isfinite().all()
    theirs = other.state_dict()
    for key, value in model.state_dict().items():
        table = key.endswith("relative_position_bias_table") and theirs[key].shape != value.shape
        assert table or torch.equal(value, theirs[key]), key


def test_medclips_swin_says_how_small_an_image_may_be():
    small = dict(embed_dim=24, num_heads=[1, 2, 4, 8])
    assert models.create_model("MEDCLIP_VIT", image_size=193, vision_kwargs=small, text_layers=2)
    with pytest.raises(ValueError, match="at least 193 pixels a side, not 320 x 192"):
        models.create_model("MEDCLIP_VIT", image_size=(320, 192), vision_kwargs=small, text_layers=2)


def test_beits_positions_follow_from_the_shape_that_the_file_says(tmp_path):
    tiny = dict(patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=3, use_abs_pos_emb=True)
    create = partial(create_beit, "beit_small_patch16_224", **tiny)
    wide = create(img_size=(16, 64), use_rel_pos_bias=False)
    path = tmp_path / "c.pt"
    torch.save({"model": wide.state_dict(), "preprocess": Preprocess(size=(16, 64)).to_dict()}, path)
    square = create(img_size=32, use_rel_pos_bias=False)
    load_weights(square, path)
    with pytest.raises(AssertionError):  # as many places, which lie elsewhere
        torch.testing.assert_close(square.pos_embed, wide.pos_embed)
    again = create(img_size=(16, 64), use_rel_pos_bias=True)
    assert again(torch.rand(2, 3, 16, 64)).shape == (2, 3)
    torch.save({"model": again.state_dict(), "preprocess": Preprocess(size=(16, 64)).to_dict()}, path)
    load_weights(create(img_size=(16, 64), use_rel_pos_bias=True), path)
    with pytest.raises(ValueError, match="2 x 8"):
        load_weights(create(img_size=32, use_rel_pos_bias=True), path)


# ---------------------------------------------------------------------------------------------------------------------
# Every script
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("size")
    make_roco(root / "roco")
    main.main(command(root / "roco", root / "run", *TINY[2:], "--image-size", "48", "32", "--epochs", "1"))
    cbis_tree.make_small_cbis(root / "cbis")
    make_cbis(root / "cbis")
    return root


def test_training_keeps_the_shape_and_goes_on_with_it(trained, tmp_path):
    loaded = models.load_pretrained(trained / "run" / "checkpoint.pt")
    assert loaded.preprocess.size == TALL and loaded.model.config["image_size"] == TALL
    assert loaded.embed_images([image()]).shape == (1, 16)
    flags = [*TINY[2:], "--image-size", "48", "32", "--epochs", "1"]
    assert main.main(command(trained / "roco", trained / "run", *flags)) is not None  # finished: says so
    with pytest.raises(ValueError, match=r"48.*32"):
        main.main(command(trained / "roco", trained / "run", *TINY[2:], "--image-size", "32", "48", "--epochs", "1"))
    settings = trained / "run" / "settings.json"
    assert json.loads(settings.read_text())["args"]["image_size"] == [48, 32]
    main.main(["--config", str(settings), "--output-dir", str(tmp_path / "again")])
    assert models.load_pretrained(tmp_path / "again" / "checkpoint.pt").preprocess.size == TALL
    other = command(trained / "roco", tmp_path / "init", *TINY[2:], "--image-size", "32", "--epochs", "1")
    main.main([*other, "--init", str(trained / "run" / "checkpoint.pt")])
    assert models.load_pretrained(tmp_path / "init" / "checkpoint.pt").preprocess.size == 32


@pytest.mark.parametrize("flags, size", [((), TALL), (("--image-size", "24", "40"), WIDE)])
def test_a_probe_and_its_answers(trained, tmp_path, flags, size):
    main_linear.main(
        ["--dataset", "cbis_mass", "--root", str(trained / "cbis"), "--pretrained",
         str(trained / "run" / "checkpoint.pt"), "-j", "0", "--resamples", "20", "--output-dir", str(tmp_path), *flags]
    )  # fmt: skip
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert settings["derived"]["preprocess"]["size"] == list(size)
    assert "image_size" in json.loads((tmp_path / "results.json").read_text())["settings"] or not flags
    image().save(tmp_path / "new.png")
    (answer,) = predict.main(["classify", str(tmp_path), str(tmp_path / "new.png")])
    assert 0 < answer["prob_MALIGNANT"] < 1


def test_zero_shot_and_retrieval(trained, tmp_path):
    flags = ["--resume", str(trained / "run" / "checkpoint.pt"), "--output-dir", str(tmp_path), "-j", "0"]
    pairs = ["--retrieval", "--dataset", "roco", "--root", str(trained / "roco"), "--split", "validation"]
    own = eval_zeroshot.main([*flags, *pairs])
    same = eval_zeroshot.main([*flags, *pairs, "--image-size", "48", "32"])
    other = eval_zeroshot.main([*flags, *pairs, "--image-size", "64"])
    assert own["results"] == same["results"] if "results" in own else own == same
    assert other is not None


def test_fine_tuning_from_it_at_another_shape(trained, tmp_path):
    common = ["--data_set", "cbis_mass", "--data_path", str(trained / "cbis"), "--epochs", "1", "--warmup_epochs", "0",
              "--batch_size", "16", "-j", "0", "--gpu", "-1", "--resamples", "20"]  # fmt: skip
    run_class_finetuning.main(
        [*common, "--model", "tower", "--finetune", str(trained / "run" / "checkpoint.pt"), "--input_size", "24", "40",
         "--output_dir", str(tmp_path)]
    )  # fmt: skip
    image().save(tmp_path / "new.png")
    (answer,) = predict.main(["classify", str(tmp_path), str(tmp_path / "new.png")])
    assert 0 < answer["prob_MALIGNANT"] < 1


def test_exports_hold_the_shape(trained, tmp_path):
    checkpoint = trained / "run" / "checkpoint.pt"
    ours, x = models.load_pretrained(checkpoint), torch.rand(2, 3, *TALL)
    folder = export.main([str(checkpoint), "--to", "timm", "--output", str(tmp_path / "timm")])
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.inference_mode():
        torch.testing.assert_close(theirs(x), ours.model.visual(x))
    folder = export.main([str(checkpoint), "--to", "safetensors", "--output", str(tmp_path / "safe")])
    again = models.load_pretrained(folder)
    assert again.preprocess == ours.preprocess and again.model.config == ours.model.config
    with pytest.raises(ValueError, match="48 x 32"):
        export.main([str(checkpoint), "--to", "open-clip", "--output", str(tmp_path / "clip")])


def test_an_export_to_medclip_refuses_what_is_no_square(tmp_path):
    model = models.at_size(tiny_medslip(vocab_size=models.BERT_VOCABULARY), (96, 64))
    with pytest.raises(ValueError, match="square"):
        formats.to_medclip(models.Pretrained(model, model.preprocess, None, "c"), tmp_path)


def test_open_clips_own_views_would_be_others(tmp_path):
    """Its ResizeKeepRatio is bicubic; cosines of 0.9999 are not the same model."""
    small = ("--image-size", "96", "64", "--vision-tower", "test_resnet", "--override", "text_layers=1")
    checkpoint = built(tmp_path / "c.pt", "--model", "CLIP_VITT16", *small)
    with pytest.raises(ValueError, match="bicubically"):
        export.main([str(checkpoint), "--to", "open-clip", "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", [["0"], ["1", "2", "3"], ["a"]])
def test_a_wrong_size_is_bad_usage(wrong, capsys):
    with pytest.raises(SystemExit) as stopped:
        main.get_args_parser().parse_args(["--image-size", *wrong])
    assert stopped.value.code == 2 and "--image-size" in capsys.readouterr().err


def test_views_of_whole_mammograms_are_no_squares():
    """At Mammo-CLIP's size, from a film of 4,000 lines."""
    film = Image.fromarray(np.random.default_rng(0).integers(0, 255, (4000, 2400), dtype=np.uint8))
    view = eval_view(Preprocess(size=(1520, 912), prepare="medclip"))(film, None)
    assert view.shape == (3, 1520, 912) and view.isfinite().all()
