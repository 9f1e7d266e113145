"""Folders of other libraries that say something else than most do: read as their library reads them, or refused."""

import json
import string

import numpy as np
import pytest
import timm
import torch
import transformers
import twins

import models
from towers import library, pretrained, sources

TRICKY = [
    "A mammogram, LEFT breast: 3 cm mass_2 (S/P biopsy) & more.", "", "  two   blanks ", "naïve “quotes” – Ärzte",
    "a cyst " * 30,
]  # fmt: skip


def rewrite(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.fixture
def pieces(tmp_path):
    """SigLIP as it is published: the words lie in a model of sentencepiece, read by transformers' own class."""
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    folder = twins.siglip(tmp_path / "siglip")
    (folder / "tokenizer.json").unlink()
    text = tmp_path / "captions.txt"
    text.write_text("\n".join([*twins.CAPTIONS * 20, string.ascii_lowercase + " 0123456789 ct mri lesion biopsy"]))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "spiece"), vocab_size=120, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    said = dict(
        tokenizer_class="SiglipTokenizer", do_lower_case=True, model_max_length=16, model_input_names=["input_ids"]
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(said | dict.fromkeys(("pad_token", "eos_token"), "</s>")))
    return folder


def test_siglips_own_tokenizer_gives_its_ids_and_needs_no_sentencepiece_later(pieces, tmp_path):
    found = sources.read_source(pieces)
    theirs = transformers.AutoTokenizer.from_pretrained(pieces)
    assert type(theirs).__name__ == "SiglipTokenizer"
    for text in (*TRICKY, *twins.CAPTIONS):
        wanted = theirs(text, padding="max_length", truncation=True, max_length=16)["input_ids"]
        assert found.tokenizer(text)[0].tolist() == wanted
    loaded = models.load_pretrained(pieces)
    net = transformers.SiglipModel.from_pretrained(pieces).eval()
    ids = theirs(TRICKY, padding="max_length", truncation=True, max_length=16, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = torch.nn.functional.normalize(net.text_model(ids).pooler_output, dim=-1).numpy()
    np.testing.assert_allclose(loaded.embed_captions(TRICKY), expected, atol=1e-5)
    assert "sentencepiece" not in json.dumps(found.tokenizer.spec())[:200]


def test_without_sentencepiece_the_package_is_named(pieces, monkeypatch):
    def refuse(*args, **options):
        raise ImportError("SiglipTokenizer requires the SentencePiece library but it was not found")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", refuse)
    with pytest.raises(ValueError, match="holds no tokenizer .*: pip install sentencepiece"):
        sources.read_source(pieces)


@pytest.mark.parametrize("clean", ["canonicalize", "lower", "whitespace"])
def test_open_clips_cleaning_of_captions_comes_before_the_tokenizer(clean, tmp_path):
    open_clip = pytest.importorskip("open_clip")
    folder = twins.open_clip_pair(tmp_path / "pair", "bert")
    written = json.loads((folder / "open_clip_config.json").read_text())
    written["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"clean": clean}
    (folder / "open_clip_config.json").write_text(json.dumps(written))
    theirs = open_clip.tokenizer.HFTokenizer(str(folder), context_length=24, clean=clean)
    assert torch.equal(sources.read_source(folder).tokenizer(TRICKY), theirs(TRICKY))


@pytest.mark.parametrize("kind", ["clip", "siglip", "bert", "roberta", "modernbert"])
def test_a_folder_without_words_is_refused(kind, tmp_path):
    folder = getattr(twins, kind)(tmp_path / kind) if kind in ("clip", "siglip") else twins.text(kind, tmp_path / kind)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=f"{kind} holds no tokenizer: none of tokenizer.json, vocab.json with merges"):
        sources.read_source(folder)


def test_a_text_tower_whose_kind_nobody_says_is_no_bert(tmp_path, caplog):
    pytest.importorskip("open_clip")
    folder = twins.open_clip_pair(tmp_path / "pair", "bert")
    with caplog.at_level("WARNING", logger="medslip"):
        sources.read_source(folder)
    assert "no configuration of its text tower, some/where: taken for a BERT" in caplog.text
    file = folder / "open_clip_pytorch_model.bin"
    state = torch.load(file, weights_only=True)
    key = "text.transformer.embeddings.position_embeddings.weight"
    torch.save({**state, key: torch.cat([state[key], state[key][:2]])}, file)  # as a RoBERTa has it
    with pytest.raises(
        ValueError, match="configuration of its text tower, some/where, is neither there nor in a cache"
    ):
        sources.read_source(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"do_rescale": False}, "not scaled to 1"),
        ({"resample": 4}, "Pillow's filter 4, which is not known here"),
        ({"size": {"shortest_edge": 36, "longest_edge": 40}}, "no preparation that is known"),
        ({"image_mean": None}, "does not say by which image_mean"),
    ],
)
def test_preparations_that_are_not_known_are_refused(change, message, tmp_path):
    folder = twins.clip(tmp_path / "clip")
    rewrite(folder / "preprocessor_config.json", **change)
    with pytest.raises(ValueError, match=message):
        sources.read_source(folder)


def test_one_mean_for_all_channels_is_that_of_each(tmp_path):
    folder = twins.clip(tmp_path / "clip")
    rewrite(folder / "preprocessor_config.json", image_mean=0.5, image_std=0.25)
    preprocess = sources.read_source(folder).preprocess
    assert (preprocess.mean, preprocess.std) == ((0.5,) * 3, (0.25,) * 3)


@pytest.mark.parametrize("kind, other", [("bert", 5), ("roberta", 0), ("modernbert", 9), ("bert", None)])
def test_padding_has_the_id_that_the_towers_mask_leaves_out(kind, other, tmp_path):
    folder = twins.text(kind, tmp_path / "text")
    rewrite(folder / "config.json", pad_token_id=other)
    found = sources.read_source(folder)
    model = models.create_model("CLIP_VITT16", image_size=32, vision_kwargs={"depth": 1}, **found.config).eval()
    sources.load(found, model)
    with torch.no_grad():
        together = model.encode_text(found.tokenizer(twins.CAPTIONS))
        alone = torch.cat([model.encode_text(found.tokenizer(text)) for text in twins.CAPTIONS])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_siglips_text_tower_alone_reads_the_whole_length(tmp_path):
    pair = twins.siglip(tmp_path / "pair")
    config = transformers.SiglipModel.from_pretrained(pair)
    config.text_model.save_pretrained(tmp_path / "text")
    written = json.loads((tmp_path / "text" / "config.json").read_text())
    assert written["model_type"] == "siglip_text_model"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "text" / name).write_text((pair / name).read_text())
    assert sources.read_source(tmp_path / "text").tokenizer("a cyst").shape == (1, 16)


def test_weights_that_the_configuration_has_no_place_for_are_refused(tmp_path, caplog):
    folder = twins.vision("vit", tmp_path / "vit")
    layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    rewrite(folder / "config.json", num_hidden_layers=layers - 1)
    with pytest.raises(ValueError, match="tensors have no place in its config.json's model, first "):
        sources.read_source(folder)
    rewrite(folder / "config.json", num_hidden_layers=layers, intermediate_size=48)
    with pytest.raises(ValueError, match=r"vit: .*fc1.bias is \(64,\), where its config.json says \(48,\)"):
        sources.read_source(folder)
    head = transformers.ViTForImageClassification(transformers.ViTConfig(**twins.VISION))
    head.save_pretrained(tmp_path / "classifier")
    twins.processor(tmp_path / "classifier", "ViTImageProcessor", size={"height": 32, "width": 32})
    with caplog.at_level("INFO", logger="medslip"):
        sources.read_source(tmp_path / "classifier")
    assert "classifier.bias, classifier.weight" in caplog.text


@pytest.mark.parametrize("kind, change, message", [
    ("siglip_vision_model", {"vision_use_head": False}, "no head that pools"),
    ("vit", {"num_channels": 1}, "images of 1 channels"),
])  # fmt: skip
def test_towers_that_give_or_take_something_else_are_refused(kind, change, message):
    with pytest.raises(ValueError, match=message):
        library.HFImageTower({"model_type": kind, **twins.VISION, **change}, 32)


def test_a_swin_v2_keeps_the_windows_that_its_positions_were_learnt_in(tmp_path):
    sizes = dict(image_size=64, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=16)
    config = transformers.Swinv2Config(**sizes, pretrained_window_sizes=[8, 8])
    model = twins._randomised(transformers.Swinv2Model(config))
    model.save_pretrained(tmp_path)
    twins.processor(tmp_path, "ViTImageProcessor", size={"height": 64, "width": 64})
    loaded = models.load_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(loaded.model.visual(pixels), model(pixels).pooler_output, atol=1e-5, rtol=1e-5)


def test_older_folders_of_timm_have_their_data_at_the_top(tmp_path):
    folder = twins.timm_tower(tmp_path / "timm")
    written = json.loads((folder / "config.json").read_text())
    data = {
        **written["pretrained_cfg"],
        "architecture": "test_vit",
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
        "crop_pct": 1.0,
    }
    (folder / "config.json").write_text(json.dumps(data))
    preprocess = sources.read_source(folder).preprocess
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True)
    wanted = timm.data.resolve_model_data_config(theirs)
    assert (tuple(preprocess.mean), tuple(preprocess.std)) == (tuple(wanted["mean"]), tuple(wanted["std"]))
    assert tuple(wanted["mean"]) == (0.1, 0.2, 0.3) == tuple(pretrained.vision_data("test_vit", folder)["mean"])


@pytest.mark.parametrize("data, message", [
    ({"crop_mode": "border", "mean": [0.1, 0.2, 0.3]}, "pads each channel with its own mean"),
    ({"crop_mode": "tiles"}, "crop_mode 'tiles' is not known here; choose from center, squash, border"),
])  # fmt: skip
def test_what_timm_does_otherwise_is_refused(data, message, tmp_path):
    folder = twins.timm_tower(tmp_path / "timm")
    written = json.loads((folder / "config.json").read_text())
    rewrite(folder / "config.json", pretrained_cfg={**written["pretrained_cfg"], **data})
    with pytest.raises(ValueError, match=message):
        sources.read_source(folder)


def test_a_tower_of_open_clip_has_the_size_of_its_images(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    folder = twins.open_clip_pair(tmp_path / "pair")
    written = json.loads((folder / "open_clip_config.json").read_text())
    written["preprocess_cfg"] |= {"size": 48, "crop_pct": 1.0, "mean": None}
    (folder / "open_clip_config.json").write_text(json.dumps(written))
    _, _, view = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    preprocess = sources.read_source(folder).preprocess
    assert preprocess.size == 32 and view(twins.images()[0]).shape == (3, 32, 32)
    assert preprocess.mean == pytest.approx(open_clip.OPENAI_DATASET_MEAN)
    written["preprocess_cfg"]["resize_mode"] = "tiles"
    (folder / "open_clip_config.json").write_text(json.dumps(written))
    with pytest.raises(ValueError, match="resize_mode 'tiles' is none of shortest, squash, longest"):
        sources.read_source(folder)
    (folder / "open_clip_config.json").write_text(json.dumps({"preprocess_cfg": {}}))
    with pytest.raises(ValueError, match="open_clip_config.json has no model_cfg with a vision_cfg and a text_cfg"):
        sources.read_source(folder)


def test_a_tokenizer_that_cuts_the_beginning_is_refused(tmp_path):
    folder = twins.text("bert", tmp_path / "bert")
    rewrite(folder / "tokenizer_config.json", truncation_side="left")
    with pytest.raises(ValueError, match="cuts the beginning of a long caption"):
        sources.read_source(folder)


@pytest.mark.parametrize("given, lower", [({}, True), ({"lowercase": False}, False), ({"strip_accents": False}, None),
                                          ({"handle_chinese_chars": False}, None)])  # fmt: skip
def test_a_berts_captions_are_split_as_its_tokenizer_says_or_it_is_refused(given, lower, tmp_path):
    folder = twins.text("bert", tmp_path / "bert")
    written = json.loads((folder / "tokenizer.json").read_text())
    rewrite(folder / "tokenizer.json", normalizer={**written["normalizer"], **given})
    rewrite(folder / "config.json", intermediate_size=128)  # four times as wide inside
    if lower is None:
        with pytest.raises(ValueError, match="no BERT whose captions are split as the text tower's"):
            pretrained.read_bert(folder)
    else:
        assert pretrained.read_bert(folder)["tokenizer"]["lowercase"] is lower


def test_no_other_setting_of_weights_is_kept():
    given = {"pretrained_window_sizes": [8, 8], "pretrained": True, "pretrained_cfg": {"url": "x"}, "hub_id": "y"}
    assert library.plain_settings(given) == {"pretrained_window_sizes": [8, 8]}
