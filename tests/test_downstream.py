"""The labelled sets in every layout of the catalog: 26 small trees, and files that must be refused."""

import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms.functional as TF
from downstream_tree import LABELS, folder_names, pixels, write_file_list, write_folders, write_world
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from evaluation import catalog as evaluation_catalog
from evaluation import downstream, features
from inputs import cbis, transforms
from inputs.images import UnreadableImage
from inputs.transforms import Preprocess

ALL_26 = [
    n for n, e in evaluation_catalog.read_catalog().items() if n in LABELS and not n.startswith(("digits", "cbis"))
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        yield write_world(tmp_path_factory.mktemp("world"), patch)


def stated_class(image: Image.Image, grey: bool) -> int:
    red, green, _ = image.getpixel((0, 0))
    return red if grey else red + 256 * green


def entry_at(path, kind="imagefolder", **more) -> dict:
    return {"thing": {"path": str(path), "type": kind, "train": "train", "test": "test", **more}}


def test_there_are_26(world):
    assert len(ALL_26) == 26 and set(world) == set(ALL_26)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", ALL_26)
def test_each_layout_is_numbered_in_the_published_order(world, name, train):
    dataset = downstream.create_downstream(name, train, None, world)
    assert len(dataset.classes) == len(LABELS[name])
    samples = [dataset[i] for i in range(len(dataset))]
    assert {image.mode for image, _ in samples} == {"RGB"}
    assert sorted(label for _, label in samples) == list(range(len(LABELS[name])))
    assert [stated_class(image, name == "mnist") for image, _ in samples] == [label for _, label in samples]


def test_folders_that_are_numbers_are_sorted_as_numbers(tmp_path):
    write_folders(tmp_path / "train", folder_names("flowers"))
    dataset = downstream.image_folders(tmp_path / "train", None)
    assert dataset.classes == [str(i) for i in range(1, 103)]
    assert sorted(dataset.classes) != dataset.classes  # what a plain sort would do


def test_the_transform_is_applied_and_workers_receive_the_set(world):
    view = transforms.eval_view(transforms.Preprocess(size=8))
    dataset = downstream.create_downstream("dtd", False, view, world)
    loader = DataLoader(dataset, batch_size=10, num_workers=1, multiprocessing_context="spawn")
    images, labels = next(iter(loader))
    assert images.shape == (10, 3, 8, 8) and labels.tolist() == list(range(10))
    torch.testing.assert_close(images[3], view(Image.fromarray(pixels(3))))


def test_nested_folders_other_files_and_hidden_folders(tmp_path):
    write_folders(tmp_path / "test", ["b", "a"])
    shutil.move(tmp_path / "test" / "a" / "0001.png", tmp_path / "test" / "a" / "z.PNG")
    write_folders(tmp_path / "test" / "a", ["inner"])
    (tmp_path / "test" / "a" / "notes.txt").write_text("not an image")
    (tmp_path / "test" / ".cache").mkdir()
    dataset = downstream.create_downstream("thing", False, None, entry_at(tmp_path))
    assert dataset.classes == ["a", "b"]
    assert [dataset.paths[i] for i in range(3)] == ["a/z.PNG", "a/inner/0001.png", "b/0001.png"]
    assert dataset.labels.tolist() == [0, 0, 1]


def test_a_broken_image_is_named(tmp_path):
    write_folders(tmp_path / "test", ["a"])
    (tmp_path / "test" / "a" / "0001.png").write_bytes(b"\x89PNG torn")
    dataset = downstream.create_downstream("thing", False, None, entry_at(tmp_path))
    with pytest.raises(UnreadableImage, match=r"a/0001\.png"):
        dataset[0]


def test_an_empty_class_folder_is_an_error(tmp_path):
    write_folders(tmp_path / "test", ["a", "c"])
    (tmp_path / "test" / "b").mkdir()
    with pytest.raises(ValueError, match=r"class folder .*b holds no images"):
        downstream.create_downstream("thing", False, None, entry_at(tmp_path))


def test_a_split_without_class_folders_is_an_error(tmp_path):
    (tmp_path / "test").mkdir()
    with pytest.raises(ValueError, match="no class folders"):
        downstream.create_downstream("thing", False, None, entry_at(tmp_path))


def test_unknown_and_absent_sets(tmp_path):
    with pytest.raises(ValueError, match=r"unknown dataset 'petz'; choose from food101, .*roco"):
        downstream.create_downstream("petz", False, None)
    with pytest.raises(FileNotFoundError, match=r"thing: .*nowhere does not exist"):
        downstream.create_downstream("thing", False, None, entry_at(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"thing: .*test does not exist"):
        downstream.create_downstream("thing", False, None, entry_at(tmp_path))
    with pytest.raises(ValueError, match="captions, not classes"):
        downstream.create_downstream("roco", False, None)


# -------------------------------------------------------------------------------- file lists


def test_a_class_that_one_split_lacks_does_not_shift_the_others(tmp_path):
    write_file_list(tmp_path, "train", np.array(["count_10", "count_3", "count_4"]), [0, 1, 2])
    write_file_list(tmp_path, "test", np.array(["count_4", "count_3"]), [2, 1])
    dataset = downstream.create_downstream("thing", False, None, entry_at(tmp_path, "filelist"))
    assert dataset.classes == ["count_10", "count_3", "count_4"] and dataset.labels.tolist() == [2, 1]
    shutil.rmtree(tmp_path / "images")
    write_file_list(tmp_path, "train", np.array([0, 1, 2]), [0, 1, 2])
    write_file_list(tmp_path, "test", np.array([1, 0]), [1, 0])
    dataset = downstream.create_downstream("thing", False, None, entry_at(tmp_path, "filelist"))
    assert dataset.classes == ["0", "1", "2"] and dataset.labels.tolist() == [1, 0]


@pytest.mark.parametrize("listed", ["/etc/passwd", "../secret.png", "images/../../secret.png"])
def test_a_listed_path_that_leaves_its_folders_is_refused_with_its_row(tmp_path, listed):
    write_file_list(tmp_path, "test", np.array([0, 1]), [0, 1])
    good = str(tmp_path / "images" / "test" / "000000.png")
    np.save(tmp_path / "test_images.npy", np.array([good, listed]))
    with pytest.raises(ValueError, match=r"test_images\.npy, row 1: .* is outside of"):
        downstream.create_downstream("thing", False, None, entry_at(tmp_path, "filelist"))


def test_absolute_paths_elsewhere_work_where_the_catalog_names_their_folder(tmp_path):
    lists, images = tmp_path / "lists", tmp_path / "images"
    write_file_list(images, "test", np.array([0, 1]), [0, 1])
    lists.mkdir()
    for file in images.glob("*.npy"):
        shutil.move(file, lists / file.name)
    with pytest.raises(ValueError, match='name its folder as "images"'):
        downstream.create_downstream("thing", False, None, entry_at(lists, "filelist"))
    dataset = downstream.create_downstream("thing", False, None, entry_at(lists, "filelist", images=str(images)))
    assert [stated_class(*dataset[i][:1], False) for i in range(2)] == [0, 1]


def test_relative_paths_start_at_the_set(tmp_path):
    write_file_list(tmp_path, "test", np.array([1]), [1])
    np.save(tmp_path / "test_images.npy", np.array(["images/test/000000.png"]))
    dataset = downstream.create_downstream("thing", False, None, entry_at(tmp_path, "filelist"))
    assert stated_class(dataset[0][0], False) == 1


class Hostile:
    def __init__(self, witness):
        self.witness = str(witness)

    def __reduce__(self):
        return open, (self.witness, "w")


def test_a_label_file_that_would_run_code_is_refused(tmp_path):
    write_file_list(tmp_path, "test", np.array([0]), [0])
    np.save(
        tmp_path / "test_labels.npy",
        np.array([Hostile(tmp_path / "witness")], dtype=object),
        allow_pickle=True,
    )
    with pytest.raises(ValueError, match=r"test_labels\.npy"):
        downstream.create_downstream("thing", False, None, entry_at(tmp_path, "filelist"))
    assert not (tmp_path / "witness").exists()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array([0, 1, 2]), "2 rows in test_images.npy, 3 in test_labels.npy"),
        (np.array([0, -1]), "class -1 in row 1"),
        (np.array([0.5, 1.0]), "not one row of text or whole numbers"),
        (np.array([[0, 1]]), "not one row of text or whole numbers"),
        (np.array([], dtype=np.int64), "not one row of text or whole numbers"),
    ],
)
def test_bad_label_files_are_refused(tmp_path, labels, message):
    write_file_list(tmp_path, "test", np.array([0, 1]), [0, 1])
    np.save(tmp_path / "test_labels.npy", labels)
    with pytest.raises(ValueError, match=message):
        downstream.create_downstream("thing", False, None, entry_at(tmp_path, "filelist"))


def test_labels_saved_as_python_objects_are_read(tmp_path):
    write_file_list(tmp_path, "test", np.array([1, 0], dtype=object), [1, 0])
    dataset = downstream.create_downstream("thing", False, None, entry_at(tmp_path, "filelist"))
    assert dataset.labels.tolist() == [1, 0]


# -------------------------------------------------------------------------------- special sets


def test_digits_are_all_there_once_and_the_split_is_fixed():
    train, test = (downstream.create_downstream("digits", train, None) for train in (True, False))
    assert (len(train), len(test)) == (1437, 360)
    assert np.bincount(test.labels).min() >= 35  # every class is held out in proportion
    again = downstream.create_downstream("digits", False, None)
    np.testing.assert_array_equal(again.pixels, test.pixels)
    from sklearn.datasets import load_digits

    def rows(pixels):
        return sorted(map(bytes, pixels.reshape(len(pixels), -1)))

    whole = (load_digits().images / 16 * 255).round().astype(np.uint8)
    assert rows(np.concatenate([train.pixels, test.pixels])) == rows(whole)
    image, label = test[0]
    assert image.size == (32, 32) and image.mode == "RGB" and label == test.labels[0]


def test_a_cifar_file_with_another_checksum_is_not_opened(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for part in (
        "data_batch_1",
        "data_batch_2",
        "data_batch_3",
        "data_batch_4",
        "data_batch_5",
        "test_batch",
    ):
        (folder / part).write_bytes(pickle.dumps(Hostile(tmp_path / "witness")))
    catalog = {"cifar10": {"path": str(tmp_path), "type": "special", "train": "train", "test": "test"}}
    with pytest.raises(ValueError, match="cifar10: torchvision finds no intact copy"):
        downstream.create_downstream("cifar10", False, None, catalog)
    assert not (tmp_path / "witness").exists()


@pytest.mark.parametrize("download", [False, True])
def test_the_placeholder_path_is_never_downloaded_to(download):
    with pytest.raises(FileNotFoundError, match="/path/to/mnist does not exist"):
        downstream.create_downstream("mnist", False, None, download=download)


def test_download_is_left_to_torchvision(tmp_path, monkeypatch):
    asked = {}

    def fetch(root, train, download):
        asked.update(root=root, train=train, download=download)
        raise RuntimeError("no network")

    monkeypatch.setattr(torchvision.datasets, "MNIST", fetch)
    catalog = {"mnist": {"path": str(tmp_path / "new"), "type": "special", "train": "train", "test": "test"}}
    with pytest.raises(ValueError, match="no network"):
        downstream.create_downstream("mnist", False, None, catalog, download=True)
    assert asked == {"root": str(tmp_path / "new"), "train": False, "download": True}


def test_cbis_crops_through_the_catalog(tmp_path):
    rows = []
    for i, (pathology, split) in enumerate(zip(cbis.CBIS_CLASSES * 2, ["train"] * 3 + ["test"] * 3, strict=True)):
        Image.fromarray(pixels(i % 3)).save(tmp_path / f"{i}.png")
        cells = dict.fromkeys(cbis.CBIS_COLUMNS, "")
        cells |= {
            "lesion": f"calc_{i}",
            "type": "calc",
            "split": split,
            "pathology": pathology,
            "crop": f"{i}.png",
        }
        rows.append(",".join(cells.values()))
    (tmp_path / "calc.csv").write_text("\n".join([",".join(cbis.CBIS_COLUMNS), *rows]) + "\n")
    catalog = {"cbis_calc": {"path": str(tmp_path), "type": "special", "train": "train", "test": "test"}}
    for train in (True, False):
        dataset = downstream.create_downstream("cbis_calc", train, None, catalog)
        assert dataset.classes == list(cbis.CBIS_CLASSES)
        assert [stated_class(image, False) for image, _ in (dataset[i] for i in range(3))] == [0, 1, 2]
        assert dataset.labels.tolist() == [0, 1, 2]
    with pytest.raises(FileNotFoundError, match=r"mass\.csv"):
        downstream.create_downstream("cbis_mass", False, None, {"cbis_mass": catalog["cbis_calc"]})


# -------------------------------------------------------------------------------- class names and prompts


def test_each_set_has_its_published_metric():
    names = evaluation_catalog.read_catalog()
    metrics = {name: evaluation_catalog.metric_of(name, names) for name in names}
    assert {n for n, m in metrics.items() if m == "mean_per_class"} == {
        "aircraft",
        "pets",
        "caltech101",
        "flowers",
    }
    assert {n for n, m in metrics.items() if m == "mean_top1_top5"} == {"kinetics700_frames"}
    assert {n for n, m in metrics.items() if m == "roc_auc"} == {"hateful_memes", "rsna_cancer", "cmmd"}


def test_folders_in_another_order_are_reported():
    evaluation_catalog.check_class_order("pets", ["Abyssinian", "american_bulldog"], ["Abyssinian", "american bulldog"])
    evaluation_catalog.check_class_order("cub200", ["001.Black_footed_Albatross"], ["Black footed Albatross"])
    evaluation_catalog.check_class_order("fer2013", ["happy", "sad"], [["glad", "happy"], ["sad"]])
    with pytest.raises(ValueError, match="class 0 is 'american_bulldog' on disk and 'Abyssinian' in labels.json"):
        evaluation_catalog.check_class_order(
            "pets", ["american_bulldog", "Abyssinian"], ["Abyssinian", "american bulldog"]
        )
    with pytest.raises(ValueError, match="2 classes found, 3 class names"):
        evaluation_catalog.check_class_order("pets", ["a", "b"], ["a", "b", "c"])
    with pytest.raises(ValueError, match="hateful, not_hateful; must be 0, 1"):
        evaluation_catalog.check_class_order(
            "hateful_memes", ["hateful", "not_hateful"], LABELS["hateful_memes"], folders=["0", "1"]
        )


class Oracle(nn.Module):
    """Reads the class that an image states (downstream_tree) and the class that a prompt names."""

    def __init__(self, n_classes: int, grey: bool):
        super().__init__()
        self.n_classes, self.grey = n_classes, grey

    def encode_image(self, x):
        red, green = (x[:, :2, 0, 0] * 255).round().long().T
        return F.one_hot(red if self.grey else red + 256 * green, self.n_classes).float()

    def encode_text(self, tokens):
        return F.one_hot(tokens[:, 0], self.n_classes).float()


def test_an_oracle_never_errs_on_all_26_sets(world):
    for name in world:
        labelled = downstream.load_zeroshot_set(name, TF.to_tensor, world)
        dataset, classnames, templates, metric = labelled
        of_prompt = {}
        for label, names in enumerate(classnames):
            for synonym in [names] if isinstance(names, str) else names:
                of_prompt = {t.replace("{}", synonym): label for t in templates} | of_prompt

        def read(prompts, of_prompt=of_prompt):
            return torch.tensor([[of_prompt[p]] for p in prompts])

        model = Oracle(len(classnames), name == "mnist")
        scores = features.classify_zeroshot(model, read, labelled, features.Loading())
        assert (scores["metric"], scores["samples"]) == (metric, len(dataset))
        # ImageNet's published names hold "missile" and "sunglasses" twice: the second of each cannot be told
        expected = 998 / 1000 if name == "imagenet" else 1
        assert scores["score"] == pytest.approx(expected), name
        assert scores["samples"] == scores["classes"] == len(LABELS[name])


def test_sets_that_cannot_be_classified_are_named():
    with pytest.raises(ValueError, match="roco has captions, not classes.* sets with classes are food101"):
        downstream.load_zeroshot_set("roco", Preprocess())
    with pytest.raises(ValueError, match="unknown dataset 'birdsnap'"):
        downstream.load_zeroshot_set("birdsnap", Preprocess())


# -------------------------------------------------------------------------------- a set of one's own


def own_catalog(root, **keys):
    """A catalog file with the set `scans` of three class folders, whose first pixel states the folder's number."""
    for split in ("train", "test"):
        if not (root / split).exists():
            write_folders(root / split, ["01.normal", "benign_mass", "malignant_mass"])
    entry = {"path": str(root), "type": "imagefolder", "train": "train", "test": "test", **keys}
    (root / "catalog.json").write_text(json.dumps({"scans": entry}))
    return root / "catalog.json"


def load(root, **keys):
    return downstream.load_zeroshot_set("scans", Preprocess(size=4), own_catalog(root, **keys))


def test_a_set_needs_no_more_than_its_folders(tmp_path):
    scans = load(tmp_path)
    assert list(scans)[1:] == [["normal", "benign mass", "malignant mass"], ["a photo of a {}."], "top1"]
    dataset, classnames, templates, metric = scans
    assert dataset is scans.dataset and dataset.labels.tolist() == [0, 1, 2]


def test_an_entry_says_labels_templates_metric_and_folders(tmp_path):
    labels = [["malignant mass", "cancer"], "benign mass", "nothing"]
    folders = ["malignant_mass", "benign_mass", "01.normal"]
    scans = load(tmp_path, labels=labels, templates=["scan of {}"], metric="mean_per_class", folders=folders)
    assert list(scans)[1:] == [labels, ["scan of {}"], "mean_per_class"]
    assert scans.dataset.classes == folders
    assert [stated_class(scans.dataset.image(i), False) for i in range(3)] == [2, 1, 0]
    ordered = ["benign_mass", "01.normal", "malignant_mass"]
    shared = load(tmp_path, labels="cbis_mass", templates="digits", folders=ordered, _note="a comment")
    assert (shared.classnames, shared.templates) == (
        LABELS["cbis_mass"],
        evaluation_catalog.read_prompts("templates.json")["digits"],
    )


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (dict(metric="auc"), "catalog.json: scans has metric 'auc'; choose from top1, mean_per_class, mean_top1_top5"),
        (dict(templates=["a scan"]), r"catalog.json: scans: template 'a scan' has no \{\}"),
        (dict(templates="scan of {}"), "catalog.json: scans, \"templates\" must be a list"),
        (dict(templates=[]), "\"templates\" must be a list of at least one text"),
        (dict(templates="pet"), "'pet' is not in templates.json; choose from food101"),
        (dict(labels="scan"), "catalog.json: scans, \"labels\": 'scan' is not in labels.json; choose from food101"),
        (dict(labels=["a", 2, "c"]), "\"labels\" must be a list of at least one text, not .2."),
        (dict(labels=["a", [], "c"]), "\"labels\" must be"),
        (dict(labels={"a": 1}), "\"labels\" must be a list of class names"),
        (dict(labels=["a", "b"]), "scans: 3 classes found, 2 class names in the \"labels\" of .*catalog.json: scans"),
        (
            dict(labels=["malignant mass", "benign mass", "normal"]),
            "class 0 is '01.normal' on disk and 'malignant mass'",
        ),
        (dict(folders=["benign_mass", "normal", "malignant_mass"]), "class folders 01.normal, benign_mass.* must be"),
        (dict(folders=["a", "a"]), "names a folder twice"),
        (dict(type="filelist", folders=["a"]), "only the type imagefolder"),
        (dict(lables=["a", "b", "c"]), "unknown keys lables; choose from path, .*labels, templates, metric, folders"),
    ],
)  # fmt: skip
def test_an_entry_that_is_wrong_names_file_entry_and_choices(tmp_path, keys, message):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, **keys)


def test_classes_that_are_numbers_are_remarked_on(tmp_path, caplog):
    write_folders(tmp_path / "test", ["0", "1"])
    (tmp_path / "catalog.json").write_text(json.dumps(entry_at(tmp_path)))
    numbers = downstream.load_zeroshot_set("thing", Preprocess(size=4), tmp_path / "catalog.json")
    assert numbers.classnames == ["0", "1"] and "prompted by their numbers" in caplog.text


def test_a_catalog_of_an_earlier_release_keeps_published_metrics_and_folders(world, tmp_path):
    """Entries of {path, type, train, test} alone, as SLIP's catalog has them."""
    old = {name: {k: entry[k] for k in evaluation_catalog.REQUIRED} for name, entry in world.items()}
    (tmp_path / "old.json").write_text(json.dumps(old))
    read = evaluation_catalog.read_catalog(tmp_path / "old.json")
    assert {n: evaluation_catalog.metric_of(n, read) for n in old} == {
        n: evaluation_catalog.metric_of(n, world) for n in old
    }
    assert evaluation_catalog.metric_of("hateful_memes", read) == "roc_auc"
    write_folders(tmp_path / "dev", ["hateful", "not_hateful"])
    old["hateful_memes"]["path"] = str(tmp_path)
    with pytest.raises(ValueError, match="hateful, not_hateful; must be 0, 1"):
        downstream.load_zeroshot_set("hateful_memes", Preprocess(size=4), old)


def test_classes_are_numbered_over_both_splits_and_system_files_never_count(tmp_path):
    for split, names in (("train", ("a", "b", "c")), ("val", ("a", "c"))):
        for name in names:
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(folder / "0.png")
            (folder / "._0.png").write_bytes(b"Mac OS X")
            (folder / "@eaDir").mkdir()
            (folder / "@eaDir" / "0.png").write_bytes(b"a thumbnail")
        for system in ("__MACOSX", ".ipynb_checkpoints", "@eaDir"):
            (tmp_path / split / system).mkdir()
    (tmp_path / "train" / "a" / "loop").symlink_to(tmp_path / "train" / "a")
    entry = {"path": str(tmp_path), "type": "imagefolder", "train": "train", "test": "val"}
    train, test = (downstream.create_downstream("mine", split, None, {"mine": entry}) for split in (True, False))
    assert train.classes == test.classes == ["a", "b", "c"]
    assert train.labels.tolist() == [0, 1, 2] and test.labels.tolist() == [0, 2]


def test_a_file_name_that_is_not_utf8_is_read(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), (10, 10, 10)).save(tmp_path / "x.png")
        os.rename(tmp_path / "x.png", os.fsencode(tmp_path / "train" / name) + b"/caf\xe9.png")
    images = downstream.image_folders(tmp_path / "train", None)
    assert [np.asarray(images.image(i)).mean() for i in range(2)] == [10, 10]


def test_classes_that_only_their_order_pairs_are_said(tmp_path, caplog):
    for name in ("x1", "x2"):
        (tmp_path / "test" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "test" / name / "0.png")
    entry = {"path": str(tmp_path), "type": "imagefolder", "train": "train", "test": "test"}
    for labels, said in ((["benign", "malignant"], True), (["x1", "x2"], False)):
        caplog.clear()
        catalog = evaluation_catalog.Catalog({"mine": {**entry, "labels": labels}}, "mine.json")
        downstream.load_zeroshot_set("mine", transforms.Preprocess(), catalog)
        assert ("x1 = benign, x2 = malignant" in caplog.text) == said


@pytest.mark.parametrize("one, other", [("Benign", "benign"), ("malignant", "malignant "), ("01", "1")])
@pytest.mark.parametrize("kind", ["imagefolder", "filelist"])
def test_classes_that_look_alike_are_refused_over_both_splits(tmp_path, kind, one, other):
    for split, name in (("train", one), ("test", other)):
        for place in (name, "x"):
            (tmp_path / split / place).mkdir(parents=True)
            Image.new("L", (8, 8)).save(tmp_path / split / place / "0.png")
        np.save(tmp_path / f"{split}_images.npy", np.array([f"{split}/{name}/0.png", f"{split}/x/0.png"]))
        np.save(tmp_path / f"{split}_labels.npy", np.array([name, "x"]))
    with pytest.raises(ValueError, match="differ in case, blanks, accents or zeros alone") as error:
        downstream.open_splits("thing", entry_at(tmp_path, kind))
    assert repr(one) in str(error.value) and repr(other) in str(error.value)
    if kind == "imagefolder":  # who lists them means them
        train, _ = downstream.open_splits("thing", entry_at(tmp_path, folders=[other, one, "x"]))
        assert train.classes == [other, one, "x"]
