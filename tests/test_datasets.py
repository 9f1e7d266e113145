"""Samples and batches of training: what they depend on, and what happens to images that cannot be read."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import command, weights
from PIL import Image
from source_tree import LARGE, PREPROCESS, make_coco, roco_folder, save_jpeg
from torch.utils.data import DataLoader
from view_helpers import SslView, TrainView

import main
from datasets import Collate, ContrastiveDataset, EvalPairs, GlobalBatchSampler, UnreadableImages, create_reader
from inputs.images import UnreadableImage, read_image
from inputs.transforms import Preprocess, eval_view
from tokenizer import SimpleTokenizer


@pytest.fixture
def reader(tmp_path):
    captions = {f"ROCO_{i:05d}": f"caption {i}" for i in range(12)}
    folder = roco_folder(tmp_path / "train" / "radiology", captions)
    rng = np.random.default_rng(0)
    for key in captions:
        pixels = rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{key}.jpg")
    return create_reader("roco", tmp_path)


INPUTS = ("image", "text", "view1", "view2")


def test_a_sample_depends_on_seed_epoch_and_index_alone(reader):
    samples = ContrastiveDataset(reader, INPUTS, PREPROCESS, seed=3)
    first = samples[2, 5]
    assert first["index"] == 5 and first["text"] == "caption 5"
    assert torch.equal(first["view1"], ContrastiveDataset(reader, INPUTS, PREPROCESS, 3)[2, 5]["view1"])
    assert not torch.equal(first["view1"], first["view2"])
    for other in (samples[1, 5], ContrastiveDataset(reader, INPUTS, PREPROCESS, 4)[2, 5]):
        assert not torch.equal(first["image"], other["image"])
        assert not torch.equal(first["view2"], other["view2"])


def test_a_sample_holds_the_views_of_its_objective(reader):
    sample = ContrastiveDataset(reader, INPUTS, PREPROCESS, seed=3)[2, 5]
    rng, img = np.random.default_rng((3, 2, 5)), read_image(reader.name(5))
    rng.integers(1)  # the caption is drawn first
    for name, view in (
        ("image", TrainView(PREPROCESS)),
        ("view1", SslView(PREPROCESS)),
        ("view2", SslView(PREPROCESS)),
    ):
        assert torch.equal(PREPROCESS.normalise(sample[name]), view(img, rng))
    clip = ContrastiveDataset(reader, ("image", "text"), PREPROCESS, seed=3)[2, 5]
    assert set(clip) == {"image", "text", "index"}
    assert torch.equal(clip["image"], sample["image"])  # CLIP and SLIP see the same training view
    assert set(ContrastiveDataset(reader, ("view1", "view2"), PREPROCESS, seed=3)[0, 0]) == {
        "view1",
        "view2",
        "index",
    }
    with pytest.raises(ValueError, match="unknown inputs images; choose from text, image, view1, view2"):
        ContrastiveDataset(reader, ("images", "text"), PREPROCESS, seed=3)


@pytest.mark.parametrize("preprocess", [PREPROCESS, Preprocess(size=16, prepare="medclip")], ids=["colour", "grey"])
def test_colours_changed_on_the_device_are_those_that_a_worker_makes(reader, preprocess):
    keys, collate = [(0, i) for i in range(8)], Collate(SimpleTokenizer(context_length=9))
    early, late = (
        collate([ContrastiveDataset(reader, INPUTS, preprocess, seed=3, colour_later=later)[key] for key in keys])
        for later in (False, True)
    )
    assert not torch.equal(early["view1"], late["view1"])  # bare crops
    for name in ("image", "view1", "view2"):
        assert early[name].dtype == torch.uint8 and early[name].shape == (8, 3, 16, 16)
        finished = main.to_device(late, name, preprocess, torch.device("cpu"))
        assert torch.equal(finished, main.to_device(early, name, preprocess, torch.device("cpu")))
        assert torch.equal(finished, preprocess.normalise(early[name]))
    assert torch.equal(main.to_device(late, "text", preprocess, torch.device("cpu")), early["text"])


def test_one_of_several_captions_is_drawn(tmp_path):
    reader = create_reader("coco", make_coco(tmp_path))
    samples = ContrastiveDataset(reader, ("image", "text"), PREPROCESS, seed=0)
    drawn = [samples[epoch, 0]["text"] for epoch in range(300)]
    counts = [drawn.count(text) for text in reader.captions(0)]
    assert sum(counts) == 300 and min(counts) > 70  # 100 each, std 8


def batches(reader, workers: int, epoch: int, context: str | None = None) -> list[dict]:
    sampler = GlobalBatchSampler(len(reader), 4, seed=1)
    sampler.set_epoch(epoch)
    samples = ContrastiveDataset(reader, INPUTS, PREPROCESS, seed=1)
    return list(
        DataLoader(
            samples,
            batch_sampler=sampler,
            collate_fn=Collate(SimpleTokenizer(context_length=9)),
            num_workers=workers,
            multiprocessing_context=context,
        )
    )


@pytest.mark.parametrize("workers, context", [(2, "fork"), pytest.param(1, "spawn", marks=pytest.mark.slow)])
def test_the_number_and_kind_of_workers_changes_nothing(reader, workers, context):
    for one, other in zip(batches(reader, 0, 7), batches(reader, workers, 7, context), strict=True):
        assert set(one) == {*INPUTS, "index"}
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_batches_hold_stacked_images_and_token_ids(reader):
    batch = batches(reader, 0, 0)[0]
    assert batch["image"].shape == batch["view1"].shape == (4, 3, 16, 16)
    assert batch["text"].shape == (4, 9) and batch["index"].shape == (4,)
    expected = SimpleTokenizer(context_length=9)([f"caption {i}" for i in batch["index"].tolist()])
    assert torch.equal(batch["text"], expected)
    assert set(Collate()([{"view1": torch.zeros(3, 2, 2), "index": 3}])) == {"view1", "index"}


def test_trimmed_captions_lose_padding_alone():
    tokenizer, texts = SimpleTokenizer(), ["a mass", "a " * 13 + "mass"]  # 4 and 16 tokens with start and end
    for chosen, length in ((texts[:1], 8), (texts, 16), (["a " * 200], 77), ([""], 8)):
        samples = [{"text": text, "index": 0} for text in chosen]
        whole, trimmed = Collate(tokenizer)(samples)["text"], Collate(tokenizer, trim=True)(samples)["text"]
        assert whole.shape[1] == 77 and trimmed.shape[1] == length and trimmed.is_contiguous()
        assert torch.equal(trimmed, whole[:, :length]) and not whole[:, length:].any()


def test_eval_pairs_take_the_evaluation_view(reader):
    pairs = pickle.loads(pickle.dumps(EvalPairs(reader, PREPROCESS)))
    tensor, index = pairs[4]
    assert len(pairs) == 12 and index == 4
    assert torch.equal(tensor, eval_view(PREPROCESS)(read_image(reader.name(4))))


@pytest.mark.parametrize("n, batch, world", [(20, 2, 3), (12, 4, 1), (7, 1, 7), (100, 8, 4)])
def test_ranks_share_the_batches_of_one_process(n, batch, world):
    whole = GlobalBatchSampler(n, batch * world, seed=5)
    ranks = [GlobalBatchSampler(n, batch, rank, world, seed=5) for rank in range(world)]
    for sampler in (whole, *ranks):
        sampler.set_epoch(3)
        assert len(sampler) == n // (batch * world)
    together = [sum(parts, []) for parts in zip(*ranks, strict=True)]
    assert together == list(whole)
    drawn = [index for step in together for _, index in step]
    assert len(set(drawn)) == len(drawn) == n // (batch * world) * batch * world
    assert {epoch for step in together for epoch, _ in step} == {3}


def test_epochs_and_seeds_permute_differently():
    def order(seed, epoch):
        sampler = GlobalBatchSampler(50, 50, seed=seed)
        sampler.set_epoch(epoch)
        return [index for _, index in next(iter(sampler))]

    assert order(0, 0) == order(0, 0)
    assert sorted(order(0, 0)) == list(range(50)) != order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_an_epoch_continues_at_any_step():
    sampler = GlobalBatchSampler(40, 4, rank=1, world_size=2, seed=2)
    sampler.set_epoch(6)
    whole = list(sampler)
    sampler.set_epoch(6, start_step=3)
    assert list(sampler) == whole[3:] and len(sampler) == 5
    sampler.set_epoch(7)
    assert len(list(sampler)) == 5


def test_too_few_pairs_name_both_numbers():
    with pytest.raises(ValueError, match="300 pairs do not fill one global batch of 512 .64 for each of 8"):
        GlobalBatchSampler(300, 64, world_size=8)


@pytest.fixture
def corrupt_reader(reader):
    for i in (2, 7):
        Path(reader.name(i)).write_bytes(b"no image")
    Path(reader.name(9)).unlink()
    return reader


def test_a_broken_image_is_an_error_that_names_it(corrupt_reader):
    samples = ContrastiveDataset(corrupt_reader, INPUTS, PREPROCESS, seed=0)
    with pytest.raises(UnreadableImage, match="ROCO_00002.jpg"):
        samples[0, 2]
    with pytest.raises(FileNotFoundError, match="ROCO_00009.jpg"):
        samples[0, 9]
    with pytest.raises(UnreadableImage, match="ROCO_00007.jpg"):
        EvalPairs(corrupt_reader, PREPROCESS)[7]


def test_broken_images_are_named_and_replaced_from_seed_epoch_and_index(corrupt_reader, tmp_path):
    def epoch_of(file, epoch=4):
        samples = ContrastiveDataset(
            corrupt_reader, INPUTS, PREPROCESS, 0, bad_samples=tmp_path / file, max_bad_fraction=0.5
        )
        return [samples[epoch, i] for i in range(12)]

    first, again = epoch_of("a.txt"), epoch_of("b.txt")
    for i, (one, other) in enumerate(zip(first, again, strict=True)):
        assert one["index"] == other["index"] and torch.equal(one["image"], other["image"])
        assert one["index"] not in (2, 7, 9) and (one["index"] == i or i in (2, 7, 9))
        assert one["text"] == f"caption {one['index']}"  # image and caption stay together
    assert {tuple(s["index"] for s in epoch_of("a.txt", epoch)) for epoch in range(5)} != {tuple(range(12))}
    lines = (tmp_path / "a.txt").read_text().splitlines()
    assert sorted(line.split("\t")[0] for line in lines) == sorted(corrupt_reader.name(i) for i in (2, 7, 9))
    assert all(line.split("\t")[1] for line in lines)


def test_a_name_that_is_not_utf8_is_noted_once_with_its_bytes(tmp_path):
    name = os.fsdecode(b"R\xf6ntgen.jpg")
    for _ in range(2):  # another process reads what the first has written
        unreadable = UnreadableImages(tmp_path / "bad_samples.txt", limit=1)
        unreadable.add(name, "torn")
        unreadable.add(name, "torn")
    assert (tmp_path / "bad_samples.txt").read_bytes() == b"R\xf6ntgen.jpg\ttorn\n"


def test_workers_name_a_broken_image_once(corrupt_reader, tmp_path):
    path = tmp_path / "bad.txt"
    samples = ContrastiveDataset(
        corrupt_reader, ("view1", "view2"), PREPROCESS, 0, bad_samples=path, max_bad_fraction=0.5
    )
    sampler = GlobalBatchSampler(12, 2)
    loader = DataLoader(samples, batch_sampler=sampler, collate_fn=Collate(), num_workers=2)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        assert len(list(loader)) == 6
    names = [line.split("\t")[0] for line in path.read_text().splitlines()]
    assert set(names) == {corrupt_reader.name(i) for i in (2, 7, 9)}


def test_too_many_broken_images_end_the_run(corrupt_reader, tmp_path):
    path = tmp_path / "bad.txt"
    samples = ContrastiveDataset(corrupt_reader, INPUTS, PREPROCESS, 0, bad_samples=path, max_bad_fraction=0.2)
    samples[0, 2]
    with pytest.raises(UnreadableImage, match="3 images cannot be read.*bad.txt"):
        for i in range(12):
            samples[0, i]
    later = ContrastiveDataset(corrupt_reader, INPUTS, PREPROCESS, 0, bad_samples=path, max_bad_fraction=0.1)
    with pytest.raises(UnreadableImage, match="images cannot be read"):  # a resumed run counts on
        later[0, 2]


def test_as_many_unreadable_images_as_the_limit_says_are_borne(tmp_path):
    here, elsewhere = (UnreadableImages(tmp_path / "bad.txt", limit=3) for _ in range(2))
    here.add("a.jpg", "torn")
    here.add("a.jpg", "torn")  # in a later epoch
    elsewhere.add("b.jpg", "torn")
    elsewhere.add("a.jpg", "torn")
    here.add("c\n.jpg", "torn\tat its end")
    assert (tmp_path / "bad.txt").read_text() == "a.jpg\ttorn\nb.jpg\ttorn\nc .jpg\ttorn at its end\n"
    with pytest.raises(UnreadableImage, match="4 images cannot be read, more than the 3 that may be; .*bad.txt"):
        elsewhere.add("d.jpg", "torn")


def test_when_nothing_can_be_read_the_search_ends(reader, tmp_path):
    for i in range(12):
        Path(reader.name(i)).write_bytes(b"")
    samples = ContrastiveDataset(reader, INPUTS, PREPROCESS, 0, bad_samples=tmp_path / "bad.txt", max_bad_fraction=1)
    with pytest.raises(UnreadableImage, match="10 images in a row cannot be read"):
        samples[0, 0]


@pytest.mark.parametrize("name", [*LARGE, "roco"])
def test_an_epoch_on_each_source_trains_both_towers(name, tmp_path):
    """A pair of images gives one step, whose gradient reaches both towers: nothing else moves them."""
    if name == "roco":
        roco_folder(tmp_path / "train" / "radiology")
    else:
        LARGE[name][0](tmp_path)
    if name == "redcaps":  # its tree holds one image, and one pair alone has no gradient
        save_jpeg(tmp_path / "images" / "itap" / "abc2.jpg", 10)
        rows = json.loads((tmp_path / "redcaps_v1.json").read_text())
        rows.append({"image_id": "abc2", "caption": "another", "subreddit": "itap"})
        (tmp_path / "redcaps_v1.json").write_text(json.dumps(rows))
    states = []
    for lr in ("0", "1e-2"):
        settings = [
            "--batch-size",
            "2",
            "--epochs",
            "1",
            "--warmup-epochs",
            "0",
            "--lr",
            lr,
            "--lr-end",
            lr,
            "--wd",
            "0",
        ]
        argv = command(tmp_path, tmp_path / lr, *settings)
        argv[argv.index("--dataset") + 1] = name
        argv[argv.index("--model") + 1] = "CLIP_VITT16"  # validates on nothing but ROCO
        main.main(argv)
        rows = [json.loads(line) for line in (tmp_path / lr / "log.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows if row["kind"] == "train"] == ([1, 2] if name == "roco" else [1])
        states.append(weights(tmp_path / lr))
    moved = {key for key in states[0] if not torch.equal(states[0][key], states[1][key])}
    for tower in ("visual.blocks", "transformer.resblocks", "token_embedding", "image_projection", "text_projection"):
        assert [key for key in moved if key.startswith(tower)], tower
