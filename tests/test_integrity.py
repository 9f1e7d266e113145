"""Twenty flipped bits and twenty truncations of every kind of file that this project writes and reads again.

Each is refused by name, or replaced where what it holds can be made again, or what is read is what was written: a flip
may hit bytes that nobody reads, such as the date of an archive's member.
"""

import hashlib
import json

import evaluation_helpers
import numpy as np
import pytest
import torch
from source_tree import make_redcaps

import datasets
import export
import models
import predict
from distributed import Processes
from evaluation import downstream, features, heads
from inputs.transforms import eval_view
from runtime import checkpoints, integrity
from towers import prompts

CHANGES = 20  # of each of the two sorts


def digest(values):
    """Of arrays, tensors and plain values, in dictionaries within dictionaries."""
    found = hashlib.sha256()
    for key, value in sorted(values.items(), key=str):
        plain = digest(value) if isinstance(value, dict) else repr(value)
        tensor = isinstance(value, (np.ndarray, torch.Tensor))
        found.update(str(key).encode() + (np.asarray(value).tobytes() if tensor else plain.encode()))
    return found.hexdigest()


def checkpoint(folder):
    path = folder / "checkpoint.pt"
    evaluation_helpers.write_checkpoint(path)
    return path, lambda: digest(checkpoints.load_checkpoint(path))


def head(folder):
    rng, path = np.random.default_rng(0), folder / "head.safetensors"
    layer = heads.Linear(*(rng.normal(size=size).astype(np.float32) for size in (40, 40, (40, 3), 3)))
    heads.save_heads(path, [layer], {"classes": ["a", "b", "c"], "tower": {"vision_kwargs": {"depth": 12}}})

    def read():
        (found,), about = heads.load_heads(path)
        return digest({**vars(found), **about})

    return path, read


def exported(name):
    def make(folder):
        evaluation_helpers.write_checkpoint(folder / "checkpoint.pt")
        out = export.export([folder / "checkpoint.pt"], "safetensors", folder / "export")

        def read():
            loaded = models.load_pretrained(out)
            spec = loaded.tokenizer and loaded.tokenizer.spec()
            about = {"preprocess": loaded.preprocess, "tokenizer": spec, "config": loaded.model.config}
            return digest({**loaded.model.state_dict(), **about})

        return out / name, read

    return make


def bank(folder):
    evaluation_helpers.write_checkpoint(folder / "checkpoint.pt")
    captions, path = folder / "captions.txt", folder / "bank.npz"
    captions.write_text("".join(f"a chest with finding {i}\n" for i in range(40)))
    predict.main(["embed", str(folder / "checkpoint.pt"), "--captions", str(captions), "--output", str(path)])
    return path, lambda: digest(integrity.read_arrays(path))


def index(folder):
    make_redcaps(folder, "images")
    rows = [{"image_id": "abc1", "caption": f"the caption {i} of it", "subreddit": "itap"} for i in range(200)]
    (folder / "redcaps_v1.json").write_text(json.dumps(rows))

    def read():
        reader = datasets.create_reader("redcaps", folder)
        return digest({i: [reader.captions(i), str(reader.image(i).size)] for i in range(len(reader))})

    read()
    (path,) = folder.glob("*.index")
    return path, read


def features_cache(folder):
    evaluation_helpers.write_checkpoint(folder / "checkpoint.pt")
    backbone = features.load_backbone(folder / "checkpoint.pt")
    pixels = np.random.default_rng(0).integers(0, 255, (12, 40, 40, 3), dtype=np.uint8)
    images = downstream.ImageArray(pixels, ["a"], np.zeros(12), eval_view(backbone.preprocess))

    def read():
        found, numbers = features.extract_or_reuse(backbone, images, "train", features.Loading(), folder / "features")
        return digest({"features": found.round(5), "numbers": numbers})

    read()
    (path,) = (folder / "features").glob("*.npz")
    return path, read


def text_cache(folder):
    evaluation_helpers.write_checkpoint(folder / "checkpoint.pt")
    loaded, cpu = models.load_pretrained(folder / "checkpoint.pt"), torch.device("cpu")
    cache = prompts.TextCache.of(loaded.model, Processes(), folder)

    def read():
        names = [f"finding {i}" for i in range(40)]
        found = prompts.zeroshot_classifier(loaded.model, loaded.tokenizer, names, ["a {}"], cpu, cache=cache)
        return digest({"classifier": found})

    read()
    (path,) = folder.glob("text_*.npz")
    return path, read


REFUSED = [checkpoint, head, bank, exported("model.safetensors"), exported("config.json")]
MADE_AGAIN = [index, features_cache, text_cache]


def changes(whole, rng):
    """What a disk or a copy makes of a file."""
    for place in rng.integers(0, len(whole), CHANGES):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << rng.integers(8)
        yield bytes(flipped)
    for length in rng.integers(0, len(whole), CHANGES):
        yield whole[:length]


NAMES = ["checkpoint", "head", "bank", "export's weights", "export's settings"]


@pytest.mark.parametrize("make", REFUSED, ids=NAMES)
def test_a_damaged_file_is_refused_by_name(make, tmp_path):
    path, read = make(tmp_path)
    whole, expected, refused = path.read_bytes(), read(), 0
    for damaged in changes(whole, np.random.default_rng(0)):
        path.write_bytes(damaged)
        try:
            assert read() == expected
        except ValueError as error:
            assert path.name in str(error) or str(path.parent) in str(error), error
            refused += 1
    assert refused >= 2 * CHANGES - 4  # the rest hit what nobody reads
    path.write_bytes(whole)
    assert read() == expected


@pytest.mark.parametrize("make", MADE_AGAIN, ids=["index", "features", "classifier"])
def test_what_can_be_made_again_is_and_the_log_says_so(make, tmp_path, caplog):
    path, read = make(tmp_path)
    whole, expected, said = path.read_bytes(), read(), 0
    for damaged in changes(whole, np.random.default_rng(0)):
        path.write_bytes(damaged)
        caplog.clear()
        assert read() == expected
        said += any(str(path) in message for message in caplog.messages)
    assert said >= 2 * CHANGES - 4


def test_the_checkpoint_before_a_damaged_one_is_used(tmp_path, caplog):
    caplog.set_level("INFO", "medslip")
    for step in (1, 2):
        state = {"step": step, "weights": torch.randn(100)}
        checkpoints.save_training_checkpoint(state, tmp_path, step, False, keep_last=2)
    newest = tmp_path / "checkpoint_step00000002.pt"
    damaged = bytearray(newest.read_bytes())
    place = damaged.index(state["weights"].numpy().tobytes()) + 200
    damaged[place] ^= 1
    newest.write_bytes(damaged)
    found = checkpoints.find_training_checkpoint(tmp_path)
    assert found is not None and found["step"] == 1
    assert "checkpoint_step00000002.pt is damaged" in caplog.text and "checkpoint_step00000001.pt" in caplog.text


def test_files_of_earlier_versions_have_no_seal_and_are_read(tmp_path, monkeypatch):
    path, read = head(tmp_path)
    sealed = read()
    monkeypatch.setattr(heads, "SEAL", "note")
    monkeypatch.setattr(heads, "seal", lambda data: None)
    path, read = head(tmp_path)
    assert read() == sealed


def test_an_archive_without_checksums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        checkpoints.save_checkpoint({"a": torch.arange(3)}, tmp_path / "c.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert checkpoints.load_checkpoint(tmp_path / "c.pt")["a"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_that_are_no_numbers_are_refused(tmp_path, value, dtype):
    weights = torch.zeros(1000, dtype=dtype)
    weights[700] = value
    checkpoints.save_checkpoint({"state_dict": {"visual.w": weights}}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match=r"c\.pt is of no use: visual\.w holds (NaN|infinity)"):
        checkpoints.load_checkpoint(tmp_path / "c.pt")
    mask = torch.full((2, 2), -float("inf")).triu(1)
    checkpoints.save_checkpoint({"state_dict": {"attn_mask": mask, "empty": torch.zeros(0)}}, tmp_path / "c.pt")
    checkpoints.load_checkpoint(tmp_path / "c.pt")


def test_answers_that_are_no_numbers_are_refused(tmp_path):
    """Weights that are numbers, and products that are none."""
    evaluation_helpers.write_checkpoint(tmp_path / "c.pt")
    loaded = models.load_pretrained(tmp_path / "c.pt")
    image, images = (
        np.zeros((40, 40), np.uint8),
        downstream.ImageArray(np.zeros((3, 40, 40), np.uint8), ["a", "b"], np.zeros(3), eval_view(loaded.preprocess)),
    )
    backbone = features.Backbone(loaded.model.encode_image, loaded.model, loaded.preprocess, "projection", "it")
    loaded.model.image_projection.data.fill_(3e38)
    loaded.model.text_projection.data.fill_(3e38)
    for what, ask in {
        "an image": lambda: loaded.embed_images([image]),
        "a caption": lambda: loaded.embed_captions(["ct"]),
        "a prompt": lambda: loaded.label_probabilities(np.eye(1, loaded.model.config["embed_dim"]), ["ct", "mri"]),
        "image 0": lambda: features.extract(backbone, images, "", features.Loading()),
    }.items():
        with torch.no_grad(), pytest.raises(ValueError, match=f"a tower answers {what} with NaN or infinity"):
            ask()


def test_arrays_of_any_shape_come_back_as_numpy_reads_them_and_the_file_stays_as_it_is(tmp_path):
    path, packed = tmp_path / "a.npz", tmp_path / "b.npz"
    arrays = {"m": np.arange(12.0).reshape(3, 4), "f": np.asfortranarray(np.eye(3)), "none": np.zeros((0, 4)),
              "one": np.array("ä"), "names": np.array(["a", "bc"]), "a.npy": np.arange(3)}  # fmt: skip
    np.savez(path, allow_pickle=False, **arrays)
    np.savez_compressed(packed, allow_pickle=False, **arrays)
    before = path.read_bytes()
    for file in (path, packed):
        found = integrity.read_arrays(file)
        with np.load(file, allow_pickle=False) as expected:
            assert found.keys() == set(expected.files)
            for name in expected.files:
                assert found[name].dtype == expected[name].dtype and np.array_equal(found[name], expected[name]), name
        found["m"][0, 0] = 7
    assert path.read_bytes() == before and integrity.read_arrays(path)["m"][0, 0] == 0
