"""One pass over each sample on any number of processes, what is kept of it, pairs and zero-shot classifiers."""

import hashlib
import json

import numpy as np
import pytest
import timm
import torch
import transformers
from distributed_helpers import run_ranks
from evaluation_helpers import CPU, NAMES, TEMPLATES, Labelled, Pairs, Tower, tokenizer, write_checkpoint
from PIL import Image

import distributed
import models
from evaluation import downstream, features
from evaluation.downstream import ZeroShotSet
from evaluation.features import Loading
from inputs.images import UnreadableImage
from inputs.transforms import Preprocess, as_view, eval_view
from towers import prompts as towers_prompts


def classify(model, dataset, loading=None, metric="top1", names=NAMES):
    loading = loading or Loading()
    return features.classify_zeroshot(model, tokenizer, ZeroShotSet(dataset, names, TEMPLATES, metric), loading)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
@pytest.mark.parametrize("workers", [0, 2])
def test_embed_pairs_does_not_depend_on_batches_or_workers(batch_size, workers):
    model, reader, preprocess = Tower(), Pairs(11), Preprocess(size=4)
    images, texts, captions = features.embed_pairs(model, reader, preprocess, tokenizer, Loading(batch_size, workers))
    assert captions == [reader.captions(i)[0] for i in range(11)]
    model.eval()
    view = as_view(preprocess)
    for i in range(11):
        torch.testing.assert_close(images[i : i + 1], model.encode_image(view(reader.image(i))[None]).detach())
    torch.testing.assert_close(texts, model.encode_text(tokenizer(captions)).detach())


def passes(loading: Loading) -> dict:
    """The three passes over nine samples, of which two are corrupt and one is missing, by what they return."""
    bad = dict(broken=[0, 4], missing=[5])
    backbone = features.Backbone(Tower().eval().encode_image, Tower(), Preprocess(size=4), "backbone", "tower")
    return {
        "probe": lambda: features.extract(backbone, Labelled(9, 7, **bad), "", loading)[1].tolist(),
        "zero-shot": lambda: classify(Tower(), Labelled(9, 7, **bad), loading)["samples"],
        "retrieval": lambda: features.embed_pairs(Tower(), Pairs(9, **bad), Preprocess(size=4), tokenizer, loading)[2],
    }


def test_the_first_image_that_a_tower_answers_with_nan_is_named_with_its_set(tmp_path):
    for name, grey in (("a/0.png", 30), ("a/1.png", 250), ("b/2.png", 40)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (4, 4), grey).save(tmp_path / name)

    def encode(images):
        bright = images.mean((1, 2, 3)) > 0.5
        return torch.where(bright, torch.nan, 1.0)[:, None].expand(-1, 5)

    backbone = features.Backbone(encode, Tower(), Preprocess(size=4), "backbone", "tower")
    images = downstream.image_folders(tmp_path, eval_view(backbone.preprocess))
    with pytest.raises(ValueError, match=r"a tower answers \S*a/1\.png \(films_test\) with NaN or infinity"):
        features.extract(backbone, images, "films_test", Loading(2))


@pytest.mark.parametrize("workers", [0, 1])
def test_missing_and_corrupt_images_are_the_same_error_everywhere(workers):
    """The error names the image and the flag; with the flag each pass skips the same samples."""
    for name, call in passes(Loading(2, workers)).items():
        with pytest.raises(UnreadableImage, match=r"^cannot decode the image 0; --skip-broken skips"):
            call()
            pytest.fail(name)
    for name, call in passes(Loading(2, workers, skip_broken=True)).items():
        kept = [1, 2, 3, 6, 7, 8]
        expected = {"probe": kept, "zero-shot": 6, "retrieval": [Pairs(9).captions(i)[0] for i in kept]}
        assert call() == expected[name]
    with pytest.raises(FileNotFoundError, match=r"^there is no image 1; --skip-broken skips"):
        classify(Tower(), Labelled(3, 7, missing=[1]))
    with pytest.raises(ValueError, match="no image to evaluate: all 2 are missing or corrupt"):
        classify(Tower(), Labelled(2, 7, broken=[0], missing=[1]), Loading(skip_broken=True))
    with pytest.raises(ValueError, match="no image to evaluate$"):
        classify(Tower(), Labelled(0, 7))
    with pytest.raises(ValueError, match="reader is empty"):
        features.embed_pairs(Tower(), Pairs(0), Preprocess(size=4), tokenizer)


def test_what_is_skipped_does_not_change_the_rest():
    skipped = features.embed_pairs(
        Tower(), Pairs(7, broken=[4], missing=[5]), Preprocess(size=4), tokenizer, Loading(2, skip_broken=True)
    )
    whole = features.embed_pairs(Tower(), Pairs(7), Preprocess(size=4), tokenizer)
    kept = [0, 1, 2, 3, 6]
    for some, every in zip(skipped[:2], whole[:2], strict=True):
        torch.testing.assert_close(some, every[kept])


def test_the_models_mode_and_gradients_are_left_as_they_were():
    model = Tower().train()
    features.embed_pairs(model, Pairs(3), Preprocess(size=4), tokenizer)
    classify(model, Labelled(5, 7))
    assert model.training and model.dropout.training and torch.is_grad_enabled()
    with pytest.raises(UnreadableImage):
        features.embed_pairs(model, Pairs(3, broken=[1]), Preprocess(size=4), tokenizer)
    assert model.training
    classify(model.eval(), Labelled(5, 7))
    assert not model.training


def _compare_ranks(rank, world, n, expected):
    loading = Loading(2, processes=distributed.Processes(rank, world, rank, CPU))
    for got, wanted in zip(whole_results(n, loading), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


def whole_results(n, loading):
    """Pairs, zero-shot scores and features of n samples, all as tensors."""
    *pairs, captions = features.embed_pairs(Tower(), Pairs(n), Preprocess(size=4), tokenizer, loading)
    assert captions == [Pairs(n).captions(i)[0] for i in range(n)]
    scores = classify(Tower(), Labelled(n, 7), loading, "mean_per_class")
    assert scores.pop("metric") == "mean_per_class" and scores["samples"] == n
    backbone = features.Backbone(Tower().eval().encode_image, Tower(), Preprocess(size=4), "backbone", "tower")
    rows, numbers = features.extract(backbone, Labelled(n, 7), "", loading)
    assert numbers.tolist() == list(range(n))
    return [*pairs, torch.tensor(list(scores.values())), torch.from_numpy(rows)]


@pytest.mark.parametrize(("world", "n"), [(2, 7), (3, 8), (3, 2)])  # with two samples the third rank has none
def test_each_sample_counts_once_on_any_number_of_processes(world, n):
    run_ranks(_compare_ranks, world, n, whole_results(n, Loading(3)))


def _fail_on_one_rank(rank, world):
    loading = Loading(2, skip_broken=True, processes=distributed.Processes(rank, world, rank, CPU))
    scores = classify(Tower(), Labelled(6, 7, broken=[1, 3, 5]), loading)  # all that rank 1 has
    assert scores["samples"] == 3


def test_a_rank_whose_images_are_all_skipped_still_takes_part():
    run_ranks(_fail_on_one_rank, 2)


def test_loader_processes_never_outnumber_the_cores(monkeypatch):
    monkeypatch.setattr(distributed, "cores", lambda: 6)
    assert Loading(workers=64).loader_processes() == 6 and Loading(workers=2).loader_processes() == 2
    four = distributed.Processes(0, 4)
    assert Loading(workers=64, processes=four).loader_processes() == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # two nodes of two processes
    assert Loading(workers=64, processes=four).loader_processes() == 3
    monkeypatch.setattr(distributed, "cores", lambda: 1)
    assert Loading(workers=64, processes=four).loader_processes() == 0


# -------------------------------------------------------------------------------- kept features


def test_files_of_earlier_releases_are_found(tmp_path):
    """The names are those that the first release gave: written out here, from weights, settings and images."""
    write_checkpoint(tmp_path / "checkpoint.pt")
    backbone = features.load_backbone(tmp_path / "checkpoint.pt")
    (tmp_path / "set").mkdir()
    Image.new("RGB", (20, 20), (9, 8, 7)).save(tmp_path / "set" / "a.png")
    column = downstream.TextColumn.from_strings(["a.png", "gone.png"])
    dataset = downstream.ImageFiles(tmp_path / "set", column, ["x"], np.array([0, 0]), eval_view(backbone.preprocess))
    weights = hashlib.sha256()
    for name, value in sorted(backbone.model.state_dict().items()):
        if name.startswith(("visual.", "image_projection")):
            weights.update(f"{name} {value.dtype} {tuple(value.shape)}".encode() + value.numpy().tobytes())
    config = backbone.model.config
    prepared = {"size": 32, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "prepare": "slip"}
    settings = [weights.hexdigest(), [config, timm.__version__], "backbone", prepared, True]
    status = (tmp_path / "set" / "a.png").stat()
    images = f"{tmp_path}/set/a.png ({status.st_size}, {status.st_mtime_ns})\n{tmp_path}/set/gone.png None\n"
    key = hashlib.sha256((json.dumps(settings) + images).encode()).hexdigest()[:32]
    (tmp_path / "features").mkdir()
    kept = {"features": np.float32([[1, 2]]), "numbers": np.array([0])}
    np.savez(tmp_path / "features" / f"mine_test_{key}.npz", **kept)
    loading = Loading(skip_broken=True)
    found, numbers = features.extract_or_reuse(backbone, dataset, "mine_test", loading, tmp_path / "features")
    assert found.tolist() == [[1, 2]] and numbers.tolist() == [0]
    other, _ = features.extract_or_reuse(backbone, dataset, "mine_train", loading, tmp_path / "features")
    assert other.shape == (1, 24)


def test_text_files_of_earlier_releases_are_found(tmp_path):
    write_checkpoint(tmp_path / "checkpoint.pt")
    loaded = models.load_pretrained(tmp_path / "checkpoint.pt")
    weights = hashlib.sha256()
    for name, value in sorted(loaded.model.state_dict().items()):
        if not name.startswith(("visual.", "image_")):
            weights.update(f"{name} {value.dtype} {tuple(value.shape)}".encode() + value.numpy().tobytes())
    settings = [loaded.model.config, "cpu", str(torch.__version__), transformers.__version__]
    tokens = loaded.tokenizer(["a cat", "a dog"])
    start = f"{weights.hexdigest()} {json.dumps(settings, sort_keys=True)} (2, 77) [[0], [1]]"
    key = hashlib.sha256(start.encode() + tokens.numpy().tobytes()).hexdigest()[:32]
    np.save(tmp_path / f"text_{key}.npy", np.float32([[1, 0], [0, 1]]))
    cache = towers_prompts.TextCache.of(loaded.model, distributed.Processes(rank=1), tmp_path)
    found = towers_prompts.zeroshot_classifier(
        loaded.model, loaded.tokenizer, ["cat", "dog"], ["a {}"], CPU, cache=cache
    )
    assert found.tolist() == [[1, 0], [0, 1]]


# -------------------------------------------------------------------------------- the tower


@pytest.mark.parametrize("name", ["CLIP_VITT16", "MEDCLIP_RESNET"])
def test_larger_images_keep_the_weights(name):
    """A ViT's position embeddings are resampled; everything else, and a ResNet as a whole, stays."""
    small = dict(text_layers=2, text_width=64, vocab_size=64, text_heads=4)
    tower = dict(vision_tower="test_vit", image_size=32) if name == "CLIP_VITT16" else {}
    model = models.create_model(name, **small, **tower).eval()
    bigger = models.at_size(model, 96).eval()
    assert bigger.preprocess.size == 96 and bigger.preprocess.prepare == model.preprocess.prepare
    assert bigger.visual(torch.rand(1, 3, 96, 96)).shape == (1, model.feature_dim)
    for (key, a), b in zip(model.state_dict().items(), bigger.state_dict().values(), strict=True):
        assert key == "visual.pos_embed" or torch.equal(a, b), key


# -------------------------------------------------------------------------------- classifier


@pytest.mark.parametrize("batch_size", [1, 3, 256])
def test_the_classifier_is_the_normalised_mean_of_normalised_prompts(batch_size):
    model = Tower().eval()
    weights = towers_prompts.zeroshot_classifier(model, tokenizer, NAMES, TEMPLATES, CPU, batch_size)
    assert weights.shape == (6, len(NAMES))
    # written out for the class with two names; all prompts share one padded length, as one call makes them
    prompts = ["a photo of a bird.", "a photo of a small bird.", "the bird", "the small bird"]
    longest = "a photo of a small bird."  # 24 letters, also the longest over all classes
    rows = tokenizer([*prompts, longest])[:4]
    vectors = model.encode_text(rows).detach().numpy().astype(np.float64)
    mean = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).mean(axis=0)
    np.testing.assert_allclose(weights[:, 2], mean / np.linalg.norm(mean), atol=1e-6)


def test_each_distinct_prompt_is_encoded_once():
    seen = []

    class Counting(Tower):
        def encode_text(self, tokens):
            seen.append(len(tokens))
            return super().encode_text(tokens)

    towers_prompts.zeroshot_classifier(Counting(), tokenizer, ["cat", "cat", "dog"], TEMPLATES, CPU, batch_size=3)
    assert seen == [3, 1]


def text_files(folder):
    return sorted((folder / "features").glob("text_*.npz"))


def test_a_kept_classifier_is_the_encoded_one(tmp_path):
    write_checkpoint(tmp_path / "checkpoint.pt")
    loaded = models.load_pretrained(tmp_path / "checkpoint.pt")
    cache = towers_prompts.TextCache.of(loaded.model, distributed.Processes(), tmp_path / "features")
    silent = towers_prompts.TextCache.of(loaded.model, distributed.Processes(rank=1), tmp_path / "elsewhere")
    args = (loaded.model, loaded.tokenizer, NAMES, TEMPLATES, CPU)
    plain = towers_prompts.zeroshot_classifier(*args)
    for _ in range(2):
        assert torch.equal(towers_prompts.zeroshot_classifier(*args, cache=cache), plain)
        assert torch.equal(towers_prompts.zeroshot_classifier(*args, cache=silent), plain)
    assert len(text_files(tmp_path)) == 1 and not (tmp_path / "elsewhere").exists()
    regrouped = [["cat", "big dog"], *NAMES[2:]]  # the same prompts, other classes
    assert (
        towers_prompts.zeroshot_classifier(
            loaded.model, loaded.tokenizer, regrouped, TEMPLATES, CPU, cache=cache
        ).shape[1]
        == 6
    )
    assert towers_prompts.TextCache.of(Tower(), distributed.Processes(), tmp_path) is None  # settings unknown


def test_a_classifier_needs_names_and_templates():
    with pytest.raises(ValueError, match="at least one class name"):
        towers_prompts.zeroshot_classifier(Tower(), tokenizer, [], TEMPLATES, CPU)


def test_a_label_outside_the_class_names_is_an_error():
    with pytest.raises(ValueError, match="label 7 in the data, but 3 class names"):
        classify(Tower(), [(torch.rand(3, 4, 4), 7)], names=NAMES[:3])


def test_each_skipped_image_is_named_with_its_reason(tmp_path, monkeypatch, caplog):
    class Torn(torch.utils.data.Dataset):
        def __len__(self):
            return 6

        def __getitem__(self, i):
            if i % 2:
                raise UnreadableImage(f"cannot decode the image {i}.png: torn at byte {i}")
            return torch.zeros(3, 4, 4), 0

    model = torch.nn.Identity()
    monkeypatch.setattr(features, "NAMED", 2)
    loading = features.Loading(batch_size=4, skip_broken=True)
    (numbers,) = features.each_once(model, Torn(), lambda numbers, images, targets: [], loading)
    assert numbers.tolist() == [0, 2, 4]
    reasons = [f"skipped: cannot decode the image {i}.png: torn at byte {i}" for i in (1, 3)]
    assert caplog.messages == [*reasons, "skipped: 1 more"]
    with pytest.raises(
        UnreadableImage, match="1.png: torn at byte 1; --skip-broken skips, names and counts such images"
    ):
        features.each_once(model, Torn(), lambda numbers, images, targets: [], features.Loading(batch_size=4))
