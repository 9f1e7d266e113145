"""export.py against the libraries that load what it writes: open_clip, timm, onnxruntime and MedCLIP's loader."""

import json
import os
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import TINY, slow
from model_helpers import tiny_medslip
from PIL import Image

import export
import main
import models
from exporting.formats import Format
from inputs.transforms import eval_view, linear_eval_view
from runtime import checkpoints
from towers import medclip

WORDS = (
    "axial ct of the chest with a mass in left upper lobe radiograph shows round calcification &amp; Ünïté 3".split()
)


def write(path, model, tokenizer):
    """A checkpoint of `model` with every weight moved off its start, BatchNorm's statistics too."""
    g = torch.Generator().manual_seed(1)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.add_(0.02 * torch.rand(value.shape, generator=g))
    state = {
        "state_dict": model.state_dict(), "model": {"name": model.name, "config": model.config},
        "preprocess": model.preprocess.to_dict(), "tokenizer": tokenizer.spec() if tokenizer else None,
    }  # fmt: skip
    checkpoints.save_checkpoint(state, path)
    return path


def built(path, *flags):
    torch.manual_seed(0)
    return write(path, *main.build_model(main.get_args_parser().parse_args(list(flags))))


def use_of(folder, image, captions):
    """What the lines of a card leave, run as they stand but for where the folder lies."""
    text = (folder / "README.md").read_text(encoding="utf8")
    lines = text.split("```python\n")[1].split("```")[0]
    names = {"image": image, "captions": list(captions)}
    exec(lines.replace(f"folder = {folder.name!r}", f"folder = {str(folder)!r}"), names)
    return names


def pictures(n, folder):
    rng, paths = np.random.default_rng(0), []
    for i in range(n):
        pixels = rng.integers(0, 256, (int(rng.integers(40, 90)), int(rng.integers(40, 90)), 3), dtype=np.uint8)
        paths.append(folder / f"{i}.png")
        Image.fromarray(pixels).resize((300, 240 + i)).save(paths[-1])
    return paths


def captions(n):
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, int(rng.integers(1, 60)))) for _ in range(n)]


SMALL_TEXT = ("--override", "text_layers=2", "text_width=64", "text_heads=2", "embed_dim=32")


@pytest.mark.parametrize(
    "flags",
    [
        ("--model", "SLIP_VITT16", "--ssl-mlp-dim", "32", *SMALL_TEXT),
        *slow(("--model", "SIGLIP_VITT16", *SMALL_TEXT)),
        ("--model", "CLIP_VITT16", "--vision-tower", "test_resnet", "--image-size", "64", *SMALL_TEXT),
    ],
)
def test_open_clip_gives_the_same_embeddings_of_images_and_captions(flags, tmp_path):
    open_clip = pytest.importorskip("open_clip")
    checkpoint = built(tmp_path / "c.pt", *flags)
    folder = export.main([str(checkpoint), "--to", "open-clip", "--output", str(tmp_path / "out")])
    theirs, _, view = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer, ours = open_clip.get_tokenizer(f"local-dir:{folder}"), models.load_pretrained(checkpoint)
    paths, texts = pictures(100, tmp_path), captions(100)
    with torch.inference_mode():
        images = theirs.eval().encode_image(torch.stack([view(Image.open(path)) for path in paths]))
        words = theirs.encode_text(tokenizer(texts))
    for found, expected in ((images, ours.embed_images(paths)), (words, ours.embed_captions(texts))):
        assert F.cosine_similarity(found, torch.from_numpy(expected)).min() > 0.99999
    assert theirs.logit_scale.item() == pytest.approx(ours.model.logit_scale.item())
    assert theirs.logit_bias == ours.model.logit_bias  # None both, or the same number
    assert {file.name for file in folder.iterdir()} == {
        "README.md", "SHA256SUMS", "open_clip_config.json", "open_clip_model.safetensors", "preprocess.json"
    }  # fmt: skip


@pytest.mark.parametrize(
    "flags",
    [
        ("--model", "SIMCLR_VITS16", "--image-size", "96", "--ssl-mlp-dim", "32", "--override", "vision.depth=2",
         "vision.num_heads=12"),
        ("--model", "CLIP_VITT16", "--vision-tower", "convnext_atto", "--image-size", "64", *SMALL_TEXT),
    ],
)  # fmt: skip
def test_timm_gives_the_towers_features(flags, tmp_path):
    checkpoint = built(tmp_path / "c.pt", *flags)
    folder = export.main([str(checkpoint), "--to", "timm", "--output", str(tmp_path / "out")])
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    ours = models.load_pretrained(checkpoint)
    x = torch.randn(3, 3, ours.preprocess.size, ours.preprocess.size)
    with torch.inference_mode():
        torch.testing.assert_close(theirs(x), ours.model.visual(x))
    data = timm.data.resolve_model_data_config(theirs)
    assert data["mean"] == pytest.approx(ours.preprocess.mean) and data["input_size"][1] == ours.preprocess.size
    view = timm.data.create_transform(**data, is_training=False)
    path = pictures(1, tmp_path)[0]
    expected = models.eval_view(ours.preprocess)(Image.open(path), None)
    torch.testing.assert_close(view(Image.open(path)), expected, atol=0.02, rtol=0)


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs coreutils")
def test_sha256sum_finds_the_file_that_was_changed(tmp_path):
    checkpoint = built(tmp_path / "c.pt", "--model", "SLIP_VITT16", *TINY)
    folder = export.main([str(checkpoint), "--to", "timm", "--output", str(tmp_path / "out")])
    check = ["sha256sum", "--strict", "-c", "SHA256SUMS"]
    assert subprocess.run(check, cwd=folder, capture_output=True).returncode == 0
    with open(folder / "model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"!")
    done = subprocess.run(check, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 1 and "model.safetensors: FAILED" in done.stdout


def test_safetensors_come_back_as_the_checkpoint(tmp_path):
    checkpoint = built(tmp_path / "c.pt", "--model", "SLIP_VITT16", *TINY)
    folder = export.main([str(checkpoint), "--to", "safetensors", "--output", str(tmp_path / "out")])
    ours, theirs = models.load_pretrained(checkpoint), models.load_pretrained(folder)
    for key, value in ours.model.state_dict().items():
        assert torch.equal(theirs.model.state_dict()[key], value), key
    assert theirs.preprocess == ours.preprocess and theirs.model.config == ours.model.config
    np.testing.assert_array_equal(theirs.embed_captions(["a ct"]), ours.embed_captions(["a ct"]))
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | {"format": "another"}))
    with pytest.raises(ValueError, match=r"config.json is not the file of which .*SHA256SUMS speaks"):
        models.load_pretrained(folder)
    (folder / "SHA256SUMS").unlink()  # of an earlier version
    with pytest.raises(ValueError, match="no folder of export.py"):
        models.load_pretrained(folder)


def test_what_is_loaded_is_not_the_file_as_it_changes(tmp_path):
    checkpoint = built(tmp_path / "c.pt", "--model", "SLIP_VITT16", *TINY)
    folder = export.main([str(checkpoint), "--to", "safetensors", "--output", str(tmp_path / "out")])
    model = models.load_pretrained(folder).model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with open(folder / "model.safetensors", "r+b") as file:
        file.seek(2000)
        file.write(bytes(folder.joinpath("model.safetensors").stat().st_size - 2000))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("model", ["slip", "medslip"])
@pytest.mark.parametrize("form", ["timm", "open-clip", "safetensors", "transformers"])
def test_what_is_read_back_has_the_checkpoints_features(model, form, tmp_path):
    """Of an image that is no square, as a probe and as all else sees it."""
    if form == "open-clip":
        pytest.importorskip("open_clip")
    torch.manual_seed(0)
    if model == "slip":
        flags = ("--model", "SLIP_VITT16", "--ssl-mlp-dim", "32", "--image-size", "64", *SMALL_TEXT, "vision.depth=2")
        checkpoint = built(tmp_path / "c.pt", *flags)
    elif form in ("timm", "open-clip"):
        pytest.skip("neither holds MedCLIP's towers")
    else:
        checkpoint = write(tmp_path / "c.pt", tiny_medslip(), None)
    folder = export.main([str(checkpoint), "--to", form, "--output", str(tmp_path / "out")])
    ours, theirs = models.load_pretrained(checkpoint), models.load_pretrained(folder)
    assert theirs.preprocess == ours.preprocess
    image = Image.open(pictures(1, tmp_path)[0]).resize((150, 97))
    with torch.inference_mode():
        for view in (linear_eval_view, _eval_view):
            expected = ours.model.visual(view(ours.preprocess, image)[None])
            found = theirs.model.visual(view(theirs.preprocess, image)[None])
            assert (found - expected).abs().max() < 1e-5 and expected.std() > 1e-3
    if theirs.model.objective.text:
        assert np.abs(theirs.embed_images([image]) - ours.embed_images([image])).max() < 1e-5
    if form == "timm":
        (folder / "preprocess.json").write_text("[]")
        with pytest.raises(ValueError, match="preprocess.json is not the file of which .*SHA256SUMS speaks"):
            models.load_pretrained(folder)
        (folder / "SHA256SUMS").unlink()
        with pytest.raises(ValueError, match="preprocess.json is no preparation of images"):
            models.load_pretrained(folder)


def _eval_view(preprocess, image):
    return eval_view(preprocess)(image, None)


def test_medclip_loads_what_is_written_for_it(tmp_path):
    torch.manual_seed(0)
    model = tiny_medslip(vocab_size=models.BERT_VOCABULARY)
    folder = export.main(
        [str(write(tmp_path / "c.pt", model, None)), "--to", "medclip", "--output", str(tmp_path / "o")]
    )
    fresh = tiny_medslip(vocab_size=models.BERT_VOCABULARY)
    medclip.load_medclip(fresh, medclip.read_weights(folder))
    for key, value in model.state_dict().items():
        if not key.startswith("image_mlp."):
            assert torch.equal(fresh.state_dict()[key], value), key


SIZES = {"vit": (), "tall vit": ("--image-size", "48", "32")}


@pytest.mark.slow
@pytest.mark.parametrize("name", ("vit", "tall vit", "medslip"))
def test_onnx_graphs_take_any_batch_and_give_the_same(name, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    if name in SIZES:
        checkpoint = built(tmp_path / "c.pt", "--model", "SLIP_VITT16", *TINY, *SIZES[name])
    else:
        torch.manual_seed(0)
        checkpoint = write(tmp_path / "c.pt", tiny_medslip(), None)
    folder = export.main([str(checkpoint), "--to", "onnx", "--output", str(tmp_path / "out")])
    ours = models.load_pretrained(checkpoint)
    model, length = ours.model, ours.model.config["context_length"]
    for batch in (1, 5):
        images = torch.randn(batch, 3, *ours.preprocess.shape)
        tokens = torch.zeros(batch, length, dtype=torch.long)
        for row in tokens:
            n = int(torch.randint(2, 9, ()))
            row[:n] = torch.randint(1, 40, (n,))
        for side_name, x, encode in (("image", images, model.encode_image), ("text", tokens, model.encode_text)):
            (found,) = runtime.InferenceSession(folder / f"{side_name}.onnx").run(None, {side_name: x.numpy()})
            with torch.inference_mode():
                expected = F.normalize(encode(x), dim=-1).numpy()
            np.testing.assert_allclose(found, expected, atol=2e-5)
    path = pictures(1, tmp_path)[0]
    used = use_of(folder, Image.open(path), ["an axial ct", "", "Ünïté &amp; more"] * (ours.tokenizer is not None))
    np.testing.assert_allclose(used["vector"], ours.embed_images([path]), atol=2e-5)
    if ours.tokenizer is not None:
        expected = used["vector"] @ ours.embed_captions(used["captions"]).T
        np.testing.assert_allclose(used["cosines"], expected, atol=2e-5)


@pytest.mark.slow
def test_a_graph_of_a_fixed_number_of_rows_is_not_written(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    checkpoint = built(tmp_path / "c.pt", "--model", "SLIP_VITT16", *TINY)
    monkeypatch.setattr(models.SLIP, "encode_image", lambda self, image: self.visual(image) * len(image))
    with pytest.raises(RuntimeError, match="image.onnx would take 2 rows alone"):
        export.main([str(checkpoint), "--to", "onnx", "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_what_a_format_cannot_hold_is_refused_and_leaves_nothing(tmp_path):
    torch.manual_seed(0)
    bert = write(tmp_path / "bert.pt", tiny_medslip(), None)
    small = built(tmp_path / "small.pt", "--model", "CLIP_VITT16", *TINY)
    simclr = built(tmp_path / "simclr.pt", "--model", "SIMCLR_VITT16", "--ssl-mlp-dim", "32")
    for checkpoint, form, why in (
        (bert, "open-clip", "averages a BERT's last layer.*--to safetensors"),
        (bert, "timm", "medclip-swin, which is not one of timm's"),
        (bert, "medclip", "28996 tokens, this model 50"),
        (small, "medclip", "its own two towers alone"),
        (simclr, "open-clip", "no text side.*--to timm"),
    ):
        with pytest.raises(ValueError, match=why):
            export.main([str(checkpoint), "--to", form, "--output", str(tmp_path / "out")])
        assert {path.suffix for path in tmp_path.iterdir()} == {".pt"}
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="choose a new folder"):
        export.main([str(small), "--to", "timm", "--output", str(tmp_path / "there")])


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    path = built(tmp_path / "model.pt")
    free = [10**12]
    monkeypatch.setattr(export.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free[0]))

    def fills(loaded, folder):
        (folder / "half").write_bytes(b"half")
        free[0] = 0
        raise RuntimeError("an error of the writer's own")

    monkeypatch.setitem(export.FORMATS, "safetensors", Format(fills, "medslip"))
    with pytest.raises(OSError, match="could not write .*new: no space is left on its disk"):
        export.export([path], "safetensors", tmp_path / "new")
    with pytest.raises(OSError, match=r"0.0 GB free; the weights take"):  # told before anything is written
        export.export([path], "safetensors", tmp_path / "new")
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt"]
