"""The page's part to look through: which cases, with which images and scores, their order, and what stays out."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from evaluation_helpers import write_checkpoint
from page_helpers import BROWSER, check_layout, laid_out, report
from PIL import Image
from test_csv_sets import probe, read_rows, write_set

import eval_zeroshot
import predict
from reporting import pictures as reporting_pictures
from reporting import samples
from reporting.pictures import Pictures, jpeg

needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two probes of a csv set, in folders of one name, zero-shot scores, a bank and a search in it."""
    root = tmp_path_factory.mktemp("samples")
    catalog = write_set(root / "set", patients=60)
    weights = root / "checkpoint.pt"
    write_checkpoint(weights)
    for name, flags in (("a", ("--untrained",)), ("b", ())):
        probe(catalog, root / "runs" / name / "probe", weights, "--cache-features", *flags)
    zero = ["--resume", str(weights), "--catalog", str(catalog), "--datasets", "hospital", "-j", "0"]
    eval_zeroshot.main([*zero, "--output-dir", str(root / "runs" / "zero")])
    images = sorted((root / "set" / "images").glob("*.png"))
    bank = str(root / "bank.npz")
    predict.main(["embed", str(weights), *map(str, images[:6]), "--output", bank])
    predict.main(["search", bank, str(images[0]), "-k", "3", "--output", str(root / "runs" / "found.csv")])
    return root


@pytest.fixture
def runs(world, tmp_path):
    """A copy that a test may change."""
    shutil.copytree(world / "runs", tmp_path / "runs")
    return tmp_path / "runs"


def test_cards_hold_what_each_models_predictions_say_and_no_more(world, runs):
    page, html = report(runs)
    (section,) = page["sections"]
    found = section["samples"]
    files = [runs / "a/probe/predictions.csv", runs / "b/probe/predictions.csv", runs / "zero/zeroshot_hospital.csv"]
    assert found["models"] == [row["name"] for row in section["rows"]] and len(found["models"]) == 3
    by_card = {card["name"]: card for card in found["cards"]}
    for number, file in enumerate(files):
        rows = read_rows(file)
        assert set(by_card) == {row["image"] for row in rows}
        for row in rows:
            card, prob = by_card[row["image"]], [float(row[f"prob_{name}"]) for name in found["classes"]]
            assert card["group"] == row["group"] and found["classes"][card["label"]] == row["label"]
            top, its_own, own, every = card["answers"][number]
            assert found["classes"][top] == row["predicted"] and np.allclose(every, prob, atol=6e-5)
            assert its_own == pytest.approx(max(prob), abs=6e-5)
            assert own == pytest.approx(float(row[f"prob_{row['label']}"]), abs=6e-5)
    worst = [max(1 - answer[2] for answer in card["answers"]) for card in found["cards"]]
    assert np.all(np.diff(worst) < 1e-3)  # the largest error of any model first
    allowed = {value for file in files for row in read_rows(file) for value in row.values()}
    shown = {value for card in found["cards"] for value in (card["name"], card["group"])}
    assert shown <= allowed and html.count('class="card"') == len(found["cards"])


def test_images_are_those_of_the_rows_without_their_metadata(world, runs):
    page, html = report(runs)
    for card in page["sections"][0]["samples"]["cards"]:
        with Image.open(world / "set" / card["name"]) as image:
            assert card["image"] == reporting_pictures.data_uri(jpeg(image.convert("RGB")))
    image = Image.fromarray(np.zeros((9, 9, 3), np.uint8))
    image.info["comment"] = image.info["exif"] = b"Exif\0\0 patient Jane Doe"
    assert b"Jane Doe" not in jpeg(image)


def test_images_beyond_the_limit_lie_beside_the_page(world, runs, monkeypatch):
    monkeypatch.setattr("reporting.page.Pictures", lambda: Pictures(within=3000))
    page, html = report(runs)
    cards, folder = page["sections"][0]["samples"]["cards"], runs.parent / "report"
    within = [card for card in cards if card["image"].startswith("data:")]
    beside = [card["image"] for card in cards if not card["image"].startswith("data:")]
    assert 0 < len(within) < len(cards) and all((folder / name).is_file() for name in beside)
    assert all(f'src="{name}" alt=' in html for name in beside) and html.count('loading="lazy"') >= len(cards)
    report(runs, "--no-images")
    assert not list(folder.glob("report_images/*.jpg"))  # of patients, whom this page leaves out


def test_a_set_that_was_moved_is_one_line(runs):
    for file in runs.rglob("settings.json"):
        settings = json.loads(file.read_text())
        settings["args"]["catalog"] = "/nowhere/catalog.json"
        file.write_text(json.dumps(settings))
    for file in runs.rglob("found.csv"):
        file.unlink()
    page, html = report(runs)
    found = page["sections"][0]["samples"]
    assert found["lacking"].startswith(f"{len(found['cards'])} of {len(found['cards'])} images are not found")
    assert html.count("images are not found") == 1 and "<img" not in html and 'class="card"' in html


def test_a_path_outside_of_the_set_is_refused(runs):
    for file in runs.glob("*/probe/predictions.csv"):
        file.write_text(file.read_text().replace("images/", "../images/"))
    shutil.rmtree(runs / "zero")
    with pytest.raises(ValueError, match=r"predictions.csv: the path '../images/"):
        report(runs)


def test_of_many_samples_the_worst_and_the_surest_are_shown(monkeypatch):
    errors = np.random.default_rng(0).permutation(1000) / 1000
    shown, which = samples.most_telling(errors)
    order = errors[shown].tolist()
    assert len(shown) == samples.MOST and order == sorted(order, reverse=True)
    assert min(order[:300]) >= 0.7 and max(order[300:]) < 0.1 and "Of 1000" in which


def test_a_search_is_shown_with_its_cosines(world, runs):
    page, html = report(runs)
    (found,) = page["searches"]
    rows = read_rows(runs / "found.csv")
    (line,) = found["lines"]
    assert [near["name"] for near in line["found"]] == [row["found"] for row in rows]
    assert [near["cosine"] for near in line["found"]] == [float(row["cosine"]) for row in rows]
    assert line["image"] == line["found"][0]["image"] != "" and line["found"][0]["cosine"] == pytest.approx(1, abs=1e-5)
    assert f"({float(rows[1]['cosine']):.3f})" in html and not found["lacking"]


# What a reader does by keys: choose a model, an order and the misclassified, and ask for more.
STEPS = """
  const look = document.querySelector(".look"), steps = {};
  const order = () => [...look.querySelectorAll(".card")].filter(seen).map(c => c.dataset.name);
  const choose = (name, value) => {
    const select = look.querySelector(`select[name=${name}]`);
    select.value = value;
    select.dispatchEvent(new Event("change"));
  };
  steps.opened = order().length;
  look.querySelector(".further").click();
  steps.all = order().length;
  steps.focus = document.activeElement.dataset.name;
  steps.next = order()[24];
  choose("model", "0");
  for (const sort of ["error", "sure", "patient", "label", "1"]) {
    choose("sort", sort);
    look.querySelector(".further").click();
    steps[sort] = order();
  }
  choose("sort", "error");
  choose("show", "wrong");
  steps.wrong = order();
  steps.said = [...look.querySelectorAll(".card")].filter(seen).map(c => c.querySelector(".said").textContent);
  choose("class", "0");
  steps.oneClass = order();
  steps.told = look.querySelector("output").textContent;
"""


@pytest.mark.slow
@needs_browser
def test_cases_sort_by_error_patient_and_class(world, runs, tmp_path):
    rng = np.random.default_rng(0)
    file = runs / "a" / "probe" / "predictions.csv"
    rows = read_rows(file)
    for row in rows:  # a model that errs, so that orders differ
        prob = rng.dirichlet([1, 1, 1])
        row |= {f"prob_{name}": str(p) for name, p in zip(("benign", "malignant", "normal"), prob, strict=True)}
        row["predicted"] = ("benign", "malignant", "normal")[prob.argmax()]
    with open(file, "w", newline="") as out:
        writer = csv.DictWriter(out, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    shutil.rmtree(runs / "zero")
    page, _ = report(runs)
    seen, console = laid_out(runs.parent / "report" / "report.html", 1300, False, tmp_path, STEPS)
    steps, total = seen["steps"], len(rows)
    assert console == "" and steps["opened"] == min(24, total) and steps["all"] == min(48, total)
    cards = {card["name"]: card for card in page["sections"][0]["samples"]["cards"]}
    own = {name: card["answers"][0] for name, card in cards.items()}
    label = {name: card["label"] for name, card in cards.items()}
    assert steps["error"] == sorted(own, key=lambda name: own[name][2])[:48]
    assert steps["sure"] == sorted(own, key=lambda name: -own[name][1])[:48]
    assert [own[name][3][1] for name in steps["1"]] == sorted((a[3][1] for a in own.values()), reverse=True)[:48]
    numbers = [int(cards[name]["group"].removeprefix("P")) for name in steps["patient"]]
    assert numbers == sorted(numbers)
    assert [label[name] for name in steps["label"]] == sorted(label.values())[:48]
    wrong = [name for name in sorted(own, key=lambda name: own[name][2]) if own[name][0] != label[name]]
    assert steps["wrong"] == wrong[:24] and all("its own class" in text for text in steps["said"])
    assert steps["oneClass"] == [name for name in wrong if label[name] == 0][:24]
    assert steps["told"].endswith(f"of {sum(label[name] == 0 for name in wrong)} shown")
    assert 24 < total <= 48 and steps["focus"] == steps["next"]


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("beside", [False, True])
def test_a_page_of_an_own_set_and_of_runs_of_one_name_lays_out(world, runs, tmp_path, monkeypatch, beside):
    """Six runs in folders called probe, images in the page or beside it."""
    for name in ("c", "deep/c", "d"):
        shutil.copytree(runs / "b", runs / name)
    if beside:
        monkeypatch.setattr("reporting.page.Pictures", lambda: Pictures(within=2000))
    page, _ = report(runs)
    assert len(page["sections"][0]["rows"]) == 6
    check_layout(Path(runs.parent / "report" / "report.html"), tmp_path / "seen")
