"""synthetic/: the layouts are read back by our own readers, the anatomy and the rates checked against their
definitions, and that no pathology reaches an image or a caption."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import fields, replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT
from PIL import Image

import datasets
from preparation.cbis_tables import make_cbis
from synthetic import captions as wording
from synthetic import mammograms, modalities, phantoms, scene
from synthetic import world as layouts
from synthetic.phantoms import CALCIFICATIONS, MASSES, Finding
from synthetic.scene import Frame

GOLDEN = json.loads((ROOT / "tests" / "goldens" / "phantoms.json").read_text("utf-8"))
LESIONS = {"calc": {"train": 60, "test": 30}, "mass": {"train": 110, "test": 30}}
# The first lines of the tables as published.
HEADERS = {
    "calc": "patient_id,breast density,left or right breast,image view,abnormality id,abnormality type,calc type,"
    "calc distribution,assessment,pathology,subtlety,image file path,cropped image file path,"
    "ROI mask file path",
    "mass": "patient_id,breast_density,left or right breast,image view,abnormality id,abnormality type,mass shape,"
    "mass margins,assessment,pathology,subtlety,image file path,cropped image file path,ROI mask file path",
}
TABLES = [(kind, split) for kind in LESIONS for split in ("train", "test")]


def draw(root: Path, **changes) -> dict[str, int]:
    settings = {"seed": 3, "pairs": 60, "lesions": LESIONS, "size": 32, "workers": 1}
    return layouts.make_demo(root, **{**settings, **changes})


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("demo") / "world"
    draw(root)
    return root


def digests(root: Path) -> dict[str, str]:
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def case_table(root: Path, kind: str, split: str) -> list[dict[str, str]]:
    with open(root / "cbis" / "csv" / f"{kind}_case_description_{split}_set.csv", newline="") as file:
        return list(csv.DictReader(file))


def captions(n: int) -> list[str]:
    """Captions of mammograms, by the hundred without their images, and of other images."""
    out = []
    for i in range(n):
        patient = phantoms.make_patient(1, i)
        finding = phantoms.make_finding(patient, 0, ("calc", "mass")[i % 2]) if i % 20 else None
        rng, side, view = patient.stream(phantoms.CAPTION), phantoms.SIDES[i % 2], phantoms.VIEWS[i // 2 % 2]
        close = bool(finding and i % 3)
        out.append(wording.mammogram_caption(rng, patient, side, view, finding, close))
    return out + [modalities.draw_other(np.random.default_rng(i), 16)[1] for i in range(n // 4)]


# ------------------------------------------------------------------------------------------------------------
# Determinism


def test_the_same_settings_draw_the_same_bytes_in_any_number_of_processes(world, tmp_path):
    draw(tmp_path / "two", workers=2)
    assert digests(tmp_path / "two") == digests(world)


def test_the_world_is_the_one_of_every_release(world):
    """tests/goldens/phantoms.json, drawn by the first release: tables and captions to the byte, images to a grey level.

    Another build of NumPy may round a pixel the other way, and another libjpeg writes other bytes; a change of the
    drawing moves whole regions. A change that is meant raises layouts.VERSION and writes the file anew.
    """
    assert {name: value for name, value in digests(world).items() if not name.endswith(".jpg")} == GOLDEN["files"]
    for name, expected in GOLDEN["images"].items():
        pixels = np.asarray(Image.open(world / name), dtype=float)
        blocks = pixels.reshape(4, pixels.shape[0] // 4, 4, pixels.shape[1] // 4).mean((1, 3))
        np.testing.assert_allclose(blocks, expected, atol=0.5, err_msg=name)


def test_the_processes_that_draw_load_no_torch():
    code = "import sys, demo, synthetic.world; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_another_seed_draws_other_images_and_captions():
    for i in range(4):
        one, other = layouts.roco_pair(0, 32, "train", i), layouts.roco_pair(1, 32, "train", i)
        assert one[0].shape != other[0].shape or not np.array_equal(one[0], other[0])
    assert [layouts.roco_pair(0, 16, "train", i)[1] for i in range(20)] != [
        layouts.roco_pair(1, 16, "train", i)[1] for i in range(20)
    ]


def test_an_image_depends_on_its_place_and_not_on_how_many_there_are(world, tmp_path):
    few = {kind: {split: 4 for split in splits} for kind, splits in LESIONS.items()}
    draw(tmp_path / "few", pairs=10, lesions=few)
    few, many = digests(tmp_path / "few"), digests(world)
    images = [name for name in few if name.endswith(".jpg")]
    assert len(images) > 30 and all(few[name] == many[name] for name in images)


# ------------------------------------------------------------------------------------------------------------
# Layouts


def test_the_roco_part_is_read_by_the_roco_reader(world):
    ids = []
    for split, expected in (("train", 60), ("validation", 6), ("test", 6)):
        lines = (world / "roco" / split / "radiology" / "captions.txt").read_text("utf-8").splitlines()
        assert all(re.fullmatch(r"ROCO_\d{5}\t [A-Z].*\.", line) for line in lines)
        reader = datasets.create_reader("roco", world / "roco", split=split)
        assert len(reader) == expected == len(lines) and reader.dropped == 0
        assert min(reader.image(0).size) == 32
        ids += [line[:10] for line in lines]
    assert len(set(ids)) == len(ids) == 72


def test_the_caption_filters_have_something_to_filter(world):
    kept = {
        name: len(datasets.create_reader("roco", world / "roco", caption_filter=name))
        for name in ("mammo", "mammo-xray", "all")
    }
    assert 20 < kept["mammo"] < kept["mammo-xray"] < kept["all"] == 60


@pytest.mark.parametrize(("kind", "split"), TABLES)
def test_case_tables_have_the_published_header_line_ends_and_broken_path(world, kind, split):
    raw = (world / "cbis" / "csv" / f"{kind}_case_description_{split}_set.csv").read_bytes().decode()
    rows = case_table(world, kind, split)
    assert raw.startswith(HEADERS[kind] + "\r\n") and raw.count("\r\n") == 1 + len(rows)
    broken = {"calc": "cropped image file path", "mass": "ROI mask file path"}[kind]
    for row in rows:
        assert [name for name, value in row.items() if "\n" in value] == [broken]
        assert row[broken].endswith(".dcm\n")
        assert row["patient_id"] in row["image file path"]
    assert LESIONS[kind][split] <= len(rows) < LESIONS[kind][split] + 4  # a patient has at most four


def test_every_lesion_is_joined_with_its_crop_mask_and_full_view(world, tmp_path, capsys):
    missing = make_cbis(world / "cbis")
    assert not any(missing.values())
    for kind in LESIONS:
        with open(world / "cbis" / f"{kind}.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == sum(len(case_table(world, kind, split)) for split in ("train", "test"))
        for row in rows:
            crop, full, mask = (np.asarray(Image.open(world / "cbis" / row[name])) for name in ("crop", "full", "mask"))
            assert crop.shape == (32, 32) and full.shape == mask.shape == (40, 32)
            assert np.mean((mask < 30) | (mask > 225)) > 0.8 > np.mean((crop < 30) | (crop > 225))
    for kind in LESIONS:  # the tables above must not linger in a world that other tests compare
        (world / "cbis" / f"{kind}.csv").unlink()


def test_series_and_descriptions_have_the_published_faults(tmp_path):
    jobs = [("calc", "train", i) for i in range(60)]
    cases = [layouts.write_case(tmp_path, 0, 16, job) for job in jobs]
    rows, images = (list(chain.from_iterable(parts)) for parts in zip(*cases, strict=True))
    series = [[row[name].split("/")[2] for name in ("cropped image file path", "ROI mask file path")] for row in rows]
    shared = np.mean([crop == mask for crop, mask in series])
    assert 0.9 < shared < 1.0
    empty = np.mean([image["SeriesDescription"] == "" for image in images])
    assert 0.01 < empty < 0.1
    found = defaultdict(dict)  # series -> description -> path
    for image in images:
        if image["SeriesDescription"] in ("cropped images", "ROI mask images"):
            found[image["SeriesInstanceUID"]][image["SeriesDescription"]] = image["image_path"]
    order = [both["cropped images"] < both["ROI mask images"] for both in found.values() if len(both) == 2]
    assert 0.3 < np.mean(order) < 0.7


# ------------------------------------------------------------------------------------------------------------
# Patients and pathology


def test_no_patient_is_in_two_parts_or_splits(world):
    with open(world / "patients.csv", newline="") as file:
        listed = list(csv.DictReader(file))
    assert max(Counter(row["patient"] for row in listed).values()) == 1
    roco = {row["patient"] for row in listed if row["part"] == "roco"}
    assert len(roco) == 72
    seen = Counter()
    for kind, split in TABLES:
        patients = {row["patient_id"] for row in case_table(world, kind, split)}
        part = (f"cbis {kind}", split)
        assert patients == {row["patient"] for row in listed if (row["part"], row["split"]) == part}
        assert not patients & roco
        seen.update(patients)
    assert max(seen.values()) == 1


def test_two_views_of_a_lesion_agree_on_what_it_is(world):
    for kind, split in TABLES:
        lesions = defaultdict(list)
        for row in case_table(world, kind, split):
            lesions[row["patient_id"], row["abnormality id"]].append(row)
        both = [rows for rows in lesions.values() if len(rows) == 2]
        assert len(both) > 5
        for one, other in both:
            assert (one["image view"], other["image view"]) == ("CC", "MLO")
            same = [name for name in one if not name.endswith("path") and name != "image view"]
            assert [one[name] for name in same] == [other[name] for name in same]


PATHOLOGY = re.compile(
    r"benign|malign|cancer|carcin|tumou?r|neoplas|metasta|bi-?rads|suspicio|worris|biops|histolog|patholog|dcis|"
    r"in situ|recall|callback|call-back|assess|categor|probabl|fibroaden|lymphoma",
    re.IGNORECASE,
)


def test_no_caption_states_a_pathology_or_an_assessment():
    told = captions(4000)
    assert len(set(told)) > 2000  # varied
    assert [caption for caption in told if PATHOLOGY.search(caption)] == []
    assert PATHOLOGY.search("Mammogram: a Malignant mass.")


def test_every_descriptor_has_its_words():
    for appearance in CALCIFICATIONS + MASSES:
        for name in (appearance.first, appearance.second):
            assert name == "NA" or len(wording.WORDS[name]) >= 1
    told = "\n".join(captions(4000)).lower()
    for words in wording.WORDS.values():
        assert all(word.lower() in told for word in words)


def test_images_and_captions_do_not_know_the_pathology(monkeypatch):
    assert not {"pathology", "label"} & {field.name for field in fields(Finding)}
    before = [layouts.roco_pair(0, 32, "train", i) for i in range(12)]

    def forbidden(*_):
        raise AssertionError("the pathology was drawn")

    for module in (phantoms, layouts):
        monkeypatch.setattr(module, "draw_pathology", forbidden)
    turned = {
        kind: tuple(replace(a, malignant=1.0 - a.malignant) for a in table)
        for kind, table in phantoms.APPEARANCES.items()
    }
    monkeypatch.setattr(phantoms, "APPEARANCES", turned)
    for i, (image, caption) in enumerate(before):
        again = layouts.roco_pair(0, 32, "train", i)
        assert np.array_equal(image, again[0]) and caption == again[1]


@pytest.mark.parametrize("kind", ["calc", "mass"])
def test_malignancy_rates_come_out_as_the_table_says(kind):
    for appearance in phantoms.APPEARANCES[kind]:
        chances, n = appearance.probabilities(), 600
        assert sum(chances.values()) == pytest.approx(1.0)
        drawn = Counter()
        for number in range(n):
            patient = phantoms.make_patient(5, number)
            finding = replace(phantoms.make_finding(patient, 0, kind), appearance=appearance)
            drawn[phantoms.draw_pathology(patient, finding)] += 1
        for name, chance in chances.items():
            assert abs(drawn[name] - n * chance) <= 4 * np.sqrt(n * chance * (1 - chance)), (appearance, name)


def test_descriptors_come_as_often_as_their_weights():
    n = 4000
    for kind, table in phantoms.APPEARANCES.items():
        findings = (phantoms.make_finding(phantoms.make_patient(2, i), 0, kind) for i in range(n))
        found = Counter(finding.appearance for finding in findings)
        total = sum(a.weight for a in table)
        for appearance in table:
            chance = appearance.weight / total
            assert abs(found[appearance] - n * chance) <= 4 * np.sqrt(n * chance * (1 - chance)), appearance


# ------------------------------------------------------------------------------------------------------------
# Drawing


def test_a_right_breast_is_the_mirror_image_of_a_left_one():
    patient = phantoms.make_patient(0, 4)
    frame = mammograms.full_frame(64)
    for view in phantoms.VIEWS:
        left, right = (mammograms.draw_mammogram(patient, side, view, [], frame) > 30 for side in phantoms.SIDES)
        assert left[40, 0] and not left[40, -1] and right[40, -1] and not right[40, 0]  # chest wall
        assert np.mean(left == right[:, ::-1]) > 0.97 > np.mean(left == right)


def test_only_the_oblique_view_shows_the_pectoral_muscle():
    frame = mammograms.full_frame(64)
    for number in range(6):
        patient = phantoms.make_patient(0, number)
        cc, mlo = (mammograms.draw_mammogram(patient, "LEFT", view, [], frame) for view in phantoms.VIEWS)
        assert cc[:3, :6].mean() < 20 and mlo[:3, :6].mean() > 90


def test_power_falls_as_the_third_power_of_the_frequency():
    size, spectrum = 128, 0.0
    frame = Frame((size, size), 0.5)
    window = np.hanning(size)[:, None] * np.hanning(size)
    for seed in range(60):
        tile = np.random.default_rng(seed).standard_normal((64, 64))
        field = scene.power_law(tile, frame, 32.0)
        spectrum = spectrum + np.abs(np.fft.fft2((field - field.mean()) * window)) ** 2
    f = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size))
    band = (f > 0.015) & (f < 0.12)  # 4 to 33 mm: longer than the finest octave, shorter than the coarsest
    slope = np.polyfit(np.log(f[band]), np.log(spectrum[band]), 1)[0]
    assert -3.4 < slope < -2.6


def test_deposits_keep_their_amount_and_land_where_they_belong():
    frame = Frame((48, 64), 0.3, top=5.0, left=2.0)
    points, amounts = np.array([[10.0, 8.0], [13.3, 15.1]]), np.array([0.5, 0.2])
    canvas = scene.deposit(points, amounts, frame)
    assert canvas.sum() * 0.3**2 == pytest.approx(0.7, rel=1e-6)
    y, x = (canvas * frame.y).sum() / canvas.sum(), (canvas * frame.x).sum() / canvas.sum()
    assert (y, x) == pytest.approx(tuple((points * amounts[:, None]).sum(0) / 0.7), abs=0.01)
    assert scene.deposit(points + 1000.0, amounts, frame).sum() == 0.0


def test_a_crop_shows_what_the_full_view_shows():
    patient = phantoms.make_patient(0, 7)
    finding = phantoms.make_finding(patient, 0, "mass")
    whole = mammograms.full_frame(256)  # 0.5 mm
    part = Frame((90, 100), 0.5, top=60 * 0.5, left=40 * 0.5)
    full, crop = (
        mammograms.draw_mammogram(patient, "LEFT", "CC", [finding], frame).astype(float) for frame in (whole, part)
    )
    assert np.corrcoef(full[60:150, 40:140].ravel(), crop.ravel())[0, 1] > 0.98
    assert np.corrcoef(full[62:152, 40:140].ravel(), crop.ravel())[0, 1] < 0.98


def with_appearance(first: str, second: str, kind: str) -> Finding:
    appearance = next(a for a in phantoms.APPEARANCES[kind] if (a.first, a.second) == (first, second))
    patient = phantoms.make_patient(0, 1)
    return replace(phantoms.make_finding(patient, 0, kind), appearance=appearance, extent=16.0)


def test_margins_look_as_their_names_say():
    frame = Frame((160, 160), 0.25)
    distance = np.hypot(frame.y - 20.0, frame.x - 20.0) / 8.0  # in half extents
    rim, slope = {}, {}
    for margins in ("CIRCUMSCRIBED", "ILL_DEFINED", "SPICULATED"):
        finding = with_appearance("ROUND", margins, "mass")
        shadows = [mammograms.mass_shadow(np.random.default_rng(i), finding, frame, (20.0, 20.0)) for i in range(8)]
        rim[margins] = np.mean([shadow[(distance > 1.3) & (distance < 1.6)].max() for shadow in shadows])
        slope[margins] = np.mean([np.abs(np.diff(shadow, axis=0)).max() for shadow in shadows])
    assert rim["CIRCUMSCRIBED"] < 0.01 and rim["SPICULATED"] > 0.2
    assert slope["CIRCUMSCRIBED"] > 2 * slope["ILL_DEFINED"]


def test_calcifications_look_as_their_names_say():
    def seen(first: str, second: str, seed: int) -> np.ndarray:
        finding = with_appearance(first, second, "calc")
        points, amounts = mammograms.grains(np.random.default_rng(seed), finding, axis=0.3)
        assert (amounts >= 0).all() and np.abs(points).max() < 1.2 * finding.extent
        return points - np.average(points, axis=0, weights=amounts)

    def elongation(points: np.ndarray) -> float:
        small, large = np.linalg.eigvalsh(np.cov(points.T))
        return np.sqrt(large / small)

    stretch = {
        second: np.median([elongation(seen("PLEOMORPHIC", second, i)) for i in range(20)])
        for second in ("CLUSTERED", "LINEAR")
    }
    assert stretch["LINEAR"] > 3 > 2 > stretch["CLUSTERED"]

    # A ring is darker in its middle than on its rim, a round grain is not.
    for form, ring in (("LUCENT_CENTER", True), ("ROUND_AND_REGULAR", False)):
        second = "NA" if ring else "REGIONAL"
        finding = with_appearance(form, second, "calc")
        (_, _), (_, largest) = mammograms.GRAINS[form]
        points, amounts = mammograms.grains(np.random.default_rng(3), finding, axis=0.0)
        first = len(np.unique(amounts))  # grains differ in size, so each has its own amount
        grain, amount = (np.array_split(values, first)[0] for values in (points, amounts))
        middle = grain.mean(axis=0)
        canvas = scene.deposit(grain - middle, amount, Frame((80, 80), 0.1, -4.0, -4.0))
        assert np.abs(grain - middle).max() < 0.75 * largest
        assert (canvas[40, 40] < 0.3 * canvas.max()) == ring


# ------------------------------------------------------------------------------------------------------------
# Errors and reruns


def test_a_finished_world_is_kept_and_another_one_is_refused(world, caplog):
    before = {path: path.stat().st_mtime_ns for path in world.rglob("*")}
    with caplog.at_level("INFO", "medslip"):
        counts = draw(world)
    assert counts["ROCO train pairs"] == 60 and "keeping the SYNTHETIC" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in world.rglob("*")} == before
    with pytest.raises(ValueError, match="was drawn with"):
        draw(world, seed=4)


def test_a_folder_with_other_things_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="holds something else"):
        draw(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_an_interrupted_drawing_leaves_nothing_that_looks_finished(tmp_path, monkeypatch):
    (tmp_path / "world").mkdir()  # an empty folder may be there before
    with monkeypatch.context() as patch:
        patch.setattr(layouts, "write_table", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            draw(tmp_path / "world", pairs=4)
    assert not any((tmp_path / "world").iterdir())
    draw(tmp_path / "world", pairs=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["world"]


@pytest.mark.parametrize(
    "change",
    [
        {"pairs": 0},
        {"size": 0},
        {"workers": 0},
        {"seed": -1},
        {"lesions": {**LESIONS, "mass": {"train": 5, "test": 0}}},
    ],
)
def test_settings_without_sense_are_named(tmp_path, change):
    with pytest.raises(ValueError, match=next(iter(change))):
        draw(tmp_path / "world", **change)
    assert not (tmp_path / "world").exists()


def test_it_says_that_it_is_synthetic(world):
    assert "SYNTHETIC" in (world / "README.txt").read_text("utf-8").splitlines()[0]
    assert '"synthetic": true' in (world / "demo.json").read_text("utf-8")
