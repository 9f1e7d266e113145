"""The report says what the files say: numbers, what is missing, figures, and a page that stands alone."""

import csv
import importlib.util
import json
import re
import shutil
from html import unescape
from html.parser import HTMLParser

import cbis_tree
import evaluation_helpers
import numpy as np
import pytest
import torch
from model_helpers import write_checkpoint
from page_helpers import BROWSER, check_layout, laid_out, report
from PIL import Image
from roco_tree import make_roco

import main_linear
import make_report
import models
from datasets import create_reader
from evaluation import metrics
from inputs import transforms
from inputs.images import read_image
from preparation.cbis_tables import make_cbis
from reporting import figures
from reporting import runs as reporting_runs

KINDS = ("calc", "mass")


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    """An untrained and a trained tower probed on both tables, and the log of a training."""
    root = tmp_path_factory.mktemp("report")
    cbis_tree.make_small_cbis(root / "cbis")
    make_cbis(root / "cbis")
    checkpoint = write_checkpoint(root / "checkpoint.pt", "vit")
    for kind in KINDS:
        flags = ["--dataset", f"cbis_{kind}", "--root", str(root / "cbis"), "--pretrained", str(checkpoint), "-j", "0",
                 "--resamples", "50"]  # fmt: skip
        before = root / "runs" / "probe" / f"{kind}_untrained"
        main_linear.main([*flags, "--untrained", "--output-dir", str(before)])
        after = ["--output-dir", str(root / "runs" / "probe" / f"{kind}_trained"), "--fraction", "0.5"]
        main_linear.main([*flags, *after, "--baseline", str(before / "predictions.csv")])
    for seed in (0, 1):
        folder = root / "runs" / "training" / f"seed{seed}"
        folder.mkdir(parents=True)
        epochs = [
            {"kind": "epoch", "epoch": e, "step": 4 * e, "loss": 3.0 - e + seed, "val_i2t_r1": 10 * e} for e in range(3)
        ]
        (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in epochs))
    return root


@pytest.fixture
def runs(probed, tmp_path):
    """A copy that a test may change."""
    shutil.copytree(probed / "runs", tmp_path / "runs")
    return tmp_path / "runs"


@pytest.fixture(scope="module")
def shown(probed):
    """The runs, and their page and its text, for tests that change none."""
    shutil.copytree(probed / "runs", probed / "shown" / "runs")
    return probed / "shown" / "runs", *report(probed / "shown" / "runs")


def results_of(runs, kind: str, name: str):
    path = runs / "probe" / f"{kind}_{name}" / "results.json"
    return path, json.loads(path.read_text())


class Page(HTMLParser):
    """Tags that close, ids that are unique, and everything that would be fetched."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.fetched, self.links = [], [], [], []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.ids += [values["id"]] if "id" in values else []
        target = values.get("src") or values.get("href") or values.get("xlink:href")
        if target:
            (self.links if tag == "a" else self.fetched).append(target)
        if tag not in ("meta", "img", "br", "link", "use", "path", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag in ("use", "path", "br"):
            return
        assert self.open.pop() == tag, tag


def test_the_page_stands_alone(shown):
    _, page, html = shown
    parsed = Page()
    parsed.feed(html)
    assert parsed.open == [] and len(parsed.ids) == len(set(parsed.ids))
    assert all(target.startswith(("data:image/jpeg", "#")) for target in parsed.fetched)
    assert all(link.startswith("#") and link[1:] in parsed.ids for link in parsed.links)
    assert "@import" not in html and html.count("<script") == html.count("<script>") == 1  # its own
    assert html.count("<svg ") == len(page["figures"]) and all(f'id="{name}"' in html for name in page["figures"])


def test_every_number_is_a_files(shown):
    runs, page, html = shown
    for section in page["sections"]:
        assert [row["name"] for row in section["rows"]] == ["untrained", "trained"]
        for row in section["rows"]:
            _, result = results_of(runs, section["kind"], row["name"])
            for cell, entry in zip(row["cells"], result["metrics"].values(), strict=True):
                assert cell == metrics.Interval(**entry).percent() and cell in html
    lines = list(csv.DictReader((runs.parent / "report" / "tables.csv").read_text().splitlines()))
    assert [line["AUROC"] for line in lines] == [row["cells"][0] for s in page["sections"] for row in s["rows"]]
    tex = (runs.parent / "report" / "tables.tex").read_text()
    assert tex.count(r"\begin{tabular}") == 2 and all(line["AUROC"] in tex for line in lines)
    markdown = (runs.parent / "report" / "report.md").read_text()
    assert all(line["AUROC"] in markdown for line in lines)
    for name in page["figures"]:
        assert (runs.parent / "report" / "figures" / f"{name}.svg").is_file() and f"figures/{name}.svg" in markdown
        with Image.open(runs.parent / "report" / "figures" / f"{name}.png") as slide:
            assert slide.format == "PNG" and slide.width == 1000 and slide.convert("RGB").getpixel((0, 0)) == (255,) * 3


def test_another_number_in_a_file_is_another_page(runs, shown):
    _, _, before = shown
    path, result = results_of(runs, "calc", "trained")
    result["metrics"]["f1"]["value"] = 0.123456
    result["detection"]["brier"]["value"] = 0.98765
    path.write_text(json.dumps(result))
    _, after = report(runs)
    assert "12.35 (" not in before and "12.35 (" in after
    assert "0.988 (" not in before and "0.988 (" in after


def test_other_predictions_are_other_curves(runs, shown):
    before = shown[1]["figures"]
    path = runs / "probe" / "mass_trained" / "predictions.csv"
    rows = list(csv.reader(path.read_text().splitlines()))
    for row in rows[1:]:
        row[-3:] = row[-1:] + row[-2:-1] + row[-3:-2]
    path.write_text("\n".join(",".join(row) for row in rows) + "\n")
    after = report(runs)[0]["figures"]
    changed = {name for name in before if before[name].svg != after[name].svg}
    assert changed == {"mass_roc", "mass_precision", "mass_calibration"}


def test_what_no_file_holds_is_shown_as_missing(runs):
    path, result = results_of(runs, "calc", "untrained")
    del result["detection"]
    path.write_text(json.dumps(result))
    page, _ = report(runs)
    calc = page["sections"][0]
    assert calc["detection"][0]["cells"] == [reporting_runs.MISSING] * len(metrics.DETECTION)
    assert reporting_runs.MISSING not in calc["detection"][1]["cells"]


def test_synthetic_data_is_watermarked_on_every_figure(runs, shown):
    _, page, html = shown
    assert not page["synthetic"] and "SYNTHETIC" not in html
    (runs / "results.json").write_text(json.dumps({"synthetic": True}))
    page, html = report(runs)
    assert all("SYNTHETIC" in figure.svg for figure in page["figures"].values())
    assert html.count("SYNTHETIC data: these numbers say nothing about patients") == 1
    assert 'class="water"' in html


def test_lesions_are_counted_from_the_table_and_the_worst_errors_are_shown(shown, probed, tmp_path):
    runs, page, _ = shown
    for section in page["sections"]:
        with open(probed / "cbis" / f"{section['kind']}.csv") as file:
            rows = list(csv.DictReader(file))
        counts = [sum(row["split"] == split for row in rows) for split in ("train", "val", "test")]
        lesions = next(line for line in section["splits"] if line[0].startswith("lesions"))
        assert lesions[1:] == [str(n) for n in counts]
        assert len(section["samples"]["cards"]) == counts[2] and not section["samples"]["lacking"]
        assert all(card["image"].startswith("data:image/jpeg") for card in section["samples"]["cards"])
        assert section["samples"]["models"] == ["untrained", "trained"]
    page = make_report.main([str(runs), "--output-dir", str(tmp_path), "--no-images"])
    html = (tmp_path / "report.html").read_text("utf8")
    assert all(section["samples"] is None for section in page["sections"]) and "data:image" not in html


def test_two_classes_and_units_have_rows(shown):
    runs, page, html = shown
    calc = page["sections"][0]
    _, result = results_of(runs, "calc", "trained")
    name, cell = calc["two_class"][1]
    assert name == "trained" and cell == metrics.Interval(**result["two_class"]["metrics"]["auroc"]).percent()
    assert cell in html and [row["unit"].split()[0] for row in calc["units"]] == 2 * [
        "breast",
        "breast",
        "patient",
        "patient",
    ]


def test_the_nearest_captions_and_images_are_those_of_the_model(runs, probed, tmp_path):
    """Of a model with a text tower; one without says why there are none."""
    roco = make_roco(tmp_path / "roco")
    page, _ = report(runs, "--roco", str(roco))
    assert "reads no captions" in page["sections"][0]["nearest"]["why"]
    checkpoint = tmp_path / "clip.pt"
    evaluation_helpers.write_checkpoint(checkpoint)
    path = runs / "probe" / "calc_trained" / "settings.json"
    settings = json.loads(path.read_text())
    settings["args"]["pretrained"] = str(checkpoint)
    path.write_text(json.dumps(settings))
    page, html = report(runs, "--roco", str(roco))
    found = page["sections"][0]["nearest"]
    reader = create_reader("roco", str(roco), "", "validation", "all")
    loaded = models.load_pretrained(checkpoint)
    with torch.no_grad():
        captions = [reader.captions(i)[0] for i in range(len(reader))]
        texts = torch.nn.functional.normalize(loaded.model.encode_text(loaded.tokenizer(captions)), dim=-1)
        for line in found["lines"]:
            with open(probed / "cbis" / "calc.csv") as file:
                crop = next(row["crop"] for row in csv.DictReader(file) if row["lesion"] == line["lesion"])
            view = transforms.eval_view(loaded.preprocess)(read_image(probed / "cbis" / crop), None)
            image = torch.nn.functional.normalize(loaded.model.encode_image(view[None]), dim=-1)
            cosine = (image @ texts.T)[0]
            assert line["captions"][0][1] == pytest.approx(float(cosine.max()), abs=1e-5)
            assert line["captions"][0][0] in captions and len(line["images"]) == min(3, len(reader))
    assert line["captions"][0][0] in html.replace("&#39;", "'")


def test_training_curves_join_the_seeds(shown):
    _, page, _ = shown
    assert page["training"] == ["training_loss", "training_recall"]
    assert "mean and range of the seeds" in page["figures"]["training_loss"].title


def test_checklists_answer_from_files_or_say_not_reported(shown):
    _, page, _ = shown
    names = {entry["name"]: entry for entry in page["checklists"]}
    assert len(names["CLAIM"]["items"]) == 42 and [i[0] for i in names["CLAIM"]["items"]][-1] == "42"
    for entry in names.values():
        answers = {number: text for number, _, text in entry["items"]}
        assert 0 < entry["answered"] < len(answers)
        assert sum(text == "not reported" for text in answers.values()) == len(answers) - entry["answered"]
    answers = {number: text for number, _, text in names["CLAIM"]["items"]}
    assert answers["42"] == "not reported" and "torch" in answers["23"] and "test lesions" in answers["19"]


def test_checklists_say_of_another_set_what_its_files_say(tmp_path):
    """A table of a hospital's own: no word of CBIS-DDSM, its pathologies or its publishers."""
    rng, rows = np.random.default_rng(0), []
    for i in range(24):
        pixels = rng.integers(0, 100, (8, 8), dtype=np.uint8) + 100 * (i % 2)
        Image.fromarray(pixels.astype(np.uint8)).resize((32, 32)).save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png,{('clear', 'effusion')[i % 2]},p{i // 2},{'train' if i < 14 else 'test'}")
    (tmp_path / "table.csv").write_text("image,label,patient,split\n" + "\n".join(rows) + "\n")
    entry = dict(path=str(tmp_path), type="csv", train="train", test="test", labels=["clear", "effusion"])
    (tmp_path / "catalog.json").write_text(json.dumps({"hospital": entry | {"columns": {"group": "patient"}}}))
    checkpoint = write_checkpoint(tmp_path / "checkpoint.pt", "vit")
    main_linear.main(["--dataset", "hospital", "--catalog", str(tmp_path / "catalog.json"), "--pretrained",
                      str(checkpoint), "--cache-features", "-j", "0", "--resamples", "50", "--output-dir",
                      str(tmp_path / "runs" / "probe")])  # fmt: skip
    page, html = report(tmp_path / "runs")
    tripod, claim = ({number: text for number, _, text in entry["items"]} for entry in page["checklists"])
    assert "hospital" in tripod["5a"] and "clear, effusion" in tripod["15"] and "patients" in tripod["12d"]
    for number in ("8a", "12a", "14"):
        assert tripod[number] == "not reported"
    for number in ("5", "11", "12", "14", "34"):
        assert claim[number] == "not reported"
    said = " ".join([*tripod.values(), *claim.values()])
    assert not re.search("CBIS|Lee et al|patholog|mammogra|lesion|radiologist", said)
    assert set(tripod["12e"].split(", ")) == set(page["sections"][0]["columns"])


def test_names_cannot_break_the_page(runs):
    """Markup in a name stays text."""
    (runs / "probe" / "calc_trained").rename(runs / "probe" / "calc_<b>trained")
    _, html = report(runs)
    assert "<b>" not in html and "&lt;b&gt;trained" in html


@pytest.mark.parametrize("key", [
    "confusion", "classes", "test_patients", "interval.over", "metrics.f1.value", "operating_point.threshold",
    "differences.0.baseline", "differences.0.difference.auroc.p_value", "detection.brier.low", "units.breast.number",
    "subgroups.0.patients",
])  # fmt: skip
def test_a_key_that_a_file_lacks_is_named_with_it(tmp_path, probed, key):
    shutil.copytree(probed / "runs" / "probe" / "calc_trained", tmp_path / "run")
    path = tmp_path / "run" / "results.json"
    found = result = json.loads(path.read_text())
    *above, last = [int(part) if part.isdecimal() else part for part in key.split(".")]
    for part in above:
        found = found[part]
    del found[last]
    path.write_text(json.dumps(result))
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))} lacks the key {re.escape(key)}$"):
        make_report.main([str(tmp_path / "run"), "--output-dir", str(tmp_path / "report")])


@pytest.mark.parametrize("name", ["results.json", "zeroshot.json", "settings.json", "tables.json"])
@pytest.mark.parametrize("text, why", [("{", "is not JSON"), ("[1]", "holds a list, not an object with keys")])
def test_a_file_of_another_kind_is_named(tmp_path, name, text, why):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path / name))} {why}"):
        make_report.main([str(tmp_path), "--output-dir", str(tmp_path / "report")])


def test_names_are_text_in_every_file(runs):
    """Of a run, whose folder's name is the row's."""
    name = "=1|<b>$x^2$ [a](b) *c* {d}"
    (runs / "probe" / "calc_trained").rename(runs / "probe" / f"calc_{name}")
    page, html = report(runs)
    folder = runs.parent / "report"
    assert page["sections"][0]["rows"][-1]["name"] == name and "<b>" not in html and unescape(html).count(name) > 3
    with open(folder / "tables.csv", newline="") as file:
        assert f"'{name}" in [row["row"] for row in csv.DictReader(file)]
    latex = (folder / "tables.tex").read_text()
    assert r"=1\textbar{}\textless{}b\textgreater{}\$x\textasciicircum{}2\$ {[}a{]}(b) {*}c{*} \{d\}" in latex
    lines = (folder / "report.md").read_text().splitlines()
    escaped = r"=1\|\<b\>\$x^2\$ \[a\](b) \*c\* {d}"
    (row,) = [line for line in lines if line.startswith(f"| {escaped} † |")]
    assert len(re.findall(r"(?<!\\)\|", row)) == len(page["sections"][0]["columns"]) + 2
    assert "$x^2$" in unescape(page["figures"]["calc_auroc"].svg)


def test_tables_name_no_folder_outside_of_theirs(tmp_path):
    row = {"name": "A", "kind": "measured", "metrics": {}, "leaves_out": "", "files": ["../elsewhere"]}
    table = {"lesions": 1, "patients": 1, "published": {}, "rows": [row], "comparisons": [], "absent": {}}
    (tmp_path / "tables").mkdir()
    tables = {"synthetic": False, "cbis": "", "primary": None, "steps": [], "tables": {"calc": table}}
    (tmp_path / "tables" / "tables.json").write_text(json.dumps(tables))
    with pytest.raises(ValueError, match=r"tables.json: the path '../elsewhere' may leave"):
        make_report.main([str(tmp_path / "tables"), "--output-dir", str(tmp_path / "report")])


def test_a_baseline_is_named_however_short_its_path(runs):
    path, result = results_of(runs, "calc", "trained")
    for entry in result["differences"]:
        entry["baseline"] = "before/predictions.csv"
    path.write_text(json.dumps(result))
    page, _ = report(runs)
    assert page["sections"][0]["comparisons"][0]["baseline"] == "before"


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder of a run"):
        make_report.main([str(tmp_path / "nowhere")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no tables.json"):
        make_report.main([str(tmp_path / "empty")])
    (tmp_path / "empty" / "results.json").write_text("{")
    with pytest.raises(ValueError, match=r"results.json is not JSON"):
        make_report.main([str(tmp_path / "empty")])


def test_curves_equal_scikit_learns():
    from sklearn.metrics import precision_recall_curve, roc_curve

    rng = np.random.default_rng(0)
    positive = rng.random(80) < 0.4
    score = np.round(rng.normal(size=80) + positive, 1)
    one = np.ones((1, 80))
    false, true, _ = roc_curve(positive, score, drop_intermediate=False)
    assert np.allclose(figures.roc_on_grid(positive, score, one)[0], np.interp(figures.GRID, false, true))
    precision, recall, _ = precision_recall_curve(positive, score)
    ours = figures.precision_on_grid(positive, score, one)[0]
    for r, p in zip(figures.GRID, ours, strict=True):
        if any(np.isclose(recall, r)) and r > 0:
            assert np.isclose(precision[np.isclose(recall, r)], p).any()


def test_reliability_bins_hold_equally_many():
    rng = np.random.default_rng(0)
    p = rng.random(400)
    x, y = figures.reliability(rng.random(400) < p, p, bins=4)
    assert np.allclose(x, [0.125, 0.375, 0.625, 0.875], atol=0.05) and np.allclose(x, y, atol=0.12)


def test_figures_take_their_text_colour_from_the_page():
    svg = figures.forest([("a", metrics.Interval(0.5, 0.4, 0.6))], "A & b", "percent", synthetic=False).svg
    assert "currentColor" in svg and figures.INK not in svg and 'aria-label="A &amp; b"' in svg
    assert re.search(r"<text[^>]*>", svg), "text is text, not outlines"


def ticks(drawing) -> list[float]:
    """The numbers at a figure's axes."""
    found = re.findall(r"<text[^>]*>([−\d.]+)</text>", drawing.svg)
    return [float(text.replace("−", "-")) for text in found]


def test_axes_do_not_exaggerate():
    near = [("a", metrics.Interval(0.81, 0.80, 0.82)), ("b", metrics.Interval(0.83, 0.82, 0.84))]
    found = ticks(figures.forest(near, "t", "percent", synthetic=False))
    assert min(found) == 50 and max(found) == 100  # from chance on
    low = ticks(figures.forest([("a", metrics.Interval(0.4, 0.33, 0.5))], "t", "percent", synthetic=False))
    assert min(low) == 30
    small = ticks(figures.forest([("a", metrics.Interval(0.01, 0.005, 0.02))], "t", "points", False, zero=0.0))
    assert min(small) == -10 and max(small) == 10
    none = np.array([])
    loss = [("a", np.array([1, 2, 3]), np.array([401.0, 400.0, 399.0]), none, none)]
    drawn = ticks(figures.curves(loss, "t", ("epoch", "loss"), False, unit=False, epochs=True))
    assert min(drawn) == 0 and {1, 2, 3} <= set(drawn) and 1.5 not in drawn and 2.5 not in drawn
    once = [("a", np.array([1]), np.array([400.0]), none, none)]
    drawn = ticks(figures.curves(once, "t", ("epoch", "loss"), False, unit=False, epochs=True))
    assert 1 in drawn and all(number == int(number) for number in drawn)


def test_the_line_of_chance_under_precision_is_the_prevalence(shown, probed):
    _, page, _ = shown
    with open(probed / "cbis" / "mass.csv") as file:
        test = [row["pathology"] == "MALIGNANT" for row in csv.DictReader(file) if row["split"] == "test"]
    assert f"prevalence, {100 * np.mean(test):.0f}%" in page["figures"]["mass_precision"].svg


def test_classes_are_explained_where_they_first_stand(shown):
    _, _, html = shown
    text = unescape(re.sub(r"<(style|svg|script)\b.*?</\1>|<[^>]*>", " ", html, flags=re.DOTALL))
    first = text.index("BENIGN_WITHOUT_CALLBACK")
    assert text[first:].startswith("BENIGN_WITHOUT_CALLBACK (the radiologist asked for neither a biopsy nor")
    assert "chance of" not in text and "not another training" in text


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_the_page_lays_out_on_desk_and_phone_in_light_and_dark(runs, probed, tmp_path):
    flags = ["--cbis", str(probed / "cbis")]
    if importlib.util.find_spec("captum"):
        flags += ["--saliency", "4"]
    page, html = report(runs, *flags)
    assert html.count("<figure") > len(page["figures"]) - 1 > 5
    check_layout(runs.parent / "report" / "report.html", tmp_path / "seen")
    broken = tmp_path / "broken.html"
    broken.write_text("<html><head><title></title></head><body><script>missing()</script></body></html>")
    assert "missing is not defined" in laid_out(broken, 500, False, tmp_path)[1]  # a console error would be seen


def test_runs_are_told_apart_by_the_shortest_part_of_their_paths(tmp_path, probed):
    """README's own folders: runs/NAME/mass, each given by itself; a baseline has the name of its row."""
    result = json.loads(next(path for path in probed.rglob("results.json")).read_text())
    dataset = result["dataset"]
    for name in ("vit_mammo", "vit_all", "old/vit_all"):
        folder = tmp_path / "runs" / name / dataset.removeprefix("cbis_")
        folder.mkdir(parents=True)
        difference = {"baseline": str(tmp_path / "runs" / "vit_mammo" / folder.name / "predictions.csv")}
        apart = {key: value | {"p_value": 0.5} for key, value in result["metrics"].items()}
        differ = {"settings_differ": {"folds": [0, 5]}}
        more = {"differences": [difference | differ | {"difference": apart}]} if name == "vit_all" else {}
        (folder / "results.json").write_text(json.dumps(result | {"differences": []} | more))
    folders = sorted(path.parent for path in tmp_path.rglob("results.json"))
    (table,) = reporting_runs.gather(folders).tables.values()
    names = sorted(row.name for row in table.rows)
    assert names == sorted(["old/vit_all", f"{tmp_path.name}/vit_all", "vit_mammo"])
    (compared,) = table.comparisons
    assert compared["baseline"] == "vit_mammo" and compared["row"] in names
    make_report.main([*map(str, folders), "--output-dir", str(tmp_path / "page"), "--no-images"])
    page = (tmp_path / "page" / "report.html").read_text()
    assert "Recall is the balanced accuracy" in page and "Grey: as published" not in page  # no such row is there
    for file in ("report.html", "report.md"):
        assert "not the weights alone: folds is 0 there and 5 here" in (tmp_path / "page" / file).read_text()
    neighbours = {"baseline": difference["baseline"].replace("predictions", "predictions_knn")}
    (folders[-1] / "results.json").write_text(
        json.dumps(result | {"differences": [neighbours | {"difference": apart}]})
    )
    (table,) = reporting_runs.gather(folders).tables.values()
    assert "vit_mammo, k-NN" in [entry["baseline"] for entry in table.comparisons]
