"""The model card: what it says of the run, and that its own lines prepare images and captions as the model has them."""

import json
import shutil

import numpy as np
import pytest
import torch
import twins
from helpers import command
from huggingface_hub import ModelCard
from PIL import Image
from roco_tree import make_roco
from tokenizers import Tokenizer

import export
import main
import main_linear
import models
from exporting import card
from exporting.card import as_text
from exporting.parts import image_lines, token_lines, tokenizers_definition
from inputs.transforms import Preprocess, eval_view
from runtime.checkpoints import load_checkpoint
from runtime.logs import read_rows
from tokenizer import CLEANS, LibraryTokenizer, SimpleTokenizer, WordPieceTokenizer

NASTY = "x|y` ``<script>alert(1)</script>\n# heading [a](http://b.c) *bold*"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A training of two epochs."""
    folder = tmp_path_factory.mktemp("card")
    main.main(command(make_roco(folder / "roco"), folder / "run", "--caption-filter", "mammo-xray"))
    return folder / "run"


def card_of(checkpoint, folder, *flags):
    out = export.main([str(checkpoint), "--to", "safetensors", "--output", str(folder), *map(str, flags)])
    return (out / "README.md").read_text(encoding="utf8")


def write_result(folder, **result):
    folder.mkdir(parents=True)
    interval = {"value": 0.7123, "low": 0.65, "high": 0.77}
    given = {"dataset": "cbis_calc", "unit": "fraction", "metrics": {"auroc": interval}, "interval": {"level": 0.95}}
    (folder / "results.json").write_text(json.dumps(given | result))
    return folder


def test_the_card_says_what_the_run_says_and_no_more(run, tmp_path):
    tower = card.fingerprint(models.load_pretrained(str(run / "checkpoint.pt")))
    probe = write_result(tmp_path / "probe", settings={"weights_sha256": tower})
    text = card_of(run / "checkpoint.pt", tmp_path / "a", "--results", probe)
    pairs = json.loads((run / "settings.json").read_text())["derived"]["training_pairs"]
    assert f"`dataset roco, caption filter mammo-xray, {pairs} pairs`" in text and "71.23 (65.0 to 77.0)" in text
    assert "- Weights it started from: `fresh weights`.\n" in text and "SYNTHETIC" not in text
    title = "SLIP with vit_tiny_patch16_224 of other sizes"  # its towers are no SLIP_VITT16's
    assert f"\n# {title}\n" in text and f"{title}: image tower" in text and "SLIP_VITT16" not in text
    assert str(tmp_path) not in text and str(run) not in text
    front = ModelCard(text).data
    assert (front.license, front.library_name, front.datasets, front.metrics) == (
        "unknown", "medslip", ["roco"], ["auroc"]
    )  # fmt: skip
    (figure,) = front.eval_results
    assert figure.metric_value == 71.23 and "95% interval over patients 65.0 to 77.0" in figure.metric_name
    with pytest.raises(ValueError, match="holds no results.json"):
        card_of(run / "checkpoint.pt", tmp_path / "c", "--results", run.parent / "roco")
    foreign = write_result(tmp_path / "foreign", metrics={"auroc": {"value": 1}})
    with pytest.raises(ValueError, match="foreign/results.json is not what a run of this project writes"):
        card_of(run / "checkpoint.pt", tmp_path / "c", "--results", foreign)
    tuned = write_result(tmp_path / "tuned", settings={"data_set": "cbis_calc"})
    text = card_of(run / "checkpoint.pt", tmp_path / "e", "--results", tuned)
    assert "run `tuned`, after **fine-tuning end to end**, which changes the image tower: `AUROC` 71.23" in text
    assert not ModelCard(text).data.eval_results
    (run.parent / "README.txt").write_text("SYNTHETIC drawings\n")
    assert "SYNTHETIC" in card_of(run / "checkpoint.pt", tmp_path / "d")
    (run.parent / "README.txt").unlink()


def test_retrieval_on_a_card_is_that_of_the_weights_in_it(run, tmp_path):
    checkpoints, rows = sorted(run.glob("checkpoint_step*.pt")), read_rows(run / "log.jsonl", "epoch")
    assert len(checkpoints) == len(rows) == 2 and rows[0] != rows[1]
    for path, row in zip(checkpoints, rows, strict=True):
        assert load_checkpoint(path)["step"] == row["step"]
        text = card_of(path, tmp_path / path.stem)
        said = ", ".join(f"`{k.removeprefix('val_')}` {v:.4g}" for k, v in row.items() if k.startswith("val_"))
        assert f"Retrieval on the validation pairs, of these weights, recall (`r`) in percent: {said}." in text


def test_the_best_checkpoint_has_the_figures_of_its_own_epoch(run, tmp_path):
    """And not of the log's last row."""
    folder, first = tmp_path / "run", min(run.glob("checkpoint_step*.pt"))
    shutil.copytree(run, folder)
    shutil.copyfile(first, folder / "checkpoint_best.pt")
    before, last = read_rows(run / "log.jsonl", "epoch")
    text = card_of(folder / "checkpoint_best.pt", tmp_path / "out")
    assert f"`epoch 1 of 2, step {before['step']}; its run was finished`" in text
    differ = [k for k in before if k.startswith("val_") and before[k] != last[k]]
    assert differ and all(f"`{k.removeprefix('val_')}` {before[k]:.4g}" in text for k in differ)


@pytest.mark.parametrize("form, said", [
    ("onnx", "`image` (n, 3, 32, 32) float32 to `unit_vector` (n, 16) of length 1. text.onnx: `text` (n, 24) int64"),
    ("open-clip", "Needs `pip install open_clip_torch transformers`. Vectors (n, 16) of length 1"),
    ("timm", "features (n, 32), before any projection"),
    ("transformers", "The image tower alone is here: its features (n, 32) are not projected."),
])  # fmt: skip
def test_a_card_says_what_goes_in_and_what_comes_out(run, tmp_path, form, said):
    for package in {"onnx": ("onnx", "onnxscript"), "open-clip": ("open_clip",)}.get(form, ()):
        pytest.importorskip(package)
    out = export.main([str(run / "checkpoint.pt"), "--to", form, "--output", str(tmp_path / form)])
    text = (out / "README.md").read_text(encoding="utf8")
    assert said in text and str(tmp_path) not in text and f"folder = '{form}'" in text


def test_files_of_another_run_beside_a_checkpoint_are_not_its_own(run, tmp_path):
    """A checkpoint that was copied; its folder's files may be missing, a probe's, or another training's."""
    own = json.loads((run / "settings.json").read_text())
    probe = {"args": vars(main_linear.get_args_parser().parse_args([]))}
    for name, settings in {"alone": None, "probe": probe, "other": own | {"args": own["args"] | {"seed": 7}}}.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "c.pt").write_bytes((run / "checkpoint.pt").read_bytes())
        (folder / "log.jsonl").write_bytes((run / "log.jsonl").read_bytes())
        if settings:
            (folder / "settings.json").write_text(json.dumps(settings))
        text = card_of(folder / "c.pt", tmp_path / f"out {name}")
        assert "`dataset roco, caption filter mammo-xray`" in text and "| Seed | `0` |" in text
        assert "Retrieval on the validation pairs: not recorded." in text


def test_names_on_a_card_are_text_and_no_markup(run, tmp_path):
    probe = write_result(tmp_path / "a [b](c) <i>" / "p|q", dataset=NASTY, settings={"weights_sha256": "of another"})
    out = tmp_path / "it's `mine`"
    text = card_of(run / "checkpoint.pt", out, "--results", probe)
    assert f"- {as_text(NASTY)}, run `p\\|q`, of **another image tower**" in text
    assert not ModelCard(text).data.eval_results and not ModelCard(text).data.metrics  # a hub shows them as its own
    body = text.split("\n---\n", 1)[1]
    assert "\n# heading" not in body and f"folder = {out.name!r}" in body
    for line in body.splitlines():
        if "<script>" in line:  # within a span of code, whose fence is longer than any in it
            assert line.count("```") == 2 and line.index("```") < line.index("<script>") < line.rindex("```")


@pytest.mark.parametrize(
    "preprocess",
    [
        Preprocess(32), Preprocess((40, 24)),
        Preprocess(32, prepare="medclip"), Preprocess((40, 24), prepare="medclip"),
        Preprocess(32, prepare="cover", interpolation="bicubic", resize_to=37), Preprocess(32, prepare="squash"),
        Preprocess(32, prepare="cover", resize_to=37, floor=True),
        Preprocess(32, prepare="squash", resize_to=36, interpolation="lanczos"),
        Preprocess(32, prepare="fit", interpolation="bicubic", fill=114),
        Preprocess(32, prepare="fit", resize_to=29, fill=9),
    ],
    ids=str,
)  # fmt: skip
def test_the_cards_lines_prepare_an_image_as_the_model_has_it(preprocess):
    for image in (
        *twins.images(),
        Image.new("RGB", (20, 61), (200, 90, 10)),
        twins.images()[0].rotate(90, expand=True),
    ):
        names = {"np": np, "Image": Image, "image": image}
        exec("\n".join(image_lines(preprocess)), names)
        expected = eval_view(preprocess)(image, None)[None]
        torch.testing.assert_close(torch.from_numpy(names["pixels"]), expected, atol=2e-6, rtol=1e-5)


CAPTIONS = [
    *twins.CAPTIONS, "", "  two  spaces &amp;amp; an entity", "Ünïté's 3.5-cm_mass, don't!", "ﬁne “quotes” ï¿½ 你好",
    "a very long caption " * 30,
]  # fmt: skip


@pytest.mark.parametrize("kind", ["clip", "wordpiece", "cased", "library", "left", *CLEANS])
def test_the_cards_lines_give_the_ids_of_a_caption(kind, tmp_path):
    twins.word_pieces(tmp_path / "tokenizer")
    definition = (tmp_path / "tokenizer" / "tokenizer.json").read_text()
    vocab = sorted(json.loads(definition)["model"]["vocab"].items(), key=lambda item: item[1])
    tokenizer = {
        "clip": lambda: SimpleTokenizer(context_length=24),
        "wordpiece": lambda: WordPieceTokenizer([token for token, _ in vocab], 24),
        "cased": lambda: WordPieceTokenizer([token for token, _ in vocab], 24, lowercase=False),
        "left": lambda: LibraryTokenizer(definition, 24, pad_to="context", pad_side="left"),
        "library": lambda: LibraryTokenizer(definition, 24, pad_id=3),
    }.get(kind, lambda: LibraryTokenizer(definition, 24, clean=kind))()
    (tmp_path / "tokenizer.json").write_text(tokenizers_definition(tokenizer), encoding="utf8")
    lines = ["import html, string, ftfy", *token_lines(tokenizer, 24)]
    read = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for caption in CAPTIONS:
        names = {"np": np, "tokenizer": read, "caption": caption}
        exec("\n".join(lines), names)
        expected = tokenizer(caption)[0].tolist()
        expected += [getattr(tokenizer, "pad_id", 0)] * (24 - len(expected))
        assert names["tokens"][0].tolist() == expected, caption
