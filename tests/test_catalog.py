"""labels.json, templates.json and dataset_catalog.json against the published evaluation."""

import hashlib
import json
from pathlib import Path

import pytest

from evaluation import catalog as evaluation_catalog
from inputs.cbis import CBIS_CLASSES

GOLDEN = json.loads((Path(__file__).parent / "goldens" / "catalog_check.json").read_text())
PUBLISHED = [name for name in GOLDEN if name != "_"]
OURS = ["digits", "cbis_calc", "cbis_mass"]
LABELS = evaluation_catalog.read_prompts("labels.json")
TEMPLATES = evaluation_catalog.read_prompts("templates.json")


def digest(value):
    """First 8 hex digits of sha256, keeping nested lists of synonyms."""
    return [digest(v) for v in value] if isinstance(value, list) else hashlib.sha256(value.encode()).hexdigest()[:8]


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_label_and_prompt_is_the_published_one(name):
    assert digest(LABELS[name]) == GOLDEN[name]["each_label"]
    assert digest(TEMPLATES[name]) == GOLDEN[name]["each_template"]
    assert (len(LABELS[name]), len(TEMPLATES[name])) == (GOLDEN[name]["labels"], GOLDEN[name]["templates"])


def test_there_are_28_published_sets_and_three_of_ours():
    assert len(PUBLISHED) == 28
    assert set(LABELS) == set(TEMPLATES) == {*PUBLISHED, *OURS}


def test_every_template_has_one_place_for_the_name():
    assert not [t for templates in TEMPLATES.values() for t in templates if t.count("{}") != 1]


def test_our_lesion_prompts_stand_in_the_order_of_the_classes():
    for kind in ("calc", "mass"):
        named = [synonyms[0].upper().replace(" ", "_") for synonyms in LABELS[f"cbis_{kind}"]]
        noun = {"calc": "CALCIFICATION", "mass": "MASS"}[kind]
        assert [name.replace(f"_{noun}", "") for name in named] == list(CBIS_CLASSES)


MAMMOGRAPHY = {
    "vindr_birads", "vindr_density", "rsna_cancer", "cmmd", "embed_birads", "embed_density", "inbreast_birads",
}  # fmt: skip


def test_catalog_holds_the_26_sets_and_ours():
    catalog = evaluation_catalog.read_catalog()
    names = {*PUBLISHED, *OURS, "roco"} - {"birdsnap", "voc2007"}  # those two have labels but no entry
    assert set(catalog) == names | MAMMOGRAPHY and len(names) == 30
    kinds = {kind: {n for n, e in catalog.items() if e["type"] == kind} for kind in evaluation_catalog.TYPES}
    assert kinds["filelist"] == {"sun397", "clevr_counts"}
    assert kinds["special"] == {"cifar10", "cifar100", "stl10", "mnist", *OURS, "roco"}


def test_every_metric_belongs_to_a_set():
    stated = {name: entry["metric"] for name, entry in evaluation_catalog.read_catalog().items() if "metric" in entry}
    assert set(stated) - MAMMOGRAPHY <= set(LABELS) and len(set(stated) - MAMMOGRAPHY) == 6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"pets": {"path": "p", "type": "imagefolder", "train": "train"}}', "pets lacks test"),
        (
            '{"pets": {"path": "p", "type": "folder", "train": "a", "test": "b"}}',
            "imagefolder, filelist, csv, special",
        ),
        ('{"pets": {"path": "p", "type": "special", "train": "a", "test": "b"}}', "no special set"),
        ('{"pets": ', "not valid JSON"),
    ],
)
def test_a_bad_catalog_names_its_fault(tmp_path, text, message):
    (tmp_path / "catalog.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        evaluation_catalog.read_catalog(tmp_path / "catalog.json")


def test_an_absent_catalog_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        evaluation_catalog.read_catalog(tmp_path / "none.json")


def test_a_relative_path_is_relative_to_the_catalog_wherever_the_command_starts(tmp_path, monkeypatch):
    (tmp_path / "lab").mkdir()
    entry = {"path": "sets/mine", "type": "imagefolder", "train": "train", "test": "test"}
    (tmp_path / "lab" / "catalog.json").write_text(
        json.dumps({"mine": entry, "digits": {**entry, "path": "", "type": "special"}})
    )
    monkeypatch.chdir(tmp_path)
    found = evaluation_catalog.read_catalog("lab/catalog.json")
    assert found["mine"]["path"] == str(tmp_path / "lab" / "sets" / "mine") and found["digits"]["path"] == ""
