"""Models of open_clip, transformers and timm as towers: the same numbers as in their own library."""

import warnings

import numpy as np
import pytest
import timm
import torch
import transformers
import twins

import main
import models
from inputs.transforms import eval_view
from towers import library, pretrained, sources

LABELS = ["a mammogram of a mass", "chest radiograph"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Of each twin the folder, made once."""
    folder, done = tmp_path_factory.mktemp("twins"), {}
    makers = {"clip": twins.clip, "siglip": twins.siglip, "siglip2": twins.siglip2, "timm": twins.timm_tower}
    makers |= {"open_clip": twins.open_clip_pair, "biomedclip": lambda path: twins.open_clip_pair(path, "bert")}
    makers |= {kind: lambda path, kind=kind: twins.vision(kind, path) for kind in twins.VISION_KINDS}
    makers |= {kind: lambda path, kind=kind: twins.text(kind, path) for kind in ("bert", "roberta", "modernbert")}

    def of(kind):
        if kind not in done:
            done[kind] = makers[kind](folder / kind)
        return done[kind]

    return of


def batch_of(loaded):
    return torch.stack([eval_view(loaded.preprocess)(image, None) for image in twins.images()])


@pytest.mark.parametrize("kind", ["clip", "siglip", "siglip2"])
@torch.no_grad()
def test_a_pair_of_transformers_computes_what_it_computes_there(made, kind):
    loaded = models.load_pretrained(made(kind))
    theirs = transformers.AutoModel.from_pretrained(made(kind), dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(made(kind))
    padding = {"padding": True} if kind == "clip" else {"padding": "max_length", "max_length": 16}
    texts = tokenizer(LABELS, truncation=True, return_tensors="pt", **padding)
    texts = texts if kind == "clip" else {"input_ids": texts["input_ids"]}
    images = batch_of(loaded)
    seen = library.patches_of(images, 8) if kind == "siglip2" else {"pixel_values": images}
    out = theirs(**texts, **seen)
    expected = out.logits_per_image.softmax(-1) if kind == "clip" else out.logits_per_image.sigmoid()
    got = loaded.zero_shot(twins.images(), LABELS, ["{}"])
    assert np.abs(got - expected.double().numpy()).max() < 1e-5 and np.ptp(got) > 1e-3
    image, text = loaded.embed_images(twins.images()), loaded.embed_captions(LABELS)
    assert np.abs(image - out.image_embeds.numpy()).max() < 1e-5
    assert np.abs(text - out.text_embeds.numpy()).max() < 1e-5


@pytest.mark.parametrize("kind", twins.VISION_KINDS)
@torch.no_grad()
def test_an_image_tower_of_transformers_computes_what_it_computes_there(made, kind):
    loaded = models.load_pretrained(made(kind))
    theirs = transformers.AutoModel.from_pretrained(made(kind), dtype=torch.float32).eval()
    images = batch_of(loaded)
    out = theirs(pixel_values=images)
    expected = out.last_hidden_state[:, 0] if kind == "vit" else out.pooler_output
    got = loaded.model.visual(images)
    assert got.shape == expected.shape and (got - expected).abs().max() < 1e-5
    assert not loaded.model.objective.text and got.std(0).mean() > 1e-3


@pytest.mark.parametrize("kind", ["open_clip", "biomedclip"])
@torch.no_grad()
def test_a_pair_of_open_clip_computes_what_it_computes_there(made, kind, tmp_path):
    open_clip = pytest.importorskip("open_clip")
    folder = made(kind)
    loaded = models.load_pretrained(folder)
    if kind == "biomedclip":  # whose text tower is named by a hub's id, which open_clip asks for
        folder = twins.with_text_config(folder, tmp_path / "named")
    net, _, view = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    images = torch.stack([view(image) for image in twins.images()])
    assert (images - batch_of(loaded)).abs().max() < 1e-6
    image, text, scale = net.eval()(images, open_clip.get_tokenizer(f"local-dir:{folder}")(LABELS))[:3]
    expected = (scale * image @ text.T).softmax(-1)
    got = loaded.zero_shot(twins.images(), LABELS, ["{}"])
    assert np.abs(got - expected.double().numpy()).max() < 1e-5 and np.ptp(got) > 1e-3
    assert np.abs(loaded.embed_captions(LABELS) - text.numpy()).max() < 1e-5


@pytest.mark.parametrize(
    "kind, size, own", [("open_clip", 48, 32), ("open_clip", (48, 24), 32), ("biomedclip", 96, 160)]
)
@torch.no_grad()
def test_a_pair_of_open_clip_takes_another_image_size_as_it_does_there(made, kind, size, own, tmp_path):
    """Position embeddings are those of its own force_image_size, and back at its own size by and large the old."""
    open_clip = pytest.importorskip("open_clip")
    loaded = models.load_pretrained(made(kind), image_size=size)
    named = twins.with_text_config(made(kind), tmp_path / "named") if kind == "biomedclip" else made(kind)
    net, _ = open_clip.create_model_from_pretrained(f"local-dir:{named}", force_image_size=size)
    images = batch_of(loaded)
    assert images.shape[2:] == (size if isinstance(size, tuple) else (size, size))
    expected = net.eval().encode_image(images)
    assert (loaded.model.encode_image(images) - expected).abs().max() < 1e-5 and expected.std(0).mean() > 1e-3
    found = sources.read_source(made(kind))  # as a training starts
    model = models.create_model("CLIP", **{**found.config, "image_size": size})
    sources.load(found, model)
    assert (model.eval().encode_image(images) - expected).abs().max() < 1e-5
    assert models.at_size(loaded.model, own).visual(torch.rand(1, 3, own, own)).isfinite().all()


def test_an_image_size_that_a_tower_of_open_clip_cannot_take_says_why(made):
    pytest.importorskip("open_clip")
    with pytest.raises(ValueError, match="patches of 8 pixels, which 44 pixels are no multiple of"):
        models.load_pretrained(made("open_clip"), image_size=44)
    settings = dict(
        embed_dim=8, vision_cfg=dict(layers=[1, 1, 1, 1], width=16, image_size=64, patch_size=None),
        text_cfg=dict(width=16, heads=2, layers=1),
    )  # fmt: skip
    assert library.build_image_tower("open-clip:", settings, 64)[1] == 8
    with pytest.raises(ValueError, match="attention over the positions of 64 pixels, and takes no images of 96"):
        library.build_image_tower("open-clip:", settings, 96)


@pytest.mark.parametrize("kind", ["clip", "bert", "biomedclip", "dinov2"])
def test_gradient_checkpointing_is_asked_for_by_its_name_of_today(made, kind):
    """transformers 5.24 warns of the older name."""
    found = sources.read_source(made(kind))
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        if found.has_image:
            model = models.create_model("CLIP" if found.has_text else "SIMCLR", **found.config, ssl_mlp_dim=8)
            model.checkpoint_gradients()
            parts = [model.visual, *([model.text_tower] if found.has_text else [])]
        else:
            tower = library.HFTextTower(found.config["text_kwargs"])
            tower.set_grad_checkpointing()
            parts = [tower]
    theirs = [m for part in parts for m in part.modules() if isinstance(m, transformers.PreTrainedModel)]
    assert theirs and all(m.is_gradient_checkpointing for m in theirs)


@pytest.mark.parametrize("kind", ["timm", "dinov2", "vit"])
def test_a_pair_starts_from_an_image_tower_alone_beside_a_fresh_text_tower(made, kind, caplog):
    flags = [
        "--model",
        "SLIP",
        "--init",
        str(made(kind)),
        "--override",
        "text_layers=1",
        "text_width=64",
        "text_heads=2",
    ]
    with caplog.at_level("INFO"):
        model, tokenizer = main.build_model(main.get_args_parser().parse_args(flags))
    assert "the text tower, CLIP's, starts from fresh weights: --text-weights gives it others" in caplog.text
    alone = models.load_pretrained(made(kind))
    images = batch_of(alone)
    with torch.inference_mode():
        assert (model.eval().visual(images) - alone.model.visual(images)).abs().max() < 1e-6
        assert model.encode_text(tokenizer(LABELS)).shape == model.encode_image(images)[:2].shape


@pytest.mark.parametrize("kind", ["clip", "open_clip"])
def test_simclr_takes_the_image_tower_of_a_pair(made, kind):
    model, tokenizer = main.build_model(
        main.get_args_parser().parse_args(["--model", "SIMCLR", "--init", str(made(kind))])
    )
    whole = models.load_pretrained(made(kind))
    images = batch_of(whole)
    with torch.inference_mode():
        assert (model.eval().visual(images) - whole.model.visual(images)).abs().max() < 1e-6
    assert tokenizer is None and model.preprocess == whole.preprocess


@torch.no_grad()
def test_a_tower_of_timm_computes_what_it_computes_there(made):
    loaded = models.load_pretrained(made("timm"))
    theirs = timm.create_model(f"local-dir:{made('timm')}", pretrained=True, num_classes=0).eval()
    view = timm.data.create_transform(**timm.data.resolve_model_data_config(theirs))
    images = torch.stack([view(image) for image in twins.images()])
    assert (images - batch_of(loaded)).abs().max() < 1e-6
    assert (loaded.model.visual(images) - theirs(images)).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["clip", "siglip", "vit", "dinov2", "convnext"])
def test_images_are_prepared_as_their_processor_does_it(made, kind):
    """To two levels of 256: transformers resizes tensors, Pillow rounds in between."""
    loaded = models.load_pretrained(made(kind))
    theirs = transformers.AutoImageProcessor.from_pretrained(made(kind))
    expected = theirs(twins.images(), return_tensors="pt")["pixel_values"]
    apart = (batch_of(loaded) - expected).abs() * torch.tensor(loaded.preprocess.std).view(3, 1, 1) * 255
    assert apart.max() < 2.01 and apart.mean() < 0.6


@pytest.mark.parametrize("kind", ["bert", "roberta", "modernbert"])
@torch.no_grad()
def test_a_text_tower_is_the_mean_over_a_captions_own_tokens(made, kind):
    found = sources.read_source(made(kind))
    model = models.create_model("CLIP_VITT16", image_size=32, vision_kwargs={"depth": 1}, **found.config)
    sources.load(found, model.eval())
    theirs = transformers.AutoModel.from_pretrained(made(kind), dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(made(kind))
    tokens = found.tokenizer(twins.CAPTIONS)
    for i, caption in enumerate(twins.CAPTIONS):  # one by one: no padding at all
        hidden = theirs(input_ids=torch.tensor([tokenizer(caption)["input_ids"][:24]])).last_hidden_state
        expected = hidden.mean(1) @ model.text_projection
        assert (model.encode_text(tokens)[i] - expected[0]).abs().max() < 1e-5


LEARNS = {
    "clip": "text_projection", "open_clip": "text_tower.model.text_projection",
    "biomedclip": "text_tower.model.proj.0.weight",
}  # fmt: skip


@pytest.mark.parametrize("kind", LEARNS)
def test_a_frozen_text_towers_projection_keeps_learning(made, kind):
    model = models.load_pretrained(made(kind)).model.requires_grad_(True)
    model.freeze("text")
    text = {name for name, value in model.named_parameters() if name.startswith("text") and value.requires_grad}
    assert LEARNS[kind] in text and all("proj" in name for name in text)


def test_a_file_of_a_model_is_not_taken_from_its_preparation(made):
    """timm's own record of the tower's name says another mean than the folder does."""
    folder = made("biomedclip")
    with pytest.raises(ValueError, match=f"says how images are prepared: --vision-weights {folder}"):
        pretrained.vision_data("test_vit", folder / "open_clip_pytorch_model.bin")


def built(*flags):
    return main.build_model(main.get_args_parser().parse_args(["--vision-tower", "test_vit", *map(str, flags)]))


@pytest.mark.parametrize("kind, length", [("bert", 100), ("roberta", 30), ("modernbert", 8)])
@torch.no_grad()
def test_a_context_length_reaches_the_tokenizer_of_a_librarys_text_tower(made, kind, length):
    """Folders that say 24 tokens; what is read is compared with transformers' own, caption by caption."""
    model, tokenizer = built("--model", "CLIP", "--text-weights", made(kind), "--context-length", length)
    caption = " ".join(twins.CAPTIONS)
    tokens = tokenizer([caption])
    assert tokens.shape[1] <= length and (tokens.shape[1] > 24) == (length > 24)
    ids = transformers.AutoTokenizer.from_pretrained(made(kind))(caption, truncation=True, max_length=length)
    assert tokens[0].tolist() == ids["input_ids"]
    theirs = transformers.AutoModel.from_pretrained(made(kind), dtype=torch.float32).eval()
    hidden = theirs(input_ids=tokens).last_hidden_state
    assert (model.eval().encode_text(tokens) - hidden.mean(1) @ model.text_projection).abs().max() < 1e-5


def test_a_context_length_beyond_a_text_towers_positions_says_how_many_there_are(made):
    for kind, longest in (("bert", 512), ("roberta", 38), ("modernbert", 40)):
        flags = ("--model", "CLIP", "--text-weights", made(kind), "--context-length")
        assert built(*flags, longest)[1].context_length == longest
        with pytest.raises(ValueError, match=f"has positions for {longest} tokens, .*context of {longest + 1}"):
            built(*flags, longest + 1)


@torch.no_grad()
def test_a_context_length_of_a_pair(made):
    pytest.importorskip("open_clip")
    for kind, length in (("biomedclip", 100), ("clip", 12)):
        parser = main.get_args_parser()
        args = parser.parse_args(["--model", "CLIP", "--init", str(made(kind)), "--context-length", str(length)])
        model, tokenizer = main.build_model(args)
        assert tokenizer.context_length == length and tokenizer(LABELS).shape[1] <= length
        usual = models.load_pretrained(made(kind))  # captions that are shorter than either mean the same
        found = torch.nn.functional.normalize(model.eval().encode_text(tokenizer(LABELS)), dim=-1)
        assert np.abs(found.numpy() - usual.embed_captions(LABELS)).max() < 1e-5
    args = main.get_args_parser().parse_args(
        ["--model", "CLIP", "--init", str(made("open_clip")), "--context-length", "32"]
    )
    with pytest.raises(ValueError, match="text tower reads rows of 77 tokens, no context of 32"):
        main.build_model(args)


@pytest.mark.parametrize("name", ["SLIP", "CLIP_VITB16", "MEDCLIP_VIT"])
@pytest.mark.parametrize("image, text", [("open_clip", "bert"), ("biomedclip", "roberta"), ("clip", "bert"),
                                         ("siglip", "biomedclip"), ("open_clip", "biomedclip")])  # fmt: skip
@torch.no_grad()
def test_the_image_tower_of_a_pair_beside_another_models_text_tower(made, name, image, text):
    """In embeddings of one width, that in which a tower ends by itself."""
    pytest.importorskip("open_clip")
    flags = ["--model", name, "--vision-weights", str(made(image)), "--text-weights", str(made(text))]
    args = main.get_args_parser().parse_args([*flags, "--ssl-mlp-dim", "8"])
    if image == "siglip":  # of width 32, the text tower of 20
        with pytest.raises(ValueError, match="image tower of .*siglip gives embeddings of 32 numbers.*20: beside it"):
            main.build_model(args)
        return
    model, tokenizer = main.build_model(args)
    images = batch_of(models.load_pretrained(made(image)))
    model.eval()
    assert model.encode_image(images).shape == (3, 20) and model.encode_text(tokenizer(LABELS)).shape == (2, 20)
    assert (model.visual(images) - models.load_pretrained(made(image)).model.visual(images)).abs().max() < 1e-6
