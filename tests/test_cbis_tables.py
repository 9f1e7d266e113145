"""make_dataset.py cbis on small downloads of both editions, against the truth that they were drawn with."""

from __future__ import annotations

import csv
import os
from collections import Counter
from functools import partial
from pathlib import Path

import cbis_tree
import numpy as np
import pytest
from PIL import Image
from sklearn.model_selection import StratifiedGroupKFold

import make_dataset
from inputs.cbis import CBIS_CLASSES, CbisLesions
from inputs.transforms import Preprocess
from preparation import cbis_tables
from synthetic import world

# Counted in the published tables: rows, pathologies in the order of CBIS_CLASSES, patients, full images.
PUBLISHED = {
    ("calc", "train"): (1546, (528, 474, 544), 602, 1227),
    ("calc", "test"): (326, (130, 67, 129), 151, 284),
    ("mass", "train"): (1318, (577, 104, 637), 691, 1231),
    ("mass", "test"): (378, (194, 37, 147), 201, 361),
}


def read_table(root: Path, kind: str) -> list[dict[str, str]]:
    with open(root / f"{kind}.csv", newline="") as file:
        return list(csv.DictReader(file))


def wrong_images(root: Path, truth: dict[Path, str]) -> list[str]:
    """Lesions whose row names an image of another kind, or one of another lesion's series."""
    wrong = []
    for kind in ("calc", "mass"):
        published = [
            row
            for split in ("train", "test")
            for row in cbis_tree.read_case_table(root / "csv" / cbis_tree.TABLES[kind, split])
        ]
        for row, case in zip(read_table(root, kind), published, strict=True):
            series = {
                "crop": case["cropped image file path"],
                "full": case["image file path"],
                "mask": case["ROI mask file path"],
            }
            for image, path in series.items():
                right_series = Path(row[image]).parts[-2][-9:] == path.split("/")[2][-9:]
                if truth[Path(row[image])] != cbis_tree.DESCRIPTIONS[image] or not right_series:
                    wrong.append(f"{row['lesion']} {image}")
    return wrong


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[Path, dict[Path, str]]:
    root = tmp_path_factory.mktemp("cbis")
    truth = cbis_tree.make_small_cbis(root)
    make_dataset.main(["cbis", "--root", str(root)])
    return root, truth


def test_jpeg_edition(small):
    root, truth = small
    assert wrong_images(root, truth) == []
    rows = read_table(root, "calc")
    assert {row["type"] for row in rows} == {"calc"}
    assert {
        (row["patient"], row["side"], row["view"], row["abnormality"]) for row in rows if row["split"] == "test"
    } == {
        (patient, side, view, str(abnormality))
        for patient, side, view, abnormality, _ in cbis_tree.make_lesions(20, 1001)
    }


def test_no_descriptions_at_all(tmp_path):
    """Then the pixels decide, whatever the file order."""
    truth = cbis_tree.make_small_cbis(tmp_path)
    (tmp_path / "csv" / "dicom_info.csv").unlink()
    make_dataset.main(["cbis", "--root", str(tmp_path)])
    assert wrong_images(tmp_path, truth) == []


@pytest.mark.parametrize("by_uid", [True, False])
def test_dicom_edition(tmp_path, by_uid):
    pytest.importorskip("pydicom")
    for i, kind in enumerate(("calc", "mass")):
        cbis_tree.write_case_table(tmp_path, kind, "train", cbis_tree.make_lesions(30, 1 + 2000 * i), apart=3)
        cbis_tree.write_case_table(tmp_path, kind, "test", cbis_tree.make_lesions(6, 1001 + 2000 * i))
    truth = cbis_tree.make_dicom_edition(tmp_path, by_uid)
    make_dataset.main(["cbis", "--root", str(tmp_path)])
    assert wrong_images(tmp_path, truth) == []
    pixels, label, row = CbisLesions(tmp_path, "mass", "test", "crop", Preprocess(size=16))[0]
    assert pixels.shape == (3, 16, 16) and CBIS_CLASSES[label] == row["pathology"]


def small_dicom_edition(root: Path) -> None:
    for i, kind in enumerate(("calc", "mass")):
        cbis_tree.write_case_table(root, kind, "train", cbis_tree.make_lesions(10, 1 + 2000 * i), apart=2)
        cbis_tree.write_case_table(root, kind, "test", cbis_tree.make_lesions(3, 1001 + 2000 * i))
    cbis_tree.make_dicom_edition(root)


LAYOUTS = {  # of a file in CBIS-DDSM/<case>/<study>/<series>/
    "case/study/uid": lambda case, study, uid, name: Path("CBIS-DDSM", case, study, uid, name),
    "tcia_utils": lambda case, study, uid, name: Path("CBIS-DDSM", uid, name),
    "idc-index": lambda case, study, uid, name: Path("cbis_ddsm", case, study, f"MG_{uid}", name),
    "a folder a study": lambda case, study, uid, name: Path("CBIS-DDSM", study, f"{uid}_{name}"),
}


@pytest.mark.filterwarnings("ignore:Invalid value for VR UI")  # the small trees have zeros in front
@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_downloaders_layouts_need_no_metadata(tmp_path, layout):
    """The tables are those that NBIA's metadata.csv gives, each path at its new place."""
    pydicom = pytest.importorskip("pydicom")
    small_dicom_edition(tmp_path)
    cbis_tables.make_cbis(tmp_path, val_folds=2)
    expected = {kind: read_table(tmp_path, kind) for kind in ("calc", "mass")}
    (tmp_path / "metadata.csv").unlink()
    moved = {"": ""}
    (tmp_path / "CBIS-DDSM").rename(tmp_path / "nbia")
    for path in (tmp_path / "nbia").rglob("*.dcm"):
        case, study, uid, name = path.relative_to(tmp_path / "nbia").parts
        new = LAYOUTS[layout](case, study, uid, name)
        (tmp_path / new).parent.mkdir(parents=True, exist_ok=True)
        dataset = pydicom.dcmread(path)
        dataset.SeriesInstanceUID = uid
        dataset.save_as(tmp_path / new)
        moved[f"CBIS-DDSM/{case}/{study}/{uid}/{name}"] = new.as_posix()
    cbis_tables.make_cbis(tmp_path, val_folds=2)
    for kind, rows in expected.items():
        assert all(row["crop"] and row["full"] and row["mask"] for row in rows)
        new = [row | {image: moved[row[image]] for image in ("crop", "full", "mask")} for row in rows]
        assert read_table(tmp_path, kind) == new


def test_no_table_is_written_without_one_image(tmp_path, caplog):
    pytest.importorskip("pydicom")
    small_dicom_edition(tmp_path)
    (tmp_path / "metadata.csv").unlink()
    for path in [*tmp_path.rglob("*.dcm")]:
        if cases_of(tmp_path, "mass") & set(path.parts):
            path.unlink()
    cbis_tables.make_cbis(tmp_path, val_folds=2)
    assert (tmp_path / "calc.csv").is_file() and not (tmp_path / "mass.csv").exists()
    assert "no image of any lesion of mass is in" in caplog.text
    (tmp_path / "calc.csv").unlink()
    for path in [*tmp_path.rglob("*.dcm")]:
        path.unlink()
    with pytest.raises(FileNotFoundError, match="none is in .*no table is written; read are jpeg/<series UID>.*MG_"):
        cbis_tables.make_cbis(tmp_path, val_folds=2)
    assert not list(tmp_path.glob("*.csv"))


def cases_of(root: Path, kind: str) -> set[str]:
    columns = ("cropped image file path", "image file path")
    tables = [cbis_tree.read_case_table(root / "csv" / cbis_tree.TABLES[kind, split]) for split in ("train", "test")]
    return {row[column].split("/")[0] for table in tables for row in table for column in columns}


@pytest.mark.skipif("CBIS_TABLES" not in os.environ, reason="CBIS_TABLES names the folder of the published tables")
def test_published_tables(tmp_path, capsys):
    cbis_tree.copy_published_tables(tmp_path, Path(os.environ["CBIS_TABLES"]))
    truth = cbis_tree.make_jpeg_edition(tmp_path)
    assert len(truth) == 10239  # "Number of Images" of the collection
    make_dataset.main(["cbis", "--root", str(tmp_path)])
    assert capsys.readouterr().out.count("\n0 images could not be resolved") == 2
    assert wrong_images(tmp_path, truth) == []
    for (kind, split), expected in PUBLISHED.items():
        rows = [row for row in read_table(tmp_path, kind) if (row["split"] == "test") == (split == "test")]
        pathology = Counter(row["pathology"] for row in rows)
        patients, full = (len({row[column] for row in rows}) for column in ("patient", "full"))
        assert (len(rows), tuple(pathology[name] for name in CBIS_CLASSES), patients, full) == expected
    with pytest.raises(ValueError, match="31 patients .*P_00016.*P_01883"):
        make_dataset.main(["cbis", "--root", str(tmp_path), "--merge-types"])


def test_validation_split_keeps_patients_whole_and_pathologies_in_proportion(small):
    root, _ = small
    for kind in ("calc", "mass"):
        rows = read_table(root, kind)
        patients = {
            split: {row["patient"] for row in rows if row["split"] == split} for split in ("train", "val", "test")
        }
        assert not patients["train"] & patients["val"]
        assert not (patients["train"] | patients["val"]) & patients["test"]
        for name in CBIS_CLASSES:
            counts = Counter(row["split"] for row in rows if row["pathology"] == name)
            assert 0.1 < counts["val"] / (counts["train"] + counts["val"]) < 0.3


def test_validation_split_follows_the_seed(small):
    root, _ = small

    def val_patients(seed: int) -> set[str]:
        cbis_tables.make_cbis(root, seed=seed)
        return {row["patient"] for row in read_table(root, "calc") if row["split"] == "val"}

    one, two = val_patients(1), val_patients(2)
    assert one == val_patients(1) and one != two
    cbis_tables.make_cbis(root)


def test_counts_are_printed(small, capsys):
    root, _ = small
    make_dataset.main(["cbis", "--root", str(root)])
    lines = capsys.readouterr().out.splitlines()
    rows = read_table(root, "calc")
    test = next(line.split() for line in lines if line.split()[:1] == ["test"])
    pathology = Counter(row["pathology"] for row in rows if row["split"] == "test")
    assert test[1:6] == [
        str(sum(pathology.values())), *(str(pathology[name]) for name in CBIS_CLASSES), "20",
    ]  # fmt: skip


def test_missing_images_are_named_and_left_empty(tmp_path, caplog):
    truth = cbis_tree.make_small_cbis(tmp_path)
    cbis_tables.make_cbis(tmp_path)
    lost = next(row for row in read_table(tmp_path, "mass") if row["split"] == "test")
    (tmp_path / lost["crop"]).unlink()
    caplog.set_level("INFO")
    report = cbis_tables.make_cbis(tmp_path)
    assert [line for lines in report.values() for line in lines] == report[tmp_path / "mass.csv"]
    (line,) = report[tmp_path / "mass.csv"]
    assert lost["lesion"] in line and "no crop" in line and "row 1," in line
    assert line in caplog.text
    again = next(row for row in read_table(tmp_path, "mass") if row["lesion"] == lost["lesion"])
    assert again == lost | {"crop": "", "crop_width": "", "crop_height": ""}
    assert truth[Path(again["mask"])] == "ROI mask images"

    with pytest.raises(ValueError, match=f"1 of .* test lesions have no crop: {lost['lesion']}"):
        CbisLesions(tmp_path, "mass", "test", "crop", Preprocess(size=16))
    fewer = CbisLesions(tmp_path, "mass", "test", "crop", Preprocess(size=16), skip_missing=True)
    whole = CbisLesions(tmp_path, "mass", "test", "mask", Preprocess(size=16))
    assert fewer.dropped == 1 and whole.dropped == 0 and len(fewer) == len(whole) - 1


def test_two_images_that_nothing_tells_apart_stay_unresolved(tmp_path):
    cbis_tree.make_small_cbis(tmp_path)
    (tmp_path / "csv" / "dicom_info.csv").unlink()
    cbis_tables.make_cbis(tmp_path)
    row = read_table(tmp_path, "calc")[0]
    Image.open(tmp_path / row["crop"]).save(tmp_path / row["mask"])
    lines = cbis_tables.make_cbis(tmp_path)[tmp_path / "calc.csv"]
    assert [line.split(": ")[1].split(" among")[0] for line in lines] == ["no crop", "no mask"]


def test_types_merge_only_where_no_patient_leaks(tmp_path):
    cbis_tree.make_small_cbis(tmp_path)
    cbis_tables.make_cbis(tmp_path, merge_types=True)
    rows = read_table(tmp_path, "both")
    assert {row["type"] for row in rows} == {"calc", "mass"}
    val = {row["patient"] for row in rows if row["split"] == "val"}
    assert not val & {row["patient"] for row in rows if row["split"] == "train"}

    (tmp_path / "both.csv").unlink()
    cbis_tree.write_case_table(tmp_path, "mass", "test", cbis_tree.make_lesions(20, first=39))
    cbis_tables.make_cbis(tmp_path)  # apart they are fine; the images of the new rows are missing
    with pytest.raises(ValueError, match="2 patients in both training and test.*P_00039, P_00040"):
        make_dataset.main(["cbis", "--root", str(tmp_path), "--merge-types"])
    assert not (tmp_path / "both.csv").exists()


def test_a_patient_in_training_and_test_of_one_type_is_refused(tmp_path):
    cbis_tree.make_small_cbis(tmp_path)
    cbis_tree.write_case_table(tmp_path, "calc", "test", cbis_tree.make_lesions(20, first=40))
    with pytest.raises(ValueError, match="1 patients .*P_00040"):
        cbis_tables.make_cbis(tmp_path)
    assert not (tmp_path / "calc.csv").exists() and not (tmp_path / "mass.csv").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("BENIGN_WITHOUT_CALLBACK", "BENIGNISH"), "row 5: pathology 'BENIGNISH'"),
        (lambda text: text.replace("pathology", "outcome", 1), "no column pathology"),
        (lambda text: text.replace("/000001.dcm", "", 1), "row 1: cropped_image_file_path"),
        (lambda text: text.replace(",MLO,1,", ",CC,1,", 1), "row 3 is the same lesion as .*row 1"),
    ],
)
def test_a_table_that_is_not_the_published_one(tmp_path, change, message):
    cbis_tree.make_small_cbis(tmp_path)
    path = tmp_path / "csv" / cbis_tree.TABLES["calc", "train"]
    path.write_bytes(change(path.read_bytes().decode()).encode())
    with pytest.raises(ValueError, match=message):
        cbis_tables.make_cbis(tmp_path)
    assert not list(tmp_path.glob("*.csv*"))


def test_nothing_to_join(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither jpeg/"):
        cbis_tables.make_cbis(tmp_path)
    (tmp_path / "jpeg").mkdir()
    with pytest.raises(FileNotFoundError, match="calc_case_description_train_set.csv"):
        cbis_tables.make_cbis(tmp_path)


def test_metadata_that_leaves_the_root(tmp_path):
    cbis_tree.make_small_cbis(tmp_path)
    (tmp_path / "CBIS-DDSM").mkdir()
    (tmp_path / "metadata.csv").write_text("Series UID,File Location\n1.2.3,./CBIS-DDSM/a\n1.2.4,../../elsewhere\n")
    with pytest.raises(ValueError, match="row 2: .*elsewhere is outside"):
        cbis_tables.make_cbis(tmp_path)


def test_too_few_patients_for_a_validation_split(tmp_path):
    for kind in ("calc", "mass"):
        cbis_tree.write_case_table(tmp_path, kind, "train", cbis_tree.make_lesions(3))
        cbis_tree.write_case_table(tmp_path, kind, "test", cbis_tree.make_lesions(3, 11))
    cbis_tree.make_jpeg_edition(tmp_path)
    with pytest.raises(ValueError, match="--val-folds 5: choose 2 to 3"):
        cbis_tables.make_cbis(tmp_path)
    with pytest.raises(ValueError, match="--val-folds 2: splitting 3 patients leaves training or"):
        cbis_tables.make_cbis(tmp_path, val_folds=2)


def test_demo_is_drawn_and_joined(tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO", "medslip")
    few = {"calc": {"train": 150, "test": 20}, "mass": {"train": 150, "test": 20}}
    monkeypatch.setattr(world, "make_demo", partial(world.make_demo, lesions=few))
    make_dataset.main(["demo", "--root", str(tmp_path / "demo"), "--pairs", "4", "--size", "16", "--workers", "1"])
    assert "SYNTHETIC" in caplog.text
    lesions = CbisLesions(tmp_path / "demo" / "cbis", "mass", "test", "crop", Preprocess(size=16))
    assert len(lesions) >= 20 and lesions[0][0].shape == (3, 16, 16)


def test_a_mask_that_is_described_as_the_crop_never_becomes_it(tmp_path, caplog):
    crop = np.random.default_rng(0).normal(90, 25, (30, 26)).clip(0, 255).astype(np.uint8)
    mask = np.zeros((60, 50), np.uint8)
    mask[20:30, 10:20] = 255
    for name, pixels in (("1.jpg", crop), ("2.jpg", mask)):
        Image.fromarray(pixels).save(tmp_path / name, quality=90)
    for first, second, said in (
        ("cropped images", "ROI mask images", False),
        ("ROI mask images", "cropped images", True),
        ("ROI mask images", "ROI mask images", False),
        ("", "", False),
    ):
        caplog.clear()
        images = [
            cbis_tables.SeriesImage(Path("1.jpg"), first),
            cbis_tables.SeriesImage(Path("2.jpg"), second),
        ]
        found = cbis_tables.tell_crop_from_mask(images, tmp_path)
        assert (found["crop"].path.name, found["mask"].path.name) == ("1.jpg", "2.jpg")
        assert ("looks like a mask" in caplog.text) == said


def lesion(number: int, patient: str, pathology: str) -> cbis_tables.Lesion:
    cells = {"lesion": f"L{number}", "patient": patient, "pathology": pathology, "split": "train"}
    return cbis_tables.Lesion(f"calc.csv, row {number}", {"crop": "1", "full": "2", "mask": "3"}, cells)


def test_the_fold_closest_to_the_whole_is_held_out():
    taken = set()
    for seed in range(6):
        rng = np.random.default_rng(seed)
        patients = rng.integers(0, 40, 90).astype(str)
        lesions = [lesion(i, p, CBIS_CLASSES[rng.choice(3, p=(0.5, 0.2, 0.3))]) for i, p in enumerate(patients)]
        pathologies = np.array([lesion.cells["pathology"] for lesion in lesions])
        cbis_tables.split_off_validation(lesions, folds=4, seed=seed)
        held_out = [i for i, lesion in enumerate(lesions) if lesion.cells["split"] == "val"]
        splitter = StratifiedGroupKFold(4, shuffle=True, random_state=seed)
        folds = [part.tolist() for _, part in splitter.split(pathologies, pathologies, patients)]
        apart = [
            max(abs((pathologies[fold] == c).sum() / (pathologies == c).sum() - 1 / 4) for c in CBIS_CLASSES)
            for fold in folds
        ]
        assert apart[folds.index(held_out)] == min(apart)
        taken.add(folds.index(held_out))
    assert len(taken) > 1


@pytest.mark.parametrize("inner, share, expected", [
    (40, 1.0, True), (200, 1.0, True), (41, 1.0, False), (199, 1.0, False), (120, 0.04, True), (120, 0.06, False),
])  # fmt: skip
def test_a_mask_has_its_pixels_within_a_tenth_of_its_ends(tmp_path, inner, share, expected):
    """Of the ends that it has, 20 and 220 here, but for 5% of the pixels."""
    grey = np.tile(np.array([20, 220], np.uint8), 500)
    grey[2 : 2 + round(998 * share)] = inner
    Image.fromarray(grey.reshape(20, 50)).save(tmp_path / "a.png")
    assert cbis_tables.nearly_binary(tmp_path / "a.png") is expected


def test_one_of_several_full_images_is_not_guessed(tmp_path):
    rng = np.random.default_rng(0)
    images = {"1": [("crop", cbis_tree.crop_image(rng))], "3": [("mask", cbis_tree.mask_image(rng))]}
    images["2"] = [("full", cbis_tree.crop_image(rng))] * 2
    series = {uid: [] for uid in images}
    for uid, found in images.items():
        for number, (kind, pixels) in enumerate(found):
            Image.fromarray(pixels).save(tmp_path / f"{uid}_{number}.png")
            image = cbis_tables.SeriesImage(Path(f"{uid}_{number}.png"), cbis_tree.DESCRIPTIONS[kind])
            series[uid].append(image)
    several = lesion(1, "P_1", "BENIGN")
    assert several.resolve(series, tmp_path) == ["calc.csv, row 1, L1: no full among 2 images, series 2"]
    assert "full" not in several.cells and (several.cells["crop"], several.cells["mask"]) == ("1_0.png", "3_0.png")
    single = lesion(2, "P_1", "BENIGN")
    assert single.resolve(series | {"2": series["2"][:1]}, tmp_path) == [] and single.cells["full"] == "2_0.png"
