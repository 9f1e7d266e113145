"""export.py --to transformers and --to open-clip: what other libraries made comes back to them, with equal numbers."""

import numpy as np
import pytest
import timm
import torch
import transformers
import twins
from model_helpers import tiny_medslip
from PIL import Image
from test_export import built, use_of, write

import export
import models
from inputs.transforms import eval_view
from towers import sources

PAIRS = ("clip", "siglip", "siglip2")
ALONE = ("vit", "dinov2", "dinov3_vit", "dinov3_convnext", "swin", "convnext")


def trained(source, path, name="SLIP", **fields):
    """A checkpoint of a model with another library's towers, as a training from `source` leaves it."""
    found = sources.read_source(source)
    model = models.create_model(name, **found.config, ssl_mlp_dim=8, ssl_emb_dim=4, **fields)
    sources.load(found, model)
    return write(path, model, found.tokenizer)


def exported(checkpoint, form, folder):
    out = export.main([str(checkpoint), "--to", form, "--output", str(folder)])
    return out, models.load_pretrained(checkpoint), use_of(out, square(), twins.CAPTIONS)


def square():
    """An image that no processor resizes or crops: its library and Pillow then agree to the bit."""
    pixels = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def unit(x):
    return torch.nn.functional.normalize(torch.as_tensor(x), dim=-1)


@pytest.mark.parametrize("kind", PAIRS)
def test_a_pair_of_transformers_goes_back_to_its_own_class(kind, tmp_path):
    source = getattr(twins, kind)(tmp_path / "source")
    checkpoint = trained(source, tmp_path / "c.pt", "SLIP" if kind == "clip" else "SIGSLIP")
    folder, ours, names = exported(checkpoint, "transformers", tmp_path / "out")
    theirs = transformers.AutoModel.from_pretrained(folder)
    assert type(theirs) is type(transformers.AutoModel.from_pretrained(source))
    view, image = eval_view(ours.preprocess)(square(), None)[None], square()
    with torch.inference_mode():
        expected = unit(ours.model.encode_image(view))
    found = names["out"]
    if kind == "clip":  # its processor makes 36 pixels of the 32 first, on a tensor and not by Pillow
        with torch.inference_mode():
            found.image_embeds = unit(theirs.eval().get_image_features(pixel_values=view).pooler_output)
    assert (found.image_embeds - expected).abs().max() < 1e-5
    assert (found.text_embeds - torch.from_numpy(ours.embed_captions(twins.CAPTIONS))).abs().max() < 1e-5
    assert theirs.logit_scale.item() == pytest.approx(ours.model.logit_scale.item())
    tokens = ours.tokenizer(twins.CAPTIONS)
    ids = names["texts"]["input_ids"]
    for row, own in zip(ids, tokens, strict=True):  # up to the padding, which a CLIP has another id for
        n = len(ours.tokenizer._backend.encode(twins.CAPTIONS[0]).ids) if kind == "clip" else len(row)
        assert row[:n].tolist() == own[:n].tolist()
    before, after = (transformers.AutoImageProcessor.from_pretrained(place) for place in (source, folder))
    for image in [*twins.images(), square()] if kind != "siglip2" else [square()]:
        first, second = (p(image, return_tensors="pt")["pixel_values"] for p in (before, after))
        assert torch.equal(first, second)
    again = models.load_pretrained(folder)  # and this project reads it back
    assert np.abs(again.embed_images(twins.images()) - ours.embed_images(twins.images())).max() < 1e-5


@pytest.mark.parametrize("kind", ALONE)
def test_an_image_tower_of_transformers_goes_back_alone(kind, tmp_path):
    source = twins.vision(kind, tmp_path / "source")
    folder, ours, names = exported(trained(source, tmp_path / "c.pt", "SIMCLR"), "transformers", tmp_path / "out")
    images = torch.stack([eval_view(ours.preprocess)(image, None) for image in twins.images()])
    theirs = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.inference_mode():
        out = theirs(pixel_values=images)
        expected = ours.model.visual(images)
    found = out.last_hidden_state[:, 0] if kind == "vit" else out.pooler_output
    assert (found - expected).abs().max() < 1e-5 and names["features"].shape == expected[:1].shape
    before, after = (transformers.AutoImageProcessor.from_pretrained(place) for place in (source, folder))
    for image in twins.images():
        first, second = (p(image, return_tensors="pt")["pixel_values"] for p in (before, after))
        assert torch.equal(first, second)


def test_a_tower_of_another_image_size_says_how_it_is_called(tmp_path):
    source = twins.vision("vit", tmp_path / "source")
    checkpoint = trained(source, tmp_path / "c.pt", "SIMCLR")
    larger = models.load_pretrained(checkpoint, image_size=48)
    _, ours, names = exported(write(tmp_path / "l.pt", larger.model, None), "transformers", tmp_path / "out")
    view = eval_view(ours.preprocess)(square().resize((48, 48)), None)[None]
    with torch.inference_mode():
        assert names["out"].last_hidden_state.shape[1] == 1 + (48 // 8) ** 2
        assert ours.model.visual(view).shape == names["features"].shape


def test_medclips_swin_and_timms_vit_are_classes_of_transformers(tmp_path):
    torch.manual_seed(0)
    folder, ours, names = exported(write(tmp_path / "m.pt", tiny_medslip(), None), "transformers", tmp_path / "m")
    view = eval_view(ours.preprocess)(square(), None)[None]
    with torch.inference_mode():
        expected = ours.model.visual(view)
    assert type(names["model"]).__name__ == "SwinModel" and names["features"].shape == expected.shape
    with torch.inference_mode():
        assert (names["model"](pixel_values=view).pooler_output - expected).abs().max() < 1e-5
    assert (names["features"] - expected).abs().max() < 1e-3  # of the image that the card's lines made
    small = ("--model", "CLIP_VITS16", "--image-size", "48", "32", "--override", "vision.depth=2",
             "vision.num_heads=12", "text_layers=1", "text_width=64", "text_heads=2", "embed_dim=32")  # fmt: skip
    with pytest.raises(ValueError, match="covers squares alone"):
        export.main([str(built(tmp_path / "t.pt", *small)), "--to", "transformers", "--output", str(tmp_path / "t")])
    small = [flag for flag in small if flag != "48"]
    folder, ours, names = exported(built(tmp_path / "v.pt", *small), "transformers", tmp_path / "v")
    view = eval_view(ours.preprocess)(square(), None)[None]
    with torch.inference_mode():
        assert (unit(names["features"]) - unit(ours.model.visual(view))).abs().max() < 1e-5
    assert type(names["model"]).__name__ == "ViTModel"
    for image in twins.images()[:2]:  # whose margins are the same on both sides, or half a pixel is rounded down
        found = names["processor"](image, return_tensors="pt")["pixel_values"][0]
        apart = (found - eval_view(ours.preprocess)(image, None)) * torch.tensor(ours.preprocess.std).view(3, 1, 1)
        assert (255 * apart).abs().max() < 2.01


def test_towers_that_transformers_has_not_are_refused_with_what_works(tmp_path):
    for flags, instead in (
        (("--vision-tower", "test_resnet", "--image-size", "64"), "test_resnet exactly: choose --to timm"),
        (("--vision-tower", "test_vit2", "--image-size", "160"), "test_vit2 exactly: choose --to timm"),  # layer scale
    ):
        checkpoint = built(tmp_path / "c.pt", "--model", "SIMCLR_VITT16", "--ssl-mlp-dim", "8", *flags)
        with pytest.raises(ValueError, match=instead):
            export.main([str(checkpoint), "--to", "transformers", "--output", str(tmp_path / "out")])
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["clip", "bert"])
def test_a_pair_of_open_clip_goes_back_to_it(kind, tmp_path, monkeypatch):
    open_clip = pytest.importorskip("open_clip")
    monkeypatch.chdir(tmp_path)  # the card's lines change it
    source = twins.open_clip_pair(tmp_path / "source", kind)
    folder, ours, names = exported(trained(source, tmp_path / "c.pt"), "open-clip", tmp_path / "out")
    if kind == "clip":
        names["model"], _, names["view"] = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    images = [*twins.images(), square()]
    views = torch.stack([names["view"](image) for image in images])
    assert (views - torch.stack([eval_view(ours.preprocess)(image, None) for image in images])).abs().max() < 1e-6
    with torch.inference_mode():
        found = names["model"].eval().encode_image(views, normalize=True)
    assert np.abs(found.numpy() - ours.embed_images(images)).max() < 1e-5
    assert np.abs(names["text"].numpy() - ours.embed_captions(twins.CAPTIONS)).max() < 1e-5
    tokens, own = names["tokenizer"](twins.CAPTIONS), ours.tokenizer(twins.CAPTIONS)
    assert torch.equal(tokens, own)
    again = models.load_pretrained(folder)
    assert np.abs(again.embed_captions(twins.CAPTIONS) - ours.embed_captions(twins.CAPTIONS)).max() < 1e-5


@pytest.mark.parametrize("flags", [
    ("--model", "SLIP_VITS16", "--image-size", "48", "--override", "vision.depth=2", "vision.num_heads=12",
     "text_layers=1", "text_width=64", "text_heads=2", "embed_dim=32"),
    ("--model", "CLIP_VITT16", "--image-size", "64", "--text-weights", "bert", "--override", "vision.depth=2"),
    ("--model", "SIGLIP_VITT16", "--vision-tower", "test_resnet", "--image-size", "64", "--text-weights", "roberta"),
], ids=["ViT of another size, CLIP's text", "and BERT", "ResNet and RoBERTa"])  # fmt: skip
def test_a_tower_of_timm_with_settings_beside_any_text_tower_goes_to_open_clip(flags, tmp_path, monkeypatch):
    """The tower's settings and image size lie in a folder of timm's, the BERT's in config.json; nothing is fetched."""
    pytest.importorskip("open_clip")
    monkeypatch.chdir(tmp_path)  # the card's lines change it
    flags = [str(twins.text(flag, tmp_path / flag)) if flag in ("bert", "roberta") else flag for flag in flags]
    checkpoint = built(tmp_path / "c.pt", "--ssl-mlp-dim", "8", *flags)
    folder, ours, names = exported(checkpoint, "open-clip", tmp_path / "out")
    views = torch.stack([names["view"](image) for image in twins.images()])
    with torch.inference_mode():
        found = names["model"].encode_image(views, normalize=True).numpy()
    text = ours.embed_captions(twins.CAPTIONS)
    assert np.abs(found - ours.embed_images(twins.images())).max() < 1e-5
    assert np.abs(names["text"].numpy() - text).max() < 1e-5 and np.ptp(text, axis=0).max() > 1e-3
    again = models.load_pretrained(folder)
    assert np.abs(again.embed_images(twins.images()) - found).max() < 1e-5
    assert np.abs(again.embed_captions(twins.CAPTIONS) - text).max() < 1e-5
    named = {line.split("  ")[1] for line in (folder / "SHA256SUMS").read_text().splitlines()}
    assert named >= {str(path.relative_to(folder)) for path in folder.rglob("*.json")}


def test_towers_of_open_clip_go_back_at_another_image_size(tmp_path, monkeypatch):
    pytest.importorskip("open_clip")
    monkeypatch.chdir(tmp_path)
    for kind, size in (("clip", 48), ("bert", 96)):
        source = twins.open_clip_pair(tmp_path / kind, kind)
        checkpoint = built(tmp_path / f"{kind}.pt", "--model", "CLIP", "--init", str(source), "--image-size", str(size))
        folder, ours, names = exported(checkpoint, "open-clip", tmp_path / f"out {kind}")
        images = torch.stack([names["view"](image) for image in twins.images()])
        assert images.shape[-2:] == (size, size)
        with torch.inference_mode():
            found = names["model"].encode_image(images, normalize=True).numpy()
        assert np.abs(found - ours.embed_images(twins.images())).max() < 1e-5
        again = models.load_pretrained(folder)
        assert np.abs(again.embed_images(twins.images()) - found).max() < 1e-5


def test_timm_is_told_how_images_of_its_tower_were_prepared(tmp_path):
    source = twins.timm_tower(tmp_path / "source")
    folder, ours, names = exported(trained(source, tmp_path / "c.pt", "SIMCLR"), "timm", tmp_path / "out")
    assert ours.preprocess.prepare != "slip"
    for image in twins.images():
        assert (names["view"](image) - eval_view(ours.preprocess)(image, None)).abs().max() < 1e-6
    data = timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{folder}", pretrained=True))
    assert data["interpolation"] == ours.preprocess.interpolation


def test_a_pair_that_goes_on_with_another_objective_has_no_class_there(tmp_path):
    source = twins.siglip(tmp_path / "source")
    with pytest.raises(
        ValueError, match="transformers' siglip is used with a sigmoid, and SLIP was trained with a soft"
    ):
        export.main(
            [str(trained(source, tmp_path / "c.pt")), "--to", "transformers", "--output", str(tmp_path / "out")]
        )
